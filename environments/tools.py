"""The two tools of a search agent: `text_search` and `image_search`.

A tool never raises into training: a bad call comes back as text that the policy can learn from
(`fault="model"`), a failing or slow service as an error result (`fault="infrastructure"`). The
back ends are indexes; anything with a `search` method of the right shape will do.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from environments.dialects import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from environments.episode import Episode

logger = logging.getLogger(__name__)

REGIONS = ("full", "left", "right")
SNIPPET_WORDS = 40
"""An index returns snippets of at most this many words; longer ones are cut."""
CUT_MARK = "[cut]"
"""Stands where a result was shortened to fit the token budget, so that the policy can tell."""
ECHO_CHARS = 60
"""How much of a bad argument an error message repeats."""


@dataclass(frozen=True)
class Hit:
    """One search result.

    Attributes:
        id: passage id or entity id; what `gold_passages` refers to.
        title: page title or entity name.
        text: snippet ("" for image hits).
        score: higher is better.
        image: thumbnail, if the index has one.
    """

    id: str
    title: str
    text: str = ""
    score: float = 0.0
    image: "Image | None" = None


@dataclass
class ToolResult:
    """What a tool returned.

    Attributes:
        text: the result as plain text, not sanitised (the dialect does that).
        images: returned pictures, in the order of their marks.
        hits: ids of the retrieved passages or entities, best first.
        is_error: the call brought no result.
        fault: who is to blame for an error; None for a result.
        seconds: wall time of the call.
        documents: the hits with title and text, from which a dialect renders its own layout.
        tool: `text`, `image` or "".
    """

    text: str
    images: list["Image"] = field(default_factory=list)
    hits: list[str] = field(default_factory=list)
    is_error: bool = False
    fault: Literal["model", "infrastructure"] | None = None
    seconds: float = 0.0
    documents: list[Hit] = field(default_factory=list)
    tool: str = ""


class TextIndex(Protocol):
    """A text back end. Set `in_memory = True` on it to be called without a watchdog thread."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The best `k` hits of every query, best first."""
        ...


class ImageIndex(Protocol):
    """An image back end; like TextIndex, with PIL pictures for queries."""

    def search(self, images: list["Image"], k: int) -> list[list[Hit]]:
        """The best `k` hits of every picture, best first."""
        ...


def text_search(episode: "Episode", query: str) -> ToolResult:
    """Searches the passages.

    Returns the titles and snippets of the best matches. Name the entity and the wanted fact in the
    query, then read the answer out of the snippets.
    """
    index = episode.text_index
    if index is None:
        return model_fault("There is no text search here.", "text")
    query = query.strip()
    if not query:
        return model_fault("The query is empty. Write what to search for.", "text")

    def search() -> ToolResult:
        hits = index.search([query], episode.top_k_text)[0]
        # text hits carry no pictures: only image_search may place image marks
        return _result([_checked(hit, SNIPPET_WORDS, with_image=False) for hit in hits], "text")

    return guard(search, "text", episode.timeout_s, index)


def image_search(episode: "Episode", region: str = "full") -> ToolResult:
    """Searches with the question's picture, or with its left or right half.

    Returns the names of what looks most alike, best first, and no facts. Use a half when the
    picture shows two things. Then search the text for the wanted fact.
    """
    picture, index = episode.question.get("image"), episode.image_index
    if index is None:
        return model_fault("There is no image search here.", "image")
    if picture is None:
        return model_fault("The question has no image. Use a text search.", "image")
    region = region.strip().lower()
    if region not in REGIONS:
        shown = one_line(region, ECHO_CHARS)
        return model_fault(f"Unknown region '{shown}'. Use full, left or right.", "image")

    def search() -> ToolResult:
        hits = index.search([crop(picture, region)], episode.top_k_image)[0]
        # names only: a fact beside a name would make the text search needless
        return _result([_checked(hit, 0, with_image=episode.thumbnails) for hit in hits], "image")

    return guard(search, "image", episode.timeout_s, index)


def crop(picture: "Image", region: str) -> "Image":
    """The whole picture or its left or right half (the middle column of an odd width in both)."""
    width, height = picture.size
    half = max((width + 1) // 2, 1)
    boxes = {
        "full": (0, 0, width, height),
        "left": (0, 0, half, height),
        "right": (width - half, 0, width, height),
    }
    return picture if region == "full" else picture.crop(boxes[region])


def shorten(result: ToolResult, n_words: int) -> ToolResult:
    """The result with at most `n_words` words of text per hit; what was cut ends with CUT_MARK.

    Titles, pictures and the ids of the hits stay.
    """
    documents = [replace(hit, text=_first_words(hit.text, n_words)) for hit in result.documents]
    return replace(result, text=_first_words(result.text, n_words), documents=documents)


def guard(
    search: Callable[[], ToolResult], tool: str, timeout_s: float | None, back_end: Any = None
) -> ToolResult:
    """Runs a search so that neither an exception nor a hang reaches training.

    Args:
        search: the call.
        tool: name for messages.
        timeout_s: limit; None or a back end with `in_memory = True` runs without one.
        back_end: the index that is asked.
    """
    start = time.perf_counter()
    if timeout_s is None or getattr(back_end, "in_memory", False):
        result = _caught(search, tool)
    else:
        result = _with_limit(search, tool, timeout_s)
    result.seconds = time.perf_counter() - start
    return result


def model_fault(text: str, tool: str = "") -> ToolResult:
    """An error the policy can learn from: `text` says what to do instead."""
    return ToolResult(text=text, is_error=True, fault="model", tool=tool)


def infrastructure_fault(reason: str, tool: str = "") -> ToolResult:
    """An error that the policy is not to blame for."""
    text = f"The search failed ({one_line(reason, 200)}). Answer from what you know."
    return ToolResult(text=text, is_error=True, fault="infrastructure", tool=tool)


def _caught(search: Callable[[], ToolResult], tool: str) -> ToolResult:
    try:
        return search()
    except Exception as error:  # whatever a service does wrong is a result here
        logger.warning("%s search failed: %r", tool, error)
        return infrastructure_fault(type(error).__name__, tool)


def _with_limit(search: Callable[[], ToolResult], tool: str, timeout_s: float) -> ToolResult:
    box: list[ToolResult] = []
    # a daemon thread, not an executor: a hung service must not keep the interpreter from ending
    thread = threading.Thread(target=lambda: box.append(_caught(search, tool)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not box:
        logger.warning("%s search gave no result within %g s", tool, timeout_s)
        return infrastructure_fault(f"no result within {timeout_s:g} s", tool)
    return box[0]


def _first_words(text: str, n_words: int) -> str:
    words = text.split()
    return text if len(words) <= n_words else " ".join([*words[:n_words], CUT_MARK])


def _checked(hit: Hit, n_words: int, with_image: bool) -> Hit:
    """A hit of the promised form, whatever the back end sent."""
    text = str(hit.text or "")
    words = text.split(maxsplit=n_words)
    if len(words) > n_words:
        text = " ".join(words[:n_words])
    image = hit.image if with_image else None
    return Hit(str(hit.id), str(hit.title or ""), text, float(hit.score), image)


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
