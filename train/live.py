"""The live view of a training: its status in the last rows of the terminal, redrawn as it goes on.

Only the first process has one, and only where standard error is a terminal (`tracking.live: auto`);
elsewhere a run prints a line a step. A thread redraws every two seconds, since a step can take
minutes and its clocks and stage go on meanwhile; `obm watch RUN` shows the same from a run's files.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console

from train.health import HealthWarning
from train.panel import fit
from train.status import Status
from train.terminal import LEAST_ROWS, BottomRows, is_terminal
from train.watchdog import memory_gb, progress

if TYPE_CHECKING:
    from configs.schema import Config

REDRAW_S = 2.0
LEAST_HEIGHT = 10
"""Rows of a terminal below which there is no room for a status."""


class LiveView:
    """Draws a status on a terminal until it is closed; use in a `with` block.

    Args:
        status: the run, with the lines of an earlier start.
        descriptor: of the terminal.
    """

    def __init__(self, status: Status, descriptor: int) -> None:
        self.status = status
        self._rows = BottomRows(descriptor)
        self._console = Console(file=os.fdopen(os.dup(descriptor), "w", encoding="utf-8"))
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._line_at = time.perf_counter()
        self._thread = threading.Thread(target=self._redraw, name="live view", daemon=True)

    def __enter__(self) -> LiveView:
        self.draw()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives the terminal back; the status of a run that came to its end stays as text."""
        self._is_over.set()
        self._thread.join()
        self._rows.close()
        # a terminal that was closed must not end a training whose policy is still to be written
        with suppress(OSError), self._console.file as terminal:
            if exception[0] is None:
                self.status.is_over = True
                terminal.write("\n".join(fit(self.status, self._console)) + "\n")

    def take(self, line: Mapping[str, Any]) -> None:
        """Takes in a line of metrics.jsonl; the thread draws it."""
        with self._lock:
            self.status.take(line)
            self._line_at = time.perf_counter()

    def warn(self, warnings: Sequence[HealthWarning]) -> None:
        """Takes in the warnings that hold now."""
        with self._lock:
            self.status.warnings = list(warnings)

    def draw(self) -> None:
        """Draws the status as it is now."""
        with self._lock:
            self.status.stage = progress.stages[-1]
            self.status.memory_gb = memory_gb()
            columns, height = self._rows.size
            self._console.width = columns
            lines: list[str] = []
            if height >= LEAST_HEIGHT:
                since = time.perf_counter() - self._line_at
                lines = fit(self.status, self._console, height - LEAST_ROWS, since)
            self._rows.draw(lines)

    def _redraw(self) -> None:
        while not self._is_over.wait(REDRAW_S):
            self.draw()


def live_descriptor(config: Config, is_main: bool) -> int | None:
    """The terminal that a run's status may be shown on, or None."""
    if not is_main or config.tracking.live == "off":
        return None
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    return descriptor if is_terminal(descriptor) else None


def new_status(config: Config, earlier_lines: Sequence[Mapping[str, Any]] = ()) -> Status:
    """The status of a run, with the lines that it has so far."""
    from train.settings import resolved_grpo

    n_steps = resolved_grpo(config)["max_steps"]
    name = f"{config.arm_name}-s{config.seed}"
    status = Status(name, n_steps, config.compare.eval_every)
    for line in earlier_lines:
        status.take(line)
    status.is_fresh = True
    return status
