"""Figures out of result files: a small language of paths and sums, for `launch.results_check`.

    arms.obm.ceiling                                    ceiling.json, the entry's own file
    floor.json: arms.obm.parts."seen accuracy".mean     another file; quotes where a key has blanks
    runs[size=1.5b, run=ours ties 2 threads].wall_s     all records of a list with these values;
                                                        in quotes where one has a comma, with a dot
                                                        for what lies inside (work.policy=tiny)
    cold_accuracy.csv: [arm=vlm_2, step=60].accuracy    a csv is a list of records
    max(arms.*.ceiling)                                 * is every key or item
    median(runs[run=a].cpu_s) / median(runs[run=b].cpu_s) * 100       from left to right
    arms.wudi.ceiling = max(arms.*.ceiling)             a comparison, for what is said in words

Nothing of it is evaluated as Python.
"""

from __future__ import annotations

import csv
import json
import math
import operator
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from compare.errors import CompareError

_FILE = r"(?:[\w-]+\.(?:json|csv): *)?"
_STEP = r'(?:"[^"]*"|[\w@*-]+|\[[^\]]*\])'
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>\d+(?:\.\d+)?)(?=[\s,)]|$)|(?P<function>[a-z]+)\(|(?P<mark>[-+*/,)])(?=\s|$)"
    rf"|(?P<path>{_FILE}{_STEP}(?:\.?{_STEP})*)|(?P<end>[,)]))"
)
_CONDITION = re.compile(r'\s*([^=,]+)=("[^"]*"|[^,]*)')
_COMPARISON = re.compile(r" (<=|>=|<|>|=|!=) ")

FUNCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "median": statistics.median,
    "count": len,
    "sum": math.fsum,
}
OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "=": lambda a, b: math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12),
    "!=": operator.ne,
}


class Results:
    """The result files of a folder, read when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open = cache(self._open)

    def _open(self, name: str) -> Any:
        """Content of a json, or the records of a csv with their numbers as numbers.

        Raises:
            CompareError: no such file, or it is broken.
        """
        path = self.folder / name
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                return json.loads(text)
        except (OSError, json.JSONDecodeError) as error:
            raise CompareError(f"{path}: {error}; name a committed result file") from error
        rows = csv.DictReader(text.splitlines())
        return [{key: _number_or_text(value) for key, value in row.items()} for row in rows]


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def find(content: Any, path: str) -> list[Any]:
    """Everything that a path leads to.

    Raises:
        CompareError: a step leads nowhere; the message has the keys that are there.
    """
    found, walked = [content], ""
    for step in re.findall(_STEP, path):
        walked += f"{'' if step[0] == '[' or not walked else '.'}{step}"
        following = [value for item in found for value in _follow(item, step)]
        if not following:
            raise CompareError(f"'{walked}' leads nowhere; there {_content(found[0])}")
        found = following
    return found


def _content(item: Any) -> str:
    """What stands where a step leads nowhere."""
    if isinstance(item, Mapping):
        return f"are {sorted(item)}"
    return f"are {len(item)} records" if isinstance(item, list) else f"is {item!r}"


def _follow(item: Any, step: str) -> list[Any]:
    """One step from one value: a key, an index, all of them, or the records that fit."""
    rows = item if isinstance(item, list) else []
    if step == "*":
        return list(item.values()) if isinstance(item, Mapping) else rows
    if step[0] == "[":
        wanted = [(key, value.strip('"')) for key, value in _CONDITION.findall(step[1:-1])]
        return [row for row in rows if all(_is_same(_inner(row, key), v) for key, v in wanted)]
    key = step.strip('"')
    if isinstance(item, list):
        return [item[int(key)]] if key.isdigit() and int(key) < len(item) else []
    return [item[key]] if isinstance(item, Mapping) and key in item else []


def _inner(row: Any, key: str) -> Any:
    """A record's value; dots lead inwards where the record itself has no such key."""
    if isinstance(row, Mapping) and key in row:
        return row[key]
    for part in key.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row


def _is_same(value: Any, text: str) -> bool:
    """Whether a record's value is the one written in a path; numbers by their value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value) == text


class _Reader:
    """One expression, read from left to right."""

    def __init__(self, text: str, results: Results, file: str | None) -> None:
        self.text, self.results, self.file, self.at = text, results, file, 0

    def next(self) -> tuple[str, str]:
        """Kind and text of the next token; ("", "") at the end."""
        if not self.text[self.at :].strip():
            return "", ""
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise CompareError(f"'{self.text}' cannot be read from '{self.text[self.at :]}' on")
        self.at = match.end()
        kind = match.lastgroup or ""
        return ("mark" if kind == "end" else kind), match[kind]

    def values(self) -> tuple[list[Any], str]:
        """The values up to a comma, a bracket or the end, and what ended them."""
        found = self.term()
        while True:
            kind, mark = self.next()
            if kind == "" or mark in (",", ")"):
                return found, mark
            if mark not in OPERATORS or kind != "mark":
                raise CompareError(f"'{self.text}': '{mark}' stands where + - * / is expected")
            found = [OPERATORS[mark](self.one(found), self.one(self.term()))]

    def term(self) -> list[Any]:
        """A number, what a path leads to, or a function of both."""
        kind, token = self.next()
        if kind == "number":
            return [float(token)]
        if kind == "path":
            file, path = re.fullmatch(rf"({_FILE})(.*)", token).groups()  # type: ignore[union-attr]
            name = file.strip(": ") or self.file
            if name is None:
                raise CompareError(f"'{self.text}' names no file; write FILE.json: PATH")
            return find(self.results.open(name), path)
        if kind == "function" and token in FUNCTIONS:
            arguments, mark = self.values()
            while mark == ",":
                more, mark = self.values()
                arguments = arguments + more
            if mark != ")":
                raise CompareError(f"'{self.text}': a ')' is missing")
            return [FUNCTIONS[token](arguments)]
        stands = f"'{token}'" if token else "the end"
        raise CompareError(
            f"'{self.text}': {stands} is no value; functions: {', '.join(FUNCTIONS)}"
        )

    def one(self, found: Sequence[Any]) -> Any:
        """The only value; several need a function that makes one of them."""
        if len(found) != 1:
            raise CompareError(f"'{self.text}' leads to {len(found)} values; say median(...) of")
        return found[0]


def value_of(text: str, results: Results, file: str | None = None) -> Any:
    """What an expression of this module's language says now.

    Args:
        text: the expression.
        results: where files are.
        file: the one that paths without a file are in.

    Raises:
        CompareError: it cannot be read, leads nowhere, or to more than one value.
    """
    reader = _Reader(text, results, file)
    found, mark = reader.values()
    if mark:
        raise CompareError(f"'{text}': a '{mark}' too many")
    return reader.one(found)


def holds(text: str, results: Results, file: str | None = None) -> bool:
    """Whether a comparison of two expressions is true.

    Raises:
        CompareError: as `value_of`; it is no comparison, or one with what is no number.
    """
    parts = _COMPARISON.split(text)
    if len(parts) != 3:
        raise CompareError(f"'{text}' is no comparison; write A < B, with blanks around the sign")
    left, sign, right = parts
    values = value_of(left, results, file), value_of(right, results, file)
    try:
        return COMPARISONS[sign](*values)
    except TypeError as error:
        raise CompareError(f"'{text}' compares {values[0]} with {values[1]}") from error
