"""Which recorded episodes the viewer's page has: by phase, step, question, at most so many."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
    if choice.limit is None:
        files = [read_file(path, choice) for path in paths]
        _check_found(paths, [len(file.rows) for file in files], choice)
        return files
    # counted first: a run's lines, with all their tokens, may not fit into memory
    counts = [
        Counter(row["question_id"] for row in _rows(path, choice) if row is not None)
        for path in paths
    ]
    _check_found(paths, [found.total() for found in counts], choice)
    kept = thin_out(sum(counts, Counter()), choice.limit)
    return [read_file(path, choice, kept) for path in paths]


def _check_found(paths: Sequence[Path], n_found: Sequence[int], choice: Choice) -> None:
    """Refuse files without an episode.

    Raises:
        CompareError: says which, or that the choice is too narrow.
    """
    for path, n in zip(paths, n_found, strict=True):
        if not n and choice == replace(Choice(), limit=choice.limit):
            raise CompareError(f"{path}: has no episode yet; let the run go on")
    if not any(n_found):
        raise CompareError(
            f"{paths[0]}: no episode is as --phase, --steps and --questions ask; widen them"
        )


def read_file(path: Path, choice: Choice, kept: set[str] | None = None) -> TrajectoryFile:
    """One file's lines that are asked for.

    Args:
        path: of the file.
        choice: what is asked for; its limit is not looked at.
        kept: ids of the questions to take of these; None takes all.

    Raises:
        CompareError: names the first line that is no trajectory.
    """
    file = TrajectoryFile(path, [])
    for row in _rows(path, choice):
        if row is None:
            file.is_torn = True
        elif kept is None or row["question_id"] in kept:
            file.rows.append(row)
    return file


def _rows(path: Path, choice: Choice) -> Iterator[dict[str, Any] | None]:
    """The lines that are asked for, checked; None stands for a torn last one."""
    for number, row in read_lines(path):
        if row is not None:
            check_row(row, f"{path}:{number}")
        if row is None or choice.takes(row):
            yield row


def thin_out(counts: Mapping[str, int], limit: int) -> set[str]:
    """Leaves questions out until no more than `limit` episodes are left, but never the last one.

    Which ones stay depends on their ids alone, so that two pages of one study have the same.

    Args:
        counts: id of a question -> its episodes.
        limit: episodes.

    Returns:
        Ids of the questions that stay.
    """
    kept: set[str] = set()
    n_kept = 0
    for question in sorted(counts, key=_digest):
        if not kept or n_kept + counts[question] <= limit:
            kept.add(question)
            n_kept += counts[question]
    return kept


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
