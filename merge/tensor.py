"""One tensor: from the parents' values to the merged ones, in memory or piece by piece.

`merge_tensor` is every method as a pure function: arrays in, arrays out. The engine does the same
with pieces that it reads from files: `decide` first, `apply_decision` for each piece then.
"""

import copy
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType

import numpy as np

from merge.dense import merge_matrix
from merge.errors import MergeError
from merge.kernels import Counts, Decision, Piece
from merge.methods import METHODS, MethodSettings, Rule
from merge.sampling import Sample, cut_by_sample, take_sample
from merge.sar import Arbiter, as_saliency, join_counts, norm_factors
from merge.selection import (
    Cut,
    Pieces,
    count_level,
    cut_tensor,
    make_decision,
    score_of,
    share_of,
    vote_tables,
)

KERNELS = {"numba": "merge.kernels", "numpy": "merge.kernels_numpy", "torch": "merge.kernels_torch"}
# Shares of the energy are rounded, so that no order of summing can be seen in them.
ENERGY_UNIT = 2.0**-20


def load_kernels(name: str | None = None) -> ModuleType:
    """Returns the kernels: numba, numpy or torch; None reads OBM_KERNELS, numba by default.

    Raises:
        MergeError: There are no kernels of this name.
    """
    name = name or os.environ.get("OBM_KERNELS") or "numba"
    if name not in KERNELS:
        raise MergeError(f"OBM_KERNELS: {name!r} is unknown; choose {', '.join(KERNELS)}")
    return importlib.import_module(KERNELS[name])


def needs_rows(rule: Rule) -> bool:
    """Whether the rule looks at rows; if not, a tensor can be taken as one long row."""
    return rule.score == "saliency" or rule.keep == "magprune"


def needs_entries(rule: Rule) -> bool:
    """Whether the rule needs a number an entry: Fisher information."""
    return rule.score == "entry" or rule.arbitrate


def decide(
    pieces: Pieces,
    rule: Rule,
    settings: MethodSettings,
    tasks: Sequence[str],
    kernels: ModuleType,
    cuts: Sequence[Cut] | None = None,
    sample: Callable[[], Sample] | None = None,
) -> Decision:
    """Finds the numbers over a whole tensor that its entries are decided by.

    Args:
        pieces: Gives the tensor's pieces; called once a pass.
        rule: The method's rule.
        settings: The tensor's settings.
        tasks: Names of the tasks, in the order of the pieces' rows.
        kernels: Module of kernels.
        cuts: Thresholds that were found over more than this tensor (`budget`).
        sample: Takes a sample of the tensor; without it thresholds are found by histograms.

    Returns:
        The decision; `apply_decision` counts down its ties, so it serves once.
    """
    if rule.arbitrate:
        return _decide_settled(pieces, rule, settings, tasks, kernels)
    score, level = score_of(rule), None
    name = settings.tensor_name
    outer: Sequence[Cut] = ()
    is_scaled = rule.elect == "saliency" and settings.normalization != "none"
    is_single = rule.keep == "top" and score in ("magnitude", "saliency")
    if sample is not None and is_single and cuts is None and not is_scaled:
        taken = sample()
        n_keep = share_of(settings.density, taken.n_entries)
        cuts = cut_by_sample(pieces, str(score), taken, n_keep, kernels)
    if score is not None and (cuts is None or is_scaled):
        level = count_level(pieces, score, len(tasks), kernels)
    if level is not None and cuts is None:
        n_keep = share_of(settings.density, level.n_entries)
        n_outer = share_of(settings.outliers, level.n_entries) if rule.keep == "band" else 0
        n_rows = len(level.leading)
        cuts = cut_tensor(pieces, str(score), level, [n_outer + n_keep] * n_rows, kernels, name)
        if n_outer:
            outer = cut_tensor(pieces, str(score), level, [n_outer] * n_rows, kernels, name)
    decision = make_decision(rule, settings, tasks, level, cuts or (), outer)
    if rule.boost or rule.energy:
        _weigh_kept(decision, pieces, settings, kernels)
    return decision


