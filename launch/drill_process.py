"""The drill's hands: commands in process groups of their own, and how they are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 900.0
"""A command that takes longer hangs; it is killed, and that is what the table says."""
POLL_S = 0.004
ORPHANS_S = 60.0
"""How long processes with groups of their own may outlive the one that started them."""


@dataclass
class Row:
    """One line of the table."""

    part: str
    what: str
    """what was disturbed"""
    how: str
    """what was done to it"""
    n: int
    """how often"""
    happened: str
    seconds: float
    problems: list[str] = field(default_factory=list)
    """what should not have happened; none where all is well"""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    seconds: float
    output: str
    """what it printed, both streams"""
    was_killed: bool = False
    """by us"""

    @property
    def errors(self) -> list[str]:
        """Its lines that begin with `error: `."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def complaints(self, *words: str, codes: Sequence[int] = (2,)) -> list[str]:
        """What is wrong with the way in which it refused.

        Args:
            words: each has to stand in the error.
            codes: exit codes that are right.
        """
        found = []
        if self.code not in codes:
            found.append(f"exit code {self.code}, not {' or '.join(map(str, codes))}")
        if "Traceback (most recent call last)" in self.output:
            last = [line for line in self.output.splitlines() if line.strip()][-1:]
            found.append(f"a traceback ({' '.join(last)[:200]})")
        if len(set(self.errors)) != 1:
            found.append(f"{len(set(self.errors))} error lines, not one")
        error = " ".join(self.errors)
        found += [f"the error does not say {word!r}: {error[:300]}" for word in words
                  if word not in error]  # fmt: skip
        return found


def obm(*arguments: str | Path) -> list[str]:
    """The command line of a verb, by this Python."""
    return [sys.executable, "-m", "launch.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of the commands: one thread a process, so that sums are the same whatever else runs."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONUNBUFFERED": "1"}


class Running:
    """A command under way, in a session and process group of its own.

    Args:
        command: its words.
        log: file that takes what it prints; replaced.
        cwd: where it runs.
        preload: called in the child before the command, such as a limit on its files.
    """

    def __init__(
        self, command: Sequence[str], log: Path, *, cwd: Path | None = None, preload: Any = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self._started = log, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment(), cwd=cwd, start_new_session=True, preexec_fn=preload,
            )  # fmt: skip
        self._was_killed = False

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL to the whole group; then waits until it and what it started is gone.

        Raises:
            TimeoutError: a process that it had started lives on.
        """
        import psutil

        family: list[Any] = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self._was_killed = self.process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=ORPHANS_S)
        for orphan in alive:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
        if alive:
            raise TimeoutError(f"{len(alive)} processes live on after their parent was killed")

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        """Waits for its end; one that takes longer than the limit is killed."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=max(0.1, limit_s - self.seconds))
        if not self.is_over:
            self.kill()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return Ended(int(self.process.returncode), self.seconds, text, self._was_killed)


def run(command: Sequence[str], log: Path, **options: Any) -> Ended:
    """Runs a command to its end."""
    return Running(command, log, **options).wait()


@dataclass(frozen=True)
class Moment:
    """When to kill: seconds after the start, or after the first thing that was written."""

    delay_s: float
    after_first_write: bool

    def sooner(self, factor: float) -> Moment:
        """The same at a share of its delay."""
        return Moment(self.delay_s * factor, self.after_first_write)

    @property
    def words(self) -> str:
        """For the record."""
        since = "its first write" if self.after_first_write else "it began"
        return f"{self.delay_s:.3f} s after {since}"


@dataclass(frozen=True)
class Span:
    """The clock of an undisturbed command."""

    begin_s: float
    """until it first wrote"""
    end_s: float

    def draw(self, dice: random.Random) -> Moment:
        """A moment to kill: four of five while it works, the others while it starts up.

        Of the working time the first two thirds are drawn from, since a command that goes on has
        less to do than this one had.
        """
        if dice.random() < 0.2:
            return Moment(dice.uniform(0.2, 1.0) * self.begin_s, False)
        return Moment(dice.uniform(0.0, 0.67) * (self.end_s - self.begin_s), True)


def wait_for_write(running: Running, folder: Path, limit_s: float = LIMIT_S) -> float | None:
    """Waits until a command changes something below a folder.

    Returns:
        Seconds since its start; None if it ended before.
    """
    before = listing(folder)
    while not running.is_over and running.seconds < limit_s:
        if listing(folder) != before:
            return running.seconds
        time.sleep(POLL_S)
    return None


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of change of every file below a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        with suppress(OSError):  # gone meanwhile
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return found


def time_undisturbed(command: Sequence[str], log: Path, folder: Path) -> tuple[Ended, Span]:
    """Runs a command to its end, and notes when it first wrote below a folder."""
    running = Running(command, log)
    begin_s = wait_for_write(running, folder)
    ended = running.wait()
    return ended, Span(ended.seconds if begin_s is None else begin_s, ended.seconds)


def kill_at(running: Running, moment: Moment, folder: Path) -> bool:
    """Kills a command at a moment.

    Returns:
        Whether it was still there to be killed.
    """
    begin_s = wait_for_write(running, folder) if moment.after_first_write else 0.0
    while not running.is_over and running.seconds < (begin_s or 0.0) + moment.delay_s:
        time.sleep(POLL_S / 4)
    if running.is_over:
        return False
    running.kill()
    return True
