"""The kernels for the usual case, in fewer passes over memory: two task vectors, all bf16.

What `kernels` does in many short loops over decoded tiles is one loop here for the rules that only
compare and add (task arithmetic, TIES, OBM), from the stored bits to the stored bits, with the same
operations in the same order and so the same result. `kernels` comes here by itself.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

TILE = 4096
# A score is a non-negative fp32: its bits order as it does. Leading: 8 bits of exponent and 8 of
# fraction; trailing: the other 15 bits of fraction.
TRAILING_BITS = 15
N_LEADING = 1 << 16
ALL_TIES = np.iinfo(np.int64).max


@intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    """The fp32 value that has these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(typing_context: Any, value: Any) -> Any:
    """The bits of an fp32 value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _make_passes(weighed: bool) -> tuple[Any, Any, Any]:
    """Compiles the passes over scores; `weighed`: v[j] * delta^2 instead of |delta|."""

    @njit(nogil=True, cache=True, error_model="numpy")
    def fill_bins(base, task, vector, bins):  # type: ignore[no-untyped-def]
        """Leading bits of the scores of a tile."""
        for i in range(bins.size):
            origin = _as_float(np.uint32(base[i]) << np.uint32(16))
            delta = np.float32(_as_float(np.uint32(task[i]) << np.uint32(16)) - origin)
            score = np.float32(vector[i] * np.float32(delta * delta)) if weighed else abs(delta)
            bins[i] = np.uint16(_as_bits(score) >> np.uint32(TRAILING_BITS))

    @njit(nogil=True, cache=True, error_model="numpy")
    def fill_hits(base, task, vector, wanted, hits, low):  # type: ignore[no-untyped-def]
        """Marks the changed entries of a tile whose score has the wanted leading bits.

        Sets `low` to the trailing bits of all scores; returns the number of marks.
        """
        n_hits = np.uint32(0)
        for i in range(hits.size):
            origin = _as_float(np.uint32(base[i]) << np.uint32(16))
            delta = np.float32(_as_float(np.uint32(task[i]) << np.uint32(16)) - origin)
            score = np.float32(vector[i] * np.float32(delta * delta)) if weighed else abs(delta)
            bits = _as_bits(score)
            is_hit = ((bits >> np.uint32(TRAILING_BITS)) == wanted) & (delta != 0)
            hits[i] = np.uint8(is_hit)
            low[i] = np.uint16(bits & np.uint32((1 << TRAILING_BITS) - 1))
            n_hits += np.uint32(is_hit)
        return np.int64(n_hits)

    @njit(nogil=True, cache=True, error_model="numpy")
    def count_ties(base, task, vector, threshold):  # type: ignore[no-untyped-def]
        """Changed entries of a tile that score exactly the threshold."""
        n_ties = np.uint32(0)
        for i in range(base.size):
            origin = _as_float(np.uint32(base[i]) << np.uint32(16))
            delta = np.float32(_as_float(np.uint32(task[i]) << np.uint32(16)) - origin)
            score = np.float32(vector[i] * np.float32(delta * delta)) if weighed else abs(delta)
            n_ties += np.uint32((score == threshold) & (delta != 0))
        return np.int64(n_ties)

    return fill_bins, fill_hits, count_ties


_PLAIN_BINS, _PLAIN_HITS, _PLAIN_TIES = _make_passes(False)
_WEIGHED_BINS, _WEIGHED_HITS, _WEIGHED_TIES = _make_passes(True)


@njit(nogil=True, cache=True)
def _count_unchanged(base, task):  # type: ignore[no-untyped-def]
    n_zero = np.uint32(0)
    for i in range(base.size):
        # the same bits, or zeros of either sign
        both = (base[i] | task[i]) & np.uint16(0x7FFF)
        n_zero += np.uint32((base[i] == task[i]) | (both == 0))
    return np.int64(n_zero)


@njit(nogil=True, cache=True)
def histogram(base, tasks, n_columns, vectors, weighed, leading, unchanged):  # type: ignore[no-untyped-def]
    """As `kernels.histogram`, for scores of single tasks; all arrays as there."""
    bins_tile, nothing = np.empty(TILE, np.uint16), np.empty(TILE, np.float32)
    # four tables, since equal bins that follow each other would wait for one another
    one, two = np.zeros(N_LEADING, np.uint32), np.zeros(N_LEADING, np.uint32)
    three, four = np.zeros(N_LEADING, np.uint32), np.zeros(N_LEADING, np.uint32)
    count = np.uint32(1)
    n_tasks, n = tasks.shape
    for k in range(n_tasks):
        n_zero = 0
        for row in range(0, n, n_columns):
            for column in range(0, n_columns, TILE):
                m = min(TILE, n_columns - column)
                first = row + column
                origin, task = base[first : first + m], tasks[k, first : first + m]
                bins = bins_tile[:m]
                if weighed:
                    _WEIGHED_BINS(origin, task, vectors[k, column : column + m], bins)
                else:
                    _PLAIN_BINS(origin, task, nothing[:m], bins)
                n_zero += _count_unchanged(origin, task)
                for i in range(m // 4):
                    one[bins[4 * i]] += count
                    two[bins[4 * i + 1]] += count
                    three[bins[4 * i + 2]] += count
                    four[bins[4 * i + 3]] += count
                for i in range(m // 4 * 4, m):
                    one[bins[i]] += count
        for i in range(N_LEADING):
            total = np.int64(one[i]) + np.int64(two[i]) + np.int64(three[i]) + np.int64(four[i])
            leading[k, i] += total
            one[i] = two[i] = three[i] = four[i] = 0
        # an unchanged entry scores zero, but is not there to be kept
        leading[k, 0] -= n_zero
        unchanged[k] += n_zero


@njit(nogil=True, cache=True)
def refine(base, tasks, n_columns, vectors, weighed, wanted_bins, trailing):  # type: ignore[no-untyped-def]
    """As `kernels.refine`, for scores of single tasks; all arrays as there."""
    hits = np.zeros(TILE, np.uint8)
    words, low = hits.view(np.uint64), np.empty(TILE, np.uint16)
    nothing = np.empty(TILE, np.float32)
    n_tasks, n = tasks.shape
    for k in range(n_tasks):
        if wanted_bins[k] < 0:
            continue
        wanted = np.uint32(wanted_bins[k])
        for row in range(0, n, n_columns):
            for column in range(0, n_columns, TILE):
                m = min(TILE, n_columns - column)
                first = row + column
                origin, task = base[first : first + m], tasks[k, first : first + m]
                if weighed:
                    vector = vectors[k, column : column + m]
                    n_hits = _WEIGHED_HITS(origin, task, vector, wanted, hits[:m], low[:m])
                else:
                    n_hits = _PLAIN_HITS(origin, task, nothing[:m], wanted, hits[:m], low[:m])
                if 8 * n_hits > m:
                    # many ties: adding noughts and ones costs less than asking
                    for i in range(m):
                        trailing[k, low[i]] += hits[i]
                    continue
                # few entries lie in the bin, so eight marks are looked at at a time
                for word in range((m + 7) // 8):
                    if words[word] == 0:
                        continue
                    for i in range(8 * word, min(8 * word + 8, m)):
                        if hits[i] != 0:
                            trailing[k, low[i]] += 1


def _make_merge(trims: bool, weighed: bool, elects: bool, averages: bool) -> Any:
    """Compiles the loop of one rule: trim to a threshold, weigh by inputs, elect, average."""

    @njit(nogil=True, cache=True, error_model="numpy")
    def merge(base, one, two, v, w, t_one, t_two, scales, weights, out, update, counts):  # type: ignore[no-untyped-def]
        zero, unit = np.float32(0.0), np.float32(1.0)
        s_one, s_two, l_one, l_two = scales[0], scales[1], weights[0], weights[1]
        kept_one, kept_two = np.uint32(0), np.uint32(0)
        clashes, won_one, won_two = np.uint32(0), np.uint32(0), np.uint32(0)
        for i in range(base.size):
            origin = _as_float(np.uint32(base[i]) << np.uint32(16))
            p = _as_float(np.uint32(one[i]) << np.uint32(16))
            q = _as_float(np.uint32(two[i]) << np.uint32(16))
            d, e = np.float32(p - origin), np.float32(q - origin)
            keep_d, keep_e = d != 0, e != 0
            score_d, score_e = abs(d), abs(e)
            if weighed:
                score_d = np.float32(v[i] * np.float32(d * d))
                score_e = np.float32(w[i] * np.float32(e * e))
            if trims:
                keep_d &= score_d > t_one
                keep_e &= score_e > t_two
            x, y = d if keep_d else zero, e if keep_e else zero
            stay_d, stay_e = keep_d, keep_e
            total = np.float32(np.float32(zero + x) + y)
            winner = total
            if elects:
                if weighed:
                    vote_d, vote_e = np.float32(score_d * s_one), np.float32(score_e * s_two)
                    vote_d, vote_e = vote_d if keep_d else zero, vote_e if keep_e else zero
                    vote_d, vote_e = -vote_d if d < 0 else vote_d, -vote_e if e < 0 else vote_e
                    votes = np.float32(np.float32(zero + vote_d) + vote_e)
                    winner = total if votes == 0 else votes
                winner = unit if winner == 0 else winner
                stay_d = keep_d & ((d > 0) == (winner > 0))
                stay_e = keep_e & ((e > 0) == (winner > 0))
            term_d, term_e = np.float32(x * l_one), np.float32(y * l_two)
            term_d, term_e = term_d if stay_d else zero, term_e if stay_e else zero
            change = np.float32(np.float32(zero + term_d) + term_e)
            if averages:
                both = stay_d & stay_e
                change = np.float32(change / np.float32(2.0)) if both else change
            update[i] = change
            if not elects:
                winner = change
            merged = np.float32(origin + change)
            value = origin if merged == origin else merged
            value = q if merged == np.float32(origin + e) else value
            value = p if merged == np.float32(origin + d) else value
            bits = _as_bits(value)
            # to nearest even: half a unit is added, less one where the last bit is even
            even = (bits >> np.uint32(16)) & np.uint32(1)
            out[i] = np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
            clash = keep_d & keep_e & ((d > 0) != (e > 0))
            kept_one += np.uint32(keep_d)
            kept_two += np.uint32(keep_e)
            clashes += np.uint32(clash)
            won_one += np.uint32(clash & (winner != 0) & ((d > 0) == (winner > 0)))
            won_two += np.uint32(clash & (winner != 0) & ((e > 0) == (winner > 0)))
        counts[0] += kept_one
        counts[1] += kept_two
        counts[2] += won_one
        counts[3] += won_two
        counts[4] += clashes

    return merge


ADD = _make_merge(False, False, False, False)
TIES_MEAN = _make_merge(True, False, True, True)
OBM_SUM = _make_merge(True, True, True, False)
OBM_MEAN = _make_merge(True, True, True, True)


@njit(nogil=True, cache=True)
def any_not_finite(stored):  # type: ignore[no-untyped-def]
    """Whether bf16 bits hold NaN or infinity."""
    bad = np.uint16(0)
    for i in range(stored.size):
        bad |= np.uint16((stored[i] & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return np.int64(bad)


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def square_of_delta(base, task):  # type: ignore[no-untyped-def]
    """Squared norm of a tile's deltas. It steers nothing, so the compiler orders the sum."""
    total = np.float32(0.0)
    for i in range(base.size):
        origin = _as_float(np.uint32(base[i]) << np.uint32(16))
        delta = np.float32(_as_float(np.uint32(task[i]) << np.uint32(16)) - origin)
        total += delta * delta
    return np.float64(total)


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def square(values):  # type: ignore[no-untyped-def]
    """Squared norm of a tile."""
    total = np.float32(0.0)
    for i in range(values.size):
        total += values[i] * values[i]
    return np.float64(total)


