"""One HTTP exchange under limits: what live providers and pages have in common.

The other side may be slow, huge or hostile. The time limit holds for the whole exchange (name
look-up, connection, every single read), so a body that trickles in cannot stretch it; the size is
counted while the body streams in, as sent and again as decompressed. No cookies, no redirects, no
credentials but those given. Nothing of a request is logged and no error repeats its URL, because
some services take their key there.

`httpcore` does the talking: its network back end is where name look-up, address check and
connection are one step, so that the address that was checked is the one connected to.
"""

from __future__ import annotations

import functools
import socket
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpcore

# EAI_NODATA, a name without an address, is not known everywhere
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))

CheckAddress = Callable[[str], None]
"""Raises for an IP address that must not be connected to."""
WantsBody = Callable[[int, dict[str, str]], bool]
"""(status, headers) -> whether to read the body; may raise to refuse it."""


class WebError(RuntimeError):
    """An exchange that brought nothing.

    Attributes:
        fault: who is to blame, as in ToolResult. What is the model's fault has a message that the
            model may read.
        is_permanent: asking again does not help, or was tried already.
        retry_after_s: seconds that the service wants to be left alone; 0 = it did not say.
    """

    fault: Literal["model", "infrastructure"] = "infrastructure"
    is_permanent = False
    retry_after_s = 0.0


class UnreachableError(WebError):
    """No name, no connection, a broken connection or no valid HTTP."""


class NoSuchHostError(UnreachableError):
    """The name service knows no such name; one that cannot say is an UnreachableError."""


class TooSlowError(WebError):
    """The time limit passed first."""


class TooLargeError(WebError):
    """The body is larger than allowed, as sent or decompressed."""


class UnreadableBodyError(WebError):
    """The body is compressed in an unknown way, or its compressed data are broken."""


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        status: HTTP status.
        headers: names in lower case; of repeated ones the last.
        body: decompressed; empty if it was not wanted.
    """

    status: int
    headers: dict[str, str]
    body: bytes


def exchange(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    body: bytes | None = None,
    timeout_s: float,
    max_bytes: int,
    check_address: CheckAddress | None = None,
    wants_body: WantsBody = lambda status, headers: True,
    proxy: str | None = None,
) -> Reply:
    """One request and its answer, whatever its status.

    Args:
        method: GET, POST or PUT.
        url: absolute, ASCII.
        headers: sent as they are, beside Host and Accept-Encoding.
        body: of the request.
        timeout_s: for everything together.
        max_bytes: largest body, as sent and as decompressed.
        check_address: asked for every address of the host before any connection.
        wants_body: decides by status and headers whether the body is read.
        proxy: URL of an HTTP proxy; the address check then only sees the proxy.

    Raises:
        WebError: no answer, or none within the limits; what the two callbacks raise passes through.
    """
    host = urlsplit(url).hostname or ""
    backend = _LimitedBackend(time.monotonic() + timeout_s, check_address)
    sent = {"Host": urlsplit(url).netloc.rpartition("@")[2], "Accept-Encoding": "gzip, deflate"}
    try:
        with (
            _pool(backend, proxy) as pool,
            pool.stream(method, url, headers=[*sent.items(), *headers.items()], content=body) as r,
        ):
            got = {
                name.decode("latin-1").lower(): text.decode("latin-1") for name, text in r.headers
            }
            if not wants_body(r.status, got):
                return Reply(r.status, got, b"")
            return Reply(r.status, got, read_body(r.iter_stream(), got, max_bytes))
    except httpcore.TimeoutException:
        raise TooSlowError(f"{host} gave no whole answer within {timeout_s:g} s") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as error:
        raise UnreachableError(f"{host} cannot be reached ({type(error).__name__})") from None
    except httpcore.UnsupportedProtocol:
        raise UnreachableError("the URL is neither http nor https") from None


def read_body(chunks: Iterable[bytes], headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The decompressed body, never more than `max_bytes` of it in memory.

    Args:
        chunks: the body as sent.
        headers: names in lower case; Content-Length and Content-Encoding count.
        max_bytes: limit before and after decompression.

    Raises:
        TooLargeError: over the limit.
        UnreadableBodyError: unknown compression, or broken data.
    """
    too_large = TooLargeError(f"the body is larger than {max_bytes} bytes")
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large
    encoding = headers.get("content-encoding", "identity").strip().lower() or "identity"
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise UnreadableBodyError("the body is compressed in a way that was not asked for")
    inflate = None if encoding == "identity" else _Inflate()
    body, n_sent = bytearray(), 0
    for chunk in chunks:
        n_sent += len(chunk)
        if n_sent > max_bytes:
            raise too_large
        body += chunk if inflate is None else inflate(chunk, max_bytes - len(body))
        if len(body) > max_bytes:
            raise too_large
    if inflate is not None and n_sent and not inflate.is_complete:
        raise UnreadableBodyError("the compressed body ends early")
    return bytes(body)


