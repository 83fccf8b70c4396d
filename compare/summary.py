"""What a comparison says: one plain dict, written to NAME.json, from which all tables are drawn.

    summary["target"]     {"arm", "value"}: the ceiling that the others must reach. Where it is less
                          than one question right, every start is there at once: `value` is then the
                          highest tenth that all runs of the reference reach (None: there is none),
                          and `ceiling` what was too low
    summary["reference"]  the arm that the tables hold others against
    summary["equal_budget"]  {"device_s", "arm", "cheaper"}: the mean total of device seconds that
                          an arm spent (the one asked for, else the cheapest trained one), and that
                          arm; None where it recorded no cost. `cheaper` {arm: mean total} are
                          those that ended before they had spent as much
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
                          floor (of untrained ones, too), ceiling, auc, final, at_equal_budget,
                          recognition.after, recognition.change, steps_to_0.1 ... steps_to_0.9

An arm has (means over seeds; None where a seed has no number):

    floor {part: ...}, ceiling, auc, final, search_rate_text, search_rate_image,
    steps_to_target, tokens_to_target, device_s_to_target (preparation included),
    steps_to_0.1 ... steps_to_0.9 (those that a run of any arm reaches),
    preparation_device_s {part: s} (None: not recorded), training_device_s, at_equal_budget,
    recognition {"before", "after", "change"} (where it was measured),
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

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compare.cost import RECORDED, WALL, Cost, cost_of
from compare.curves import smooth
from compare.intervals import ROUNDING, Estimate, interval
from compare.measures import (
    FLOOR_PARTS,
    HEIGHTS,
    STABILITY,
    Numbers,
    Recognition,
    at_ceiling,
    groups_of,
    height_name,
    numbers_of,
    steps_to_height,
)
from compare.pairs import all_pairs
from compare.runs import Run
from compare.series import curves_of

OPEN_ENDED = (
    "steps_to_target", "tokens_to_target", "device_s_to_target", "training_device_s",
    "stability.collapses", *(height_name(height) for height in HEIGHTS),
)  # fmt: skip
"""Numbers that are no shares: their intervals are cut at 0 only."""
WHEN = ("before", "after", "change")


def summarise(
    arms: dict[str, list[Run]],
    *,
    target_arm: str = "vlm",
    smoothing: int = 3,
    bootstrap: int = 2000,
    reference: str | None = None,
    budget_arm: str | None = None,
    recognition: Recognition | None = None,
) -> dict[str, Any]:
    """Everything about every arm, with intervals over its seeds, and all pairs of arms.

    Args:
        arms: runs by arm, as `group_runs` gives them; already checked to be comparable.
        target_arm: its ceiling (mean over seeds) is what the costs to the target ask for, where it
            says anything.
        smoothing: window in evaluations.
        bootstrap: resamples of the intervals and probabilities.
        reference: the arm that the tables hold others against; where None `obm`, else the first.
        budget_arm: trained arm whose mean total is the equal budget; None: the cheapest. Where it
            is not among the arms, nothing is read at an equal budget.
        recognition: measured before and after training; arms and seeds without a run are left out.

    Returns:
        See the top of this file: `target`, `reference`, `equal_budget`, `cost`, `arms`, `pairs` and
        `curves`. Where an arm has no training run its ceiling and what follows from it are None.
    """
    reference = reference or ("obm" if "obm" in arms else next(iter(arms)))
    target = _target(arms, target_arm, arms.get(reference, []), smoothing)
    costs = {arm: [cost_of(run) for run in runs] for arm, runs in arms.items()}
    trained = {arm: costs[arm] for arm, runs in arms.items() if runs[0].is_trained}
    budget = _equal_budget(trained, budget_arm)
    budget_s = budget["device_s"] if budget else None
    per_seed = {
        arm: numbers_of(runs, costs[arm], target["value"], budget_s, smoothing)
        for arm, runs in arms.items()
    }
    for height in map(height_name, HEIGHTS):  # a height that no run reaches tells nothing
        if all(value is None for found in per_seed.values() for value in found.get(height, [])):
            per_seed = {arm: {k: v for k, v in found.items() if k != height}
                        for arm, found in per_seed.items()}  # fmt: skip
    for arm, measured in (recognition or {}).items():
        if arm in arms:
            per_seed[arm] |= _recognition(measured, [run.seed for run in arms[arm]])
    return {
        "target": target,
        "reference": reference,
        "equal_budget": budget,
        "cost": _cost_notes(arms, costs),
        "arms": {
            arm: _summarise_arm(runs, costs[arm], per_seed[arm], smoothing, bootstrap)
            for arm, runs in arms.items()
        },
        "pairs": all_pairs(
            per_seed, {arm: [run.seed for run in runs] for arm, runs in arms.items()}, bootstrap
        ),
        "curves": {
            arm: curves_of(runs, costs[arm], smoothing, bootstrap) for arm, runs in arms.items()
        },
    }


def _target(
    arms: Mapping[str, list[Run]], arm: str, reference: list[Run], smoothing: int
) -> dict[str, Any]:
    """The ceiling to reach, or a height in its place; see `target` at the top of this file."""
    runs = arms.get(arm, [])
    if not runs or not runs[0].is_trained:
        return {"arm": arm, "value": None}
    ceilings = [at_ceiling(run, "accuracy", smoothing) for run in runs]
    value = sum(ceilings) / len(ceilings)
    n_questions = runs[0].evaluations[0].get("n")
    # 1/49 * 49 is a little less than 1 in floats
    if value > 0 and (n_questions is None or value * n_questions >= 1 - ROUNDING):
        return {"arm": arm, "value": value}
    reached = [
        height for height in HEIGHTS
        if reference and None not in steps_to_height(reference, height, smoothing)
    ]  # fmt: skip
    return {"arm": arm, "value": max(reached, default=None), "ceiling": value}


def _summarise_arm(
    runs: list[Run], costs: list[Cost], per_seed: Numbers, smoothing: int, bootstrap: int
) -> dict[str, Any]:
    is_trained = runs[0].is_trained
    metrics = set.intersection(*(run.metrics() for run in runs))
    estimates = {key: _estimate(key, values, bootstrap) for key, values in per_seed.items()}
    means = {key: estimate.mean if estimate else None for key, estimate in estimates.items()}
    rate_prefix = "" if is_trained else "floor."
    return {
        "floor": {part: means.get(f"floor.{part}") for part in FLOOR_PARTS},
        **{key: means.get(key) for key in (
            "ceiling", "auc", "final", "steps_to_target", "tokens_to_target", "device_s_to_target",
            "training_device_s", "at_equal_budget",
        )},
        **{name: means[name] for name in map(height_name, HEIGHTS) if name in means},
        **({"recognition": {when: means[f"recognition.{when}"] for when in WHEN}}
           if "recognition.change" in means else {}),
        "preparation_device_s": _mean_parts(costs) if is_trained else None,
        "search_rate_text": means.get(f"{rate_prefix}search_rate_text"),
        "search_rate_image": means.get(f"{rate_prefix}search_rate_image"),
        "seeds": [run.seed for run in runs],
        "is_trained": is_trained,
        "last_step": runs[0].steps[-1],
        "stability": {
            **{name: means.get(f"stability.{name}") for name in STABILITY},
            **_between_seeds(runs, per_seed, smoothing),
        },
        "by_group": {
            group: {
                "floor": means[f"{group}.floor"],
                "ceiling": means.get(f"{group}.ceiling"),
                "n": _group_size(runs, group),
            }
            for group in groups_of(metrics)
        },
        "intervals": {
            key: [estimate.low, estimate.high]
            for key, estimate in estimates.items()
            if estimate and estimate.low is not None
        },
        "per_seed": per_seed,
        "runs": [str(run.folder) for run in runs],
    }  # fmt: skip


def _between_seeds(runs: list[Run], per_seed: Numbers, smoothing: int) -> dict[str, float | None]:
    """How much seeds differ: deviation of the ceiling, and of the smoothed curve, mean over it."""
    ceilings = per_seed.get("ceiling")
    if ceilings is None or len(runs) < 2:
        return {"ceiling_sd": None, "curve_sd": None}
    curves = np.array([smooth(run.curve("accuracy"), smoothing) for run in runs])
    return {
        "ceiling_sd": float(np.std(np.array(ceilings, dtype=np.float64), ddof=1)),
        "curve_sd": float(curves.std(axis=0, ddof=1).mean()),
    }


def _group_size(runs: list[Run], group: str) -> float | None:
    sizes = [run.evaluations[0].get(f"{group}/n") for run in runs]
    known = [float(size) for size in sizes if size is not None]
    return sum(known) / len(known) if known else None


def _recognition(measured: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> Numbers:
    """Before and after training, and the change, of each run."""
    before, after = ([measured[when].get(seed) for seed in seeds] for when in WHEN[:2])
    changes: list[float | None] = [
        None if one is None or two is None else two - one
        for one, two in zip(before, after, strict=True)
    ]
    values = (before, after, changes)
    return {f"recognition.{when}": value for when, value in zip(WHEN, values, strict=True)}


def _equal_budget(costs: dict[str, list[Cost]], arm: str | None) -> dict[str, Any] | None:
    """The mean total of an arm; without one the smallest, which every arm has spent on average."""
    totals = {
        arm: sum(cost.total_s[-1] for cost in members if cost.total_s) / len(members)
        for arm, members in costs.items()
        if all(cost.total_s for cost in members)
    }
    if not totals or (arm is not None and arm not in totals):
        return None
    arm = arm or min(totals, key=lambda name: totals[name])
    budget = totals[arm]
    cheaper = {name: total for name, total in totals.items() if total < budget}
    return {"device_s": budget, "arm": arm, "cheaper": cheaper}


def _mean_parts(costs: Sequence[Cost]) -> dict[str, float] | None:
    known = [cost.preparation for cost in costs if cost.preparation is not None]
    if len(known) < len(costs):
        return None
    parts = dict.fromkeys(part for one in known for part in one)
    return {part: sum(one.get(part, 0.0) for one in known) / len(known) for part in parts}


def _cost_notes(arms: dict[str, list[Run]], costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Which clock counted the device seconds, and what is missing, by arm."""
    trained = {arm: costs[arm] for arm, runs in arms.items() if runs[0].is_trained}
    clocks = {cost.clock for members in trained.values() for cost in members}
    notes = [
        f"{arm}: {note}"
        for arm, members in trained.items()
        for note in dict.fromkeys(cost.note for cost in members if cost.note)
    ]
    if clocks == {RECORDED, WALL}:
        notes.append("device seconds of some runs are wall time, of others recorded: hold none "
                     "against the other")  # fmt: skip
    clock = "mixed" if len(clocks) > 1 else next(iter(clocks), RECORDED)
    return {"clock": clock, "notes": notes}


def _estimate(key: str, values: list[float | None], bootstrap: int) -> Estimate | None:
    # A seed that never reached the target has no number, and a mean of the others would flatter the
    # arm.
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    bounds = (0.0, 1.0)
    if key in OPEN_ENDED:
        bounds = (0.0, math.inf)
    elif key == "stability.final_minus_best":
        bounds = (-1.0, 0.0)
    elif key == "recognition.change":
        bounds = (-1.0, 1.0)
    return interval(numbers, bootstrap=bootstrap, bounds=bounds)
