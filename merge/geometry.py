"""The geometry of updates: how sparse they are, where they meet, which directions they take.

Free functions over numbers that add up: `Sums` of a block of rows, of a tensor, a layer or a model
are all of one form, and `figures` turns any of them into shares. Nothing here reads files.

    delta_k = theta_k - theta_B                                       update of model k
    S_k = {i: |delta_k,i| > threshold}                                 its support
    E_k = the fewest entries that hold 90 % of ||delta_k||^2           its effective support
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np

from merge.shards import from_float, to_float

N_BINS = 1 << 16
ENERGY = 0.9
"""Share of the squared norm that makes the effective support."""


@dataclass
class Sums:
    """What adds up over blocks, tensors and layers, for K models; counts and squares in fp64."""

    n: float
    """Entries."""
    unchanged: np.ndarray
    """[K]: entries with delta exactly 0."""
    below_bf16: np.ndarray
    """[K]: entries that bf16 would store as the base's: what changed less than half a step."""
    support: np.ndarray
    """[K]: |S_k|."""
    effective: np.ndarray
    """[K]: |E_k|, the sum over tensors where there are several."""
    gram: np.ndarray
    """[K, K]: <delta_a, delta_b>; the diagonal holds the squared norms."""
    both: np.ndarray
    """[K, K]: |S_a and S_b|."""
    conflict: np.ndarray
    """[K, K]: entries of both supports with opposite signs."""
    both_effective: np.ndarray
    """[K, K]: |E_a and E_b|."""
    matrix_square: np.ndarray
    """[K]: squared norm in the matrices whose spectrum was looked at."""
    principal: np.ndarray
    """[K]: of that, what lies in the base's principal subspace."""
    principal_chance: np.ndarray
    """[K]: of that, what would lie there if the update had no preference."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Sums)}
        )


def no_sums(n_models: int) -> Sums:
    """Sums over nothing."""
    one, two = np.zeros(n_models), np.zeros((n_models, n_models))
    return Sums(0.0, *(one.copy() for _ in range(4)), *(two.copy() for _ in range(4)),
                *(one.copy() for _ in range(3)))  # fmt: skip


# ---- entries


@dataclass
class Magnitudes:
    """How the squared norm is spread over magnitudes: a histogram by the leading 16 bits."""

    counts: np.ndarray
    """fp64 [65,536]."""
    squares: np.ndarray
    """fp64 [65,536]: summed squares of a bin's entries."""

    def add(self, delta: np.ndarray) -> None:
        """Counts a block of an update, fp32 of any shape."""
        flat = np.abs(delta).reshape(-1)
        bins = flat.view(np.uint32) >> np.uint32(16)
        self.counts += np.bincount(bins, minlength=N_BINS)
        self.squares += np.bincount(bins, np.square(flat, dtype=np.float64), N_BINS)

    def effective(self, share: float = ENERGY) -> tuple[int, float]:
        """Finds the fewest entries that hold a share of the squared norm.

        Bins are 1/128 of a power of two wide, and are taken whole: the count is of all entries down
        to the bin in which the share is reached.

        Returns:
            Their number, and the smallest magnitude among them; (0, infinity) for no change.
        """
        total = self.squares.sum()
        if total == 0:
            return 0, float("inf")
        from_top = np.cumsum(self.squares[::-1])
        place = int(np.searchsorted(from_top, share * total))
        first = N_BINS - 1 - min(place, N_BINS - 1)
        threshold = np.array(first << 16, np.uint32).view(np.float32)
        return int(self.counts[first:].sum()), float(threshold)


def no_magnitudes() -> Magnitudes:
    """A histogram of nothing."""
    return Magnitudes(np.zeros(N_BINS), np.zeros(N_BINS))


