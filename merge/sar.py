"""SAR-Merging: conflicts by sensitivity, then trimming by magnitude, then the norm restored.

Source: "SAR-Merging" (Sensitivity-aware Resolving Merging), arXiv 2606.18521. Its formulas are not
public; what is here is our reading of its abstract, stated in docs/sar.md. A piece of a tensor is
settled first: entries that a task does not change, or loses to a more sensitive task, become the
base's. What is left has no conflicts, and the kernels trim and add it as any other task vector.
Plain numpy, a block at a time, for all three kernels: the same bits whatever the pieces.
"""

from dataclasses import dataclass, replace

import numpy as np

from merge.kernels import ALL_TIES, N_LEADING, TRAILING_BITS, Counts, Piece
from merge.kernels_numpy import values_of
from merge.selection import Pieces

BLOCK = 1 << 15
"""Entries that are settled at a time: their intermediate results stay in the cache."""
FACTOR_UNIT = 2.0**-20
"""Rescaling factors are rounded to it, so that no order of summing can be seen in them."""


def settle_conflicts(
    deltas: np.ndarray, votes: np.ndarray, threshold: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Decides which entries of the task vectors stay where several tasks changed the same weight.

        M_k = |delta_k| > threshold                                             support
        conflict: two tasks changed an entry in opposite directions
        a conflict is won by the sign of the entry with the largest vote F_k delta_k^2

    Equal votes (two zeros, where no answer was sensitive to either) leave it to the sign of the sum
    of the deltas in the supports, and where that is zero too, to plus: no task is favoured.

    Args:
        deltas: fp32 [K, n], task vectors.
        votes: fp32 [K, n], 0 or more: what an entry weighs, such as F_k delta_k^2.
        threshold: 0 or more; what is not above it counts as unchanged.

    Returns:
        bool [K, n], the entries that stay: all of a support but the losers of conflicts.
        bool [n], where there is a conflict.
    """
    nothing = np.float32(-1.0)  # below every vote
    supports = np.abs(deltas) > threshold
    ups, downs = supports & (deltas > 0), supports & (deltas < 0)
    conflict = ups.any(axis=0) & downs.any(axis=0)
    best_up = np.where(ups, votes, nothing).max(axis=0)
    best_down = np.where(downs, votes, nothing).max(axis=0)
    total = np.zeros(deltas.shape[1:], np.float32)
    for delta, support in zip(deltas, supports, strict=True):
        total = total + np.where(support, delta, np.float32(0))
    up_wins = np.where(best_up == best_down, total >= 0, best_up > best_down)
    return supports & (~conflict | (ups == up_wins)), conflict


@dataclass
class Arbiter:
    """Settles the pieces of one tensor.

    A tensor that stays in memory comes as the same piece in every pass, and is settled once.
    """

    threshold: np.float32
    """An entry counts as changed where |delta| is above."""
    scales: np.ndarray
    """fp32 [K]: what F delta^2 is multiplied with before it votes."""
    ranks: np.ndarray
    """fp32 [K, 65,536]: the ranks that stand for it, by leading bits; [K, 0] when unused."""
    _piece: Piece | None = None
    _settled: tuple[Piece, Counts] | None = None

    def settle(self, piece: Piece) -> tuple[Piece, Counts]:
        """Returns the piece without its conflicts, and what was counted on the way.

        Args:
            piece: With `entries`, the Fisher information of every task.

        Returns:
            A piece whose tasks hold the base's value where an entry was lost or is not in the
            support; conflicts, who won them, norms of the task vectors, and what is not finite.
        """
        if self._settled is None or self._piece is not piece:
            self._piece, self._settled = piece, self._settle(piece)
        return self._settled

    def _settle(self, piece: Piece) -> tuple[Piece, Counts]:
        n_tasks, n = piece.tasks.shape
        tasks = piece.tasks.copy()
        conflicts, not_finite = 0, 0
        won, squares = np.zeros(n_tasks, np.int64), np.zeros(n_tasks)
        with np.errstate(all="ignore"):  # what is not finite is reported
            for begin in range(0, n, BLOCK):
                part = slice(begin, begin + BLOCK)
                parents, origin = values_of(piece.tasks[:, part]), values_of(piece.base[part])
                deltas = parents - origin
                votes = self._votes(piece.entries[:, part] * np.square(deltas))
                stays, conflict = settle_conflicts(deltas, votes, self.threshold)
                conflicts += int(conflict.sum())
                won += (stays & conflict).sum(axis=1)
                squares += np.square(deltas).sum(axis=1, dtype=np.float64)
                for k, kept in enumerate(stays):
                    not_finite |= int(not np.isfinite(parents[k]).all()) << (1 + k)
                    # a zero that differs in its sign stays the parent's
                    dropped = ~kept & (deltas[k] != 0)
                    np.copyto(tasks[k, part], piece.base[part], where=dropped)
        nothing = np.zeros(n_tasks, np.int64)
        counts = Counts(
            nothing, conflicts, won, nothing, np.zeros(n_tasks), squares, 0.0, not_finite
        )
        return replace(piece, tasks=tasks), counts

    def _votes(self, sensitivities: np.ndarray) -> np.ndarray:
        if not self.ranks.shape[1]:
            return np.asarray(sensitivities * self.scales[:, None])
        # the mask keeps a NaN inside the table
        bins = sensitivities.view(np.uint32) >> np.uint32(TRAILING_BITS)
        votes = np.take_along_axis(self.ranks, bins & np.uint32(N_LEADING - 1), axis=1)
        return np.where(sensitivities > 0, votes, np.float32(0))


def as_saliency(piece: Piece) -> Piece:
    """The piece as one row whose inputs' numbers are its entries': v[j] delta^2 is F delta^2."""
    return replace(piece, n_columns=piece.base.size, vectors=piece.entries)


def norm_factors(
    pieces: Pieces, thresholds: np.ndarray, ties: np.ndarray, n_tasks: int
) -> np.ndarray:
    """Finds what makes up for trimming: the norm of each task vector before over that after.

        f_k = ||settled delta_k|| / ||trimmed delta_k||      Frobenius norms, over the whole tensor

    Trimming keeps the largest, so f_k lies between 1 and 1 / sqrt(share of entries that is kept).

    Args:
        pieces: Gives the settled pieces.
        thresholds: fp32 [K]: magnitudes above are kept.
        ties: int64 [K]: how many that equal the threshold are kept, or ALL_TIES.
        n_tasks: K.

    Returns:
        fp32 [K]; 1 where nothing is kept.
    """
    before, after = np.zeros(n_tasks), np.zeros(n_tasks)
    n_tied = np.zeros(n_tasks, np.int64)
    limits = [np.float32(threshold) for threshold in thresholds]
    for piece in pieces():
        for begin in range(0, piece.base.size, BLOCK):
            part = slice(begin, begin + BLOCK)
            with np.errstate(all="ignore"):
                magnitudes = np.abs(values_of(piece.tasks[:, part]) - values_of(piece.base[part]))
            for k, own in enumerate(magnitudes):
                before[k] += np.square(own, dtype=np.float64).sum()
                after[k] += np.square(own[own > limits[k]], dtype=np.float64).sum()
                n_tied[k] += int((own == limits[k]).sum())
    for k, limit in enumerate(limits):
        n_kept = n_tied[k] if ties[k] == ALL_TIES else min(n_tied[k], ties[k])
        if n_kept:
            after[k] += n_kept * float(limit) ** 2
    whole = after == before
    ratio = np.sqrt(np.where(whole | ~(after > 0), 1.0, before / np.where(after > 0, after, 1.0)))
    return (np.rint(ratio / FACTOR_UNIT) * FACTOR_UNIT).astype(np.float32)


def join_counts(settled: Counts, applied: Counts) -> Counts:
    """The counts of a piece: conflicts and norms from before, what is kept from after."""
    return replace(
        applied,
        conflicts=settled.conflicts,
        conflicts_won=settled.conflicts_won,
        delta_square=settled.delta_square,
        not_finite=applied.not_finite | settled.not_finite,
    )
