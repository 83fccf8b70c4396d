"""The model card: what a merged checkpoint is made of, for people and for the hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECIPE_KEYS = ("method", "settings", "stats")


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
    recipe = json.dumps({key: record[key] for key in RECIPE_KEYS}, indent=2)
    lines = [
        "---",
        "base_model:",
        *(f"- {json.dumps(_model_name(parent['source']))}" for parent in parents.values()),
        "base_model_relation: merge",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- merge",
        "- obm-warmstart",
        "---",
        f"# {name}",
        "",
        "A vision-language model with the task vector of a text search agent merged in by "
        f"`{record['method']}`, without training. Vision tower and projector are the "
        "vision-language model's, byte for byte. The licences of all three parents apply.",
        "",
        "```python",
        "from transformers import AutoModelForImageTextToText",
        "",
        f'model = AutoModelForImageTextToText.from_pretrained("{name}")',
        "```",
        "",
        "## Parents",
        "",
        "| role | model | sha256 of the weights |",
        "| --- | --- | --- |",
        *(
            f"| {role} | {_model_name(parent['source'])} | `{parent['sha256']}` |"
            for role, parent in parents.items()
        ),
        "",
        "## Recipe",
        "",
        "```json",
        recipe,
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
        "`merge.json` has the same figures for every tensor.",
        "",
    ]
    return "\n".join(lines)


def _model_name(source: str) -> str:
    """Keeps a hub id; of a local folder only the last part, which says enough in public."""
    return (
        Path(source).expanduser().resolve().name if Path(source).expanduser().is_dir() else source
    )
