"""Checks of settings and statistics that a merge makes before anything is written."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import EMBEDDING
from merge.methods import (
    BUDGETS,
    COMBINATIONS,
    METHODS,
    NORMALIZATIONS,
    SALIENCIES,
    MethodSettings,
)
from merge.plan import MergePlan, PlannedTensor
from merge.stats import Stats, open_stats

STATISTICS = {"fisher": "fisher", "gram": "gram"}
"""What a method needs -> kind of statistics; a vector is of the kind that `saliency` names."""


def make_settings(
    weights: Mapping[str, float] | None, options: Mapping[str, Any]
) -> MethodSettings:
    """Returns the settings of all methods.

    Args:
        weights: Task -> weight; None for those of the method.
        options: The other fields of `MethodSettings`.

    Raises:
        MergeError: An unknown field, or a value out of its range.
    """
    weights = dict(weights or {})
    for task, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise MergeError(f"merge.weights.{task}: {weight!r} is not a finite number")
    try:
        settings = MethodSettings(weights=weights, **options)
    except TypeError as error:
        raise MergeError(
            f"merge: {error}; the settings are the fields of MethodSettings"
        ) from error
    for key in ("density", "window", "outliers", "shrink"):
        value = getattr(settings, key)
        if not 0.0 <= value <= 1.0:
            raise MergeError(f"merge.{key}: {value} is not between 0 and 1")
    for key, allowed in (
        ("normalization", NORMALIZATIONS),
        ("combine", COMBINATIONS),
        ("saliency", SALIENCIES),
        ("budget", BUDGETS),
    ):
        value = getattr(settings, key)
        if value not in allowed:
            raise MergeError(f"merge.{key}: {value!r} is unknown; choose {', '.join(allowed)}")
    return settings


def check_methods(plan: MergePlan) -> None:
    """Checks what a method asks of its settings, tensor by tensor, since rules may change them.

    Raises:
        MergeError: Probabilities of `della` beyond 0 or 1.
    """
    for tensor in plan.tensors:
        settings = tensor.settings
        low, high = settings.density - settings.window, settings.density + settings.window
        if tensor.action == "della" and (low < 0 or high > 1):
            raise MergeError(
                f"merge.window: della keeps entries of {tensor.canonical} with probabilities from "
                f"density - window to density + window, here {low:g} to {high:g}; they must lie "
                "between 0 and 1"
            )


def kind_needed(tensor: PlannedTensor) -> str | None:
    """Returns the kind of statistics that a tensor's method reads; None for none."""
    method = METHODS.get(tensor.action)
    if method is None or method.needs is None:
        return None
    if method.needs == "vector":
        # RegMean's diagonal is that of the Gram matrix itself
        return tensor.settings.saliency if tensor.action == "obm" else "diagonal"
    return STATISTICS[method.needs]


def open_statistics(
    stats: Mapping[str, str | Path] | None, plan: MergePlan, parents: Mapping[str, Checkpoint]
) -> dict[tuple[str, str], Stats]:
    """Opens (task, kind) -> statistics, and checks that they cover every tensor that needs them."""
    needed = [(tensor, kind) for tensor in plan.tensors if (kind := kind_needed(tensor))]
    opened: dict[tuple[str, str], Stats] = {}
    for tensor, kind in needed:
        for task in (role for role in parents if role != "base"):
            if task not in (stats or {}):
                raise MergeError(
                    f"merge.method={tensor.action} needs {kind} statistics of {task}; run "
                    f"`obm calibrate calibration.kinds=[{kind}]` first, or choose "
                    "merge.method=task_arithmetic"
                )
            key = (task, kind)
            if key not in opened:
                opened[key] = open_stats((stats or {})[task], kind)
            found = opened[key].shape_of(tensor.canonical)
            n_inputs = tensor.shape[-1:]
            expected = {"fisher": tensor.shape, "gram": n_inputs * 2}.get(kind, n_inputs)
            if found is None and kind == "fisher" and tensor.group == EMBEDDING:
                raise MergeError(
                    f"{opened[key].path}: has nothing for {tensor.canonical}, as `obm calibrate` "
                    f"measures no Fisher information of embeddings; {tensor.action} cannot merge "
                    "them: choose merge.scope.embedding=vlm or task_arithmetic"
                )
            if found != expected:
                raise MergeError(
                    f"{opened[key].path}: has {'nothing' if found is None else list(found)} for "
                    f"{tensor.canonical}, needed is {list(expected)}; calibrate again with this "
                    "checkpoint"
                )
    return opened


def check_first_weights(
    plan: MergePlan,
    parents: Mapping[str, Checkpoint],
    statistics: Mapping[tuple[str, str], Stats],
) -> None:
    """Compares one tensor's checksum before anything is written; the others follow on the way."""
    for (task, kind), stats in statistics.items():
        for tensor in plan.tensors:
            if kind_needed(tensor) == kind and tensor.canonical in stats.weights:
                checksum = parents[task].checksum(tensor.sources[task])
                check_weights(tensor, task, stats, checksum, parents[task])
                break


def check_weights(
    tensor: PlannedTensor, task: str, stats: Stats, checksum: str, parent: Checkpoint
) -> None:
    """Checks that statistics were made with the weights that are merged.

    Args:
        tensor: The tensor whose checksum it is.
        task: Role of the parent.
        stats: Its statistics.
        checksum: Of the parent's tensor, as `Checkpoint.checksum` makes it.
        parent: The checkpoint, for the message.

    Raises:
        MergeError: They were made with others.
    """
    expected = stats.weights.get(tensor.canonical, checksum)
    if expected != checksum:
        raise MergeError(
            f"{stats.path}: was made with other weights than {task} {parent.source} "
            f"({tensor.canonical} differs); calibrate again, or check that the checkpoint is sound"
        )
