"""The study of floors: what every start does before any training, over several seeds.

calibrate -> merge and evaluate every arm -> tables
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.stages import Stages
from launch.studies.file import Arm, Options, Study
from launch.studies.measure import (
    calibration_steps,
    describe_tasks,
    four_parts,
    measure_tasks,
    seeded,
)
from launch.studies.plan import Plan
from launch.studies.report import publish
from launch.studies.starts import Step, describe_steps, run_steps, say
from launch.tasks import make_task

if TYPE_CHECKING:
    from compare.zero_shot import Task
    from configs.schema import Config


def run_floor(study: Study, options: Options) -> dict[str, Any]:
    """Measure what is missing and write the tables.

    Args:
        study: arms, seeds and where to write; the first arm is the one that others are held
            against.
        options: how.

    Returns:
        The summary of `compare.floor.summarise_floor`, and how it was made.
    """
    from compare.floor import SUFFIXES, floor_text_table, summarise_floor, write_floor

    plan = Plan(study, list(options.overrides))
    runs = _runs(plan)
    stages = Stages(study.output, redo=options.redo)
    run_steps(_steps(runs), stages)
    measured = measure_tasks(study, _tasks(plan, runs), options, four_parts)
    rows = [
        {"arm": arm.name, "seed": seed, "recipe": recipe_words(arm), "metrics": result["metrics"]}
        for (arm, seed, _), result in zip(runs, measured, strict=True)
    ]
    record = write_floor(
        summarise_floor(rows, reference=study.arms[0].name),
        rows,
        study.report_folder,
        name=study.report_name,
        title=study.title,
        command=options.command,
        environment=runs[0][2].environment,
    )
    say("\n" + "\n".join(floor_text_table(record)) + "\n")
    publish(study, record, SUFFIXES)
    return record


def describe_floor(study: Study, options: Options) -> list[str]:
    """Arms, what will be reused, what is left."""
    plan = Plan(study, list(options.overrides))
    runs = _runs(plan)
    seeds = ", ".join(map(str, study.seeds))
    lines = [f"  {arm.name}: {arm.init or recipe_words(arm)}; seeds {seeds}" for arm in study.arms]
    lines += describe_steps(_steps(runs), Stages(study.output, redo=options.redo))
    return [*lines, *describe_tasks(study, _tasks(plan, runs), options)]


def _runs(plan: Plan) -> list[tuple[Arm, int, Config]]:
    """Every arm with every seed; seeds outside."""
    return [
        (arm, seed, seeded(plan.config(arm), seed, _folder(plan, arm, seed)))
        for seed in plan.study.seeds
        for arm in plan.study.arms
    ]


def _folder(plan: Plan, arm: Arm, seed: int) -> Path:
    return Path(plan.config(arm).calibration.output or "") / f"s{seed}"


def _steps(runs: list[tuple[Arm, int, Config]]) -> Iterator[Step]:
    return calibration_steps(
        [
            (f"-{arm.name}-s{seed}" if arm.models else f"-s{seed}", config)
            for arm, seed, config in runs
            if arm.merge
        ]
    )


def _tasks(plan: Plan, runs: list[tuple[Arm, int, Config]]) -> list[Task]:
    return [
        make_task(
            f"{arm.name}-s{seed}",
            config,
            checkpoint=None if arm.merge else str(plan.start(arm)),
            recognition=True,
        )
        for arm, seed, config in runs
    ]


def recipe_words(arm: Arm) -> str:
    """What an arm is, in words."""
    from compare.tuning import setting_text

    if arm.merge is None:
        return "as it is"
    flat: dict[str, Any] = {}
    for key, value in arm.merge.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        elif key != "method":
            flat[key] = value
    return f"{arm.merge.get('method', 'obm')}: {setting_text(flat)}"
