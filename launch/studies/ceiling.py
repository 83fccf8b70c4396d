"""The study of ceilings: several starts, evaluated, trained over several seeds, and compared.

    calibrate -> merge every recipe -> evaluate zero-shot -> diagnose heads, prepare (SPORT, cold
    start) -> train arms x seeds -> measure perception -> compare

Only the merges, the trainings and the comparison are in every study.

`obm demo` is the study configs/studies/demo.yaml. Every stage is made once (launch/stages.py), a
broken training goes on from its last checkpoint. Folders of a study:

    calibration/  merged/ARM/  zero-shot/ARM/  conflict/ARM/  prepared/ARM-sSEED/  runs/ARM-sSEED/
    measured.jsonl  logs/  configs/  stages/  report/
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from launch.stages import Stages
from launch.studies.file import Arm, Options, Study
from launch.studies.perception import measure_recognition, trained_seeds
from launch.studies.plan import Plan, flatten
from launch.studies.preparations import map_steps, preparation_steps, prepare_arms, publish_maps
from launch.studies.report import publish
from launch.studies.starts import Step, describe_steps, evaluation_steps, run_steps, start_steps
from launch.studies.trainings import describe_trainings, n_trainings, raise_failures, train_arms

if TYPE_CHECKING:
    from compare.measures import Recognition


def run_ceiling(study: Study, options: Options) -> dict[str, Any]:
    """Run what is missing of a study and write its report.

    Returns:
        The report's summary.

    Raises:
        JobFailedError: trainings failed; with `partial` the rest, if any, is reported first.
    """
    plan = Plan(study, list(options.overrides))
    plan.check()
    stages = Stages(study.output, redo=options.redo)
    run_steps(_steps(plan, stages, options), stages)
    prepare_arms(plan, stages, options)
    failed = train_arms(plan, stages, options)
    if not options.partial or len(failed) == n_trainings(plan):
        raise_failures(failed, plan, is_reported=False)
    recognition = measure_recognition(plan, options, failed) if study.perception else None
    summary = _compare(plan, options.command, failed, recognition)
    raise_failures(failed, plan, is_reported=True)
    return summary


def describe_ceiling(study: Study, options: Options) -> list[str]:
    """Arms, what will be reused, what is left."""
    plan = Plan(study, list(options.overrides))
    plan.check()
    lines = [_describe_arm(study, arm) for arm in study.arms]
    stages = Stages(study.output, redo=options.redo)
    steps = chain(_steps(plan, stages, options), preparation_steps(plan, stages))
    lines += describe_steps(steps, stages)
    return [*lines, *describe_trainings(plan, stages, options)]


def _describe_arm(study: Study, arm: Arm) -> str:
    start = arm.init or f"merge {json.dumps(arm.merge)}"
    start += f", then {arm.prepare}" if arm.prepare else ""
    start += f", {' '.join(flatten(arm.settings))}" if arm.settings else ""
    runs = f"seeds {', '.join(map(str, study.seeds))}" if arm.train else "zero-shot only"
    return f"  {arm.name}: {start}; {runs}"


def _steps(plan: Plan, stages: Stages, options: Options) -> Iterator[Step]:
    yield from start_steps(plan, stages)
    if plan.study.zero_shot:
        yield from evaluation_steps(plan, stages, options.command)
    yield from map_steps(plan, stages)


def _compare(
    plan: Plan, command: str, failed: dict[str, str], recognition: Recognition | None
) -> dict[str, Any]:
    from compare.report import SUFFIXES, text_table, write_report
    from compare.runs import read_run

    study = plan.study
    folders = []
    for arm in study.arms:
        if arm.train:
            folders += [plan.run_folder(arm, seed) for seed in trained_seeds(plan, arm, failed)]
        elif study.zero_shot:
            folders.append(study.output / "zero-shot" / arm.name)
    missing = f" (without {', '.join(failed)}, which failed)" if failed else ""
    config = plan.config(study.arms[0])
    summary = write_report(
        [read_run(folder) for folder in folders],
        study.report_folder,
        command=command,
        name=study.report_name,
        title=study.title + missing,
        target_arm=config.compare.target_arm,
        smoothing=config.compare.smoothing,
        bootstrap=config.compare.bootstrap,
        budget_arm=config.compare.budget_arm,
        recognition=recognition,
        # what the study file gives an arm of its own differs on purpose; the report says so
        allow=sorted(
            {key.partition("=")[0] for arm in study.arms for key in flatten(arm.settings)}
        ),
        overwrite=True,
    )
    publish_maps(plan, command)
    print(f"\n{text_table(summary)}\n")
    publish(study, summary, SUFFIXES)
    return summary
