"""Tensor names of each supported architecture: data in families.yaml, read and applied here.

One tensor has several names. `save_pretrained` and the hub write one layout, a loaded model and so
the raw dumps of trainers have another, and each family has its own prefixes. All map onto one
canonical name, which is the name in a text model: `model.layers.3.mlp.up_proj.weight`,
`model.embed_tokens.weight`, `model.norm.weight`, `lm_head.weight`. Vision tower and projector lie
under `visual.`. A text model and the language module of a VLM then share their canonical names.

A new architecture is a new entry in families.yaml, or in a file of the user's, not new code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

import yaml

from merge.errors import MergeError

LINEAR = "linear"
NORM_BIAS = "norm_bias"
EMBEDDING = "embedding"
VISION = "vision"
BUFFER = "buffer"

EMBED_TOKENS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
VISION_PREFIX = "visual."

# Settings that must agree for the entries of two tensors to mean the same thing, although no shape
# shows them. rope_theta is compared too, see `compatibility`.
SHARED_CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
)

SHIPPED = Path(__file__).with_name("families.yaml")
_DEFAULTS = "text_defaults"
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


_MISFITS = (ValueError, LookupError, ArithmeticError, AttributeError, TypeError)
"""What PyYAML lets through where text does not fit its tag, as in `!!int abc`."""


class _Loader(yaml.SafeLoader):
    """SafeLoader in which a repeated key is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' appears twice", key.start_mark
                )
            seen.add(key.value)
        return node


@dataclass(frozen=True)
class Layout:
    """Prefixes of one way of naming the tensors of a family."""

    language: str
    """Before `layers.0.mlp.up_proj.weight`."""
    head: str
    """Before `weight` of the output head."""
    vision: str = ""
    """Before the parts of vision tower and projector."""


@dataclass(frozen=True)
class Family:
    """Names of one architecture; families.yaml explains each field."""

    model_type: str
    bases: tuple[str, ...]
    language_module: str
    layouts: Mapping[str, Layout]
    tower: tuple[str, ...]
    projector: tuple[str, ...]
    input_sites: Mapping[str, tuple[str, ...]]
    norms: tuple[str, ...]
    buffers: tuple[str, ...]

    @property
    def has_vision(self) -> bool:
        """Whether a checkpoint of this family holds a vision tower and a projector."""
        return bool(self.tower)

    @cached_property
    def linears(self) -> frozenset[str]:
        """Linear projections of a decoder layer, such as mlp.up_proj."""
        return frozenset(name for sharing in self.input_sites.values() for name in sharing)

    @cached_property
    def prefixes(self) -> tuple[tuple[str, str], ...]:
        """(stored prefix, canonical prefix), the longest first: `model.visual.` before `model.`."""
        found = {}
        for layout in self.layouts.values():
            found[layout.language] = "model."
            found[layout.head] = "lm_head."
            for part in (*self.tower, *self.projector):
                found[layout.vision + part] = VISION_PREFIX + part
        return tuple(sorted(found.items(), key=lambda pair: -len(pair[0])))


def get_family(model_type: object, where: str, families: str | Path | None = None) -> Family:
    """Finds the family of a checkpoint.

    Args:
        model_type: `model_type` of its config.json.
        where: Name of the checkpoint, for the message.
        families: YAML file with further families.

    Raises:
        MergeError: The architecture is in neither file, or the user's file is faulty.
    """
    known = load_families(families)
    if model_type not in known:
        raise MergeError(
            f"{where}: model_type {model_type!r} is not supported; use a checkpoint of "
            f"{', '.join(known)}, or describe the family in a file and set merge.families"
        )
    return known[str(model_type)]


def canonical_name(family: Family, name: str) -> str | None:
    """Returns the name that a text model gives a tensor, whatever layout it is stored in.

    Returns:
        The canonical name; None where no prefix of the family fits.
    """
    for stored, canonical in family.prefixes:
        if name.startswith(stored):
            return canonical + name[len(stored) :]
    return None


def layer_of(canonical: str) -> int | None:
    """Returns the number of the decoder layer that a tensor is in; None outside of them."""
    match = re.match(r"model\.layers\.(\d+)\.", canonical)
    return int(match[1]) if match else None


def group_of(family: Family, canonical: str) -> str | None:
    """Returns linear, norm_bias, embedding, vision or buffer; None for a name nobody knows."""
    if canonical.startswith(VISION_PREFIX):
        return VISION
    if canonical in (EMBED_TOKENS, LM_HEAD):
        return EMBEDDING
    if canonical == "model.norm.weight":
        return NORM_BIAS
    match = re.fullmatch(r"model\.layers\.\d+\.(.+)", canonical)
    if match and match[1] in family.buffers:
        return BUFFER
    match = _LAYER_NAME.fullmatch(canonical)
    if match and match[2] in family.linears:
        return LINEAR if match[3] == "weight" else NORM_BIAS
    return NORM_BIAS if match and match[2] in family.norms else None


def is_projector(family: Family, canonical: str) -> bool:
    """Whether a vision tensor is of the projector, not of the tower."""
    return canonical.removeprefix(VISION_PREFIX).startswith(family.projector)


