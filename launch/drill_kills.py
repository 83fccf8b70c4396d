"""Kills: every command of the pipeline dies at random moments, and goes on to the same result."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from launch.drill_compare import compare_folders
from launch.drill_process import Ended, Row, Running, Span, kill_at
from launch.drill_tasks import Task, Whole

MAX_ROUNDS = 4


@dataclass
class Killed:
    """What came of killing one command over and over."""

    n_kills: int = 0
    n_missed: int = 0
    """moments that came when the command had ended: it was faster than the undisturbed one"""
    rounds: list[Path] = field(default_factory=list)
    moments: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def drill_kills(task: Task, whole: Whole, folder: Path, dice: random.Random, n_kills: int) -> Row:
    """Kills a task `n_kills` times, each round until it ends, and compares what it ends with.

    Args:
        task: the command.
        whole: its undisturbed run.
        folder: to work in.
        dice: draw the moments.
        n_kills: kills, over all rounds.
    """
    started = time.monotonic()
    killed = Killed(problems=[whole.problem] if whole.problem else [])
    while killed.n_kills < n_kills and len(killed.rounds) < MAX_ROUNDS and not whole.problem:
        place = folder / f"killed-{len(killed.rounds)}"
        killed.rounds.append(place)
        _one_round(task, place, dice, whole.span, n_kills, killed)
        unequal = compare_folders(whole.folder / task.leaf, place / task.leaf)
        killed.problems += [f"{place.name}: {line}" for line in unequal]
    words = "results equal the undisturbed run's"
    if killed.problems:
        words = "NOT as undisturbed"
    if not killed.n_kills and not whole.problem:
        killed.problems.append("no kill came before its end: the drill shows nothing of it")
    n = len(killed.rounds)
    return Row(
        "kills", task.name, "SIGKILL of the process group", killed.n_kills,
        f"{n} {'run' if n == 1 else 'runs'} came to the end; {words}",
        time.monotonic() - started, killed.problems,
    )  # fmt: skip


def _one_round(
    task: Task, folder: Path, dice: random.Random, span: Span, n_kills: int, killed: Killed
) -> None:
    """Starts a command until it ends by itself; kills it while there are kills left."""
    folder.mkdir(parents=True)
    output, done, attempt = folder / task.leaf, 0, 0
    while True:
        log = folder.parent / "logs" / f"{folder.name}-{attempt}.log"
        running = Running(task.command(folder), log)
        attempt += 1
        moment = span.draw(dice).sooner(0.5**killed.n_missed)
        try:
            was_killed = killed.n_kills < n_kills and kill_at(running, moment, folder)
        except TimeoutError as error:
            killed.problems.append(f"{folder.name}: {error}")
            was_killed = True
        if not was_killed:
            killed.n_missed += killed.n_kills < n_kills
            killed.problems += _end_problems(folder, task, running.wait())
            return
        killed.n_kills += 1
        killed.moments.append(moment.words)
        now = task.progress(output)
        if now < done:
            killed.problems.append(
                f"{folder.name}: a kill {moment.words} took finished work: {done} before, {now} now"
            )
        done = max(done, now)


def _end_problems(folder: Path, task: Task, ended: Ended) -> list[str]:
    """What is wrong with the end of a round; a kill may have come behind the last write."""
    is_there = task.refusal and any(task.refusal in error for error in ended.errors)
    if ended.code == 0 or (ended.code == 2 and is_there):
        return []
    what = "hangs" if ended.was_killed else f"ends with {ended.code}"
    last = " ".join(ended.output.split())[-300:]
    return [f"{folder.name}: {what} after {ended.seconds:.0f} s: {last}"]
