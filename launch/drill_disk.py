"""A disk that fills up under a command, and then has room again.

As root the disk is a tmpfs of a few megabytes that is made larger afterwards. Elsewhere no file of
the command may grow beyond a limit (RLIMIT_FSIZE), which the next start does not have.
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launch.drill_compare import compare_folders
from launch.drill_process import Ended, Row, run
from launch.drill_tasks import Task, Whole

FILLS = (0.35, 0.8)
"""Share of what an undisturbed run holds at the end that there is room for."""
ROOM_BYTES = 256 * 2**20
PAGE = 4096
TMPFS = "tmpfs"


def kind_of_disk(folder: Path) -> str:
    """`tmpfs` where this process may mount one, else `RLIMIT_FSIZE`."""
    place = folder / "probe"
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", TMPFS, "-o", f"size={PAGE}", TMPFS, str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if mounted:
        subprocess.run(["umount", str(place)], check=True)
    place.rmdir()
    return TMPFS if mounted else "RLIMIT_FSIZE"


def disk_words(kind: str) -> str:
    """How the disk was filled, for the page."""
    if kind == TMPFS:
        return (
            "A tmpfs that holds 35 % and 80 % of what the undisturbed run leaves; then it is made "
            "larger and the same command runs again."
        )
    return (
        "This process may not mount, so no file may grow beyond 35 % and 80 % of the largest one "
        "(RLIMIT_FSIZE); then the same command runs again without the limit."
    )


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A tmpfs of so many bytes; unmounted in the end."""
    folder.mkdir(parents=True)
    size = f"size={max(n_bytes, PAGE)}"
    subprocess.run(["mount", "-t", TMPFS, "-o", size, TMPFS, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_room(folder: Path) -> None:
    """The tmpfs becomes large."""
    size = f"remount,size={ROOM_BYTES}"
    subprocess.run(["mount", "-o", size, str(folder)], check=True)


def drill_disk(task: Task, whole: Whole, folder: Path, kind: str) -> Row:
    """A task on disks of two sizes.

    Args:
        task: the command.
        whole: its undisturbed run.
        folder: to work in.
        kind: of `kind_of_disk`.
    """
    started, problems, shown = time.monotonic(), [], ""
    narrow = _tmpfs if kind == TMPFS else _file_limit
    for fill in FILLS:
        logs = folder / f"logs-{fill}"
        with narrow(whole.folder / task.leaf, folder / f"disk-{fill}", fill) as disk:
            command = task.command(disk.folder)
            ended = run(command, logs / "full.log", preload=disk.preload)
            problems += _judge(task, disk.folder, ended, fill)
            shown = shown or " ".join(ended.errors).replace(str(disk.folder), "")
            disk.widen()
            ended = run(command, logs / "room.log")
            problems += _judge_after(task, whole.folder, disk.folder, ended, fill)
    return _row(task, shown, time.monotonic() - started, problems)


@dataclass(frozen=True)
class Disk:
    """A place that takes little.

    Attributes:
        folder: for a command to write in.
        preload: runs in the command's process before it starts.
        widen: makes room; without `preload` the next command has it.
    """

    folder: Path
    preload: Callable[[], None] | None
    widen: Callable[[], None]


@contextmanager
def _tmpfs(whole: Path, folder: Path, fill: float) -> Iterator[Disk]:
    """One that holds a share of the undisturbed output."""
    n_bytes = sum(path.stat().st_blocks * 512 for path in whole.rglob("*") if path.is_file())
    with small_disk(folder, int(fill * n_bytes)) as place:
        yield Disk(place, None, partial(make_room, place))


@contextmanager
def _file_limit(whole: Path, folder: Path, fill: float) -> Iterator[Disk]:
    """One where no file may grow beyond a share of the undisturbed output's largest."""
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    limit = int(fill * largest)
    folder.mkdir(parents=True)
    yield Disk(
        folder, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)), lambda: None
    )


def _judge(task: Task, place: Path, ended: Ended, fill: float) -> list[str]:
    """One clear error that names a file of the output; nothing there that passes for whole."""
    if ended.was_killed:
        return [f"at {fill}: hangs, {ended.seconds:.0f} s"]
    found = ended.complaints(str(place), codes=(1, 2))
    if task.is_whole(place / task.leaf):
        found.append("what was half written passes for whole")
    return [f"at {fill}: {line}" for line in found]


def _judge_after(task: Task, whole: Path, place: Path, ended: Ended, fill: float) -> list[str]:
    """With room the same command ends with the undisturbed result."""
    if ended.code:
        last = " ".join(ended.errors) or ended.output[-300:]
        return [f"at {fill}: with room it ends with {ended.code}: {last}"]
    unequal = compare_folders(whole / task.leaf, place / task.leaf)
    return [f"at {fill}, after room was made: {line}" for line in unequal]


def _row(task: Task, shown: str, seconds: float, problems: list[str]) -> Row:
    error = shown.removeprefix("error: ")
    error = error if len(error) <= 150 else f"{error[:150].rsplit(' ', 1)[0]} ..."
    words = "with room the same command ended as undisturbed" if not problems else "PROBLEMS"
    return Row("disk", task.name, "full disk", len(FILLS), f"{error}; {words}", seconds, problems)
