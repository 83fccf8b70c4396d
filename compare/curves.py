"""Floor, ceiling, cost to target, area, stability of a curve: pure functions on numbers.

Definitions (docs/metrics.md has them with an example):

* a curve is the held-out metric at each evaluation; step 0 is before any update;
* smoothed = mean of the last `window` evaluations (fewer at the start), so that no value looks
  ahead;
* floor = the metric at step 0, unsmoothed; ceiling = the highest smoothed value with a full window;
* steps to target = the first step whose smoothed value reaches the target;
* area = mean height of the unsmoothed curve (trapezoids over the step range), in the metric's own
  unit;
* value at a cost = the smoothed curve between two evaluations, straight lines over the cost;
* a collapse = the smoothed curve falls below half of the best it had reached (`collapses`).

Intervals over seeds are in `compare.intervals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from compare.intervals import BOOTSTRAP_MIN_SEEDS, Estimate, interval

__all__ = [
    "BOOTSTRAP_MIN_SEEDS", "Estimate", "area_under_curve", "band", "ceiling_index",
    "collapses", "index_at_target", "interval", "largest_drop", "smooth", "steps_to_target",
    "value_at_cost",
]  # fmt: skip

COLLAPSE_SHARE = 0.5
"""A collapse falls below this share of the best that was reached before."""
COLLAPSE_MIN_BEST = 0.1
"""A best below this is noise; losing it is no collapse."""


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each point, of fewer at the start.

    `smooth([0, 3, 6, 0], 3)` is `[0, 1.5, 3, 3]`.
    """
    if window < 1:
        raise ValueError(f"the smoothing window is {window}; it must be at least 1")
    smoothed = []
    for index in range(len(values)):
        recent = values[max(0, index - window + 1) : index + 1]
        smoothed.append(float(sum(recent)) / len(recent))
    return smoothed


def ceiling_index(values: Sequence[float], window: int) -> int:
    """Index of the best smoothed value, the first of equals.

    Points with less than a full window are left out (their mean is noisier, so the best of them
    flatters), unless the whole curve is shorter than the window.
    """
    smoothed = smooth(values, window)
    first = min(window, len(values)) - 1
    return max(range(first, len(values)), key=lambda index: (smoothed[index], -index))


def area_under_curve(steps: Sequence[int], values: Sequence[float]) -> float:
    """Mean height of a curve: trapezoids over the step range; one point is its own area."""
    if len(steps) != len(values) or not steps:
        raise ValueError("an area needs as many steps as values, and at least one")
    if len(steps) == 1:
        return float(values[0])
    points = list(zip(steps, values, strict=True))
    area = sum(
        (step_b - step_a) * (value_a + value_b) / 2
        for (step_a, value_a), (step_b, value_b) in pairwise(points)
    )
    return float(area / (steps[-1] - steps[0]))


def index_at_target(values: Sequence[float], target: float, window: int) -> int | None:
    """Index of the first evaluation whose smoothed value is at least `target`; None if none is."""
    for index, value in enumerate(smooth(values, window)):
        # The target is a mean of ceilings: a rounding error must not cost the target's own arm an
        # evaluation.
        if value >= target - 1e-9:
            return index
    return None


def steps_to_target(
    steps: Sequence[int], values: Sequence[float], target: float, window: int
) -> int | None:
    """The first step whose smoothed value is at least `target`; None if none is.

    A curve that starts at or above the target needs 0 steps.
    """
    if len(steps) != len(values):
        raise ValueError("steps to a target need as many steps as values")
    index = index_at_target(values, target, window)
    return None if index is None else int(steps[index])


def value_at_cost(
    costs: Sequence[float], values: Sequence[float], budget: float, window: int
) -> float | None:
    """The smoothed curve at a budget: straight lines over the cost between two evaluations.

    Args:
        costs: what each evaluation had cost, preparation included; they do not fall.
        values: the curve.
        budget: in the costs' unit. Beyond the last evaluation the last value holds.
        window: of the smoothing.

    Returns:
        None where the budget does not even pay for what comes before the first evaluation.
    """
    if budget < costs[0]:
        return None
    smoothed = smooth(values, window)
    for index in range(1, len(costs)):
        if budget < costs[index]:
            before, after = costs[index - 1], costs[index]
            share = (budget - before) / (after - before)
            return smoothed[index - 1] + share * (smoothed[index] - smoothed[index - 1])
    return smoothed[-1]


def collapses(values: Sequence[float], window: int) -> int:
    """How often a curve collapses: it falls below half of the best value it had reached.

    Smoothed values count, with a full window as for the ceiling, and a best of at least
    COLLAPSE_MIN_BEST. A curve that has climbed back to half can collapse again.

    `collapses([0.4, 0.4, 0.1, 0.1, 0.4, 0.1], 1)` is 2.
    """
    best, is_down, n_collapses = 0.0, False, 0
    for value in smooth(values, window)[min(window, len(values)) - 1 :]:
        best = max(best, value)
        was_down, is_down = is_down, value < COLLAPSE_SHARE * best and best >= COLLAPSE_MIN_BEST
        n_collapses += is_down and not was_down
    return n_collapses


def largest_drop(values: Sequence[float], window: int) -> float:
    """The largest fall of the smoothed curve below the best it had reached; 0 if it never falls."""
    best, drop = 0.0, 0.0
    for value in smooth(values, window)[min(window, len(values)) - 1 :]:
        best = max(best, value)
        drop = max(drop, best - value)
    return drop


def band(
    curves: Sequence[Sequence[float]],
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> tuple[list[float], list[float], list[float]]:
    """Mean and interval at every evaluation of several seeds' curves of equal length.

    Args:
        curves: one a seed.
        bootstrap: see `interval`.
        seed: see `interval`.
        bounds: see `interval`.

    Returns:
        (mean, low, high), each as long as a curve; low and high are the mean itself for a single
        seed.
    """
    points = [
        interval(column, bootstrap=bootstrap, seed=seed, bounds=bounds)
        for column in zip(*curves, strict=True)
    ]
    mean = [point.mean for point in points]
    low = [point.mean if point.low is None else point.low for point in points]
    high = [point.mean if point.high is None else point.high for point in points]
    return mean, low, high
