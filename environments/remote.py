"""A search server as a back end of the tools: `environment.retrieval: http://host:port`.

    text_index, image_index = connect("http://127.0.0.1:8000")

Many training ranks share one server (`environments.serve`, or anything that speaks Search-R1's
protocol). Connections are kept; failed requests are tried again with growing pauses, within one
time limit for all attempts; while a server is known to be down, calls fail at once, so that a
training step goes on with infrastructure faults instead of waiting for each.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import urllib3

from environments.errors import EnvironmentSetupError
from environments.tools import SNIPPET_WORDS, Hit
from environments.wire import TOKEN_VARIABLE, encode_image, hit_of

if TYPE_CHECKING:
    from PIL.Image import Image

RETRIED = frozenset({429, 500, 502, 503, 504})
"""Statuses that may pass by themselves."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
COOL_DOWN_S = 2.0
"""How long calls fail at once after one found no server."""
MAX_ANSWER_BYTES = 64 * 2**20
MAX_PIXELS = 4_000_000
"""Of a thumbnail in an answer."""
MAX_SENT_SIDE = 1024
"""Longer side of a picture that is sent: a photo of twelve megapixels is more as PNG than a server
takes in one request."""
POOL_SIZE = 64


class SearchServerError(RuntimeError):
    """The server did not answer, or answered with an error."""


class SearchServer:
    """The connection to a server; safe to use from many threads.

    Args:
        url: `http://host:port`, a path in front of the endpoints is kept.
        timeout_s: limit of one call, all attempts and pauses together.
        retries: further attempts after a failed one.
        token: bearer token; None = that of the environment variable OBM_SEARCH_TOKEN, if set.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 10.0, retries: int = 4, token: str | None = None
    ):
        try:
            parts = urllib3.util.parse_url(url)
        except urllib3.exceptions.LocationParseError:
            parts = urllib3.util.Url()
        if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.auth:
            raise EnvironmentSetupError(
                f"environment.retrieval: {url!r} is no address of a search server; "
                "write it as http://host:port"
            )
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.retries = retries
        self._headers = {"Content-Type": "application/json"}
        token = token or os.environ.get(TOKEN_VARIABLE)
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.PoolManager(num_pools=2, maxsize=POOL_SIZE, retries=False)
        self._random = random.Random()  # of pauses only: the training's own seeds stay alone
        self._lock = threading.Lock()
        self._down_until = 0.0
        self._problem = ""

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers.

        Raises:
            SearchServerError: no answer within the limit, or one that says what is wrong.
        """
        return self._ask("POST", path, json.dumps(body).encode())

    def health(self) -> dict[str, Any]:
        """What the server says about itself; {} from a server that has no such page.

        Raises:
            SearchServerError: nothing answers.
        """
        try:
            answer = self._ask("GET", "/health")
        except _RefusedError:
            return {}  # Search-R1's own server has no such page
        return answer if isinstance(answer, dict) else {}

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        now = time.monotonic()
        deadline = now + self.timeout_s
        if now < self._down_until:
            raise SearchServerError(f"{self._problem} (not asked again for {COOL_DOWN_S:g} s)")
        attempt, pause_s = 0, FIRST_PAUSE_S
        while True:
            answer, problem, wanted_pause_s = self._attempt(method, path, body, deadline)
            if not problem:
                return answer
            # jitter: ranks that failed together must not come back together
            wait_s = max(wanted_pause_s, pause_s * self._random.uniform(0.5, 1.0))
            if attempt == self.retries or time.monotonic() + wait_s >= deadline:
                if not wanted_pause_s:
                    with self._lock:
                        self._down_until = time.monotonic() + COOL_DOWN_S
                        self._problem = problem
                raise SearchServerError(f"{problem} after {attempt + 1} attempts")
            time.sleep(wait_s)
            attempt, pause_s = attempt + 1, min(2 * pause_s, LONGEST_PAUSE_S)

    def _attempt(
        self, method: str, path: str, body: bytes | None, deadline: float
    ) -> tuple[Any, str, float]:
        """One request: the answer, or what is wrong and the pause that the server asks for."""
        address = f"{self.url}{path}"
        left_s = max(deadline - time.monotonic(), 0.001)
        try:
            response = self._pool.request(
                method, address, body=body, headers=self._headers, redirect=False,
                timeout=urllib3.Timeout(total=left_s), preload_content=False,
            )  # fmt: skip
            data = response.read(MAX_ANSWER_BYTES + 1)
            if len(data) > MAX_ANSWER_BYTES:
                response.close()
            response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return None, f"{address}: {_reason(error)}", 0.0
        if response.status in RETRIED:
            pause = response.headers.get("Retry-After", "")
            wanted_s = min(float(pause), LONGEST_PAUSE_S) if pause.isdecimal() else 0.0
            return None, f"{address}: {response.status} {_message(data)}", wanted_s
        if response.status != 200:
            raise _RefusedError(f"{address}: {response.status} {_message(data)}")
        if len(data) > MAX_ANSWER_BYTES:
            raise SearchServerError(f"{address}: the answer is longer than {MAX_ANSWER_BYTES} B")
        try:
            return json.loads(data), "", 0.0
        except (ValueError, RecursionError) as error:
            raise SearchServerError(f"{address}: the answer is no JSON") from error


