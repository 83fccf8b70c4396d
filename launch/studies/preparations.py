"""What comes between an arm's start and its trainings: conflict maps, SPORT, the cold start.

A conflict map (`obm diagnose heads`) is made once an arm that freezes heads by it. SPORT and the
cold start (`prepare:` of an arm) are made anew with every seed, as child processes, since their
result depends on it; what they cost counts in the comparison (`cost.json`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import JobFailedError
from launch.jobs import Job, run_jobs
from launch.stages import Stages
from launch.studies.file import Options
from launch.studies.machine import duration_words, gpu_groups, this_machine, time_left
from launch.studies.plan import Plan, frozen_inputs, map_stage, preparation_stage, start_key
from launch.studies.starts import Step, reused, say
from launch.studies.trainings import share_of
from launch.tasks import checkpoint_inputs, live_inputs, named_files, picture_inputs

if TYPE_CHECKING:
    from configs.schema import Config


def map_steps(plan: Plan, stages: Stages) -> Iterator[Step]:
    """Conflict maps of the starts whose heads are frozen by one; the starts must be there."""
    from configs.sections import Algorithm
    from train.run_folder import own_files

    for arm in plan.study.arms:
        if plan.map_owner(arm) != arm.name:
            continue
        config, target = plan.config(arm), plan.map_folder(arm.name)
        settings, keys = asdict(config), ("seed", "environment", "rewards", "grpo", "conflict")
        inputs = {
            "start": start_key(plan, stages, arm),
            **{key: settings[key] for key in keys},
            **named_files(config, "train", "dialect", "keep"),
            **live_inputs(config),
            **picture_inputs(config),
        }
        if not arm.merge:  # what made a merge counts among its inputs
            inputs |= checkpoint_inputs(_teachers(config))
        # defaults are left out, as those of a training are
        if config.reward_functions:
            inputs["reward_functions"] = settings["reward_functions"]
            inputs["own_files"] = own_files(config)
        if config.algorithm != Algorithm():
            inputs["algorithm"] = settings["algorithm"]
        words = f"diagnose   {arm.name}: conflict map of its heads"
        make = partial(_make_map, config, str(plan.start(arm)), target)
        yield Step(map_stage(arm.name), inputs, target, make, partial(str, words))


def _teachers(config: Config) -> dict[str, str | None]:
    """Models that a conflict map is made with, beside the start."""
    section, models = config.conflict, config.models
    teachers = {"models.vlm": models.vlm} if section.keep_words == "vlm" else {}
    return teachers | ({"models.agent": models.agent} if section.search == "agent" else {})


def _make_map(config: Config, start: str, target: Path) -> None:
    from launch.commands.diagnose_heads import make_map

    make_map(config, start, target)


def publish_maps(plan: Plan, command: str) -> None:
    """Put the study's conflict maps beside its report, where that is not the study's own folder."""
    from launch.commands.diagnose_heads import write_map

    if plan.study.report is None:
        return
    owners = dict.fromkeys(owner for arm in plan.study.arms if (owner := plan.map_owner(arm)))
    for owner in owners:
        text = (plan.map_folder(owner) / "conflict.json").read_text(encoding="utf-8")
        # the start by its name: its folder is this machine's
        record = {**json.loads(text), "start": owner, "command": command}
        write_map(record, plan.study.report, f"{plan.study.report_name}-{owner}-heads")


def preparation_steps(plan: Plan, stages: Stages) -> Iterator[Step]:
    """SPORT and cold starts of every seed, whole seeds first; made by `prepare_arms`."""
    from configs.sections import Lora

    for seed in plan.study.seeds:
        for arm in plan.study.arms:
            if not arm.prepare:
                continue
            config = plan.preparation(arm, seed)
            settings = asdict(config)
            keys = ("seed", "environment", "rewards", "grpo", "freeze_heads", arm.prepare)
            inputs: dict[str, Any] = {
                "start": start_key(plan, stages, arm),
                **{key: settings[key] for key in keys},
                **named_files(config, "train", "dialect"),
                **live_inputs(config),
                **picture_inputs(config),
            }
            inputs["freeze_heads"] = frozen_inputs(plan, stages, arm, config)
            # defaults are left out, as those of a training are
            if settings["lora"] != asdict(Lora()):
                inputs["lora"] = settings["lora"]
            if arm.prepare == "sft" and config.sft.teacher != "solver":
                inputs |= checkpoint_inputs({"sft.teacher": config.sft.teacher})
            if config.models.freeze_vision:
                inputs["models"] = {"freeze_vision": True}
            target = plan.prepared_folder(arm, seed)
            words = f"{arm.prepare:<10} {arm.name}-s{seed}"
            yield Step(
                preparation_stage(arm, seed), inputs, target,
                partial(_job, plan, arm.prepare, config), partial(str, words),
            )  # fmt: skip


def prepare_arms(plan: Plan, stages: Stages, options: Options) -> None:
    """Run the preparations that are missing, several at a time.

    Raises:
        JobFailedError: some failed; the others are done.
    """
    steps = {}
    for step in preparation_steps(plan, stages):
        if stages.is_done(step.name, step.inputs, step.target):
            say(f"{step.describe()}{reused(False)}")
        else:
            steps[step.name] = step
    if not steps:
        return
    jobs = [job for step in steps.values() if isinstance(job := step.make(), Job)]
    for name, step in steps.items():
        stages.start(name, step.inputs)
    share = share_of(plan, this_machine(), options)
    say(f"prepare    {len(steps)} starts, {share.parallel} at a time: {share.words}")
    failed: dict[str, str] = {}
    took: list[float] = []

    def on_done(job: Job, seconds: float) -> None:
        stages.finish(job.name, steps[job.name].inputs, seconds)
        took.append(seconds)
        n_left = len(steps) - len(took) - len(failed)
        left = duration_words(time_left(took, n_left, share.parallel))
        then = f"; {n_left} left, about {left}" if n_left else ""
        say(f"{steps[job.name].describe()} done in {duration_words(seconds)}{then}")

    def on_failed(job: Job, error: Exception) -> None:
        failed[job.name] = str(error)
        say(f"prepare    {job.name} FAILED: {error}")

    run_jobs(
        jobs, parallel=share.parallel, on_done=on_done, on_failed=on_failed,
        devices=gpu_groups(this_machine().n_gpus, 1),
    )  # fmt: skip
    if failed:
        each = "; ".join(f"{name}: {words}" for name, words in failed.items())
        raise JobFailedError(
            f"{len(failed)} of {len(steps)} preparations failed, the others are done. {each}. Run "
            "the same command again to go on"
        )


def _job(plan: Plan, verb: str, config: Config) -> Job:
    """The child process of a preparation, its settings written for it."""
    from configs.schema import dump_config
    from train.files import write_text

    name = f"{verb}-{Path(config.output).name}"
    file = plan.study.output / "configs" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, dump_config(config))
    output = Path(config.output)
    going_on = ["--resume"] if verb == "sport" and (output / "iterations").is_dir() else []
    if output.exists() and not going_on:
        going_on = ["--overwrite"]
    log = plan.study.output / "logs" / f"{name}.log"
    return Job(name, ["--config", str(file), *going_on], output, log, verb=verb)
