"""The status of a run that goes on elsewhere, as the training itself shows it on its terminal.

Reads metrics.jsonl and the heartbeats of a run folder, every two seconds, until the run has ended
or you press q or Ctrl-C. Where the output is no terminal it is printed once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError

if TYPE_CHECKING:
    from train.health import HealthMonitor
    from train.status import Status

EXAMPLES = (
    "obm watch runs/vlm-s0",
    "obm watch runs/vlm-s0 --once",
)
PERIOD_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--once", action="store_true", help="print the status once and stop")


def run(options: argparse.Namespace) -> int:
    """Show the status until it is over."""
    from rich.console import Console

    from train.panel import fit
    from train.terminal import Keys, is_terminal

    watched = WatchedRun(Path(options.run))
    status = watched.read()
    console = Console()
    if options.once or not is_terminal(sys.stdout.fileno()):
        print("\n".join(fit(status, console, since_line_s=watched.since_line_s)))
        return 0
    with console.screen(), Keys(sys.stdin.fileno()) as keys:
        while not status.is_over:
            lines = fit(status, console, console.height, watched.since_line_s)
            # the cursor goes home and what stood there is written over: no flicker
            console.file.write("\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J")
            console.file.flush()
            if keys.wait(PERIOD_S) in ("q", "Q"):
                break
            status = watched.read()
    print("\n".join(fit(status, console, since_line_s=watched.since_line_s)))
    return 0


class WatchedRun:
    """What a run's folder says; `read` brings it up to date.

    Args:
        folder: of the run.

    Raises:
        LaunchError: it is no run folder.
    """

    def __init__(self, folder: Path) -> None:
        from configs.schema import load_config
        from launch.jobs import Follower

        # unlike Path's, this takes a name that is too long for none
        if not os.path.isfile(folder / "config.yaml"):
            raise LaunchError(f"{folder} holds no config.yaml; name the folder of a training run")
        self._folder = folder
        self._config = load_config(folder / "config.yaml")
        self._follower = Follower(folder / "metrics.jsonl", from_start=True)
        self._n_cuts = 0
        self._status, self._monitor = self._start()

    def _start(self) -> tuple[Status, HealthMonitor]:
        from train.health import HealthMonitor, health_settings
        from train.live import new_status

        # the run folder has a copy of a merged start's merge.json, so it tells as the start does
        settings = health_settings(self._config, str(self._folder), self._count_processes())
        return new_status(self._config), HealthMonitor(settings)

    def _count_processes(self) -> int:
        """Of the training; 1 where its record is not there or damaged."""
        try:
            record = json.loads((self._folder / "environment.json").read_text(encoding="utf-8"))
            return max(1, int(record["world_size"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return 1

    def read(self) -> Status:
        """The status by what has been written up to now."""
        lines = self._follower.new_lines()
        if self._follower.n_cuts > self._n_cuts:
            self._n_cuts = self._follower.n_cuts
            self._status, self._monitor = self._start()
        for line in lines:
            self._status.take(line)
            if line.get("phase") == "train" and "step" in line:
                self._monitor.check(line)
        self._status.warnings = self._monitor.active
        self._read_heartbeats()
        self._status.is_over = (self._folder / "done.json").is_file()
        return self._status

    @property
    def since_line_s(self) -> float:
        """Seconds since the last line; 0 for a run that has ended or is not heard of."""
        path = self._folder / "metrics.jsonl"
        is_going = not self._status.is_over and (self._status.silent_s or 0.0) < 60.0
        return max(0.0, time.time() - path.stat().st_mtime) if is_going and path.is_file() else 0.0

    def _read_heartbeats(self) -> None:
        from train.status import is_number
        from train.watchdog import FOLDER, read_heartbeats

        try:
            beats = read_heartbeats(self._folder / FOLDER)
        except (
            OSError,
            ValueError,
            TypeError,
            RecursionError,
        ):  # replaced while we read, or of another version
            return
        # of another program or cut: no sign of life is better than the end of the watching
        if not beats or not all(
            isinstance(beat.stage, str) and is_number(beat.seen) for beat in beats
        ):
            return
        first = beats[0]
        self._status.stage, self._status.memory_gb = first.stage, first.memory_gb or None
        self._status.silent_s = time.time() - max(beat.seen for beat in beats)
