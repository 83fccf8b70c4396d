"""The model card: what a merged checkpoint is made of, for people and for the hub."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.families import VISION

RECIPE_KEYS = ("method", "settings", "rules", "stats")


def render_card(record: Mapping[str, Any], name: str) -> str:
    """Writes the README.md of a merged checkpoint.

    Args:
        record: Content of merge.json; of a merged adapter, too, which has no figures.
        name: Title of the card, usually the output folder's name.

    Returns:
        Markdown with the front matter that the hub reads.
    """
    parents = record["parents"]
    is_adapter = "adapter" in record
    has_vision = any(entry["group"] == VISION for entry in record["tensors"].values())
    auto_class = "AutoModelForImageTextToText" if has_vision else "AutoModelForCausalLM"
    lines = [
        "---",
        "base_model:",
        *(f"- {json.dumps(_model_name(parent['source']))}" for parent in parents.values()),
        f"base_model_relation: {'finetune' if is_adapter else 'merge'}",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if has_vision else 'text-generation'}",
        "tags:",
        *([] if is_adapter else ["- merge"]),
        "- obm-warmstart",
        *(["- optimal-brain-merging"] if record["method"] == "obm" else []),
        "---",
        f"# {name}",
        "",
        *_summary(record, has_vision),
        "",
        "```python",
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("{name}")',
        "```",
        "",
        *([] if is_adapter else _figures(record)),
    ]
    return "\n".join(lines)


def _summary(record: Mapping[str, Any], has_vision: bool) -> list[str]:
    """What it is, and whose licences apply."""
    parents, method = record["parents"], record["method"]
    if "adapter" in record:
        base = _model_name(parents["vlm"]["source"])
        return [
            f"{base} with a LoRA adapter put into {record['adapter']['tensors']} of its tensors.",
            f"The licence of {base} applies.",
        ]
    licences = f"The licences of all {len(parents)} parents apply."
    if has_vision:
        return [
            f"A vision-language model with task vectors of text models merged in by `{method}`,",
            "without training. Vision tower and projector are the vision-language model's, byte",
            "for byte.",
            licences,
        ]
    return [f"Text models of one base merged by `{method}`, without training.", licences]


def _figures(record: Mapping[str, Any]) -> list[str]:
    """Parents, recipe and what was merged."""
    parents, totals = record["parents"], record["totals"]
    recipe = {key: record[key] for key in RECIPE_KEYS}
    recipe["stats"] = {
        key: {**entry, "source": Path(entry["source"]).name}
        for key, entry in recipe["stats"].items()
    }
    return [
        "## Parents",
        "",
        "| role | model | revision | xxh3_128 of the tensors that were read |",
        "| --- | --- | --- | --- |",
        *(
            f"| {role} | {_model_name(parent['source'])} | {parent['revision'] or '-'} "
            f"| `{parent['checksum']}` |"
            for role, parent in parents.items()
        ),
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(recipe, indent=2),
        "```",
        "",
        "## What was merged",
        "",
        "| tensors | task | density | share of conflicts won | norm of the task vector |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {group} | {task} | {figures['density'][task]:.4f} "
            f"| {figures['conflicts_won'][task]:.4f} | {figures['delta_norm'][task]:.6g} |"
            for group, figures in record["groups"].items()
            for task in figures["density"]
        ),
        "",
        f"{totals['tensors_merged']} tensors merged, {totals['tensors_copied']} copied; "
        f"{totals['conflicts']} of {totals['entries']} merged entries were in conflict. "
        "`merge.json` has the same figures for every tensor, and a checksum: "
        "`obm merge verify FOLDER` checks them.",
        "",
    ]


def _model_name(source: str) -> str:
    """Keeps a hub id, less its revision; of a local folder only the last part, which is enough."""
    name = public_name(source)
    return source.partition("@")[0] if name == source else name


def public_name(source: str) -> str:
    """What others may read of a model's place: the hub id, or of a local path the last part."""
    path = Path(os.path.expanduser(source))  # the ~ of an unknown user stays
    is_local = path.exists() or path.is_absolute() or source.startswith((".", "~"))
    return path.resolve().name if is_local else source
