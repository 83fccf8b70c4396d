"""Live image search: Google Lens by serpapi.com, and the place that makes a picture public for it.

Lens takes the URL of a picture, not a picture. So every picture that is searched for is put where
the whole world can fetch it: use this with pictures that may be public, and with no others.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environments.content import write_whole
from environments.fetch import SafeFetcher
from environments.pictures import PictureError, fetch_picture
from environments.providers import hits_of, in_parallel, listed, other_url, pages_of
from environments.results import Hit
from environments.services import RequestRefusedError, Service
from environments.web import WebError

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

MAX_SENT_SIDE = 1024
"""Longer side of a picture that is sent to an image search."""


class SerpApiLens:
    """Google Lens by serpapi.com: `GET /search?engine=google_lens`, visual matches.

    Lens takes the URL of a picture, not a picture: `host` has to put it where Google can fetch it.

    Args:
        service: where to ask; its key goes into the query, as SerpApi wants it.
        host: makes a picture public; None = only the cache answers.
        fetcher: fetches the matches' small pictures; None = titles only.
        country, language: two letters, or None.
    """

    name = "serpapi"

    def __init__(
        self,
        service: Service,
        host: ImageHost | None,
        fetcher: SafeFetcher | None = None,
        country: str | None = None,
        language: str | None = None,
    ) -> None:
        self.service, self.host, self.fetcher = service, host, fetcher
        self.country, self.language = country, language

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache tells providers apart by."""
        own = lens_identity(self.country, self.language, self.fetcher is not None)
        return {**own, **other_url(self.name, self.service)}

    def search(self, images: list[Image], k: int) -> list[list[Hit]]:
        """The best `k` visual matches of every picture, best first.

        Raises:
            WebError: the service, the host or all of the small pictures failed.
        """
        return [self._search(image, k) for image in images]

    def _search(self, image: Image, k: int) -> list[Hit]:
        if self.host is None:
            raise RequestRefusedError(f"{self.name}: there is no place to put a picture")
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
        # by place: several pictures of one page have one link
        sources = [row.get("thumbnail") or row.get("image") for row in pages_of(rows, "link")]
        return self._with_pictures(hits, sources)

    def _with_pictures(self, hits: list[Hit], sources: list[Any]) -> list[Hit]:
        """The hits with their small pictures, one source each; one that cannot be had is left
        out."""
        fetcher = self.fetcher
        assert fetcher is not None

        def fetch(pair: tuple[Hit, Any]) -> Hit | WebError:
            hit, source = pair
            try:
                picture = fetch_picture(fetcher, str(source or ""), 256)
            except WebError as error:
                logger.warning("no picture for a match: %s", error)
                return error
            return replace(hit, image=picture)

        fetched = in_parallel(fetch, list(zip(hits, sources, strict=True)))
        if all(isinstance(one, WebError) and one.fault == "infrastructure" for one in fetched):
            raise next(one for one in fetched if isinstance(one, WebError))
        return [
            replace(hit, is_partial=_may_come_back(one)) if isinstance(one, WebError) else one
            for hit, one in zip(hits, fetched, strict=True)
        ]


def _may_come_back(error: WebError) -> bool:
    """Whether another search might get the picture; bytes that are none stay none."""
    return error.fault == "infrastructure" and not isinstance(error, PictureError)


def lens_identity(country: str | None, language: str | None, thumbnails: bool) -> dict[str, Any]:
    """Identity of a Google Lens search at SerpApi's own URL."""
    return {
        "provider": SerpApiLens.name,
        "engine": "google_lens",
        "country": country,
        "language": language,
        "thumbnails": thumbnails,
    }


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
