"""The same training under every stage of ZeRO, with two processes, beside one process alone.

A merged start (task arithmetic, which needs no statistics) trains eight steps on the atlas by
`deepspeed launch/train.sh`; every arm draws the same random numbers, so that what differs is the
arithmetic of the processes. How far two seeds of one process lie apart says what noise is.

    make study-zero        (twenty minutes on two cores; writes docs/results/zero.json and zero.md)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.jobs import Job, run_jobs

COMPLETIONS = 64
SETTINGS = (
    "grpo.max_steps=8", "grpo.num_generations=8", "grpo.save_steps=8",
    "environment.eval_size=64", "compare.eval_every=8", "tracking.wandb=disabled",
)  # fmt: skip
MERGE = ("merge.method=task_arithmetic", "merge.weights={vlm: 0.5, agent: 0.7}")
SHOWN = ("reward", "loss", "grad_norm")
MARK = ".zero-study"
"""File by which a folder of --work is known for one that may be emptied."""


@dataclass(frozen=True)
class Arm:
    """One training of the study."""

    name: str
    n_processes: int
    deepspeed: str
    settings: tuple[str, ...] = ()
    twin: str | None = None
    """the arm whose numbers it should have"""


LORA = ("lora.r=16", "lora.alpha=32", "grpo.learning_rate=1.0e-3")
ARMS = (
    Arm("one process", 1, "none"),
    Arm("one process, another seed", 1, "none", ("seed=1",), "one process"),
    Arm("ZeRO-1", 2, "zero1", (), "one process"),
    Arm("ZeRO-2", 2, "zero2", (), "one process"),
    Arm("ZeRO-3", 2, "zero3", (), "one process"),
    Arm("ZeRO-3, offload", 2, "zero3_offload", (), "one process"),
    Arm("LoRA, one process", 1, "none", LORA),
    Arm("LoRA, ZeRO-2", 2, "zero2", LORA, "LoRA, one process"),
    Arm("LoRA, ZeRO-3", 2, "zero3", LORA, "LoRA, one process"),
)


def make_job(arm: Arm, start: Path, folder: Path) -> Job:
    """The training of an arm; every arm has the same completions a step."""
    name = arm.name.lower().replace(", ", "-").replace(" ", "-")
    arguments = [
        "--config", "configs/demo.yaml", "--overwrite", f"models.init={start}",
        f"output={folder / name}", f"deepspeed={arm.deepspeed}",
        f"grpo.per_device_train_batch_size={COMPLETIONS // arm.n_processes}",
        *SETTINGS, *arm.settings,
    ]  # fmt: skip
    return Job(arm.name, arguments, folder / name, folder / f"{name}.log", arm.n_processes)


def read_curve(folder: Path) -> dict[str, Any]:
    """Reward, loss, gradient norm and seconds of every step, and the evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "train"]
    evals = [line["eval/accuracy"] for line in lines if line["phase"] == "eval"]
    return {
        **{name: [line[name] for line in steps] for name in SHOWN},
        "tokens": [line["tokens"] for line in steps],
        "step_s": [line["step_time"] for line in steps],
        "accuracy": [evals[0], evals[-1]],
    }


def compare(curves: dict[str, dict[str, Any]], arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
    """Largest difference of each number to the arm's twin over the steps."""
    return {
        arm.name: {
            name: max(
                abs(one - two)
                for one, two in zip(curves[arm.name][name], curves[arm.twin][name], strict=True)
            )
            for name in (*SHOWN, "tokens")
        }
        for arm in arms
        if arm.twin
    }


def render(record: dict[str, Any]) -> str:
    """docs/results/zero.md."""
    curves, differences = record["curves"], record["differences"]
    lines = [
        "# One training under every stage of ZeRO",
        "",
        f"Eight steps of {COMPLETIONS} episodes on the atlas from a merged start, by "
        "`deepspeed launch/train.sh`; `make study-zero` runs it again.",
        f"Hardware: {record['hardware']}. Commit {record['commit']}.",
        "",
        "Reward at the first and the last step, accuracy of the evaluation before and after, and "
        "the largest difference of any step to one process (for LoRA: to LoRA with one process). "
        "Another seed says what noise is.",
        "",
        "| arm | processes | reward | accuracy | Δ reward | Δ loss | Δ gradient norm | Δ tokens "
        "| s per step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in record["arms"]:
        curve, difference = curves[arm["name"]], differences.get(arm["name"])
        shown = ["-"] * 4
        if difference:
            shown = [f"{difference[name]:.2g}" for name in SHOWN]
            shown.append(f"{difference['tokens']:.0f}")
        seconds = sum(curve["step_s"]) / len(curve["step_s"])
        lines.append(
            f"| {arm['name']} | {arm['n_processes']} "
            f"| {curve['reward'][0]:.3f} → {curve['reward'][-1]:.3f} "
            f"| {curve['accuracy'][0]:.3f} → {curve['accuracy'][1]:.3f} "
            f"| {' | '.join(shown)} | {seconds:.2f} |"
        )
    lines += ["", "Reward of every step:", "", "| arm | " + " | ".join(
        str(step + 1) for step in range(len(next(iter(curves.values()))["reward"]))
    ) + " |"]  # fmt: skip
    lines.append("| --- " * (lines[-1].count("|") - 1) + "|")
    lines += [
        f"| {name} | {' | '.join(f'{reward:.3f}' for reward in curve['reward'])} |"
        for name, curve in curves.items()
    ]
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Merges the start, trains every arm, writes the report."""
    from compare.provenance import origin
    from configs.schema import load_config, shipped_config
    from launch.commands.merge import merge_checkpoints
    from train.files import write_json, write_text

    parser = argparse.ArgumentParser(prog="launch.zero_study", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("runs/zero"), metavar="DIR")
    options = parser.parse_args(argv)
    mark = options.work / MARK
    if options.work.exists() and not mark.is_file():
        parser.error(f"--work {options.work}: is not an earlier study's; name a folder that is new")
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    mark.touch()
    start = options.work / "start"
    merge_checkpoints(load_config(shipped_config("demo"), MERGE), start)
    jobs = [make_job(arm, start, options.work) for arm in ARMS]
    run_jobs(jobs, on_done=lambda job, seconds: print(f"{job.name}: {seconds:.0f} s", flush=True))
    curves = {job.name: read_curve(job.output) for job in jobs}
    record = {
        **origin("make study-zero"),
        "settings": [*SETTINGS, *MERGE],
        "arms": [vars(arm) for arm in ARMS],
        "differences": compare(curves, ARMS),
        "curves": curves,
    }
    write_json(options.output / "zero.json", record)
    write_text(options.output / "zero.md", render(record))
    print(render(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
