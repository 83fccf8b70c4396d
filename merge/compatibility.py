"""Whether checkpoints come from one base model, as far as headers and settings tell."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import (
    EMBEDDING,
    SHARED_CONFIG_KEYS,
    VISION,
    Family,
    canonical_name,
    get_family,
    group_of,
    text_types,
)

ONE_BASE = "base, VLM and all others must come from one base model"


def find_families(
    parents: Mapping[str, Checkpoint], families: str | Path | None
) -> dict[str, Family]:
    """Returns the family of each checkpoint, after comparing the text models inside.

    Args:
        parents: Role -> checkpoint, `vlm` among them.
        families: YAML file with further families.

    Raises:
        MergeError: An architecture is unknown, or not that of the VLM's language module.
    """
    found = {
        role: get_family(parent.config.get("model_type"), f"{role} {parent.source}", families)
        for role, parent in parents.items()
    }
    expected = text_types(found["vlm"], parents["vlm"].text_config)
    for role, parent in parents.items():
        types = text_types(found[role], parent.text_config)
        if not set(types) & set(expected):
            raise MergeError(
                f"{role} {parent.source}: is a model of {' or '.join(types)}, the VLM's language "
                f"module is one of {' or '.join(expected)}; {ONE_BASE}"
            )
    return found


def canonical_names(checkpoint: Checkpoint, family: Family) -> dict[str, str]:
    """Maps canonical names to stored names.

    Raises:
        MergeError: A tensor is not part of the family, or is there twice.
    """
    names: dict[str, str] = {}
    where = f"{checkpoint.role} {checkpoint.source}"
    for name in checkpoint.tensors:
        canonical = canonical_name(family, name)
        if canonical is None or group_of(family, canonical) is None:
            raise MergeError(
                f"{where}: tensor {name} is not part of {family.model_type}; "
                "save the model with save_pretrained, without adapters or quantisation"
            )
        if canonical in names:
            raise MergeError(f"{where}: {names[canonical]} and {name} are the same tensor")
        names[canonical] = name
    return names


def check_shapes(
    parents: Mapping[str, Checkpoint],
    names: Mapping[str, Mapping[str, str]],
    families: Mapping[str, Family],
) -> None:
    """Compares every tensor that a parent shares with the VLM, also those that are copied.

    Embeddings may differ in their rows; `vocabulary` decides what is done about it.

    Args:
        parents: Role -> checkpoint.
        names: Role -> canonical name -> stored name.
        families: Role -> family.

    Raises:
        MergeError: A shape differs.
    """
    for role, parent in parents.items():
        for canonical, name in names[role].items():
            group = group_of(families[role], canonical)
            if canonical not in names["vlm"] or group == VISION:
                continue
            shape = list(parent.tensors[name].shape)
            expected = list(parents["vlm"].tensors[names["vlm"][canonical]].shape)
            if group == EMBEDDING and shape[1:] == expected[1:]:
                continue
            if shape != expected:
                raise MergeError(
                    f"{canonical}: {role} {parent.source} has shape {shape}, the VLM {expected}; "
                    f"{ONE_BASE}"
                )


def check_settings(parents: Mapping[str, Checkpoint]) -> None:
    """Compares the settings that decide on what the entries of a tensor mean.

    Raises:
        MergeError: One differs. A setting that a config.json does not state is not compared.
    """
    expected = _shared_settings(parents["vlm"])
    for role, parent in parents.items():
        for key, value in _shared_settings(parent).items():
            if key in expected and expected[key] != value:
                raise MergeError(
                    f"{role} {parent.source}: {key} is {value}, the VLM's is {expected[key]}; "
                    f"{ONE_BASE}"
                )


def _shared_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.text_config
    settings = {key: config.get(key) for key in SHARED_CONFIG_KEYS}
    return {key: value for key, value in (settings | _thetas(config)).items() if value is not None}


def _thetas(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the bases of the rotary embedding: one, or one a kind of layer (Gemma 3)."""
    rope = config.get("rope_parameters") or {}
    nested = {kind: part for kind, part in rope.items() if isinstance(part, dict)}
    if nested:
        return {f"rope_theta of {kind}": part.get("rope_theta") for kind, part in nested.items()}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    local = config.get("rope_local_base_freq")
    if local is None:
        return {"rope_theta": theta}
    return {"rope_theta of full_attention": theta, "rope_theta of sliding_attention": local}