def _decide_settled(
    pieces: Pieces, rule: Rule, settings: MethodSettings, tasks: Sequence[str], kernels: ModuleType
) -> Decision:
    """The decision of SAR: sensitivities' scales, then cuts and norms of what was settled."""
    level = None
    if settings.normalization != "none":
        level = count_level(
            lambda: (as_saliency(piece) for piece in pieces()), "saliency", len(tasks), kernels
        )
    scales, ranks = vote_tables(level, settings.normalization, len(tasks))
    arbiter = Arbiter(np.float32(settings.threshold), scales, ranks)

    def settled() -> Iterator[Piece]:
        return (arbiter.settle(piece)[0] for piece in pieces())

    level = count_level(settled, rule.score, len(tasks), kernels)
    n_keep = [share_of(settings.density, level.n_entries)] * len(tasks)
    cuts = cut_tensor(settled, rule.score, level, n_keep, kernels, settings.tensor_name)
    decision = make_decision(rule, settings, tasks, None, cuts)
    decision.arbiter = arbiter
    decision.weights *= norm_factors(settled, decision.thresholds, decision.ties, len(tasks))
    return decision


def apply_decision(
    piece: Piece, decision: Decision, out: np.ndarray, kernels: ModuleType
) -> Counts:
    """`kernels.apply`, and before it what settles conflicts; same arguments."""
    if decision.arbiter is None:
        counts: Counts = kernels.apply(piece, decision, out)
        return counts
    settled, before = decision.arbiter.settle(piece)
    return join_counts(before, kernels.apply(settled, decision, out))


def _weigh_kept(
    decision: Decision, pieces: Pieces, settings: MethodSettings, kernels: ModuleType
) -> None:
    """Sets RAM+'s boosts or SCE's energies, from a first application that is thrown away."""
    trial = copy.deepcopy(decision)
    total: Counts | None = None
    for piece in pieces():
        counts = kernels.apply(piece, trial, np.empty(piece.base.size, piece.base.dtype))
        total = counts if total is None else add_counts(total, counts)
    if total is None:
        return
    if decision.rule.boost:
        shared = total.kept - total.alone
        ratio = np.clip(shared / np.maximum(total.alone, 1), 0, settings.boost_limit)
        decision.boosts[:] = 1 + settings.boost * ratio
    if decision.rule.energy and total.kept_square.sum() > 0:
        share = total.kept_square / total.kept_square.sum()
        decision.weights *= (np.rint(share / ENERGY_UNIT) * ENERGY_UNIT).astype(np.float32)


