"""Differences between arms: over the seeds that two arms share, one run minus the other.

Runs of one seed are asked the same questions and see their data in the same order, so that part of
what differs from seed to seed cancels. Arms that share no two seeds are compared unpaired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from compare.intervals import Difference, paired_difference, unpaired_difference
from compare.measures import HEIGHTS, height_name

STEPS = tuple(height_name(height) for height in HEIGHTS)
"""Differences of steps; all others are of shares."""
COMPARED = {
    "floor": "floor.accuracy",
    "floor.searched": "floor.searched",
    "floor.entity": "floor.entity",
    "floor.passage": "floor.passage",
    "ceiling": "ceiling",
    "auc": "auc",
    "final": "final",
    "at_equal_budget": "at_equal_budget",
    "recognition.after": "recognition.after",
    "recognition.change": "recognition.change",
    **{name: name for name in STEPS},
}
"""Name of a difference -> name of an arm's number."""

Values = Mapping[str, Sequence[float | None]]


def all_pairs(
    per_seed: Mapping[str, Values], seeds: Mapping[str, Sequence[int]], bootstrap: int
) -> list[dict[str, Any]]:
    """Every ordered pair of arms, in every number that both have.

    Args:
        per_seed: arm -> name -> a value a seed.
        seeds: arm -> its seeds, in the values' order.
        bootstrap: resamples.

    Returns:
        See `pairs` at the top of `compare.summary`; pairs in which a seed has no value are left
        out.
    """
    found = []
    for arm, other in combinations(per_seed, 2):
        for name, key in COMPARED.items():
            one, two = per_seed[arm].get(key), per_seed[other].get(key)
            if not one or not two:
                continue
            values = dict(zip(seeds[arm], one, strict=True))
            others = dict(zip(seeds[other], two, strict=True))
            if name.startswith("floor") and len({*one}) == len({*two}) == 1:
                # One start, asked the same questions greedily: each seed repeats one measurement.
                shared = [seed for seed in values if seed in others][:1]
                values, others = ({seed: v[seed] for seed in shared} for v in (values, others))
                if not shared:
                    continue
            bounds = None if name in STEPS else (-1.0, 1.0)
            difference, differences = compare_arms(values, others, bootstrap, bounds=bounds)
            if difference is None:
                continue
            found.append(_entry(arm, other, name, difference, differences))
            mirrored = [-value for value in differences]
            found.append(_entry(other, arm, name, difference.mirrored(), mirrored))
    order = {pair: i for i, pair in enumerate((a, b) for a in per_seed for b in per_seed)}
    return sorted(found, key=lambda entry: order[entry["arm"], entry["other"]])


def compare_arms(
    one: Mapping[int, float | None],
    other: Mapping[int, float | None],
    bootstrap: int,
    *,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
) -> tuple[Difference | None, list[float]]:
    """One arm minus another, paired where they share seeds.

    Args:
        one: seed -> value.
        other: likewise.
        bootstrap: resamples.
        bounds: to which the interval is cut; None for values that are no shares.

    Returns:
        The difference, and those of single seeds (none where unpaired). No difference where a
        value is missing: without the seeds that failed it would flatter.
    """
    shared = [seed for seed in one if seed in other]
    # one shared seed of several on both sides says less than all seeds unpaired
    is_paired = len(shared) >= min(2, len(one), len(other))
    if is_paired:
        firsts, seconds = [one[s] for s in shared], [other[s] for s in shared]
    else:
        firsts, seconds = list(one.values()), list(other.values())
    first = [value for value in firsts if value is not None]
    second = [value for value in seconds if value is not None]
    if len(first) < len(firsts) or len(second) < len(seconds):
        return None, []
    if is_paired:
        differences = [a - b for a, b in zip(first, second, strict=True)]
        return paired_difference(first, second, bootstrap=bootstrap, bounds=bounds), differences
    return unpaired_difference(first, second, bootstrap=bootstrap, bounds=bounds), []


def _entry(
    arm: str, other: str, metric: str, found: Difference, differences: list[float]
) -> dict[str, Any]:
    return {
        "arm": arm,
        "other": other,
        "metric": metric,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "probability": found.probability,
        "p_value": found.p_value,
        "bootstrap": list(found.bootstrap) if found.bootstrap else None,
        "n_pairs": found.n,
        "paired": found.is_paired,
        "per_seed": differences,
    }
