"""Perception before and after training: recognition of seen places, for every arm and seed.

The start and the policy of a training are asked the same photos, without tools; the seed chooses
them. What is measured lies in measured.jsonl, so that a study that was broken off goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launch.studies.file import Arm, Options
from launch.studies.measure import measure_tasks
from launch.studies.plan import Plan
from launch.studies.trainings import whole_policy
from launch.tasks import make_task

if TYPE_CHECKING:
    from compare.measures import Recognition
    from compare.zero_shot import Task

WHENS = ("before", "after")


def trained_seeds(plan: Plan, arm: Arm, failed: dict[str, str]) -> list[int]:
    """Seeds of an arm whose training did not fail."""
    return [seed for seed in plan.study.seeds if f"{arm.name}-s{seed}" not in failed]


def measure_recognition(plan: Plan, options: Options, failed: dict[str, str]) -> Recognition:
    """Measure what is missing; the trainings must be done.

    Args:
        plan: of the study.
        options: `parallel` is used.
        failed: trainings that are left out, by name.

    Returns:
        Those of every arm and seed whose training did not fail.
    """
    arms = [arm for arm in plan.study.arms if arm.train]
    keys = [
        (arm, seed, when)
        for arm in arms for seed in trained_seeds(plan, arm, failed) for when in WHENS
    ]  # fmt: skip
    measured = measure_tasks(
        plan.study, [_task(plan, *key) for key in keys], options,
        lambda metrics: f"recognition {metrics['recognition']:.2f}",
    )  # fmt: skip
    found: dict[str, dict[str, dict[int, float]]] = {
        arm.name: {when: {} for when in WHENS} for arm in arms
    }
    for (arm, seed, when), result in zip(keys, measured, strict=True):
        found[arm.name][when][seed] = float(result["metrics"]["recognition"])
    return found


def _task(plan: Plan, arm: Arm, seed: int, when: str) -> Task:
    config = plan.config(arm)
    config = replace(config, environment=replace(config.environment, data_seed=seed))
    start = plan.trained_start(arm, seed)
    checkpoint = start if when == "before" else whole_policy(plan.run_folder(arm, seed))
    name = f"{arm.name}-s{seed} {when} training"
    return make_task(name, config, checkpoint=str(checkpoint), recognition=True)
