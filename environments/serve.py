"""One search server for text and pictures, wire-compatible with Search-R1's.

    obm serve --port 8000          # launch/commands/serve.py; docs/retrieval.md has the protocol

    POST /retrieve          {"queries": [str], "topk": int, "return_scores": bool}
    POST /retrieve_images   {"images": [base64], "topk": int, ...}, or multipart files
    GET  /health            what is served
    GET  /metrics           Prometheus

Each index has a bounded queue (`environments.batching`): beyond it the answer is 429 with
Retry-After. Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from environments.batching import Batcher, OverloadedError
from environments.retrieval import cut_snippet
from environments.tools import Hit, ImageIndex, TextIndex
from environments.wire import (
    BadPictureError,
    count_pixels,
    decode_image,
    document_of,
    from_base64,
)

logger = logging.getLogger(__name__)

DEFAULT_TOPK = 3  # Search-R1's


@dataclass(frozen=True)
class Limits:
    """What one request may ask, and how much may wait."""

    body_bytes: int = 16 * 2**20
    """largest body of a request"""
    queries: int = 512
    """queries, or pictures, of a request"""
    query_chars: int = 32_768
    """characters of a query"""
    topk: int = 100
    """hits of a query"""
    pixels: int = 25_000_000
    """pixels of a picture"""
    request_pictures: int = 4
    """pictures of that size, or as many pixels in smaller ones, that a request may have"""
    waiting: int = 1024
    """queries that may wait for an index; beyond, 429"""
    batch: int = 64
    """queries given to an index at a time"""
    answer_s: float = 30.0
    """seconds after which a request that still waits is given up with 503, and one whose body has
    not come whole with 408"""


class Metrics:
    """The server's own counters; `endpoint` is `text` or `images`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        options: dict[str, Any] = {"labelnames": ["endpoint"], "registry": self.registry}
        self.requests = Counter(
            "obm_search_requests",
            "Requests by status",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.queries = Counter("obm_search_queries", "Queries answered", **options)
        self.refused = Counter("obm_search_refused", "Requests refused for a full queue", **options)
        self.waiting = Gauge("obm_search_waiting", "Queries that wait for the index", **options)
        self.seconds = Histogram(
            "obm_search_request_seconds",
            "Time of a request",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            **options,
        )
        self.batches = Histogram(
            "obm_search_batch_queries",
            "Queries of a batch",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            **options,
        )


def make_app(
    text_index: TextIndex | None,
    image_index: ImageIndex | None,
    *,
    limits: Limits | None = None,
    token: str | None = None,
) -> Starlette:
    """The ASGI application.

    Args:
        text_index, image_index: what is searched; None = that endpoint answers 404.
        limits: of requests and queues.
        token: bearer token that every request but /health has to bring.
    """
    limits = limits or Limits()
    metrics = Metrics()
    batchers: dict[str, Batcher] = {}
    for name, index in (("text", text_index), ("images", image_index)):
        if index is not None:
            batchers[name] = Batcher(
                index.search,
                max_batch=limits.batch,
                max_waiting=limits.waiting,
                on_batch=metrics.batches.labels(name).observe,
            )
            waiting = functools.partial(getattr, batchers[name], "n_waiting")
            metrics.waiting.labels(name).set_function(waiting)

    async def retrieve(request: Request) -> Response:
        body = await _read_json(request)
        queries = _read_queries(body, limits)
        snippet_words = _read_number(body, "snippet_words", None, 1, 10_000)
        topk = _read_number(body, "topk", DEFAULT_TOPK, 1, limits.topk)
        found = await _ask("text", queries, topk)
        if snippet_words is not None:
            found = [
                [_shortened(hit, query, snippet_words) for hit in hits]
                for query, hits in zip(queries, found, strict=True)
            ]
        return _answer(found, bool(body.get("return_scores")))

    async def retrieve_images(request: Request) -> Response:
        body, pictures = await _read_pictures(request, limits)
        topk = _read_number(body, "topk", DEFAULT_TOPK, 1, limits.topk)
        with _refused("images"):  # before the dear part of it
            _batcher("images").check_room(len(pictures))
        images = await run_in_threadpool(_decode_all, pictures, limits)
        found = await _ask("images", images, topk)
        return _answer(found, bool(body.get("return_scores")), bool(body.get("return_images")))

    def _batcher(name: str) -> Batcher:
        if name not in batchers:
            raise HTTPException(404, f"this server has no {name} index")
        return batchers[name]

    @contextlib.contextmanager
    def _refused(name: str) -> Iterator[None]:
        try:
            yield
        except OverloadedError as error:
            metrics.refused.labels(name).inc()
            message = f"too many requests: {error}"
            raise HTTPException(429, message, {"Retry-After": "1"}) from error

    async def _ask(name: str, queries: Sequence[Any], topk: int) -> list[list[Hit]]:
        batcher = _batcher(name)
        try:
            with _refused(name):
                async with asyncio.timeout(limits.answer_s):
                    found = await batcher.ask(queries, topk)
        except TimeoutError as error:
            message = f"no answer within {limits.answer_s:g} s"
            raise HTTPException(503, message, {"Retry-After": "1"}) from error
        metrics.queries.labels(name).inc(len(queries))
        return found

    def measured(
        name: str, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def run(request: Request) -> Response:
            start = time.perf_counter()
            try:
                response = await endpoint(request)
            except HTTPException as error:
                response = _error(error.status_code, error.detail, error.headers)
            except Exception as error:
                logger.exception("a %s request failed", name)
                response = _error(500, f"the search failed ({type(error).__name__})")
            metrics.seconds.labels(name).observe(time.perf_counter() - start)
            metrics.requests.labels(name, str(response.status_code)).inc()
            return response

        return run

    async def health(request: Request) -> Response:
        sizes = {"text": _size(text_index), "images": _size(image_index)}
        return JSONResponse({"status": "ok", **sizes})

    async def show_metrics(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for batcher in batchers.values():
            await batcher.close()

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, error.detail, error.headers)

    app = Starlette(
        routes=[
            Route("/retrieve", measured("text", retrieve), methods=["POST"]),
            Route("/retrieve_images", measured("images", retrieve_images), methods=["POST"]),
            Route("/health", health),
            Route("/metrics", show_metrics),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: refuse},
    )
    app.add_middleware(BodyLimit, max_bytes=limits.body_bytes, max_s=limits.answer_s)
    if token:
        app.add_middleware(BearerToken, token=token)
    return app


class BearerToken:
    """Refuses requests without the token; /health stays open for whoever watches the server."""

    def __init__(self, app: ASGIApp, token: str):
        self.app = app
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                headers = {"WWW-Authenticate": "Bearer"}
                response = _error(401, "this server wants a bearer token", headers)
                return await response(scope, receive, send)
        return await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies above a size, announced or not, and those that do not come to an end."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float):
        self.app = app
        self.max_bytes = max_bytes
        self.max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            return await self._refusal()(scope, receive, send)
        n_bytes, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + self.max_s

        async def counted() -> Message:
            nonlocal n_bytes, is_whole
            try:
                # behind the body one only waits for the client to leave
                async with asyncio.timeout_at(None if is_whole else deadline):
                    message = await receive()
            except TimeoutError as error:
                words = f"the request did not come whole within {self.max_s:g} s"
                raise HTTPException(408, words, {"Connection": "close"}) from error
            is_whole = not message.get("more_body", False)
            n_bytes += len(message.get("body", b""))
            if n_bytes > self.max_bytes:
                raise HTTPException(413, self._words())
            return message

        return await self.app(scope, counted, send)

    def _words(self) -> str:
        return f"the request is larger than {self.max_bytes} bytes"

    def _refusal(self) -> Response:
        # the rest of the body is not read, so the connection cannot be used again
        return _error(413, self._words(), {"Connection": "close"})


async def _read_json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is no JSON object")
    return body


def _read_queries(body: dict[str, Any], limits: Limits) -> list[str]:
    queries = body.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise HTTPException(422, "queries has to be a list of texts")
    _check_number("queries", len(queries), limits.queries)
    if any(len(query) > limits.query_chars for query in queries):
        raise HTTPException(413, f"a query has more than {limits.query_chars} characters")
    return queries


def _read_number(body: dict[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    """A whole number; null or a missing one is the default, as with Search-R1's server."""
    value = body.get(name)
    if value is None:
        return default
    # multipart fields are text; isdigit would take ², and int has a limit of its own
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise HTTPException(422, f"{name} has to be a whole number from {low} to {high}")
    return value


async def _read_pictures(
    request: Request, limits: Limits
) -> tuple[dict[str, Any], Sequence[str | bytes]]:
    """The fields of an image request and its pictures: base64 in JSON, or files of a form."""
    if not request.headers.get("content-type", "").startswith("multipart/"):
        body = await _read_json(request)
        pictures = body.get("images")
        if not isinstance(pictures, list) or not all(isinstance(item, str) for item in pictures):
            raise HTTPException(422, "images has to be a list of base64 texts")
        _check_number("images", len(pictures), limits.queries)
        return body, pictures
    try:
        form = await request.form(max_files=limits.queries, max_fields=16)
    except HTTPException:
        raise
    except Exception as error:
        raise HTTPException(400, "the form cannot be read") from error
    body = {key: _plain(value) for key, value in form.items() if isinstance(value, str)}
    uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    return body, [await upload.read() for upload in uploads]


def _plain(value: str) -> Any:
    """A form's field: `false` and `0` are no."""
    return {"true": True, "false": False, "0": False}.get(value.lower(), value)


def _check_number(name: str, n: int, limit: int) -> None:
    if n > limit:
        raise HTTPException(413, f"{name}: {n} are too many; at most {limit} are taken")


def _decode_all(pictures: Sequence[str | bytes], limits: Limits) -> list[Any]:
    """The pictures, RGB; none is decoded before the headers of all say that they fit."""
    most, n_pixels = limits.request_pictures * limits.pixels, 0
    try:
        files = [item if isinstance(item, bytes) else from_base64(item) for item in pictures]
        for data in files:
            n_pixels += count_pixels(data, limits.pixels)
            if n_pixels > most:
                raise BadPictureError(
                    f"the pictures have more than {most} pixels together; ask for fewer at a time",
                    413,
                )
        return [decode_image(data, limits.pixels) for data in files]
    except BadPictureError as error:
        raise HTTPException(error.status, str(error)) from error


def _shortened(hit: Hit, query: str, n_words: int) -> Hit:
    return Hit(hit.id, hit.title, cut_snippet(hit.text, query, n_words), hit.score)


def _answer(found: list[list[Hit]], with_scores: bool, with_images: bool = False) -> Response:
    """The hits in Search-R1's two layouts: documents with scores, or documents alone."""
    if with_scores:
        result: list[Any] = [
            [{"document": document_of(hit, with_images), "score": hit.score} for hit in hits]
            for hits in found
        ]
    else:
        result = [[document_of(hit, with_images) for hit in hits] for hits in found]
    return JSONResponse({"result": result})


def _error(status: int, message: str, headers: Any = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _size(index: Any) -> int | None:
    """Number of entries; None without an index, -1 where an index does not say."""
    if index is None:
        return None
    return len(index) if hasattr(index, "__len__") else -1
