"""What a start cost before training, by part, as the files beside it say (`cost.json`).

    {"merge": {"time_s": 8.7, "processor_s": 9.9}, "sport": {"device_s": 51.2}}

`obm merge`, `obm sport`, `obm sft` and `obm diagnose heads` write them; a training copies what its
start and its conflict map cost into start_cost.json of the run folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.frozen import FrozenHeads

COST_NAME = "cost.json"


def cost_of_start(init: str, frozen: FrozenHeads | None = None) -> dict[str, Any]:
    """Costs of a start, and of the conflict map that says which heads of it stay.

    Args:
        init: folder or hub id.
        frozen: heads that do not train; drawn ones cost nothing.

    Returns:
        Nothing where nothing is recorded.
    """
    cost = _read_parts(Path(init))
    if frozen is not None and frozen.map is not None:
        cost |= _read_parts(Path(frozen.map).parent)
    return cost


def cost_with_stage(init: str, stage: str, device_s: float) -> dict[str, Any]:
    """Costs of what a stage made from a start: the start's and its own.

    Args:
        init: folder or hub id of the start.
        stage: name of the stage, `sport` or `sft`.
        device_s: device seconds of the stage.
    """
    before = cost_of_start(init)
    if not before and (Path(init) / "merge.json").is_file():
        before = {"merge": None}  # not recorded, which is not the same as free
    return {**before, stage: {"device_s": device_s}}


def read_cost(path: Path) -> dict[str, Any]:
    """A cost file, or nothing where there is none or it is broken: costs decide no result."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_parts(folder: Path) -> dict[str, Any]:
    """Costs of a start by part; the cost.json of a stage's own run folder is no start's."""
    found = read_cost(folder / COST_NAME)
    return {} if "device_s" in found else found
