"""Talking to a paid service: its key, its rate, its bad days.

A key is read from the environment when a request needs it, goes into that request alone, and is
cut out of every text that comes back before it can reach an error. Requests of all threads of a
process share one token bucket; a service that says `Retry-After` is left alone for that long.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from environments.errors import EnvironmentSetupError
from environments.sanitize import one_line
from environments.web import Reply, WebError, exchange, proxy_for

KEY_VARIABLES = {
    "serper": "SERPER_API_KEY",
    "brave": "BRAVE_API_KEY",
    "tavily": "TAVILY_API_KEY",
    "serpapi": "SERPAPI_API_KEY",
    "jina": "JINA_API_KEY",
    "summary": "SUMMARY_API_KEY",
    "image_host": "IMAGE_HOST_TOKEN",
}
"""Which environment variable holds which key."""
URLS = {
    "serper": "https://google.serper.dev",
    "brave": "https://api.search.brave.com/res/v1",
    "tavily": "https://api.tavily.com",
    "serpapi": "https://serpapi.com",
    "jina": "https://r.jina.ai",
}
MAX_REPLY_BYTES = 8_000_000
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
_SPENT = re.compile(r"credit|quota|run out|insufficient|usage limit|plan limit", re.IGNORECASE)
LONGEST_CLOSED_S = 3600.0
"""A service may ask to be left alone for so long; a longer X-RateLimit-Reset is a moment."""


class KeyMissingError(WebError):
    """The environment variable with the key is not set, or holds no key."""

    is_permanent = True


class KeyRefusedError(WebError):
    """The service does not accept the key."""

    is_permanent = True


class QuotaError(WebError):
    """What was paid for is used up."""

    is_permanent = True


class RateLimitedError(WebError):
    """Too many requests, and no time left to wait."""


class RequestRefusedError(WebError):
    """The service finds the request wrong: a fault of the settings or of this code."""

    is_permanent = True


class ServiceDownError(WebError):
    """The service answers with an error of its own."""


class MalformedReplyError(WebError):
    """The service's answer is not of the form that it documents."""


