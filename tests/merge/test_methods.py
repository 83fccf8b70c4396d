"""The merge methods against slow references, by hand, and at their limits.

Numbers worked out by hand are small multiples of powers of two: exact in fp32, so that results are
compared with `==`. The kernels are numba's; `test_kernels` shows that the others give its bits.
"""

import numpy as np
import pytest

from merge.errors import MergeError
from merge.methods import METHODS, MethodSettings
from merge.tensor import merge_tensor
from tests.merge.cases import WITH_RULE, make_case, settings_of
from tests.merge.reference import merge_slowly

TASKS = ("vlm", "agent")
EVERY = [name for name in METHODS if name != "layer_swap"]
VARIANTS = {
    "obm": [{"combine": "mean"}, {"normalization": "rank"}],
    "della": [{}, {"window": 0.4}],
    "breadcrumbs": [{}, {"outliers": 0.0}],
    "ram": [{}, {"threshold": 0.5}, {"threshold": 0.0}],
    "sar": [{}, {"threshold": 0.0, "normalization": "rank"}, {"combine": "mean"}],
    "ram_plus": [{}, {"threshold": 0.5, "boost": 0.5, "boost_limit": 3.0}],
}


def settings(weights=(1.0, 1.0), **changes) -> MethodSettings:
    return MethodSettings(weights=dict(zip(TASKS, weights, strict=True)), **changes)


def merge_deltas(method, *deltas, base=0.0, statistics=None, **changes):
    """Merges one row of deltas a task; returns the merged row as a list, and the counts."""
    rows = [np.array([delta], np.float32) for delta in deltas]
    origin = np.full_like(rows[0], base)
    parents = {task: origin + row for task, row in zip(TASKS, rows, strict=True)}
    if statistics is not None:
        values = [np.array(row, np.float32) for row in statistics]
        statistics = dict(zip(TASKS, values, strict=True))
    merged, counts = merge_tensor(method, origin, parents, statistics, settings(**changes))
    return merged[0].tolist(), counts


# ---- the slow reference


@pytest.mark.parametrize("kind", ["smooth", "grid", "tied", "far"])
@pytest.mark.parametrize("method", WITH_RULE)
def test_methods_equal_a_slow_reference(method, kind):
    for seed, shape in enumerate([(6, 9), (11, 17), (19,), (1, 1)]):
        case = make_case(kind, seed, shape, n_tasks=2 + seed % 2)
        if not case.fits(method):
            continue
        for variant in VARIANTS.get(method, [{}]):
            for density in (0.0, 0.25, 0.7, 1.0) if METHODS[method].is_sparse else (0.5,):
                chosen = settings_of(case.parents, density=density, seed=seed, **variant)
                given = (method, case.base, case.parents, case.statistics(method), chosen)
                expected = merge_slowly(*given)
                merged, counts = merge_tensor(*given)
                context = (shape, variant, density)
                assert merged.tobytes() == expected.merged.tobytes(), context
                assert counts.kept.tolist() == [len(kept) for kept in expected.kept], context
                assert counts.conflicts == expected.conflicts, context
                assert counts.conflicts_won.tolist() == expected.conflicts_won, context


def test_obm_votes_scaled_by_their_mean_equal_the_reference_but_where_they_nearly_cancel():
    # the kernels know the mean to 0.2 %: votes that differ by less than 0.4 % may go either way
    n_clear = 0
    for seed in range(4):
        case = make_case("smooth", seed, (30, 40))
        chosen = settings_of(case.parents, density=0.8, normalization="mean")
        given = ("obm", case.base, case.parents, case.vectors, chosen)
        expected = merge_slowly(*given)
        merged, counts = merge_tensor(*given)
        close = np.zeros(case.base.size, bool)
        close[[i for i, margin in expected.margins.items() if margin < 0.004]] = True
        assert np.array_equal(merged.reshape(-1)[~close], expected.merged.reshape(-1)[~close])
        assert counts.kept.tolist() == [len(kept) for kept in expected.kept]
        assert close.sum() < 0.02 * expected.conflicts
        n_clear += expected.conflicts - int(close.sum())
    assert n_clear > 1000


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 2.0)])
def test_averages_of_task_vectors_are_averages_of_checkpoints(weights):
    # the papers' formulas in fp64: sum_k w_k theta_k / sum_k w_k, with w = lambda times a statistic
    case = make_case("smooth", 3, (8, 12))
    thetas = np.stack(list(case.parents.values())).astype(np.float64)
    lambdas = np.array(weights)[:, None, None]
    shares = {
        "linear": np.ones_like(thetas),
        "fisher": np.stack(list(case.entries.values())),
        "regmean_diagonal": np.stack(list(case.vectors.values()))[:, None, :],
    }
    for method, share in shares.items():
        expected = (lambdas * share * thetas).sum(0) / (lambdas * share * np.ones_like(thetas)).sum(
            0
        )
        merged, _ = merge_tensor(
            method, case.base, case.parents, case.statistics(method), settings(weights)
        )
        # a handful of roundings, each 6e-8 of numbers below 0.1
        assert merged == pytest.approx(expected, abs=2e-8), method


