"""A language model behind an OpenAI-compatible endpoint that is asked for JSON.

It words tasks and scores steps for `obm sport`. What it is shown of a run is quoted as JSON and
named as data; what it says is read by our rules and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from configs.errors import ConfigError
from environments.services import MalformedReplyError, Service
from environments.web import WebError
from rewards.normalize import visible

if TYPE_CHECKING:
    from configs.sections import Sport

KEY_VARIABLE = "OBM_SPORT_KEY"
MAX_TOKENS = 1024
MAX_QUOTED_CHARS = 4000
"""Of one text that is shown to the model; a whole page would cost more than it tells."""

T = TypeVar("T")


class Chat:
    """One model behind an endpoint; `ask` returns the JSON object of its reply.

    Args:
        service: the endpoint.
        model: name that the endpoint knows it by.
        workers: requests at the same time.
    """

    def __init__(self, service: Service, model: str, workers: int = 1) -> None:
        self.service, self.model, self.workers = service, model, workers

    def ask(self, instruction: str, data: dict[str, Any]) -> dict[str, Any]:
        """Sends one request.

        Args:
            instruction: what to do and the form of the reply.
            data: what it is about, quoted as one JSON object.

        Raises:
            WebError: no reply, or none with a JSON object.
        """
        key = self.service.key()
        reply = self.service.ask(
            "POST",
            "/chat/completions",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            json_body={
                "model": self.model,
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
                "messages": [
                    {"role": "system", "content": instruction},
                    {"role": "user", "content": json.dumps(quoted(data), ensure_ascii=False)},
                ],
            },
        )
        try:
            content = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        found = last_object(content) if isinstance(content, str) else None
        if found is None:
            raise MalformedReplyError(f"{self.service.name}: the reply holds no JSON object")
        return found

    def each(self, work: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """The results of `work` for each item, several at a time; a WebError is returned."""

        def guarded(item: T) -> Any:
            try:
                return work(item)
            except WebError as error:
                return error

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(guarded, items))


def make_chat(settings: Sport) -> Chat:
    """The model that `sport.llm_url` names.

    Raises:
        ConfigError: no address or no model.
    """
    for key in ("llm_url", "llm_model"):
        if not getattr(settings, key):
            raise ConfigError(
                f"sport.{key}: missing; sport.wording and sport.verifier `llm` need an endpoint "
                "(llm_url) and the name of its model (llm_model)"
            )
    service = Service(
        "the model of sport.llm_url", settings.llm_url or "", KEY_VARIABLE, is_key_required=False,
        timeout_s=settings.llm_timeout_s, setting="sport.llm_url",
    )  # fmt: skip
    return Chat(service, settings.llm_model or "", settings.llm_workers)


def quoted(value: Any) -> Any:
    """Data without tags, special tokens and invisible characters, long texts cut."""
    if isinstance(value, str):
        text = visible(value).replace("<", "‹").replace(">", "›")
        return text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + " [cut]"
    if isinstance(value, dict):
        return {key: quoted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [quoted(item) for item in value]
    return value


def last_object(reply: str) -> dict[str, Any] | None:
    """The last JSON object of a reply (models think aloud before it), or None."""
    decoder = json.JSONDecoder()
    for match in reversed(list(re.finditer(r"\{", reply))):
        try:
            found, end = decoder.raw_decode(reply, match.start())
        except (ValueError, RecursionError):
            continue
        # an inner object is none of its own: nothing but a fence may follow
        if isinstance(found, dict) and not reply[end:].strip().strip("`").strip():
            return found
    return None
