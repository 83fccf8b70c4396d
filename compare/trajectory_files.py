"""Files of recorded episodes: where they lie, their lines, and what is wrong with them.

    run folder, evaluation folder, trajectories.jsonl  ->  lines, checked

A training may be writing to the file meanwhile, and a killed one may have torn its last line: that
line is left out. Any other line that cannot be read is one error with its number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from train.trajectories import READABLE_VERSIONS

NAME = "trajectories.jsonl"
TOO_LARGE = 1e300
"""No number of an episode is; sums and thousandths of smaller ones stay finite."""
MAX_DEPTH = 8
"""Lists and objects within each other in an action; an environment's have two at most."""

_Kinds = set[type]
_NUMBER: _Kinds = {int, float}
_SCALAR: _Kinds = {str, int, float, bool}
# What a line and its turns must have; what they may have, or have as null; what lists and objects
# among these hold. Later code relies on it and asks no more.
_TYPES: dict[str, _Kinds] = {
    "step": {int}, "phase": {str}, "question_id": {str}, "prompt": {str}, "turns": {list},
    "images": {list}, "stop_reason": {str}, "rewards": {dict},
}  # fmt: skip
_OPTIONAL: dict[str, _Kinds] = {
    "arm": {str}, "seed": {int}, "kind": {str}, "answer": {str}, "advantages": {list},
    "masked_from": {int}, "gold": {dict}, "question": {dict}, "measured": {dict},
}  # fmt: skip
_GOLD_TYPES: dict[str, _Kinds] = {"answers": {list}, "hits": {list}}
_TURN_TYPES: dict[str, _Kinds] = {"text": {str}, "action": {dict}}
_TURN_OPTIONAL: dict[str, _Kinds] = {
    "n_tokens": {int}, "logprob": _NUMBER, "entropy": _NUMBER, "observation": {str},
    "n_observation_tokens": {int}, "images": {list}, "hits": {list}, "is_error": {bool},
    "fault": {str}, "seconds": _NUMBER, "retries": {int}, "tokens": {list}, "logprobs": {list},
}  # fmt: skip
_ITEMS: dict[str, _Kinds] = {
    "images": {str}, "rewards": {*_NUMBER, bool, type(None)}, "advantages": {*_NUMBER, type(None)},
    "tokens": {str}, "logprobs": _NUMBER, "hits": _SCALAR, "answers": _SCALAR,
}  # fmt: skip
_CALL_TYPES: dict[str, dict[str, _Kinds]] = {
    "search": {"query": {str}}, "image_search": {"region": {str, list}},
}  # fmt: skip
"""What a call of a type must have beside it."""


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
    try:
        is_file, is_there = path.is_file(), path.exists()
    except OSError as error:  # such as a name that is too long
        raise CompareError(
            f"{path}: cannot be read ({error.strerror}); name a run folder or a {NAME}"
        ) from error
    if is_file:
        return path
    if not is_there:
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
    for number, line in _raw_lines(path):
        if torn is not None:
            raise CompareError(
                f"{path}:{torn[0]}: not JSON ({torn[1]}); restore or remove the line"
            )
        try:
            row = json.loads(line)
        except ValueError as error:  # cut within a word, or within a character
            torn = number, error
            continue
        except RecursionError as error:  # no cut makes a line of ours nested thousands deep
            raise CompareError(
                f"{path}:{number}: not read ({error}); restore or remove the line"
            ) from error
        if not isinstance(row, dict):
            raise CompareError(f"{path}:{number}: not a JSON object; restore or remove it")
        yield number, row
    if torn is not None:
        yield torn[0], None


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the lines that are not empty."""
    # by bytes: JSON leaves U+2028 and U+0085, at which a text is split, as they are
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise CompareError(
            f"{path}: cannot be read ({error.strerror}); name a run folder or a {NAME}"
        ) from error


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
    _check_types(row, _OPTIONAL, where, is_optional=True)
    for name in ("gold", "question"):
        _check_types(row.get(name) or {}, _GOLD_TYPES, f"{where}: {name!r}", is_optional=True)
    for number, turn in enumerate(row["turns"]):
        if not isinstance(turn, dict):
            raise CompareError(f"{where}: turn {number} is not a JSON object; restore the line")
        _check_turn(turn, f"{where}: turn {number}")


def calls(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn's actions: its one action, or each of several calls side by side."""
    action = turn.get("action") or {}
    return list(action.get("calls") or []) if action.get("type") == "parallel" else [action]


def _check_turn(turn: dict[str, Any], where: str) -> None:
    _check_types(turn, _TURN_TYPES, where)
    _check_types(turn, _TURN_OPTIONAL, where, is_optional=True)
    tokens, logprobs = turn.get("tokens") or [], turn.get("logprobs") or []
    if len(tokens) != len(logprobs):
        raise CompareError(
            f"{where} has {len(tokens)} tokens and {len(logprobs)} logprobs; restore the line"
        )
    action = turn["action"]
    _check_types(action, {"type": {str}}, f"{where}: 'action'")
    if not _is_plain(action):
        raise CompareError(
            f"{where}: 'action' holds a number that is none, or is nested deep; restore the line"
        )
    _check_types(action, _CALL_TYPES.get(action["type"], {}), f"{where}: 'action'")
    if action["type"] != "parallel":
        return
    _check_types(action, {"calls": {list}}, f"{where}: 'action'")
    for number, call in enumerate(action["calls"]):
        if not isinstance(call, dict):
            raise CompareError(f"{where}: call {number} is not a JSON object; restore the line")
        _check_types(call, {"type": {str}}, f"{where}: call {number}")
        _check_types(call, _CALL_TYPES.get(call["type"], {}), f"{where}: call {number}")


def _check_types(
    values: dict[str, Any], types: dict[str, _Kinds], where: str, *, is_optional: bool = False
) -> None:
    for name, kinds in types.items():
        value: Any = values.get(name)
        if value is None and is_optional:
            continue
        if not _is_a(value, kinds):
            if name not in values:
                raise CompareError(f"{where}: {name!r} is missing; is this a {NAME}?")
            raise CompareError(f"{where}: {name!r} is {_name(value)}; restore the line")
        if name in _ITEMS:
            _check_items(name, value, where)


def _check_items(name: str, values: Any, where: str) -> None:
    for item in values.values() if isinstance(values, dict) else values:
        if not _is_a(item, _ITEMS[name]):
            raise CompareError(f"{where}: {name!r} holds {_name(item)}; restore the line")


def _is_a(value: Any, kinds: _Kinds) -> bool:
    """Of one of the types, and no number that sums of it could not be made of."""
    # by type itself: what JSON makes is of no subclass, but a bool, which is an int to isinstance
    return type(value) in kinds and (type(value) not in _NUMBER or not _is_too_large(value))


def _is_too_large(value: Any) -> bool:
    return isinstance(value, int | float) and TOO_LARGE < abs(value) < math.inf


def _name(value: Any) -> str:
    if value is None:
        return "null"
    return "too large a number" if _is_too_large(value) else type(value).__name__


def _is_plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether JSON, which has no NaN, can be written of it."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(item, depth - 1) for item in items)
    return not isinstance(value, float) or math.isfinite(value)
