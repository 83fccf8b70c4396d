"""A TCP proxy with bad days, between a client and an HTTP server."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress

FATES = ("reset", "cut", "stall", "garbage", "lie", "error")
"""What becomes of a request on a bad day: the connection is reset, or cut in the middle of the
answer; nothing comes; bytes that are no HTTP; JSON that is no answer; a page of a gateway."""
LIES = (b'{"result": "none"}', b'{"result": [[{"document": 7}]]}', b'{"resu', b"[]")
READ_S = 30.0


class Proxy:
    """Passes requests on to a server, but for those that the dice doom.

    Args:
        port: of the server, on this machine.
        dice: choose the fates.
        n_sound: requests that are passed on at first.
        n_bad: doomed requests; after them the network is healed.
        share: of the requests between the first and the last doomed one that are doomed.
        stall_s: how long nothing comes.
    """

    def __init__(
        self,
        port: int,
        dice: random.Random,
        *,
        n_sound: int = 0,
        n_bad: int = 0,
        share: float = 0.7,
        stall_s: float = 3.0,
    ) -> None:
        self._server, self._dice = port, dice
        self._n_sound, self._n_bad = n_sound, n_bad
        self._share, self._stall_s = share, stall_s
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self.counts: Counter[str] = Counter()
        """fate -> requests; `pass` are those that came through"""
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._socket.getsockname()[1])

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._socket.close()

    @property
    def url(self) -> str:
        """Where clients go."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def n_doomed(self) -> int:
        """Requests that had no answer, or a wrong one."""
        with self._lock:
            return sum(self.counts.values()) - self.counts["pass"]

    def _accept(self) -> None:
        while not self._is_over.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _fate(self) -> str:
        with self._lock:
            n_seen = sum(self.counts.values())
            n_doomed = n_seen - self.counts["pass"]
            is_bad = n_seen >= self._n_sound and n_doomed < self._n_bad
            fate = "pass"
            if is_bad and self._dice.random() < self._share:
                fate = self._dice.choice(FATES)
            self.counts[fate] += 1
            return fate

    def _serve(self, client: socket.socket) -> None:
        """All requests of one connection."""
        client.settimeout(READ_S)
        with client, suppress(OSError):
            while request := read_message(client):
                if not self._answer(client, request, self._fate()):
                    return

    def _answer(self, client: socket.socket, request: bytes, fate: str) -> bool:
        """Answers one request; whether the connection may go on."""
        if fate == "reset":
            # without lingering a close is a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fate == "stall":
            self._is_over.wait(self._stall_s)
            return False
        if fate == "garbage":
            client.sendall(self._dice.randbytes(200))
            return False
        if fate == "lie":
            client.sendall(http_answer(b"200 OK", self._dice.choice(LIES)))
            return True
        if fate == "error":
            client.sendall(http_answer(b"502 Bad Gateway", b"<html>bad gateway</html>"))
            return True
        answer = self._ask(request)
        if fate == "cut":
            client.sendall(answer[: len(answer) // 2])
            return False
        client.sendall(answer)
        return True

    def _ask(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._server), timeout=READ_S) as server:
            server.sendall(request)
            return read_message(server)


def read_message(connection: socket.socket) -> bytes:
    """One HTTP message with a Content-Length, or without a body; b"" where the other end left.

    Raises:
        OSError: the connection broke in its middle.
    """
    content = b""
    while b"\r\n\r\n" not in content:
        more = connection.recv(65536)
        if not more:
            return b""
        content += more
    head, _, body = content.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        more = connection.recv(65536)
        if not more:
            raise ConnectionError("the other end left within a message")
        body += more
    return head + b"\r\n\r\n" + body


def http_answer(status: bytes, body: bytes) -> bytes:
    """An answer as a server writes it."""
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body


def wait_for_port(port: int, limit_s: float) -> bool:
    """Whether something listens there within so many seconds."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
        time.sleep(0.05)
    return False
