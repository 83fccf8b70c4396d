"""What a tool returns: hits, pages, and errors that say whose fault they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from environments.sanitize import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

Fault = Literal["model", "infrastructure"]

CUT_MARK = "[cut]"
"""Stands where a result was shortened to fit the token budget, so that the policy can tell."""


@dataclass(frozen=True)
class Hit:
    """One search result.

    Attributes:
        id: passage id or entity id; what `gold_passages` refers to.
        title: page title or entity name.
        text: snippet ("" for image hits).
        score: higher is better.
        image: thumbnail, if the index has one.
        url: address of the page, if it has one; shown only where pages can be visited.
        max_chars: of the text that is shown; more words may be promised of some hits than of
            others.
        is_partial: a part of it, its page or picture, could not be had through infrastructure; a
            cache does not keep such a result.
    """

    id: str
    title: str
    text: str = ""
    score: float = 0.0
    image: "Image | None" = None
    url: str = ""
    max_chars: int = 600
    is_partial: bool = False


@dataclass(frozen=True)
class Page:
    """A web page as a reader returns it: text without markup; `url` is where it came from."""

    title: str
    text: str
    url: str


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
        tool: `text`, `image`, `page` or "".
        retries: further attempts that it took.
        parts: the results of a turn with several calls, one a call; else empty.
    """

    text: str
    images: list["Image"] = field(default_factory=list)
    hits: list[str] = field(default_factory=list)
    is_error: bool = False
    fault: Fault | None = None
    seconds: float = 0.0
    documents: list[Hit] = field(default_factory=list)
    tool: str = ""
    retries: int = 0
    parts: "list[ToolResult]" = field(default_factory=list)

    @property
    def each(self) -> "Sequence[ToolResult]":
        """One result a call: the parts, or the result itself."""
        return self.parts or (self,)


def combined(parts: Sequence[ToolResult], seconds: float) -> ToolResult:
    """The results of one turn as one; it is an error if any part is, of a service before others.

    Args:
        parts: one a call, in the order of the calls.
        seconds: wall time of them all, side by side.
    """
    faults = {part.fault for part in parts}
    fault: Fault | None = "model" if "model" in faults else None
    if "infrastructure" in faults:
        fault = "infrastructure"
    return ToolResult(
        text="\n".join(part.text for part in parts),
        images=[image for part in parts for image in part.images],
        hits=[hit for part in parts for hit in part.hits],
        is_error=any(part.is_error for part in parts),
        fault=fault,
        seconds=seconds,
        documents=[hit for part in parts for hit in part.documents],
        retries=sum(part.retries for part in parts),
        parts=list(parts),
    )


def shorten(result: ToolResult, n_words: int) -> ToolResult:
    """The result with at most `n_words` words of text per hit; what was cut ends with CUT_MARK.

    Titles, pictures and the ids of the hits stay.
    """
    documents = [replace(hit, text=_first_words(hit.text, n_words)) for hit in result.documents]
    parts = [shorten(part, n_words) for part in result.parts]
    text = _first_words(result.text, n_words)
    return replace(result, text=text, documents=documents, parts=parts)


def model_fault(text: str, tool: str = "") -> ToolResult:
    """An error the policy can learn from: `text` says what to do instead."""
    return ToolResult(text=text, is_error=True, fault="model", tool=tool)


def infrastructure_fault(reason: str, tool: str = "") -> ToolResult:
    """An error that the policy is not to blame for."""
    text = f"The search failed ({one_line(reason, 200)}). Answer from what you know."
    return ToolResult(text=text, is_error=True, fault="infrastructure", tool=tool)


def _first_words(text: str, n_words: int) -> str:
    words = text.split()
    return text if len(words) <= n_words else " ".join([*words[:n_words], CUT_MARK])
