"""Numbers over a whole tensor: exact k-th values, scales and ranks of votes, random streams."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from merge.budget import group_budgets
from merge.errors import MergeError
from merge.kernels import ALL_TIES, N_LEADING, N_TRAILING, TRAILING_BITS, Piece
from merge.methods import METHODS, MethodSettings
from merge.plan import PlannedTensor
from merge.selection import (
    EVERYTHING,
    NOTHING,
    Level,
    count_level,
    cut_tensor,
    find_bins,
    find_cut,
    random_key,
    share_of,
    vote_ranks,
    vote_scales,
)
from merge.tensor import decide, load_kernels, merge_tensor
from tests.merge.cases import make_case, settings_of

KERNELS = ("numba", "numpy", "torch")


def piece_of(*deltas, begin=0, vectors=None) -> Piece:
    """One row; the base is zero, so that the deltas are exact."""
    tasks = np.array(deltas, np.float32)
    n = tasks.shape[1]
    return Piece(
        base=np.zeros(n, np.float32),
        tasks=tasks,
        n_columns=n,
        begin=begin,
        vectors=np.zeros((len(tasks), 0), np.float32) if vectors is None else vectors,
        entries=np.zeros((len(tasks), 0), np.float32),
    )


def cuts_of(pieces, n_wanted, kernels="numpy", score="magnitude"):
    module, n_tasks = load_kernels(kernels), len(pieces[0].tasks)
    level = count_level(lambda: pieces, score, n_tasks, module)
    n_rows = len(level.leading)
    return cut_tensor(lambda: pieces, score, level, [n_wanted] * n_rows, module), level


def merge_alone(delta, density, **changes):
    """TIES on one task: what is kept, as it is; the base is zero."""
    delta = np.array(delta, np.float32)
    settings = settings_of(["vlm"], [1.0], density=density, **changes)
    return merge_tensor("ties", np.zeros_like(delta), {"vlm": delta}, None, settings)


# ---- how many, and which


def test_half_an_entry_rounds_up():
    assert share_of(0.5, 5) == 3  # floor(2.5 + .5)
    assert share_of(0.49, 5) == 2
    assert share_of(0.0, 5) == 0
    assert share_of(1.0, 5) == 5


def test_the_bin_of_the_kth_value_by_hand():
    leading = np.zeros((5, N_LEADING), np.int64)
    leading[:, 7], leading[:, 9] = 3, 2
    bins, remaining = find_bins(leading, [0, 1, 2, 4, 5])
    # none and all need no bin; the two of bin 9 are the largest, then 4 - 2 of bin 7
    assert bins.tolist() == [-1, 9, 9, 7, -1]
    assert remaining.tolist() == [0, 1, 2, 2, 0]


def test_the_cut_inside_a_bin_by_hand():
    trailing = np.zeros(N_TRAILING, np.int64)
    trailing[4], trailing[1] = 2, 3

    def threshold(low):
        return float(np.uint32((7 << TRAILING_BITS) | low).view(np.float32))

    found = [find_cut(9, 6, 7, n, trailing) for n in (1, 2, 3, 5)]
    assert [cut.threshold for cut in found] == [threshold(n) for n in (4, 4, 1, 1)]
    # one of two; both; 3 - 2 of three; all
    assert [cut.ties for cut in found] == [1, ALL_TIES, 1, ALL_TIES]
    assert find_cut(9, 0, -1, 0, trailing) == NOTHING
    assert find_cut(9, 9, -1, 0, trailing) == EVERYTHING


@pytest.mark.parametrize("kernels", KERNELS)
@limits(max_examples=40, deadline=None)
@given(
    delta=st.one_of(
        # any numbers, tiny ones too small for a normal number among them; or few distinct values
        arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e3, 1e3, width=32)),
        arrays.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0, 1, -1, 2.5])),
    ),
    share=st.floats(0, 1),
)
def test_the_kth_value_is_that_of_a_sort_and_ties_fill_up_to_exactly_k(kernels, delta, share):
    changed = np.sort(np.abs(delta[delta != 0]))
    n_wanted = int(share * len(delta))
    (cut,), level = cuts_of([piece_of(delta)], n_wanted, kernels)
    assert level.n_changed.tolist() == [len(changed)]
    assert level.n_entries == len(delta)
    if n_wanted == 0:
        assert cut == NOTHING
    elif n_wanted >= len(changed):
        assert cut == EVERYTHING
    else:
        kth = np.partition(changed, -n_wanted)[-n_wanted]
        assert cut.threshold == kth
        n_above, n_tied = (changed > kth).sum(), (changed == kth).sum()
        n_ties = n_wanted - n_above
        assert cut.ties == (ALL_TIES if n_ties == n_tied else n_ties)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("score", ["magnitude", "saliency", "variance"])
def test_the_kth_value_of_a_large_tensor_is_that_of_np_partition(kernels, score):
    rng = np.random.default_rng(0)
    n = 20_011
    deltas = rng.standard_t(2, (2, n)).astype(np.float32)
    deltas[:, ::7] = 0
    vectors = rng.lognormal(0, 3, (2, n)).astype(np.float32)
    pieces = [piece_of(*deltas[:, i : i + 5000]) for i in range(0, n, 5000)]
    expected = np.abs(deltas)
    if score == "saliency":
        pieces = [piece_of(*deltas, vectors=vectors)]  # a vector is one number a column
        expected = vectors * (deltas * deltas)
    elif score == "variance":
        mean = (deltas[0] + deltas[1]) / np.float32(2)
        expected = (np.square(deltas - mean).sum(axis=0) / np.float32(2))[None]
    for n_wanted in (1, 17, 5000, 12_345):
        cuts, _ = cuts_of(pieces, n_wanted, kernels, score)
        for cut, scores in zip(cuts, expected, strict=True):
            assert cut.threshold == np.partition(scores, -n_wanted)[-n_wanted]


@pytest.mark.parametrize("kind", ["smooth", "grid", "tied"])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.5, 0.99, 1.0])
def test_density_is_exact_whatever_ties(kind, density):
    case = make_case(kind, 1, (40, 50))
    settings = settings_of(case.parents, density=density)
    for method in ("obm", "ties"):
        _, counts = merge_tensor(method, case.base, case.parents, case.vectors, settings)
        for k, parent in enumerate(case.parents.values()):
            n_changed = int((parent != case.base).sum())
            assert counts.kept[k] == min(share_of(density, 2000), n_changed)


def test_light_training_on_bf16_keeps_the_density_where_a_threshold_would_keep_far_more():
    case = make_case("tied", 2, (200, 300), n_tasks=2)
    _, counts = merge_tensor(
        "ties", case.base, case.parents, None, settings_of(case.parents, density=0.2)
    )
    assert counts.kept.tolist() == [12_000, 12_000]
    delta = np.abs(case.parents["vlm"] - case.base)
    threshold = np.partition(delta.reshape(-1), -12_000)[-12_000]
    assert (delta >= threshold).mean() > 0.3  # what `>=` keeps


def test_tied_scores_are_kept_from_the_lowest_index_on():
    # 4 of 6: both 2s, then the first two 1s in row-major order; signs do not matter
    merged, _ = merge_alone([[1.0, 2.0, -1.0], [1.0, 1.0, -2.0]], 4 / 6)
    assert merged.tolist() == [[1.0, 2.0, -1.0], [0.0, 0.0, -2.0]]


def test_a_zero_delta_is_never_kept():
    merged, counts = merge_alone([[0.0, 3.0, -0.0, 5.0]], 0.75)  # 3 wanted, 2 there
    assert merged.tolist() == [[0.0, 3.0, 0.0, 5.0]]
    assert counts.kept.tolist() == [2]
    assert merge_alone([[0.0, 3.0, 0.0, 5.0]], 0.25)[0].tolist() == [[0.0, 0.0, 0.0, 5.0]]


def test_a_saliency_of_zero_is_kept_last_and_from_the_lowest_index_on():
    # v = 0: nothing is lost by dropping, but the entries are changed and may fill up the density
    delta = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    vector = np.array([0.0, 0.0, 1.0, 0.0], np.float32)
    merged, _ = merge_tensor(
        "obm", np.zeros_like(delta), {"vlm": delta}, {"vlm": vector},
        settings_of(["vlm"], [1.0], density=0.5),
    )  # fmt: skip
    assert merged.tolist() == [[1.0, 0.0, 3.0, 0.0]]


def test_pieces_share_ties_in_order():
    pieces = [piece_of([1, 1, 2], begin=0), piece_of([1, 1, 1], begin=3)]
    module = load_kernels("numpy")
    settings = settings_of(["vlm"], [1.0], density=4 / 6)  # the 2 and the first three 1s
    rule = METHODS["ties"].rule(settings)
    decision = decide(lambda: pieces, rule, settings, ["vlm"], module)
    assert decision.ties.tolist() == [3]
    results = []
    for piece in pieces:
        out = np.empty(3, np.float32)
        module.apply(piece, decision, out)
        results.append((out.tolist(), decision.ties.tolist()))
    assert results == [([1, 1, 2], [1]), ([1, 0, 0], [0])]


# ---- budgets over several tensors; `test_budget` shows what they keep


def planned(name: str, method: str = "ties", **changes) -> PlannedTensor:
    return PlannedTensor(
        name=name, canonical=name, group="linear", action=method, reason="", shape=(1, 1),
        dtype="F32", sources={"base": name, "vlm": name, "agent": name},
        settings=settings_of(["vlm", "agent"], density=0.3, **changes),
    )  # fmt: skip


def test_budgets_are_grouped_by_layer_or_over_the_model():
    layer = [planned(f"model.layers.{i}.{m}.weight", budget="layer") for i in (0, 1) for m in "ab"]
    assert [len(group) for group in group_budgets(layer).values()] == [2, 2]
    model = [planned(f"model.layers.{i}.a.weight", budget="global") for i in (0, 1)]
    assert [len(group) for group in group_budgets(model).values()] == [2]
    assert group_budgets([planned("a"), planned("b", method="vlm", budget="global")]) == {}
    with pytest.raises(MergeError, match=r"merge.budget=global: sce chooses .* tensor by tensor"):
        group_budgets([planned("a", method="sce", budget="global")])


# ---- votes that are comparable


def level_of(*scores) -> Level:
    """The histogram of scores: |delta| of a tensor whose deltas they are."""
    return count_level(lambda: [piece_of(*scores)], "magnitude", len(scores), load_kernels("numpy"))


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_of_votes_is_within_a_fifth_of_a_percent(seed):
    rng = np.random.default_rng(seed)
    # from one scale to very many; and all in one bin, at its lower and at its upper edge
    edge = np.full(500, 2.0**-17 * (1 + 2.0**-8 * seed))
    below = edge * (1 + 2.0**-8 - 2.0**-20)
    for scores in (rng.lognormal(-20, seed, 500), rng.random(500), edge, below):
        scores = scores.astype(np.float32)
        scores[:50] = 0  # zeros count in the mean
        scale = vote_scales(level_of(scores))[0]
        assert scale * scores.astype(np.float64).mean() == pytest.approx(1, rel=0.002)


def test_the_mean_of_nothing_scales_nothing():
    assert vote_scales(level_of(np.zeros(3), [0, 0, 2.0])).tolist() == [1, pytest.approx(1.5, 2e-3)]


def test_saliencies_that_overflow_scale_to_next_to_nothing():
    leading = np.zeros((1, N_LEADING), np.int64)
    leading[0, 0x7F800000 >> TRAILING_BITS] = 1  # the bin of infinity counts as the largest number
    [scale] = vote_scales(Level(leading, 2))
    assert scale == pytest.approx(2 / 3.4028235e38, rel=1e-3)


def test_the_rank_of_a_single_entry_is_one():
    leading = np.zeros((1, N_LEADING), np.int64)
    leading[0, 100] = 1
    assert vote_ranks(Level(leading, 1))[0, 100] == 1.0


def test_ranks_share_ties_and_count_zeros_below():
    level = level_of([0.0, 2.0, 1.0, 2.0])
    ranks = vote_ranks(level)[0]
    bins = np.array([0.0, 1.0, 2.0], np.float32).view(np.uint32) >> np.uint32(15)
    assert ranks[bins].tolist() == [0.25, 0.5, 1.0]  # a zero does not vote, whatever its rank


def test_ranks_never_fall_as_scores_grow():
    scores = np.random.default_rng(0).lognormal(-10, 4, 3000).astype(np.float32)
    ranks = vote_ranks(level_of(scores))[0]
    assert (np.diff(ranks) >= 0).all()
    own = ranks[np.sort(scores).view(np.uint32) >> np.uint32(15)]
    # the share of scores that are not larger, but for those in the same bin: 1/256 of an octave
    exact = np.arange(1, 3001) / 3000
    assert (own >= exact.astype(np.float32)).all()
    assert np.abs(own - exact).max() < 0.003
    assert own[-1] == 1


# ---- random streams


def test_a_random_stream_is_fixed_by_seed_task_and_name():
    def key(seed=0, task="vlm", name="w", **changes):
        return random_key(MethodSettings({}, seed=seed, tensor_name=name, **changes), task)

    assert key() == key(density=0.1, window=0.3)
    assert len({key(), key(seed=1), key(task="agent"), key(name="v")}) == 4
    # the first 8 bytes of sha256("0/vlm/w"): a change would change every merge with this seed
    assert hex(key()) == "0xfefdb3c8e8ac3c85"
