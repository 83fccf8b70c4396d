"""What each run of an arm comes to: floor, ceiling, area, cost to the target, stability.

One number a seed under each name; `compare.summary` makes means and intervals of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from compare.cost import Cost
from compare.curves import (
    area_under_curve,
    ceiling_index,
    collapses,
    index_at_target,
    largest_drop,
    smooth,
    steps_to_target,
    value_at_cost,
)
from compare.runs import Run

FLOOR_PARTS = ("searched", "entity", "passage", "accuracy", "search_rate_text", "search_rate_image")
STABILITY = ("collapses", "final_minus_best", "largest_drop", "zero_signal", "not_a_number")
"""Measures of stability that every seed has; see `stability_of`."""
HEIGHTS = tuple(tenths / 10 for tenths in range(1, 10))
"""Accuracies that the speed of learning is told by: every tenth, so that none is picked."""
Numbers = dict[str, list[float | None]]
"""Name -> a value a seed; None: this seed has none."""
Recognition = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Arm -> `before` and `after` training -> seed -> share of seen places named right, no tools."""


def numbers_of(
    runs: list[Run],
    costs: list[Cost],
    target: float | None,
    budget_s: float | None,
    smoothing: int,
) -> Numbers:
    """All numbers of one arm.

    Args:
        runs: one a seed.
        costs: of the runs.
        target: accuracy to reach; None: there is no target.
        budget_s: device seconds at which all arms are compared; None: not known.
        smoothing: window in evaluations.
    """
    metrics = set.intersection(*(run.metrics() for run in runs))
    groups = groups_of(metrics)
    found: Numbers = {
        f"floor.{part}": [run.curve(part)[0] for run in runs]
        for part in FLOOR_PARTS
        if part in metrics
    }
    found |= {f"{group}.floor": [run.curve(f"{group}/accuracy")[0] for run in runs]
              for group in groups}  # fmt: skip
    if not runs[0].is_trained:
        return found
    found["ceiling"] = [at_ceiling(run, "accuracy", smoothing) for run in runs]
    found["auc"] = [area_under_curve(run.steps, run.curve("accuracy")) for run in runs]
    found["final"] = [smooth(run.curve("accuracy"), smoothing)[-1] for run in runs]
    for rate in ("search_rate_text", "search_rate_image"):
        if rate in metrics:
            found[rate] = [at_ceiling(run, rate, smoothing) for run in runs]
    for group in groups:
        found[f"{group}.ceiling"] = [
            at_ceiling(run, f"{group}/accuracy", smoothing) for run in runs
        ]
    found |= _costs_to_target(runs, costs, target, smoothing)
    found |= {height_name(height): steps_to_height(runs, height, smoothing) for height in HEIGHTS}
    found["training_device_s"] = [cost.device_s[-1] if cost.device_s else None for cost in costs]
    found["at_equal_budget"] = [
        None
        if budget_s is None or cost.total_s is None
        else value_at_cost(cost.total_s, run.curve("accuracy"), budget_s, smoothing)
        for run, cost in zip(runs, costs, strict=True)
    ]
    for run in runs:
        for name, value in stability_of(run, smoothing).items():
            found.setdefault(f"stability.{name}", []).append(value)
    return found


def height_name(height: float) -> str:
    """What the steps to an accuracy are called: `steps_to_0.4`."""
    return f"steps_to_{height:.1f}"


def steps_to_height(runs: list[Run], height: float, smoothing: int) -> list[float | None]:
    """Each run's first step with this smoothed accuracy; None for a run that has none."""
    return [steps_to_target(run.steps, run.curve("accuracy"), height, smoothing) for run in runs]


def _costs_to_target(
    runs: list[Run], costs: list[Cost], target: float | None, smoothing: int
) -> Numbers:
    """Steps, tokens and device seconds (preparation included) until the target is reached."""
    found: Numbers = {"steps_to_target": [], "tokens_to_target": [], "device_s_to_target": []}
    for run, cost in zip(runs, costs, strict=True):
        index = None
        if target is not None:
            index = index_at_target(run.curve("accuracy"), target, smoothing)
        spent = (run.steps, cost.tokens, cost.total_s)
        for name, values in zip(found, spent, strict=True):
            found[name].append(None if index is None or values is None else values[index])
    return found


def stability_of(run: Run, smoothing: int) -> dict[str, float | None]:
    """How steadily one run learned.

    collapses         how often the curve fell below half of its best (`compare.curves.collapses`)
    final_minus_best  last smoothed accuracy minus the ceiling
    largest_drop      largest fall of the smoothed curve below its best
    zero_signal       mean share of groups in which every episode earned the same
    not_a_number      share of training steps whose loss or reward was no number
    """
    curve = run.curve("accuracy")
    signals = [line.get("frac_reward_zero_std") for line in run.training]
    known = [float(value) for value in signals if value is not None]
    broken = [
        any(name in line and line[name] is None for name in ("loss", "reward"))
        for line in run.training
    ]
    return {
        "collapses": float(collapses(curve, smoothing)),
        "final_minus_best": smooth(curve, smoothing)[-1] - at_ceiling(run, "accuracy", smoothing),
        "largest_drop": largest_drop(curve, smoothing),
        "zero_signal": sum(known) / len(known) if known else None,
        "not_a_number": sum(broken) / len(broken) if broken else None,
    }


def groups_of(metrics: set[str]) -> list[str]:
    """Groups of questions that have an accuracy of their own: `kind/two`, `seen`, `unseen` ..."""
    return sorted(name.removesuffix("/accuracy") for name in metrics if name.endswith("/accuracy"))


def at_ceiling(run: Run, metric: str, smoothing: int) -> float:
    """The metric, smoothed, at the evaluation where the run's accuracy is best."""
    return smooth(run.curve(metric), smoothing)[ceiling_index(run.curve("accuracy"), smoothing)]
