"""Rows of a report as text: a table in Markdown, and csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Sequence[str]], align: str = "---:") -> list[str]:
    """Lines of a table.

    Args:
        rows: the head first.
        align: of all columns but the first, which is text; numbers by default.
    """
    head, *body = rows
    rule = ["---", *(align for _ in head[1:])]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """A csv file's content; what a line lacks stays empty.

    Raises:
        ValueError: a line has something that is no column.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
