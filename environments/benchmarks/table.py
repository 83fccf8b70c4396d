"""A table of your own questions: one row a question, documented columns, everything else kept.

    {"question": "Who built this?", "answers": ["Gustave Eiffel", "Eiffel"], "image": "tower.jpg"}

`question` and `answers` are needed. A cell of `answers` is a list, or a text in which `|` separates
spellings of the same answer (so that a .csv can have several). Columns that are not named below
travel with the question: a reward function of your own gets them (`rewards.functions`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from environments.benchmarks.rows import PICTURE_COLUMN, Row, as_text, shown

NEEDED = {
    "question": "what is asked",
    "answers": "the right answer, or several spellings of it",
}
OPTIONAL = {
    "image": "picture: a file name beside the table or in `images`, bytes, or a `datasets` image",
    "id": "name of the question, each once; without it the number of the row, over all files",
    "split": "which part it belongs to, for `split`",
    "kind": "a group of questions that the evaluation counts by itself, and for `kinds`",
    "answer_kind": "how the answer is checked, see docs/rewards.md",
    "entity_names": "names that a right text query has",
    "gold_passages": "ids of passages that state the answer",
}
KNOWN = {**NEEDED, **OPTIONAL}
TAKEN = ("messages", "entity", "benchmark", "metrics", PICTURE_COLUMN)
"""Names under which a question holds something of its own."""
TEXT_LISTS = ("entity_names", "gold_passages")
ANSWER_KINDS = ("text", "number", "date", "year", "yes_no", "choice", "list", "no_answer")
"""What `answer_kind` may say; a test holds them against `rewards.answer.KINDS`, a package apart."""
NUMBERS = ("tolerance", "best_calls", "hops")
"""Columns that the rewards read as numbers, where a table has them; `range` as two."""
LISTS = ("items", "choices")
"""Columns that the rewards read as lists: the entries of the right answer, the options; an entry of
`items` may be a list of its names, and `choices` may name each option's letter."""
SEPARATOR = "|"
NEAR = 0.75
"""Likeness above which an unknown column is taken for a misspelt one."""


def read_table(row: Row, split: str) -> list[dict[str, Any]]:
    """One question a row; see NEEDED and OPTIONAL for the columns."""
    for column in row.values:
        if column in TAKEN:
            row.fail(str(column), "this name is taken", "give it another name")
        # an optional column that is misspelt would be left out in silence: no picture, one split
        near = None if column in KNOWN else _nearest(str(column))
        if near is not None and near not in row.values:
            reason = f"there is no such column, and no '{near}'"
            row.fail(str(column), reason, f"call it '{near}', or give it another name")
    answers = _several(row, "answers")
    others = {str(name): value for name, value in row.values.items() if name not in KNOWN}
    return [
        {
            **others,
            **{column: _number(row, column) for column in NUMBERS if column in others},
            **({"range": _range(row)} if "range" in others else {}),
            **({"unit": _unit(row)} if "unit" in others else {}),
            **{column: _entries(row, column) for column in LISTS if column in others},
            "id": _cell(row, "id", str(row.number_of_source)),
            "kind": _cell(row, "kind", "all"),
            "split": _cell(row, "split", split),
            "entity": None,
            "question": row.text("question"),
            "answers": row.answers("answers", answers),
            "answer_kind": _answer_kind(row),
            **{column: _several(row, column) for column in TEXT_LISTS},
            "image": row.picture_cell("image"),
            PICTURE_COLUMN: "image",
        }
    ]


@cache
def _nearest(column: str) -> str | None:
    """The known column that an unknown one may be a misspelling of; looked up once a name."""
    near = difflib.get_close_matches(column, KNOWN, n=1, cutoff=NEAR)
    return near[0] if near else None


def _cell(row: Row, column: str, default: str | None) -> str | None:
    """A text; an empty cell, as a .csv has it, is none."""
    value = row.get(column, "")
    if isinstance(value, Mapping | list | tuple | bytes) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        row.fail(column, f"expected text, got {shown(value)}", "write a text, or leave it out")
    return as_text(value) or default


def _answer_kind(row: Row) -> str | None:
    kind = _cell(row, "answer_kind", None)
    if kind is not None and kind not in ANSWER_KINDS:
        row.fail(
            "answer_kind", f"no kind {shown(kind)}", f"choose one of {', '.join(ANSWER_KINDS)}"
        )
    return kind


def _number(row: Row, column: str) -> float | None:
    """A number of 0 or more; an empty cell is none."""
    value = row.get(column, "")
    if isinstance(value, str) and not value.strip():
        return None
    number = _finite(value)
    if number is None or number < 0:
        reason = f"expected a number of 0 or more, got {shown(value)}"
        row.fail(column, reason, "write one, or leave it out")
    if column == "tolerance" and number > 1 and _answer_kind(row) == "number":
        reason = f"{shown(value)} is more than the whole answer"
        row.fail(column, reason, "of a number it is a share: write 0.05 for 5 percent")
    return number


def _unit(row: Row) -> str | None:
    """The name of a unit; an empty cell is none."""
    value = row.get("unit", "")
    if not isinstance(value, str):
        row.fail("unit", f"expected text, got {shown(value)}", "write one, as km, or leave it out")
    return value.strip() or None


def _range(row: Row) -> list[float] | None:
    """Two numbers, as a list or with a separator between them; an empty cell is none."""
    value = row.get("range", "")
    if isinstance(value, str) and not value.strip():
        return None
    cells = value.split(SEPARATOR) if isinstance(value, str) else value
    bounds = [_finite(cell) for cell in cells] if isinstance(cells, list | tuple) else []
    found = [bound for bound in bounds if bound is not None]
    if not len(bounds) == len(found) == 2:
        reason = f"expected two numbers, got {shown(value)}"
        row.fail("range", reason, f"write [low, high] or low{SEPARATOR}high, or leave it out")
    return found


def _entries(row: Row, column: str) -> list[Any] | dict[str, str] | None:
    """A list, in a .csv a text with separators, or options by their letters; without an entry none.

    An empty cell that stayed a text would be a question without a right answer.
    """
    value = row.get(column, "")
    if isinstance(value, str):
        return [part.strip() for part in value.split(SEPARATOR) if part.strip()] or None
    if column == "choices" and isinstance(value, Mapping):
        # a .parquet file has the letters of all rows in each
        there = {str(letter): text for letter, text in value.items() if text is not None}
        return {letter: _entry(row, column, text) for letter, text in there.items()} or None
    entries = value if isinstance(value, list | tuple) else [value]
    return [
        [_entry(row, column, name) for name in entry]
        if column == "items" and isinstance(entry, list | tuple) and entry
        else _entry(row, column, entry)
        for entry in entries
    ] or None


def _entry(row: Row, column: str, value: Any) -> str:
    if not isinstance(value, str | int):
        reason = f"expected a list of texts, got {shown(row.get(column))}"
        row.fail(column, reason, f"write one, or a text with {SEPARATOR} between, or leave it out")
    return str(value)


def _finite(value: Any) -> float | None:
    """The number that a cell holds, in a .csv as text; None where it holds none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(value, bool) or not math.isfinite(number):
        return None
    return value if isinstance(value, int) else number


def _several(row: Row, column: str) -> list[str]:
    """A list of texts, or a text whose parts are separated; empty parts are dropped."""
    if column in NEEDED:
        row.need(column)
    value = row.get(column)
    if isinstance(value, str):
        return [part.strip() for part in value.split(SEPARATOR) if part.strip()]
    return row.texts(column)
