"""The kernels of `kernels` with tensors of torch, on a GPU where there is one: the same bits.

Chosen with `OBM_KERNELS=torch`. Pieces come and go as arrays of numpy, as for the other kernels;
no other module of the hot path imports torch. Each operation is a call of its own, so that nothing
is fused into one rounding, and runs in the order of `kernels`. Divisors are always tensors: by a
plain number torch does not divide on a GPU, but multiplies with its rounded reciprocal.
"""

import numpy as np
import torch

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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def histogram(piece: Piece, score: str, leading: np.ndarray, unchanged: np.ndarray) -> None:
    """As `kernels.histogram`."""
    for k, (scores, is_changed) in enumerate(_scored(piece, score)):
        bins = _leading_bits(scores[is_changed])
        leading[k] += torch.bincount(bins, minlength=N_LEADING).cpu().numpy()
        unchanged[k] += int((~is_changed).sum())


def refine(piece: Piece, score: str, bins: np.ndarray, trailing: np.ndarray) -> None:
    """As `kernels.refine`."""
    for k, (scores, is_changed) in enumerate(_scored(piece, score)):
        if bins[k] < 0:
            continue
        changed = scores[is_changed]
        wanted = changed[_leading_bits(changed) == int(bins[k])].view(torch.int32)
        wanted = wanted & (N_TRAILING - 1)
        trailing[k] += torch.bincount(wanted, minlength=N_TRAILING).cpu().numpy()


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
    for k, (scores, _) in enumerate(_scored(piece, score)):
        bits = scores.view(torch.int32)
        low, high = int(lowest[k]), int(highest[k])
        is_inside = (bits >= low) & (bits <= high)
        at = inside[k]
        # a NaN whose sign bit is set counts as above, as it does where bits have no sign
        above[k] += int(((bits > high) | (bits < 0)).sum())
        inside[k] += int(is_inside.sum())
        if low < high and inside[k] <= found.shape[1]:
            found[k, at : inside[k]] = bits[is_inside].cpu().numpy().view(np.uint32)


def apply(piece: Piece, decision: Decision, out: np.ndarray) -> Counts:
    """As `kernels.apply`."""
    rule = decision.rule
    origin, parents = _decode(piece.base), _decode(piece.tasks)
    deltas = parents - origin
    scores = _scores(piece, deltas, rule.score)
    kept, chance = _keep(piece, decision, deltas, scores)
    values = torch.where(kept, deltas / chance if rule.rescale else deltas, 0.0)
    kept_square = _squares(values)
    survives = kept
    winner = None
    if rule.elect != "none":
        winner = _elect(decision, deltas, values, scores, kept)
        survives = kept & (torch.sign(deltas) == torch.sign(winner))
    alone = kept & (kept.sum(dim=0) == 1)
    if rule.boost:
        values = torch.where(alone, values * _send(decision.boosts)[:, None], values)
    update = _combine(piece, decision, values, survives)
    winner = update if winner is None else winner
    merged = origin + update
    result = torch.where(merged == origin, origin, merged)
    for k in reversed(range(len(deltas))):
        result = torch.where(merged == origin + deltas[k], parents[k], result)
    stored = _encode(result, out)
    conflict = (kept & (deltas > 0)).any(dim=0) & (kept & (deltas < 0)).any(dim=0)
    won = conflict & kept & (torch.sign(deltas) == torch.sign(winner))
    bad = 0
    for bit, held in enumerate((origin, *parents, stored)):
        bad |= int(not bool(torch.isfinite(held).all())) << bit
    return Counts(
        kept=kept.sum(dim=1).cpu().numpy(),
        conflicts=int(conflict.sum()),
        conflicts_won=won.sum(dim=1).cpu().numpy(),
        alone=alone.sum(dim=1).cpu().numpy(),
        kept_square=kept_square,
        delta_square=_squares(deltas),
        update_square=float(_squares(update[None])[0]),
        not_finite=bad,
        saliency=_totals(scores) if has_saliency(rule) else None,
        saliency_kept=_totals(torch.where(kept, scores, 0.0)) if has_saliency(rule) else None,
    )