class _Inflate:
    """gzip, zlib or raw deflate, never more than a byte over what fits."""

    def __init__(self) -> None:
        self._state = zlib.decompressobj(wbits=47)  # gzip or zlib, by its first bytes
        self._is_new = True

    @property
    def is_complete(self) -> bool:
        """Whether the data came to their own end."""
        return self._state.eof

    def __call__(self, data: bytes, room: int) -> bytes:
        """The next part, at most `room` + 1 bytes long."""
        if self._state.eof:
            return b""  # what follows the end is no part of the body
        try:
            part = self._state.decompress(data, room + 1)
        except zlib.error:
            if not self._is_new:
                raise UnreadableBodyError("the compressed body is broken") from None
            self._state, self._is_new = (
                zlib.decompressobj(wbits=-15),
                False,
            )  # "deflate" without head
            return self(data, room)
        self._is_new = False
        return part


def look_up(host: str, port: int, timeout_s: float) -> list[str]:
    """The IP addresses of a host, in the system's order.

    Raises:
        NoSuchHostError: no such name.
        UnreachableError: the name service fails.
        TooSlowError: the name service does not answer.
    """
    box: list[list[Any] | Exception] = []

    def ask() -> None:
        try:
            box.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError, ValueError) as error:
            box.append(error)

    # getaddrinfo knows no time limit; a daemon, so that a hung one cannot keep the process alive
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(max(timeout_s, 0.0))
    if not box:
        raise TooSlowError(f"the name {host} was not found in time")
    found = box[0]
    if isinstance(found, Exception):
        # EAI_AGAIN and the like say nothing about the name
        if isinstance(found, OSError) and found.errno not in _NO_SUCH_NAME:
            raise UnreachableError(f"the name {host} cannot be looked up")
        raise NoSuchHostError(f"there is no host {host}")
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses:
        raise NoSuchHostError(f"there is no host {host}")
    return addresses


def proxy_for(url: str) -> str | None:
    """The HTTP proxy that the environment variables name for this URL."""
    parts = urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


@functools.cache
def _tls() -> Any:
    return httpcore.default_ssl_context()  # reading the certificates takes longer than a connection


def _pool(backend: httpcore.NetworkBackend, proxy: str | None) -> httpcore.ConnectionPool:
    """A pool for one exchange: nothing of a host's answer outlives it."""
    if proxy is None:
        return httpcore.ConnectionPool(ssl_context=_tls(), network_backend=backend)
    return httpcore.HTTPProxy(proxy, ssl_context=_tls(), network_backend=backend)


class _LimitedBackend(httpcore.NetworkBackend):
    """Connects to an address that was checked, and gives every read what is left of the time."""

    def __init__(self, deadline: float, check_address: CheckAddress | None) -> None:
        self._deadline, self._check_address = deadline, check_address
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = look_up(host, port, _left(self._deadline))
        if self._check_address is not None:
            for address in addresses:  # one bad address among good ones is a trap, not an accident
                self._check_address(address)
        failure: Exception = UnreachableError(f"there is no host {host}")
        for address in addresses[:4]:
            try:
                stream = self._inner.connect_tcp(
                    address, port, _left(self._deadline), local_address, socket_options
                )
                return _LimitedStream(stream, self._deadline)
            except httpcore.ConnectError as error:
                failure = error
        raise failure


class _LimitedStream(httpcore.NetworkStream):
    """A connection that ends at the deadline, however small the pieces that come in."""

    def __init__(self, inner: httpcore.NetworkStream, deadline: float) -> None:
        self._inner, self._deadline = inner, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        inner = self._inner.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _LimitedStream(inner, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left
