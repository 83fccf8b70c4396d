"""The study of floors: what every start does before any training, over several seeds.

    calibrate -> merge and evaluate every arm -> tables

A seed changes the calibration sample, the random stream of the methods that draw, and the choice of
questions and photos; the three checkpoints stay. Statistics are stages (launch/stages.py), every
evaluation is a line in measured.jsonl, so a study that was broken off goes on where it stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.stages import Stages
from launch.studies.file import Arm, Study
from launch.studies.plan import Plan
from launch.studies.starts import calibrate_role, say
from launch.tasks import check_merges, make_task, merged_roles, needed_kinds

if TYPE_CHECKING:
    from configs.schema import Config


def run_floor(
    study: Study,
    *,
    command: str,
    overrides: Sequence[str] = (),
    parallel: int | None = None,
    redo: bool = False,
) -> dict[str, Any]:
    """Measure what is missing and write the tables.

    Args:
        study: arms, seeds and where to write; the first arm is the one that others are held
            against.
        command: kept in the report.
        overrides: `key=value`, laid over the study's own.
        parallel: evaluations at a time; default: one a core.
        redo: make statistics again whose settings have changed.

    Returns:
        The summary of `compare.floor.summarise_floor`, and how it was made.
    """
    from compare.floor import floor_text_table, summarise_floor, write_floor
    from compare.zero_shot import Results, measure_all
    from launch.commands.merge import merge_checkpoints

    started = time.monotonic()
    plan = Plan(study, list(overrides))
    runs = [(arm, seed, _config(plan, arm, seed)) for seed in study.seeds for arm in study.arms]
    _calibrate(runs, Stages(study.output, redo=redo))
    tasks = [
        make_task(
            f"{arm.name}-s{seed}",
            config,
            checkpoint=None if arm.merge else str(plan.start(arm)),
            recognition=True,
        )
        for arm, seed, config in runs
    ]
    results = Results(study.output / "measured.jsonl")
    missing = [task for task in tasks if task.key not in results]
    study.output.mkdir(parents=True, exist_ok=True)
    check_merges(missing, study.output)
    say(f"evaluate   {len(tasks)} times, {len(tasks) - len(missing)} of them there already")
    measured = measure_all(
        tasks,
        results,
        merge_checkpoints,
        parallel=parallel or len(os.sched_getaffinity(0)),
        scratch=study.output,
        report=lambda name, result: say(f"evaluate   {name}: {_parts(result['metrics'])}"),
    )
    rows = [
        {"arm": arm.name, "seed": seed, "recipe": _recipe(arm), "metrics": result["metrics"]}
        for (arm, seed, _), result in zip(runs, measured, strict=True)
    ]
    summary = summarise_floor(rows, reference=study.arms[0].name)
    output = study.report or study.output / "report"
    summary = write_floor(
        summary,
        rows,
        output,
        name=study.report_name,
        title=study.title,
        command=command,
        environment=runs[0][2].environment,
    )
    say("\n" + "\n".join(floor_text_table(summary)) + "\n")
    say(f"tables:  {output / study.report_name}.md")
    say(f"finished in {(time.monotonic() - started) / 60:.1f} minutes")
    return summary


def _config(plan: Plan, arm: Arm, seed: int) -> Config:
    """Settings of an arm with all that a seed decides."""
    config = plan.config(arm)
    folder = Path(config.calibration.output or "") / f"s{seed}"
    return replace(
        config,
        calibration=replace(config.calibration, seed=seed, output=str(folder)),
        merge=replace(config.merge, seed=seed),
        environment=replace(config.environment, data_seed=seed),
    )


def _calibrate(runs: Sequence[tuple[Arm, int, Config]], stages: Stages) -> None:
    seen: set[str] = set()
    for arm, seed, config in runs:
        if not arm.merge or not needed_kinds(config.merge):
            continue
        for role in merged_roles(config):
            own = f"{arm.name}-" if arm.models else ""
            name = f"calibrate-{own}{role}-s{seed}"
            if name not in seen:
                seen.add(name)
                calibrate_role(config, role, name, stages)


def _recipe(arm: Arm) -> str:
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


def _parts(metrics: dict[str, float]) -> str:
    from train.evaluation import FOUR_PARTS

    return ", ".join(f"{part} {metrics[part]:.2f}" for part in FOUR_PARTS)
