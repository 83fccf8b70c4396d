"""Back ends of the tools that ask a ResultCache before they ask the service."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from environments.cache import CacheError, Question, ResultCache, Unkept
from environments.content import canonical, normalised, picture_hash
from environments.results import Hit, Page
from environments.tools import SNIPPET_WORDS


class StoredRefusalError(RuntimeError):
    """A page that was refused when it was first asked for, and is now without asking.

    Attributes:
        fault: always the model's.
    """

    fault: Literal["model", "infrastructure"] = "model"


class CachedIndex:
    """A text or image index that asks the cache first.

    Args:
        index: back end, for TextIndex or ImageIndex; never asked offline.
        cache: the store.
        tool: `text_search` or `image_search`.
        identity: of the back end; None = its own `identity`, or what `identity_of` finds.
    """

    def __init__(
        self,
        index: Any,
        cache: ResultCache,
        tool: Literal["text_search", "image_search"],
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.index, self.cache, self.tool = index, cache, tool
        self.identity = identity_of(index) if identity is None else identity
        self._provider = canonical(self.identity)

    @property
    def in_memory(self) -> bool:
        """Whether a call needs no watchdog thread."""
        return self.cache.mode == "offline" or bool(getattr(self.index, "in_memory", False))

    @property
    def words_shown(self) -> int:
        """How many words of a hit the policy sees."""
        return int(getattr(self.index, "words_shown", SNIPPET_WORDS))

    def search(self, queries: list[Any], k: int) -> list[list[Hit]]:
        """As the index does it; equal questions of several threads are asked once.

        What the index refuses unasked (`check_query`) is refused before the cache, so that a replay
        does not miss what could never be stored.
        """
        is_text = self.tool == "text_search"
        queries = [normalised(query) for query in queries] if is_text else list(queries)
        check = getattr(self.index, "check_query", None)
        if check is not None:
            for query in queries:
                check(query)
        names = queries if is_text else [picture_hash(picture) for picture in queries]
        questions = [Question(self.tool, self._provider, name, k) for name in names]

        def ask(numbers: list[int]) -> list[str]:
            found = self.index.search([queries[i] for i in numbers], k)
            if len(found) != len(numbers):
                raise ValueError(f"{len(numbers)} queries brought {len(found)} lists of hits")
            return [self._encoded(hits) for hits in found]

        return [self._decoded(value) for value in self.cache.answer(questions, ask)]

    def _encoded(self, hits: Sequence[Hit]) -> str:
        rows = []
        for hit in hits:
            image = None if hit.image is None else self.cache.save_image(hit.image)
            row = {"id": str(hit.id), "title": str(hit.title or ""), "text": str(hit.text or "")}
            row["url"] = str(getattr(hit, "url", "") or "")
            rows.append({**row, "score": float(hit.score), "image": image})
        value = canonical({"hits": rows})
        return Unkept(value) if any(hit.is_partial for hit in hits) else value

    def _decoded(self, value: str) -> list[Hit]:
        return [
            Hit(
                row["id"],
                row["title"],
                row["text"],
                row["score"],
                None if row["image"] is None else self.cache.load_image(row["image"]),
                row["url"],
            )
            for row in json.loads(value)["hits"]
        ]


class CachedReader:
    """A page reader that asks the cache first; refusals of pages are kept as well.

    Args:
        reader: back end, for PageReader; never asked offline.
        cache: the store.
    """

    def __init__(self, reader: Any, cache: ResultCache) -> None:
        self.reader, self.cache = reader, cache
        self.identity = identity_of(reader)
        self._provider = canonical(self.identity)

    @property
    def in_memory(self) -> bool:
        """Whether a call needs no watchdog thread."""
        return self.cache.mode == "offline" or bool(getattr(self.reader, "in_memory", False))

    def read(self, url: str, question: str) -> Page:
        """As the reader does it.

        Raises:
            StoredRefusalError: the reader refused the page; its message is the reader's.
        """
        url, question = url.strip(), normalised(question)

        def ask(numbers: list[int]) -> list[str]:
            try:
                page = self.reader.read(url, question)
            except Exception as error:
                if getattr(error, "fault", "infrastructure") != "model":
                    raise
                return [canonical({"refused": str(error)})]
            fields = {"title": page.title, "text": page.text, "url": page.url}
            return [canonical({"page": {name: str(text or "") for name, text in fields.items()}})]

        asked = Question("visit", self._provider, canonical({"q": question, "url": url}), 0)
        value = json.loads(self.cache.answer([asked], ask)[0])
        if "refused" in value:
            raise StoredRefusalError(value["refused"])
        page = value["page"]
        return Page(page["title"], page["text"], page["url"])


def identity_of(back_end: Any) -> dict[str, Any]:
    """What tells a back end's answers from another's.

    Its `identity`, a dict of plain settings, if it has one; the URL of a search server; for an
    index in memory its class and a digest of what it holds and how it looks.

    Raises:
        CacheError: it has neither.
    """
    own = getattr(back_end, "identity", None)
    if own is not None:
        return dict(own)
    server = getattr(back_end, "server", None)
    if server is not None:
        options = {name: getattr(back_end, name, None) for name in ("snippet_words", "thumbnails")}
        return {"server": server.url, **options}
    names = ("ids", "titles", "texts", "snippet_words", "views", "turns")
    parts: list[Any] = [getattr(back_end, name, None) for name in names]
    if parts[0] is None:
        raise CacheError(
            f"{type(back_end).__name__} has no `identity` to store its results under; give it one"
        )
    digest = hashlib.sha256()
    for part in parts:
        is_array = isinstance(part, np.ndarray)
        content = part.tobytes() if is_array else canonical(part).encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return {"index": type(back_end).__name__, "content": digest.hexdigest()}
