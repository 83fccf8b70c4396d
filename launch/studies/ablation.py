"""The ablation: one recipe, its settings changed one at a time, measured before any training.

    calibrate -> merge and evaluate every point of every axis -> tables and a picture

The reference was tuned on dev; its neighbours are shown on test as evidence, and nothing is chosen
by them. A seed changes what it changes in the study of floors (launch/studies/measure.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.stages import Stages
from launch.studies.axes import (
    Point,
    all_points,
    is_reference,
    read_axes,
    reference_point,
    sample_key,
    statistics_folder,
)
from launch.studies.file import Options, Study
from launch.studies.measure import (
    calibration_steps,
    describe_tasks,
    four_parts,
    measure_tasks,
    seeded,
)
from launch.studies.report import publish
from launch.studies.starts import Step, describe_steps, run_steps, say
from launch.tasks import make_task, merged_roles, needed_kinds

if TYPE_CHECKING:
    from compare.zero_shot import Task
    from configs.schema import Config

ONES = "ones"


@dataclass(frozen=True)
class Run:
    """One point with one seed."""

    point: Point
    seed: int
    sample: str
    """name of its calibration"""
    measured: Config
    """settings with the statistics that calibration makes"""
    config: Config
    """settings of the merge; others than `measured` where ones stand in"""


def run_ablation(study: Study, options: Options) -> dict[str, Any]:
    """Measure what is missing and write tables and picture.

    Args:
        study: its one arm is the reference.
        options: how.

    Returns:
        The content of the json file, see `compare.ablation.write_ablation`.
    """
    from compare.ablation import SUFFIXES, summarise_ablation, write_ablation

    axes = read_axes(study, list(options.overrides))
    runs = _runs(study, axes)
    stages = Stages(study.output, redo=options.redo)
    run_steps(_steps(study, runs, stages), stages)
    measured = measure_tasks(study, _tasks(runs), options, four_parts)
    rows = [
        {
            "arm": run.point.arm,
            "seed": run.seed,
            "recipe": run.point.words,
            "metrics": result["metrics"],
        }
        for run, result in zip(runs, measured, strict=True)
    ]
    summary = summarise_ablation(
        rows, {name: _plain(study, name, points) for name, points in axes.items()},
        reference=reference_point(axes).arm,
    )  # fmt: skip
    record = write_ablation(
        summary,
        rows,
        study.report_folder,
        name=study.report_name,
        title=study.title,
        command=options.command,
        environment=runs[0].config.environment,
        recipe=_recipe(study),
    )
    say(f"reference  {record['reference']}: {four_parts(measured[0]['metrics'])} (first seed)")
    publish(study, record, SUFFIXES)
    return record


def describe_ablation(study: Study, options: Options) -> list[str]:
    """Axes with their points, what will be reused, what is left."""
    axes = read_axes(study, list(options.overrides))
    runs = _runs(study, axes)
    lines = [f"reference {study.arms[0].name}: {_recipe(study)}"]
    for name, points in axes.items():
        values = [f"{point.value}{' (reference)' * is_reference(point)}" for point in points]
        lines.append(f"  {name}: {', '.join(values)}")
    lines.append(f"seeds {', '.join(map(str, study.seeds))}")
    stages = Stages(study.output, redo=options.redo)
    lines += describe_steps(_steps(study, runs, stages), stages)
    return [*lines, *describe_tasks(study, _tasks(runs), options)]


def _runs(study: Study, axes: dict[str, list[Point]]) -> list[Run]:
    """Every point with every seed; seeds outside. Points that are calibrated alike share it."""
    points = all_points(axes)
    names: dict[str, str] = {}
    kinds: dict[str, set[str]] = {}
    for point in points:
        key = sample_key(point)
        if key not in names:
            names[key] = _sample_name(point, names.values())
        kinds.setdefault(key, set()).update(needed_kinds(point.config.merge))
    runs = []
    for seed in study.seeds:
        for point in points:
            key = sample_key(point)
            own_kinds: list[Any] = sorted(kinds[key]) or ["diagonal"]
            calibration = replace(point.config.calibration, kinds=own_kinds)
            config = replace(point.config, calibration=calibration)
            measured = seeded(config, seed, statistics_folder(study, seed, names[key]))
            config = measured
            if point.statistics == ONES:
                folder = statistics_folder(study, seed, f"{names[key]}-{ONES}")
                config = replace(
                    measured, calibration=replace(measured.calibration, output=str(folder))
                )
            runs.append(Run(point, seed, names[key], measured, config))
    return runs


def _sample_name(point: Point, taken: Collection[str]) -> str:
    """Name of a calibration, as a folder has it; with a number where another one has it already."""
    arm = "reference" if is_reference(point) else point.arm
    name = re.sub(r"[^a-z0-9.]+", "-", arm.lower())
    numbered = (f"{name}-{number}" for number in count(2))
    return next(one for one in chain([name], numbered) if one not in taken)


def _steps(study: Study, runs: list[Run], stages: Stages) -> Iterator[Step]:
    yield from calibration_steps([(f"-{run.sample}-s{run.seed}", run.measured) for run in runs])
    for run in runs:
        if run.point.statistics == ONES:
            for role in merged_roles(run.config):
                yield _ones_step(run, role, stages)


def _ones_step(run: Run, role: str, stages: Stages) -> Step:
    """Statistics of ones, in the shapes of the measured ones."""
    from launch.commands.calibrate import stats_path

    source, target = stats_path(run.measured, role), stats_path(run.config, role)
    key = stages.key(f"calibrate-{role}-{run.sample}-s{run.seed}")
    words = f"calibrate  {role}-{ONES}-s{run.seed}: ones in the place of second moments"
    return Step(
        f"ones-{role}-{run.sample}-s{run.seed}", {"measured": key}, target.parent,
        partial(write_ones, source, target), lambda: words,
    )  # fmt: skip


def write_ones(source: Path, target: Path) -> None:
    """Write statistics under which every input of a linear counts the same.

    With them OBM's saliency is delta^2: what is large is kept, and votes by its square.

    Args:
        source: file of second moments, whose names and shapes are taken.
        target: file to write.
    """
    import numpy as np

    from merge.stats import open_stats, save_stats

    stats = open_stats(source, "diagonal")
    ones = {
        name.removesuffix(".weight"): np.ones(stats.shape_of(name) or (), np.float32)
        for name in stats.names
    }
    kept = {k: v for k, v in stats.metadata.items() if k not in ("kind", "aliases")}
    save_stats(target, "diagonal", ones, {**kept, "values": ONES})


def _tasks(runs: list[Run]) -> list[Task]:
    return [make_task(f"{run.point.arm} s{run.seed}", run.config, recognition=True) for run in runs]


def _plain(study: Study, name: str, points: list[Point]) -> dict[str, Any]:
    """An axis as plain data: what it varies, and its points."""
    entry = study.axes[name]
    setting = entry.get("setting") or "; ".join(
        f"{point.value}: {point.words}" for point in points if not is_reference(point)
    )
    return {
        "setting": setting,
        "points": [
            {"value": point.value, "arm": point.arm, "is_reference": is_reference(point)}
            for point in points
        ],
    }


def _recipe(study: Study) -> str:
    from launch.studies.floor import recipe_words

    return recipe_words(study.arms[0])
