"""The figures of merge.json: counts of single tensors, added up and turned into shares."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from merge.methods import Statistics
from merge.plan import COPIES, MergePlan


def total_figures(plan: MergePlan, counts: Mapping[str, Statistics]) -> dict[str, Any]:
    """Returns the figures over all merged tensors, and how many were merged and copied."""
    n_copied = sum(tensor.action in COPIES for tensor in plan.tensors)
    return {
        "tensors_merged": len(plan.tensors) - n_copied,
        "tensors_copied": n_copied,
        **figures(_add_up(counts.values())),
    }


def group_figures(plan: MergePlan, counts: Mapping[str, Statistics]) -> dict[str, Any]:
    """Returns the figures over each group of tensors that had any merged."""
    group_of = {tensor.name: tensor.group for tensor in plan.tensors}
    groups = sorted({group_of[name] for name in counts})
    return {
        group: figures(_add_up(c for name, c in counts.items() if group_of[name] == group))
        for group in groups
    }


def figures(count: Statistics) -> dict[str, Any]:
    """Turns the counts that a method returns into the shares and norms of merge.json."""
    entries, conflicts = count["entries"], count["conflicts"]
    won = count["conflicts_won"]
    return {
        "entries": entries,
        "density": {task: n / max(entries, 1) for task, n in count["kept"].items()},
        "conflicts": conflicts,
        "conflicts_won": {task: n / max(conflicts, 1) for task, n in won.items()},
        "delta_norm": {task: math.sqrt(square) for task, square in count["delta_square"].items()},
        "update_norm": math.sqrt(count["update_square"]),
    }


def _add_up(counts: Iterable[Statistics]) -> Statistics:
    counts = list(counts)
    total: Statistics = {
        "entries": sum(count["entries"] for count in counts),
        "conflicts": sum(count["conflicts"] for count in counts),
        "update_square": math.fsum(count["update_square"] for count in counts),
    }
    for key in ("kept", "conflicts_won", "delta_square"):
        tasks = counts[0][key] if counts else ()
        total[key] = {task: math.fsum(count[key][task] for count in counts) for task in tasks}
    return total
