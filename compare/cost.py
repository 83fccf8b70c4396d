"""What a run had cost at each evaluation: policy tokens, device seconds, and what came before.

Device seconds of training come from `device_s` of metrics.jsonl. Runs from before it was recorded
have wall time times processes instead, evaluations taken off. Preparation (calibration and merge)
comes from start_cost.json (`train.start_cost`), or from the markers of an older study.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from compare.runs import Run
from compare.shapes import is_finite

RECORDED, WALL = "recorded", "wall time"


@dataclass(frozen=True)
class Cost:
    """What a run had cost at its evaluations.

    Attributes:
        tokens: policy tokens sampled in training, one number an evaluation; None: not recorded.
        device_s: device seconds of training, likewise, preparation left out.
        clock: how `device_s` was measured: `recorded` or `wall time`.
        preparation: part -> device seconds; None: not recorded.
        note: what is missing or taken from elsewhere, for a person; empty if nothing.
    """

    tokens: list[float] | None
    device_s: list[float] | None
    clock: str
    preparation: dict[str, float] | None
    note: str = ""

    @property
    def total_s(self) -> list[float] | None:
        """Device seconds at each evaluation, preparation included; None: one is not known."""
        if self.device_s is None or self.preparation is None:
            return None
        before = sum(self.preparation.values())
        return [before + seconds for seconds in self.device_s]


def cost_of(run: Run) -> Cost:
    """The cost of a training run."""
    device_s, clock = training_device_s(run)
    preparation, note = preparation_device_s(run)
    tokens = [line.get("tokens") for line in run.evaluations]
    known = [float(value) for value in tokens if value is not None]
    return Cost(known if len(known) == len(tokens) else None, device_s, clock, preparation, note)


def training_device_s(run: Run) -> tuple[list[float] | None, str]:
    """Device seconds of training at each evaluation, and how they were measured."""
    recorded = [line.get("device_s") for line in run.evaluations]
    if all(value is not None for value in recorded):
        return _not_above_later_steps(run, [float(v) for v in recorded if v is not None]), RECORDED
    walls = [line.get("time_s") for line in run.evaluations]
    if any(value is None for value in walls):
        return None, WALL
    world_size = int(run.provenance.get("world_size") or 1)
    # an evaluation's time_s was taken after it
    evaluated = accumulate(float(line.get("evaluation_s") or 0.0) for line in run.evaluations)
    return [
        world_size * max(0.0, float(wall) - off)
        for wall, off in zip((w for w in walls if w is not None), evaluated, strict=True)
    ], WALL


def _not_above_later_steps(run: Run, seconds: Sequence[float]) -> list[float]:
    """An evaluation has cost no more training than the first training line from its step on.

    The first recorded clock ran on during an evaluation, and was set back after it.
    """
    lines = [
        (int(line["step"]), float(line["device_s"]))
        for line in run.training
        if line.get("device_s") is not None
    ]
    limits = [
        min((value for at, value in lines if at >= step), default=float("inf"))
        for step in run.steps
    ]
    return [min(value, limit) for value, limit in zip(seconds, limits, strict=True)]


def preparation_device_s(run: Run) -> tuple[dict[str, float] | None, str]:
    """Device seconds of calibration and merge by part, and a note; None: not recorded.

    A start that is no merge has cost nothing here: its own making is everyone's.
    """
    cost = run.start.get("cost")
    if cost:
        clock = "time_s" if is_on_gpu(run.provenance) else "processor_s"
        missing = sorted(part for part, entry in cost.items() if not entry)
        if missing:
            return None, f"{', '.join(missing)}: no cost recorded"
        # stages that train count with the training's own clock, the others with both
        return {p: float(entry.get("device_s", entry.get(clock))) for p, entry in cost.items()}, ""
    if run.start.get("merged") is False:
        return {}, ""
    if run.start.get("merged") is None:
        return None, "nothing recorded on the start"
    return _from_stages(run)


def is_on_gpu(provenance: Mapping[str, Any]) -> bool:
    """Whether a run trained on a GPU, from its environment.json."""
    if "device" in provenance:
        return bool(provenance["device"] == "gpu")
    hardware = str(provenance.get("hardware") or "")
    return any(name in hardware for name in ("NVIDIA", "AMD Instinct", "AMD Radeon"))


def _from_stages(run: Run) -> tuple[dict[str, float] | None, str]:
    """Wall seconds of the stages of the study that the run lies in: `STUDY/runs/ARM-sSEED`."""
    stages = Path(run.folder).resolve().parent.parent / "stages"
    names = {"merge": [f"merge-{run.arm}"]}
    for statistics in run.start.get("stats") or []:
        task = str(statistics).rpartition("/")[0]
        names[f"calibrate-{task}"] = [f"calibrate-{run.arm}-{task}", f"calibrate-{task}"]
    parts = {}
    for part, candidates in names.items():
        read = [_seconds(stages / f"{name}.json") for name in candidates]
        found = [seconds for seconds in read if seconds is not None]
        if not found:
            return None, f"{part}: no cost recorded"
        parts[part] = found[0]
    return parts, "preparation: wall time of the study's stages"


def _seconds(marker: Path) -> float | None:
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    seconds = content.get("seconds") if isinstance(content, dict) else None
    return float(seconds) if is_finite(seconds) else None
