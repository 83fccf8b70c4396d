"""Files of recorded episodes: where they lie, their lines, and what is wrong with them.

    run folder, evaluation folder, trajectories.jsonl  ->  lines, checked

A training may be writing to the file meanwhile, and a killed one may have torn its last line: that
line is left out. Any other line that cannot be read is one error with its number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from train.trajectories import READABLE_VERSIONS

NAME = "trajectories.jsonl"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "step": int, "phase": str, "question_id": str, "prompt": str, "turns": list, "images": list,
    "stop_reason": str, "rewards": dict,
}  # fmt: skip
_TURN_TYPES: dict[str, type | tuple[type, ...]] = {"text": str, "action": dict}


@dataclass
class TrajectoryFile:
    """A file, its lines that were asked for, and whether its last line was torn."""

    path: Path
    rows: list[dict[str, Any]]
    is_torn: bool = False


def find_file(place: str | Path) -> Path:
    """The file that a run folder, an evaluation's folder or the file's own name stands for.

    Raises:
        CompareError: there is none.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.exists():
        raise CompareError(f"{path}: does not exist; name a run folder or a {NAME}")
    if not (path / NAME).is_file():
        hint = "the evaluation is not finished" if (path / "episodes").is_dir() else "no run folder"
        raise CompareError(f"{path}: holds no {NAME} ({hint}); name a folder that has one")
    return path / NAME


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number, JSON object) of a file's lines, in order; None stands for a torn last line.

    Raises:
        CompareError: names the first other line that is no JSON object.
    """
    torn: tuple[int, Exception] | None = None
    # by bytes: JSON leaves U+2028 and U+0085, at which a text is split, as they are
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if torn is not None:
                raise CompareError(
                    f"{path}:{torn[0]}: not JSON ({torn[1]}); restore or remove the line"
                )
            try:
                row = json.loads(line)
            except ValueError as error:  # cut within a word, or within a character
                torn = number, error
                continue
            if not isinstance(row, dict):
                raise CompareError(f"{path}:{number}: not a JSON object; restore or remove it")
            yield number, row
    if torn is not None:
        yield torn[0], None


def check_row(row: dict[str, Any], where: str) -> None:
    """Refuses a line that is no trajectory of a version that is known.

    Raises:
        CompareError: says what is missing or wrong.
    """
    version = row.get("schema_version")
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise CompareError(
            f"{where}: schema_version {version!r}, and this program reads {known}; "
            "use the program that wrote the file, or a newer one"
        )
    _check_types(row, _TYPES, where)
    for number, turn in enumerate(row["turns"]):
        if not isinstance(turn, dict):
            raise CompareError(f"{where}: turn {number} is not a JSON object; restore the line")
        _check_types(turn, _TURN_TYPES, f"{where}: turn {number}")
        tokens, logprobs = turn.get("tokens") or [], turn.get("logprobs") or []
        if len(tokens) != len(logprobs):
            raise CompareError(
                f"{where}: turn {number} has {len(tokens)} tokens and {len(logprobs)} logprobs; "
                "restore the line"
            )


def _check_types(
    values: dict[str, Any], types: dict[str, type | tuple[type, ...]], where: str
) -> None:
    for name, kind in types.items():
        if not isinstance(values.get(name), kind):
            found = type(values[name]).__name__ if name in values else "missing"
            raise CompareError(f"{where}: {name!r} is {found}; is this a {NAME}?")