# ---- by hand


def test_task_arithmetic_by_hand():
    merged, counts = merge_deltas(
        "task_arithmetic", [1.0, 2.0, 0.0], [1.0, -4.0, 8.0], base=10.0, weights=(1.0, 0.5)
    )
    assert merged == [11.5, 10.0, 14.0]  # 10 + 1 + .5; 10 + 2 - 2; 10 + 4
    assert counts.kept.tolist() == [2, 3]
    # entry 1 is a conflict that nobody wins: the update is zero
    assert (counts.conflicts, counts.conflicts_won.tolist()) == (1, [0, 0])


def test_linear_by_hand():
    # an unchanged parent counts too: (3 * 1 + 1 * 0) / 4
    merged, _ = merge_deltas("linear", [1.0, 2.0], [0.0, -2.0], base=8.0, weights=(3.0, 1.0))
    assert merged == [8.75, 9.0]  # 8 + (6 - 2) / 4


def test_obm_by_hand():
    # saliency: vlm 1 * [2, -1, 1, 0]^2 = [4, 1, 1, 0]; agent [1, 1, 1, .25] * [-1, -1, 3, 4]^2
    # = [1, 1, 9, 4]. Density .75 keeps 3: vlm 0, 1, 2; agent 2, 3 and, of the tied 0 and 1, the 0.
    # Entry 0: +4 against -1, the vlm wins. Entry 2: both agree. Entry 1: vlm alone. 3: agent alone.
    given = {
        "base": 10.0,
        "statistics": [[1, 1, 1, 1], [1, 1, 1, 0.25]],
        "weights": (1.0, 0.5),
        "density": 0.75,
    }
    deltas = [2.0, -1.0, 1.0, 0.0], [-1.0, -1.0, 3.0, 4.0]
    summed, counts = merge_deltas("obm", *deltas, **given)
    assert summed == [12.0, 9.0, 12.5, 12.0]  # entry 2: 1 * 1 + .5 * 3
    mean, _ = merge_deltas("obm", *deltas, combine="mean", **given)
    assert mean == [12.0, 9.0, 11.25, 12.0]  # entry 2: (1 + 1.5) / 2
    assert counts.kept.tolist() == [3, 3]
    assert counts.conflicts == 1
    assert counts.conflicts_won.tolist() == [1, 0]
    assert counts.delta_square.tolist() == [6.0, 27.0]
    # 4 + 1 + 1 + 0 and 1 + 1 + 9 + 4; the agent drops one of its ones
    assert counts.saliency.tolist() == [6.0, 15.0]
    assert counts.saliency_kept.tolist() == [6.0, 14.0]
    assert counts.update_square == 4 + 1 + 6.25 + 4


def test_obm_lets_the_statistic_decide_what_stays():
    # Equal deltas: only h tells which of the two entries is kept.
    for h, expected in (([3, 2], [1.0, 0.0]), ([2, 3], [0.0, 1.0])):
        merged, _ = merge_deltas("obm", [1.0, 1.0], [0.0, 0.0], statistics=[h, [1, 1]], density=0.5)
        assert merged == expected


def test_obm_normalisation_decides_conflicts_but_not_what_is_kept():
    # saliency: vlm [16, 16], agent [1, 1/64]. Entry 0 is the conflict.
    # none: 16 > 1, vlm. mean: 16/16 = 1 against 1/(65/128) = 1.97, agent.
    # rank: 1 against 1, a tie, so the larger summed delta 4 - 1 > 0 decides: vlm.
    expected = {"none": [4.0, 4.125], "mean": [-1.0, 4.125], "rank": [4.0, 4.125]}
    for normalization, values in expected.items():
        merged, counts = merge_deltas(
            "obm", [4.0, 4.0], [-1.0, 0.125], statistics=[[1, 1], [1, 1]],
            density=1.0, normalization=normalization,
        )  # fmt: skip
        assert merged == values, normalization
        assert counts.kept.tolist() == [2, 2]


