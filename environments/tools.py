"""The tools of a search agent: `text_search`, `image_search` and, where it is allowed, `visit`.

A tool never raises into training: a bad call comes back as text that the policy can learn from
(`fault="model"`), a failing or slow service as an error result (`fault="infrastructure"`). The
back ends are anything with a `search` (or `read`) method of the right shape; `environments.guard`
says how they are called and what their exceptions may tell.
"""

import math
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from environments.actions import MAX_BOX_NUMBER, Box, Call, ImageSearch, Search
from environments.guard import BadCall, ServiceError, guard, side_by_side
from environments.results import (
    CUT_MARK,
    Hit,
    Page,
    ToolResult,
    combined,
    infrastructure_fault,
    model_fault,
    shorten,
)
from environments.sanitize import encodable, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from PIL.Image import Image

    from environments.episode import Episode

__all__ = [
    "CUT_MARK", "REGIONS", "BadCall", "Hit", "ImageIndex", "Page", "PageReader", "ServiceError",
    "TextIndex", "ToolResult", "ask", "combined", "crop", "guard", "image_search",
    "infrastructure_fault", "model_fault", "shorten", "side_by_side", "text_search", "visit",
]  # fmt: skip

REGIONS = ("full", "left", "right")
SNIPPET_WORDS = 40
"""An index returns snippets of at most this many words, unless it says another number; longer ones
are cut."""
PAGE_WORDS = 300
"""Words of a visited page that are shown; a reader that summarises stays below."""
ECHO_CHARS = 60
"""How much of a bad argument an error message repeats."""
MAX_QUERY_CHARS = 1000
"""Longer queries are refused: no service takes them, and they are a turn gone wrong."""
MAX_URL_CHARS = 500
"""Longer addresses are neither shown nor visited."""
MAX_ID_CHARS = 500
"""Ids of hits go into every record of the run."""
MAX_TEXT_CHARS = 20_000
"""Of a hit's title or text no more is looked at, so that megabytes cost nothing."""
CHARS_PER_WORD = 15
"""A text of long words is cut after so many characters for each word that it may have."""
MAX_PAGE_CHARS = 4000
"""Of a page, and of any text of as many words."""
MAX_SIDE = 1024
"""Pixels of the longer side of a returned picture; larger ones are scaled down, so that no service
can fill the context with one."""
MAX_ASPECT = 100
"""Pictures of which one side is so many times the other are dropped: image processors refuse them,
Qwen's at 200."""


class TextIndex(Protocol):
    """A text back end. Set `in_memory = True` on it to be called without a watchdog thread, and
    `words_shown` where its hits carry more than SNIPPET_WORDS."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The best `k` hits of every query, best first."""
        ...


class ImageIndex(Protocol):
    """An image back end; like TextIndex, with PIL pictures for queries."""

    def search(self, images: list["Image"], k: int) -> list[list[Hit]]:
        """The best `k` hits of every picture, best first."""
        ...


class PageReader(Protocol):
    """Reads web pages. It decides which addresses are safe; the tool only checks their form.

    It is called from several threads and should have time-outs of its own. A refusal (private
    address, wrong content type) is a `BadCall`: its message goes to the policy. A failure of a
    service is any other exception.
    """

    def read(self, url: str, question: str) -> Page:
        """The page's text, or what of it helps to answer the question."""
        ...


def text_search(episode: "Episode", query: str) -> ToolResult:
    """Searches the passages.

    Returns the titles and snippets of the best matches. Name the entity and the wanted fact in the
    query, then read the answer out of the snippets.
    """
    index = episode.text_index
    if index is None:
        return model_fault("There is no text search here.", "text")
    query = encodable(query).strip()
    if not query:
        return model_fault("The query is empty. Write what to search for.", "text")
    if len(query) > MAX_QUERY_CHARS:
        return model_fault(
            f"The query has {len(query)} characters. Write a short one, of a few words.", "text"
        )

    def search() -> ToolResult:
        hits = islice(index.search([query], episode.top_k_text)[0], episode.top_k_text)
        n_words = getattr(index, "words_shown", SNIPPET_WORDS)
        # text hits carry no pictures: only image_search may place image marks
        found = [_checked(hit, n_words, shows_url=episode.visits > 0) for hit in hits]
        return _result(found, "text")

    return _guarded(episode, search, "text", index)


def image_search(episode: "Episode", region: str | Box = "full") -> ToolResult:
    """Searches with the question's picture, or with a part of it.

    Returns the names of what looks most alike, best first, and no facts. Use a part when the
    picture shows several things. Then search the text for the wanted fact.
    """
    index = episode.image_index
    if index is None:
        return model_fault("There is no image search here.", "image")
    wanted = region.strip().lower() if isinstance(region, str) else region

    def search() -> ToolResult:
        # a benchmark's picture is decoded, or fetched, when it is read: that may fail
        picture = episode.question.get("image")
        if picture is None:
            raise BadCall("The question has no image. Use a text search.")
        if isinstance(wanted, str) and wanted not in REGIONS:
            shown = one_line(wanted, ECHO_CHARS)
            raise BadCall(
                f"Unknown region '{shown}'. Use full, left or right. A box is four numbers: left, "
                "top, right, bottom."
            )
        hits = index.search([crop(picture, wanted)], episode.top_k_image)[0]
        # names only: a fact beside a name would make the text search needless
        found = [
            _checked(hit, 0, with_image=episode.thumbnails, shows_url=episode.visits > 0)
            for hit in islice(hits, episode.top_k_image)
        ]
        return _result(found, "image")

    return _guarded(episode, search, "image", index)


