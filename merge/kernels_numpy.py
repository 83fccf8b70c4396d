"""The kernels of `kernels` with whole arrays of numpy: the same bits, no compiler.

It serves where numba cannot run (`OBM_KERNELS=numpy`), and as the plain statement of what the
compiled loops do. Every operation is fp32, in the order of `kernels`.
"""

import numpy as np

from merge.kernels import (
    ALL_TIES,
    GOLDEN_GAMMA,
    MIX_1,
    MIX_2,
    N_LEADING,
    N_TRAILING,
    TRAILING_BITS,
    Counts,
    Decision,
    Piece,
    has_saliency,
)
from merge.shards import from_float, to_float

ZERO, ONE = np.float32(0), np.float32(1)


def histogram(piece: Piece, score: str, leading: np.ndarray, unchanged: np.ndarray) -> None:
    """As `kernels.histogram`."""
    for k, (scores, is_changed) in enumerate(scored(piece, score)):
        leading[k] += np.bincount(_leading_bits(scores[is_changed]), minlength=N_LEADING)
        unchanged[k] += int((~is_changed).sum())


def _leading_bits(scores: np.ndarray) -> np.ndarray:
    """uint32 bins; the mask keeps a NaN inside the table."""
    return (scores.view(np.uint32) >> np.uint32(TRAILING_BITS)) & np.uint32(N_LEADING - 1)


def refine(piece: Piece, score: str, bins: np.ndarray, trailing: np.ndarray) -> None:
    """As `kernels.refine`."""
    for k, (scores, is_changed) in enumerate(scored(piece, score)):
        if bins[k] < 0:
            continue
        changed = scores[is_changed]
        wanted = changed[_leading_bits(changed) == np.uint32(bins[k])].view(np.uint32)
        trailing[k] += np.bincount(wanted & np.uint32(N_TRAILING - 1), minlength=N_TRAILING)


def select(
    piece: Piece,
    score: str,
    lowest: np.ndarray,
    highest: np.ndarray,
    above: np.ndarray,
    inside: np.ndarray,
    found: np.ndarray,
) -> None:
    """As `kernels.select`."""
    for k, (scores, _) in enumerate(scored(piece, score)):
        bits = scores.view(np.uint32)
        is_inside = (bits >= lowest[k]) & (bits <= highest[k])
        at, n_inside = inside[k], np.count_nonzero(is_inside)
        above[k] += np.count_nonzero(bits > highest[k])
        inside[k] += n_inside
        if lowest[k] < highest[k] and inside[k] <= found.shape[1]:
            found[k, at : inside[k]] = bits[is_inside]


def apply(piece: Piece, decision: Decision, out: np.ndarray) -> Counts:
    """As `kernels.apply`."""
    rule = decision.rule
    with np.errstate(all="ignore"):  # what is not finite is reported by `not_finite`
        origin, parents = values_of(piece.base), values_of(piece.tasks)
        deltas = parents - origin
        scores = _scores(piece, deltas, rule.score)
        kept, chance = _keep(piece, decision, deltas, scores)
        values = np.where(kept, deltas / chance if rule.rescale else deltas, ZERO)
        kept_square = _squares(values)
        survives = kept
        if rule.elect != "none":
            winner = _elect(decision, deltas, values, scores, kept)
            survives = kept & (np.sign(deltas) == np.sign(winner))
        alone = kept & (kept.sum(axis=0) == 1)
        if rule.boost:
            values = np.where(alone, values * decision.boosts[:, None], values)
        update = _combine(piece, decision, values, survives)
        if rule.elect == "none":
            winner = update
        merged = origin + update
        result = np.where(merged == origin, origin, merged)
        for k in reversed(range(len(deltas))):
            result = np.where(merged == origin + deltas[k], parents[k], result)
        out[:] = from_float(result, "BF16") if out.dtype == np.uint16 else result
        update_square = float(_squares(update[None])[0])
    conflict = (kept & (deltas > 0)).any(0) & (kept & (deltas < 0)).any(0)
    won = conflict & kept & (np.sign(deltas) == np.sign(winner))
    bad = int(not np.isfinite(origin).all())
    for k, parent in enumerate(parents):
        bad |= int(not np.isfinite(parent).all()) << (1 + k)
    bad |= int(not np.isfinite(values_of(out)).all()) << (1 + len(parents))
    return Counts(
        kept=kept.sum(axis=1),
        conflicts=int(conflict.sum()),
        conflicts_won=won.sum(axis=1),
        alone=alone.sum(axis=1),
        kept_square=kept_square,
        delta_square=_squares(deltas),
        update_square=update_square,
        not_finite=bad,
        saliency=scores.sum(axis=1, dtype=np.float64) if has_saliency(rule) else None,
        saliency_kept=(
            np.where(kept, scores, ZERO).sum(axis=1, dtype=np.float64)
            if has_saliency(rule)
            else None
        ),
    )