@njit(nogil=True, cache=True)
def _just_below(threshold):  # type: ignore[no-untyped-def]
    """The largest fp32 below, so that `>` keeps what ties; scores are not negative."""
    if threshold <= 0:
        return np.float32(-1.0)
    return _as_float(np.uint32(_as_bits(threshold) - np.uint32(1)))


@njit(nogil=True, cache=True)
def _count_ties(base, task, vector, weighed, threshold):  # type: ignore[no-untyped-def]
    if weighed:
        return _WEIGHED_TIES(base, task, vector, threshold)
    return _PLAIN_TIES(base, task, vector, threshold)


@njit(nogil=True, cache=True)
def _place_of_tie(base, task, vector, weighed, threshold, number):  # type: ignore[no-untyped-def]
    """Index behind the tie of this number, counted from 1."""
    for i in range(base.size):
        number -= _count_ties(
            base[i : i + 1], task[i : i + 1], vector[i : i + 1], weighed, threshold
        )
        if number == 0:
            return i + 1
    return base.size


@njit(nogil=True, cache=True)
def _merge_part(rule, base, one, two, v, w, limits, scales, weights, out, update, counts):  # type: ignore[no-untyped-def]
    a, b = limits[0], limits[1]
    if rule == 0:
        ADD(base, one, two, v, w, a, b, scales, weights, out, update, counts)
    elif rule == 1:
        TIES_MEAN(base, one, two, v, w, a, b, scales, weights, out, update, counts)
    elif rule == 2:
        OBM_SUM(base, one, two, v, w, a, b, scales, weights, out, update, counts)
    else:
        OBM_MEAN(base, one, two, v, w, a, b, scales, weights, out, update, counts)


