"""The live services' replies, as their documentation shows them, over real HTTP on loopback.

    with FakeServices() as fake:
        fake.say("/serper/search", 429, {"message": "slow down"}, {"Retry-After": "1"})
        ...  # once so, then as recorded
        fake.requests  # what came in

Every path has a recorded good reply (tests/environments/replies/*.json); `say` queues others before
it. Bodies may come in slow pieces, and a reply may be cut off in the middle.
"""

import contextlib
import json
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

REPLIES = Path(__file__).parent / "replies"
RECORDED = {
    ("POST", "/serper/search"): "serper.json",
    ("GET", "/brave/web/search"): "brave.json",
    ("POST", "/tavily/search"): "tavily.json",
    ("GET", "/serpapi/search"): "serpapi_lens.json",
    ("POST", "/jina/"): "jina.json",
    ("POST", "/llm/v1/chat/completions"): "chat.json",
}
KEY_PLACES = {
    "serper": lambda request: request.headers.get("x-api-key"),
    "brave": lambda request: request.headers.get("x-subscription-token"),
    "tavily": lambda request: request.headers.get("authorization", "").removeprefix("Bearer "),
    "serpapi": lambda request: request.query.get("api_key"),
}


@dataclass
class Said:
    """A reply; `piece_s` > 0 sends its body byte by byte with such pauses."""

    status: int
    body: bytes
    headers: dict = field(default_factory=dict)
    piece_s: float = 0.0
    cut: bool = False


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    query: dict
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class FakeServices:
    """A server with all services below their own path; a context manager."""

    def __init__(self):
        self.requests = []
        self.pages = {}
        self.keys = {}
        self.answer = None
        self._queued = defaultdict(deque)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _reply(self):
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, parts.path, query, headers, body)
                outer.requests.append(request)
                self._send(outer._said(request))

            do_GET = do_POST = do_PUT = _reply

            def _send(self, said):
                with contextlib.suppress(ConnectionError):  # who asked may have gone
                    self._send_all(said)

            def _send_all(self, said):
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                if not {"Content-Length", "Transfer-Encoding"} & set(said.headers):
                    self.send_header("Content-Length", str(len(said.body)))
                self.end_headers()
                body = said.body[: len(said.body) // 2] if said.cut else said.body
                step = 1 if said.piece_s else max(len(body), 1)
                for i in range(0, len(body), step):
                    self.wfile.write(body[i : i + step])
                    self.wfile.flush()
                    time.sleep(said.piece_s)
                if said.cut:
                    self.close_connection = True

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        """Ends the service: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    def say(self, path, status=200, body=b"", headers=None, *, times=1, **how):
        """Queues a reply for a path, before the recorded one."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        for _ in range(times):
            self._queued[path].append(Said(status, content, dict(headers or {}), **how))

    def page(self, path, body, kind="text/html; charset=utf-8", status=200, **headers):
        """Serves a page for good."""
        content = body if isinstance(body, bytes) else body.encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.pages[path] = Said(status, content, {"Content-Type": kind, **named})

    def _said(self, request):
        if self._queued[request.path]:
            return self._queued[request.path].popleft()
        if request.path in self.pages:
            return self.pages[request.path]
        name = request.path.split("/")[1]
        if name in self.keys and KEY_PLACES[name](request) != self.keys[name]:
            return Said(403, b'{"message":"Unauthorized.","statusCode":403}')
        if self.answer is not None and (said := self.answer(request)) is not None:
            return Said(200, json.dumps(said).encode())
        recorded = RECORDED.get((request.method, request.path))
        if recorded is None:
            return Said(200 if request.method == "PUT" else 404, b"{}")
        return Said(200, (REPLIES / recorded).read_bytes(), {"Content-Type": "application/json"})