def test_obm_votes_by_rank_by_hand():
    # saliency: vlm [4, 1, 9, 0], agent [1/128, .25 * 257/256, 4/128, 25/16]. A rank is the share of
    # the four entries that are not larger: vlm [.75, .5, 1, -], agent [.25, .75, .5, 1].
    # Entry 1: -.5 + .75 > 0, the agent's; by the saliencies themselves -1 + .251 < 0, the vlm's.
    for normalization, second in (("rank", 0.5), ("none", -1.0)):
        merged, _ = merge_deltas(
            "obm", [2.0, -1.0, 3.0, 0.0], [-1.0, 0.5, -2.0, 5.0],
            statistics=[[1, 1, 1, 1], [1 / 128, 257 / 256, 1 / 128, 1 / 16]],
            density=1.0, normalization=normalization,
        )  # fmt: skip
        assert merged == [2.0, second, 3.0, 5.0], normalization


def test_obm_an_input_that_was_never_active_has_no_vote_by_rank_either():
    # saliency: vlm [0, 1], agent [1, 4]; entry 0: 0 - .5 < 0, the agent's, though 3 - 1 > 0
    merged, _ = merge_deltas(
        "obm", [3.0, 1.0], [-1.0, 1.0], statistics=[[0, 1], [1, 4]], density=1.0,
        normalization="rank",
    )  # fmt: skip
    assert merged == [-1.0, 2.0]


def test_a_matrix_of_one_column_has_rows_of_one_entry():
    # saliency: vlm 2 * [4, 0, 1, 0, 0], agent 1 * [9, 4, 0, 0, 0]; of five entries two are kept
    column = {"vlm": [2.0, 0.0, 1.0, 0.0, 0.0], "agent": [-3.0, 2.0, 0.0, 0.0, 0.0]}
    parents = {task: np.array([values], np.float32).T for task, values in column.items()}
    moments = {"vlm": np.array([2], np.float32), "agent": np.array([1], np.float32)}
    base = np.zeros((5, 1), np.float32)
    merged, _ = merge_tensor("obm", base, parents, moments, settings(density=0.4))
    assert merged.ravel().tolist() == [-3.0, 2.0, 1.0, 0.0, 0.0]  # 8 - 9 < 0
    merged, _ = merge_tensor("regmean_diagonal", base, parents, moments, settings())
    # (2 * 2 - 3) / 3; (0 + 2) / 3; (2 * 1 + 0) / 3
    assert merged.ravel().tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 0.0, 0.0])


def test_obm_inputs_that_were_never_active_fall_back_to_the_larger_delta_then_plus():
    for normalization in ("none", "mean", "rank"):
        merged, counts = merge_deltas(
            "obm", [1.0, -1.0, -2.0], [-3.0, 1.0, 0.0], statistics=[[0, 0, 0], [0, 0, 0]],
            density=1.0, normalization=normalization,
        )  # fmt: skip
        assert merged == [-3.0, 1.0, -2.0]
        assert counts.conflicts_won.tolist() == [0, 2]


def test_ties_by_hand():
    # Density 2/3 keeps 2: vlm [3, 0, -2], agent [-1, 4, 0]. Sums [2, 4, -2].
    # Disjoint means: entry 0 vlm alone (agent disagrees), 1 agent alone, 2 vlm alone.
    deltas = [3.0, 1.0, -2.0], [-1.0, 4.0, -0.5]
    merged, counts = merge_deltas("ties", *deltas, density=2 / 3)
    assert merged == [3.0, 4.0, -2.0]
    assert counts.conflicts == 1
    assert counts.conflicts_won.tolist() == [1, 0]
    both, _ = merge_deltas("ties", *deltas, weights=(1.0, 0.5), density=1.0)
    assert both == [3.0, (1 + 0.5 * 4) / 2, (-2 - 0.5 * 0.5) / 2]


def test_where_trimmed_values_cancel_plus_wins_whoever_has_it():
    assert merge_deltas("ties", [-2.0, 2.0], [2.0, -2.0], density=1.0)[0] == [2.0, 2.0]


