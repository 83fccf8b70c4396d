"""What a run's status shows: its last lines of metrics, its floor, its warnings, its time left.

`Status` is filled with lines of metrics.jsonl, by the training process as it writes them or by
`obm watch` as it reads them; `train.panel` draws it. No torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from train.health import HealthWarning, Line, is_number

N_RECENT = 48
"""Training lines kept: those of the sparkline and of the time left."""


@dataclass
class Status:
    """A run as it stands."""

    name: str
    """arm and seed"""
    max_steps: int
    """optimizer steps in all; 0 = not known"""
    eval_every: int
    """optimizer steps between evaluations"""
    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=N_RECENT))
    """the last training lines"""
    floor: Line | None = None
    """the first evaluation"""
    evaluation: Line | None = None
    """the last one"""
    warnings: Sequence[HealthWarning] = ()
    """warnings that hold"""
    step: int = 0
    time_s: float = 0.0
    """seconds of running up to the last line"""
    stage: str = ""
    """what the process does now"""
    memory_gb: float | None = None
    """that the process holds"""
    silent_s: float | None = None
    """seconds since the process last showed itself, where that is long"""
    is_over: bool = False
    """the run has ended"""
    is_fresh: bool = True
    """no line since the start, so that the time up to the next one holds loading, too"""
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=N_RECENT))
    """wall time of the last steps, checkpoints included, evaluations left out"""
    evaluation_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=4))
    """wall time of the last evaluations"""

    def take(self, line: Mapping[str, Any]) -> None:
        """Takes in a line of metrics.jsonl, training or evaluation; a broken one changes nothing.

        Steps of a run that was cut back and resumed may come again.
        """
        step, since_start = line.get("step"), line.get("time_s")
        if not is_line(line) or step is None or not is_number(since_start):
            return
        if line.get("phase") == "eval":
            self.floor = self.floor or line
            self.evaluation = line
            if is_number(line.get("eval/time_s")):
                self.evaluation_seconds.append(line["eval/time_s"])
        else:
            seconds = (since_start - self.time_s) / max(1, step - self.step)  # type: ignore[operator]
            if not self.is_fresh and seconds > 0 and step > self.step:
                self.step_seconds.append(seconds)
            self.lines.append(line)
        self.step, self.time_s = step, float(since_start)  # type: ignore[arg-type]
        self.is_fresh = False

    @property
    def newest(self) -> Line:
        """The last training line; empty before the first."""
        return self.lines[-1] if self.lines else {}

    def series(self, name: str) -> list[float]:
        """The metric's recent values, oldest first; lines without it left out."""
        return [line[name] for line in self.lines if is_number(line.get(name))]

    def left_s(self, since_line_s: float = 0.0) -> float | None:
        """Seconds until the end, from the recent steps and evaluations; None where unknown.

        Args:
            since_line_s: seconds since the last line.
        """
        if not self.step_seconds or not self.max_steps:
            return None
        n_steps = max(0, self.max_steps - self.step)
        n_evaluations = evaluations_left(self.step, self.max_steps, self.eval_every)
        if self.evaluation is not None and self.evaluation["step"] < self.step:
            # this step's own comes after its training line
            n_evaluations += self.step % self.eval_every == 0 or self.step >= self.max_steps
        seconds = n_steps * fmean(self.step_seconds)
        if self.evaluation_seconds:
            seconds += n_evaluations * fmean(self.evaluation_seconds)
        return max(0.0, seconds - since_line_s)


def evaluations_left(step: int, max_steps: int, every: int) -> int:
    """Evaluations after `step`: one every `every` steps, and one at the end.

    Example: of 12 steps with every = 5, after step 5: those of steps 10 and 12.
    """
    if step >= max_steps:
        return 0
    return max_steps // every - step // every + (max_steps % every != 0)


def is_line(row: Any) -> bool:
    """Whether a row of a metrics.jsonl has a line's shape: its step, its phase, numbers or null."""
    if not isinstance(row, Mapping):
        return False
    step, phase = row.get("step", 0), row.get("phase", "")
    if type(step) is not int or not is_number(step) or not isinstance(phase, str):
        return False
    # a NaN is a number that was not finite; a whole one of 400 digits is none of a run's
    return all(
        value is None or isinstance(value, float) or is_number(value)
        for name, value in row.items()
        if name != "phase"
    )