class _RefusedError(SearchServerError):
    """The server answered that it will not do this, ever."""


class RemoteTextIndex:
    """Text search on a server.

    Args:
        server: the connection.
        snippet_words: longest snippet that is asked for and shown; a server that does not know
            this sends whole passages.
    """

    def __init__(self, server: SearchServer, snippet_words: int = SNIPPET_WORDS):
        self.server = server
        self.snippet_words = self.words_shown = snippet_words

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The best `k` passages of every query.

        Raises:
            SearchServerError: see SearchServer.post.
        """
        request = {
            "queries": queries, "topk": k, "return_scores": True,
            "snippet_words": self.snippet_words,
        }  # fmt: skip
        return _read_hits(self.server.post("/retrieve", request), len(queries), k)


class RemoteImageIndex:
    """Image search on a server.

    Args:
        server: the connection.
        thumbnails: ask for the pictures of the hits, too.
    """

    def __init__(self, server: SearchServer, thumbnails: bool = False):
        self.server = server
        self.thumbnails = thumbnails

    def search(self, images: list[Image], k: int) -> list[list[Hit]]:
        """The best `k` entries for every picture.

        Pictures are sent as PNG, every pixel as it is; larger ones than MAX_SENT_SIDE are scaled
        down.

        Raises:
            SearchServerError: see SearchServer.post.
        """
        request = {
            "images": [encode_image(_scaled(image)) for image in images], "topk": k,
            "return_scores": True, "return_images": self.thumbnails,
        }  # fmt: skip
        return _read_hits(self.server.post("/retrieve_images", request), len(images), k)


def connect(
    url: str,
    *,
    timeout_s: float = 10.0,
    thumbnails: bool = False,
    snippet_words: int = SNIPPET_WORDS,
    token: str | None = None,
) -> tuple[RemoteTextIndex | None, RemoteImageIndex | None]:
    """The indexes of a running server; None for what it says it has not.

    Args:
        url: `http://host:port`.
        timeout_s: limit of a call, all attempts together.
        thumbnails: image hits come with pictures.
        snippet_words: of a text hit.
        token: see SearchServer.

    Raises:
        EnvironmentSetupError: nothing answers there, or it wants another token.
    """
    server = SearchServer(url, timeout_s=timeout_s, token=token)
    try:
        health = server.health()
        # a server without such a page is Search-R1's, which has text alone
        has_text, has_images = health.get("text", 0) is not None, health.get("images") is not None
        if has_text:
            server.post("/retrieve", {"queries": [], "topk": 1, "return_scores": True})
    except SearchServerError as error:
        raise EnvironmentSetupError(
            f"environment.retrieval: no search server can be used ({error}); start one with "
            f"`obm serve`, and set {TOKEN_VARIABLE} if it wants a token"
        ) from error
    text = RemoteTextIndex(server, snippet_words) if has_text else None
    return text, RemoteImageIndex(server, thumbnails) if has_images else None


def _scaled(image: Image) -> Image:
    if max(image.size) <= MAX_SENT_SIDE:
        return image
    image = image.convert("RGB")  # of a palette's numbers no mean can be taken
    image.thumbnail((MAX_SENT_SIDE, MAX_SENT_SIDE))
    return image


def _read_hits(answer: Any, n_queries: int, k: int) -> list[list[Hit]]:
    try:
        rows = [[hit_of(item, MAX_PIXELS) for item in row[:k]] for row in answer["result"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SearchServerError(f"the answer is not as expected ({error!r})") from error
    if len(rows) != n_queries:
        raise SearchServerError(f"{len(rows)} answers came to {n_queries} queries")
    return rows


def _reason(error: Exception) -> str:
    """What is wrong in a few words: the innermost reason that urllib3 wrapped."""
    reason = getattr(error, "reason", None)
    inner = reason if isinstance(reason, Exception) else error
    return " ".join(str(inner).rpartition(": ")[2].split())[:160] or type(inner).__name__


def _message(data: bytes) -> str:
    """The error text of an answer, shortened."""
    try:
        text = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = data[:160].decode("utf-8", "replace")
    return " ".join(str(text).split())[:160]