def test_weights_do_not_change_who_wins():
    # the agent's larger delta wins although its weighted one is smaller
    assert merge_deltas("ties", [1.0], [-2.0], weights=(4.0, 0.5), density=1.0)[0] == [-1.0]


def merge_wide(method, vlm, agent, n=10_000, **changes):
    """Constant deltas over n entries, whose results can be counted."""
    return merge_deltas(method, [vlm] * n, [agent] * n, **changes)


def test_dare_keeps_about_its_density_and_rescales_what_it_keeps():
    merged, counts = merge_wide("dare", 1.0, 1.0, weights=(1.0, 0.0), density=0.25, seed=3)
    assert set(merged) == {0.0, 4.0}  # 1 / .25
    # Binomial(10^4, .25) has a standard deviation of 43; five of them
    assert abs(counts.kept - 2500).max() < 220
    # Independent choices agree on a sixteenth of the entries
    both, _ = merge_wide("dare", 1.0, 1.0, density=0.25, seed=3)
    assert abs(both.count(8.0) - 625) < 125


def test_dare_ties_elects_among_what_was_drawn_and_sums():
    # Density 1/2: kept 1 becomes 2, kept -3 becomes -6, which wins where both were drawn.
    merged, counts = merge_wide("dare_ties", 1.0, -3.0, density=0.5)
    assert set(merged) == {0.0, 2.0, -6.0}
    for value, share in ((0.0, 0.25), (2.0, 0.25), (-6.0, 0.5)):
        assert abs(merged.count(value) - share * 10_000) < 250  # five deviations of 50
    assert counts.conflicts_won.tolist() == [0, counts.conflicts]
    # agreeing entries are summed, not averaged: 2 + 6
    assert set(merge_wide("dare_ties", 1.0, 3.0, density=0.5)[0]) == {0.0, 2.0, 6.0, 8.0}


def test_della_keeps_by_rank_in_the_row_and_divides_by_the_probability():
    # |delta| of a row has the ranks [2, 0, 3, 1]; p = .25 + .5 * rank / 3 = .25 to .75
    delta = np.array([3.0, -1.0, -4.0, 2.0], np.float32)
    chance = np.array([0.25 + 0.5 * 2 / 3, 0.25, 0.75, 0.25 + 0.5 / 3])
    base = np.zeros((10_000, 4), np.float32)
    parents = {"vlm": base + delta, "agent": base}
    merged, _ = merge_tensor("della", base, parents, None, settings(density=0.5, window=0.25))
    kept = merged != 0
    assert merged[kept] == pytest.approx((delta / chance * kept)[kept], rel=1e-6)
    assert kept.mean(axis=0) == pytest.approx(chance, abs=0.025)  # five deviations of .005


def test_della_equal_magnitudes_rank_by_their_index():
    base = np.zeros((10_000, 3), np.float32)
    ones = np.array([1.0, -1.0, 1.0], np.float32)
    parents = {"vlm": base + ones, "agent": base}
    merged, _ = merge_tensor("della", base, parents, None, settings(density=0.5, window=0.25))
    # p = .25, .5, .75 in this order: 1 / p shows them
    assert [sorted(set(np.abs(column))) for column in merged.T.tolist()] == [
        [0.0, 4.0], [0.0, 2.0], [0.0, pytest.approx(4 / 3)],
    ]  # fmt: skip


def test_della_averages_what_agrees():
    # window 0 and density 1: everything is kept; (2 + 4) / 2, and -4 against 2
    merged, _ = merge_deltas("della", [2.0, 2.0], [4.0, -4.0], density=1.0, window=0.0)
    assert merged == [3.0, -4.0]


def test_breadcrumbs_drops_outliers_and_keeps_the_band_below():
    # of 10: the largest 2 are dropped, the next 3 kept
    vlm = [1.0, -9.0, 3.0, 4.0, -8.0, 6.0, 7.0, 5.0, 10.0, 2.0]
    given = {"weights": (1.0, 1.0), "outliers": 0.2, "density": 0.3}
    merged, counts = merge_deltas("breadcrumbs", vlm, [0.0] * 10, **given)
    assert merged == [0, 0, 0, 0, -8.0, 6.0, 7.0, 0, 0, 0]
    assert counts.kept.tolist() == [3, 0]
    # all tie: the outliers are the first two, the band the next three; conflicts are added up
    merged, _ = merge_deltas("breadcrumbs", [1.0] * 10, [-1.0, 4.0] + [1.0] * 8, **given)
    # the agent drops its 4 and its entry 0, which is the first of the tied
    assert merged == [0, 0, 2.0, 2.0, 2.0, 0, 0, 0, 0, 0]


