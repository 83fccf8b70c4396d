"""Does RL from OBM lose less perception at equal search reward when conflicting heads stay?

OBM's merge of the trio is diagnosed once and trained by GRPO: with all heads, with the most
conflicting 10 % and 25 % of heads frozen (CAST), with random heads of the same budget, with the
least conflicting 25 %, and with all heads frozen. Then every policy and the start are asked the
same test questions, with tools (search) and without (perception: which place is this?).

    make study-cast        (21 trainings; writes docs/results/conflict.* and cast.{json,csv,md})

What is finished is kept: a study that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.jobs import Job, run_jobs

ARMS: dict[str, str] = {
    "none": "none",
    "cast 10 %": "cast(top=10%)",
    "random 10 %": "random(top=10%, seed={seed})",
    "cast 25 %": "cast(top=25%)",
    "random 25 %": "random(top=25%, seed={seed})",
    "anti 25 %": "anti(top=25%)",
    "all heads": "cast(top=100%)",
}
"""Arm -> freeze_heads; the random control draws other heads with every seed."""
DIAGNOSIS = ("conflict.search_questions=512", "conflict.keep_questions=512")
EVALUATION = ("environment.eval_split=test", "environment.eval_size=256")
LAST_STEPS = 5
"""Steps whose mean reward is the search reward at the end of training."""
COLUMNS = {
    "recognition": "perception",
    "accuracy": "answers right",
    "searched": "searched",
    "reward": "reward",
}


def make_job(arm: str, seed: int, start: Path, work: Path, steps: int) -> Job:
    """One training; its policy is measured afterwards, so its own evaluations are small."""
    name = f"{arm.replace(' ', '').replace('%', '')}-s{seed}"
    arguments = [
        "--config", "configs/demo.yaml", "--overwrite", f"models.init={start}",
        f"output={work / name}", f"seed={seed}", f"grpo.max_steps={steps}",
        f"grpo.save_steps={steps}", f"compare.eval_every={steps}", "tracking.wandb=disabled",
        f"tracking.arm={name}", "environment.eval_size=32", "deepspeed=none",
        f"freeze_heads={ARMS[arm].format(seed=seed)}",
    ]  # fmt: skip
    return Job(name, arguments, work / name, work / f"{name}.log")


def make_start(work: Path) -> Path:
    """OBM's merge by the demo's settings, with its conflict map in it."""
    from configs.schema import load_config, resolve_model, shipped_config
    from launch.commands.diagnose_heads import diagnose_start, write_map
    from launch.commands.merge import merge_checkpoints
    from launch.tasks import make_statistics
    from train.heads import head_layout
    from train.policy import load_config as load_model_config

    start = work / "obm"
    config = load_config(
        shipped_config("demo"),
        [f"calibration.output={work / 'calibration'}", f"models.init={start}", *DIAGNOSIS],
    )
    if not (start / "merge.json").is_file():
        make_statistics(config, ["diagonal"])
        merge_checkpoints(config, start)
    if not (start / "conflict" / "conflict.json").is_file():
        folder = resolve_model(str(start))
        record = diagnose_start(config, folder, head_layout(load_model_config(folder)))
        write_map({**record, "start": "obm", "command": "make study-cast"}, start / "conflict")
    return start


Policy = tuple[str, int]
"""An arm, or "start", and a seed."""


def measure(
    work: Path, start: Path, runs: Mapping[Policy, Path], seeds: Sequence[int]
) -> dict[Policy, dict[str, float]]:
    """Metrics of the start and of every trained policy, on the questions of each seed.

    Returns:
        {(arm or "start", seed): metrics of `train.evaluation`, recognition, and for a training the
        mean reward of its last steps}.
    """
    from compare.zero_shot import Results, measure_all
    from configs.schema import load_config, shipped_config
    from launch.commands.merge import merge_checkpoints
    from launch.tasks import make_task

    policies = {("start", seed): start for seed in seeds}
    for key, run in runs.items():
        done = json.loads((run / "done.json").read_text(encoding="utf-8"))
        policies[key] = run / done["policy"]
    tasks = []
    for (arm, seed), policy in policies.items():
        overrides = [f"seed={seed}", f"environment.data_seed={seed}", *EVALUATION]
        config = load_config(shipped_config("demo"), overrides)
        tasks.append(make_task(f"{arm}-s{seed}", config, checkpoint=str(policy), recognition=True))
    measured = measure_all(tasks, Results(work / "measured.jsonl"), merge_checkpoints)
    found = {key: dict(result["metrics"]) for key, result in zip(policies, measured, strict=True)}
    for key, run in runs.items():
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rewards = [row["reward"] for row in map(json.loads, lines) if row["phase"] == "train"]
        found[key]["reward"] = sum(rewards[-LAST_STEPS:]) / LAST_STEPS
    return found


def summarise(found: Mapping[Policy, Mapping[str, float]], seeds: Sequence[int]) -> dict[str, Any]:
    """Means over seeds of each arm, and its differences to training with all heads.

    Args:
        found: of `measure`; the arm `none` is what others are held against.
        seeds: of every arm.

    Returns:
        {"arms": {arm: {column: estimate}}, "differences": {arm: {column: estimate}}}, an estimate
        being mean, low, high (95 %, Student's t) and per_seed; pairs share seed and questions.
    """
    from compare.curves import interval

    def estimate(values: list[float], bounds: tuple[float, float] | None) -> dict[str, Any]:
        found = interval(values, bounds=bounds)
        return {"mean": found.mean, "low": found.low, "high": found.high, "per_seed": values}

    arms = list(dict.fromkeys(arm for arm, _ in found))
    values = {
        arm: {c: [found[arm, s][c] for s in seeds] for c in COLUMNS if c in found[arm, seeds[0]]}
        for arm in arms
    }
    return {
        "arms": {
            arm: {c: estimate(v, (0.0, 1.0) if c != "reward" else None) for c, v in columns.items()}
            for arm, columns in values.items()
        },
        "differences": {
            arm: {
                column: estimate(
                    [a - b for a, b in zip(v, values["none"][column], strict=True)], None
                )
                for column, v in columns.items()
            }
            for arm, columns in values.items()
            if arm not in ("none", "start")
        },
    }


def render(record: Mapping[str, Any]) -> str:
    """docs/results/cast.md."""

    def cell(estimate: Mapping[str, Any] | None, form: str) -> str:
        if estimate is None:
            return "-"
        mean = format(estimate["mean"], form)
        if estimate["low"] is None:
            return mean
        return f"{mean} [{estimate['low']:{form}}, {estimate['high']:{form}}]"

    def table(part: str, form: str, first: str) -> list[str]:
        heads = [first, "heads", *COLUMNS.values()]
        lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * 2}{' ---: |' * len(COLUMNS)}"]
        for arm, estimates in record[part].items():
            cells = [cell(estimates.get(column), form) for column in COLUMNS]
            lines.append(f"| {arm} | {record['frozen'].get(arm, '-')} | {' | '.join(cells)} |")
        return lines

    return "\n".join([
        "# Frozen heads: does RL from OBM lose less perception?",
        "",
        f"OBM's merge, {record['steps']} steps of GRPO, {len(record['seeds'])} seeds; mean [95 % "
        "interval]. `perception` names a seen place when asked which place it is, without tools; "
        "`answers right` and `searched` are of two-hop questions with tools (both greedy, "
        f"{record['questions']} test questions a seed); `reward` is the mean of the last "
        f"{LAST_STEPS} training steps. `heads` is what was frozen of {record['n_heads']}.",
        "",
        *table("arms", ".3f", "arm"),
        "",
        "Differences to training with all heads (`none`), within a seed:",
        "",
        *table("differences", "+.3f", "minus none"),
        "",
        "Conflict map: [conflict.md](conflict.md). What this says: docs/cast.md.",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"Commit {record['commit']}. Hardware: {record['hardware']}. Seeds "
        f"{', '.join(map(str, record['seeds']))}. Every number: [cast.csv](cast.csv).",
        "",
    ])  # fmt: skip


def _frozen_words(runs: Mapping[Policy, Path]) -> tuple[dict[str, str], int]:
    """Arm -> the heads (layer.head) that its trainings froze, and the heads of the model."""
    words: dict[str, set[str]] = {}
    n_heads = 0
    for (arm, _), run in runs.items():
        path = run / "frozen_heads.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            n_heads = record["n_heads"]
            heads = record["heads"]
            some = ", ".join(f"{layer}.{head}" for layer, head in heads)
            words.setdefault(arm, set()).add("all" if len(heads) == n_heads else some)
    return {arm: "; ".join(sorted(found)) for arm, found in words.items()}, n_heads


def _csv(found: Mapping[Policy, Mapping[str, float]]) -> str:
    names = sorted({name for metrics in found.values() for name in metrics})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["arm", "seed", *names], restval="", lineterminator="\n")
    writer.writeheader()
    for (arm, seed), metrics in found.items():
        writer.writerow({"arm": arm, "seed": seed, **metrics})
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the start, trains what is missing, measures, writes the report."""
    from compare.provenance import code_commit, hardware
    from launch.commands.diagnose_heads import write_map
    from train.run import write_json, write_text

    parser = argparse.ArgumentParser(prog="launch.cast_study", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("runs/cast"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    options = parser.parse_args(argv)
    start = make_start(options.work)
    jobs = {
        (arm, seed): make_job(arm, seed, start, options.work, options.steps)
        for seed in options.seeds
        for arm in options.arms
    }
    run_jobs(
        [job for job in jobs.values() if not (job.output / "done.json").is_file()],
        parallel=options.parallel,
        on_done=lambda job, seconds: print(f"{job.name}: {seconds:.0f} s", flush=True),
    )
    runs = {key: job.output for key, job in jobs.items()}
    found = measure(options.work, start, runs, options.seeds)
    frozen, n_heads = _frozen_words(runs)
    record = {
        "command": "make study-cast",
        "commit": code_commit(),
        "hardware": hardware(),
        "steps": options.steps,
        "seeds": options.seeds,
        "questions": int(EVALUATION[-1].partition("=")[2]),
        "freeze_heads": ARMS,
        "frozen": frozen,
        "n_heads": n_heads,
        **summarise(found, options.seeds),
    }
    conflict = json.loads((start / "conflict" / "conflict.json").read_text(encoding="utf-8"))
    write_map(conflict, options.output)
    write_text(options.output / "cast.csv", _csv(found))
    write_text(options.output / "cast.md", render(record))
    write_json(options.output / "cast.json", record)
    print(render(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
