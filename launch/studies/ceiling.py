"""A study: several starts, evaluated, trained over several seeds, and compared.

    calibrate -> merge every recipe -> evaluate zero-shot -> train arms x seeds -> compare

`obm demo` is the study configs/studies/demo.yaml. Every stage is made once (launch/stages.py), a
broken training goes on from its last checkpoint. Folders of a study:

    calibration/  merged/ARM/  zero-shot/ARM/  runs/ARM-sSEED/  logs/  configs/  stages/  report/
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from launch.stages import Stages
from launch.studies.file import Study
from launch.studies.plan import Plan, max_steps
from launch.studies.starts import evaluate_starts, make_starts, say
from launch.studies.trainings import train_arms


def run_ceiling(
    study: Study,
    *,
    command: str,
    overrides: Sequence[str] = (),
    parallel: int | None = None,
    redo: bool = False,
) -> dict[str, Any]:
    """Run what is missing of a study and write its report.

    Args:
        study: what to run.
        command: kept in the report.
        overrides: `key=value`, laid over the study's own.
        parallel: trainings at a time; default: one a GPU, or one a core.
        redo: make stages again whose settings have changed.

    Returns:
        The report's summary.
    """
    plan = Plan(study, list(overrides))
    plan.check()
    stages = Stages(study.output, redo=redo)
    started = time.monotonic()
    make_starts(plan, stages)
    if study.zero_shot:
        evaluate_starts(plan, stages, command)
    train_arms(plan, stages, parallel)
    summary = _compare(plan, command)
    say(f"finished in {(time.monotonic() - started) / 60:.1f} minutes")
    return summary


def describe_study(study: Study, overrides: Sequence[str] = ()) -> str:
    """What a study would run, without running it; every setting is checked on the way."""
    plan = Plan(study, list(overrides))
    lines = [f"study {study.name}: {study.title}", f"output {study.output}"]
    for arm in study.arms:
        start = arm.init or f"merge {json.dumps(arm.merge)}"
        seeds = f"seeds {', '.join(map(str, study.seeds))}"
        runs = seeds if arm.train or study.kind == "floor" else "zero-shot only"
        lines.append(f"  {arm.name}: {start}; {runs}")
    if study.kind == "floor":
        lines.append(f"{len(study.arms) * len(study.seeds)} evaluations, no training")
        return "\n".join(lines)
    if study.kind == "table":
        n_starts = sum(len(arm.modes) for arm in study.arms)
        n_policies = sum(
            len(study.seeds) if arm.train else arm.trained is not None for arm in study.arms
        )
        columns = ", ".join(study.benchmarks)
        n = (n_starts + n_policies) * len(study.benchmarks)
        lines.append(f"{n} evaluations on {columns}")
    config = plan.config(study.arms[0])
    n_runs = sum(arm.train for arm in study.arms) * len(study.seeds)
    lines.append(f"{n_runs} trainings of {max_steps(config)} steps")
    return "\n".join(lines)


def _compare(plan: Plan, command: str) -> dict[str, Any]:
    from compare.report import text_table, write_report
    from compare.runs import read_run

    study = plan.study
    folders = []
    for arm in study.arms:
        if arm.train:
            folders += [plan.run_folder(arm, seed) for seed in study.seeds]
        elif study.zero_shot:
            folders.append(study.output / "zero-shot" / arm.name)
    config = plan.config(study.arms[0])
    output = study.report or study.output / "report"
    summary = write_report(
        [read_run(folder) for folder in folders],
        output,
        command=command,
        name=study.report_name,
        title=study.title,
        target_arm=config.compare.target_arm,
        smoothing=config.compare.smoothing,
        bootstrap=config.compare.bootstrap,
        overwrite=True,
    )
    print(f"\n{text_table(summary)}\n")
    say(f"picture: {output / study.report_name}.png")
    say(f"tables:  {output / study.report_name}.md")
    return summary
