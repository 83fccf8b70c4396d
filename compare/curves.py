"""Floor, ceiling, steps to target, area, intervals over seeds: pure functions on numbers.

Definitions (docs/metrics.md has them with an example):

* a curve is the held-out metric at each evaluation; step 0 is before any update;
* smoothed = mean of the last `window` evaluations (fewer at the start), so that no value looks
  ahead;
* floor = the metric at step 0, unsmoothed; ceiling = the highest smoothed value with a full window;
* steps to target = the first step whose smoothed value reaches the target;
* area = mean height of the unsmoothed curve (trapezoids over the step range), in the metric's own
  unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# 97.5 % quantile of Student's t for 1..9 degrees of freedom.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# Below this many seeds a percentile bootstrap is far too narrow (with 3 it covers about three
# quarters).
BOOTSTRAP_MIN_SEEDS = 5


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; the interval is None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


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


def ceiling(values: Sequence[float], window: int) -> float:
    """The best smoothed value of a curve."""
    return smooth(values, window)[ceiling_index(values, window)]


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


def steps_to_target(
    steps: Sequence[int], values: Sequence[float], target: float, window: int
) -> int | None:
    """The first step whose smoothed value is at least `target`; None if none is.

    A curve that starts at or above the target needs 0 steps.
    """
    for step, value in zip(steps, smooth(values, window), strict=True):
        # The target is a mean of ceilings: a rounding error must not cost the target's own arm an
        # evaluation.
        if value >= target - 1e-9:
            return int(step)
    return None


def interval(
    values: Sequence[float],
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Estimate:
    """Mean over seeds with a 95 % interval.

    Fewer than five values: Student's t. From five on: percentile bootstrap with `bootstrap`
    resamples (Student's t for fewer than ten values where `bootstrap` is 0).

    Args:
        values: one number a seed.
        bootstrap: resamples; 0 means Student's t.
        seed: of the resampling, so that a report can be made again.
        bounds: the metric's range, to which the interval is cut; None for an open range.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) == 1:
        return Estimate(mean, None, None, 1)
    if len(sample) >= BOOTSTRAP_MIN_SEEDS and bootstrap > 0:
        generator = np.random.default_rng(seed)
        draws = sample[generator.integers(0, len(sample), size=(bootstrap, len(sample)))]
        low, high = (float(x) for x in np.percentile(draws.mean(axis=1), [2.5, 97.5]))
    else:
        quantile = _STUDENT_T[len(sample) - 2] if len(sample) <= 10 else 1.96
        half = quantile * float(sample.std(ddof=1)) / math.sqrt(len(sample))
        low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, len(sample))


def band(
    curves: Sequence[Sequence[float]], *, bootstrap: int = 2000, seed: int = 0
) -> tuple[list[float], list[float], list[float]]:
    """Mean and interval at every evaluation of several seeds' curves of equal length.

    Returns:
        (mean, low, high), each as long as a curve; low and high are the mean itself for a single
        seed.
    """
    points = [
        interval(column, bootstrap=bootstrap, seed=seed) for column in zip(*curves, strict=True)
    ]
    mean = [point.mean for point in points]
    low = [point.mean if point.low is None else point.low for point in points]
    high = [point.mean if point.high is None else point.high for point in points]
    return mean, low, high
