"""The starts of a study: statistics of the parents, merges, and what each does before training.

Each is a step with its inputs, so that a dry run can ask what is there without making anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.stages import Stages, fingerprint
from launch.studies.plan import Plan, calibrations, start_key
from launch.tasks import (
    calibration_inputs,
    evaluation_inputs,
    length_inputs,
    merged_roles,
    named_files,
)
from train import gpu

if TYPE_CHECKING:
    from configs.schema import Config


STATES = {
    "done": "there already",
    "begun": "begun",
    "missing": "to make",
    "changed": "made with other settings",
    "foreign": "not made here",
}
"""What `Stages.look` finds, in words."""


@dataclass(frozen=True)
class Step:
    """A stage before it is made."""

    name: str
    inputs: dict[str, Any]
    """plain data that decides its result"""
    target: Path
    make: Callable[[], object]
    describe: Callable[[], str]
    """one line when it is there"""
    resumes: bool = False
    """`make` goes on with what was broken off"""


def run_steps(steps: Iterable[Step], stages: Stages) -> None:
    """Make what is missing, one after another."""
    for step in steps:
        made = stages.run(step.name, step.inputs, step.target, step.make, resumes=step.resumes)
        say(f"{step.describe()}{reused(made)}")
        gpu.give_back()


def describe_steps(steps: Iterable[Step], stages: Stages) -> list[str]:
    """What is there of the stages before the trainings, in one line; none where there are none."""
    counts: dict[str, int] = {}
    for step in steps:
        state = stages.look(step.name, step.inputs, step.target)
        counts[state] = counts.get(state, 0) + 1
    if not counts:
        return []
    words = ", ".join(
        f"{counts[state]} {name}" for state, name in STATES.items() if state in counts
    )
    return [f"{sum(counts.values())} calibrations, merges and evaluations: {words}"]


def start_steps(plan: Plan, stages: Stages) -> Iterator[Step]:
    """Statistics, then merges. A merge's inputs hold the keys of the statistics before it, so each
    step must have been looked at, or run, before the next is asked for."""
    yield from _calibration_steps(plan)
    yield from _merge_steps(plan, stages)


def make_starts(plan: Plan, stages: Stages) -> None:
    """Statistics and merges that are missing."""
    run_steps(start_steps(plan, stages), stages)


def _calibration_steps(plan: Plan) -> Iterator[Step]:
    seen: set[str] = set()
    for arm in plan.study.arms:
        config = plan.config(arm)
        for role, name in calibrations(arm, config):
            if name not in seen:
                seen.add(name)
                # from its beginning: what it costs counts in the comparison, and whoever goes on
                # with broken sums knows the seconds of the last process only
                yield replace(calibration_step(config, role, name), resumes=False)


def calibration_step(config: Config, role: str, name: str) -> Step:
    """One model's statistics, of the kinds that the settings name."""
    from launch.commands.calibrate import parent_folder, stats_path

    inputs = {
        "checkpoint": fingerprint(parent_folder(config, role)),
        "calibration": asdict(config.calibration),
        "environment": asdict(config.environment),
        **calibration_inputs(config, role),
        **length_inputs(config, role),
    }
    kinds = ", ".join(config.calibration.kinds)
    what = name.removeprefix("calibrate-")
    words = f"calibrate  {what}: {kinds} of {config.calibration.samples} samples"
    return Step(
        name, inputs, stats_path(config, role).parent,
        partial(calibrate, config, role), lambda: words, resumes=True,
    )  # fmt: skip


def calibrate(config: Config, role: str) -> None:
    """A calibration of a study; goes on with what one that was broken off has kept.

    Args:
        config: settings.
        role: see `calibrate_parent`.
    """
    from launch.calibration_run import unfinished_sums
    from launch.commands.calibrate import calibrate_parent, stats_path
    from merge.errors import OtherDataError

    with suppress(OtherDataError):
        calibrate_parent(config, role)
        return
    # the parent answers otherwise now, with another torch, say. Behind the block: the error held
    # the model that it came from
    gpu.give_back()
    for path in unfinished_sums(stats_path(config, role).parent):
        path.unlink()
    calibrate_parent(config, role)


def _merge_steps(plan: Plan, stages: Stages) -> Iterator[Step]:
    from launch.commands.calibrate import parent_folder

    for arm in plan.study.arms:
        if not arm.merge:
            continue
        config = plan.config(arm)
        roles = ("base", *merged_roles(config))
        inputs = {
            "merge": asdict(config.merge),
            "parents": {role: fingerprint(parent_folder(config, role)) for role in roles},
            "stats": [stages.key(name) for _, name in calibrations(arm, config)],
            **named_files(config, "families"),
        }
        target = plan.merged_folder(arm)
        words = f"merge      {arm.name}: {_recipe(config)}"
        make = partial(_merge, config, target)
        yield Step(f"merge-{arm.name}", inputs, target, make, partial(str, words))


def _merge(config: Config, target: Path) -> None:
    """From its beginning, for its cost counts in the comparison; see `_calibration_steps`."""
    from launch.commands.merge import merge_checkpoints
    from merge.output import part_folder

    shutil.rmtree(part_folder(target), ignore_errors=True)
    merge_checkpoints(config, target)


def evaluation_steps(plan: Plan, stages: Stages, command: str) -> Iterator[Step]:
    """What every start does as it is; its merge must have been looked at."""
    from launch.commands.eval import describe

    for arm in plan.study.arms:
        if arm.prepare:
            continue  # there is one a seed; its training evaluates it before the first step
        config = plan.config(arm)
        target = plan.study.output / "zero-shot" / arm.name
        inputs = {
            "start": start_key(plan, stages, arm),
            **evaluation_inputs(config),
        }
        make = partial(
            evaluate, config, str(plan.start(arm)), target, arm=arm.name, command=command
        )

        def words(target: Path = target) -> str:
            record = json.loads((target / "eval.json").read_text(encoding="utf-8"))
            return f"evaluate   {describe(record)}"

        yield Step(f"evaluate-{arm.name}", inputs, target, make, words, resumes=True)


def evaluate(config: Config, checkpoint: str, target: Path, **how: Any) -> None:
    """An evaluation of a study; goes on with what one that was broken off has kept.

    Args:
        config: settings.
        checkpoint: folder or hub id.
        target: folder to write.
        how: further arguments of `evaluate_checkpoint`.
    """
    from compare.errors import OtherEvaluationError
    from launch.commands.eval import evaluate_checkpoint

    # there only where a kill came just before the stage's marker; it would be refused
    (target / "eval.json").unlink(missing_ok=True)
    try:
        evaluate_checkpoint(config, checkpoint, target, **how)
    except OtherEvaluationError:  # of a merge, say, that was since made again from the same inputs
        evaluate_checkpoint(config, checkpoint, target, overwrite=True, **how)


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