def _send(array: np.ndarray) -> torch.Tensor:
    # torch warns of memory that it may not write to
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(DEVICE)


def _decode(stored: np.ndarray) -> torch.Tensor:
    """Decodes bf16 bits or fp32 to fp32."""
    if stored.dtype == np.uint16:
        return _send(stored.view(np.int16)).view(torch.bfloat16).float()
    return _send(stored)


def _encode(values: torch.Tensor, out: np.ndarray) -> torch.Tensor:
    """Writes fp32 values to `out`, rounded to nearest even if it holds bf16; returns them so."""
    if out.dtype == np.uint16:
        rounded = values.to(torch.bfloat16)
        out[:] = rounded.view(torch.int16).cpu().numpy().view(np.uint16)
        return rounded
    out[:] = values.cpu().numpy()
    return values


def _squares(values: torch.Tensor) -> np.ndarray:
    squares: np.ndarray = (values * values).sum(dim=1, dtype=torch.float64).cpu().numpy()
    return squares


def _totals(values: torch.Tensor) -> np.ndarray:
    totals: np.ndarray = values.sum(dim=1, dtype=torch.float64).cpu().numpy()
    return totals


def _leading_bits(scores: torch.Tensor) -> torch.Tensor:
    """int64 bins; the mask keeps a NaN inside the table."""
    return ((scores.view(torch.int32) >> TRAILING_BITS) & (N_LEADING - 1)).long()


def _scores(piece: Piece, deltas: torch.Tensor, score: str) -> torch.Tensor:
    """fp32 [K, n]: |delta|, or v[j] * delta^2."""
    if score != "saliency":
        return deltas.abs()
    rows = (deltas * deltas).reshape(len(deltas), -1, max(piece.n_columns, 1))
    return (_send(piece.vectors)[:, None, :] * rows).reshape(deltas.shape)


def _ordered_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sums over the first axis, first to last, in fp32, from zero on as the compiled loops do."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _variance(deltas: torch.Tensor) -> torch.Tensor:
    """fp32 [n]: population variance over tasks, summed in the order of the tasks."""
    count = torch.full_like(deltas[0], len(deltas))
    away = deltas - _ordered_sum(deltas) / count
    return _ordered_sum(away * away) / count


def _scored(piece: Piece, score: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores and whether an entry is changed, task by task, or once for the variance."""
    deltas = _decode(piece.tasks) - _decode(piece.base)
    if score == "variance":
        return [(_variance(deltas), (deltas != 0).any(dim=0))]
    return list(zip(_scores(piece, deltas, score), deltas != 0, strict=True))


def _keep(
    piece: Piece, decision: Decision, deltas: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [K, n] of kept entries, and their fp32 [K, n] probability where the rule draws."""
    keep, is_changed = decision.rule.keep, deltas != 0
    chance = torch.full_like(deltas, float(decision.probability))
    if keep == "variance":
        changed = is_changed.any(dim=0)
        joint = _above(_variance(deltas), changed, decision.thresholds, decision.ties, 0)
        return is_changed & joint, chance
    if keep in ("random", "magprune"):
        if keep == "magprune":
            chance = _row_probabilities(piece, decision, deltas)
        drawn = uniform(decision.keys, piece.begin, deltas.shape[1])
        return is_changed & (drawn < chance), chance
    if keep == "above":
        return deltas.abs() > float(decision.changed_above), chance
    if keep == "all":
        return is_changed, chance
    kept = torch.empty_like(is_changed)
    for k, changed in enumerate(is_changed):
        kept[k] = _above(scores[k], changed, decision.thresholds, decision.ties, k)
        if keep == "band":
            kept[k] &= ~_above(scores[k], changed, decision.upper, decision.ties_dropped, k)
    return kept, chance


def _above(
    scores: torch.Tensor, is_changed: torch.Tensor, thresholds: np.ndarray, ties: np.ndarray, k: int
) -> torch.Tensor:
    """Changed entries above the threshold, and the first that tie with it; counts ties down."""
    threshold, n_ties = float(thresholds[k]), int(ties[k])
    if n_ties == ALL_TIES:
        return is_changed & (scores >= threshold)
    is_tied = is_changed & (scores == threshold)
    ties[k] -= min(n_ties, int(is_tied.sum()))
    first_tied = is_tied & (is_tied.cumsum(dim=0) <= n_ties)
    return (is_changed & (scores > threshold)) | first_tied


def uniform(keys: np.ndarray, first: int, n: int) -> torch.Tensor:
    """fp32 [K, n] in [0, 1): splitmix64 of each key at indices first, first + 1, ...; 24 bits.

    int64 wraps around as uint64 does; only its shift to the right must have the sign masked off.
    """
    gamma, mix_1, mix_2 = (int(c.view(np.int64)) for c in (GOLDEN_GAMMA, MIX_1, MIX_2))
    places = torch.arange(first + 1, first + 1 + n, dtype=torch.int64, device=DEVICE)
    z = _send(keys.view(np.int64))[:, None] + places * gamma
    z = (z ^ _shift_right(z, 30)) * mix_1
    z = (z ^ _shift_right(z, 27)) * mix_2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).float() * 2.0**-24


