"""JSON tool calls: what is offered to the policy, and what it wrote, read by the same table.

    {"name": "text_search", "arguments": {"query": "capital of Mali"}}

Names and arguments that other agents were trained with are understood too (`NAMES`, `ARGUMENTS`):
verl's `search(query_list=[...])`, the `visit(url=[...], goal=...)` of Tongyi DeepResearch, the
`bbox_2d` of Qwen-VL. A list of queries or addresses is several calls. What cannot be read comes
back as one sentence that says what is wrong with it.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from environments.actions import (
    MAX_BOX_NUMBER,
    Call,
    ImageSearch,
    Invalid,
    Search,
    Visit,
    read_region,
)
from environments.sanitize import encodable, one_line

MAX_CALLS = 8
"""Calls in one turn; more are refused together, so that a loop of the policy stays cheap."""
MAX_CALL_CHARS = 20_000
"""Longer calls are refused unread."""


@dataclass(frozen=True)
class Argument:
    """One argument of a tool.

    Attributes:
        schema: its JSON schema; `type` is `string` or `array` (of four numbers).
        is_required: a call without it is refused.
        may_repeat: a list of values stands for several calls.
    """

    schema: Mapping[str, Any]
    is_required: bool = False
    may_repeat: bool = False


@dataclass(frozen=True)
class Tool:
    """A tool as the policy is told of it."""

    description: str
    arguments: Mapping[str, Argument]


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


_BOX = {
    "type": "array",
    "description": "In place of a region: left, top, right, bottom, from 0 to 1 or in pixels.",
    "items": {"type": "number"},
    "minItems": 4,
    "maxItems": 4,
}

TOOLS: dict[str, Tool] = {
    "text_search": Tool(
        "Searches the text of web pages. Returns titles and snippets of the best matches. Name "
        "the entity and the wanted fact.",
        {
            "query": Argument(_text("What to search for."), is_required=True, may_repeat=True),
        },
    ),
    "image_search": Tool(
        "Searches with the picture of the question, or a part of it. Returns the names of what "
        "looks most alike, and no facts.",
        {
            "region": Argument(
                _text("Part of the picture.", enum=["full", "left", "right"], default="full")
            ),
            "box": Argument(_BOX),
        },
    ),
    "visit": Tool(
        "Reads one web page. Returns its text.",
        {
            "url": Argument(
                _text("Address from a search result."), is_required=True, may_repeat=True
            ),
            "question": Argument(_text("What to look for in the page.")),
        },
    ),
}

NAMES = {
    "search": "text_search",
    "web_search": "text_search",
    "search_text": "text_search",
    "search_image": "image_search",
    "visit_page": "visit",
}
"""Other names of the tools."""
ARGUMENTS = {
    "query_list": "query",
    "queries": "query",
    "bbox": "box",
    "bbox_2d": "box",
    "goal": "question",
}
"""Other names of the arguments."""


def schemas(names: Iterable[str]) -> list[dict[str, Any]]:
    """Tools as chat templates take them in `tools`: JSON schemas of functions."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": TOOLS[name].description,
                "parameters": {
                    "type": "object",
                    "properties": {
                        key: dict(argument.schema)
                        for key, argument in TOOLS[name].arguments.items()
                    },
                    "required": [k for k, a in TOOLS[name].arguments.items() if a.is_required],
                },
            },
        }
        for name in names
    ]


def read_calls(texts: Sequence[str], offered: Sequence[str]) -> tuple[Call, ...] | Invalid:
    """The calls that the JSON objects of one turn ask for.

    Args:
        texts: what stood inside each pair of tags.
        offered: names of the tools that there are, for messages; the environment says itself
            what of a known tool it lacks.

    Returns:
        All calls in order, or what is wrong with the first that cannot be read. Total.
    """
    calls: list[Call] = []
    for number, text in enumerate(texts, 1):
        try:
            calls += _read_call(text, offered)
        except _Unreadable as error:
            place = f"call {number}: " if len(texts) > 1 else ""
            return Invalid(place + str(error), is_call=True)
        if len(calls) > MAX_CALLS:
            return Invalid(f"more than {MAX_CALLS} calls in one turn", is_call=True)
    return tuple(calls)


class _Unreadable(Exception):
    """The call cannot be read; the message says why."""


def _read_call(text: str, offered: Sequence[str]) -> list[Call]:
    call = _object(_load(text), "the call")
    name = call.get("name")
    if not isinstance(name, str) or not name:
        raise _Unreadable('the call has no "name"; write {"name": ..., "arguments": {...}}')
    tool = NAMES.get(name, name)
    if tool not in TOOLS:
        raise _Unreadable(f"there is no tool '{_echo(name)}'; use {' or '.join(offered)}")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # the habit of APIs: an object spelt out as text
        arguments = _load(arguments)
    given: dict[str, Any] = {}
    for key, value in _object(arguments, '"arguments"').items():
        key = ARGUMENTS.get(key, key)
        if key not in TOOLS[tool].arguments:
            raise _Unreadable(f"{tool} has no argument '{_echo(key)}'; {_nearest(tool, key)}")
        given[key] = value
    values = {
        key: _values(tool, key, argument, given.get(key))
        for key, argument in TOOLS[tool].arguments.items()
    }
    if tool == "text_search":
        return [Search(query) for query in values["query"]]
    if tool == "image_search":
        region = (values["box"] or values["region"] or ["full"])[0]
        return [ImageSearch(read_region(region) if isinstance(region, str) else region)]
    question = (values["question"] or [""])[0]
    return [Visit(url, question) for url in values["url"]]


def _load(text: str) -> Any:
    if len(text) > MAX_CALL_CHARS:
        raise _Unreadable(f"the call is longer than {MAX_CALL_CHARS} characters")
    if not text:
        raise _Unreadable("the call is empty; write a JSON object with name and arguments")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = error.msg[0].lower() + error.msg[1:]
        raise _Unreadable(
            f"the call is no valid JSON: {message} at character {error.pos + 1}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, [[[[...
        raise _Unreadable("the call is no valid JSON: it is too deep or too long") from error


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Unreadable(f"{what} must be a JSON object in braces, not {_kind(value)}")
    return value


def _values(tool: str, key: str, argument: Argument, value: Any) -> list[Any]:
    """The values of one argument: none, one, or several where it may repeat."""
    if value is None:
        if argument.is_required:
            raise _Unreadable(f"{tool} needs the argument '{key}'")
        return []
    if argument.schema["type"] == "array":
        return [_box(tool, key, value)]
    values = value if argument.may_repeat and isinstance(value, list) and value else [value]
    for item in values:
        if not isinstance(item, str):
            raise _Unreadable(f"{tool}: '{key}' must be text, not {_kind(item)}")
        if argument.is_required and not item.strip():
            raise _Unreadable(f"{tool}: '{key}' is empty")
    return [encodable(item).strip() for item in values]


def _box(tool: str, key: str, value: Any) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else []
    is_box = len(numbers) == 4 and all(type(number) in (int, float) for number in numbers)
    if not is_box or not all(abs(number) <= MAX_BOX_NUMBER for number in numbers):  # NaN is none
        raise _Unreadable(f"{tool}: '{key}' must be four numbers: left, top, right, bottom")
    return tuple(float(number) for number in numbers)


def _nearest(tool: str, key: str) -> str:
    names = list(TOOLS[tool].arguments)
    matches = difflib.get_close_matches(key[:40], names, n=1)
    return f"did you mean '{matches[0]}'?" if matches else f"it takes {', '.join(names)}"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "nothing" if value is None else kinds.get(type(value), "a number")


def _echo(text: str) -> str:
    return one_line(text, 40)