def add_counts(one: Counts, other: Counts) -> Counts:
    """Adds what was counted over two pieces of a tensor."""

    def add(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
        return None if a is None or b is None else a + b

    return Counts(
        kept=one.kept + other.kept,
        conflicts=one.conflicts + other.conflicts,
        conflicts_won=one.conflicts_won + other.conflicts_won,
        alone=one.alone + other.alone,
        kept_square=one.kept_square + other.kept_square,
        delta_square=one.delta_square + other.delta_square,
        update_square=one.update_square + other.update_square,
        not_finite=one.not_finite | other.not_finite,
        saliency=add(one.saliency, other.saliency),
        saliency_kept=add(one.saliency_kept, other.saliency_kept),
    )


def merge_tensor(
    method: str,
    base: np.ndarray,
    parents: Mapping[str, np.ndarray],
    statistics: Mapping[str, np.ndarray] | None,
    settings: MethodSettings,
    *,
    kernels: str | None = None,
) -> tuple[np.ndarray, Counts]:
    """Merges one tensor that is in memory: each method as a pure function.

    Args:
        method: A name in `METHODS`; not layer_swap, which copies whole tensors.
        base: fp32 [out, in] or [n]: theta_B.
        parents: Task -> fp32, shape of base: theta_k; the order of tasks breaks ties.
        statistics: Task -> what the method needs: fp32 [in] for obm and regmean_diagonal, fp32 of
            base's shape for fisher and sar, fp32 [in, in] for regmean; None for the others.
        settings: Weights, density and so on.
        kernels: numba, numpy or torch; see `load_kernels`.

    Returns:
        theta_M in fp32, and counts.

    Raises:
        MergeError: Statistics are missing or of another shape, or a value is not finite.
    """
    rule_of = METHODS[method].rule
    tasks = list(parents)
    name = settings.tensor_name or "the tensor"
    found = check_statistics(method, base.shape, tasks, statistics, name)
    module = load_kernels(kernels)
    if rule_of is None:
        merged, counts = merge_matrix(method, base, parents, found, settings)
        check_finite(counts, ["base", *tasks], name)
        return merged, counts
    rule = rule_of(settings)
    # writable, since for a read-only array the kernels would be compiled once more
    flat_base = np.require(base, np.float32, ["C", "W"]).reshape(-1)
    flat = np.stack([np.ascontiguousarray(parents[task], np.float32) for task in tasks])
    flat = flat.reshape(len(tasks), -1)
    n_columns = base.shape[-1] if base.ndim and needs_rows(rule) else flat_base.size
    empty = np.zeros((len(tasks), 0), np.float32)
    stacked = np.stack([found[task].reshape(-1) for task in tasks]) if found else empty
    piece = Piece(
        base=flat_base,
        tasks=flat,
        n_columns=n_columns,
        begin=0,
        vectors=stacked if rule.score == "saliency" else empty,
        entries=stacked if needs_entries(rule) else empty,
    )
    decision = decide(
        lambda: [piece], rule, settings, tasks, module, sample=lambda: take_sample(piece)
    )
    out = np.empty_like(flat_base)
    counts = apply_decision(piece, decision, out, module)
    check_finite(counts, ["base", *tasks], name)
    return out.reshape(base.shape), counts


def check_statistics(
    method: str,
    shape: tuple[int, ...],
    tasks: Sequence[str],
    statistics: Mapping[str, np.ndarray] | None,
    name: str,
) -> dict[str, np.ndarray]:
    """Returns the statistics that a method needs for a tensor, checked; {} if it needs none."""
    needs = METHODS[method].needs
    if needs is None:
        return {}
    n_inputs = shape[-1] if shape else 1
    expected = {"vector": (n_inputs,), "fisher": shape, "gram": (n_inputs, n_inputs)}[needs]
    if needs != "fisher" and len(shape) != 2:
        raise MergeError(f"{name}: {method} needs a matrix, the tensor has shape {list(shape)}")
    found = {}
    for task in tasks:
        if statistics is None or task not in statistics:
            raise MergeError(
                f"{name}: {method} needs statistics of {task}; run `obm calibrate`, or choose "
                "merge.method=task_arithmetic"
            )
        values = np.ascontiguousarray(statistics[task], np.float32)
        if values.shape != expected:
            raise MergeError(
                f"{name}: statistics of {task} have shape {list(values.shape)}, needed is "
                f"{list(expected)}; calibrate with this checkpoint"
            )
        found[task] = values
    return found


def check_finite(counts: Counts, roles: Sequence[str], name: str, dtype: str = "fp32") -> None:
    """Refuses NaN and infinity.

    Args:
        counts: Of a piece.
        roles: base and the tasks, in the kernels' order.
        name: Tensor, for the message.
        dtype: Of the output, for the message.

    Raises:
        MergeError: Names who holds a value that is not finite, or that the result does not fit.
    """
    for bit, role in enumerate(roles):
        if counts.not_finite >> bit & 1:
            raise MergeError(
                f"{role}: tensor {name} holds NaN or infinity; use a checkpoint that is sound"
            )
    if counts.not_finite >> len(roles) & 1:
        raise MergeError(f"{name}: a merged value does not fit {dtype}; lower merge.weights")
