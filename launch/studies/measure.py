"""Evaluations of a study without training: what a seed decides, what is there, what is left.

A seed changes the calibration sample, the random stream of the methods that draw, and the choice of
questions and photos; the checkpoints stay. Statistics are stages (launch/stages.py), every
evaluation is a line in measured.jsonl, so a study that was broken off goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.studies.file import Options, Study
from launch.studies.machine import duration_words, share_evaluations, time_left
from launch.studies.starts import Step, calibration_step, say
from launch.tasks import check_merges, merged_roles, needed_kinds

if TYPE_CHECKING:
    from compare.zero_shot import Task
    from configs.schema import Config


def seeded(config: Config, seed: int, folder: Path) -> Config:
    """Settings with all that a seed decides.

    Args:
        config: of an arm.
        seed: of calibration, merge and questions.
        folder: of the statistics.
    """
    return replace(
        config,
        calibration=replace(config.calibration, seed=seed, output=str(folder)),
        merge=replace(config.merge, seed=seed),
        environment=replace(config.environment, data_seed=seed),
    )


def calibration_steps(named: Sequence[tuple[str, Config]]) -> Iterator[Step]:
    """Statistics that merges need, each once.

    Args:
        named: what tells one set of statistics from another (`-s0`), and settings whose
            calibration.kinds are those that any merge needs from it.
    """
    seen: set[str] = set()
    for name, config in named:
        if not needed_kinds(config.merge):
            continue
        for role in merged_roles(config):
            step = calibration_step(config, role, f"calibrate-{role}{name}")
            if step.name not in seen:
                seen.add(step.name)
                yield step


def measure_tasks(
    study: Study, tasks: Sequence[Task], options: Options, words: Callable[[dict[str, float]], str]
) -> list[dict[str, Any]]:
    """Evaluate what is missing; the statistics must be there.

    Args:
        study: says where; finished ones lie in its measured.jsonl.
        tasks: to measure; every merge is planned before the first is made.
        options: `parallel` is used.
        words: of an evaluation's metrics, for its line.

    Returns:
        Each task's result, see `compare.zero_shot.Evaluator.measure`.
    """
    from compare.zero_shot import Results, measure_all
    from launch.commands.merge import merge_checkpoints

    results = Results(study.output / "measured.jsonl")
    missing = [task for task in tasks if task.key not in results]
    check_merges(missing, study.output)
    n_there = len(tasks) - len(missing)
    share = share_evaluations(tasks[0].config, options.parallel)
    say(
        f"evaluate   {len(tasks)} times, {n_there} of them there already; "
        f"{share.parallel} at a time: {share.words}"
    )
    n_left = len({task.key for task in missing})

    def report(name: str, result: dict[str, Any]) -> None:
        nonlocal n_left
        n_left -= 1
        left = time_left(results.seconds(missing), n_left, share.parallel)
        then = f" ({n_left} left, about {duration_words(left)})" if n_left else ""
        say(f"evaluate   {name}: {words(result['metrics'])}{then}")

    return measure_all(
        tasks,
        results,
        merge_checkpoints,
        parallel=share.parallel,
        scratch=study.output,
        report=report,
    )


def describe_tasks(study: Study, tasks: Sequence[Task], options: Options) -> list[str]:
    """What a dry run says: what will be reused, what is left, how long that may take."""
    from compare.zero_shot import Results

    results = Results(study.output / "measured.jsonl")
    n = len(tasks)
    n_left = sum(task.key not in results for task in tasks)
    share = share_evaluations(tasks[0].config, options.parallel)
    lines = [
        f"{n} evaluations, no training; {share.parallel} at a time: {share.words}",
        f"  {n - n_left} there already, {n_left} to run",
    ]
    took = results.seconds(tasks)
    if n_left and took:
        about = duration_words(time_left(took, n_left, share.parallel))
        lines.append(f"  about {about} left, by the {len(took)} that are done")
    return lines


def four_parts(metrics: dict[str, float]) -> str:
    """The floor in words."""
    from train.evaluation import FOUR_PARTS

    return ", ".join(f"{part} {metrics[part]:.2f}" for part in FOUR_PARTS)
