"""Intervals over seeds, and differences between arms: pure functions on a handful of numbers.

A study has three to ten seeds, and with so few a percentile bootstrap is far too narrow: over five
it covers 83 % where it says 95 % (docs/log.md has the measurement). So:

* fewer than ten values: Student's t;
* from ten on: a percentile bootstrap whose percentiles are moved outwards so that it is as wide as
  Student's t where the values are normal (Hesterberg 2015, "What teachers should know about the
  bootstrap", section 3.2, expanded percentiles), and follows the skew where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

# 97.5 % quantile of Student's t for 1..9 degrees of freedom.
_STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
_NORMAL_975 = 1.959964

BOOTSTRAP_MIN_SEEDS = 10
"""Below, a bootstrap interval covers less than it says, in every form that was measured."""
ALL_RESAMPLES = 3125
"""So many resamples (five values: 5^5) are gone through one by one instead of drawn."""
ALL_PERMUTATIONS = 1 << 16
"""So many sign flips or ways to share out are gone through one by one instead of drawn."""
DEFAULT_RESAMPLES = 2000
"""Where none are asked for, probabilities still need some."""
ROUNDING = 1e-9
"""Differences of shares below this are rounding errors."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; the interval is None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """One arm minus another."""

    mean: float
    low: float | None
    """of the 95 % interval; None where either arm has one seed only"""
    high: float | None
    probability: float | None
    """that the arm's mean is above the other's: share of bootstrap resamples, ties count half"""
    p_value: float | None
    """two-sided, exact: how often as large a mean difference comes about if arms mean nothing"""
    bootstrap: tuple[float, float] | None
    """plain percentile bootstrap, too narrow under ten seeds"""
    n: int
    """pairs; of unpaired arms the seeds of the smaller one"""
    is_paired: bool

    def mirrored(self) -> Difference:
        """The other arm minus this one."""
        flip = self.bootstrap
        return Difference(
            mean=-self.mean,
            low=None if self.high is None else -self.high,
            high=None if self.low is None else -self.low,
            probability=None if self.probability is None else 1.0 - self.probability,
            p_value=self.p_value,
            bootstrap=None if flip is None else (-flip[1], -flip[0]),
            n=self.n,
            is_paired=self.is_paired,
        )


def student_t(degrees: int) -> float:
    """97.5 % quantile of Student's t.

    From ten degrees on the expansion in 1 / degrees of Abramowitz and Stegun 26.7.5, right to
    0.0005.
    """
    if degrees < 1:
        raise ValueError(f"Student's t with {degrees} degrees of freedom; it needs at least 1")
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    z = _NORMAL_975
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def interval(
    values: Sequence[float],
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Estimate:
    """Mean over seeds with a 95 % interval.

    Args:
        values: one number a seed.
        bootstrap: resamples, used from ten values on; 0 means Student's t throughout.
        seed: of the resampling, so that a report can be made again.
        bounds: the metric's range, to which the interval is cut; None for an open range.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    sample = np.asarray(values, dtype=np.float64)
    mean, n = float(sample.mean()), len(sample)
    if n == 1:
        return Estimate(mean, None, None, 1)
    if n >= BOOTSTRAP_MIN_SEEDS and bootstrap > 0:
        means = sample[resamples(n, bootstrap, seed)].mean(axis=1)
        low, high = expanded_percentiles(means, n)
    else:
        half = student_t(n - 1) * float(sample.std(ddof=1)) / math.sqrt(n)
        low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, n)


def resamples(n: int, bootstrap: int, seed: int) -> NDArray[np.intp]:
    """Indices [R, n] of bootstrap resamples of n values: all n^n of five or fewer, else drawn."""
    if n**n <= ALL_RESAMPLES:
        return np.indices((n,) * n).reshape(n, -1).T
    return np.random.default_rng(seed).integers(0, n, size=(bootstrap, n))


def expanded_percentiles(means: Floats, n: int) -> tuple[float, float]:
    """Limits of a 95 % interval from the means of resamples of n values.

    The share cut off at each side is Phi(-t sqrt(n / (n - 1))), t being Student's quantile: a
    plain percentile interval has the width of a normal one with the population's deviation.
    """
    cut = 100.0 * NormalDist().cdf(-student_t(n - 1) * math.sqrt(n / (n - 1)))
    low, high = np.percentile(means, [cut, 100.0 - cut])
    return float(low), float(high)