def sum_entries(
    base: np.ndarray, tuned: Sequence[np.ndarray], threshold: float, effective: Sequence[float]
) -> Sums:
    """Sums a block of rows over all models.

    Args:
        base: fp32, theta_B.
        tuned: K times fp32 of the same shape, theta_k.
        threshold: An entry is in the support where |delta| is above.
        effective: K magnitudes from which on entries are in the effective support.
    """
    sums = no_sums(len(tuned))
    sums.n = float(base.size)
    stored = from_float(base.reshape(-1), "BF16")
    deltas = [(model - base).reshape(-1) for model in tuned]
    supports = [np.abs(delta) > threshold for delta in deltas]
    strong = [np.abs(delta) >= limit for delta, limit in zip(deltas, effective, strict=True)]
    for k, delta in enumerate(deltas):
        sums.unchanged[k] = np.count_nonzero(delta == 0)
        rounded = from_float(np.ascontiguousarray(tuned[k]).reshape(-1), "BF16")
        # by value: the two zeros are one
        same = to_float(rounded, "BF16") == to_float(stored, "BF16")
        sums.below_bf16[k] = np.count_nonzero(same)
        sums.support[k] = np.count_nonzero(supports[k])
        sums.effective[k] = np.count_nonzero(strong[k])
        sums.gram[k, k] = np.square(delta, dtype=np.float64).sum()
    for a, b in combinations(range(len(deltas)), 2):
        shared = supports[a] & supports[b]
        against = (deltas[a] > 0) != (deltas[b] > 0)
        for matrix, value in (
            (sums.gram, np.dot(deltas[a].astype(np.float64), deltas[b])),
            (sums.both, np.count_nonzero(shared)),
            (sums.conflict, np.count_nonzero(shared & against)),
            (sums.both_effective, np.count_nonzero(strong[a] & strong[b])),
        ):
            matrix[a, b] = matrix[b, a] = value
    return sums


# ---- figures


def model_figures(sums: Sums, k: int) -> dict[str, float]:
    """Shares and norms of one update; what has no meaning is left out."""
    n, square = max(sums.n, 1.0), sums.gram[k, k]
    found = {
        "norm": float(np.sqrt(square)),
        "unchanged": sums.unchanged[k] / n,
        "below_bf16": sums.below_bf16[k] / n,
        "support": sums.support[k] / n,
        "effective": sums.effective[k] / n,
        "effective_sparsity": 1.0 - sums.effective[k] / n,
    }
    if square > 0:
        # the part of the equal-weight average that lies along this update, over its norm
        found["left_by_average"] = sums.gram[k].sum() / (len(sums.gram) * square)
    if sums.matrix_square[k] > 0:
        found["principal"] = sums.principal[k] / sums.matrix_square[k]
        found["principal_chance"] = sums.principal_chance[k] / sums.matrix_square[k]
    return {key: float(value) for key, value in found.items()}


def pair_figures(sums: Sums, a: int, b: int) -> dict[str, float]:
    """How two updates meet.

    `jaccard_chance` is what two independent supports of these sizes would have:
    pq / (p + q - pq). Shares of nothing are left out.
    """
    n = max(sums.n, 1.0)
    found: dict[str, float] = {}
    norms = np.sqrt([sums.gram[a, a], sums.gram[b, b]])
    if norms.min() > 0:
        found["cosine"] = sums.gram[a, b] / (norms[0] * norms[1])
        found["norm_ratio"] = norms[1] / norms[0]
    for name, sizes, shared in (
        ("", sums.support, sums.both[a, b]),
        ("effective_", sums.effective, sums.both_effective[a, b]),
    ):
        smaller, union = min(sizes[a], sizes[b]), sizes[a] + sizes[b] - shared
        p, q = sizes[a] / n, sizes[b] / n
        if smaller > 0:
            found[f"{name}overlap"] = shared / smaller
            found[f"{name}jaccard"] = shared / union
            found[f"{name}jaccard_chance"] = p * q / (p + q - p * q)
    if sums.both[a, b] > 0:
        found["conflict"] = sums.conflict[a, b] / sums.both[a, b]
    return {key: float(value) for key, value in found.items()}


