"""The kernels for the usual case, in fewer passes over memory: two task vectors, all bf16.

What `kernels` does in many short loops over decoded tiles is one loop here for the rules that only
compare and add (task arithmetic, TIES, OBM), from the stored bits to the stored bits, with the same
operations in the same order and so the same result. `kernels` comes here by itself.

Numba adds two uint32 in 64 bits; the sum of a counter is cut back to 32 bits each time, or the loop
would get half as many lanes.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from merge.jit import jit

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


@intrinsic
def _add_in_any_order(typing_context: Any, total: Any, term: Any) -> Any:
    """The sum of two fp32 of a chain that the compiler may order; it steers nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(arguments[0], arguments[1], flags=("reassoc",))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _first_set(typing_context: Any, word: Any) -> Any:
    """Index of the lowest bit that is set in a word that is not zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


def _make_passes(weighed: bool) -> tuple[Any, Any]:
    """Compiles the passes over scores; `weighed`: v[j] * delta^2 instead of |delta|."""

    @jit(error_model="numpy")
    def fill_bins(base, task, vector, bins):  # type: ignore[no-untyped-def]
        """Leading bits of the scores of a tile."""
        for i in range(bins.size):
            origin = _as_float(np.uint32(base[i]) << np.uint32(16))
            delta = np.float32(_as_float(np.uint32(task[i]) << np.uint32(16)) - origin)
            score = np.float32(vector[i] * np.float32(delta * delta)) if weighed else abs(delta)
            bins[i] = np.uint16(_as_bits(score) >> np.uint32(TRAILING_BITS))

    @jit(error_model="numpy")
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
            # the sign of a NaN is no part of its bin, as in `fill_bins`
            leading = (bits >> np.uint32(TRAILING_BITS)) & np.uint32(N_LEADING - 1)
            is_hit = (leading == wanted) & (delta != 0)
            hits[i] = np.uint8(is_hit)
            low[i] = np.uint16(bits & np.uint32((1 << TRAILING_BITS) - 1))
            n_hits = np.uint32(n_hits + np.uint32(is_hit))
        return np.int64(n_hits)

    return fill_bins, fill_hits


_PLAIN_BINS, _PLAIN_HITS = _make_passes(False)
_WEIGHED_BINS, _WEIGHED_HITS = _make_passes(True)


@jit()
def _count_unchanged(base, task):  # type: ignore[no-untyped-def]
    n_zero = np.uint32(0)
    for i in range(base.size):
        # the same bits, or zeros of either sign
        both = (base[i] | task[i]) & np.uint16(0x7FFF)
        n_zero = np.uint32(n_zero + np.uint32((base[i] == task[i]) | (both == 0)))
    return np.int64(n_zero)


@jit()
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


@jit()
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


# ---- entries in a bracket


def _make_marks(weighed: bool) -> Any:
    """Compiles the pass that compares the scores of both tasks with their brackets."""

    @jit(error_model="numpy")
    def mark(base, one, two, v, w, lowest, highest, hits, above):  # type: ignore[no-untyped-def]
        """Marks with bit k the entries of a tile where task k scores inside its bracket."""
        low_one, low_two, high_one, high_two = lowest[0], lowest[1], highest[0], highest[1]
        width_one, width_two = np.uint32(high_one - low_one), np.uint32(high_two - low_two)
        above_one, above_two = np.uint32(0), np.uint32(0)
        inside_one, inside_two = np.uint32(0), np.uint32(0)
        for i in range(hits.size):
            origin = _as_float(np.uint32(base[i]) << np.uint32(16))
            d = np.float32(_as_float(np.uint32(one[i]) << np.uint32(16)) - origin)
            e = np.float32(_as_float(np.uint32(two[i]) << np.uint32(16)) - origin)
            score_d = np.float32(v[i] * np.float32(d * d)) if weighed else abs(d)
            score_e = np.float32(w[i] * np.float32(e * e)) if weighed else abs(e)
            bits_d, bits_e = _as_bits(score_d), _as_bits(score_e)
            # what lies below wraps around, and is far above the width
            hit_d = np.uint32(bits_d - low_one) <= width_one
            hit_e = np.uint32(bits_e - low_two) <= width_two
            hits[i] = np.uint8(hit_d) | (np.uint8(hit_e) << np.uint8(1))
            above_one = np.uint32(above_one + np.uint32(bits_d > high_one))
            above_two = np.uint32(above_two + np.uint32(bits_e > high_two))
            inside_one = np.uint32(inside_one + np.uint32(hit_d))
            inside_two = np.uint32(inside_two + np.uint32(hit_e))
        above[0] += above_one
        above[1] += above_two
        return np.int64(inside_one), np.int64(inside_two)

    return mark


_MARK_PLAIN, _MARK_WEIGHED = _make_marks(False), _make_marks(True)


@jit(error_model="numpy")
def _score_bits(base, task, vector, weighed, i):  # type: ignore[no-untyped-def]
    origin = _as_float(np.uint32(base[i]) << np.uint32(16))
    delta = np.float32(_as_float(np.uint32(task[i]) << np.uint32(16)) - origin)
    if weighed:
        return _as_bits(np.float32(vector[i] * np.float32(delta * delta)))
    return _as_bits(abs(delta))


@jit(error_model="numpy")
def select(base, tasks, n_columns, vectors, weighed, lowest, highest, above, inside, found):  # type: ignore[no-untyped-def]
    """As `kernels.select`, for scores of two tasks; all arrays as there."""
    hits = np.zeros(TILE, np.uint8)
    words, nothing = hits.view(np.uint64), np.empty(TILE, np.float32)
    room = found.shape[1]
    is_wanted = np.uint64(0)
    for k in range(2):
        if lowest[k] < highest[k]:
            is_wanted |= np.uint64(1 << k)
    for row in range(0, base.size, n_columns):
        for column in range(0, n_columns, TILE):
            m = min(TILE, n_columns - column)
            first = row + column
            origin = base[first : first + m]
            one, two = tasks[0, first : first + m], tasks[1, first : first + m]
            v, w = nothing[:m], nothing[:m]
            if weighed:
                v, w = vectors[0, column : column + m], vectors[1, column : column + m]
                n_one, n_two = _MARK_WEIGHED(
                    origin, one, two, v, w, lowest, highest, hits[:m], above
                )
            else:
                n_one, n_two = _MARK_PLAIN(origin, one, two, v, w, lowest, highest, hits[:m], above)
            at_one, at_two = inside[0], inside[1]
            inside[0] += n_one
            inside[1] += n_two
            wanted = is_wanted
            if inside[0] > room:
                wanted &= np.uint64(2)
            if inside[1] > room:
                wanted &= np.uint64(1)
            if wanted == 0:
                continue
            hits[m : (m + 7) // 8 * 8] = 0
            for index in range((m + 7) // 8):
                word = words[index]
                while word != 0:
                    byte = _first_set(word) >> np.uint64(3)
                    shift = np.uint64(byte * np.uint64(8))
                    mark = (word >> shift) & wanted
                    i = np.int64(8 * index) + np.int64(byte)
                    if mark & np.uint64(1):
                        found[0, at_one] = _score_bits(origin, one, v, weighed, i)
                        at_one += 1
                    if mark & np.uint64(2):
                        found[1, at_two] = _score_bits(origin, two, w, weighed, i)
                        at_two += 1
                    word &= ~(np.uint64(0xFF) << shift)


# ---- a merged tile


def _make_merge(trims: bool, weighed: bool, elects: bool, averages: bool) -> Any:
    """Compiles the loop of one rule: trim to a threshold, weigh by inputs, elect, average."""

    @jit(error_model="numpy")
    def merge(base, one, two, v, w, thresholds, limits, scales, weights, out, counts, squares):  # type: ignore[no-untyped-def]
        """Merges a tile: what scores above `limits` is kept, what equals `thresholds` is counted.

        Sets `counts` (kept by task, conflicts won by task, conflicts, ties by task) and `squares`
        (norms of the deltas and of the update, squared; from the sixth on, where inputs weigh, the
        saliencies of both tasks and what is kept of them).
        """
        zero, half = np.float32(0.0), np.float32(0.5)
        s_one, s_two, l_one, l_two = scales[0], scales[1], weights[0], weights[1]
        t_one, t_two, above_one, above_two = thresholds[0], thresholds[1], limits[0], limits[1]
        kept_one, kept_two = np.uint32(0), np.uint32(0)
        tied_one, tied_two = np.uint32(0), np.uint32(0)
        clashes, won, undecided = np.uint32(0), np.uint32(0), np.uint32(0)
        square_d, square_e, square_change = zero, zero, zero
        cost_d, cost_e, kept_cost_d, kept_cost_e = zero, zero, zero, zero
        for i in range(out.size):
            origin = _as_float(np.uint32(base[i]) << np.uint32(16))
            p = _as_float(np.uint32(one[i]) << np.uint32(16))
            q = _as_float(np.uint32(two[i]) << np.uint32(16))
            d, e = np.float32(p - origin), np.float32(q - origin)
            d_d, e_e = np.float32(d * d), np.float32(e * e)
            square_d = _add_in_any_order(square_d, d_d)
            square_e = _add_in_any_order(square_e, e_e)
            score_d, score_e = abs(d), abs(e)
            if weighed:
                score_d, score_e = np.float32(v[i] * d_d), np.float32(w[i] * e_e)
            keep_d, keep_e = d != 0, e != 0
            if trims:
                tied_one = np.uint32(tied_one + np.uint32((score_d == t_one) & keep_d))
                tied_two = np.uint32(tied_two + np.uint32((score_e == t_two) & keep_e))
                keep_d &= score_d > above_one
                keep_e &= score_e > above_two
            if weighed:
                cost_d = _add_in_any_order(cost_d, score_d)
                cost_e = _add_in_any_order(cost_e, score_e)
                kept_cost_d = _add_in_any_order(kept_cost_d, score_d if keep_d else zero)
                kept_cost_e = _add_in_any_order(kept_cost_e, score_e if keep_e else zero)
            x, y = d if keep_d else zero, e if keep_e else zero
            clash = keep_d & keep_e & ((d > 0) != (e > 0))
            term_d, term_e = np.float32(x * l_one), np.float32(y * l_two)
            if elects:
                winner = np.float32(x + y)
                if weighed:
                    vote_d, vote_e = np.float32(score_d * s_one), np.float32(score_e * s_two)
                    vote_d, vote_e = vote_d if keep_d else zero, vote_e if keep_e else zero
                    vote_d, vote_e = -vote_d if d < 0 else vote_d, -vote_e if e < 0 else vote_e
                    votes = np.float32(vote_d + vote_e)
                    winner = winner if votes == 0 else votes
                is_plus = winner >= 0  # plus wins where everything cancels
                agrees_d, agrees_e = (d > 0) == is_plus, (e > 0) == is_plus
                both = keep_d & keep_e & agrees_d & agrees_e
                term_d, term_e = term_d if agrees_d else zero, term_e if agrees_e else zero
                total = np.float32(np.float32(zero + term_d) + term_e)
                change = total
                if averages:
                    mean = np.float32(total * half)
                    change = mean if both else total
                won = np.uint32(won + np.uint32(clash & agrees_d))
            else:
                # the sign that won is the one that the update has, if it has one
                change = np.float32(np.float32(zero + term_d) + term_e)
                agrees_d = (change != 0) & ((d > 0) == (change > 0))
                won = np.uint32(won + np.uint32(clash & agrees_d))
                undecided = np.uint32(undecided + np.uint32(clash & (change == 0)))
            square_change = _add_in_any_order(square_change, np.float32(change * change))
            merged = np.float32(origin + change)
            value = origin if merged == origin else merged
            value = q if merged == np.float32(origin + e) else value
            value = p if merged == np.float32(origin + d) else value
            bits = _as_bits(value)
            # to nearest even: half a unit is added, less one where the last bit is even
            even = (bits >> np.uint32(16)) & np.uint32(1)
            out[i] = np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
            kept_one = np.uint32(kept_one + np.uint32(keep_d))
            kept_two = np.uint32(kept_two + np.uint32(keep_e))
            clashes = np.uint32(clashes + np.uint32(clash))
        counts[0], counts[1], counts[2] = kept_one, kept_two, won
        counts[3], counts[4] = np.int64(clashes) - np.int64(won) - np.int64(undecided), clashes
        counts[5], counts[6] = tied_one, tied_two
        squares[0], squares[1], squares[2] = square_d, square_e, square_change
        squares[5], squares[6], squares[7], squares[8] = cost_d, cost_e, kept_cost_d, kept_cost_e

    return merge


ADD = _make_merge(False, False, False, False)
TIES_MEAN = _make_merge(True, False, True, True)
OBM_SUM = _make_merge(True, True, True, False)
OBM_MEAN = _make_merge(True, True, True, True)


@jit()
def any_not_finite(stored):  # type: ignore[no-untyped-def]
    """Whether bf16 bits hold NaN or infinity."""
    bad = np.uint16(0)
    for i in range(stored.size):
        bad |= np.uint16((stored[i] & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return np.int64(bad)


@jit()
def _just_below(threshold):  # type: ignore[no-untyped-def]
    """The largest fp32 below, so that `>` keeps what ties; scores are not negative."""
    if threshold <= 0:
        return np.float32(-1.0)
    return _as_float(np.uint32(_as_bits(threshold) - np.uint32(1)))


@jit(error_model="numpy")
def _place_of_tie(base, task, vector, weighed, threshold, number):  # type: ignore[no-untyped-def]
    """Index behind the tie of this number, counted from 1."""
    for i in range(base.size):
        # an unchanged entry scores zero, but is not there to be kept
        is_changed = base[i] != task[i] and ((base[i] | task[i]) & np.uint16(0x7FFF)) != 0
        if is_changed and _as_float(_score_bits(base, task, vector, weighed, i)) == threshold:
            number -= 1
            if number == 0:
                return i + 1
    return base.size


@jit()
def _merge_part(  # type: ignore[no-untyped-def]
    rule, base, one, two, v, w, thresholds, limits, scales, weights, out, counts, squares
):
    if rule == 0:
        ADD(base, one, two, v, w, thresholds, limits, scales, weights, out, counts, squares)
    elif rule == 1:
        TIES_MEAN(base, one, two, v, w, thresholds, limits, scales, weights, out, counts, squares)
    elif rule == 2:
        OBM_SUM(base, one, two, v, w, thresholds, limits, scales, weights, out, counts, squares)
    else:
        OBM_MEAN(base, one, two, v, w, thresholds, limits, scales, weights, out, counts, squares)


@jit()
def apply(  # type: ignore[no-untyped-def]
    base, tasks, n_columns, vectors, rule, thresholds, ties, scales, weights, out, counts, squares
):
    """As `kernels.apply`, for the rules in `RULES`.

    Args:
        base, tasks, n_columns, vectors: As in `kernels.Piece`, of two tasks.
        rule: Place in `RULES`.
        thresholds, ties, scales, weights: As in `kernels.Decision`.
        out: [n] in the form of the base; written.
        counts: int64 [5]: kept by task, conflicts won by task, conflicts; added to.
        squares: fp64 [9]: squared norms of the deltas and of the update, two that stay, saliencies
            of the tasks and what is kept of them; added to. As in `kernels`, for two tasks.

    Returns:
        Bits as in `kernels.Counts.not_finite`.
    """
    nothing, limits = np.empty(TILE, np.float32), np.empty(2, np.float32)
    tile_counts, tile_squares = np.zeros(7, np.int64), np.zeros(9, np.float32)
    weighed, n = rule >= 2, base.size
    bad = np.int64(0)
    for row in range(0, n, n_columns):
        for column in range(0, n_columns, TILE):
            begin, last = row + column, row + min(column + TILE, n_columns)
            end = last
            while begin < last:
                v, w = nothing[: end - begin], nothing[: end - begin]
                if weighed:
                    v = vectors[0, begin - row : end - row]
                    w = vectors[1, begin - row : end - row]
                for k in range(2):
                    limits[k] = _just_below(thresholds[k]) if ties[k] > 0 else thresholds[k]
                origin, result = base[begin:end], out[begin:end]
                one, two = tasks[0, begin:end], tasks[1, begin:end]
                _merge_part(
                    rule, origin, one, two, v, w, thresholds, limits, scales, weights, result,
                    tile_counts, tile_squares,
                )  # fmt: skip
                if rule > 0:
                    # where the last tie that is kept lies in this tile, the tile ends there
                    shortest = end
                    for k in range(2):
                        if 0 < ties[k] < tile_counts[5 + k]:
                            task, vector = (one, v) if k == 0 else (two, w)
                            place = _place_of_tie(
                                origin, task, vector, weighed, thresholds[k], ties[k]
                            )
                            shortest = min(shortest, begin + place)
                    if shortest < end:
                        end = shortest
                        continue
                    for k in range(2):
                        if 0 < ties[k] < ALL_TIES:
                            ties[k] -= tile_counts[5 + k]
                for i in range(5):
                    counts[i] += tile_counts[i]
                for i in range(9):
                    squares[i] += tile_squares[i]
                # what is not finite, or becomes so, shows in the squares
                if not np.isfinite(tile_squares.sum()):
                    bad |= any_not_finite(origin) | any_not_finite(one) << 1
                    bad |= any_not_finite(two) << 2 | any_not_finite(result) << 3
                begin, end = end, last
    return bad


RULES = (
    ("all", "magnitude", "none", "sum"),
    ("top", "magnitude", "sum", "mean"),
    ("top", "saliency", "saliency", "sum"),
    ("top", "saliency", "saliency", "mean"),
)
"""(keep, score, elect, combine) of the rules that `apply` knows, in its numbering."""
