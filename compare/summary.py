"""What a comparison says: one plain dict, written to NAME.json, from which all tables are drawn.

    summary["target"]     {"arm", "value"}: the ceiling that the others must reach
    summary["reference"]  the arm that the tables hold others against
    summary["equal_budget"]  {"device_s", "arm"}: the smallest mean total of device seconds that a
                          trained arm spent, and that arm; None where no arm recorded its cost
    summary["smoothing"], ["bootstrap"], ["interval"], ["command"], ["commit"], ["run_commits"],
    ["hardware"], ["evaluation"], ["versions"] ({package: [versions of the runs]})
    summary["comparable"] {"allowed": [settings that --allow let differ],
                          "differences": [{"setting", "kind", "values": {value as JSON text: [run
                          folders]}}]}: every setting that differs; without --allow there is none
    summary["cost"]       {"clock": "recorded" | "wall time" | "mixed", "notes": [...]}
    summary["arms"][arm]  below
    summary["curves"][arm][metric]  below
    summary["pairs"]      [{"arm", "other", "metric", "mean", "low", "high", "probability",
                          "n_pairs", "paired", "p_value", "bootstrap": [low, high] | None,
                          "per_seed"}]: arm minus other for every ordered pair of trained arms and
                          floor (of untrained ones, too), ceiling, auc, final, at_equal_budget

An arm has (means over seeds; None where a seed has no number):

    floor {part: ...}, ceiling, auc, final, search_rate_text, search_rate_image,
    steps_to_target, tokens_to_target, device_s_to_target (preparation included),
    preparation_device_s {part: s} (None: not recorded), training_device_s, at_equal_budget,
    by_group {group: {"floor", "ceiling", "n"}},
    stability {"collapses", "final_minus_best", "largest_drop", "ceiling_sd", "curve_sd",
               "zero_signal", "not_a_number"},
    seeds, is_trained, last_step, runs, reward_parts,
    intervals {name: [low, high]}, per_seed {name: [value or None a seed]}

with names `floor.accuracy`, `ceiling`, `GROUP.floor`, `GROUP.ceiling`, `stability.collapses` ...

A curve has, each list with one entry a point:

    steps, tokens, device_s   means over seeds; device_s with the preparation, None if unknown
    mean, low, high           of the smoothed curves, 95 %; one seed: low = high = mean
    per_seed                  one list a seed, raw (of "reward": smoothed)

The metrics are accuracy, searched, entity, passage, search_rate_text, search_rate_image,
calls_per_episode, tokens_per_episode, behaviour/{image_only,text_only,both,none}, stop/<reason>,
<group>/accuracy, and "reward", the training reward on a grid of its own (at most 200 points).
Those that a run lacks are left out. Numbers are means over seeds; docs/metrics.md defines them.
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
