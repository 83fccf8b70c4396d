"""The starts of a study: statistics of the parents, merges, and what each does before training."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from launch.stages import Stages, fingerprint
from launch.studies.plan import Plan, calibrations, start_key
from launch.tasks import merged_roles

if TYPE_CHECKING:
    from configs.schema import Config


def make_starts(plan: Plan, stages: Stages) -> None:
    """Statistics and merges that are missing."""
    _calibrate(plan, stages)
    _merge(plan, stages)


def _calibrate(plan: Plan, stages: Stages) -> None:
    seen: set[str] = set()
    for arm in plan.study.arms:
        config = plan.config(arm)
        for role, name in calibrations(arm, config):
            if name not in seen:
                seen.add(name)
                calibrate_role(config, role, name, stages)


def calibrate_role(config: Config, role: str, name: str, stages: Stages) -> None:
    """The stage that makes one model's statistics, of the kinds that the settings name."""
    from launch.commands.calibrate import calibrate_parent, parent_folder, stats_path

    inputs = {
        "checkpoint": fingerprint(parent_folder(config, role)),
        "calibration": asdict(config.calibration),
        "environment": asdict(config.environment),
    }
    target = stats_path(config, role).parent
    made = stages.run(name, inputs, target, partial(calibrate_parent, config, role))
    kinds = ", ".join(config.calibration.kinds)
    what = name.removeprefix("calibrate-")
    say(f"calibrate  {what}: {kinds} of {config.calibration.samples} samples{reused(made)}")


def _merge(plan: Plan, stages: Stages) -> None:
    from launch.commands.calibrate import parent_folder
    from launch.commands.merge import merge_checkpoints

    for arm in plan.study.arms:
        if not arm.merge:
            continue
        config = plan.config(arm)
        roles = ("base", *merged_roles(config))
        inputs = {
            "merge": asdict(config.merge),
            "parents": {role: fingerprint(parent_folder(config, role)) for role in roles},
            "stats": [stages.key(name) for _, name in calibrations(arm, config)],
        }
        target = plan.merged_folder(arm)
        make = partial(merge_checkpoints, config, target)
        made = stages.run(f"merge-{arm.name}", inputs, target, make)
        say(f"merge      {arm.name}: {_recipe(config)}{reused(made)}")


def evaluate_starts(plan: Plan, stages: Stages, command: str) -> None:
    from launch.commands.eval import describe, evaluate_checkpoint

    for arm in plan.study.arms:
        config = plan.config(arm)
        target = plan.study.output / "zero-shot" / arm.name
        inputs = {
            "start": start_key(plan, stages, arm),
            "environment": asdict(config.environment),
            "grpo": config.grpo,
        }
        make = partial(
            evaluate_checkpoint, config, str(plan.start(arm)), target, arm=arm.name, command=command
        )
        made = stages.run(f"evaluate-{arm.name}", inputs, target, make)
        record = json.loads((target / "eval.json").read_text(encoding="utf-8"))
        say(f"evaluate   {describe(record)}{reused(made)}")


def _recipe(config: Config) -> str:
    from merge.methods import METHODS

    settings = config.merge
    weights = [f"{role} {settings.weights.get(role, 1.0):g}" for role in merged_roles(config)]
    is_sparse = METHODS[settings.method].is_sparse
    density = f"density {settings.density:g}, " if is_sparse else ""
    return f"{density}weights {', '.join(weights)}"


def reused(made: bool) -> str:
    """What is said of a stage that was there."""
    return "" if made else " (there already)"


def say(message: str) -> None:
    """One line, above a bar where there is one."""
    from tqdm import tqdm

    tqdm.write(message)
