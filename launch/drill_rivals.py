"""Two commands on one output at once: one wins, the other is told; nothing is corrupted."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from launch.drill_compare import compare_folders
from launch.drill_process import Ended, Row, Running, wait_for_write
from launch.drill_tasks import Task, Whole, train_command

SAYS_BUSY = ("in use by", "another merge is writing it", "exists")


def drill_rivals(task: Task, whole: Whole, place: Path) -> Row:
    """A task twice at the same moment.

    Args:
        task: the command.
        whole: its undisturbed run.
        place: folder of the pair.
    """
    return _drill_pair(task, whole.folder, place)


def drill_overwrite(task: Task, whole: Whole, place: Path, start: Path) -> Row:
    """A training under way, and a second one that would replace it.

    Args:
        task, whole, place: as in `drill_rivals`.
        start: merged folder that it trains.
    """
    return _drill_pair(task, whole.folder, place, start)


def _overwriting(place: Path, start: Path) -> list[str]:
    return [word for word in train_command(place, start) if word != "--resume"] + ["--overwrite"]


def _drill_pair(task: Task, whole: Path, place: Path, start: Path | None = None) -> Row:
    """Starts a task twice at the same moment.

    Args:
        task: the command.
        whole: folder of its undisturbed run.
        place: folder of this one.
        start: of a training; the second then begins with --overwrite, once the first writes.
    """
    started = time.monotonic()
    place.mkdir(parents=True)
    first = Running(task.command(place), place.parent / f"{place.name}-first.log")
    command, how = task.command(place), "the same command at the same moment"
    if start is not None:
        command, how = _overwriting(place, start), "the same with --overwrite, while it runs"
        wait_for_write(first, place / task.leaf)
    second = Running(command, place.parent / f"{place.name}-second.log")
    ends = [first.wait(), second.wait()]
    problems = judge_pair(ends)
    problems += compare_folders(whole / task.leaf, place / task.leaf)
    return Row("rivals", task.name, how, 1, _words(ends, place), time.monotonic() - started,
               problems)  # fmt: skip


def judge_pair(ends: Sequence[Ended]) -> list[str]:
    """What is wrong with how two rivals ended."""
    found = []
    if not any(ended.code == 0 for ended in ends):
        found.append(f"none wins: exit codes {', '.join(str(ended.code) for ended in ends)}")
    for name, ended in zip(("the first", "the second"), ends, strict=True):
        if ended.was_killed:
            found.append(f"{name} hangs")
        elif ended.code:
            found += [f"{name}: {line}" for line in ended.complaints()]
            if not any(words in error for error in ended.errors for words in SAYS_BUSY):
                found.append(f"{name} does not say why: {' '.join(ended.errors)[:200]}")
    return found


def _words(ends: Sequence[Ended], place: Path) -> str:
    if all(ended.code == 0 for ended in ends):
        return "both ended well, one after the other"
    losers = [ended for ended in ends if ended.code]
    error = " ".join(" ".join(ended.errors) for ended in losers).replace(str(place), "")
    # the rest of a busy folder's error is this machine's: its name, the hour, the whole command
    error = re.sub(r" on \S+ since .*", "; wait for it, or ...", error)
    return f"one won; the other: {error.removeprefix('error: ')[:160]}"
