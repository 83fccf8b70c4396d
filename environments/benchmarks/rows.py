"""One published row, with what an error must name: file, row number, column, reason, fix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from environments.benchmarks.pictures import PictureError, check_picture_file, decode_picture
from environments.errors import EnvironmentSetupError

MAX_SHOWN = 60
"""characters of a bad value that a message repeats"""
LARGEST_EXACT = 2**53
"""from here on a float may stand for several whole numbers"""
PICTURE_COLUMN = "picture_column"
"""key of a question that says where its picture stood; `registry` takes it out"""


class BenchmarkError(EnvironmentSetupError):
    """A benchmark that cannot be read; the message names file, row, column, reason and fix."""


@dataclass(frozen=True)
class Pictures:
    """How the pictures of a benchmark are found."""

    folder: Path | None = None
    """where file names are looked up; None: beside the file of the rows"""
    fetch: bool = False
    """take base64 text and addresses, too"""


@dataclass(frozen=True)
class Row:
    """A row as published, and where it stands. Columns of columns are written with a dot."""

    values: Mapping[str, Any]
    file: str
    number: int
    """counted from 1; in a .jsonl file the line"""
    pictures: Pictures = Pictures()
    n_before: int = 0
    """where the numbers of the files before it end"""

    @property
    def number_of_source(self) -> int:
        """Its number among the rows of all files; of a single one it is `number`."""
        return self.n_before + self.number

    def fail(self, column: str, reason: str, fix: str) -> NoReturn:
        """Raises BenchmarkError for this row."""
        raise BenchmarkError(f"{self.file}, row {self.number}, column '{column}': {reason}; {fix}")

    def get(self, column: str, default: Any = None) -> Any:
        """The value at `a.b`, or the default where it is missing or null."""
        value: Any = self.values
        for name in column.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return default if value is None else value

    def need(self, column: str) -> Any:
        """The value at `a.b`."""
        value = self.get(column)
        if value is None:
            there = ", ".join(sorted(map(str, self.values)))
            self.fail(column, "missing", f"the row has {there}; is this file of this benchmark?")
        return value

    def text(self, column: str) -> str:
        """Text that is not empty."""
        value = self.need(column)
        if not isinstance(value, str | int):
            self.fail(column, f"expected text, got {shown(value)}", "mend the row")
        if not str(value).strip():
            self.fail(column, "is empty", "fill it in or drop the row")
        return str(value).strip()

    def texts(self, column: str) -> list[str]:
        """A list of texts; one text is a list of one, empty ones are dropped."""
        value = self.get(column, [])
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not all(_is_text(item) for item in items):
            self.fail(column, f"expected texts, got {shown(value)}", "mend the row")
        return [text for text in (as_text(item) for item in items) if text]

    def answers(self, column: str, *lists: list[str]) -> list[str]:
        """Gold answers of several columns, each once, in order.

        Args:
            column: named where there is none.
            lists: the answers.
        """
        found = list(dict.fromkeys(answer for answers in lists for answer in answers))
        if not any(any(ch.isalnum() for ch in answer) for answer in found):
            self.fail(column, "no usable answer", "give one, or drop the row: it cannot be scored")
        return found

    def picture_cell(self, column: str) -> Any:
        """What a column holds of a picture, None where it is empty; a named file is looked at.

        Only the first bytes of a file are read: one that breaks off is found when its question is
        asked.
        """
        value = self.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, Mapping | bytes):
            return value
        if not isinstance(value, str):
            self.fail(column, f"expected a file name, got {shown(value)}", "name one file")
        try:
            check_picture_file(value.strip(), self._folder, self.pictures.fetch)
        except PictureError as error:
            self.fail(column, error.reason, error.fix)
        return value.strip()

    @property
    def _folder(self) -> Path:
        return self.pictures.folder or Path(self.file).parent

    def picture(self, column: str, value: Any) -> Any:
        """The decoded picture, RGB.

        Args:
            column: for the message.
            value: see `decode_picture`.
        """
        try:
            return decode_picture(value, self._folder, self.pictures.fetch)
        except PictureError as error:
            self.fail(column, error.reason, error.fix)


def _is_text(value: Any) -> bool:
    """Whether a value can be written as text; NaN, which stands for a missing cell, cannot."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def as_text(value: Any) -> str:
    """A value as text; a whole number that came as a float is written as one: 1889, not 1889.0.

    pandas makes floats of a whole column that has a gap.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_EXACT:
        value = int(value)
    return str(value).strip()


def shown(value: Any) -> str:
    """A bad value and its type, as a message repeats it: cut where it is long."""
    text = repr(value)
    short = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
    return f"{type(value).__name__} {short}"
