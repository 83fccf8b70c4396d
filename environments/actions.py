"""Actions: what a turn of the policy asks for, as a dialect reads it and a trajectory keeps it."""

import math
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]
"""Left, top, right, bottom: shares of the picture's size if none is above 1, else pixels."""
MAX_BOX_NUMBER = 1e9
"""A box with a number beyond it, on either side of 0, is refused: no picture is so large."""


@dataclass(frozen=True)
class Search:
    """A text search."""

    query: str


@dataclass(frozen=True)
class ImageSearch:
    """A search with the question's picture; a name as the policy wrote it, or a box."""

    region: str | Box = "full"


@dataclass(frozen=True)
class Visit:
    """A look at one web page; `question` says what to look for there ("" = the user's question)."""

    url: str
    question: str = ""


@dataclass(frozen=True)
class Parallel:
    """Several calls of one turn, in the order in which they were written."""

    calls: "tuple[Call, ...]"


@dataclass(frozen=True)
class Answer:
    """The final answer."""

    text: str


@dataclass(frozen=True)
class Invalid:
    """A turn that ends in neither a call nor an answer.

    Attributes:
        reason: what is wrong with it.
        is_call: a call was meant, but it cannot be read; the policy is told why and goes on.
    """

    reason: str
    is_call: bool = False


Call = Search | ImageSearch | Visit
Action = Call | Parallel | Answer | Invalid


def calls_of(action: Action) -> tuple[Call, ...]:
    """The tool calls of a turn; none for an answer or an invalid turn."""
    if isinstance(action, Parallel):
        return action.calls
    return (action,) if isinstance(action, Search | ImageSearch | Visit) else ()


def action_dict(action: Action) -> dict[str, Any]:
    """An action as plain data, as trajectories store it; `type` names the action.

    A turn with several calls is {"type": "parallel", "calls": [...]}, each as if it stood alone.
    """
    match action:
        case Search(query):
            return {"type": "search", "query": query}
        case ImageSearch(region):
            return {
                "type": "image_search",
                "region": region if isinstance(region, str) else list(region),
            }
        case Visit(url, question):
            return {"type": "visit", "url": url, "question": question}
        case Parallel(calls):
            return {"type": "parallel", "calls": [action_dict(call) for call in calls]}
        case Answer(text):
            return {"type": "answer", "text": text}
        case Invalid(reason):
            return {"type": "invalid", "reason": reason}


def read_region(text: str) -> str | Box:
    """A region as the policy wrote it between tags: four numbers are a box, all else is a name."""
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    try:
        left, top, right, bottom = map(float, words)
    except ValueError:
        return text
    box = (left, top, right, bottom)
    return box if all(map(math.isfinite, box)) else text
