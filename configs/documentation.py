"""Writes docs/configuration.md from the dataclasses, so that page and code cannot drift apart.

python -c "from configs.schema import describe; print(describe(), end='')" > docs/configuration.md
"""

import ast
import inspect
import itertools
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from configs import sections
from configs.checks import range_words
from configs.reader import write_yaml
from configs.sections import Config


def describe() -> str:
    """docs/configuration.md: every key with type, default and meaning."""
    lines = [
        "# Configuration",
        "",
        "One YAML file describes one experiment. Precedence: default < inherited file < file <",
        "override on the command line (`key.sub=value`). An unknown key, a wrong type or a value",
        "out of range is an error that names the file, the key and the fix. `inherits: other.yaml`",
        "(relative to the file) takes over another file's keys.",
        "",
        "This page is made by `configs.schema.describe()`.",
    ]
    for title, note, rows in _pages():
        lines += [
            "",
            f"## {title}",
            "",
            note,
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _pages() -> Iterator[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Title, note and table rows of the top level and of each section."""
    hints = get_type_hints(Config, include_extras=True)
    top = [row for row in _rows(Config, "") if not is_dataclass(hints.get(row[0].strip("`")))]
    yield "Top level", "Keys that every experiment has.", top
    for name, hint in hints.items():
        if is_dataclass(hint):
            note = inspect.cleandoc(hint.__doc__ or "")
            yield f"`{name}`", note, list(_rows(hint, f"{name}."))


def _rows(section: Any, prefix: str, defaults: Any = None) -> Iterator[tuple[str, str, str, str]]:
    hints = get_type_hints(section, include_extras=True)
    notes = _field_notes(section.__name__)
    if defaults is None:
        defaults = {item.name: _default(item) for item in fields(section)}
    for name, hint in hints.items():
        if is_typeddict(hint):
            yield from _rows(hint, f"{prefix}{name}.", defaults[name])
            continue
        default = defaults[name]
        if default is MISSING:
            shown = "required"
        elif is_dataclass(default):
            shown = ""
        else:
            shown = (
                f"`{write_yaml(default).removesuffix('...' + chr(10)).strip()}`"
                if not isinstance(default, list | dict)
                else f"`{_flow(default)}`"
            )
        yield f"`{prefix}{name}`", _type_words(hint), shown, notes[name]
        inner = next((choice for choice in get_args(hint) if is_dataclass(choice)), None)
        if inner is not None:
            mark = "[]" if get_origin(hint) is list else ""
            yield from _rows(inner, f"{prefix}{name}{mark}.")


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    inner = ", ".join(f"{key}: {item}" for key, item in value.items())
    return "{" + inner + "}"


def _default(item: Any) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _type_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_type_words(arguments[0])} {range_words(arguments[1])}"
    if origin in (Union, types.UnionType):
        return f"{_type_words(arguments[0])} or null"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list of {_type_words(arguments[0])}"
    if origin is dict:
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(hint, "section")


def _field_notes(class_name: str) -> dict[str, str]:
    """The string under each field; Python drops them, so they are read from the source."""
    tree = ast.parse(inspect.getsource(sections))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    notes = {}
    for pair in itertools.pairwise(body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=note)):
                notes[name] = " ".join(str(note).split())
    return notes
