"""YAML in and out, with the traps of YAML 1.1 closed.

PyYAML reads `2e-6` as text, `no` and `off` as false and `1:30` as 90, and lets a second key of the
same name win in silence. Here numbers and booleans follow the YAML 1.2 core schema and a repeated
key is an error.
"""

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError

_CORE = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
MAX_VALUES = 100_000
"""of a settings file, aliases written out"""
_MISFITS = (ValueError, LookupError, ArithmeticError, AttributeError, TypeError)
"""what PyYAML lets through where text does not fit its tag, as in `!!int abc` or `!!bool abc`"""
_REPLACED = {tag for tag, _, _ in _CORE} | {"tag:yaml.org,2002:timestamp"}


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and no repeated keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or a mapping, which is refused as a key later
            if key_node.value in seen and key_node.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key_node.value}' appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _MISFITS as error:
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            problem = f"{reprlib.repr(node.value)} cannot be read as {tag}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # the 1.1 constructor would read 010 as octal 8
        text = node.value
        value = int(text, 16) if text.startswith("0x") else int(text)
        str(value)  # a ValueError for more digits than Python writes, as for more than it reads
        return value


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either version of YAML would read as something else."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _tag, _pattern, _first in _CORE:
    _regexp = re.compile(rf"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_tag, _regexp, list(_first))
    _Dumper.add_implicit_resolver(_tag, _regexp, list(_first))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a mapping from a YAML file.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that holds a NUL
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"{path}: cannot read the settings ({reason}); check the path") from error
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: expected keys and values, got {type(value).__name__}; "
            "write 'key: value' lines"
        )
    return value


def parse_yaml(text: str, name: str) -> Any:
    """Parses YAML text; `name` stands in the message of a ConfigError."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, name, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise ConfigError(f"{name}: is nested too deep; correct the YAML there") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        if isinstance(error, yaml.reader.ReaderError):
            place = f" (line {text.count(chr(10), 0, error.position) + 1})"
            problem = f"the character U+{ord(text[error.position]):04X} may not stand in YAML"
        raise ConfigError(f"{name}: {problem}{place}; correct the YAML there") from error
    finally:
        if loader is not None:
            loader.dispose()


def _count_values(node: yaml.Node, name: str, counts: dict[int, int]) -> int:
    """How many values a node has once its aliases are written out.

    A few lines of aliases of aliases stand for billions, which no one has written by hand.

    Raises:
        ConfigError: more than `MAX_VALUES`, or a value that holds itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    known = counts.get(id(node))
    if known == 0:
        raise ConfigError(f"{name}: an alias stands within its own anchor; write the value out")
    if known is not None:
        return known
    counts[id(node)] = 0
    inner = node.value
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    total = 1 + sum(_count_values(part, name, counts) for part in inner)
    if total > MAX_VALUES:
        raise ConfigError(
            f"{name}: its aliases stand for more than {MAX_VALUES:,} values; write fewer"
        )
    counts[id(node)] = total
    return total


def expand_call(text: str, name: str) -> dict[str, Any]:
    """A section in its short form: `cast(top=10%)` -> {"source": "cast", "top": 0.1}.

    Args:
        text: a source, and in brackets any keys of the section.
        name: stands in the message of a ConfigError.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    if match is None:
        raise ConfigError(f"{name}: cannot read '{text}'; write source(key=value, key=value)")
    section: dict[str, Any] = {"source": match[1]}
    for part in filter(str.strip, (match[2] or "").split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ConfigError(f"{name}: '{key}' has no value in '{text}'; write {key}=...")
        percent = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*%", value)
        section[key] = float(percent[1]) / 100 if percent else parse_yaml(value, name)
    return section


def write_yaml(value: Any) -> str:
    """YAML text of plain values, keys in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