def values_of(stored: np.ndarray) -> np.ndarray:
    """Decodes what a piece holds, fp32 or the bits of bf16, to fp32."""
    return to_float(stored, "BF16" if stored.dtype == np.uint16 else "F32")


def _squares(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.square(values).sum(axis=1, dtype=np.float64)


def _scores(piece: Piece, deltas: np.ndarray, score: str) -> np.ndarray:
    """fp32 [K, n]: |delta|, or v[j] * delta^2."""
    if score != "saliency":
        return np.abs(deltas)
    rows = np.square(deltas).reshape(len(deltas), -1, max(piece.n_columns, 1))
    return (piece.vectors[:, None, :] * rows).reshape(deltas.shape)


def _variance(deltas: np.ndarray) -> np.ndarray:
    """fp32 [n]: population variance over tasks, summed in the order of the tasks."""
    count = np.float32(len(deltas))
    mean = _ordered_sum(deltas) / count
    return _ordered_sum(np.square(deltas - mean)) / count


def _ordered_sum(terms: np.ndarray) -> np.ndarray:
    """Sums over the first axis, first to last, in fp32, from zero on as the compiled loops do."""
    total = np.zeros(terms.shape[1:], np.float32)
    for term in terms:
        total = total + term
    return total


def scored(piece: Piece, score: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores and whether an entry is changed, task by task, or once for the variance."""
    with np.errstate(all="ignore"):
        deltas = values_of(piece.tasks) - values_of(piece.base)
        if score == "variance":
            return [(_variance(deltas), (deltas != 0).any(axis=0))]
        return list(zip(_scores(piece, deltas, score), deltas != 0, strict=True))


def _keep(
    piece: Piece, decision: Decision, deltas: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """bool [K, n] of kept entries, and their fp32 [K, n] probability where the rule draws."""
    keep, is_changed = decision.rule.keep, deltas != 0
    chance = np.broadcast_to(decision.probability, deltas.shape)
    if keep == "variance":
        joint = _above(
            _variance(deltas), is_changed.any(axis=0), decision.thresholds, decision.ties, 0
        )
        return is_changed & joint, chance
    if keep in ("random", "magprune"):
        if keep == "magprune":
            chance = _row_probabilities(piece, decision, deltas)
        drawn = np.stack([uniform(key, piece.begin, deltas.shape[1]) for key in decision.keys])
        return is_changed & (drawn < chance), chance
    if keep == "above":
        return np.abs(deltas) > decision.changed_above, chance
    if keep == "all":
        return is_changed, chance
    kept = np.stack(
        [
            _above(scores[k], is_changed[k], decision.thresholds, decision.ties, k)
            for k in range(len(deltas))
        ]
    )
    if keep == "band":
        for k in range(len(deltas)):
            kept[k] &= ~_above(scores[k], is_changed[k], decision.upper, decision.ties_dropped, k)
    return kept, chance


def _above(
    scores: np.ndarray, is_changed: np.ndarray, thresholds: np.ndarray, ties: np.ndarray, k: int
) -> np.ndarray:
    """Changed entries above the threshold, and the first that tie with it; counts ties down."""
    if ties[k] == ALL_TIES:
        return is_changed & (scores >= thresholds[k])
    above = is_changed & (scores > thresholds[k])
    tied = np.flatnonzero(is_changed & (scores == thresholds[k]))[: ties[k]]
    above[tied] = True
    ties[k] -= len(tied)
    return above


def uniform(key: np.uint64, first: int, n: int) -> np.ndarray:
    """fp32 [n] in [0, 1): splitmix64 of the key at indices first, first + 1, ...; 24 bits each."""
    with np.errstate(over="ignore"):
        z = key + (np.arange(first, first + n, dtype=np.uint64) + np.uint64(1)) * GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _row_probabilities(piece: Piece, decision: Decision, deltas: np.ndarray) -> np.ndarray:
    """Keep probability by the rank of |delta| in its row, ties by index (DELLA)."""
    n = max(piece.n_columns, 1)
    rows = np.abs(deltas).reshape(len(deltas), -1, n)
    order = np.argsort(rows, axis=2, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(n), order.shape), axis=2)
    share = ranks.astype(np.float32) / np.float32(max(n - 1, 1))
    lowest = decision.probability - decision.window
    width = np.float32(2) * decision.window
    return (lowest + width * share).reshape(deltas.shape)


def _elect(
    decision: Decision,
    deltas: np.ndarray,
    values: np.ndarray,
    scores: np.ndarray,
    kept: np.ndarray,
) -> np.ndarray:
    """fp32 [n] whose sign won: of the votes, else of the summed kept deltas, else plus."""
    votes = np.zeros_like(values)
    if decision.rule.elect == "saliency":
        if decision.ranks.shape[1]:
            bins = _leading_bits(scores)
            votes = np.where(scores > 0, np.take_along_axis(decision.ranks, bins, axis=1), ZERO)
        else:
            votes = scores * decision.scales[:, None]
        votes = np.where(kept, np.where(deltas < 0, -votes, votes), ZERO)
    winner = _ordered_sum(votes)
    winner = np.where(winner == 0, _ordered_sum(values), winner)
    return np.where(winner == 0, ONE, winner)


def _combine(
    piece: Piece, decision: Decision, values: np.ndarray, survives: np.ndarray
) -> np.ndarray:
    """fp32 [n]: the update; see `Rule.combine`."""
    combine, weights = decision.rule.combine, decision.weights[:, None]
    if combine == "ratio":
        return _ratio(piece, decision, values)
    update = _ordered_sum(np.where(survives, values * weights, ZERO))
    if combine == "mean":
        divisor = _ordered_sum(survives.astype(np.float32))
    elif combine == "average":
        counts = np.ones_like(survives) if decision.rule.keep == "all" else survives
        divisor = _ordered_sum(np.where(counts, weights, ZERO))
    else:
        return update
    return update / np.where(divisor == 0, ONE, divisor)


def _ratio(piece: Piece, decision: Decision, values: np.ndarray) -> np.ndarray:
    weights = decision.weights[:, None]
    if decision.rule.score == "entry":
        factors = piece.entries
    else:
        n_rows = values.shape[1] // max(piece.n_columns, 1)
        factors = np.tile(piece.vectors, (1, n_rows))
    shares = weights * factors
    update, divisor = _ordered_sum(values * shares), _ordered_sum(shares)
    plain = _ordered_sum(values * weights)
    plain_divisor = _ordered_sum(np.broadcast_to(weights, values.shape))
    update = np.where(divisor == 0, plain, update)
    divisor = np.where(divisor == 0, plain_divisor, divisor)
    return update / np.where(divisor == 0, ONE, divisor)
