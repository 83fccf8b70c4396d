"""Live text search behind the protocol of `environments.tools`; images and pages: lens, jina.

    index = SerperSearch(Service("serper", URLS["serper"], "SERPER_API_KEY"))
    index.search(["capital of France"], 3)

Each provider builds a request and reads the reply of one service; `environments.services` does the
talking. A hit's id is its URL, its score 1 / rank. `identity` is what the cache tells providers
apart by: every setting that changes an answer, and never a key.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from environments.guard import BadCall
from environments.results import Hit
from environments.services import URLS, MalformedReplyError, Service
from environments.tools import PAGE_WORDS
from environments.web import WebError

logger = logging.getLogger(__name__)

MAX_PER_PAGE = 20


class _TextProvider:
    """What the three text services share.

    Args:
        service: where to ask.
        country: two letters, or None.
        language: two letters, or None.
    """

    name = ""
    max_chars: int | None = None
    """longest query that the service takes; None = none is known"""
    max_words: int | None = None

    def __init__(
        self, service: Service, country: str | None = None, language: str | None = None
    ) -> None:
        self.service, self.country, self.language = service, country, language

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache tells providers apart by."""
        return {
            "provider": self.name,
            "country": self.country,
            "language": self.language,
            **other_url(self.name, self.service),
        }

    def check_query(self, query: str) -> None:
        """Looks whether the service takes the query, without asking it.

        Raises:
            BadCall: longer than it takes; the service would refuse the request, which would read
                as a fault of its own.
        """
        for n, limit, what in (
            (len(query), self.max_chars, "characters"),
            (len(query.split()), self.max_words, "words"),
        ):
            if limit is not None and n > limit:
                raise BadCall(
                    f"The query has {n} {what}, and at most {limit} are taken. Write a shorter one."
                )

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The best `k` pages for every query, best first; one request each.

        Raises:
            BadCall: a query is longer than the service takes.
            WebError: the service failed.
        """
        for query in queries:
            self.check_query(query)
        return [self._search(query, min(k, MAX_PER_PAGE))[:k] for query in queries]

    def _search(self, query: str, k: int) -> list[Hit]:
        raise NotImplementedError


class SerperSearch(_TextProvider):
    """Google by serper.dev: `POST /search`, organic results only.

    Answer boxes and knowledge panels are left out: they would answer instead of the policy.
    """

    name = "serper"

    def _search(self, query: str, k: int) -> list[Hit]:
        body = {"q": query, "num": k, "gl": self.country, "hl": self.language}
        reply = self.service.ask(
            "POST",
            "/search",
            headers={"X-API-KEY": self.service.key() or ""},
            json_body={name: value for name, value in body.items() if value is not None},
        )
        rows = listed(reply, self.name, "organic", absent_with="searchParameters")
        return hits_of(rows, self.name, "link", "title", lambda row: row.get("snippet"))


class BraveSearch(_TextProvider):
    """Brave's own index: `GET /web/search`."""

    name = "brave"
    max_chars, max_words = 400, 50

    def _search(self, query: str, k: int) -> list[Hit]:
        wanted = {
            "q": query,
            "count": str(k),
            "text_decorations": "false",
            "result_filter": "web",
            "country": self.country and self.country.upper(),
            "search_lang": self.language,
        }
        reply = self.service.ask(
            "GET",
            "/web/search",
            headers={"X-Subscription-Token": self.service.key() or ""},
            query={name: value for name, value in wanted.items() if value is not None},
        )
        # without a single result the whole part "web" is missing
        is_answer = isinstance(reply, dict) and "query" in reply
        web = reply.get("web", {"results": []}) if is_answer else None
        rows = listed(web, self.name, "results")

        def text(row: dict[str, Any]) -> str:
            extra = row.get("extra_snippets") or []
            return plain_text(" ".join([str(row.get("description") or ""), *map(str, extra)]))

        return hits_of(rows, self.name, "url", "title", text)


class TavilySearch(_TextProvider):
    """Tavily: `POST /search` of basic depth, without its generated answer."""

    name = "tavily"
    max_chars = 400

    def _search(self, query: str, k: int) -> list[Hit]:
        reply = self.service.ask(
            "POST",
            "/search",
            headers={"Authorization": f"Bearer {self.service.key()}"},
            json_body={"query": query, "max_results": k, "search_depth": "basic"},
        )
        rows = listed(reply, self.name, "results")
        return hits_of(rows, self.name, "url", "title", lambda row: row.get("content"))