def _shift_right(z: torch.Tensor, n_bits: int) -> torch.Tensor:
    return (z >> n_bits) & ((1 << (64 - n_bits)) - 1)


def _row_probabilities(piece: Piece, decision: Decision, deltas: torch.Tensor) -> torch.Tensor:
    """Keep probability by the rank of |delta| in its row, ties by index (DELLA)."""
    n = max(piece.n_columns, 1)
    rows = deltas.abs().reshape(len(deltas), -1, n)
    order = torch.argsort(rows, dim=2, stable=True)
    ascending = torch.arange(n, device=DEVICE).float().expand(order.shape)
    ranks = torch.empty_like(rows).scatter_(2, order, ascending)
    share = ranks / torch.full_like(ranks, max(n - 1, 1))
    lowest = decision.probability - decision.window
    width = np.float32(2) * decision.window
    return (share * float(width) + float(lowest)).reshape(deltas.shape)


def _elect(
    decision: Decision,
    deltas: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor,
) -> torch.Tensor:
    """fp32 [n] whose sign won: of the votes, else of the summed kept deltas, else plus."""
    winner = torch.zeros_like(values[0])
    if decision.rule.elect == "saliency":
        if decision.ranks.shape[1]:
            votes = torch.gather(_send(decision.ranks), 1, _leading_bits(scores))
            votes = torch.where(scores > 0, votes, 0.0)
        else:
            votes = scores * _send(decision.scales)[:, None]
        winner = _ordered_sum(torch.where(kept, torch.where(deltas < 0, -votes, votes), 0.0))
    winner = torch.where(winner == 0, _ordered_sum(values), winner)
    return torch.where(winner == 0, 1.0, winner)


def _combine(
    piece: Piece, decision: Decision, values: torch.Tensor, survives: torch.Tensor
) -> torch.Tensor:
    """fp32 [n]: the update; see `Rule.combine`."""
    combine, weights = decision.rule.combine, _send(decision.weights)[:, None]
    if combine == "ratio":
        return _ratio(piece, decision, values, weights)
    update = _ordered_sum(torch.where(survives, values * weights, 0.0))
    if combine == "mean":
        divisor = _ordered_sum(survives.float())
    elif combine == "average":
        counted = torch.ones_like(survives) if decision.rule.keep == "all" else survives
        divisor = _ordered_sum(torch.where(counted, weights, 0.0))
    else:
        return update
    return update / torch.where(divisor == 0, 1.0, divisor)


def _ratio(
    piece: Piece, decision: Decision, values: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    if decision.rule.score == "entry":
        factors = _send(piece.entries)
    else:
        factors = _send(piece.vectors).repeat(1, values.shape[1] // max(piece.n_columns, 1))
    shares = weights * factors
    update, divisor = _ordered_sum(values * shares), _ordered_sum(shares)
    plain = _ordered_sum(values * weights)
    plain_divisor = _ordered_sum(weights.expand_as(values))
    update = torch.where(divisor == 0, plain, update)
    divisor = torch.where(divisor == 0, plain_divisor, divisor)
    return update / torch.where(divisor == 0, 1.0, divisor)
