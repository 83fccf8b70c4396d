"""Which recorded episodes the viewer's page has: by phase, step, question, at most so many."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.trajectory_files import TrajectoryFile, check_row, read_lines


@dataclass(frozen=True)
class Choice:
    """What to take."""

    phase: str | None = None
    steps: tuple[tuple[int, int | None], ...] = ()
    """ranges, both ends included; None is open"""
    questions: tuple[str, ...] = ()
    """ids, or patterns with * and ?"""
    limit: int | None = None

    @classmethod
    def parse(
        cls,
        phase: str | None,
        steps: str | None,
        questions: Sequence[str] | None,
        limit: int | None,
    ) -> Choice:
        """From the command line's words.

        Raises:
            CompareError: steps that are none, or a limit below 1.
        """
        if limit is not None and limit < 1:
            raise CompareError(f"--limit {limit}: give a number of 1 or more")
        return cls(phase, parse_steps(steps or ""), tuple(questions or ()), limit)

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether a line is asked for, the limit left aside."""
        step, question = row["step"], row["question_id"]
        return (
            (self.phase is None or (row["phase"] == "eval") == (self.phase == "eval"))
            and (
                not self.steps or any(a <= step and (b is None or step <= b) for a, b in self.steps)
            )
            and (
                not self.questions
                or any(name == question or fnmatchcase(question, name) for name in self.questions)
            )
        )


def parse_steps(text: str) -> tuple[tuple[int, int | None], ...]:
    """Ranges of `0,30-60,100-`.

    Raises:
        CompareError: another text.
    """
    ranges: list[tuple[int, int | None]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d{1,18})(-(\d{0,18}))?", part)
        low = int(match[1]) if match else 0
        high = low if not match or match[2] is None else int(match[3]) if match[3] else None
        if match is None or (high is not None and high < low):
            raise CompareError(f"--steps {part[:40]}: write steps as 0,30-60 or 100-")
        ranges.append((low, high))
    return tuple(ranges)


def read_files(paths: Sequence[Path], choice: Choice) -> list[TrajectoryFile]:
    """The lines that are asked for, checked.

    Raises:
        CompareError: a file twice, a bad line, or nothing to show.
    """
    double = [path for path, n in Counter(path.resolve() for path in paths).items() if n > 1]
    if double:
        raise CompareError(f"{double[0]}: named twice; name every run once")
    files = [read_file(path, choice) for path in paths]
    for path, file in zip(paths, files, strict=True):
        if not file.rows and choice == replace(Choice(), limit=choice.limit):
            raise CompareError(f"{path}: has no episode yet; let the run go on")
    if not any(file.rows for file in files):
        raise CompareError(
            f"{paths[0]}: no episode is as --phase, --steps and --questions ask; widen them"
        )
    return files if choice.limit is None else thin_out(files, choice.limit)


def read_file(path: Path, choice: Choice) -> TrajectoryFile:
    """One file's lines that are asked for.

    Raises:
        CompareError: names the first line that is no trajectory.
    """
    file = TrajectoryFile(path, [])
    for number, row in read_lines(path):
        if row is None:
            file.is_torn = True
            break
        check_row(row, f"{path}:{number}")
        if choice.takes(row):
            file.rows.append(row)
    return file


def thin_out(files: Sequence[TrajectoryFile], limit: int) -> list[TrajectoryFile]:
    """Leaves questions out until no more than `limit` episodes are left, but never the last one.

    Which ones stay depends on their ids alone, so that two pages of one study have the same.
    """
    counts = Counter(row["question_id"] for file in files for row in file.rows)
    kept: set[str] = set()
    for question in sorted(counts, key=lambda name: _digest(name)):
        if not kept or sum(counts[name] for name in kept) + counts[question] <= limit:
            kept.add(question)
    return [
        replace(file, rows=[row for row in file.rows if row["question_id"] in kept])
        for file in files
    ]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
