"""Ends a run that hangs, and says which process was in which stage.

A process that waits in a collective is blocked in C, so nothing raised in Python reaches it. Here a
daemon thread watches: it writes the stage of its process into `<run>/heartbeat/rank_<n>.json` every
few seconds, and when no process has made progress for `timeout_s` it says so, has every process
write its stacks beside the heartbeats, and ends the process with exit code 124. A process that
waits for a slow one is no hang: as long as any of them makes progress, the run goes on.

The run folder must be shared by all nodes and their clocks roughly equal; `progress` costs two list
operations a stage, the thread one small file every few seconds.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

HANG_EXIT_CODE = 124
"""that of timeout(1)"""
FOLDER = "heartbeat"
VERDICT = "hang.txt"
WHOLE_STEP = ("generate", "loss", "optimizer")
"""Stages that make up a training step; all others lie within them."""
WAITS = ("gather", "sync", "done")
"""Stages in which a process only waits for others: whoever is elsewhere holds them up."""


class Progress:
    """The stages that this process is in, outermost first, and when the last one began or ended."""

    def __init__(self) -> None:
        self.stages: list[str] = ["start"]
        self.since = time.time()

    def enter(self, stage: str) -> None:
        """Begins a stage inside the current one."""
        self.stages.append(stage)
        self.since = time.time()

    def leave(self) -> None:
        """Ends the innermost stage."""
        self.stages.pop()
        self.since = time.time()

    def begin(self, stage: str) -> None:
        """Ends the innermost stage and begins the next in its place."""
        self.stages[-1] = stage
        self.since = time.time()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is a stage."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()


progress = Progress()
"""Of this process; the trainer and the rollout engine enter and leave their stages here."""


@dataclass(frozen=True)
class Heartbeat:
    """One process as it last showed itself; times in seconds since 1970."""

    rank: int
    stage: str
    step: int
    since: float
    """when its latest stage began or ended"""
    seen: float
    """when this was written"""
    host: str
    pid: int
    memory_gb: float = 0.0
    """that the process holds: on its GPU, else in main memory"""


def find_suspects(beats: Sequence[Heartbeat], now: float, silent_s: float) -> list[Heartbeat]:
    """Those that probably hold up the rest.

    Processes that show no sign of life; else those in the earliest step that do not wait for
    others; else all that came to a halt in the earliest step.
    """
    silent = [beat for beat in beats if now - beat.seen > silent_s and beat.stage != "done"]
    behind = [beat for beat in beats if beat.step == min(other.step for other in beats)]
    return silent or [beat for beat in behind if beat.stage not in WAITS] or behind


def describe_hang(
    beats: Sequence[Heartbeat], n_processes: int, now: float, silent_s: float, timeout_s: float
) -> str:
    """One line: who is where, since when; those that hold up the rest come first.

    Args:
        beats: every process that has shown itself.
        n_processes: how many there should be.
        now, silent_s: a process that was not seen for `silent_s` is stopped, dead or cut off.
        timeout_s: the setting, for the message.
    """
    suspects = find_suspects(beats, now, silent_s)
    groups: dict[tuple[str, int, bool, bool], list[Heartbeat]] = {}
    for beat in sorted(beats, key=lambda beat: (beat not in suspects, beat.rank)):
        is_silent = now - beat.seen > silent_s and beat.stage != "done"
        key = (beat.stage, beat.step, is_silent, beat in suspects)
        groups.setdefault(key, []).append(beat)
    parts = []
    for (stage, step, is_silent, is_suspect), members in groups.items():
        many = len(members) > 1
        who = f"rank{'s' if many else ''} {', '.join(str(beat.rank) for beat in members)}"
        seconds = f"{now - min(beat.since for beat in members):.0f} s (step {step})"
        verb = "have" if many else "has"
        if is_silent:
            hosts = ", ".join(sorted({f"{beat.host} pid {beat.pid}" for beat in members}))
            gone = "give no sign of life" if many else "gives no sign of life"
            parts.append(f"{who} {gone} ({hosts}), last in '{stage}' for {seconds}")
        elif is_suspect:
            parts.append(f"{who} {verb} been in '{stage}' for {seconds}")
        else:
            parts.append(f"{who} {'wait' if many else 'waits'} in '{stage}' for {seconds}")
    unseen = sorted(set(range(n_processes)) - {beat.rank for beat in beats})
    if unseen:
        parts.append(f"of rank {', '.join(map(str, unseen))} nothing was ever seen")
    return f"no progress for {timeout_s:g} s: {'; '.join(parts)}"


class Watchdog:
    """Watches this process and, with the files of the others, the whole run.

    Args:
        folder: the run folder.
        rank: of this process.
        n_processes: of the run.
        timeout_s: seconds without progress anywhere; None only writes heartbeats.
        step: gives the optimizer step.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        n_processes: int,
        timeout_s: float | None,
        step: Callable[[], int] = lambda: 0,
    ) -> None:
        self.folder = folder / FOLDER
        self.rank, self.n_processes = rank, n_processes
        self.timeout_s = timeout_s
        self.step = step
        self.poll_s = min(15.0, max(0.05, (timeout_s or 300.0) / 20))
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.folder.mkdir(parents=True, exist_ok=True)
        progress.since = time.time()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()
        with suppress(OSError):
            self._write("done" if exception[0] is None else "failed")

    def _watch(self) -> None:
        is_over = False
        while not is_over:  # the first time at once: a run can die before the first pause is over
            try:
                self._write(progress.stages[-1])
                if self.timeout_s is not None and self._is_hanging():
                    self._end()
            # a full disk or a lost mount must not end a run that trains
            except (OSError, ValueError) as error:
                logger.warning("heartbeat: %s", error)
            is_over = self._is_over.wait(self.poll_s)

    def _write(self, stage: str) -> None:
        """Replaces this process' file; readers see it whole."""
        now = time.time()
        beat = Heartbeat(
            self.rank, stage, self.step(), progress.since, now, socket.gethostname(), os.getpid(),
            memory_gb(),
        )  # fmt: skip
        temporary = self.folder / f".rank_{self.rank}.tmp"
        temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
        temporary.replace(self.folder / f"rank_{self.rank}.json")

    def _is_hanging(self) -> bool:
        """Whether another process has said so, or none has made progress for too long."""
        assert self.timeout_s is not None
        if (self.folder / VERDICT).exists():
            return True
        if time.time() - progress.since < self.timeout_s:
            return False
        beats = read_heartbeats(self.folder)
        # who has ended makes no progress, but is no reason to wait longer either
        latest = max(beat.since for beat in beats)
        return time.time() - latest >= self.timeout_s

    def _end(self) -> None:
        """Says what happened (one process does), writes this process' stacks, and ends it."""
        assert self.timeout_s is not None
        verdict = self.folder / VERDICT
        with suppress(FileExistsError), verdict.open("x", encoding="utf-8") as file:
            text = describe_hang(
                read_heartbeats(self.folder),
                self.n_processes,
                time.time(),
                silent_s=max(5.0, 4 * self.poll_s),
                timeout_s=self.timeout_s,
            )
            file.write(text + "\n")
            print(
                f"error: {text}; stacks lie in {self.folder}; go on with --resume, and if the wait "
                "was in order raise hang_timeout_s",
                file=sys.stderr,
                flush=True,
            )
        with (self.folder / f"rank_{self.rank}.stacks").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # the others see the verdict and write theirs before a launcher ends them
        time.sleep(2 * self.poll_s)
        os._exit(HANG_EXIT_CODE)


def memory_gb() -> float:
    """Memory that this process holds, in GB: on its GPU if it works there, else main memory."""
    import psutil

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        # the watchdog's thread has a current device of its own, the first
        card = int(os.environ.get("LOCAL_RANK", "0"))
        return round(torch.cuda.memory_reserved(card) / 1e9, 2)
    return round(psutil.Process().memory_info().rss / 1e9, 2)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """What every process last wrote, by rank."""
    beats = [Heartbeat(**json.loads(path.read_text())) for path in folder.glob("rank_*.json")]
    return sorted(beats, key=lambda beat: beat.rank)


def clear_heartbeats(folder: Path) -> None:
    """Removes what an earlier start of the run left; before any watchdog of this one runs."""
    for path in (folder / FOLDER).glob("*"):
        path.unlink()