def average_figures(sums: Sums) -> dict[str, float]:
    """The sparsity curse: the norm of the equal-weight average over the mean norm of the updates.

    1 where all updates are equal, 1 / sqrt(K) where they are orthogonal and as large.
    """
    norms = np.sqrt(np.diagonal(sums.gram))
    if norms.mean() == 0:
        return {}
    average = np.sqrt(max(sums.gram.sum(), 0.0)) / len(norms)
    return {"average_norm": float(average / norms.mean())}


# ---- advice

SPARSE = 0.3
"""A support below this share of the entries is called sparse."""
DISJOINT = 0.1
"""Supports that share less than this part of the smaller one hardly meet."""
ALIGNED = 0.3
"""Updates with a larger cosine go the same way."""
CONTESTED = 0.25
"""A larger share of opposite signs in the common support is a conflict; 0.5 is that of chance."""
APART = 3.0
"""Norms further apart than this factor need weights."""


def advise(sums: Sums, names: Sequence[str]) -> list[dict[str, str]]:
    """Says which method suits the geometry of all updates, and why.

    A rule of thumb on few numbers, whose limits are above; what a merge can do only an evaluation
    tells (`obm tune`).

    Returns:
        {about, method, reason} for each pair of models, then for norms that lie apart.
    """
    advice = []
    models = [model_figures(sums, k) for k in range(len(names))]
    for k, name in enumerate(names):
        if models[k]["norm"] == 0:
            advice.append(
                {"about": name, "method": "none", "reason": "equals the base: nothing to merge"}
            )
    for a, b in combinations(range(len(names)), 2):
        pair = pair_figures(sums, a, b)
        if "cosine" in pair:
            about = f"{names[a]} and {names[b]}"
            supports = models[a]["support"], models[b]["support"]
            method, reason = _advise_pair(pair, (names[a], names[b]), supports)
            advice.append({"about": about, "method": method, "reason": reason})
            ratio = pair["norm_ratio"]
            if max(ratio, 1 / ratio) > APART:
                large, small = (names[b], names[a]) if ratio > 1 else (names[a], names[b])
                advice.append({
                    "about": about,
                    "method": f"weights.{small} up, normalization: mean",
                    "reason": f"the update of {large} is {max(ratio, 1 / ratio):.1f} times as "
                    "long: unweighed it decides on sums and votes",
                })  # fmt: skip
    return advice


def _advise_pair(
    pair: dict[str, float], names: tuple[str, str], supports: tuple[float, float]
) -> tuple[str, str]:
    overlap, conflict = pair.get("overlap", 0.0), pair.get("conflict", 0.0)
    if overlap < DISJOINT:
        return (
            "sar, task_arithmetic",
            f"supports share {overlap:.0%} of the smaller one: a sum keeps both whole, an average "
            "halves both",
        )
    if pair["cosine"] > ALIGNED:
        return (
            "task_arithmetic, linear, obm",
            f"cosine {pair['cosine']:.2f}: the updates go the same way; a sum with weights below "
            "1, or an average, loses little",
        )
    sparser = min((0, 1), key=lambda index: supports[index])
    if conflict > CONTESTED and supports[sparser] < SPARSE:
        return (
            "sar, obm",
            f"{names[sparser]} changed {supports[sparser]:.0%} of the entries, {overlap:.0%} of "
            f"them changed by {names[1 - sparser]} too, {conflict:.0%} of these against it: an "
            "average halves them; let sensitivity decide and restore the norm",
        )
    if conflict > CONTESTED:
        return (
            "obm, sar, ties",
            f"both changed most entries, {conflict:.0%} of the common ones in opposite directions "
            f"(cosine {pair['cosine']:.2f}): trim, and elect a sign",
        )
    return (
        "task_arithmetic, obm",
        f"they meet ({overlap:.0%} of the smaller support) but seldom disagree ({conflict:.0%})",
    )
