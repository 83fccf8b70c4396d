"""Trainings of a study: arms x seeds, those that are missing, as child processes.

Seeds outside, arms inside: a study that is stopped early has whole seeds to compare. One that fails
does not stop the others; the study says at the end which failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import JobFailedError, LaunchError
from launch.jobs import Job, run_jobs
from launch.stages import Stages
from launch.studies.file import Arm, Options
from launch.studies.machine import (
    Machine,
    Share,
    duration_words,
    gpu_groups,
    share_trainings,
    this_machine,
    time_left,
    training_bytes,
)
from launch.studies.plan import Plan, frozen_inputs, max_steps, start_key
from launch.studies.starts import reused, say
from launch.tasks import checkpoint_inputs, live_inputs, named_files, picture_inputs

if TYPE_CHECKING:
    from configs.schema import Config


@dataclass(frozen=True)
class Training:
    """One arm and seed."""

    name: str
    arm: Arm
    seed: int
    config: Config
    inputs: dict[str, Any]
    """what decides its result"""
    output: Path

    @property
    def stage(self) -> str:
        """Name of its stage."""
        return f"train-{self.name}"


def list_trainings(plan: Plan, stages: Stages) -> Iterator[Training]:
    """All of them, whole seeds first; the starts must have been looked at."""
    from configs.sections import Algorithm, Lora, Rollout
    from train.run_folder import own_files

    for seed, arm in product(plan.study.seeds, plan.study.arms):
        if not arm.train:
            continue
        config = plan.config(arm, seed)
        settings = asdict(config)
        inputs = {
            "start": start_key(plan, stages, arm, seed),
            **{key: settings[key] for key in ("seed", "environment", "rewards", "grpo")},
            "eval_every": config.compare.eval_every,
            "deepspeed": config.deepspeed,
            **named_files(config, "train", "eval", "anchor_stats", "deepspeed"),
            **live_inputs(config),
            **picture_inputs(config),
        }
        if config.reward_functions:
            inputs["reward_functions"] = settings["reward_functions"]
        if config.freeze_heads.source != "none":
            inputs["freeze_heads"] = frozen_inputs(plan, stages, arm, config)
        # defaults are left out, so that what was trained before a section came stays valid
        for name, default in (("algorithm", Algorithm), ("lora", Lora), ("rollout", Rollout)):
            if settings[name] != asdict(default()):
                inputs[name] = settings[name]
        if config.models.reference != "init" or config.models.freeze_vision:
            inputs["models"] = {
                "reference": config.models.reference, "freeze_vision": config.models.freeze_vision
            }  # fmt: skip
        if config.models.reference != "init":
            inputs |= checkpoint_inputs({"models.reference": config.models.reference})
        if own := own_files(config):
            inputs["own_files"] = own
        output = plan.run_folder(arm, seed)
        yield Training(f"{arm.name}-s{seed}", arm, seed, config, inputs, output)


def train_arms(plan: Plan, stages: Stages, options: Options) -> dict[str, str]:
    """Run the trainings that are missing.

    Returns:
        Name of each training that failed -> why.

    Raises:
        LaunchError: a training is there that was made with other settings, or with another number
            of processes.
    """
    missing = _missing(plan, stages, options)
    if not missing:
        return {}
    share = share_of(plan, this_machine(), options)
    say(f"train      {len(missing)} trainings, {share.parallel} at a time: {share.words}")
    show = _Progress(missing, share.parallel, max_steps(plan.config(plan.study.arms[0])))
    trainings = {training.name: training for training in missing}
    failed: dict[str, str] = {}

    def on_done(job: Job, seconds: float) -> None:
        training = trainings[job.name]
        stages.finish(training.stage, training.inputs, seconds)
        show.done(job, seconds)

    def on_failed(job: Job, error: Exception) -> None:
        failed[job.name] = str(error)
        say(f"train      {job.name} FAILED: {error}")
        show.n_left -= 1

    with show:
        run_jobs(
            [_job(plan, training, options.n_processes) for training in missing],
            parallel=share.parallel,
            on_line=show.line,
            on_done=on_done,
            on_failed=on_failed,
            devices=gpu_groups(this_machine().n_gpus, options.n_processes),
        )
    return failed


def trained_policy(run: Path) -> Path:
    """The trained policy of a finished run; of an adapter, where `whole_policy` writes it."""
    done = json.loads((run / "done.json").read_text(encoding="utf-8"))
    policy: Path = run / done["policy"]
    return run / "whole" if (policy / "adapter_config.json").is_file() else policy


def whole_policy(run: Path) -> Path:
    """The trained policy of a finished run as a checkpoint that can be evaluated.

    A training with `lora.r` leaves an adapter; its policy is written once, into `whole` of the run.

    Raises:
        MergeError: see `merge.adapter.merge_adapter`.
    """
    from merge.adapter import merge_adapter
    from merge.output import RECORD_NAME

    policy = trained_policy(run)
    if policy.name == "whole" and not (policy / RECORD_NAME).is_file():
        merge_adapter(run, policy)
    return policy


def n_trainings(plan: Plan) -> int:
    """How many trainings a study has."""
    return sum(arm.train for arm in plan.study.arms) * len(plan.study.seeds)


def raise_failures(failed: dict[str, str], plan: Plan, *, is_reported: bool) -> None:
    """End a study with what failed in it and how to go on; nothing where nothing did.

    Raises:
        JobFailedError: names each.
    """
    if not failed:
        return
    n = n_trainings(plan)
    each = "; ".join(f"{name}: {words}" for name, words in failed.items())
    others = report = ""
    if len(failed) < n:
        others = ", the others are done"
        report = "" if is_reported else ", or add --partial for a report of what is complete"
    raise JobFailedError(
        f"{len(failed)} of {n} trainings failed{others}. {each}. Run the same command "
        f"again to go on: what is done is kept, a broken one goes on from its checkpoint{report}"
    )


def share_of(plan: Plan, machine: Machine, options: Options) -> Share:
    """How many trainings of this study run at a time."""
    trained = next(arm for arm in plan.study.arms if arm.train)
    n_bytes = training_bytes(plan.config(trained), options.n_processes)
    if machine.n_gpus and machine.n_gpus < options.n_processes:
        raise LaunchError(
            f"--processes {options.n_processes}: there are {machine.n_gpus} GPUs, one a process; "
            "ask for fewer"
        )
    return share_trainings(
        machine, n_bytes, n_processes=options.n_processes, wanted=options.parallel
    )


class _Progress:
    """A bar over all steps, a line for every evaluation and every training that is done."""

    def __init__(self, trainings: list[Training], parallel: int, n_steps: int) -> None:
        self.n_left = len(trainings)
        self._parallel, self._n_steps = parallel, n_steps
        self._reached: dict[str, int] = {}
        self._seconds: list[float] = []
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        from tqdm import tqdm

        total = self.n_left * self._n_steps
        self._bar = tqdm(total=total, desc="train", unit="step", disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def line(self, job: Job, line: dict[str, Any]) -> None:
        before, step = self._reached.get(job.name, 0), int(line.get("step", 0))
        self._reached[job.name] = max(step, before)
        self._bar.update(max(0, step - before))
        if line.get("phase") == "eval":
            say(f"train      {job.name} step {step}: {_floor_words(line)}")

    def done(self, job: Job, seconds: float) -> None:
        self.n_left -= 1
        self._seconds.append(seconds)
        left = time_left(self._seconds, self.n_left, self._parallel)
        then = f"; {self.n_left} left, about {duration_words(left)}" if self.n_left else ""
        say(f"train      {job.name} done in {duration_words(seconds)}{then}")


def _missing(plan: Plan, stages: Stages, options: Options) -> list[Training]:
    """Trainings that are not done; each is marked as begun."""
    from train.resume import whole_checkpoints

    missing = []
    for training in list_trainings(plan, stages):
        if stages.is_done(training.stage, training.inputs, training.output):
            _check_processes(training, options.n_processes)
            say(f"train      {training.name}{reused(False)}")
            continue
        missing.append(training)
    for training in missing:
        if not whole_checkpoints(training.output):
            stages.clear(training.stage, training.output)
        stages.start(training.stage, training.inputs)
    return missing


def _check_processes(training: Training, n_processes: int) -> None:
    """Refuse to mix numbers of processes in one comparison before anything runs."""
    path = training.output / "environment.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    n_before = recorded.get("world_size", n_processes)
    if n_before != n_processes:
        raise LaunchError(
            f"{training.output} was trained with {n_before} processes; go on with "
            f"--processes {n_before}, or choose another --output"
        )


def _job(plan: Plan, training: Training, n_processes: int) -> Job:
    """The child process of a training, its settings written for it."""
    from configs.schema import dump_config
    from train.files import write_text
    from train.resume import whole_checkpoints

    output = plan.study.output
    file = output / "configs" / f"{training.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, dump_config(split_batch(training.config, n_processes)))
    resume = ["--resume"] if whole_checkpoints(training.output) else []
    log = output / "logs" / f"{training.name}.log"
    return Job(training.name, ["--config", str(file), *resume], training.output, log, n_processes)


def split_batch(config: Config, n_processes: int) -> Config:
    """The same completions a step, shared by several processes.

    Raises:
        LaunchError: they do not divide.
    """
    from train.settings import resolved_grpo

    if n_processes == 1:
        return config
    rows = int(resolved_grpo(config)["per_device_train_batch_size"])
    if rows % n_processes:
        raise LaunchError(
            f"--processes {n_processes}: grpo.per_device_train_batch_size is {rows}, the "
            "completions that they share; choose a divisor of it"
        )
    grpo = {**config.grpo, "per_device_train_batch_size": rows // n_processes}
    return replace(config, grpo=grpo)


def describe_trainings(plan: Plan, stages: Stages, options: Options) -> list[str]:
    """What a dry run says: what will be reused, what is left, how long that may take.

    Raises:
        ConfigError: settings of an arm that the study itself would refuse.
    """
    plan.check()
    trainings = list(list_trainings(plan, stages))
    if not trainings:
        return []
    found = {
        training.name: stages.look(training.stage, training.inputs, training.output)
        for training in trainings
    }
    done = [training for training in trainings if found[training.name] == "done"]
    # all that a study meant to train are marked; only those that have started have a folder
    begun = sum(found[one.name] == "begun" and one.output.exists() for one in trainings)
    left = len(trainings) - len(done)
    share = share_of(plan, this_machine(), options)
    n_steps = max_steps(plan.config(trainings[0].arm))
    lines = [
        f"{len(trainings)} trainings of {n_steps} steps, {share.parallel} at a time: {share.words}"
    ]
    going_on = f", {begun} begun" if begun else ""
    lines.append(f"  {len(done)} there already{going_on}, {left} to run")
    for state, words in (
        ("changed", "made otherwise, and refused without --redo"),
        ("foreign", "not made here, and refused"),
    ):
        if names := [name for name, one in found.items() if one == state]:
            lines.append(f"  {words}: {', '.join(names)}")
    took = [seconds for training in done if (seconds := stages.seconds(training.stage))]
    if left and took:
        about = duration_words(time_left(took, left, share.parallel))
        lines.append(f"  about {about} left, by the {len(took)} that are done")
    return lines


def _floor_words(line: dict[str, Any]) -> str:
    parts = ("searched", "entity", "passage", "accuracy")
    return ", ".join(
        f"{part} {line[f'eval/{part}']:.2f}" for part in parts if f"eval/{part}" in line
    )
