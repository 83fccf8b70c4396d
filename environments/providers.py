"""Live search behind the protocols of `environments.tools`: text, images, pages.

    index = SerperSearch(Service("serper", SERPER_URL, "SERPER_API_KEY"))
    index.search(["capital of France"], 3)

Each provider builds a request and reads the reply of one service; `environments.services` does the
talking. A hit's id is its URL, its score 1 / rank. `identity` is what the cache tells providers
apart by: every setting that changes an answer, and never a key.
"""

from __future__ import annotations

import hashlib
import html
import io
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from environments.cache import write_whole
from environments.pages import (
    PAGE_CHARS,
    Page,
    PageRefusedError,
    SafeFetcher,
    Summarise,
    check_url,
    fetch_picture,
    summarised,
    summary_identity,
)
from environments.services import MalformedReplyError, RequestRefusedError, Service
from environments.tools import Hit
from environments.web import WebError

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

SERPER_URL = "https://google.serper.dev"
BRAVE_URL = "https://api.search.brave.com/res/v1"
TAVILY_URL = "https://api.tavily.com"
SERPAPI_URL = "https://serpapi.com"
JINA_URL = "https://r.jina.ai"
KEY_VARIABLES = {
    "serper": "SERPER_API_KEY",
    "brave": "BRAVE_API_KEY",
    "tavily": "TAVILY_API_KEY",
    "serpapi": "SERPAPI_API_KEY",
    "jina": "JINA_API_KEY",
    "summary": "SUMMARY_API_KEY",
    "image_host": "IMAGE_HOST_TOKEN",
}
URLS = {
    "serper": SERPER_URL,
    "brave": BRAVE_URL,
    "tavily": TAVILY_URL,
    "serpapi": SERPAPI_URL,
    "jina": JINA_URL,
}
MAX_PER_PAGE = 20
MAX_SENT_SIDE = 1024
"""Longer side of a picture that is sent to an image search."""


class _TextProvider:
    """What the three text services share.

    Args:
        service: where to ask.
        country: two letters, or None.
        language: two letters, or None.
    """

    name = ""

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

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The best `k` pages for every query, best first; one request each.

        Raises:
            WebError: the service failed.
        """
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
        web = reply.get("web") if isinstance(reply, dict) and "query" in reply else reply
        rows = [] if web is None else listed(web, self.name, "results")

        def text(row: dict[str, Any]) -> str:
            extra = row.get("extra_snippets") or []
            return plain_text(" ".join([str(row.get("description") or ""), *map(str, extra)]))

        return hits_of(rows, self.name, "url", "title", text)


class TavilySearch(_TextProvider):
    """Tavily: `POST /search` of basic depth, without its generated answer."""

    name = "tavily"

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

    A page that cannot be read keeps the snippet of the search service.

    Args:
        index: finds pages; its hits' ids are URLs.
        reader: reads them, all of a search at once.
    """

    def __init__(self, index: Any, reader: Any) -> None:
        self.index, self.reader = index, reader

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache tells it apart by."""
        return {"search": self.index.identity, "read": self.reader.identity}

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The hits of the text search, with page summaries for text."""
        found = zip(queries, self.index.search(queries, k), strict=True)
        return [in_parallel(partial(self._read, query), hits) for query, hits in found]

    def _read(self, query: str, hit: Hit) -> Hit:
        try:
            page = self.reader.read(hit.id, query)
        except WebError as error:
            logger.warning("a found page was not read: %s", error)
            return hit
        return Hit(hit.id, hit.title, page.text or hit.text, hit.score)


# ---------------------------------------------------------------- images


