"""Our rollout and GRPO step beside stock TRL's tool loop, in one run.

    make bench-rollout

One group of scripted episodes a step, the same on both sides to the token (`bench_rollout_work`);
each measurement in a process of its own with one thread (`bench_rollout_step`), both sides of a
comparison one after the other. `bench_rollout_peer` says what stock TRL needs to run at all.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench_report import at_least, at_most
from launch.errors import JobFailedError

Record = dict[str, Any]

SIDES = ("trl", "ours")
POLICIES = ("tiny", "20m", "80m")
RESULTS = ("distinct", "shared")
AXES: dict[str, tuple[int, ...]] = {
    "group": (2, 4, 8, 16, 32),
    "turns": (1, 2, 3, 4, 5, 6),
    "prompt_tokens": (512, 1024, 1536, 2048),
}
"""Along which the cost grows, the rest being as in the headline."""
STEPS = {"tiny": (3, 1)}
"""Counted steps and steps before them; one and none for the larger policies."""
JUDGED = "80m"
TIMES_LESS_ROLLOUT = 4.0
TIMES_LESS_STEP = 2.5


@dataclass(frozen=True)
class Task:
    """What one process measures: workloads of one side."""

    part: str
    """headline, or an axis"""
    side: str
    works: tuple[dict[str, Any], ...]
    """settings of `bench_rollout_work.Workload`"""
    steps: int = 1
    warm_steps: int = 0

    @property
    def name(self) -> str:
        """For the log's file."""
        first = self.works[0]
        return "-".join([self.part, first["policy"], first.get("results", "distinct"), self.side])


def plan(
    policies: Sequence[str], growth: str | None, work: dict[str, Any] | None = None
) -> Iterator[Task]:
    """Yields the tasks, both sides in turn.

    Args:
        policies: of the headline.
        growth: policy of the growth along `AXES`, or None.
        work: settings of every workload over the usual ones (tests).
    """
    common = work or {}
    for policy in policies:
        steps, warm_steps = STEPS.get(policy, (1, 0))
        for results in RESULTS:
            for side in SIDES:
                works = ({**common, "policy": policy, "results": results},)
                yield Task("headline", side, works, steps, warm_steps)
    if growth is None:
        return
    for axis, values in AXES.items():
        for side in SIDES:
            yield Task(axis, side, tuple({**common, "policy": growth, axis: v} for v in values))


def bench_rollout(tasks: Sequence[Task], logs: Path) -> list[Record]:
    """Measures all tasks.

    Args:
        tasks: from `plan`.
        logs: folder for what the processes print.

    Returns:
        A record a workload and side, with its part.

    Raises:
        JobFailedError: A process failed, or the two sides did not do the same.
    """
    logs.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for task in tasks:
        for record in run_task(task, logs / f"{task.name}.log"):
            records.append({"part": task.part, **record})
            figures, done = record["figures"], record["work"]
            print(
                f"{task.part.ljust(13)} {done['policy'].ljust(4)} G={done['group']:<2} "
                f"turns={done['turns']} P={done['prompt_tokens']:<4} {done['results'].ljust(8)} "
                f"{record['side'].ljust(4)} {figures['rollout']:8.2f} s rollout "
                f"{figures['step']:8.2f} s step {figures['step_mb']:7.0f} MB",
                flush=True,
            )
    check_equal_work(records)
    return records


def run_task(task: Task, log: Path) -> list[Record]:
    """The records of one process.

    Raises:
        JobFailedError: Names the log.
    """
    settings = {
        "side": task.side,
        "works": task.works,
        "steps": task.steps,
        "warm_steps": task.warm_steps,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        path = Path(folder) / "records.json"
        arguments = [json.dumps(settings), str(path)]
        code = subprocess.run(
            [sys.executable, "-m", "launch.bench_rollout_step", *arguments],
            env=environment, stdout=output, stderr=output, check=False,
        ).returncode  # fmt: skip
        if code:
            raise JobFailedError(f"{task.name} failed; {log} says why")
        records: list[Record] = json.loads(path.read_text(encoding="utf-8"))
    return records


def pairs(records: Sequence[Record], part: str | None = None) -> list[tuple[Record, Record]]:
    """(TRL's, ours) of every workload, in the order in which they were measured."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        if part in (None, record["part"]):
            key = json.dumps([record["part"], record["work"]])
            found.setdefault(key, {})[record["side"]] = record
    return [(sides["trl"], sides["ours"]) for sides in found.values()]


def check_equal_work(records: Sequence[Record]) -> None:
    """The contract of the comparison.

    Raises:
        JobFailedError: In a workload the sides differ in rows, tokens or pictures, or a row could
            be spared.
    """
    for trl, ours in pairs(records):
        done, group = ours["done"], ours["work"]["group"]
        if trl["done"] != done:
            raise JobFailedError(f"the sides differ in {ours['work']}: {trl['done']}, ours {done}")
        if not done["rows with a gradient"] == done["different rows"] == group:
            raise JobFailedError(f"rows can be spared in {ours['work']}: {done}")


def judge(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The targets of all headline workloads: name, value, target, met."""
    targets = []
    for trl, ours in pairs(records, "headline"):
        theirs, figures, work = trl["figures"], ours["figures"], ours["work"]
        name = f"{work['policy']}, {work['results']} results"
        if work["policy"] == JUDGED:
            for stage, least in (("rollout", TIMES_LESS_ROLLOUT), ("step", TIMES_LESS_STEP)):
                ratio = theirs[stage] / figures[stage]
                targets.append(at_least(f"{name}: {stage}, times less CPU than TRL", ratio, least))
        for words, figure in (("decode, CPU", "decode"), ("peak memory", "step_mb")):
            ratio = figures[figure] / theirs[figure]
            targets.append(at_most(f"{name}: {words} over TRL's", ratio, 1.0))
    return targets


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
