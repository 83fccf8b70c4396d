"""The model card: what a merged checkpoint is made of, for people and for the hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.families import VISION

RECIPE_KEYS = ("method", "settings", "rules", "stats")


def render_card(record: Mapping[str, Any], name: str) -> str:
    """Writes the README.md of a merged checkpoint.

    Args:
        record: Content of merge.json.
        name: Title of the card, usually the output folder's name.

    Returns:
        Markdown with the front matter that the hub reads.
    """
    parents = record["parents"]
    totals = record["totals"]
    has_vision = any(entry["group"] == VISION for entry in record["tensors"].values())
    auto_class = "AutoModelForImageTextToText" if has_vision else "AutoModelForCausalLM"
    recipe = {key: record[key] for key in RECIPE_KEYS}
    recipe["stats"] = {
        key: {**entry, "source": Path(entry["source"]).name}
        for key, entry in recipe["stats"].items()
    }
    lines = [
        "---",
        "base_model:",
        *(f"- {json.dumps(_model_name(parent['source']))}" for parent in parents.values()),
        "base_model_relation: merge",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if has_vision else 'text-generation'}",
        "tags:",
        "- merge",
        "- obm-warmstart",
        *(["- optimal-brain-merging"] if record["method"] == "obm" else []),
        "---",
        f"# {name}",
        "",
        *_summary(record["method"], has_vision),
        f"The licences of all {len(parents)} parents apply.",
        "",
        "```python",
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("{name}")',
        "```",
        "",
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
    return "\n".join(lines)


def _summary(method: str, has_vision: bool) -> list[str]:
    if has_vision:
        return [
            f"A vision-language model with task vectors of text models merged in by `{method}`,",
            "without training. Vision tower and projector are the vision-language model's, byte",
            "for byte.",
        ]
    return [f"Text models of one base merged by `{method}`, without training."]


def _model_name(source: str) -> str:
    """Keeps a hub id, less its revision; of a local folder only the last part, which is enough."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.is_dir() else source.partition("@")[0]