class TokenBucket:
    """At most `per_second` requests on average, `burst` at once; shared by threads.

    Args:
        per_second: rate.
        burst: requests that need not wait after a pause.
        clock, sleep: seconds; others in tests.
    """

    def __init__(
        self,
        per_second: float,
        burst: int = 1,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.per_second, self.burst = per_second, burst
        self._clock, self._sleep = clock, sleep
        self._tokens, self._filled_at = float(burst), clock()
        self._closed_until = -float("inf")
        self._lock = threading.Lock()

    def take(self, within_s: float) -> bool:
        """Waits for its turn; False, at once and without a place in the queue, if it would not come
        within the given seconds."""
        with self._lock:
            now = self._clock()
            gained = (now - self._filled_at) * self.per_second
            self._tokens, self._filled_at = min(self._tokens + gained, self.burst), now
            wait = max((1 - self._tokens) / self.per_second, self._closed_until - now, 0.0)
            if wait > within_s:
                return False
            self._tokens -= 1  # below zero: a place in the queue
        if wait > 0:
            self._sleep(wait)
        return True

    def close(self, for_s: float) -> None:
        """Lets nobody through for a while."""
        with self._lock:
            self._closed_until = max(self._closed_until, self._clock() + for_s)


class Service:
    """One HTTP service that speaks JSON.

    Args:
        name: for messages and counts.
        url: base URL, without query or credentials.
        key_variable: environment variable that holds the key.
        is_key_required: without a key no request is made.
        timeout_s: for a request with all its repetitions and waits.
        retries: further attempts after a failure that may pass.
        bucket: the rate; None = no limit.
        setting: key of the settings that the URL comes from, for messages.

    Attributes:
        counts: requests, and failures by the name of their error.

    Raises:
        EnvironmentSetupError: no http(s) URL, or one that could hold a key.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key_variable: str,
        *,
        is_key_required: bool = True,
        timeout_s: float = 10.0,
        retries: int = 2,
        bucket: TokenBucket | None = None,
        setting: str | None = None,
    ) -> None:
        setting = setting or name
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EnvironmentSetupError(f"{setting}: a base URL begins with http:// or https://")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise EnvironmentSetupError(
                f"{setting}: the base URL holds more than host and path; "
                f"put the key into the environment variable {key_variable}"
            )
        self.name, self.url = name, url.rstrip("/")
        self.key_variable, self.is_key_required = key_variable, is_key_required
        self.timeout_s, self.retries, self.bucket = timeout_s, retries, bucket
        self.counts: Counter[str] = Counter()

    def key(self) -> str | None:
        """The key, fresh from the environment; None where none is needed or set.

        Raises:
            KeyMissingError: none is set, or what is set cannot be a key.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.is_key_required:
            raise KeyMissingError(f"{self.name} needs a key: set {self.key_variable}")
        if not re.fullmatch(r"[\x21-\x7e]*", key):  # an encoding error would repeat it
            raise KeyMissingError(f"{self.key_variable} holds characters that no key has")
        return key or None

    def ask(
        self,
        method: str,
        path: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        json_body: Any = None,
    ) -> Any:
        """One request and its decoded answer.

        Args:
            method: GET or POST.
            path: behind the base URL.
            headers: with the key, where it goes there.
            query: with the key, where it goes there.
            json_body: of a POST.

        Raises:
            WebError: no answer after all attempts within the time limit; never holds the key.
        """
        url = f"{self.url}{path}" + (f"?{urlencode(query)}" if query else "")
        sent = {"Accept": "application/json", **(headers or {})}
        body = None
        if json_body is not None:
            body = json.dumps(json_body).encode()
            sent["Content-Type"] = "application/json"
        return self.send(method, url, sent, body, self._decoded)

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        read: Callable[[Reply], Any],
    ) -> Any:
        """Makes the attempts; `read` turns an answer into a value or raises."""
        deadline = time.monotonic() + self.timeout_s
        pause = FIRST_PAUSE_S
        for attempt in range(self.retries + 1):
            left = deadline - time.monotonic()
            if self.bucket is not None and not self.bucket.take(left):
                self.counts["RateLimitedError"] += 1
                raise RateLimitedError(f"{self.name}: no place within its rate for {left:.1f} s")
            self.counts["requests"] += 1
            try:
                reply = exchange(
                    method,
                    url,
                    headers=headers,
                    body=body,
                    timeout_s=max(deadline - time.monotonic(), 0.0),
                    max_bytes=MAX_REPLY_BYTES,
                    proxy=proxy_for(url),
                )
                return read(reply)
            except WebError as error:
                self.counts[type(error).__name__] += 1
                wait = max(error.retry_after_s, pause * random.uniform(0.5, 1.0))
                is_last = attempt == self.retries or not _may_pass(error)
                if is_last or time.monotonic() + wait >= deadline:
                    error.is_permanent = True  # a caller's repetitions would multiply ours
                    raise
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    def _decoded(self, reply: Reply) -> Any:
        self.check(reply)
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError):
            raise MalformedReplyError(f"{self.name}: the answer is no JSON") from None

    def check(self, reply: Reply) -> None:
        """Raises the error that a status stands for."""
        if reply.status < 300:
            return
        said = self.scrubbed(error_text(reply.body))
        message = f"{self.name}: HTTP {reply.status}: {said}"
        is_spent = _SPENT.search(said)
        error: WebError
        if reply.status in (402, 432, 433) or (reply.status in (400, 403, 429) and is_spent):
            error = QuotaError(message)
        elif reply.status in (401, 403) or "TOKEN_INVALID" in said:
            error = KeyRefusedError(message)
        elif reply.status == 429:
            error = RateLimitedError(message)
        elif reply.status >= 500 or reply.status == 408:
            error = ServiceDownError(message)
        else:
            error = RequestRefusedError(message)
        after = retry_after_s(reply.headers)
        if after is not None and isinstance(error, RateLimitedError | ServiceDownError):
            error.retry_after_s = after
            if self.bucket is not None:
                self.bucket.close(after)
        raise error

    def scrubbed(self, text: str) -> str:
        """A service's words on one line, without the key that it may repeat."""
        key = os.environ.get(self.key_variable, "").strip()
        for form in {key, quote(key, safe=""), json.dumps(key)[1:-1]} - {""}:
            text = text.replace(form, "***")
        return one_line(text, 200)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a service asks to be left alone: Retry-After (seconds or a date), or the first
    window of X-RateLimit-Reset (Brave: the one of a second, before the one of the month)."""
    after = headers.get("retry-after", "").strip()
    if not after:
        reset = headers.get("x-ratelimit-reset", "").split(",")[0].strip()
        return float(reset) if reset.isdecimal() and float(reset) <= LONGEST_CLOSED_S else None
    if after.isdecimal():  # isdigit would take ², which is no number
        return min(float(after), LONGEST_CLOSED_S)
    try:
        moment = parsedate_to_datetime(after)
    except (ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max((moment - datetime.now(UTC)).total_seconds(), 0.0), LONGEST_CLOSED_S)


def error_text(body: bytes) -> str:
    """The message in a service's error, whichever of the usual places it stands in."""
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return body[:500].decode(errors="replace")
    for _ in range(3):
        if not isinstance(found, dict):
            break
        names = ("error", "detail", "message", "readableMessage")
        inner = next((found[name] for name in names if found.get(name)), None)
        if inner is None:
            break
        code = found.get("code")
        found = f"{code}: {inner}" if isinstance(code, str) and isinstance(inner, str) else inner
    return found if isinstance(found, str) else json.dumps(found)


def _may_pass(error: WebError) -> bool:
    """Whether another attempt makes sense."""
    return error.fault == "infrastructure" and not error.is_permanent