def test_breadcrumbs_without_outliers_keeps_the_largest():
    merged, _ = merge_deltas(
        "breadcrumbs", [1.0, -3.0, 2.0], [0.0] * 3, outliers=0.0, density=2 / 3
    )
    assert merged == [0.0, -3.0, 2.0]


def test_sce_by_hand():
    # Variances [1, 1, 6.25, .25, .25, .25, 0]: density 6/7 drops the last entry.
    # Squares: vlm 1 + 1 + 25 + 3 = 30, agent 9 + 1 = 10, so eta = .75 and .25.
    # Entry 0: (.75 * 1 + .25 * 3) / (.75 + .25). Entry 1: 1 - 1 = 0, the vlm's sign; .75 * 1 / .75.
    vlm = [1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 0.5]
    agent = [3.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    merged, counts = merge_deltas("sce", vlm, agent, density=6 / 7)
    assert merged == [1.5, 1.0, 5.0, 1.0, 1.0, 1.0, 0.0]
    assert counts.kept.tolist() == [6, 2]
    # lambda multiplies eta: (.75 * 1 + .25 * 5 * 3) / (.75 + 1.25)
    weighted, _ = merge_deltas("sce", vlm, agent, density=6 / 7, weights=(1.0, 5.0))
    assert weighted[0] == 2.25


def test_sce_selects_what_differs_and_not_what_is_large():
    # variances [0, 1]: 4 and 4 do not differ, 1 and -1 do
    merged, counts = merge_deltas("sce", [4.0, 1.0], [4.0, -1.0], density=0.5)
    assert merged == [0.0, 1.0]  # votes cancel: plus wins; .5 * 1 / .5
    assert counts.kept.tolist() == [1, 1]


def test_sce_selects_the_lowest_index_where_variances_tie():
    merged, _ = merge_deltas("sce", [2.0, 0.0, 2.0], [0.0, 2.0, 0.0], density=2 / 3)
    assert merged == [2.0, 2.0, 0.0]


RAM_VLM, RAM_AGENT = [1.0, 0.0, 2.0, 0.25, 2.0, 8.0], [0.0, 3.0, 4.0, 0.5, -4.0, 0.5]


def test_ram_by_hand():
    # Changed means above .5. Alone: entries 0 and 5 of the vlm, 1 of the agent. Both: 2 and 4,
    # averaged whatever their signs. Entry 3: .5 is not above .5.
    merged, counts = merge_deltas("ram", RAM_VLM, RAM_AGENT, threshold=0.5)
    assert merged == [1.0, 3.0, 3.0, 0.0, -1.0, 8.0]
    assert counts.kept.tolist() == [4, 3]
    weighted, _ = merge_deltas("ram", RAM_VLM, RAM_AGENT, threshold=0.5, weights=(2.0, 0.5))
    assert weighted == [2.0, 1.5, 3.0, 0.0, 1.0, 16.0]  # (4 + 2) / 2; (4 - 2) / 2


def test_ram_plus_boosts_what_one_task_alone_changed():
    # shared / unique: vlm 2 / 2, agent 2 / 1. r = .5:
    # limit 1.5: 1 + .5 * 1 and 1 + .5 * 1.5; limit .5: 1.25 for both
    for limit, vlm, agent in ((1.5, 1.5, 1.75), (0.5, 1.25, 1.25)):
        merged, counts = merge_deltas(
            "ram_plus", RAM_VLM, RAM_AGENT, threshold=0.5, boost=0.5, boost_limit=limit
        )
        assert merged == [vlm, 3 * agent, 3.0, 0.0, -1.0, 8 * vlm]
        assert counts.alone.tolist() == [2, 1]


def test_fisher_by_hand():
    # Base 1. Entry 0: (3 * 3 + 1 * 5) / (3 + 1) = 3.5. Entry 1: the agent alone is informed, 5.
    # Entry 2: nobody is: the plain average of 3 and 5.
    given = {"base": 1.0, "statistics": [[[3, 0, 0]], [[1, 2, 0]]]}
    deltas = [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]
    assert merge_deltas("fisher", *deltas, **given)[0] == [3.5, 5.0, 4.0]
    # weights 1 and 3: (3 * 3 + 3 * 5) / 6; 5; (3 + 3 * 5) / 4
    assert merge_deltas("fisher", *deltas, weights=(1.0, 3.0), **given)[0] == [4.0, 5.0, 4.5]


def test_regmean_diagonal_by_hand():
    # Two rows share the columns' numbers: column 0 3 : 1, column 1 0 : 2
    base = np.zeros((2, 2), np.float32)
    parents = {
        "vlm": np.array([[4, 4], [8, 8]], np.float32),
        "agent": np.array([[8, 8], [0, 0]], np.float32),
    }
    moments = {"vlm": np.array([3, 0], np.float32), "agent": np.array([1, 2], np.float32)}
    merged, _ = merge_tensor("regmean_diagonal", base, parents, moments, settings())
    assert merged.tolist() == [[5.0, 8.0], [6.0, 0.0]]  # (3 * 4 + 8) / 4; (3 * 8 + 0) / 4


# ---- random streams


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_random_choices_depend_on_seed_task_name_and_index_and_on_nothing_else(method):
    case = make_case("smooth", 0, (32, 32))

    def run(parents=case.parents, rows=32, **changes):
        parents = {task: parent[:rows] for task, parent in parents.items()}
        chosen = settings((1.0, 3.0), **({"seed": 1, "tensor_name": "a"} | changes))
        return merge_tensor(method, case.base[:rows], parents, None, chosen)[0]

    first = run()
    np.random.seed(99)
    assert np.array_equal(first, run())
    assert not np.array_equal(first, run(seed=2))
    assert not np.array_equal(first, run(tensor_name="b"))
    assert np.array_equal(first[:8], run(rows=8))
    swapped = {task: case.parents[task] for task in reversed(TASKS)}
    assert np.array_equal(first, run(swapped))
    # the tasks draw apart from each other: equal deltas are not kept at the same places
    alike = dict.fromkeys(TASKS, case.parents["vlm"])
    chosen = settings((1.0, 0.0)), settings((0.0, 1.0))
    own, other = (merge_tensor("dare", case.base, alike, None, s)[0] for s in chosen)
    assert not np.array_equal(own, other)


# ---- limits


def statistics_of(case, method):
    if METHODS[method].needs == "gram":
        return {task: np.diag(vector) for task, vector in case.vectors.items()}
    return case.statistics(method)


@pytest.mark.parametrize("method", EVERY)
def test_zero_weights_give_the_base(method):
    case = make_case("smooth", 0, (6, 8))
    merged, _ = merge_tensor(
        method, case.base, case.parents, statistics_of(case, method), settings((0.0, 0.0))
    )
    assert np.array_equal(merged, case.base)


@pytest.mark.parametrize("method", EVERY)
def test_parents_that_equal_the_base_give_the_base(method):
    case = make_case("smooth", 1, (6, 8))
    same = {task: case.base.copy() for task in TASKS}
    merged, counts = merge_tensor(
        method, case.base, same, statistics_of(case, method), settings((0.7, 0.3))
    )
    assert merged.tobytes() == case.base.tobytes()
    assert counts.kept.tolist() == [0, 0]


@pytest.mark.parametrize("method", [m for m in EVERY if METHODS[m].is_sparse])
def test_zero_density_gives_the_base(method):
    case = make_case("grid", 0, (6, 8))
    merged, counts = merge_tensor(
        method, case.base, case.parents, statistics_of(case, method),
        settings(density=0.0, window=0.0, outliers=0.0),
    )  # fmt: skip
    assert np.array_equal(merged, case.base)
    assert counts.kept.tolist() == [0, 0]


# what makes a method take all of the one task vector that there is
WHOLE = {
    "obm": {"density": 1.0}, "task_arithmetic": {}, "linear": {"weights": (1.0, 0.0)},
    "ties": {"density": 1.0}, "dare": {"density": 1.0}, "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "window": 0.0}, "breadcrumbs": {"density": 1.0, "outliers": 0.0},
    "sce": {"density": 1.0}, "ram": {"threshold": 0.0}, "ram_plus": {"threshold": 0.0},
    "sar": {"density": 1.0, "threshold": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("method", WHOLE)
def test_agent_that_equals_the_base_gives_the_vlm_to_the_bit(method):
    rng = np.random.default_rng(4)
    base = rng.normal(size=(20, 30)).astype(np.float32)
    vlm = base + rng.normal(0, 0.01, base.shape).astype(np.float32)
    # fp32 cannot come from here to there by adding a difference: far smaller, or a signed zero
    vlm[0, :10] = rng.normal(0, 1e-12, 10)
    vlm[1, :3], base[1, 1] = -0.0, 0.0
    shape = base.shape if METHODS[method].needs == "fisher" else (30,)
    statistics = {task: rng.random(shape).astype(np.float32) for task in TASKS}
    given = METHODS[method].needs and statistics
    merged, _ = merge_tensor(
        method, base, {"vlm": vlm, "agent": base.copy()}, given, settings(**WHOLE[method])
    )
    assert merged.tobytes() == vlm.tobytes()


@pytest.mark.parametrize("method", [m for m in WHOLE if m != "linear"])
def test_full_density_without_conflicts_is_plain_addition(method):
    case = make_case("grid", 1, (6, 8))
    # one delta at an entry at most, or TIES would take means; any signs then agree
    alone = np.arange(48).reshape(6, 8) % 2 == 0
    vlm = np.where(alone, case.parents["vlm"], case.base)
    agent = np.where(alone, case.base, case.parents["agent"])
    merged, _ = merge_tensor(
        method, case.base, {"vlm": vlm, "agent": agent}, case.statistics(method),
        settings(**WHOLE[method]),
    )  # fmt: skip
    assert np.array_equal(merged, np.where(alone, vlm, agent))


@pytest.mark.parametrize(
    "method", ["task_arithmetic", "dare", "dare_ties", "obm", "breadcrumbs", "sar"]
)
def test_full_density_and_agreeing_signs_give_plain_addition(method):
    case = make_case("grid", 2, (6, 8))
    deltas = {task: np.abs(parent - case.base) for task, parent in case.parents.items()}
    parents = {task: case.base + delta for task, delta in deltas.items()}
    merged, _ = merge_tensor(
        method, case.base, parents, case.statistics(method), settings(**WHOLE[method])
    )
    assert np.array_equal(merged, case.base + deltas["vlm"] + deltas["agent"])


@pytest.mark.parametrize("method", EVERY)
def test_the_order_of_two_tasks_does_not_matter_where_nothing_ties(method):
    case = make_case("smooth", 5, (7, 9))
    statistics = statistics_of(case, method)
    chosen = settings((0.5, 2.0))
    one, _ = merge_tensor(method, case.base, case.parents, statistics, chosen)
    reverse = dict(reversed(case.parents.items()))
    other, counts = merge_tensor(method, case.base, reverse, statistics, chosen)
    # sums of two are the same in either order; the two dense methods go through a solver
    assert one == pytest.approx(other, abs=0 if METHODS[method].rule else 1e-6)
    assert len(counts.kept) == 2


# ---- statistics that are missing


NEEDS = [method for method in EVERY if METHODS[method].needs]


@pytest.mark.parametrize("method", NEEDS)
def test_missing_statistics_are_one_clear_error(method):
    case = make_case("grid", 0, (6, 8))
    statistics = statistics_of(case, method)
    chosen = settings(tensor_name="q.weight")
    for missing, given in (("vlm", None), ("vlm", {}), ("agent", {"vlm": statistics["vlm"]})):
        message = rf"q.weight: {method} needs statistics of {missing}; run `obm calibrate`"
        with pytest.raises(MergeError, match=message):
            merge_tensor(method, case.base, case.parents, given, chosen)


@pytest.mark.parametrize("method", NEEDS)
def test_statistics_of_another_shape_are_one_clear_error(method):
    case = make_case("grid", 0, (6, 8))
    expected = {"vector": r"\[8\]", "fisher": r"\[6, 8\]", "gram": r"\[8, 8\]"}
    given = {**statistics_of(case, method), "agent": np.ones(3, np.float32)}
    message = rf"statistics of agent have shape \[3\], needed is {expected[METHODS[method].needs]}"
    with pytest.raises(MergeError, match=message):
        merge_tensor(method, case.base, case.parents, given, settings())


@pytest.mark.parametrize("method", [m for m in NEEDS if METHODS[m].needs != "fisher"])
def test_methods_of_linear_layers_refuse_a_vector(method):
    case = make_case("grid", 0, (8,))
    with pytest.raises(MergeError, match=rf"{method} needs a matrix, the tensor has shape \[8\]"):
        merge_tensor(method, case.base, case.parents, case.vectors, settings())
