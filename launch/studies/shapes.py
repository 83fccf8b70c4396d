"""What the keys of a study file may hold: one table, gone through once when the file is read.

What a setting itself may be (a range, a choice) is said by configs/sections.py when an arm's
settings are loaded; here is what those settings stand in, so that nothing later has to ask.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from configs.schema import LARGEST_SEED
from launch.errors import LaunchError

Check = Callable[[Any, str], None]
"""Takes a value and where it stands, `study.yaml:seeds`; raises LaunchError."""

MAX_NAME_BYTES = 150
"""A name becomes a folder and part of files such as `calibrate-NAME-agent.json`; 255 is the file
system's limit."""
MAX_PART_BYTES = 255
MAX_INT_BITS = 10_000
"""Python writes no longer number out in decimals."""


def check_values(raw: Mapping[str, Any], shapes: Mapping[str, Check], where: str) -> None:
    """Hold every value against the shape of its key.

    Args:
        raw: keys that `shapes` has.
        shapes: `STUDY` or `ARM`.
        where: file, and what of it; `file:` or `file:arms[0].`.

    Raises:
        LaunchError: names place and key, what is there and what to write.
    """
    for key, value in raw.items():
        shapes[key](value, f"{where}{key}")


def check_path(value: Any, where: str) -> None:
    """A file or folder, by a name that a file system takes."""
    _check_line(value, where, "a file or folder")
    if any(len(part.encode()) > MAX_PART_BYTES for part in value.split("/")):
        _refuse(where, value, "a name of at most 255 bytes", "shorten it")


def check_merge(value: Any, where: str) -> None:
    """A recipe's name, or the merge's settings."""
    if isinstance(value, str) and value.strip():
        return
    check_recipe(value, where)


def check_recipe(value: Any, where: str) -> None:
    """Settings of a merge, at least one."""
    if not isinstance(value, dict) or not value:
        _refuse(where, value, "settings of a merge", "write {method: NAME}")
    _check_settings(value, where)


def _refuse(where: str, value: Any, expected: str, fix: str) -> NoReturn:
    found = "nothing" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
    raise LaunchError(f"{where}: expected {expected}, got {found}; {fix}")


def _check_line(value: Any, where: str, expected: str = "text") -> None:
    """Text of one line, not blank."""
    if not isinstance(value, str):
        _refuse(where, value, expected, "write it as text, in quotes if need be")
    if not value.strip() or not value.isprintable():
        _refuse(where, value, expected, "write a line of text")


def _check_label(value: Any, where: str) -> None:
    """Text or a number, for people."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _refuse(where, value, "text", "write it as text, in quotes if need be")
    if not _text(value, where).strip():
        _refuse(where, value, "text", "write a line of text")


def check_name(value: Any, where: str) -> None:
    """Text or a number that becomes part of a file's name."""
    _check_label(value, where)
    text = _text(value, where)
    if not text.isprintable() or "/" in text or text in (".", ".."):
        _refuse(
            where, value, "a name", "it becomes part of a file's name: leave out / and the like"
        )
    if len(text.encode()) > MAX_NAME_BYTES:
        _refuse(where, value, f"a name of at most {MAX_NAME_BYTES} bytes", "shorten it")


def _text(value: Any, where: str) -> str:
    _check_plain(value, where)
    return str(value)


def _check_flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        _refuse(where, value, "true or false", "write true or false")


def _check_settings(value: Any, where: str) -> None:
    """Settings by their keys, nested; what `launch.studies.plan.flatten` takes."""
    if not isinstance(value, dict):
        _refuse(where, value, "settings", "indent its keys below it")
    for key, item in value.items():
        _check_key(key, where)
        if "=" in key or not all(key.split(".")):
            raise LaunchError(f"{where}: {key!r} names no setting; write KEY: VALUE below it")
        (_check_settings if isinstance(item, dict) else _check_plain)(item, f"{where}.{key}")


def _check_key(key: Any, where: str) -> None:
    if not isinstance(key, str):
        _refuse(f"{where}.{key}", key, "text as the key", "put it in quotes")


