"""Thresholds over more than one tensor: a density for each decoder layer, or for the whole model.

Two passes over the files find the exact k-th value among all tensors that share a budget: leading
bits first, then the trailing bits of the one bin where it lies. Only histograms are kept. Entries
that tie at the threshold are kept from the first tensor on, in the order of the VLM's files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from types import ModuleType
from typing import Any

import numpy as np

from merge.errors import MergeError
from merge.families import layer_of
from merge.kernels import ALL_TIES, N_LEADING, N_TRAILING
from merge.methods import METHODS
from merge.plan import PlannedTensor
from merge.reader import TensorReader
from merge.selection import (
    Cut,
    count_level,
    find_bins,
    find_cut,
    require_same_scores,
    share_of,
)

WithReader = Callable[[PlannedTensor, Callable[[TensorReader], object]], object]
"""Opens a reader on a tensor with a worker's buffers, and hands it to a function."""
Trailing = list[tuple[np.ndarray, np.ndarray]]
"""A tensor's counts of trailing bits, a task each: (bits that occur, how often)."""


def group_budgets(
    tensors: Iterable[PlannedTensor],
) -> dict[tuple[object, ...], list[PlannedTensor]]:
    """Groups the tensors that share a budget; those with a budget of their own are left out.

    Raises:
        MergeError: A method that has no single threshold for every task.
    """
    groups: dict[tuple[object, ...], list[PlannedTensor]] = {}
    for tensor in tensors:
        rule_of = METHODS[tensor.action].rule if tensor.action in METHODS else None
        if rule_of is None or tensor.settings.budget == "tensor":
            continue
        rule = rule_of(tensor.settings)
        if not METHODS[tensor.action].is_sparse:
            continue
        if rule.keep != "top" or rule.arbitrate:
            raise MergeError(
                f"merge.budget={tensor.settings.budget}: {tensor.action} chooses its entries "
                "tensor by tensor; use merge.budget=tensor, or obm or ties"
            )
        layer = layer_of(tensor.canonical) if tensor.settings.budget == "layer" else "all"
        key = (tensor.action, tensor.settings.density, tensor.settings.saliency, layer)
        groups.setdefault(key, []).append(tensor)
    return groups


def find_shared_cuts(
    group: Sequence[PlannedTensor],
    with_reader: WithReader,
    kernels: ModuleType,
    executor: Executor,
    threads: int,
) -> dict[str, list[Cut]]:
    """Finds the cuts of tensors that share a budget.

    Args:
        group: Tensors with the same method and density.
        with_reader: Opens a reader.
        kernels: Module of kernels.
        executor: Workers.
        threads: How many they are.

    Returns:
        Name of the tensor -> cut of each task.
    """
    first = group[0]
    rule_of = METHODS[first.action].rule
    assert rule_of is not None
    score = rule_of(first.settings).score
    n_tasks = len(first.sources) - 1
    leading, n_entries = np.zeros((n_tasks, N_LEADING), np.int64), 0

    def count(tensor: PlannedTensor) -> tuple[np.ndarray, int]:
        result: list[tuple[np.ndarray, int]] = []

        def use(reader: TensorReader) -> None:
            level = count_level(reader.pieces, score, n_tasks, kernels)
            result.append((level.leading, level.n_entries))

        with_reader(tensor, use)
        return result[0]

    for counts, n in _bounded(executor, count, group, 2 * threads):
        leading += counts
        n_entries += n
    n_wanted = [share_of(first.settings.density, n_entries)] * n_tasks
    bins, remaining = find_bins(leading, n_wanted)

    def refine(tensor: PlannedTensor) -> Trailing:
        trailing = np.zeros((n_tasks, N_TRAILING), np.int64)

        def use(reader: TensorReader) -> None:
            for piece in reader.pieces():
                kernels.refine(piece, score, bins, trailing)

        with_reader(tensor, use)
        # only the bits that occur: few where the weights are bf16, up to all of them for saliencies
        return [(found := np.flatnonzero(row), row[found]) for row in trailing]

    fine: list[Trailing] = []
    if bool((bins >= 0).any()):
        fine = list(_bounded(executor, refine, group, 2 * threads))
    total = np.zeros((n_tasks, N_TRAILING), np.int64)
    for tensor_counts in fine:
        for k, (bits, counts) in enumerate(tensor_counts):
            total[k, bits] += counts
    require_same_scores(leading, bins, total, f"{first.name} to {group[-1].name}")
    n_changed = leading.sum(axis=1)
    cuts = [
        find_cut(int(n_changed[k]), n_wanted[k], int(bins[k]), int(remaining[k]), total[k])
        for k in range(n_tasks)
    ]
    return _share_ties(group, cuts, fine)


def _share_ties(
    group: Sequence[PlannedTensor], cuts: Sequence[Cut], fine: Sequence[Trailing]
) -> dict[str, list[Cut]]:
    """Gives each tensor its part of the entries that tie at the threshold, first come first."""
    left = [cut.ties for cut in cuts]
    shared: dict[str, list[Cut]] = {}
    for index, tensor in enumerate(group):
        own = []
        for k, cut in enumerate(cuts):
            if cut.ties in (0, ALL_TIES):
                own.append(cut)
                continue
            low = int(np.float32(cut.threshold).view(np.uint32)) & (N_TRAILING - 1)
            bits, counts = fine[index][k]
            n_tied = int(counts[bits == low].sum())
            n_ties = min(n_tied, left[k])
            left[k] -= n_ties
            own.append(Cut(cut.threshold, n_ties))
        shared[tensor.name] = own
    return shared


def _bounded(
    executor: Executor,
    work: Callable[[PlannedTensor], object],
    tensors: Iterable[PlannedTensor],
    n_pending: int,
) -> Iterator[Any]:
    """Runs work on every tensor; results come in order, and only so many histograms wait."""
    pending: list[Future[object]] = []
    for tensor in tensors:
        pending.append(executor.submit(work, tensor))
        if len(pending) > n_pending:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def budget_note(groups: Mapping[tuple[object, ...], Sequence[PlannedTensor]]) -> str:
    """One line for the plan: how many budgets there are and over how many tensors."""
    n_tensors = sum(map(len, groups.values()))
    shared = f"{len(groups)} budget{'s' if len(groups) != 1 else ''}"
    return f"density: {shared} over {n_tensors} tensors, found in two further passes"
