"""The paper's table: every start in its modes and every trained policy, on each benchmark.

    make results-paper        (or: obm study paper)

Rows as in arXiv 2603.01416: direct answer, prompted agent and workflow of the plain VLM, the merges
before any training, then RL from each start. A study file with `benchmarks` says what is in it.
Every evaluation is a stage (launch/stages.py) under `table/` of the study's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from launch.stages import Stages, fingerprint
from launch.studies.ceiling import describe_ceiling
from launch.studies.file import Arm, Options, Study
from launch.studies.plan import COMMAND_LINE, Plan, flatten, load_settings, start_key
from launch.studies.preparations import map_steps
from launch.studies.report import publish
from launch.studies.starts import evaluate, make_starts, reused, run_steps, say
from launch.studies.trainings import raise_failures, train_arms, whole_policy
from launch.tasks import evaluation_inputs

if TYPE_CHECKING:
    from configs.schema import Config


@dataclass(frozen=True)
class Entry:
    """One evaluation of a row: a checkpoint and how it is asked."""

    row: str
    """key of the row: arm and mode, or arm and `rl`"""
    arm: Arm
    mode: str
    checkpoint: Path | str
    seed: int | None
    """of the training; None before training"""


def run_table(study: Study, options: Options) -> dict[str, Any]:
    """Make what is missing, evaluate it, write the table.

    Returns:
        The content of the report's .json.

    Raises:
        ConfigError: a setting of a benchmark, a trained policy that is not there.
        JobFailedError: trainings failed; there is no table then.
    """
    from compare.paper_table import table_lines, write_table

    plan = Plan(study, list(options.overrides))
    stages = Stages(study.output, redo=options.redo)
    plan.check()
    configs = {
        title: benchmark_config(plan, title, options.overrides) for title in study.benchmarks
    }
    _check_trained(study)
    make_starts(plan, stages)
    run_steps(map_steps(plan, stages), stages)
    raise_failures(train_arms(plan, stages, options), plan, is_reported=True)
    results = []
    for entry in _entries(plan):
        for title, config in configs.items():
            record = _evaluate(plan, stages, entry, title, config, options.command)
            results.append(_result(entry, title, record))
    table = write_table(
        results,
        study.report_folder,
        name=study.report_name,
        title=study.title,
        command=options.command,
        benchmarks={title: _about(config) for title, config in configs.items()},
        training=_training(plan),
    )
    print("\n" + "\n".join(table_lines(table)) + "\n")
    publish(study, table, ("json", "md"))
    return table


def describe_table(study: Study, options: Options) -> list[str]:
    """Arms, evaluations, what will be reused, what is left."""
    plan = Plan(study, list(options.overrides))
    for title in study.benchmarks:
        benchmark_config(plan, title, options.overrides)
    _check_trained(study)
    n_starts = sum(len(arm.modes) for arm in study.arms)
    n_policies = sum(
        len(study.seeds) if arm.train else arm.trained is not None for arm in study.arms
    )
    n = (n_starts + n_policies) * len(study.benchmarks)
    evaluations = f"{n} evaluations on {', '.join(study.benchmarks)}"
    return [*describe_ceiling(study, options), evaluations]


def benchmark_config(plan: Plan, title: str, overrides: Sequence[str]) -> Config:
    """Settings of one benchmark's evaluation."""
    study = plan.study
    settings = [
        (f"{study.file}:overrides.", flatten(study.overrides)),
        (COMMAND_LINE, overrides),
        (f"{study.file}:benchmarks.{title}.", flatten(study.benchmarks[title])),
        (f"{study.file}:", [f"output={json.dumps(str(study.output))}"]),
    ]
    return load_settings(study.config, settings)


def _entries(plan: Plan) -> list[Entry]:
    """All rows, in the table's order: modes of a start, the next start, then what was trained."""
    study = plan.study
    before = [
        Entry(f"{arm.name}/{mode}", arm, mode, plan.start(arm), None)
        for arm in study.arms
        for mode in arm.modes
    ]
    after = []
    for arm in study.arms:
        if arm.trained is not None:
            after.append(Entry(f"{arm.name}/rl", arm, "agent", _trained(study, arm), 0))
        elif arm.train:
            after += [
                Entry(
                    f"{arm.name}/rl", arm, "agent", whole_policy(plan.run_folder(arm, seed)), seed
                )
                for seed in study.seeds
            ]
    return [*before, *after]


def _check_trained(study: Study) -> None:
    """What was trained elsewhere is there, before anything else is made."""
    for arm in study.arms:
        if arm.trained is not None:
            _trained(study, arm)


def _trained(study: Study, arm: Arm) -> str:
    from configs.schema import resolve_model

    try:
        return resolve_model(arm.trained or "")
    except ConfigError as error:
        raise ConfigError(f"{study.place(arm)}.trained: {error}") from error


def _evaluate(
    plan: Plan, stages: Stages, entry: Entry, title: str, config: Config, command: str
) -> dict[str, Any]:
    name = f"{entry.row.replace('/', '-')}-{title.replace(' ', '-')}"
    name += "" if entry.seed is None else f"-s{entry.seed}"
    target = plan.study.output / "table" / name
    is_start = entry.seed is None
    inputs = {
        "checkpoint": start_key(plan, stages, entry.arm)
        if is_start
        else fingerprint(str(entry.checkpoint)),
        **evaluation_inputs(config),
        "mode": entry.mode,
    }
    make = partial(
        evaluate, config, str(entry.checkpoint), target,
        arm=entry.arm.name, command=command, mode=entry.mode,
    )  # fmt: skip
    made = stages.run(f"table-{name}", inputs, target, make, resumes=True)
    record: dict[str, Any] = json.loads((target / "eval.json").read_text(encoding="utf-8"))
    accuracy = record["metrics"]["accuracy"]
    say(f"evaluate   {name}: accuracy {accuracy:.2f}{reused(made)}")
    return record


def _result(entry: Entry, title: str, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "row": entry.row,
        "arm": entry.arm.name,
        "mode": entry.mode,
        "seed": entry.seed,
        "benchmark": title,
        "metrics": record["metrics"],
        "intervals": record["intervals"],
    }


def _about(config: Config) -> dict[str, Any]:
    """What a benchmark's column was asked."""
    from compare.benchmarks import benchmark_of
    from train.settings import asked_words

    environment = config.environment
    if environment.eval_benchmark is not None and environment.eval_benchmark.name != "atlas":
        questions = asked_words(asdict(environment))
    else:
        kinds = ", ".join(environment.eval_kinds)
        questions = f"atlas, split {environment.eval_split}, kinds {kinds}"
    return {"questions": questions, "metrics": list(benchmark_of(config).metrics)}


def _training(plan: Plan) -> str:
    """The trainings of the table in a few words."""
    from train.settings import resolved_grpo

    trained = [arm for arm in plan.study.arms if arm.train]
    if not trained:
        return "trained elsewhere"
    grpo = resolved_grpo(plan.config(trained[0]))
    seeds = ", ".join(map(str, plan.study.seeds))
    return f"{grpo['max_steps']} steps of GRPO, seed{'s' * (len(plan.study.seeds) > 1)} {seeds}"