class SerpApiLens:
    """Google Lens by serpapi.com: `GET /search?engine=google_lens`, visual matches.

    Lens takes the URL of a picture, not a picture: `host` has to put it where Google can fetch it.

    Args:
        service: where to ask; its key goes into the query, as SerpApi wants it.
        host: picture -> public URL.
        fetcher: fetches the matches' small pictures; None = titles only.
        country, language: two letters, or None.
    """

    name = "serpapi"

    def __init__(
        self,
        service: Service,
        host: ImageHost,
        fetcher: SafeFetcher | None = None,
        country: str | None = None,
        language: str | None = None,
    ) -> None:
        self.service, self.host, self.fetcher = service, host, fetcher
        self.country, self.language = country, language

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache tells providers apart by."""
        return {
            "provider": self.name,
            "engine": "google_lens",
            "country": self.country,
            "language": self.language,
            "thumbnails": self.fetcher is not None,
            **other_url(self.name, self.service),
        }

    def search(self, images: list[Image], k: int) -> list[list[Hit]]:
        """The best `k` visual matches of every picture, best first.

        Raises:
            WebError: the service, the host or all of the small pictures failed.
        """
        return [self._search(image, k) for image in images]

    def _search(self, image: Image, k: int) -> list[Hit]:
        wanted = {
            "engine": "google_lens",
            "type": "visual_matches",
            "url": self.host.publish(image),
            "country": self.country,
            "hl": self.language,
            "api_key": self.service.key(),
        }
        query = {name: value for name, value in wanted.items() if value is not None}
        reply = self.service.ask("GET", "/search", query=query)
        said = reply.get("error") if isinstance(reply, dict) else None
        if isinstance(said, str):
            if "hasn't returned any results" in said:
                return []
            raise RequestRefusedError(f"{self.name}: {self.service.scrubbed(said)}")
        rows = listed(reply, self.name, "visual_matches", absent_with="search_metadata")[:k]
        hits = hits_of(rows, self.name, "link", "title", lambda row: "")
        if self.fetcher is None or not hits:
            return hits
        sources = {row.get("link"): row.get("thumbnail") or row.get("image") for row in rows}
        return self._with_pictures(hits, sources)

    def _with_pictures(self, hits: list[Hit], sources: dict[Any, Any]) -> list[Hit]:
        """The hits with their small pictures; one that cannot be had is left out."""
        fetcher = self.fetcher
        assert fetcher is not None

        def fetch(hit: Hit) -> Hit | WebError:
            try:
                picture = fetch_picture(fetcher, str(sources.get(hit.id) or ""), 256)
            except WebError as error:
                logger.warning("no picture for a match: %s", error)
                return error
            return Hit(hit.id, hit.title, hit.text, hit.score, picture)

        fetched = in_parallel(fetch, hits)
        if all(isinstance(one, WebError) and one.fault == "infrastructure" for one in fetched):
            raise next(one for one in fetched if isinstance(one, WebError))
        return [
            hit if isinstance(one, WebError) else one
            for hit, one in zip(hits, fetched, strict=True)
        ]


class ImageHost:
    """Makes a picture public under a URL that nobody can guess but from the picture itself.

    Args:
        public_url: what stands before the file's name when others fetch it.
        folder: of a web server that serves it under `public_url`; None = `upload` is used.
        upload: service to which `PUT {url}/{name}` writes a file (a bucket, WebDAV), with the key
            as a bearer token if one is set.
    """

    def __init__(
        self, public_url: str, folder: Path | None = None, upload: Service | None = None
    ) -> None:
        if (folder is None) == (upload is None):
            raise ValueError("an image host has either a folder or an upload service")
        self.public_url, self.folder, self.upload = public_url.rstrip("/"), folder, upload

    def publish(self, image: Image) -> str:
        """Public URL of the picture, scaled down to MAX_SENT_SIDE and freed of its metadata.

        Raises:
            WebError: the upload failed.
        """
        content = encode_jpeg(image)
        name = f"{hashlib.sha256(content).hexdigest()}.jpg"
        if self.folder is not None:
            write_whole(self.folder / name, content)
        elif self.upload is not None:
            key = self.upload.key()
            headers = {"Content-Type": "image/jpeg"}
            if key:
                headers["Authorization"] = f"Bearer {key}"
            url = f"{self.upload.url}/{name}"
            self.upload.send("PUT", url, headers, content, self.upload.check)
        return f"{self.public_url}/{name}"


def encode_jpeg(image: Image) -> bytes:
    """JPEG of a picture at most MAX_SENT_SIDE large, without EXIF data."""
    picture = image.convert("RGB")
    picture.thumbnail((MAX_SENT_SIDE, MAX_SENT_SIDE))
    picture.info.clear()
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


# ---------------------------------------------------------------- pages


class JinaReader:
    """Reads pages by r.jina.ai: `POST /` with the URL, text back.

    The fetching is done by Jina, from Jina's network; local names and addresses are refused here
    all the same, so that none of them is told to a stranger.

    Args:
        service: where to ask; the key is optional, and without one the rate is low.
        summarise: picks what the question asks for; None = the text as it is.
        max_chars: of the page's text that are looked at.
    """

    name = "jina"

    def __init__(
        self, service: Service, summarise: Summarise | None = None, max_chars: int = PAGE_CHARS
    ) -> None:
        self.service, self.summarise, self.max_chars = service, summarise, max_chars

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache tells readers apart by."""
        return {
            "reader": self.name,
            **other_url(self.name, self.service),
            **summary_identity(self.summarise, self.max_chars),
        }

    def read(self, url: str, question: str) -> Page:
        """A page, cut down to what the question needs.

        Raises:
            PageRefusedError: the model's fault; it may read the message.
            WebError: Jina failed.
        """
        url, key = check_url(url), self.service.key()
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "X-Return-Format": "text",
        }
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            reply = self.service.ask("POST", "/", headers=headers, json_body={"url": url})
        except RequestRefusedError as error:
            # 400 and 422: Jina has no complaint about us but found no page there
            raise PageRefusedError("The page cannot be read.", "status") from error
        data = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(data, dict) or not isinstance(data.get("content", data.get("text")), str):
            raise MalformedReplyError(f"{self.name}: the reply lacks data.content")
        if "returned error 404" in str(data.get("warning") or ""):
            raise PageRefusedError("The page cannot be read (HTTP 404).", "status")
        text = str(data.get("content", data.get("text")))
        page = Page(str(data.get("title") or ""), text, str(data.get("url") or url))
        return summarised(page, question, self.summarise, self.max_chars)


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
    for row in rows:
        url = row.get(url_key)
        if not isinstance(url, str) or urlsplit_scheme(url) not in ("http", "https"):
            continue
        title, text = str(row.get(title_key) or ""), str(text_of(row) or "")
        hits.append(Hit(url, plain_text(title), text, 1.0 / (len(hits) + 1)))
    if rows and not hits:
        raise MalformedReplyError(f"{name}: none of {len(rows)} results has a web address")
    return hits


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