def visit(episode: "Episode", url: str, question: str = "") -> ToolResult:
    """Reads one web page.

    Returns its text, or what of it helps to answer the question. Take an address from the search
    results and say what to look for.
    """
    reader = episode.page_reader
    if reader is None or not episode.visits:
        return model_fault("Pages cannot be visited here. Search instead.", "page")
    shown = one_line(encodable(url), MAX_URL_CHARS + 1)
    if not shown.lower().startswith(("http://", "https://")) or " " in shown:
        return model_fault(
            f"'{one_line(url, ECHO_CHARS)}' is no address. Write a whole one, which starts with "
            "https://.",
            "page",
        )
    if len(shown) > MAX_URL_CHARS:
        return model_fault(f"The address is longer than {MAX_URL_CHARS} characters.", "page")
    # the policy can only repeat an address as it was shown to it
    address = episode.urls.get(shown, shown)
    if episode.visit_urls == "results" and shown not in episode.urls:
        return model_fault("This address was in no search result. Visit one that was.", "page")

    def read() -> ToolResult:
        page = reader.read(address, question or episode.question["question"])
        hit = Hit(page.url or address, page.title, page.text)
        return _result([_checked(hit, PAGE_WORDS)], "page")

    return _guarded(episode, read, "page", reader)


def ask(episode: "Episode", calls: "Iterable[Call]") -> list[ToolResult]:
    """Carries out the calls of one turn, side by side if a service is asked; results in order."""
    pending = [_bound(episode, call) for call in calls]
    back_ends = (episode.text_index, episode.image_index, episode.page_reader)
    if len(pending) < 2 or all(getattr(b, "in_memory", b is None) for b in back_ends):
        return [call() for call in pending]
    return side_by_side(pending)


def crop(picture: "Image", region: str | Box) -> "Image":
    """The whole picture, its left or right half (the middle column of an odd width in both), or a
    box, cut off at the edges.

    Raises:
        BadCall: the box holds nothing of the picture.
    """
    width, height = picture.size
    if not isinstance(region, str):
        return picture.crop(_pixels(region, width, height))
    half = max((width + 1) // 2, 1)
    boxes = {
        "full": (0, 0, width, height),
        "left": (0, 0, half, height),
        "right": (width - half, 0, width, height),
    }
    return picture if region == "full" else picture.crop(boxes[region])


def _pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    # what no picture has must not reach the arithmetic: -1e308 times a width is infinite, and an
    # exception would void the episode in place of costing it
    if not all(abs(number) <= MAX_BOX_NUMBER for number in box):  # NaN is none
        raise BadCall(
            "A number of the box is not finite, or too large. Write left, top, right, bottom."
        )
    is_relative = max(box) <= 1.0
    scales = (width, height) if is_relative else (1, 1)
    left, top = (max(0, math.floor(box[i] * scales[i])) for i in (0, 1))
    right = min(width, math.ceil(box[2] * scales[0]))
    bottom = min(height, math.ceil(box[3] * scales[1]))
    if box[0] >= box[2] or box[1] >= box[3] or left >= right or top >= bottom:
        raise BadCall(
            "The box holds nothing of the picture. Write left, top, right, bottom, from 0 to 1 or "
            f"in pixels; the picture is {width} wide and {height} high."
        )
    return left, top, right, bottom


def _guarded(
    episode: "Episode", call: "Callable[[], ToolResult]", tool: str, back_end: Any
) -> ToolResult:
    return guard(
        call,
        tool,
        episode.timeout_s,
        back_end,
        retries=episode.retries,
        backoff_s=episode.backoff_s,
    )


def _bound(episode: "Episode", call: Call) -> "Callable[[], ToolResult]":
    if isinstance(call, Search):
        return lambda: text_search(episode, call.query)
    if isinstance(call, ImageSearch):
        return lambda: image_search(episode, call.region)
    return lambda: visit(episode, call.url, call.question)


def _checked(hit: Hit, n_words: int, *, with_image: bool = False, shows_url: bool = False) -> Hit:
    """A hit of the promised form, whatever the back end sent."""
    text = str(hit.text or "")[:MAX_TEXT_CHARS]
    words = text.split(maxsplit=n_words)
    if len(words) > n_words:
        text = " ".join(words[:n_words])
    # cut before it is looked at: an address of many megabytes must cost nothing
    url = encodable(str(getattr(hit, "url", "") or "")[: MAX_URL_CHARS + 1]) if shows_url else ""
    return Hit(
        encodable(str(hit.id)[:MAX_ID_CHARS]),
        str(hit.title or "")[:MAX_TEXT_CHARS],
        text,
        float(hit.score),
        _readable(hit.image) if with_image and hit.image is not None else None,
        url if len(url) <= MAX_URL_CHARS and " " not in url else "",
        max_chars=min(max(n_words, SNIPPET_WORDS) * CHARS_PER_WORD, MAX_PAGE_CHARS),
    )


def _readable(image: "Image") -> "Image | None":
    """The picture, decoded now, while an error is still the service's, and made small; None for a
    sliver."""
    image.load()
    short, long = sorted(image.size)
    if short < 1 or long > MAX_ASPECT * short:
        return None
    if image.mode != "RGB":
        image = image.convert("RGB")
    if long > MAX_SIDE:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _result(hits: list[Hit], tool: str) -> ToolResult:
    if not hits:
        # an empty result is a true answer of the service, and nobody's fault
        return ToolResult(text="Nothing found.", tool=tool)
    return ToolResult(
        text="\n".join(f"{hit.title}: {hit.text}" if hit.text else hit.title for hit in hits),
        images=[hit.image for hit in hits if hit.image is not None],
        hits=[hit.id for hit in hits],
        documents=hits,
        tool=tool,
    )
