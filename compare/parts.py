"""Where the reward came from: what each part added to it, early and late in training.

A reward that rises while the part for right answers does not is being earned in another way; the
table is where that shows first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compare.rows import markdown_table
from compare.runs import Run

N_PHASES = 3
HACK_MIN_RISE = 0.02
"""A smaller rise of the reward says nothing."""
HACK_SHARE = 0.5
"""Share of a rise that right answers must account for."""

WEIGHTED = {"format": 1.0, "evidence": 1.0, "economy": 1.0, "redundancy": -1.0}
"""Logged in [0, 1]; what they add is their weight in `rewards` times this sign."""
ADDED = ("efficiency", "overlong")
"""Logged as what they add."""


@dataclass(frozen=True)
class Phase:
    """Part of a training.

    Attributes:
        steps: first and last.
        reward: mean total.
        parts: what each part added to it; `accuracy` is that of right answers, the search penalty
            taken off.
    """

    steps: tuple[int, int]
    reward: float
    parts: dict[str, float]


def reward_phases(runs: Sequence[Run]) -> list[Phase]:
    """Means over the runs' training steps, by thirds of the training.

    Returns:
        None at all where a run has logged no parts, or fewer steps than phases.
    """
    lines = [
        (int(line["step"]), parts) for run in runs for line in run.training
        if (parts := contributions(line, run.config)) is not None
    ]  # fmt: skip
    steps = sorted({step for step, _ in lines})
    if len(steps) < N_PHASES:
        return []
    phases = []
    for number in range(N_PHASES):
        first = number * len(steps) // N_PHASES
        members = steps[first : (number + 1) * len(steps) // N_PHASES]
        rows = [parts for step, parts in lines if members[0] <= step <= members[-1]]
        means = {
            name: sum(row.get(name, 0.0) for row in rows) / len(rows)
            for name in dict.fromkeys(name for row in rows for name in row)
        }
        phases.append(Phase((members[0], members[-1]), means.pop("total"), means))
    return phases


def contributions(line: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float] | None:
    """What each part added to one step's mean reward, and the `total`; they add up to it.

    Args:
        line: a training line of metrics.jsonl.
        config: settings of the run, whose section `rewards` holds the weights.
    """
    total = _number(line, "total")
    if total is None:
        return None
    weights = config.get("rewards") or {}
    parts = {
        part: sign * float(weights.get(part) or 0.0) * value
        for part, sign in WEIGHTED.items()
        if (value := _number(line, part)) is not None and weights.get(part)
    }
    parts |= {part: value for part in ADDED if (value := _number(line, part)) is not None}
    for own in config.get("reward_functions") or ():
        name = str(own["function"]).rpartition(":")[2]
        if (value := _number(line, name)) is not None and own["weight"]:
            parts[name] = float(own["weight"]) * value
    return {"total": total, "accuracy": total - sum(parts.values()), **parts}


def rises_without_answers(phases: Sequence[Phase]) -> bool:
    """Whether the reward rose from the first phase to the last, mostly not by right answers."""
    if len(phases) < 2:
        return False
    rise = phases[-1].reward - phases[0].reward
    by_answers = phases[-1].parts["accuracy"] - phases[0].parts["accuracy"]
    return rise > HACK_MIN_RISE and by_answers < HACK_SHARE * rise


def parts_summary(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The phases as plain data for the report's json, or None."""
    phases = reward_phases([run for run in runs if run.is_trained])
    if not phases:
        return None
    return {
        "phases": [
            {"steps": list(phase.steps), "reward": phase.reward, "parts": phase.parts}
            for phase in phases
        ],
        "rises_without_answers": rises_without_answers(phases),
    }


def parts_section(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown lines of the table; none where no arm has parts."""
    known = {arm: result["reward_parts"] for arm, result in arms.items() if result["reward_parts"]}
    if not known:
        return []
    names = list(
        dict.fromkeys(n for made in known.values() for ph in made["phases"] for n in ph["parts"])
    )
    rows = [["arm", "steps", "reward", *names]]
    for arm, made in known.items():
        for phase in made["phases"]:
            first, last = phase["steps"]
            cells = [_cell(phase["parts"].get(name), phase["reward"]) for name in names]
            rows.append([arm, f"{first}-{last}", f"{phase['reward']:.3f}", *cells])
    lines = [
        "## Where the reward came from", "",
        *markdown_table(rows), "",
        "What each part added to the mean training reward, by thirds of the training, and its "
        "share of it. `accuracy`: right answers, the search penalty taken off.",
    ]  # fmt: skip
    hacked = [arm for arm, made in known.items() if made["rises_without_answers"]]
    if hacked:
        lines.append(
            f"**{', '.join(hacked)}: the reward rose mostly by other parts than right answers.** "
            "Read episodes before trusting it."
        )
    return [*lines, ""]


def _number(line: Mapping[str, Any], part: str) -> float | None:
    value = line.get(f"rewards/{part}/mean")
    is_known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_known and value is not None else None


def _cell(value: float | None, reward: float) -> str:
    if value is None:
        return "-"
    value = round(value, 6) + 0.0  # no minus zero
    return f"{value:.3f} ({value / reward:.0%})" if reward > 0 else f"{value:.3f}"
