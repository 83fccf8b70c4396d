"""Checks one plain value, as read from YAML, against a field's annotation.

`convert` returns the typed value or raises ConfigError; `where` tells it which file set a key, so
that every message can name that file.
"""

import difflib
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from configs.errors import ConfigError
from configs.sections import Between

Where = Callable[[str], str]
"""Maps a dotted key to the name of the file (or command line) that set it."""


def fail(where: Where, key: str, reason: str, fix: str) -> NoReturn:
    """Raises ConfigError with the place, the reason and the fix in one line."""
    raise ConfigError(f"{where(key)}:{key}: {reason}; {fix}")


def nearest(name: object, names: Iterable[str]) -> str:
    """Says which name was probably meant, or lists them all."""
    names = list(names)
    matches = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if matches:
        return f"did you mean '{matches[0]}'?"
    return f"choose one of {', '.join(names)}" if names else "remove it"


def convert(value: Any, annotation: Any, key: str, where: Where, default: Any = MISSING) -> Any:
    """Checks and converts one value.

    Args:
        value: plain value from YAML.
        annotation: a field's annotation (scalar, Optional, Literal, Annotated with `Between`,
            list, dict, TypedDict or dataclass).
        key: dotted key, for the message.
        where: names the file that set a key.
        default: a TypedDict's default, over which the given keys are laid.

    Raises:
        ConfigError: wrong type, value out of range, unknown choice or unknown key.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, limit = get_args(annotation)
        return _in_range(convert(value, inner, key, where), limit, key, where)
    if origin in (Union, types.UnionType):
        inner = next(choice for choice in get_args(annotation) if choice is not type(None))
        return None if value is None else convert(value, inner, key, where)
    if origin is Literal:
        return _choice(value, get_args(annotation), key, where)
    if is_dataclass(annotation) and isinstance(annotation, type):
        return build(value, annotation, key, where)
    if is_typeddict(annotation):
        return _typed_dict(value, annotation, key, where, default)
    if origin is list:
        return _list(value, get_args(annotation)[0], key, where, default)
    if origin is dict:
        return _dict(value, get_args(annotation)[1], key, where, default)
    return _scalar(value, annotation, key, where)


def build(value: Any, section: type, key: str, where: Where) -> Any:
    """Fills a dataclass from a mapping; an empty section means its defaults."""
    mapping = _mapping(value, key, where)
    hints = get_type_hints(section, include_extras=True)
    known = {item.name: item for item in fields(section)}
    prefix = f"{key}." if key else ""
    for name in mapping:
        if name not in known:
            fail(where, f"{prefix}{name}", "unknown key", nearest(name, known))
    values = {}
    for name, item in known.items():
        if name in mapping:
            default = item.default_factory() if item.default_factory is not MISSING else MISSING
            values[name] = convert(mapping[name], hints[name], f"{prefix}{name}", where, default)
        elif item.default is MISSING and item.default_factory is MISSING:
            fail(where, f"{prefix}{name}", "missing", f"add '{prefix}{name}: ...'")
    return section(**values)


def _mapping(value: Any, key: str, where: Where) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        fail(
            where,
            key,
            f"expected a section, got {_name(value)}",
            "indent its keys below it",
        )
    for name in value:
        if not isinstance(name, str):
            fail(where, f"{key}.{name}", "a key must be text", "put it in quotes")
    return value


def _typed_dict(
    value: Any, annotation: Any, key: str, where: Where, default: Any
) -> dict[str, Any]:
    """Lays the given keys over the default's, so that a file may name only what differs."""
    mapping = _mapping(value, key, where)
    hints = get_type_hints(annotation, include_extras=True)
    result = {} if default is MISSING else dict(default)
    for name in mapping:
        if name not in hints:
            fail(where, f"{key}.{name}", "unknown key", nearest(name, hints))
        result[name] = convert(mapping[name], hints[name], f"{key}.{name}", where)
    return result


def _dict(value: Any, inner: Any, key: str, where: Where, default: Any) -> dict[str, Any]:
    """Lays freely named keys over the default's."""
    result = {} if default is MISSING else dict(default)
    for name, item in _mapping(value, key, where).items():
        result[name] = convert(item, inner, f"{key}.{name}", where)
    return result


def _list(value: Any, inner: Any, key: str, where: Where, default: Any) -> list[Any]:
    if not isinstance(value, list):
        fail(where, key, f"expected a list, got {_name(value)}", f"write [{value}]")
    if not value and default != []:
        fail(where, key, "the list is empty", "name at least one entry")
    return [convert(item, inner, f"{key}[{i}]", where) for i, item in enumerate(value)]


def _choice(value: Any, choices: tuple[Any, ...], key: str, where: Where) -> Any:
    # types, too: 1 equals true
    if (type(value), value) not in [(type(choice), choice) for choice in choices]:
        names = ", ".join(map(str, choices))
        fail(where, key, f"'{value}' is not one of {names}", nearest(value, map(str, choices)))
    return value


def _in_range(value: float, limit: Between, key: str, where: Where) -> float:
    too_low = value <= limit.low if limit.above else value < limit.low
    if too_low or (limit.high is not None and value > limit.high):
        fail(where, key, f"{value} is out of range", f"use a number {range_words(limit)}")
    return value


def range_words(limit: Between) -> str:
    """The range in words, as the documentation and the messages say it."""
    if limit.high is not None:
        return f"from {limit.low:g} to {limit.high:g}"
    return f"above {limit.low:g}" if limit.above else f"of {limit.low:g} or more"


def _scalar(value: Any, kind: Any, key: str, where: Where) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    # bool is a subclass of int: `seed: true` must not become seed 1
    if type(value) is not kind:
        fixes = {str: f'write "{value}" in quotes', bool: "write true or false"}
        fix = fixes.get(kind, f"give {_word(kind)}")
        fail(where, key, f"expected {_word(kind)}, got {_name(value)}", fix)
    if kind is float and not math.isfinite(value):
        fail(where, key, f"{value} is not a finite number", "give a number")
    return value


def _as_float(value: int) -> float:
    """Infinite where a float cannot hold the number, as YAML reads 1e999."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _word(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, kind.__name__)


def _name(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"