def text_types(family: Family, text_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the text models that the language module of a checkpoint can be.

    Args:
        family: Family of the checkpoint.
        text_config: Settings of its language module; `model_type` narrows the choice where a family
            takes several text models.
    """
    if not family.has_vision:
        return (family.model_type,)
    text_type = text_config.get("model_type")
    return (text_type,) if text_type in family.bases else family.bases


@cache
def load_families(path: str | Path | None = None) -> Mapping[str, Family]:
    """Reads the shipped families, and a user's on top.

    Args:
        path: YAML file of the form of families.yaml; an entry replaces a shipped one of its name.

    Returns:
        `model_type` -> family.

    Raises:
        MergeError: The file cannot be read, or a key in it is unknown, missing or of a wrong type.
    """
    families: dict[str, Family] = {}
    defaults = _add(families, SHIPPED, {})
    if path is not None:
        _add(families, Path(path), defaults)
    return families


def _add(families: dict[str, Family], path: Path, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the families of a file, text models first; returns the defaults for text models."""
    entries = {name: _mapping(path, name, entry) for name, entry in _read(path).items()}
    if _DEFAULTS in entries:
        defaults = {**defaults, **entries.pop(_DEFAULTS)}
        _family(path, _DEFAULTS, defaults)  # faulty, whether or not a family below takes them
    for name in sorted(entries, key=lambda name: "bases" in entries[name]):
        entry = entries[name]
        inherited = dict(defaults)
        bases = _texts(path, f"{name}.bases", entry.get("bases", []))
        for base in bases:
            if base not in families or families[base].has_vision:
                _fail(path, f"{name}.bases", f"{base!r} is no text family; describe it first")
        if bases:
            parents = [families[base] for base in bases]
            sites = parents[0].input_sites
            inherited = {
                "input_sites": {site: list(sharing) for site, sharing in sites.items()},
                "norms": sorted({norm for parent in parents for norm in parent.norms}),
                "buffers": sorted({buffer for parent in parents for buffer in parent.buffers}),
            }
        families[name] = _family(path, name, inherited | entry)
    return defaults


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; the home of nobody
        reason = getattr(error, "strerror", None) or str(error)
        raise MergeError(f"{path}: cannot be read ({reason}); check the path") from error
    try:
        content = _Loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError, *_MISFITS) as error:
        problem = " ".join(str(error).split())
        if isinstance(error, _MISFITS):
            problem = f"a value does not fit its tag: {problem}"
        raise MergeError(f"{path}: is not valid YAML ({problem}); correct it") from error
    if not isinstance(content, dict):
        raise MergeError(f"{path}: has no families; write 'model_type: {{...}}' entries")
    return _text_keys(path, "", content)


def _family(path: Path, name: str, entry: Mapping[str, Any]) -> Family:
    known = set(Family.__dataclass_fields__) - {"model_type"}
    for key in entry:
        if key not in known:
            _fail(path, f"{name}.{key}", f"is unknown; use {', '.join(sorted(known))}")
    texts = {
        key: _texts(path, f"{name}.{key}", entry.get(key, []))
        for key in ("bases", "tower", "projector", "norms", "buffers")
    }
    if texts["projector"] and not texts["tower"]:
        _fail(path, f"{name}.tower", "is missing; name the parts of the vision tower")
    if bool(texts["tower"]) != bool(texts["bases"]):
        key = "bases" if texts["tower"] else "tower"
        _fail(path, f"{name}.{key}", "is missing; a family with vision has bases and a tower")
    for key in ("language_module", "layouts"):
        if key not in entry:
            _fail(path, f"{name}.{key}", "is missing; families.yaml in merge/ shows examples")
    sites = _mapping(path, f"{name}.input_sites", entry["input_sites"])
    layouts = _mapping(path, f"{name}.layouts", entry["layouts"])
    if "disk" not in layouts or set(layouts) - {"disk", "memory"}:
        _fail(path, f"{name}.layouts", "has to hold 'disk', may hold 'memory', and nothing else")
    return Family(
        model_type=name,
        language_module=_text(path, f"{name}.language_module", entry["language_module"]),
        layouts={key: _layout(path, f"{name}.layouts.{key}", layouts[key]) for key in layouts},
        input_sites={
            site: _texts(path, f"{name}.input_sites.{site}", sharing)
            for site, sharing in sites.items()
        },
        **texts,
    )


def _layout(path: Path, key: str, value: Any) -> Layout:
    prefixes = _mapping(path, key, value)
    for name in prefixes:
        if name not in Layout.__dataclass_fields__:
            _fail(path, f"{key}.{name}", "is unknown; use language, head, vision")
    for name in ("language", "head"):
        if name not in prefixes:
            _fail(path, f"{key}.{name}", "is missing; write the prefix, with its dot")
    return Layout(**{name: _text(path, f"{key}.{name}", text) for name, text in prefixes.items()})


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(path, key, f"is {value!r}; write 'key: value' entries")
    return _text_keys(path, f"{key}.", value)


def _text_keys(path: Path, prefix: str, entries: Mapping[Any, Any]) -> dict[str, Any]:
    for name in entries:
        if not isinstance(name, str):
            _fail(path, f"{prefix}{name}", "a key must be text; put it in quotes")
    return dict(entries)


def _texts(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        _fail(path, key, f"is {value!r}; write a list of names")
    return tuple(_text(path, key, item) for item in value)


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str):
        _fail(path, key, f"is {value!r}; write text")
    return value


def _fail(path: Path, key: str, problem: str) -> NoReturn:
    raise MergeError(f"{path}:{key}: {problem}")