def paired_difference(
    one: Sequence[float],
    other: Sequence[float],
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
) -> Difference:
    """One arm minus another over the seeds that both have: same questions, same order of data.

    Args:
        one: a value a seed.
        other: the other arm's, of the same seeds in the same order.
        bootstrap: resamples of the pairs (over five of them; all resamples of fewer).
        seed: of the resampling.
        bounds: to which the interval is cut.
    """
    sample = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    sample[np.abs(sample) < ROUNDING] = 0.0
    n = len(sample)
    estimate = interval(sample.tolist(), bootstrap=bootstrap, seed=seed, bounds=bounds)
    if n == 1:
        return Difference(estimate.mean, None, None, None, None, None, 1, True)
    means = sample[resamples(n, bootstrap or DEFAULT_RESAMPLES, seed)].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(
        estimate.mean, estimate.low, estimate.high, share_above(means), sign_flip_p(sample, seed),
        (float(low), float(high)), n, True,
    )  # fmt: skip


def unpaired_difference(
    one: Sequence[float],
    other: Sequence[float],
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
) -> Difference:
    """One arm minus another whose seeds are others: Welch's t, from ten seeds a bootstrap.

    Args:
        one: a value a seed.
        other: likewise, of any number.
        bootstrap: resamples of each arm's seeds.
        seed: of the resampling.
        bounds: to which the interval is cut.
    """
    first, second = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    mean, n = float(first.mean() - second.mean()), min(len(first), len(second))
    if n == 1:
        return Difference(mean, None, None, None, None, None, 1, False)
    n_draws = bootstrap or DEFAULT_RESAMPLES
    draws = [
        values[np.random.default_rng(seed + i).integers(0, len(values), (n_draws, len(values)))]
        for i, values in enumerate((first, second))
    ]
    means = draws[0].mean(axis=1) - draws[1].mean(axis=1)
    if n >= BOOTSTRAP_MIN_SEEDS and bootstrap > 0:
        low, high = expanded_percentiles(means, n)
    else:
        half = welch_half_width(first, second)
        low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    plain = np.percentile(means, [2.5, 97.5])
    return Difference(
        mean, low, high, share_above(means), shared_out_p(first, second, seed),
        (float(plain[0]), float(plain[1])), n, False,
    )  # fmt: skip


def welch_half_width(first: Floats, second: Floats) -> float:
    """Half of Welch's 95 % interval of a difference of means.

    The degrees of freedom (Welch 1947, Satterthwaite's form) are rounded down, which widens it.
    """
    squares = [float(values.var(ddof=1)) / len(values) for values in (first, second)]
    total = sum(squares)
    if total == 0.0:
        return 0.0
    degrees = total**2 / sum(
        square**2 / (len(values) - 1)
        for square, values in zip(squares, (first, second), strict=True)
    )
    return student_t(max(1, math.floor(degrees + ROUNDING))) * math.sqrt(total)


def share_above(means: Floats) -> float:
    """Share of values above 0; those at 0 count half."""
    above, ties = means > ROUNDING, np.abs(means) <= ROUNDING
    return float(above.mean() + ties.mean() / 2)


def sign_flip_p(differences: Floats, seed: int = 0) -> float:
    """Two-sided p-value of the paired sign-flip permutation test of a zero mean.

    With n pairs the smallest possible value is 2 / 2^n: .25 for three, .0625 for five.
    """
    n = len(differences)
    if 2**n <= ALL_PERMUTATIONS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(ALL_PERMUTATIONS, n))
        extra = 1
    sums = np.abs(signs @ differences)
    as_large = int((sums >= abs(float(differences.sum())) - ROUNDING).sum())
    return (as_large + extra) / (len(signs) + extra)


def shared_out_p(first: Floats, second: Floats, seed: int = 0) -> float:
    """Two-sided p-value of the permutation test of equal means: values shared out anew."""
    pool, n = np.concatenate([first, second]), len(first)
    if math.comb(len(pool), n) <= ALL_PERMUTATIONS:
        chosen = np.array(list(combinations(range(len(pool)), n)))
        extra = 0
    else:
        generator = np.random.default_rng(seed)
        chosen = generator.permuted(np.tile(np.arange(len(pool)), (ALL_PERMUTATIONS, 1)), axis=1)[
            :, :n
        ]
        extra = 1
    sums = pool[chosen].sum(axis=1)
    differences = np.abs(sums / n - (pool.sum() - sums) / len(second))
    observed = abs(float(first.mean() - second.mean()))
    return (int((differences >= observed - ROUNDING).sum()) + extra) / (len(chosen) + extra)
