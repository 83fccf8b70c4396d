"""What a comparison says about each arm: floor, ceiling, area, steps to target, search rates,
groups.

Numbers are means over seeds; `intervals` holds their 95 % limits and `per_seed` what they were made
from.
"""

from __future__ import annotations

from typing import Any

from compare.curves import (
    Estimate,
    area_under_curve,
    ceiling_index,
    interval,
    smooth,
    steps_to_target,
)
from compare.runs import Run

FLOOR_PARTS = ("searched", "entity", "passage", "accuracy", "search_rate_text", "search_rate_image")


def summarise(
    arms: dict[str, list[Run]],
    *,
    target_arm: str = "vlm",
    smoothing: int = 3,
    bootstrap: int = 2000,
) -> dict[str, Any]:
    """Floor, ceiling, area and steps to target of every arm, with intervals over its seeds.

    Args:
        arms: runs by arm, as `group_runs` gives them; already checked to be comparable.
        target_arm: its ceiling (mean over seeds) is what `steps_to_target` asks for.
        smoothing: window in evaluations.
        bootstrap: resamples of the intervals (used from five seeds on).

    Returns:
        `{"target": {"arm", "value"}, "arms": {arm: {...}}}`; where an arm has no training run its
        ceiling, auc and steps_to_target are None.
    """
    target = None
    target_runs = arms.get(target_arm, [])
    if target_runs and target_runs[0].is_trained:
        ceilings = [_at_ceiling(run, "accuracy", smoothing) for run in target_runs]
        target = sum(ceilings) / len(ceilings)
    summary: dict[str, Any] = {"target": {"arm": target_arm, "value": target}, "arms": {}}
    for arm, runs in arms.items():
        summary["arms"][arm] = _summarise_arm(runs, target, smoothing, bootstrap)
    return summary


def _summarise_arm(
    runs: list[Run], target: float | None, smoothing: int, bootstrap: int
) -> dict[str, Any]:
    is_trained = runs[0].is_trained
    metrics = set.intersection(*(run.metrics() for run in runs))
    per_seed: dict[str, list[float | None]] = {}
    for part in FLOOR_PARTS:
        if part in metrics:
            per_seed[f"floor.{part}"] = [run.curve(part)[0] for run in runs]
    groups = sorted(
        metric.removesuffix("/accuracy") for metric in metrics if metric.endswith("/accuracy")
    )
    for group in groups:
        per_seed[f"{group}.floor"] = [run.curve(f"{group}/accuracy")[0] for run in runs]
    if is_trained:
        per_seed["ceiling"] = [_at_ceiling(run, "accuracy", smoothing) for run in runs]
        per_seed["auc"] = [area_under_curve(run.steps, run.curve("accuracy")) for run in runs]
        for rate in ("search_rate_text", "search_rate_image"):
            if rate in metrics:
                per_seed[rate] = [_at_ceiling(run, rate, smoothing) for run in runs]
        for group in groups:
            per_seed[f"{group}.ceiling"] = [
                _at_ceiling(run, f"{group}/accuracy", smoothing) for run in runs
            ]
        per_seed["steps_to_target"] = [
            None
            if target is None
            else steps_to_target(run.steps, run.curve("accuracy"), target, smoothing)
            for run in runs
        ]
    estimates = {key: _estimate(key, values, bootstrap) for key, values in per_seed.items()}
    means = {key: estimate.mean if estimate else None for key, estimate in estimates.items()}
    rate_prefix = "" if is_trained else "floor."
    return {
        "floor": {part: means.get(f"floor.{part}") for part in FLOOR_PARTS},
        "ceiling": means.get("ceiling"),
        "auc": means.get("auc"),
        "steps_to_target": means.get("steps_to_target"),
        "search_rate_text": means.get(f"{rate_prefix}search_rate_text"),
        "search_rate_image": means.get(f"{rate_prefix}search_rate_image"),
        "seeds": [run.seed for run in runs],
        "is_trained": is_trained,
        "last_step": runs[0].steps[-1],
        "by_group": {
            group: {"floor": means[f"{group}.floor"], "ceiling": means.get(f"{group}.ceiling")}
            for group in groups
        },
        "intervals": {
            key: [estimate.low, estimate.high]
            for key, estimate in estimates.items()
            if estimate and estimate.low is not None
        },
        "per_seed": per_seed,
        "runs": [str(run.folder) for run in runs],
    }


def _estimate(key: str, values: list[float | None], bootstrap: int) -> Estimate | None:
    # A seed that never reached the target has no number, and a mean of the others would flatter the
    # arm.
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    bounds = (0.0, float("inf")) if key == "steps_to_target" else (0.0, 1.0)
    return interval(numbers, bootstrap=bootstrap, bounds=bounds)


def _at_ceiling(run: Run, metric: str, smoothing: int) -> float:
    """The metric, smoothed, at the evaluation where the run's accuracy is best."""
    return smooth(run.curve(metric), smoothing)[ceiling_index(run.curve("accuracy"), smoothing)]
