"""A language model as second opinion on answers that the rules find wrong.

Any OpenAI-compatible service: `POST {url}/chat/completions`. It sees the extracted answer alone, as
a quoted JSON string that is data, never the episode; and its verdict is one line that begins with a
word drawn anew for each request, so that an answer which spells a verdict is no verdict, whether
the judge repeats it or not. Whatever else it replies is a failure, and so is a dead service: a
failed answer is not scored (None) and counted. An abstention leaves the rules' verdict, wrong.

    judge = Judge("http://127.0.0.1:8000/v1", "qwen2.5-32b-instruct", cache="runs/judge.jsonl")
    judge(question, "the city of Paris")   # 1.0, 0.0, or None where it failed
    judge.report()

The key comes from an environment variable and goes into the request's header, nowhere else.
Sources: the three verdicts of SimpleQA's grader (arXiv 2411.04368); the floor on the judge's
success of SenseNova-MARS (arXiv 2512.24330); the cap on answers of DeepEyesV2 (arXiv 2511.05271).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import secrets
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rewards.answer import MAX_ANSWER_CHARS
from rewards.errors import RewardError
from rewards.normalize import visible
from rewards.trajectory import get
from rewards.verdicts import PROMPT_VERSION, VERDICTS, instructions, quoted, read_verdict

logger = logging.getLogger(__name__)

MIN_SUCCESS = 0.95
"""Share of requests that must bring a verdict; below it the run ends."""
MIN_REQUESTS = 20
"""Requests before that share is looked at."""
MAX_REPLY_BYTES = 1 << 20
MAX_REPLY_TOKENS = 512
"""Thoughts included; one who thinks for longer comes to no verdict, and has failed."""


class JudgeError(RewardError):
    """The judge fails so often that its verdicts are no measure."""


class Judge:
    """Asks a service, keeps its verdicts, and counts.

    Args:
        url: base address; `/chat/completions` is put behind it.
        model: the service's name of the model.
        key_variable: environment variable with the key; without it no key is sent.
        cache: JSON-lines file of verdicts, read now and appended to; None = in memory.
        timeout_s: for one request.
        retries: further attempts after a failed request.
        audit_share: share of the answers offered by `audit` that are really asked about.
        max_chars: longer answers are wrong unasked.

    Raises:
        RewardError: the address or the model is missing or unusable, or the cache is unreadable.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OBM_JUDGE_KEY",
        cache: str | Path | None = None,
        timeout_s: float = 30.0,
        retries: int = 2,
        audit_share: float = 0.05,
        max_chars: int = MAX_ANSWER_CHARS,
    ) -> None:
        self.url = _checked_url(url)
        if not model:
            raise RewardError("rewards.judge_model is empty; name the model that judges")
        self.model = model
        self.key_variable = key_variable
        self.timeout_s = timeout_s
        self.retries = retries
        self.audit_share = audit_share
        self.max_chars = max_chars
        self.counts = dict.fromkeys(
            ("asked", "cached", "failed", "abstained", "audited", "agreed"), 0
        )
        self._lock = threading.Lock()
        self._path = Path(cache) if cache else None
        self._verdicts = _read_cache(self._path) if self._path else {}
        self._opener = urllib.request.build_opener(_NoRedirect, *_proxies(self.url))

    def __call__(self, question: Any, answer: str) -> float | None:
        """1.0 if the judge finds the answer right, 0.0 if not or unsure, None if it failed.

        Raises:
            JudgeError: fewer than MIN_SUCCESS of the requests brought a verdict.
        """
        if not visible(answer).strip() or len(answer) > self.max_chars:
            return 0.0
        verdict = self._verdict(question, answer)
        if verdict == "UNSURE":
            self._count("abstained")
        return None if verdict is None else VERDICTS[verdict]

    def audit(self, question: Any, answer: str) -> bool | None:
        """Asks about an answer that the rules find right, for a share of them.

        Returns:
            Whether the judge agrees; None if it was not asked, failed, or is unsure.
        """
        draw = int(self._key(question, answer)[:8], 16) / 2**32
        if draw >= self.audit_share:
            return None
        verdict = self._verdict(question, answer)
        if verdict is None or verdict == "UNSURE":
            return None
        self._count("audited")
        agrees = verdict == "CORRECT"
        if agrees:
            self._count("agreed")
        return agrees

    def report(self) -> dict[str, float]:
        """Counts, `success` (share of requests with a verdict) and `agreement` with the rules."""
        with self._lock:
            counts = dict(self.counts)
        report = {name: float(n) for name, n in counts.items()}
        if counts["asked"]:
            report["success"] = 1.0 - counts["failed"] / counts["asked"]
        if counts["audited"]:
            report["agreement"] = counts["agreed"] / counts["audited"]
        return report

    # ---------------------------------------------------------------- one verdict

    def _verdict(self, question: Any, answer: str) -> str | None:
        key = self._key(question, answer)
        with self._lock:
            known = self._verdicts.get(key)
            self.counts["cached"] += known is not None
        if known is not None:
            return known
        verdict = self._ask(question, answer)
        self._count("asked")
        if verdict is None:
            self._count("failed")
            self._check_success()
        else:
            self._keep(key, verdict)
        return verdict

    def _ask(self, question: Any, answer: str) -> str | None:
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2.0, 0.1 * 2**attempt))
            word = f"VERDICT-{secrets.token_hex(4)}"
            body = {
                "model": self.model,
                "messages": [
                    {"role": "system", "content": instructions(word)},
                    {"role": "user", "content": quoted(question, answer)},
                ],
                "temperature": 0.0,
                "max_tokens": MAX_REPLY_TOKENS,
            }
            try:
                reply = self._post(body)
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                # only the kind of error: its text may hold what was sent
                code = getattr(error, "code", "")
                logger.warning("the judge failed: %s %s", type(error).__name__, code)
                continue
            verdict = read_verdict(reply, word)
            if verdict is not None:
                return verdict
        return None

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers
        )
        with self._opener.open(request, timeout=self.timeout_s) as response:
            raw = response.read(MAX_REPLY_BYTES + 1)
        if len(raw) > MAX_REPLY_BYTES:
            raise ValueError("the reply is too long")
        content = json.loads(raw)["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("the reply holds no text")
        return content

    # ---------------------------------------------------------------- memory

    def _key(self, question: Any, answer: str) -> str:
        asked = [PROMPT_VERSION, self.url, self.model, quoted(question, answer)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _keep(self, key: str, verdict: str) -> None:
        line = json.dumps({"key": key, "verdict": verdict}) + "\n"
        with self._lock:
            self._verdicts[key] = verdict
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def _check_success(self) -> None:
        with self._lock:
            asked, failed = self.counts["asked"], self.counts["failed"]
        if asked >= MIN_REQUESTS and failed > (1.0 - MIN_SUCCESS) * asked:
            raise JudgeError(
                f"rewards.judge: {failed} of {asked} requests to {self.url} brought no verdict, "
                f"more than {1 - MIN_SUCCESS:.0%}; see that the service answers and that the model "
                "keeps to one line, or set rewards.judge to null"
            )


def make_judge(weights: Any) -> Judge | None:
    """The judge that the section `rewards` of the settings describes, or None."""
    url = get(weights, "judge")
    if not url:
        return None
    return Judge(
        url,
        get(weights, "judge_model", ""),
        key_variable=get(weights, "judge_key_variable", "OBM_JUDGE_KEY"),
        cache=get(weights, "judge_cache"),
        timeout_s=get(weights, "judge_timeout_s", 30.0),
        max_chars=get(weights, "max_answer_chars", MAX_ANSWER_CHARS),
    )


def _checked_url(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        RewardError: no address, or one with a key in it.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # an open bracket, a port above 65535
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError("rewards.judge is no address; write e.g. http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RewardError(
            "rewards.judge must not hold a key; put it into the environment variable that "
            "rewards.judge_key_variable names"
        )
    return url.rstrip("/")


def _proxies(url: str) -> list[urllib.request.BaseHandler]:
    """None for a service on this machine; elsewhere those of the environment."""
    is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    return [urllib.request.ProxyHandler({})] if is_local else []


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read_cache(path: Path) -> dict[str, str]:
    """Verdicts by key; none of a file that is not there yet.

    Raises:
        RewardError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:  # a folder, no rights, no text, a NUL in its name
        reason = getattr(error, "strerror", None) or error
        raise RewardError(
            f"rewards.judge_cache: {path} cannot be read ({reason}); name another file"
        ) from error
    verdicts = {}
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            verdicts[str(row["key"])] = str(row["verdict"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short is asked again
    return {key: verdict for key, verdict in verdicts.items() if verdict in VERDICTS}