TEXT_PROVIDERS: dict[str, type[_TextProvider]] = {
    "serper": SerperSearch,
    "brave": BraveSearch,
    "tavily": TavilySearch,
}


class ReadingIndex:
    """Text search whose hits carry what their pages say about the query (MMSearch-R1's recipe).

    A page that cannot be read keeps the snippet of the search service; only if all fail through
    infrastructure has the search failed.

    Args:
        index: finds pages; its hits' ids are URLs.
        reader: reads them, all of a search at once.
    """

    words_shown = PAGE_WORDS  # a snippet's forty would show the policy one sentence of five

    def __init__(self, index: Any, reader: Any) -> None:
        self.index, self.reader = index, reader

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache tells it apart by."""
        return {"search": self.index.identity, "read": self.reader.identity}

    def check_query(self, query: str) -> None:
        """As the text search has it.

        Raises:
            BadCall: it would not take the query.
        """
        check = getattr(self.index, "check_query", None)
        if check is not None:
            check(query)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The hits of the text search, with page summaries for text.

        Raises:
            WebError: the search or all of the reading failed.
        """
        found = zip(queries, self.index.search(queries, k), strict=True)
        return [self._read_all(query, hits) for query, hits in found]

    def _read_all(self, query: str, hits: list[Hit]) -> list[Hit]:
        read = in_parallel(partial(self._read, query), hits)
        failures = [one for one in read if isinstance(one, WebError)]
        if hits and sum(one.fault == "infrastructure" for one in failures) == len(hits):
            raise failures[0]
        return [
            replace(hit, is_partial=one.fault == "infrastructure")
            if isinstance(one, WebError)
            else one
            for hit, one in zip(hits, read, strict=True)
        ]

    def _read(self, query: str, hit: Hit) -> Hit | WebError:
        try:
            page = self.reader.read(hit.id, query)
        except WebError as error:
            logger.warning("a found page was not read: %s", error)
            return error
        return replace(hit, text=page.text or hit.text)


# ---------------------------------------------------------------- replies


def listed(reply: Any, name: str, key: str, absent_with: str | None = None) -> list[dict[str, Any]]:
    """The list of objects under `key` of a reply.

    Args:
        reply: decoded JSON.
        name: of the provider, for the message.
        key: where the results stand.
        absent_with: a key whose presence makes a missing list an empty one.

    Raises:
        MalformedReplyError: something else stands there.
    """
    rows = reply.get(key) if isinstance(reply, dict) else None
    if rows is None and isinstance(reply, dict) and absent_with in reply:
        return []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise MalformedReplyError(f"{name}: the reply has no list of objects '{key}'")
    return rows


def hits_of(
    rows: list[dict[str, Any]],
    name: str,
    url_key: str,
    title_key: str,
    text_of: Callable[[dict[str, Any]], Any],
) -> list[Hit]:
    """Hits of a list of results, in its order; what has no web address is no page and left out.

    Raises:
        MalformedReplyError: none of the results is a page.
    """
    hits: list[Hit] = []
    for row in pages_of(rows, url_key):
        url = row[url_key]
        title, text = str(row.get(title_key) or ""), str(text_of(row) or "")
        hits.append(Hit(url, plain_text(title), text, 1.0 / (len(hits) + 1), None, url))
    if rows and not hits:
        raise MalformedReplyError(f"{name}: none of {len(rows)} results has a web address")
    return hits


def pages_of(rows: list[dict[str, Any]], url_key: str) -> list[dict[str, Any]]:
    """The results that have a web address; `hits_of` makes one hit of each."""
    return [
        row
        for row in rows
        if isinstance(row.get(url_key), str) and urlsplit_scheme(row[url_key]) in ("http", "https")
    ]


def urlsplit_scheme(url: str) -> str:
    """The scheme of a URL, "" where it cannot be read."""
    try:
        return urlsplit(url).scheme.lower()
    except ValueError:
        return ""


def plain_text(text: str) -> str:
    """Text without the emphasis tags and character references of search results."""
    return html.unescape(re.sub(r"</?(?:strong|b|em|i|mark)\b[^>]*>", "", text)).strip()


def other_url(name: str, service: Service) -> dict[str, str]:
    """The base URL, for the identity, where it is not the service's own."""
    return {} if service.url == URLS[name] else {"url": service.url}


def in_parallel(call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`call` of every item, in order, at most eight at a time."""
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(len(items), 8)) as pool:
        return list(pool.map(call, items))
