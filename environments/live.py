"""From settings to back ends: live providers, page readers and the cache before all of them.

    text_index, image_index, page_reader = live_tools(environment, live, text_index, image_index)

Nothing is asked here; what would fail at the first call (a missing key, library or setting) fails
here instead. Offline neither key nor library is needed.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environments.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from environments.cache import ResultCache
    from environments.services import Service

INSTALL = "install it with: pip install 'obm-warmstart[live]'"


def live_tools(
    environment: Any, live: Any, text_index: Any, image_index: Any
) -> tuple[Any, Any, Any]:
    """Text index, image index and page reader that the settings ask for; None for what is not.

    Args:
        environment: the section `environment`.
        live: the section `live`.
        text_index, image_index: the world's own; what a provider does not replace stays.

    Raises:
        EnvironmentSetupError: a setting, key or library is missing.
    """
    builder = _Builder(environment, live)
    page_reader = builder.page_reader() if environment.page_reader else None
    if environment.text_provider:
        text_index = builder.text_index(page_reader)
    elif live.read_results:
        raise EnvironmentSetupError(
            "live.read_results: the world's own passages are no pages; "
            "set environment.text_provider, or leave it false"
        )
    if environment.image_provider:
        image_index = builder.image_index()
    if not environment.cache:
        if environment.cache_mode != "read":
            raise EnvironmentSetupError(
                f"environment.cache_mode: '{environment.cache_mode}' without a cache; "
                "name its folder in environment.cache"
            )
        return text_index, image_index, page_reader
    return _cached(environment, text_index, image_index, page_reader)


def _cached(environment: Any, text_index: Any, image_index: Any, page_reader: Any) -> Any:
    from environments.cache import ResultCache
    from environments.cached import CachedIndex, CachedReader

    cache = ResultCache(environment.cache, environment.cache_mode)
    if environment.retrieval:
        text_index = _as_recorded(environment, cache, "text_search", text_index)
        image_index = _as_recorded(environment, cache, "image_search", image_index)
    return (
        text_index and CachedIndex(text_index, cache, "text_search"),
        image_index and CachedIndex(image_index, cache, "image_search"),
        page_reader and CachedReader(page_reader, cache),
    )


def _as_recorded(environment: Any, cache: ResultCache, tool: str, index: Any) -> Any:
    """A search server's index; offline None, if it had none when the results were recorded.

    Offline the server is not asked what it has, so a run that asks it keeps what it lacks.
    """
    from environments.cache import Question, Record
    from environments.content import canonical

    if index is not None and not hasattr(index, "server"):
        return index  # a provider's
    lacks = Question(tool, canonical({"server": environment.retrieval.rstrip("/")}), "", 1)
    if cache.mode == "offline":
        return index if cache.get(lacks.key) is None else None
    if index is None:
        cache.put(Record(lacks, canonical({"refused": "not served"}), time.time()), replace=True)
    else:
        cache.delete([lacks.key])
    return index


def tool_counts(environment: Any) -> dict[str, float]:
    """What cache, services and fetchers of an environment have counted in this process so far.

    Returns:
        `tools/cache_hits`, `tools/cache_misses` ..., `tools/NAME_requests` and
        `tools/NAME_<error>` of each service, `tools/refused_<reason>` of fetched URLs; empty
        without a cache and without live providers.
    """
    counts: dict[str, float] = {}
    tools = ("text_index", "image_index", "page_reader")
    waiting = [getattr(environment, name, None) for name in tools]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        for name, prefix in (("counts", _name_of(part)), ("refused", "refused")):
            own = getattr(part, name, None)
            if isinstance(own, Counter):
                for what, n in dict(own).items():
                    key = f"tools/{prefix}_{what}"
                    counts[key] = counts.get(key, 0.0) + n
        inner = ("index", "reader", "cache", "service", "fetcher", "summarise", "host", "upload")
        waiting += [getattr(part, name, None) for name in inner]
    return dict(sorted(counts.items()))


def _name_of(part: Any) -> str:
    return str(getattr(part, "name", "cache"))


class _Builder:
    """Makes each back end, with one rate for each service."""

    def __init__(self, environment: Any, live: Any) -> None:
        self.environment, self.live = environment, live
        self.is_offline = bool(environment.cache) and environment.cache_mode == "offline"

    def text_index(self, page_reader: Any) -> Any:
        from environments.providers import TEXT_PROVIDERS, ReadingIndex

        name, live = self.environment.text_provider, self.live
        service = self._service(name, live.text_url, "live.text_url")
        index = TEXT_PROVIDERS[name](service, live.country, live.language)
        if not live.read_results:
            return index
        if page_reader is None:
            raise EnvironmentSetupError(
                "live.read_results: nothing reads pages; set environment.page_reader"
            )
        return ReadingIndex(index, page_reader)

    def image_index(self) -> Any:
        from environments.lens import SerpApiLens

        live = self.live
        service = self._service("serpapi", live.image_url, "live.image_url")
        # the search itself takes seconds, and all of it together has timeout_s
        fetcher = self._fetcher(1 / 3) if self.environment.thumbnails else None
        return SerpApiLens(service, self._image_host(), fetcher, live.country, live.language)

    def page_reader(self) -> Any:
        from environments.jina import JinaReader
        from environments.pages import DirectReader, check_reading

        summarise = self._summary()
        # where a search comes before or a summary after, a page may not take all the time
        share = 0.5 if self.live.read_results or self.live.summary_url else 1.0
        if self.environment.page_reader == "jina":
            service = self._service(
                "jina", self.live.page_url, "live.page_url", needs_key=False, share=share
            )
            return JinaReader(service, summarise, self.live.page_chars)
        if not self.is_offline:
            try:
                check_reading()
            except ImportError as error:
                raise EnvironmentSetupError(
                    f"environment.page_reader: direct needs trafilatura ({error}); {INSTALL}"
                ) from error
        return DirectReader(self._fetcher(share), summarise, self.live.page_chars)

    def _summary(self) -> Any:
        from environments.summaries import BestSentences, ModelSummary

        url, model = self.live.summary_url, self.live.summary_model
        if (url is None) != (model is None):
            raise EnvironmentSetupError(
                "live.summary_url and live.summary_model belong together; set both or none"
            )
        if url is None:
            return BestSentences()
        return ModelSummary(self._service("summary", url, "live.summary_url", False), model)

    def _image_host(self) -> Any:
        from environments.lens import ImageHost

        place, public_url = self.live.image_host, self.live.image_host_url
        if self.is_offline:
            return None
        if place is None:
            raise EnvironmentSetupError(
                "live.image_host: Google Lens takes the public URL of a picture, so pictures need "
                "a place that it can reach; name a served folder or a URL that takes PUT"
            )
        if place.startswith(("http://", "https://")):
            service = self._service("image_host", place, "live.image_host", needs_key=False)
            return ImageHost(public_url or place, upload=service)
        if public_url is None:
            raise EnvironmentSetupError(
                f"live.image_host_url: say under which URL the folder {place} is served"
            )
        return ImageHost(public_url, folder=Path(place))

    def _fetcher(self, share: float) -> Any:
        from environments.fetch import SafeFetcher

        return SafeFetcher(
            timeout_s=self.environment.timeout_s * share,
            max_bytes=self.live.page_bytes,
            allow_loopback=self.live.allow_loopback,
        )

    def _service(
        self, name: str, url: str | None, key: str, needs_key: bool = True, share: float = 1.0
    ) -> Service:
        from environments.services import KEY_VARIABLES, URLS, KeyMissingError, Service, TokenBucket

        n_processes = int(os.environ.get("WORLD_SIZE", "1"))
        service = Service(
            name,
            url or URLS[name],
            KEY_VARIABLES[name],
            is_key_required=needs_key,
            timeout_s=self.environment.timeout_s * share,
            retries=self.live.retries,
            bucket=TokenBucket(self.live.requests_per_second / n_processes),
            setting=key,
        )
        if not self.is_offline:
            try:
                service.key()
            except KeyMissingError as error:
                raise EnvironmentSetupError(f"{error}, or replay with cache_mode offline") from None
        return service
