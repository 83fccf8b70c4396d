"""The content of merge.json: what went in, what was done to every tensor, and figures."""

import importlib.metadata
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash

from merge.checkpoint import Checkpoint
from merge.methods import METHODS, MethodSettings
from merge.plan import MergePlan
from merge.stats import Stats

SCHEMA_VERSION = 3

Counted = Mapping[str, Any]
"""Counts of one tensor: entries, kept, conflicts, conflicts_won, delta_square, update_square; where
the method weighs entries by saliency also saliency and saliency_kept."""


def make_record(
    plan: MergePlan,
    parents: Mapping[str, Checkpoint],
    statistics: Mapping[tuple[str, str], Stats],
    entries: Mapping[str, Mapping[str, Any]],
    method: str,
    settings: MethodSettings,
    actions: Mapping[str, str],
) -> dict[str, Any]:
    """Puts merge.json together.

    Args:
        plan: What was merged.
        parents: Role -> checkpoint.
        statistics: (task, kind) -> statistics that were used.
        entries: Name of a tensor -> the journal's entry.
        method: The merge's method.
        settings: The merge's settings.
        actions: The resolved scope.
    """
    tensors = {}
    for tensor in plan.tensors:
        entry = entries[tensor.name]
        tensors[tensor.name] = {
            "group": tensor.group,
            "action": tensor.action,
            "reason": tensor.reason,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "checksum": entry["checksum"],
            "inputs": entry["inputs"],
            **(figures(entry["counts"]) if "counts" in entry else {}),
        }
    counts = {name: entry["counts"] for name, entry in entries.items() if "counts" in entry}
    ordered = {t.name: counts[t.name] for t in plan.tensors if t.name in counts}
    recipe = asdict(settings)
    del recipe["tensor_name"]
    tasks = [role for role in parents if role != "base"]
    recipe["weights"] = {task: settings.weights.get(task, 1.0) for task in tasks}
    return {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "settings": {**recipe, "scope": dict(actions)},
        "parents": {
            role: {
                "source": parent.source,
                "revision": parent.revision,
                "checksum": _parent_checksum(role, tensors),
                "files": {file.path.name: file.path.stat().st_size for file in parent.files},
            }
            for role, parent in parents.items()
        },
        "stats": {
            f"{task}/{kind}": {
                **{k: v for k, v in stats.metadata.items() if k not in ("weights", "aliases")},
                "source": str(stats.path),
            }
            for (task, kind), stats in statistics.items()
        },
        "totals": total_figures(plan, ordered),
        "groups": group_figures(plan, ordered),
        "unused": [list(entry) for entry in plan.unused],
        "notes": list(plan.notes),
        "tensors": tensors,
        "versions": {"obm-warmstart": package_version(), "numpy": np.__version__},
    }


def _parent_checksum(role: str, tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """xxh3_128 of the lines `<checksum>  <tensor>` of all tensors that were read of a parent."""
    lines = [
        f"{tensor['inputs'][role]}  {name}\n"
        for name, tensor in sorted(tensors.items())
        if role in tensor["inputs"]
    ]
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def total_figures(plan: MergePlan, counts: Mapping[str, Counted]) -> dict[str, Any]:
    """Returns the figures over all merged tensors, and how many were merged and copied."""
    n_copied = sum(tensor.action not in METHODS for tensor in plan.tensors)
    return {
        "tensors_merged": len(plan.tensors) - n_copied,
        "tensors_copied": n_copied,
        **figures(_add_up(counts.values())),
    }


def group_figures(plan: MergePlan, counts: Mapping[str, Counted]) -> dict[str, Any]:
    """Returns the figures over each group of tensors that had any merged."""
    group_of = {tensor.name: tensor.group for tensor in plan.tensors}
    groups = sorted({group_of[name] for name in counts})
    return {
        group: figures(_add_up(c for name, c in counts.items() if group_of[name] == group))
        for group in groups
    }


def figures(count: Counted) -> dict[str, Any]:
    """Turns counts into the shares and norms of merge.json.

    Norms are rounded to six digits and saliencies to four: further ones depend on the order of
    summing. `saliency_kept` is the share of a task's saliency that its kept entries have.
    """
    entries, conflicts = count["entries"], count["conflicts"]
    won = count["conflicts_won"]
    return {
        "entries": entries,
        "density": {task: n / max(entries, 1) for task, n in count["kept"].items()},
        "conflicts": conflicts,
        "conflicts_won": {task: n / max(conflicts, 1) for task, n in won.items()},
        "delta_norm": {task: _norm(square) for task, square in count["delta_square"].items()},
        "update_norm": _norm(count["update_square"]),
        **(_saliency_figures(count) if "saliency" in count else {}),
    }


def _saliency_figures(count: Counted) -> dict[str, Any]:
    kept = count["saliency_kept"]
    return {
        "saliency": {task: _rounded(total) for task, total in count["saliency"].items()},
        "saliency_kept": {
            task: _rounded(kept[task] / total if total > 0 else 0.0)
            for task, total in count["saliency"].items()
        },
    }


def _rounded(value: float) -> float | None:
    """Four digits; None for a sum beyond fp32, which JSON has no number for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _add_up(counts: Iterable[Counted]) -> Counted:
    counts = list(counts)
    total: dict[str, Any] = {
        "entries": sum(count["entries"] for count in counts),
        "conflicts": sum(count["conflicts"] for count in counts),
        "update_square": math.fsum(count["update_square"] for count in counts),
    }
    keys = ["kept", "conflicts_won", "delta_square"]
    # tensors without saliency would be missing in a sum over all
    if counts and all("saliency" in count for count in counts):
        keys += ["saliency", "saliency_kept"]
    for key in keys:
        tasks = counts[0][key] if counts else ()
        total[key] = {task: math.fsum(count[key][task] for count in counts) for task in tasks}
    return total


def _norm(square: float) -> float:
    return float(f"{math.sqrt(square):.6g}")


def package_version() -> str:
    """Version of this package, for records."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("obm-warmstart")
    return "not installed"