def _check_plain(value: Any, where: str) -> None:
    """What settings are made of; YAML also has dates, sets and bytes."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_key(key, where)
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise LaunchError(f"{where}: the number is too long; write a smaller one")
    elif value is not None and not isinstance(value, bool | int | float | str):
        _refuse(where, value, "text, a number, true or false", "put it in quotes")


def _check_seeds(value: Any, where: str) -> None:
    """Held against each other as they are: nothing is turned into a number afterwards."""
    if not isinstance(value, list) or not value:
        _refuse(where, value, "a list of seeds", "write [0, 1, 2]")
    for index, seed in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(seed, int) or isinstance(seed, bool):
            _refuse(place, seed, "a whole number", "write it without quotes or decimals")
        if not 0 <= seed <= LARGEST_SEED:
            raise LaunchError(f"{place}: out of range; use a whole number from 0 to {LARGEST_SEED}")
        if seed in value[:index]:
            raise LaunchError(f"{place}: seed {seed} is listed twice; list each once")


def _check_axes(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        _refuse(where, value, "axes by name", "indent them below it")
    for axis, entry in value.items():
        _check_key(axis, where)
        _check_axis(entry, f"{where}.{axis}")


def _check_axis(entry: Any, where: str) -> None:
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys == {"setting", "values"} and isinstance(entry["values"], list):
        _check_line(entry["setting"], f"{where}.setting", "the key of a setting")
        _check_settings({entry["setting"]: None}, f"{where}.setting")
        _check_plain(entry["values"], f"{where}.values")
        if not entry["values"]:
            raise LaunchError(f"{where}.values: the list is empty; name at least one")
        return
    if keys == {"points"} and isinstance(entry["points"], dict):
        for name, settings in entry["points"].items():
            if not isinstance(name, bool):
                _check_label(name, f"{where}.points")
            _or_nothing(_check_settings)(settings, f"{where}.points.{name}")
        return
    raise LaunchError(
        f"{where}: write {{setting: KEY, values: [...]}}, or {{points: {{NAME: ...}}}}"
    )


def _check_benchmarks(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not value:
        _refuse(where, value, "benchmarks by their titles", "name at least one, TITLE: {settings}")
    for title, settings in value.items():
        _check_key(title, where)
        _check_line(title, where, "a title")
        _check_settings(settings, f"{where}.{title}")


def _check_labels(value: Any, where: str) -> None:
    if not isinstance(value, list):
        _refuse(where, value, "a list of names", "write [NAME, NAME]")
    for index, name in enumerate(value):
        _check_label(name, f"{where}[{index}]")


def _folders_by(*names: str) -> Check:
    """A path in which these names stand in braces."""
    braces = " and ".join(f"{{{name}}}" for name in names)

    def check(value: Any, where: str) -> None:
        check_path(value, where)
        try:
            value.format(**{name: 0 if name == "seed" else "x" for name in names})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise LaunchError(
                f"{where}: cannot read {value!r}; only {braces} may stand in braces"
            ) from error

    return check


def _or_nothing(check: Check) -> Check:
    """An empty key is as one that is left out."""
    return lambda value, where: None if value is None else check(value, where)


def _anything(value: Any, where: str) -> None:
    """Checked where its meaning is known."""


STUDY: dict[str, Check] = {
    "kind": _anything,
    "config": check_path,
    "output": check_path,
    "title": _check_label,
    "seeds": _check_seeds,
    "recipes": check_path,
    "report": _or_nothing(check_path),
    "report_name": check_name,
    "overrides": _or_nothing(_check_settings),
    "zero_shot": _check_flag,
    "perception": _check_flag,
    "arms": _anything,
    "reference": check_merge,
    "axes": _or_nothing(_check_axes),
    "benchmarks": _check_benchmarks,
    "references": _or_nothing(_check_labels),
    "trained": _or_nothing(_folders_by("arm", "seed")),
    "starts": _or_nothing(_folders_by("arm")),
}
"""Key of a study file -> its shape; which keys a kind has is said in launch/studies/file.py."""
ARM: dict[str, Check] = {
    "name": check_name,
    "init": _or_nothing(_check_line),
    "merge": _or_nothing(check_merge),
    "models": _or_nothing(_check_settings),
    "train": _check_flag,
    "prepare": _anything,
    "settings": _or_nothing(_check_settings),
    "modes": _or_nothing(_check_labels),
    "trained": _or_nothing(_check_line),
}
"""Key of an arm -> its shape."""