@njit(nogil=True, cache=True)
def apply(  # type: ignore[no-untyped-def]
    base, tasks, n_columns, vectors, rule, thresholds, ties, scales, weights, out, counts, squares
):
    """As `kernels.apply`, for the rules in `RULES`.

    Args:
        rule: Place in `RULES`.
        counts: int64 [5]: kept by task, conflicts won by task, conflicts; added to.
        squares: fp64 [3]: squared norms of the deltas and of the update; added to.

    Returns:
        Bits as in `kernels.Counts.not_finite`.
    """
    update_tile, nothing = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    limits = np.empty(2, np.float32)
    weighed, n = rule >= 2, base.size
    bad = np.int64(0)
    for row in range(0, n, n_columns):
        for column in range(0, n_columns, TILE):
            begin, last = row + column, row + min(column + TILE, n_columns)
            while begin < last:
                end = last
                for k in range(2):
                    limits[k] = thresholds[k]
                    if ties[k] == ALL_TIES or rule == 0:
                        limits[k] = _just_below(thresholds[k])
                    elif ties[k] > 0:
                        # where the last tie that is kept lies in this tile, the tile ends there
                        vector = nothing[: end - begin]
                        if weighed:
                            vector = vectors[k, begin - row : end - row]
                        origin, task = base[begin:end], tasks[k, begin:end]
                        n_ties = _count_ties(origin, task, vector, weighed, thresholds[k])
                        if n_ties > ties[k]:
                            end = begin + _place_of_tie(
                                origin, task, vector, weighed, thresholds[k], ties[k]
                            )
                v, w = nothing[: end - begin], nothing[: end - begin]
                if weighed:
                    v = vectors[0, begin - row : end - row]
                    w = vectors[1, begin - row : end - row]
                origin, result = base[begin:end], out[begin:end]
                one, two = tasks[0, begin:end], tasks[1, begin:end]
                for k in range(2):
                    if rule > 0 and 0 < ties[k] < ALL_TIES:
                        task, vector = (one, v) if k == 0 else (two, w)
                        limits[k] = _just_below(thresholds[k])
                        ties[k] -= _count_ties(origin, task, vector, weighed, thresholds[k])
                update = update_tile[: end - begin]
                _merge_part(
                    rule, origin, one, two, v, w, limits, scales, weights, result, update, counts
                )
                bad |= any_not_finite(origin) | any_not_finite(one) << 1
                bad |= any_not_finite(two) << 2 | any_not_finite(result) << 3
                squares[0] += square_of_delta(origin, one)
                squares[1] += square_of_delta(origin, two)
                squares[2] += square(update)
                begin = end
    return bad


RULES = (
    ("all", "magnitude", "none", "sum"),
    ("top", "magnitude", "sum", "mean"),
    ("top", "saliency", "saliency", "sum"),
    ("top", "saliency", "saliency", "mean"),
)
"""(keep, score, elect, combine) of the rules that `apply` knows, in its numbering."""
