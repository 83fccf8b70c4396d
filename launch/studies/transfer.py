"""The study of transfer: starts and trained policies asked where they were not trained.

    take, or make and train, every start -> evaluate it before and after in every world -> tables

Worlds are the study file's `benchmarks`, the first one that which was trained in. `trained` and
`starts` name the run folders and merges of another study; without them this study makes its own. A
seed names the training and chooses the questions and photos of every world.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from launch.errors import LaunchError
from launch.stages import Stages
from launch.studies.file import Arm, Options, Study
from launch.studies.measure import describe_tasks, four_parts, measure_tasks
from launch.studies.paper_table import benchmark_config
from launch.studies.plan import Plan, flatten
from launch.studies.preparations import map_steps
from launch.studies.report import publish
from launch.studies.starts import describe_steps, make_starts, run_steps, say, start_steps
from launch.studies.trainings import (
    describe_trainings,
    raise_failures,
    train_arms,
    trained_policy,
    whole_policy,
)
from launch.tasks import make_task

if TYPE_CHECKING:
    from compare.zero_shot import Task
    from configs.schema import Config


@dataclass(frozen=True)
class Entry:
    """One evaluation."""

    arm: str
    world: str
    stage: str
    """before or after training"""
    seed: int
    checkpoint: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.arm} {self.stage}, {self.world}, s{self.seed}"


def run_transfer(study: Study, options: Options) -> dict[str, Any]:
    """Evaluate what is missing and write the tables.

    Returns:
        The content of the json file, see `compare.transfer.write_transfer`.

    Raises:
        LaunchError: a training that `trained` names is not there, or had another start.
        JobFailedError: trainings of this study failed.
    """
    from compare.transfer import SUFFIXES, accuracy_table, summarise_transfer, write_transfer

    plan = Plan(study, list(options.overrides))
    plan.check()
    worlds = _worlds(plan, options)
    if study.trained is None:
        stages = Stages(study.output, redo=options.redo)
        make_starts(plan, stages)
        run_steps(map_steps(plan, stages), stages)
        raise_failures(train_arms(plan, stages, options), plan, is_reported=True)
    else:
        check_trained(plan)
    entries, training = _entries(plan, whole_policy), _training(plan)
    measured = measure_tasks(study, _tasks(entries, worlds), options, four_parts)
    rows = [
        {**{key: getattr(entry, key) for key in ("arm", "world", "stage", "seed")},
         "metrics": result["metrics"]}
        for entry, result in zip(entries, measured, strict=True)
    ]  # fmt: skip
    record = write_transfer(
        summarise_transfer(rows, study.references),
        rows,
        study.report_folder,
        name=study.report_name,
        title=study.title,
        command=options.command,
        worlds={name: _about(study, name, config) for name, config in worlds.items()},
        training=training,
    )
    say("\n" + "\n".join(accuracy_table(record)) + "\n")
    publish(study, record, SUFFIXES)
    return record


def describe_transfer(study: Study, options: Options) -> list[str]:
    """Arms, worlds, what will be reused, what is left."""
    plan = Plan(study, list(options.overrides))
    plan.check()
    worlds = _worlds(plan, options)
    names = [arm.name for arm in study.arms]
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        f"  {name}: {_about(study, name, config)['settings']}" for name, config in worlds.items()
    ]
    lines.insert(0, f"{', '.join(names)}; seeds {seeds}; before and after training, in")
    if study.trained is None:
        stages = Stages(study.output, redo=options.redo)
        lines += describe_steps(chain(start_steps(plan, stages), map_steps(plan, stages)), stages)
        lines += describe_trainings(plan, stages, options)
        n = len(study.arms) * len(study.seeds) * len(worlds) * 2
        return [*lines, f"{n} evaluations after them"]
    check_trained(plan)
    return [*lines, *describe_tasks(study, _tasks(_entries(plan, trained_policy), worlds), options)]


def check_trained(plan: Plan) -> None:
    """Hold the trainings that the study file names against its arms, seeds and starts.

    Raises:
        LaunchError: a run folder is missing, unfinished, of another arm, seed or start.
    """
    for arm in plan.study.arms:
        for seed in plan.study.seeds:
            run = _run_folder(plan, arm, seed)
            if not (run / "done.json").is_file():
                raise LaunchError(
                    f"{run} holds no finished training of arm {arm.name} with seed {seed}; train "
                    f"it first (for the shipped file: `obm study ceiling`), or change "
                    f"{plan.study.name}:trained"
                )
            config = _run_config(run)
            recorded = (config["tracking"]["arm"], config["seed"])
            if recorded != (arm.name, seed):
                raise LaunchError(
                    f"{run} is of arm {recorded[0]} with seed {recorded[1]}, not of {arm.name} "
                    f"with seed {seed}; change {plan.study.name}:trained"
                )
            _check_start(plan, arm, run)


def _check_start(plan: Plan, arm: Arm, run: Path) -> None:
    """The start that is evaluated before training is the one that was trained."""
    if arm.merge is None:
        trained = _run_config(run)["models"]["init"]
        if trained != arm.init and not _is_same(trained, plan.start(arm)):
            raise LaunchError(
                f"{run} was trained from {trained}, not from {arm.init}; change the arm's init in "
                f"{plan.study.name}, or {plan.study.name}:trained"
            )
        return
    start = Path(_start(plan, arm))
    if not (start / "merge.json").is_file():
        raise LaunchError(
            f"{start} holds no merge, the start of {run}; name the folder in "
            f"{plan.study.name}:starts"
        )
    here, there = (_checksums(folder / "merge.json") for folder in (start, run))
    differing = [name for name in here if here[name] != there.get(name)]
    if differing or here.keys() != there.keys():
        first = differing[0] if differing else "their tensors"
        raise LaunchError(
            f"{run} was not trained from {start} ({first} differ); name its start in "
            f"{plan.study.name}:starts"
        )


def _is_same(trained: str, start: Path | str) -> bool:
    """Whether two names are of one checkpoint; what is not there any more is another one."""
    from configs.schema import resolve_model

    try:
        return Path(resolve_model(trained)).resolve() == Path(start).resolve()
    except ConfigError:
        return False


def _checksums(path: Path) -> dict[str, str]:
    tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
    return {name: entry["checksum"] for name, entry in tensors.items()}


def _run_config(run: Path) -> dict[str, Any]:
    from configs.reader import read_yaml

    return read_yaml(run / "config.yaml")


def _run_folder(plan: Plan, arm: Arm, seed: int) -> Path:
    if plan.study.trained is None:
        return plan.run_folder(arm, seed)
    return Path(plan.study.trained.format(arm=arm.name, seed=seed))


def _start(plan: Plan, arm: Arm) -> str:
    if plan.study.starts is None or arm.merge is None:
        return str(plan.start(arm))
    return plan.study.starts.format(arm=arm.name)


def _entries(plan: Plan, policy_of: Callable[[Path], Path]) -> list[Entry]:
    """Whole seeds first; `policy_of` gives the policy of a run folder."""
    entries = []
    for seed in plan.study.seeds:
        for arm in plan.study.arms:
            policy = str(policy_of(_run_folder(plan, arm, seed)))
            for world in plan.study.benchmarks:
                entries.append(Entry(arm.name, world, "before", seed, _start(plan, arm)))
                entries.append(Entry(arm.name, world, "after", seed, policy))
    return entries


def _tasks(entries: list[Entry], worlds: dict[str, Config]) -> list[Task]:
    tasks = []
    for entry in entries:
        config = worlds[entry.world]
        environment = replace(config.environment, data_seed=entry.seed)
        config = replace(config, environment=environment)
        tasks.append(make_task(entry.name, config, checkpoint=entry.checkpoint))
    return tasks


def _worlds(plan: Plan, options: Options) -> dict[str, Config]:
    return {
        title: benchmark_config(plan, title, options.overrides) for title in plan.study.benchmarks
    }


def _about(study: Study, name: str, config: Config) -> dict[str, Any]:
    """What is different in a world, and all that was asked."""
    changed = ", ".join(flatten(study.benchmarks[name])) or "as it was trained"
    environment = asdict(config.environment)
    del environment["data_seed"]
    return {"settings": changed.replace("environment.", "").replace("=", " ").replace('"', ""),
            "environment": environment}  # fmt: skip


def _training(plan: Plan) -> str:
    """The trainings in a few words, as the first run's own settings say it."""
    run = _run_folder(plan, plan.study.arms[0], plan.study.seeds[0])
    config = _run_config(run)
    made = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    n_steps = json.loads((run / "done.json").read_text(encoding="utf-8"))["step"]
    environment = config["environment"]
    questions = f"kind {', '.join(environment['kinds'])}"
    benchmark = environment.get("train_benchmark")
    if benchmark and benchmark["name"] != "atlas":
        questions = benchmark["name"]
    return (
        f"{n_steps} steps of GRPO on questions of {questions}, commit "
        f"{made.get('commit', 'unknown')}"
    )
