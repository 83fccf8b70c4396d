"""What the methods' rules do to the entries of a tensor, compiled by numba.

    histogram   counts scores by their leading bits, for the thresholds of `selection`
    refine      counts the trailing bits of the scores in one bin: the threshold is then exact
    select      counts and collects the scores in a bracket, for the thresholds of `sampling`
    apply       keep, elect, combine, and rounding to the output's dtype, all in one pass

Every function works on a piece of a tensor (`Piece`): whole rows, as stored in the files. A tile of
it at a time is decoded to fp32 and goes through short loops over memory that stays in the cache.
All decisions are made in fp32, one operation at a time and in the order of the tasks, so that
`kernels_numpy` and `kernels_torch`, which do the same with whole arrays, give the same bits.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from merge import kernels_pair
from merge.jit import jit
from merge.kernels_pair import ALL_TIES, N_LEADING, TRAILING_BITS
from merge.methods import Rule

TILE = 1024
# Buffers are a little longer: at distances of 4,096 bytes a store would hold up the next loads.
PADDED = TILE + 40
N_TRAILING = 1 << TRAILING_BITS

KEEPS = ("all", "top", "band", "variance", "random", "magprune", "above")
SCORES = ("magnitude", "saliency", "entry")
ELECTS = ("none", "sum", "saliency")
COMBINES = ("sum", "mean", "average", "ratio")
ALL, TOP, BAND, VARIANCE, RANDOM, MAGPRUNE, ABOVE = range(len(KEEPS))
MAGNITUDE, SALIENCY, ENTRY = range(len(SCORES))
NO_ELECTION, BY_SUM, BY_SALIENCY = range(len(ELECTS))
SUM, MEAN, AVERAGE, RATIO = range(len(COMBINES))

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass
class Piece:
    """Some rows of a tensor and of its namesakes in the parents.

    `base` and `tasks` hold bf16 as uint16 bits, or fp32, both the same.
    """

    base: np.ndarray
    """[n] of the base, n = rows * columns."""
    tasks: np.ndarray
    """[K, n], K tasks in order."""
    n_columns: int
    """Length of a row; a vector is one row."""
    begin: int
    """Row-major index of the first entry in the whole tensor."""
    vectors: np.ndarray
    """fp32 [K, columns]: one number a linear input; [K, 0] when the rule needs none."""
    entries: np.ndarray
    """fp32 [K, n]: one number an entry (Fisher information); [K, 0] when the rule needs none."""


@dataclass
class Decision:
    """What is known of the whole tensor when its entries are decided; see `selection`.

    `ties` and `ties_dropped` count down while the pieces of a tensor go by in order.
    """

    rule: Rule
    weights: np.ndarray
    """fp32 [K], lambda_k."""
    thresholds: np.ndarray
    """fp32 [K]: scores above are kept (variance: only the first is used)."""
    ties: np.ndarray
    """int64 [K]: how many entries that score exactly the threshold are still kept."""
    upper: np.ndarray
    """fp32 [K]: scores above are outliers and dropped (band)."""
    ties_dropped: np.ndarray
    """int64 [K]: how many entries that score exactly `upper` are still dropped (band)."""
    scales: np.ndarray
    """fp32 [K]: what a saliency is multiplied with before it votes."""
    ranks: np.ndarray
    """fp32 [K, 65,536]: share of entries whose leading bits are not larger; [K, 0] when unused."""
    keys: np.ndarray
    """uint64 [K]: the random streams."""
    boosts: np.ndarray
    """fp32 [K]: factor on what one task alone keeps (RAM+), 1 elsewhere."""
    probability: np.float32
    """Probability of being kept (random); the middle of its range (magprune)."""
    window: np.float32
    """Half the range of probabilities (magprune)."""
    changed_above: np.float32
    """An entry counts as changed where |delta| is above (above)."""
    arbiter: Any = None
    """`sar.Arbiter` that settles each piece before it is applied; None but for SAR."""


@dataclass
class Counts:
    """What `apply` counted; adds up over pieces."""

    kept: np.ndarray
    """int64 [K]: entries kept before signs were compared."""
    conflicts: int
    """Entries where kept deltas of two tasks have opposite signs."""
    conflicts_won: np.ndarray
    """int64 [K]: conflicts that the task's sign won."""
    alone: np.ndarray
    """int64 [K]: entries that no other task keeps (RAM+ only)."""
    kept_square: np.ndarray
    """fp64 [K]: squared norm of what is kept (SCE only)."""
    delta_square: np.ndarray
    """fp64 [K]: squared Frobenius norm of each task vector."""
    update_square: float
    """Squared Frobenius norm of the update."""
    not_finite: int
    """Bit 0: the base holds NaN or infinity; bit 1 + k: task k does; bit 1 + K: the result does."""
    saliency: np.ndarray | None = None
    """fp64 [K]: sum of a task's saliencies; None for rules without."""
    saliency_kept: np.ndarray | None = None
    """fp64 [K]: that over the kept entries."""


# numpy's rules of division: a branch for a divisor of zero would forbid vector instructions, and a
# chance of zero, which divides what is not kept, would raise.
_jit = partial(jit, error_model="numpy")


# ---- a tile at a time
#
# Loops run over slices that start at zero: numba then knows that no index is negative, and the
# compiler can use vector instructions. A choice is not written over one of its own operands: that
# would become a masked store, which costs ten times as much on some processors.


