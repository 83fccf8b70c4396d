"""Trainings of a study: arms x seeds, those that are missing, as child processes."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import product
from typing import Any

from launch.jobs import Job, run_jobs
from launch.stages import Stages
from launch.studies.plan import Plan, max_steps, start_key
from launch.studies.starts import reused, say


def train_arms(plan: Plan, stages: Stages, parallel: int | None) -> None:
    """Trainings that are missing, of every arm that is to be trained, with every seed."""
    from tqdm import tqdm

    trainings = _missing_trainings(plan, stages)
    if not trainings:
        return
    inputs_of = {job.name: inputs for job, inputs in trainings}
    n_steps = len(trainings) * max_steps(plan.config(plan.study.arms[0]))
    devices = _devices()
    with tqdm(total=n_steps, desc="train", unit="step", disable=None) as bar:
        reached: dict[str, int] = {}

        def on_line(job: Job, line: dict[str, Any]) -> None:
            before, step = reached.get(job.name, 0), int(line.get("step", 0))
            reached[job.name] = max(step, before)
            bar.update(max(0, step - before))
            if line.get("phase") == "eval":
                say(f"train      {job.name} step {step}: {_floor_words(line)}")

        def on_done(job: Job, seconds: float) -> None:
            stages.finish(f"train-{job.name}", inputs_of[job.name], seconds)

        run_jobs(
            [job for job, _ in trainings],
            parallel=parallel or len(devices) or len(os.sched_getaffinity(0)),
            on_line=on_line,
            on_done=on_done,
            devices=devices,
        )


def _missing_trainings(plan: Plan, stages: Stages) -> list[tuple[Job, dict[str, Any]]]:
    """Trainings that are not done, with what decides their result; each is marked as begun."""
    from configs.schema import dump_config
    from train.resume import whole_checkpoints
    from train.run import write_text

    trainings = []
    # Seeds outside, arms inside: a study that is stopped early has whole seeds to compare.
    for seed, arm in product(plan.study.seeds, plan.study.arms):
        if not arm.train:
            continue
        config, name = plan.config(arm, seed), f"{arm.name}-s{seed}"
        settings = asdict(config)
        inputs = {
            "start": start_key(plan, stages, arm),
            **{key: settings[key] for key in ("seed", "environment", "rewards", "grpo")},
            "eval_every": config.compare.eval_every,
            "deepspeed": config.deepspeed,
        }
        output = plan.run_folder(arm, seed)
        if stages.is_done(f"train-{name}", inputs, output):
            say(f"train      {name}{reused(False)}")
            continue
        resume = ["--resume"] if whole_checkpoints(output) else []
        if not resume:
            stages.clear(f"train-{name}", output)
        stages.start(f"train-{name}", inputs)
        file = plan.study.output / "configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, dump_config(config))
        log = plan.study.output / "logs" / f"{name}.log"
        trainings.append((Job(name, ["--config", str(file), *resume], output, log), inputs))
    return trainings


def _floor_words(line: dict[str, Any]) -> str:
    parts = ("searched", "entity", "passage", "accuracy")
    return ", ".join(
        f"{part} {line[f'eval/{part}']:.2f}" for part in parts if f"eval/{part}" in line
    )


def _devices() -> list[int]:
    import torch

    return list(range(torch.cuda.device_count()))
