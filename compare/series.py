"""Curves of an arm over its training, as plain lists: metrics of the evaluations and the reward.

Means and bands are of the smoothed curves; the raw values of every seed stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compare.cost import Cost
from compare.curves import band, smooth
from compare.runs import Run

METRICS = (
    "accuracy", "searched", "entity", "passage", "search_rate_text", "search_rate_image",
    "calls_per_episode", "tokens_per_episode",
)  # fmt: skip
PREFIXES = ("behaviour/", "stop/")
NO_SHARES = ("calls_per_episode", "tokens_per_episode", "reward", "n")
"""Metrics that may be more than 1."""
MAX_POINTS = 200
REWARD_WINDOWS = 20
"""The reward is smoothed over so many parts of a training."""


def curves_of(
    runs: list[Run], costs: list[Cost], smoothing: int, bootstrap: int
) -> dict[str, dict[str, Any]]:
    """The curves of one arm by metric; see `curves` at the top of `compare.summary`.

    Args:
        runs: one a seed, evaluated at the same steps.
        costs: of the runs.
        smoothing: window in evaluations.
        bootstrap: resamples of the bands.
    """
    known = set.intersection(*(run.metrics() for run in runs))
    names = [name for name in METRICS if name in known]
    names += sorted(
        name for name in known if name.startswith(PREFIXES) or name.endswith("/accuracy")
    )
    axes = {
        "steps": runs[0].steps,
        "tokens": _mean_lists([cost.tokens for cost in costs]),
        "device_s": _mean_lists([cost.total_s for cost in costs]),
    }
    curves = {}
    for name in names:
        raw = [run.curve(name) for run in runs]
        smoothed = [smooth(curve, smoothing) for curve in raw]
        curves[name] = {**axes, **_bands(name, smoothed, bootstrap), "per_seed": raw}
    reward = _reward_curve(runs, costs, bootstrap)
    return curves | ({"reward": reward} if reward else {})


def _reward_curve(runs: list[Run], costs: list[Cost], bootstrap: int) -> dict[str, Any] | None:
    """The mean training reward, smoothed, at no more than MAX_POINTS of the steps all have."""
    lines = [
        {int(line["step"]): line for line in run.training if line.get("reward") is not None}
        for run in runs
    ]
    steps = sorted(set.intersection(*(set(one) for one in lines)))
    if not steps:
        return None
    window = max(1, len(steps) // REWARD_WINDOWS)
    kept = thin(len(steps))
    smoothed = [smooth([float(one[step]["reward"]) for step in steps], window) for one in lines]
    chosen = [[curve[i] for i in kept] for curve in smoothed]
    shown = [steps[i] for i in kept]
    return {
        "steps": shown,
        "tokens": _mean_lists([_column(one, shown, "tokens", 0.0) for one in lines]),
        "device_s": _mean_lists(
            [
                None
                if cost.preparation is None
                else _column(one, shown, "device_s", sum(cost.preparation.values()))
                for one, cost in zip(lines, costs, strict=True)
            ]
        ),
        **_bands("reward", chosen, bootstrap),
        "per_seed": chosen,
        "window": window,
    }


def thin(n: int) -> list[int]:
    """Indices of at most MAX_POINTS of n points, evenly spread, with the first and the last."""
    if n <= MAX_POINTS:
        return list(range(n))
    return sorted({round(i * (n - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})


def _column(
    lines: dict[int, dict[str, Any]], steps: Sequence[int], name: str, before: float
) -> list[float] | None:
    values = [lines[step].get(name) for step in steps]
    known = [before + float(value) for value in values if value is not None]
    return known if len(known) == len(values) else None


def _bands(name: str, curves: list[list[float]], bootstrap: int) -> dict[str, list[float]]:
    bounds = None if name in NO_SHARES else (0.0, 1.0)
    mean, low, high = band(curves, bootstrap=bootstrap, bounds=bounds)
    return {"mean": mean, "low": low, "high": high}


def _mean_lists(lists: Sequence[Sequence[float] | None]) -> list[float] | None:
    known = [one for one in lists if one is not None]
    if len(known) < len(lists):
        return None
    return [sum(column) / len(column) for column in zip(*known, strict=True)]
