"""Client of a vLLM server: tokens in, tokens and their log-probs out, new weights between rollouts.

    client = VLLMClient("http://127.0.0.1:8000")
    server = client.check()
    reply = client.generate([1, 2, 3], [], sampling)

Written for `vllm serve` 0.32 with the options of docs/vllm.md, against what was measured there.
Where it differs from TRL's client: nothing of vLLM is imported, so the trainer's transformers stays
free; pictures are sent once and then named by their hash; log-probs come back as those of the
*full* distribution although the vision tokens were barred.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

BIAS = -100.0
"""Added to the logit of a barred token, times the temperature where that is above 1: far below any
other token, and still a number from which its probability can be told (-inf would be none)."""

NO_LOGPROB = -9999.0
"""What the server writes where it has no log-prob."""

HELP = "docs/vllm.md has the command that starts a server"


class VLLMError(RuntimeError):
    """The server is not there, or answers something else than it should."""

    exit_code = 2


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself."""

    model: str
    max_tokens: int
    """longest sequence, prompt and completion together"""


@dataclass(frozen=True, eq=False)
class ServerImage:
    """A picture as the server's own processor made it."""

    hash: str
    data: str
    """base64 of the processed tensors"""
    n_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How one turn is drawn."""

    max_tokens: int
    temperature: float = 1.0
    """0 = the most likely tokens"""
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    barred: tuple[int, ...] = ()
    """token ids that are never drawn"""
    watched: tuple[int, ...] = ()
    """token ids whose log-probs come with every token"""


@dataclass
class Reply:
    """Tokens that the server drew."""

    token_ids: list[int]
    logprobs: list[float]
    """under softmax(logits / temperature) over the full vocabulary, barred tokens included; for
    greedy tokens at temperature 1"""
    watched: list[dict[int, float]] = field(default_factory=list)
    """per token: id -> log-prob of the watched tokens"""
    version: str | None = None
    """version of the weights, if the server tells it"""
    n_cached: int = 0
    """tokens of the context that its prefix cache held; 0 if the server does not tell"""


class VLLMClient:
    """Talks to one server; every thread keeps its own connection.

    Args:
        url: `http://host:port` or `https://host:port`.
        timeout_s: for one request.
        retries: further attempts after a failed connection, a time-out or a 5xx answer.
        wait_s: before the first further attempt; doubles with each.

    Raises:
        VLLMError: not such a URL.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 300.0, retries: int = 3, wait_s: float = 0.5
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:  # an open bracket, a port above 65535
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise VLLMError(f"rollout.url: '{url}' is no server; write http://host:port")
        if parts.username or parts.password or parts.query or parts.fragment:
            # not shown, for it may be a key
            raise VLLMError(
                "rollout.url: holds more than host and path, which no request would carry; write "
                "http://host:port"
            )
        self.url = url.rstrip("/")
        self.timeout_s, self.retries, self.wait_s = timeout_s, retries, wait_s
        self.model = ""
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/")
        is_tls = parts.scheme == "https"
        self._connect = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        self._local = threading.local()
        self._known: set[str] = set()
        """hashes of the pictures that the server holds"""

    # ---------------------------------------------------------------- what a server can do

    def check(self, n_barred: int = 0) -> ServerInfo:
        """Asks the server what it is, and refuses one that would answer wrongly.

        Args:
            n_barred: number of barred tokens; their log-probs come with every token.

        Raises:
            VLLMError: it is not there, or was started without an option that is needed.
        """
        self._request("GET", "/health")
        served = self._request("GET", "/v1/models")
        try:
            card = served["data"][0]
            info = ServerInfo(str(card["id"]), int(card["max_model_len"]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._bad("/v1/models", "names no model with its max_model_len") from error
        path = "/server_info?config_format=json"
        config = self._request("GET", path, missing="VLLM_SERVER_DEV_MODE=1")
        try:
            mode = config["vllm_config"]["model_config"]["logprobs_mode"]
            n_logprobs = config["vllm_config"]["model_config"]["max_logprobs"]
            worker = config["vllm_config"]["parallel_config"]["worker_extension_cls"]
        except (KeyError, TypeError) as error:
            raise self._bad(path, f"lacks {error}") from error
        if mode != "processed_logprobs":
            raise self._bad(path, f"says {mode}; start it with --logprobs-mode processed_logprobs")
        if 0 <= n_logprobs <= n_barred:
            raise self._bad(path, f"allows {n_logprobs} log-probs; start it with --max-logprobs -1")
        if not str(worker).endswith("PolicyWorker"):
            raise self._bad(
                path,
                "says that it cannot take new weights; start it with --worker-extension-cls "
                "train.vllm_worker.PolicyWorker and PYTHONPATH naming this checkout",
            )
        self.model = info.model
        return info

    # ---------------------------------------------------------------- tokens

    def encode(self, image: Any) -> ServerImage:
        """Lets the server process a PIL image once; the result fits any position in any prompt."""
        png = io.BytesIO()
        image.save(png, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        part = {"type": "image_url", "image_url": {"url": source}}
        messages = [{"role": "user", "content": [part]}]
        path = "/v1/chat/completions/render"
        reply = self._request(
            "POST",
            path,
            {"model": self.model, "messages": messages, "max_tokens": 1},
            missing="--enable-scale-out",
        )
        try:
            features = reply["features"]
            ((name,), (data,), (place,)) = (
                features[key]["image"] for key in ("mm_hashes", "kwargs_data", "mm_placeholders")
            )
            return ServerImage(str(name), str(data), int(place["length"]))
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad(path, "returns no features for one image") from error

    def generate(
        self,
        token_ids: Sequence[int],
        images: Sequence[ServerImage],
        sampling: Sampling,
        image_token_id: int | None = None,
    ) -> Reply:
        """Continues one sequence.

        Args:
            token_ids: the context, image placeholders expanded.
            images: its pictures, in the order of their placeholders.
            sampling: how to draw.
            image_token_id: the placeholder.

        Raises:
            ValueError: placeholders and pictures do not match; the server would not notice and
                answer as if it had seen something else.
            VLLMError: no valid answer.
        """
        places = place_images(token_ids, images, image_token_id)
        path = "/inference/v1/generate"
        body = {
            "model": self.model,
            "token_ids": list(token_ids),
            "sampling_params": _sampling_params(sampling),
        }
        names = [image.hash for image in images]
        full: list[str | None] = [image.data for image in images]
        short = [None if i.hash in self._known else i.data for i in images]
        first, again = (
            {**body, "features": _features(names, places, data)} if images else body
            for data in (short, full)
        )
        reply = self._request("POST", path, first, again, missing="--enable-scale-out")
        self._known.update(names)
        try:
            return read_reply(reply, sampling)
        except VLLMError as error:
            raise self._bad(path, str(error)) from error

    def forget_images(self) -> None:
        """Sends pictures whole again, as after another client made the server forget them."""
        self._known.clear()

    # ---------------------------------------------------------------- weights

    def update_policy(self, folder: str, version: str) -> None:
        """Makes the server read new weights, and forget everything computed with the old ones.

        The encoder cache too: a worker drops its picture features when it loads weights, and the
        scheduler, which still believes in them, would take the server down at the next request.

        Args:
            folder: safetensors files that the server's machine can read.
            version: name of these weights; replies carry it.
        """
        self._request("POST", "/pause?mode=wait", missing="VLLM_SERVER_DEV_MODE=1")
        try:
            rpc = {"method": "load_policy", "args": [str(folder)]}
            self._request("POST", "/collective_rpc", rpc, missing="VLLM_SERVER_DEV_MODE=1")
            self.forget_images()
            for cache in ("prefix", "mm", "encoder"):
                path = f"/reset_{cache}_cache"
                answer = self._request("POST", path, missing="VLLM_SERVER_DEV_MODE=1")
                if isinstance(answer, dict) and answer.get("success") is False:
                    raise self._bad(path, "could not reset it: are other requests running?")
            self._request("POST", "/update_weight_version", {"new_version": version})
        finally:
            self._request("POST", "/resume")

    def policy_version(self) -> str:
        """Name of the weights that the server has now."""
        answer = self._request("GET", "/weight_info")
        try:
            return str(answer["weight_version"])
        except (KeyError, TypeError) as error:
            raise self._bad("/weight_info", "names no weight_version") from error

    def wake(self) -> None:
        """Has a sleeping server take its memory back."""
        self._request("POST", "/wake_up", missing="VLLM_SERVER_DEV_MODE=1 --enable-sleep-mode")

    def sleep(self) -> None:
        """Has the server give its GPU memory back, weights kept in main memory."""
        path = "/sleep?level=1"
        self._request("POST", path, missing="VLLM_SERVER_DEV_MODE=1 --enable-sleep-mode")

    # ---------------------------------------------------------------- HTTP

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        retry_body: dict[str, Any] | None = None,
        missing: str = "a newer vLLM",
    ) -> Any:
        """One exchange of JSON.

        Args:
            method: GET or POST.
            path: of the endpoint.
            body: of the first attempt.
            retry_body: of further attempts, if it is another.
            missing: what a server without this endpoint has to be started with.

        Raises:
            VLLMError: names the URL, the reason and what to do.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1))
            sent = body if attempt == 0 or retry_body is None else retry_body
            try:
                status, content = self._exchange(method, path, sent)
            except (OSError, http.client.HTTPException) as error:
                self._close()
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            if status >= 500:
                reason = f"HTTP {status}: {_error_text(content)}"
                continue
            if status == 404:
                raise self._bad(path, f"does not exist; the server needs {missing}")
            if status >= 400:
                raise self._bad(path, f"HTTP {status}: {_error_text(content)}")
            if not content:
                return None
            try:
                return json.loads(content)
            except ValueError as error:
                raise self._bad(path, f"is no JSON: {content[:80]!r}") from error
        n_attempts = f"{self.retries + 1} attempts" if self.retries else "1 attempt"
        raise self._bad(path, f"{reason} ({n_attempts} of {self.timeout_s:g} s)")

    def _exchange(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Status and content, over this thread's connection or a new one."""
        connection: Any = getattr(self._local, "connection", None)
        is_new = connection is None
        if is_new:
            connection = self._connect(self._host, self._port, timeout=self.timeout_s)
            self._local.connection = connection
        payload = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        try:
            connection.request(method, self._path + path, body=payload, headers=headers)
            response = connection.getresponse()
            content = response.read()
        except ConnectionError:
            if is_new:
                raise
            self._close()  # the server had closed an idle connection: no failure
            return self._exchange(method, path, body)
        if response.status >= 500:
            self._close()  # it closes too, without saying so
        return response.status, content

    def _close(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _bad(self, path: str, reason: str) -> VLLMError:
        return VLLMError(f"rollout.url: {self.url}{path.partition('?')[0]}: {reason}; {HELP}")


# ---------------------------------------------------------------- requests and replies


def place_images(
    token_ids: Sequence[int], images: Sequence[ServerImage], image_token_id: int | None
) -> list[dict[str, int]]:
    """Where each picture's placeholders lie in *our* tokens.

    The offsets that came with the features are those of the prompt they were rendered in.

    Raises:
        ValueError: as many placeholders as the pictures have tokens are not there.
    """
    places = []
    positions = [i for i, token in enumerate(token_ids) if token == image_token_id]
    n_needed = sum(image.n_tokens for image in images)
    if len(positions) != n_needed:
        raise ValueError(
            f"{len(positions)} image placeholders for {len(images)} images of {n_needed} tokens; "
            "policy and server must have the same image processor"
        )
    first = 0
    for image in images:
        run = positions[first : first + image.n_tokens]
        if run[-1] - run[0] != image.n_tokens - 1:
            raise ValueError(f"the placeholders of an image are torn apart at token {run[0]}")
        places.append({"offset": run[0], "length": image.n_tokens})
        first += image.n_tokens
    return places


def _features(names: list[str], places: list[dict[str, int]], data: list[str | None]) -> Any:
    return {
        "mm_hashes": {"image": names},
        "mm_placeholders": {"image": places},
        "kwargs_data": {"image": data},
    }


def _sampling_params(sampling: Sampling) -> dict[str, Any]:
    """The server's names. Everything that the checkpoint's generation config could set is set."""
    told = [*sampling.barred, *sampling.watched]
    params: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "logprobs": 0,
        "output_kind": 2,  # one answer at the end
    }
    if told:
        # of n ids the server lists the drawn token and n - 1: the repeated one is the n-th
        params["logprob_token_ids"] = [*told, told[0]]
        params["logprobs"] = len(told) + 1
    if sampling.barred:
        bias = BIAS * max(1.0, sampling.temperature)
        params["logit_bias"] = {str(token): bias for token in sampling.barred}
    return params


def read_reply(reply: Any, sampling: Sampling) -> Reply:
    """Checks an answer and undoes the effect of the bias on its log-probs.

    With bias b on the barred tokens S the server reports log p'(t) = l_t - Z', with Z' over all
    but S. The full distribution has Z = Z' + log(1 + sum over S of exp(log p'(s) - b)), so
    log p(t) = log p'(t) - (Z - Z'). Logits and b are divided by the temperature.

    Raises:
        VLLMError: something is missing, or does not fit together.
    """
    try:
        (choice,) = reply["choices"]
        token_ids = choice["token_ids"]
        entries = choice["logprobs"]["content"]
    except (KeyError, TypeError, ValueError) as error:
        raise VLLMError("holds no choice with token_ids and logprobs") from error
    if not isinstance(token_ids, list) or not all(type(i) is int and i >= 0 for i in token_ids):
        raise VLLMError("token_ids are no token ids")
    if not token_ids or choice.get("finish_reason") == "abort":
        raise VLLMError(f"holds no tokens ({choice.get('finish_reason')})")
    if len(token_ids) > sampling.max_tokens:
        raise VLLMError(f"holds {len(token_ids)} tokens where {sampling.max_tokens} were asked for")
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        raise VLLMError(f"holds {len(token_ids)} tokens and another number of log-probs")
    bias = BIAS * max(1.0, sampling.temperature) / (sampling.temperature or 1.0)
    logprobs, watched = [], []
    for token, entry in zip(token_ids, entries, strict=True):
        drawn, value = _token_and_logprob(entry)
        if drawn != token:
            raise VLLMError(f"the log-prob of token {drawn} stands where {token} was drawn")
        listed = dict(_token_and_logprob(top) for top in entry.get("top_logprobs") or [])
        lacking = [i for i in (*sampling.barred, *sampling.watched) if i not in listed]
        if lacking:
            raise VLLMError(f"lacks the log-prob of token {lacking[0]}, which was asked for")
        n_barred = sum(math.exp(listed[i] - bias) for i in sampling.barred)
        shift = math.log1p(n_barred)
        logprobs.append(value - shift)
        watched.append(
            {i: listed[i] - shift - (bias if i in sampling.barred else 0) for i in sampling.watched}
        )
    versions = {span["version"] for span in choice.get("weight_versions") or []}
    if len(versions) > 1:
        raise VLLMError(f"was computed with several versions of the weights: {sorted(versions)}")
    version = versions.pop() if versions else None
    details = (reply.get("usage") or {}).get("prompt_tokens_details") or {}
    return Reply(token_ids, logprobs, watched, version, int(details.get("cached_tokens") or 0))


def _token_and_logprob(entry: Any) -> tuple[int, float]:
    """One entry under either of the server's names: `token_id: 7`, before 0.32 `token: token_id:7`.

    Raises:
        VLLMError: neither, or no number.
    """
    try:
        name = entry["token_id"] if "token_id" in entry else entry["token"]
        token = int(str(name).removeprefix("token_id:"))
        value = float(entry["logprob"])
    except (KeyError, TypeError, ValueError) as error:
        raise VLLMError(f"has a log-prob without token or number: {str(entry)[:80]}") from error
    if not math.isfinite(value) or value <= NO_LOGPROB:
        raise VLLMError(f"has no log-prob for token {token}")
    return token, value


def _error_text(content: bytes) -> str:
    """The server's message in its JSON, or the start of whatever it sent."""
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
