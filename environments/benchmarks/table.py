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

from environments.benchmarks.rows import PICTURE_COLUMN, Row, shown

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
    return str(value).strip() or default


def _answer_kind(row: Row) -> str | None:
    kind = _cell(row, "answer_kind", None)
    if kind is not None and kind not in ANSWER_KINDS:
        row.fail(
            "answer_kind", f"no kind {shown(kind)}", f"choose one of {', '.join(ANSWER_KINDS)}"
        )
    return kind


def _several(row: Row, column: str) -> list[str]:
    """A list of texts, or a text whose parts are separated; empty parts are dropped."""
    if column in NEEDED:
        row.need(column)
    value = row.get(column)
    if isinstance(value, str):
        return [part.strip() for part in value.split(SEPARATOR) if part.strip()]
    return row.texts(column)