def _decode(stored: Any, out: Any) -> Any:
    """Decodes stored items to fp32; returns whether any is not finite."""
    raise NotImplementedError


@overload(_decode)
def _decode_overload(stored: Any, out: Any) -> Any:
    if stored.dtype == types.uint16:

        def decode_bf16(stored: Any, out: Any) -> Any:
            bits = out.view(np.uint32)
            bad = np.uint32(0)
            for i in range(stored.size):
                value = np.uint32(stored[i]) << np.uint32(16)
                bits[i] = value
                bad |= np.uint32((value & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
            return bad

        return decode_bf16

    def decode_fp32(stored: Any, out: Any) -> Any:
        bits = out.view(np.uint32)
        bad = np.uint32(0)
        for i in range(stored.size):
            out[i] = stored[i]
            bad |= np.uint32((bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
        return bad

    return decode_fp32


def _encode(values: Any, out: Any) -> Any:
    """Rounds fp32 values to the output's items; returns whether any is not finite."""
    raise NotImplementedError


@overload(_encode)
def _encode_overload(values: Any, out: Any) -> Any:
    if out.dtype == types.uint16:

        def encode_bf16(values: Any, out: Any) -> Any:
            bits = values.view(np.uint32)
            bad = np.uint32(0)
            for i in range(values.size):
                value = bits[i]
                # to nearest even: half a unit is added, less one where the last bit is even
                even = (value >> np.uint32(16)) & np.uint32(1)
                rounded = (value + np.uint32(0x7FFF) + even) >> np.uint32(16)
                out[i] = np.uint16(rounded)
                bad |= np.uint32((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80))
            return bad

        return encode_bf16

    def encode_fp32(values: Any, out: Any) -> Any:
        bits = values.view(np.uint32)
        bad = np.uint32(0)
        for i in range(values.size):
            out[i] = values[i]
            bad |= np.uint32((bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
        return bad

    return encode_fp32


@_jit()
def _subtract(values, origin):  # type: ignore[no-untyped-def]
    """Turns a parent's values into deltas."""
    for i in range(values.size):
        values[i] = np.float32(values[i] - origin[i])


@_jit()
def _count_zeros(values):  # type: ignore[no-untyped-def]
    n_zero = np.uint32(0)
    for i in range(values.size):
        n_zero += np.uint32(values[i] == 0)
    return n_zero


@_jit()
def _scores_of(delta, vector, score, out):  # type: ignore[no-untyped-def]
    """Scores of one task: |delta|, or v[j] * delta^2."""
    if score == MAGNITUDE:
        for i in range(delta.size):
            out[i] = abs(delta[i])
    else:
        for i in range(delta.size):
            out[i] = np.float32(vector[i] * np.float32(delta[i] * delta[i]))


@_jit()
def _score_tile(base, task, vector, score, origin, delta, scores):  # type: ignore[no-untyped-def]
    """Decodes a tile of one task into `origin` and `delta`, and scores it into `scores`."""
    _decode(base, origin)
    _decode(task, delta)
    _subtract(delta, origin)
    _scores_of(delta, vector, score, scores)


@_jit()
def _variances_of(deltas, out, mean):  # type: ignore[no-untyped-def]
    """Population variance over tasks, entry by entry; `mean` is scratch."""
    n_tasks = np.float32(len(deltas))
    mean[:] = 0
    out[:] = 0
    for k in range(len(deltas)):
        delta = deltas[k][: out.size]
        for i in range(delta.size):
            mean[i] = np.float32(mean[i] + delta[i])
    for i in range(mean.size):
        mean[i] = np.float32(mean[i] / n_tasks)
    for k in range(len(deltas)):
        delta = deltas[k][: out.size]
        for i in range(delta.size):
            away = np.float32(delta[i] - mean[i])
            out[i] = np.float32(out[i] + np.float32(away * away))
    for i in range(out.size):
        out[i] = np.float32(out[i] / n_tasks)


@_jit()
def _any_changed(deltas, out):  # type: ignore[no-untyped-def]
    """Marks with 1 the entries that any task changed."""
    out[:] = 0
    for k in range(len(deltas)):
        delta = deltas[k][: out.size]
        for i in range(delta.size):
            before = out[i]
            out[i] = np.float32(1.0) if delta[i] != 0 else before


@_jit()
def _keep_above(scores, delta, threshold, ties, k, kept):  # type: ignore[no-untyped-def]
    """Marks changed entries that score above a threshold, and the first ones that tie with it."""
    if ties[k] == ALL_TIES:
        for i in range(scores.size):
            kept[i] = np.uint8((scores[i] >= threshold) & (delta[i] != 0))
        return
    for i in range(scores.size):
        kept[i] = np.uint8((scores[i] > threshold) & (delta[i] != 0))
    left = ties[k]
    if left > 0:
        for i in range(scores.size):
            if scores[i] == threshold and delta[i] != 0 and left > 0:
                kept[i] = 1
                left -= 1
        ties[k] = left


@_jit()
def _mark_larger(delta, threshold, mark):  # type: ignore[no-untyped-def]
    for i in range(mark.size):
        mark[i] = np.uint8(abs(delta[i]) > threshold)


@_jit()
def _mark_drawn(delta, drawn, chance, mark):  # type: ignore[no-untyped-def]
    for i in range(mark.size):
        mark[i] = np.uint8((drawn[i] < chance[i]) & (delta[i] != 0))


@_jit()
def _and(mark, other):  # type: ignore[no-untyped-def]
    for i in range(mark.size):
        mark[i] &= other[i]


@_jit()
def _and_not(mark, other):  # type: ignore[no-untyped-def]
    for i in range(mark.size):
        mark[i] &= other[i] ^ np.uint8(1)


@_jit()
def _mark_agreeing(delta, winner, mark, out):  # type: ignore[no-untyped-def]
    """Keeps the marks where a delta has the sign that won."""
    bits, winner_bits = delta.view(np.uint32), winner.view(np.uint32)
    for i in range(out.size):
        differs = np.uint8((bits[i] ^ winner_bits[i]) >> np.uint32(31))
        out[i] = mark[i] & np.uint8(winner[i] != 0) & (differs ^ np.uint8(1))


@_jit()
def _take_kept(delta, mark, value):  # type: ignore[no-untyped-def]
    for i in range(value.size):
        plain = delta[i]
        value[i] = np.float32(0.0) if mark[i] == 0 else plain


@_jit()
def _divide_kept(delta, mark, chance, value):  # type: ignore[no-untyped-def]
    for i in range(value.size):
        scaled = np.float32(delta[i] / chance[i])
        value[i] = np.float32(0.0) if mark[i] == 0 else scaled


@_jit()
def _uniform(key, first, out):  # type: ignore[no-untyped-def]
    """Numbers in [0, 1) from a key and consecutive indices: splitmix64, 24 bits of each."""
    start = key + (np.uint64(first) + np.uint64(1)) * GOLDEN_GAMMA
    for i in range(out.size):
        z = start + np.uint64(i) * GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        z = z ^ (z >> np.uint64(31))
        out[i] = np.float32(np.float32(np.uint32(z >> np.uint64(40))) * np.float32(2.0**-24))


@_jit()
def _row_probabilities(delta, middle, window, out):  # type: ignore[no-untyped-def]
    """Keep probability of every entry of a row, by the rank of |delta|, ties by index (DELLA)."""
    n = delta.size
    lowest = np.float32(middle - window)
    width = np.float32(np.float32(2.0) * window)
    last = np.float32(max(n - 1, 1))
    radix, digits = 2048, 3  # 33 bits cover the 31 that a magnitude has
    order, other = np.arange(n), np.empty(n, np.int64)
    places = np.empty(radix + 1, np.int64)
    bits = delta.view(np.uint32)
    sign_off, digit_mask = np.uint32(0x7FFFFFFF), np.uint32(radix - 1)
    for digit in range(digits):
        shift = np.uint32(11 * digit)
        places[:] = 0
        for i in range(n):
            places[(((bits[i] & sign_off) >> shift) & digit_mask) + np.uint32(1)] += 1
        for j in range(1, radix + 1):
            places[j] += places[j - 1]
        for i in range(n):
            value = ((bits[order[i]] & sign_off) >> shift) & digit_mask
            other[places[value]] = order[i]
            places[value] += 1
        order, other = other, order
    for rank in range(n):
        share = np.float32(np.float32(rank) / last)
        out[order[rank]] = np.float32(lowest + np.float32(width * share))


# ---- over a piece


@_jit()
def _histogram(base, tasks, n_columns, vectors, score, leading, unchanged):  # type: ignore[no-untyped-def]
    delta_tile, origin_tile = np.empty(PADDED, np.float32), np.empty(PADDED, np.float32)
    score_tile = np.empty(PADDED, np.float32)
    # four tables, since equal bins that follow each other would wait for one another
    one, two = np.zeros(N_LEADING, np.uint32), np.zeros(N_LEADING, np.uint32)
    three, four = np.zeros(N_LEADING, np.uint32), np.zeros(N_LEADING, np.uint32)
    # the mask keeps a NaN inside the table; `apply` reports it
    mask, shift = np.uint32(N_LEADING - 1), np.uint32(TRAILING_BITS)
    count = np.uint32(1)
    n_tasks, n = tasks.shape
    for k in range(n_tasks):
        n_zero = 0
        for row in range(0, n, n_columns):
            for column in range(0, n_columns, TILE):
                m = min(TILE, n_columns - column)
                first = row + column
                delta, origin, scores = delta_tile[:m], origin_tile[:m], score_tile[:m]
                vector = vectors[k, column : column + m]
                _score_tile(
                    base[first : first + m], tasks[k, first : first + m], vector, score, origin,
                    delta, scores,
                )  # fmt: skip
                n_zero += _count_zeros(delta)
                bits = scores.view(np.uint32)
                for i in range(m // 4):
                    one[(bits[4 * i] >> shift) & mask] += count
                    two[(bits[4 * i + 1] >> shift) & mask] += count
                    three[(bits[4 * i + 2] >> shift) & mask] += count
                    four[(bits[4 * i + 3] >> shift) & mask] += count
                for i in range(m // 4 * 4, m):
                    one[(bits[i] >> shift) & mask] += count
        for i in range(N_LEADING):
            total = np.int64(one[i]) + np.int64(two[i]) + np.int64(three[i]) + np.int64(four[i])
            leading[k, i] += total
            one[i] = two[i] = three[i] = four[i] = 0
        # an unchanged entry scores zero, but is not there to be kept
        leading[k, 0] -= n_zero
        unchanged[k] += n_zero


@_jit()
def _select(  # type: ignore[no-untyped-def]
    base, tasks, n_columns, vectors, score, lowest, highest, above, inside, found
):
    delta_tile, origin_tile = np.empty(PADDED, np.float32), np.empty(PADDED, np.float32)
    score_tile = np.empty(PADDED, np.float32)
    n_tasks, n = tasks.shape
    for k in range(n_tasks):
        low, high = lowest[k], highest[k]
        at, room = inside[k], found.shape[1]
        for row in range(0, n, n_columns):
            for column in range(0, n_columns, TILE):
                m = min(TILE, n_columns - column)
                first = row + column
                delta, origin, scores = delta_tile[:m], origin_tile[:m], score_tile[:m]
                vector = vectors[k, column : column + m]
                _score_tile(
                    base[first : first + m], tasks[k, first : first + m], vector, score, origin,
                    delta, scores,
                )  # fmt: skip
                bits = scores.view(np.uint32)
                n_above, n_inside = np.uint32(0), np.uint32(0)
                for i in range(bits.size):
                    n_above = np.uint32(n_above + np.uint32(bits[i] > high))
                    n_inside = np.uint32(n_inside + np.uint32((bits[i] >= low) & (bits[i] <= high)))
                above[k] += n_above
                inside[k] += n_inside
                if n_inside == 0 or low == high or inside[k] > room:
                    continue
                for i in range(bits.size):
                    if bits[i] >= low and bits[i] <= high:
                        found[k, at] = bits[i]
                        at += 1


@_jit()
def _mark_in_bin(scores, delta, wanted, hits):  # type: ignore[no-untyped-def]
    """Marks changed entries whose score has the wanted leading bits."""
    bits = scores.view(np.uint32)
    mask, shift = np.uint32(N_LEADING - 1), np.uint32(TRAILING_BITS)
    for i in range(hits.size):
        hits[i] = np.uint8(((bits[i] >> shift) & mask) == wanted) & np.uint8(delta[i] != 0)


@_jit()
def _refine(base, tasks, n_columns, vectors, score, bins, trailing):  # type: ignore[no-untyped-def]
    delta_tile, origin_tile = np.empty(PADDED, np.float32), np.empty(PADDED, np.float32)
    score_tile = np.empty(PADDED, np.float32)
    hits = np.zeros(PADDED, np.uint8)
    words, bits = hits.view(np.uint64), score_tile.view(np.uint32)
    mask = np.uint32(N_TRAILING - 1)
    n_tasks, n = tasks.shape
    for k in range(n_tasks):
        if bins[k] < 0:
            continue
        wanted = np.uint32(bins[k])
        for row in range(0, n, n_columns):
            for column in range(0, n_columns, TILE):
                m = min(TILE, n_columns - column)
                first = row + column
                delta, origin, scores = delta_tile[:m], origin_tile[:m], score_tile[:m]
                vector = vectors[k, column : column + m]
                _score_tile(
                    base[first : first + m], tasks[k, first : first + m], vector, score, origin,
                    delta, scores,
                )  # fmt: skip
                _mark_in_bin(scores, delta, wanted, hits[:m])
                # few entries lie in the bin, so eight marks are looked at at a time
                for word in range((m + 7) // 8):
                    if words[word] == 0:
                        continue
                    for i in range(8 * word, min(8 * word + 8, m)):
                        if hits[i] != 0:
                            trailing[k, bits[i] & mask] += 1


@_jit()
def _joint_histogram(base, tasks, leading, unchanged, wanted, trailing):  # type: ignore[no-untyped-def]
    """Both levels of the variance's histogram: leading bits where `wanted` < 0, else trailing."""
    n_tasks, n = tasks.shape
    delta_tiles = np.empty((n_tasks, PADDED), np.float32)
    origin_tile, score_tile = np.empty(PADDED, np.float32), np.empty(PADDED, np.float32)
    changed_tile = np.empty(PADDED, np.float32)
    shift = np.uint32(TRAILING_BITS)
    for first in range(0, n, TILE):
        m = min(TILE, n - first)
        deltas, origin = delta_tiles, origin_tile[:m]
        scores, changed = score_tile[:m], changed_tile[:m]
        _decode(base[first : first + m], origin)
        for k in range(n_tasks):
            _decode(tasks[k, first : first + m], deltas[k][:m])
            _subtract(deltas[k][:m], origin)
        _variances_of(deltas, scores, changed)
        _any_changed(deltas, changed)
        bits = scores.view(np.uint32)
        for i in range(m):
            leading_bits = (bits[i] >> shift) & np.uint32(N_LEADING - 1)
            if changed[i] == 0:
                unchanged[0] += wanted < 0
            elif wanted < 0:
                leading[0, leading_bits] += 1
            elif leading_bits == np.uint32(wanted):
                trailing[0, bits[i] & np.uint32(N_TRAILING - 1)] += 1


@_jit()
def _add_votes(delta, mark, score, scale, rank, votes):  # type: ignore[no-untyped-def]
    """Adds one task's saliencies, signed as its deltas, where it keeps them."""
    zero = np.float32(0.0)
    if rank.size > 0:
        bits = score.view(np.uint32)
        for i in range(votes.size):
            # the mask keeps a NaN inside the table
            vote = rank[(bits[i] >> np.uint32(TRAILING_BITS)) & np.uint32(N_LEADING - 1)]
            vote = zero if (score[i] == 0) | (mark[i] == 0) else vote
            vote = -vote if delta[i] < 0 else vote
            votes[i] = np.float32(votes[i] + vote)
        return
    for i in range(votes.size):
        vote = np.float32(score[i] * scale)
        vote = zero if mark[i] == 0 else vote
        vote = -vote if delta[i] < 0 else vote
        votes[i] = np.float32(votes[i] + vote)


@_jit()
def _first_nonzero(first, second, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        preferred, other = first[i], second[i]
        out[i] = other if preferred == 0 else preferred


@_jit()
def _elect(deltas, values, scores, kept, scales, ranks, elect, votes, total, winner):  # type: ignore[no-untyped-def]
    """Decides which sign wins at each entry; see the rule that all methods share.

    `votes` and `total` are scratch, as is `winner`; the sign of what is returned won.
    """
    m = winner.size
    votes[:] = 0
    if elect == BY_SALIENCY:
        for k in range(len(deltas)):
            delta, mark, score = deltas[k][:m], kept[k][:m], scores[k][:m]
            _add_votes(delta, mark, score, scales[k], ranks[k], votes)
    total[:] = 0
    for k in range(len(deltas)):
        value = values[k][:m]
        for i in range(m):
            total[i] = np.float32(total[i] + value[i])
    _first_nonzero(votes, total, winner)
    total[:] = 1
    _first_nonzero(winner, total, votes)
    return votes


@_jit()
def _boost_lone(values, survives, boosts, count, boosted):  # type: ignore[no-untyped-def]
    """Scales what one task alone keeps (RAM+); `count` is scratch."""
    count[:] = 0
    for k in range(len(values)):
        mark = survives[k][: count.size]
        for i in range(count.size):
            count[i] += np.float32(mark[i])
    for k in range(len(values)):
        value, out, boost = values[k][: count.size], boosted[k][: count.size], boosts[k]
        for i in range(count.size):
            shared = value[i]
            lone = np.float32(shared * boost)
            out[i] = lone if count[i] == 1 else shared


@_jit()
def _combine(values, factors, survives, weights, keep, combine, update, divisor):  # type: ignore[no-untyped-def]
    """Sums the survivors with their weights; see `Rule.combine`."""
    zero = np.float32(0.0)
    update[:] = 0
    divisor[:] = 0
    for k in range(len(values)):
        m, weight = update.size, weights[k]
        value, factor, mark = values[k][:m], factors[k][:m], survives[k][:m]
        if combine == RATIO:
            for i in range(update.size):
                share = np.float32(weight * factor[i])
                update[i] = np.float32(update[i] + np.float32(value[i] * share))
                divisor[i] = np.float32(divisor[i] + share)
            continue
        for i in range(update.size):
            term = np.float32(value[i] * weight)
            update[i] = np.float32(update[i] + (zero if mark[i] == 0 else term))
        if combine == MEAN:
            for i in range(update.size):
                divisor[i] = np.float32(divisor[i] + np.float32(mark[i]))
        elif combine == AVERAGE:
            everywhere = keep == ALL
            for i in range(update.size):
                share = weight if everywhere | (mark[i] != 0) else zero
                divisor[i] = np.float32(divisor[i] + share)
    if combine == SUM:
        return
    if combine == RATIO:
        # where no statistic tells the tasks apart: their weighted average
        for i in range(update.size):
            if divisor[i] == 0:
                update[i] = zero
                for k in range(len(values)):
                    term = np.float32(values[k, i] * weights[k])
                    update[i] = np.float32(update[i] + term)
                    divisor[i] = np.float32(divisor[i] + weights[k])
    for i in range(update.size):
        by = divisor[i]
        by = np.float32(1.0) if by == 0 else by
        update[i] = np.float32(update[i] / by)


@_jit()
def _restore(update, origin, parents, deltas, merged, result, other):  # type: ignore[no-untyped-def]
    """Adds the update to the base; where fp32 misses a parent's own value, takes the parent's.

    base + (parent - base) may differ from the parent by the last bit, or, where base is far
    larger, by more. Where the merged value is what fp32 makes of base + (parent - base), the
    parent's is exact and is taken; where it equals the base, the base's (a signed zero). So an
    agent that equals the base leaves the VLM untouched to the bit. The first task has precedence.
    `merged` and `other` are scratch, as is `result`; what is returned holds the values.
    """
    m = update.size
    for i in range(m):
        here = origin[i]
        sum_of = np.float32(here + update[i])
        merged[i] = sum_of
        result[i] = here if sum_of == here else sum_of
    for back in range(len(deltas)):
        k = len(deltas) - 1 - back
        parent, delta = parents[k][:m], deltas[k][:m]
        for i in range(m):
            theirs, ours = parent[i], result[i]
            own = np.float32(origin[i] + delta[i])
            other[i] = theirs if merged[i] == own else ours
        result, other = other, result
    return result


@_jit()
def _sum_marks(marks):  # type: ignore[no-untyped-def]
    total = np.uint32(0)
    for i in range(marks.size):
        total += np.uint32(marks[i])
    return np.int64(total)


@_jit()
def _mark_conflicts(deltas, kept, up, down):  # type: ignore[no-untyped-def]
    """Marks in `up` the entries where kept deltas have opposite signs; `down` is scratch."""
    if len(deltas) == 2:
        one, two = deltas[0][: up.size].view(np.uint32), deltas[1][: up.size].view(np.uint32)
        mark, other = kept[0][: up.size], kept[1][: up.size]
        for i in range(up.size):
            up[i] = np.uint8((one[i] ^ two[i]) >> np.uint32(31)) & mark[i] & other[i]
        return
    up[:] = 0
    down[:] = 0
    for k in range(len(deltas)):
        delta, mark = deltas[k][: up.size], kept[k][: up.size]
        for i in range(up.size):
            up[i] |= mark[i] & np.uint8(delta[i] > 0)
        for i in range(up.size):
            down[i] |= mark[i] & np.uint8(delta[i] < 0)
    for i in range(up.size):
        up[i] &= down[i]


@_jit()
def _count(deltas, kept, winner, conflict, scratch, counts):  # type: ignore[no-untyped-def]
    """Adds to counts: kept [K], conflicts won [K], conflicts [1]; all but counts is read only."""
    n_tasks, m = len(deltas), winner.size
    for k in range(n_tasks):
        counts[k] += _sum_marks(kept[k][:m])
    _mark_conflicts(deltas, kept, conflict, scratch)
    n_conflicts = _sum_marks(conflict)
    if n_conflicts == 0:
        return
    counts[2 * n_tasks] += n_conflicts
    for k in range(n_tasks):
        _mark_agreeing(deltas[k][:m], winner, kept[k][:m], scratch)
        _and(scratch, conflict)
        counts[n_tasks + k] += _sum_marks(scratch)


@_jit()
def _count_alone(kept, n, counts):  # type: ignore[no-untyped-def]
    """Adds to counts [K] the entries that one task alone keeps."""
    for i in range(n):
        n_keeping, keeper = 0, 0
        for k in range(len(kept)):
            if kept[k, i] != 0:
                n_keeping, keeper = n_keeping + 1, k
        if n_keeping == 1:
            counts[keeper] += 1


@_jit(fastmath={"reassoc"})
def _sum_squares(values):  # type: ignore[no-untyped-def]
    """Squared norm of a tile. It steers nothing, so the order of summing is the compiler's."""
    total = np.float32(0.0)
    for i in range(values.size):
        total += values[i] * values[i]
    return np.float64(total)


@_jit(fastmath={"reassoc"})
def _sum_squares_in_fp64(values):  # type: ignore[no-untyped-def]
    """The same for SCE's weights: no order of summing may be seen in them once they are rounded."""
    total = np.float64(0.0)
    for i in range(values.size):
        total += np.float64(np.float32(values[i] * values[i]))
    return total


@_jit(fastmath={"reassoc"})
def _add_saliency(scores, mark, totals, k, n_tasks):  # type: ignore[no-untyped-def]
    """Adds one task's saliencies of a tile, and those that it keeps, to totals [2 K]."""
    total, kept, zero = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for i in range(scores.size):
        total += scores[i]
        kept += scores[i] if mark[i] != 0 else zero
    totals[k] += total
    totals[n_tasks + k] += kept


@_jit()
def _keep_tile(  # type: ignore[no-untyped-def]
    deltas, scores, row_chances, column, first, keep, rescale, thresholds, ties, upper,
    ties_dropped, keys, probability, changed_above, scratch, joint, kept, values, m,
):  # fmt: skip
    """Marks what each task keeps of a tile, and sets the values that it adds."""
    drawn, chance = scratch[0][:m], scratch[1][:m]
    if keep == VARIANCE:
        _variances_of(deltas, drawn, chance)
        _any_changed(deltas, chance)
        _keep_above(drawn, chance, thresholds[0], ties, 0, joint)
    for k in range(len(deltas)):
        delta, mark, value = deltas[k][:m], kept[k][:m], values[k][:m]
        if keep in (TOP, BAND):
            _keep_above(scores[k][:m], delta, thresholds[k], ties, k, mark)
            if keep == BAND:
                _keep_above(scores[k][:m], delta, upper[k], ties_dropped, k, joint)
                _and_not(mark, joint)
        elif keep in (RANDOM, MAGPRUNE):
            if keep == MAGPRUNE:
                chance[:] = row_chances[k, column : column + m]
            else:
                chance[:] = probability
            _uniform(keys[k], first, drawn)
            _mark_drawn(delta, drawn, chance, mark)
        else:
            _mark_larger(delta, changed_above if keep == ABOVE else np.float32(0.0), mark)
            if keep == VARIANCE:
                _and(mark, joint)
        if rescale:
            _divide_kept(delta, mark, chance, value)
        else:
            _take_kept(delta, mark, value)


@_jit()
def _settle_tile(  # type: ignore[no-untyped-def]
    origin, parents, deltas, scores, factors, kept, survives, values, keep, elect, combine, boost,
    weights, scales, ranks, boosts, scratch, up, down, counts, squares, m,
):  # fmt: skip
    """Elects, combines and counts a tile; returns the merged values, in one of the buffers."""
    n_tasks = len(deltas)
    update, divisor, total = scratch[0][:m], scratch[1][:m], scratch[2][:m]
    winner = scratch[3][:m]
    if elect == NO_ELECTION:
        for k in range(n_tasks):
            survives[k, :m] = kept[k, :m]
    else:
        winner = _elect(deltas, values, scores, kept, scales, ranks, elect, total, divisor, winner)
        total = scratch[4][:m]  # the winner may lie in the buffer that served the votes
        for k in range(n_tasks):
            _mark_agreeing(deltas[k][:m], winner, kept[k][:m], survives[k][:m])
    for k in range(n_tasks):
        squares[k] += _sum_squares(deltas[k][:m])
        if keep == VARIANCE:
            squares[n_tasks + 1 + k] += _sum_squares_in_fp64(values[k][:m])
    terms = values
    if boost:
        _count_alone(kept, m, counts[2 * n_tasks + 1 :])
        _boost_lone(values, survives, boosts, total, scores)
        terms = scores
    _combine(terms, factors, survives, weights, keep, combine, update, divisor)
    squares[n_tasks] += _sum_squares(update)
    # the sign that won is the election's, or the one that the update has
    _count(deltas, kept, update if elect == NO_ELECTION else winner, up, down, counts)
    return _restore(update, origin, parents, deltas, divisor, winner, total)


@_jit()
def _apply(  # type: ignore[no-untyped-def]
    base, tasks, n_columns, begin, vectors, entries, out,
    keep, score, rescale, elect, combine, boost,
    weights, thresholds, ties, upper, ties_dropped, scales, ranks, keys, boosts,
    probability, window, changed_above,
    counts, squares,
):  # fmt: skip
    n_tasks, n = tasks.shape
    origin_tile = np.empty(PADDED, np.float32)
    scratch = np.empty((5, PADDED), np.float32)
    several = np.zeros((5, n_tasks, PADDED), np.float32)
    parents, deltas, scores = several[0], several[1], several[2]
    values, factors = several[3], several[4]
    marks = np.zeros((2, n_tasks, PADDED), np.uint8)
    kept, survives = marks[0], marks[1]
    scratch_marks = np.zeros((2, PADDED), np.uint8)
    row_chances = np.ones((n_tasks, n_columns if keep == MAGPRUNE else 0), np.float32)
    row_delta = np.empty(row_chances.shape[1], np.float32)
    needs_score = keep in (TOP, BAND) or elect == BY_SALIENCY
    bad = np.int64(0)
    for row in range(0, n, n_columns):
        if keep == MAGPRUNE:
            for k in range(n_tasks):
                for column in range(0, n_columns, TILE):
                    m = min(TILE, n_columns - column)
                    origin, delta = origin_tile[:m], row_delta[column : column + m]
                    _decode(base[row + column : row + column + m], origin)
                    _decode(tasks[k, row + column : row + column + m], delta)
                    _subtract(delta, origin)
                _row_probabilities(row_delta, probability, window, row_chances[k])
        for column in range(0, n_columns, TILE):
            m = min(TILE, n_columns - column)
            first = row + column
            origin = origin_tile[:m]
            up, down = scratch_marks[0][:m], scratch_marks[1][:m]
            bad |= np.int64(_decode(base[first : first + m], origin))
            for k in range(n_tasks):
                parent, delta = parents[k][:m], deltas[k][:m]
                vector = vectors[k, column : column + m]
                bad |= np.int64(_decode(tasks[k, first : first + m], parent)) << np.int64(1 + k)
                delta[:] = parent
                _subtract(delta, origin)
                if needs_score:
                    _scores_of(delta, vector, score, scores[k][:m])
                if combine == RATIO:
                    factors[k, :m] = entries[k, first : first + m] if score == ENTRY else vector
            _keep_tile(
                deltas, scores, row_chances, column, begin + first, keep, rescale, thresholds,
                ties, upper, ties_dropped, keys, probability, changed_above, scratch, up, kept,
                values, m,
            )  # fmt: skip
            if needs_score and score == SALIENCY:
                for k in range(n_tasks):
                    totals = squares[2 * n_tasks + 1 :]
                    _add_saliency(scores[k][:m], kept[k][:m], totals, k, n_tasks)
            merged = _settle_tile(
                origin, parents, deltas, scores, factors, kept, survives, values, keep, elect,
                combine, boost, weights, scales, ranks, boosts, scratch, up, down, counts,
                squares, m,
            )  # fmt: skip
            bad |= np.int64(_encode(merged, out[first : first + m])) << np.int64(1 + n_tasks)
    return bad


# ---- what the engine calls


def has_saliency(rule: Rule) -> bool:
    """Whether the rule ranks entries, or lets them vote, by what dropping them costs."""
    return rule.score == "saliency" and (rule.keep in ("top", "band") or rule.elect == "saliency")


def histogram(piece: Piece, score: str, leading: np.ndarray, unchanged: np.ndarray) -> None:
    """Adds the piece's changed entries to the counts of leading bits.

    Args:
        piece: Rows.
        score: magnitude or saliency, counted task by task; variance, counted once for all.
        leading: int64 [K, 65,536], or [1, 65,536] for variance; added to.
        unchanged: int64 [K] or [1]: entries whose delta is zero; added to.
    """
    if piece.base.size == 0:
        return
    if score == "variance":
        nothing = np.zeros((1, 1), np.int64)
        _joint_histogram(piece.base, piece.tasks, leading, unchanged, -1, nothing)
        return
    code = SCORES.index(score)
    if piece.base.dtype == np.uint16:
        kernels_pair.histogram(
            piece.base, piece.tasks, piece.n_columns, piece.vectors, code == SALIENCY, leading,
            unchanged,
        )  # fmt: skip
        return
    _histogram(
        piece.base, piece.tasks, piece.n_columns, piece.vectors, code, leading, unchanged
    )  # fmt: skip


def refine(piece: Piece, score: str, bins: np.ndarray, trailing: np.ndarray) -> None:
    """Adds the piece's entries that score in one bin to the counts of trailing bits.

    Args:
        piece: Rows.
        score: As for `histogram`.
        bins: int64 [K] or [1]: the bin of each task; negative where none is wanted.
        trailing: int64 [K, 32,768] or [1, 32,768]; added to.
    """
    if piece.base.size == 0 or not bool((bins >= 0).any()):
        return
    if score == "variance":
        nothing = np.zeros((1, 1), np.int64)
        _joint_histogram(
            piece.base, piece.tasks, nothing, nothing[0], int(bins[0]), trailing
        )  # fmt: skip
        return
    code = SCORES.index(score)
    if piece.base.dtype == np.uint16:
        kernels_pair.refine(
            piece.base, piece.tasks, piece.n_columns, piece.vectors, code == SALIENCY, bins,
            trailing,
        )  # fmt: skip
        return
    _refine(piece.base, piece.tasks, piece.n_columns, piece.vectors, code, bins, trailing)


def select(
    piece: Piece,
    score: str,
    lowest: np.ndarray,
    highest: np.ndarray,
    above: np.ndarray,
    inside: np.ndarray,
    found: np.ndarray,
) -> None:
    """Counts the piece's entries above each task's bracket and inside, and collects the latter.

    Args:
        piece: Rows.
        score: magnitude or saliency.
        lowest: uint32 [K], above 0: bits of the smallest score inside.
        highest: uint32 [K]: bits of the largest score inside.
        above: int64 [K]: entries that score more; added to.
        inside: int64 [K]: entries that score inside; added to.
        found: uint32 [K, room]: gets the bits of the scores inside, in any order, behind those
            that `inside` counts already. Nothing is written where lowest and highest are equal,
            or once there is no room.
    """
    if piece.base.size == 0:
        return
    code = SCORES.index(score)
    if piece.base.dtype == np.uint16 and len(piece.tasks) == 2:
        kernels_pair.select(
            piece.base, piece.tasks, piece.n_columns, piece.vectors, code == SALIENCY, lowest,
            highest, above, inside, found,
        )  # fmt: skip
        return
    _select(
        piece.base, piece.tasks, piece.n_columns, piece.vectors, code, lowest, highest, above,
        inside, found,
    )  # fmt: skip


def _pair_rule(piece: Piece, decision: Decision, out: np.ndarray) -> int | None:
    """Number of the rule in `kernels_pair`, or None where that does not serve."""
    rule = decision.rule
    is_pair = len(piece.tasks) == 2 and piece.base.dtype == out.dtype == np.uint16
    is_plain = not (rule.rescale or rule.boost or rule.energy or decision.ranks.shape[1])
    key = (rule.keep, rule.score, rule.elect, rule.combine)
    if not (piece.base.size and is_pair and is_plain) or key not in kernels_pair.RULES:
        return None
    return kernels_pair.RULES.index(key)


def apply(piece: Piece, decision: Decision, out: np.ndarray) -> Counts:
    """Merges a piece: keep, elect, combine, round.

    Args:
        piece: Rows; the pieces of a tensor come in order.
        decision: The tensor's numbers; its counts of ties go down.
        out: uint16 [n] for bf16 bits, or fp32 [n]; written.

    Returns:
        Counts over the piece.
    """
    n_tasks = len(piece.tasks)
    counts = np.zeros(3 * n_tasks + 1, np.int64)
    squares = np.zeros(4 * n_tasks + 1, np.float64)
    rule = decision.rule
    bad = 0
    pair_rule = _pair_rule(piece, decision, out)
    if pair_rule is not None:
        bad = kernels_pair.apply(
            piece.base, piece.tasks, piece.n_columns, piece.vectors, pair_rule,
            decision.thresholds, decision.ties, decision.scales, decision.weights, out, counts,
            squares,
        )  # fmt: skip
    elif piece.base.size:
        bad = _apply(
            piece.base, piece.tasks, piece.n_columns, piece.begin, piece.vectors, piece.entries,
            out, KEEPS.index(rule.keep), SCORES.index(rule.score), rule.rescale,
            ELECTS.index(rule.elect), COMBINES.index(rule.combine), rule.boost,
            decision.weights, decision.thresholds, decision.ties, decision.upper,
            decision.ties_dropped, decision.scales, decision.ranks, decision.keys,
            decision.boosts, decision.probability, decision.window, decision.changed_above,
            counts, squares,
        )  # fmt: skip
    return Counts(
        kept=counts[:n_tasks],
        conflicts=int(counts[2 * n_tasks]),
        conflicts_won=counts[n_tasks : 2 * n_tasks],
        alone=counts[2 * n_tasks + 1 :],
        kept_square=squares[n_tasks + 1 : 2 * n_tasks + 1],
        delta_square=squares[:n_tasks],
        update_square=float(squares[n_tasks]),
        not_finite=int(bad),
        saliency=squares[2 * n_tasks + 1 : 3 * n_tasks + 1] if has_saliency(rule) else None,
        saliency_kept=squares[3 * n_tasks + 1 :] if has_saliency(rule) else None,
    )
