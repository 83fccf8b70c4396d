"""SAR-Merging: who wins a conflict, what is trimmed, which norm is restored; by hand and planted.

The slow reference of `test_methods` and the twins of `test_kernels` cover it too.
"""

import numpy as np
import pytest

from merge.errors import MergeError
from merge.methods import MethodSettings
from merge.sar import settle_conflicts
from merge.tensor import merge_tensor
from tests.merge.cases import make_case, merge_in_pieces, round_bf16, settings_of

TASKS = ("vlm", "agent", "donor")


def merge_row(deltas, sensitivities, base=0.0, weights=(1.0, 1.0, 1.0), **changes):
    """Merges one row of deltas a task; returns the merged row as a list, and the counts."""
    rows = [np.array([delta], np.float32) for delta in deltas]
    origin = np.full_like(rows[0], base)
    tasks = TASKS[: len(rows)]
    parents = {task: origin + row for task, row in zip(tasks, rows, strict=True)}
    fisher = {
        task: np.array([row], np.float32) for task, row in zip(tasks, sensitivities, strict=True)
    }
    named = dict(zip(tasks, weights, strict=False))
    settings = MethodSettings(weights=named, **({"density": 1.0, "threshold": 0.5} | changes))
    merged, counts = merge_tensor("sar", origin, parents, fisher, settings)
    return merged[0].tolist(), counts


def test_sensitivity_and_not_size_decides_a_conflict():
    # F delta^2: entry 0 is 4 * 1 = 4 against 1 * 9 = 9, the agent; entry 1 is 16 * 1 against 9, the
    # vlm; entry 2 agrees and is summed; entry 3: the vlm's .25 is below the threshold, no conflict.
    vlm, agent = [1.0, 1.0, 2.0, 0.25], [-3.0, -3.0, 1.0, -2.0]
    merged, counts = merge_row([vlm, agent], [[4, 16, 1, 9], [1, 1, 1, 1]], base=8.0)
    assert merged == [5.0, 9.0, 11.0, 6.0]
    assert counts.kept.tolist() == [2, 3]
    assert (counts.conflicts, counts.conflicts_won.tolist()) == (2, [1, 1])
    assert counts.delta_square.tolist() == [1 + 1 + 4 + 0.0625, 9 + 9 + 1 + 4]  # of all entries


def test_trimming_keeps_the_largest_of_what_is_left_and_the_factor_restores_its_norm():
    # The agent loses its 8 in the conflict: left are [0, 3, 4, 0, 0], norm 5. Density .2 of five
    # entries keeps one, the 4, which becomes 4 * 5 / 4 = 5. The lost 8 raises no norm.
    vlm, agent = [1.0, 0.0, 0.0, 0.0, 0.0], [-8.0, 3.0, 4.0, 0.0, 0.0]
    merged, counts = merge_row([vlm, agent], [[100, 0, 0, 0, 0], [1, 1, 1, 1, 1]], density=0.2)
    assert merged == [1.0, 0.0, 5.0, 0.0, 0.0]
    assert counts.kept.tolist() == [1, 1]
    # lambda_k multiplies what was restored: .5 * 5
    halved, _ = merge_row(
        [vlm, agent], [[100, 0, 0, 0, 0], [1] * 5], density=0.2, weights=(1.0, 0.5)
    )
    assert halved == [1.0, 0.0, 2.5, 0.0, 0.0]


def test_entries_that_agree_are_summed_or_averaged():
    deltas, fisher = [[2.0, 2.0], [4.0, 0.0]], [[1, 1], [1, 1]]
    assert merge_row(deltas, fisher)[0] == [6.0, 2.0]
    assert merge_row(deltas, fisher, combine="mean")[0] == [3.0, 2.0]


def test_of_three_tasks_the_single_most_sensitive_decides():
    # votes 4 and 4 for plus, 9 for minus: their sum would say plus, the largest says minus
    merged, counts = merge_row([[1.0], [1.0], [-1.0]], [[4], [4], [9]])
    assert merged == [-1.0]
    assert counts.conflicts_won.tolist() == [0, 0, 1]
    # and whoever agrees with it stays
    assert merge_row([[1.0], [2.0], [-1.0]], [[4], [10], [9]])[0] == [3.0]


def test_where_no_answer_is_sensitive_the_larger_change_decides_and_then_plus():
    none = [[0, 0], [0, 0]]
    merged, counts = merge_row([[1.0, -2.0], [-3.0, 2.0]], none)
    assert merged == [-3.0, 2.0]
    assert counts.conflicts_won.tolist() == [0, 2]
    assert merge_row([[2.0, 1.0], [-2.0, -3.0]], none)[0] == [2.0, -3.0]


def test_normalisation_lets_a_less_sensitive_model_win():
    # F delta^2: vlm [100, 100], agent [9, 1]. As they are, the vlm wins entry 0; over their means
    # (100 and 5) it is 1 against 1.8.
    deltas, fisher = [[1.0, 1.0], [-3.0, 1.0]], [[100, 100], [1, 1]]
    assert merge_row(deltas, fisher)[0] == [1.0, 2.0]
    assert merge_row(deltas, fisher, normalization="mean")[0] == [-3.0, 2.0]


@pytest.mark.parametrize("density", [0.1, 0.3])
def test_a_planted_update_that_the_agent_alone_made_is_kept_entirely(density):
    # the agent changed a tenth of the entries, the VLM half of the others
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, (40, 50)).astype(np.float32)
    planted = rng.permutation(2000).reshape(40, 50) < 200
    own = ~planted & (rng.random((40, 50)) < 0.5)
    steps = rng.normal(0, 0.01, (2, 40, 50)).astype(np.float32)
    steps += np.sign(steps) * np.float32(1e-4)  # all above the threshold
    agent = np.where(planted, base + steps[0], base)
    vlm = np.where(own, base + steps[1], base)
    fisher = {"vlm": np.ones_like(base), "agent": np.full_like(base, 1e-9)}
    settings = MethodSettings(weights={"vlm": 1.0, "agent": 1.0}, density=density)
    merged, counts = merge_tensor("sar", base, {"vlm": vlm, "agent": agent}, fisher, settings)
    assert merged[planted].tobytes() == agent[planted].tobytes()
    assert counts.kept.tolist() == [round(2000 * density), 200]
    assert counts.conflicts == 0
    # an average, for comparison, leaves half of it
    plain, _ = merge_tensor("linear", base, {"vlm": vlm, "agent": agent}, None, settings)
    assert (plain - base)[planted] == pytest.approx((agent - base)[planted] / 2, rel=1e-4)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_norm_of_each_trimmed_task_vector_is_that_before(dtype):
    case = make_case("smooth", 3, (60, 70))
    base, agent = case.base, case.parents["agent"]
    if dtype == "BF16":
        base, agent = round_bf16(base), round_bf16(agent)
    settings = settings_of(("vlm", "agent"), weights=(0.0, 1.0), density=0.2)
    given = {"vlm": base, "agent": agent}
    merged, counts = merge_tensor("sar", base, given, case.entries, settings)
    assert counts.kept.tolist() == [0, 840]  # .2 of 4,200
    # the supports leave out |delta| <= 2e-5, some 0.2 % of the entries and next to no norm
    assert np.linalg.norm(merged - base) == pytest.approx(np.linalg.norm(agent - base), rel=1e-5)


def test_updates_without_overlap_are_added_whatever_the_sensitivities():
    case = make_case("grid", 1, (6, 8))
    alone = np.arange(48).reshape(6, 8) % 2 == 0
    vlm = np.where(alone, case.parents["vlm"], case.base)
    agent = np.where(alone, case.base, case.parents["agent"])
    settings = settings_of(("vlm", "agent"), weights=(1.0, 1.0), density=0.5)
    results = [
        merge_tensor("sar", case.base, {"vlm": vlm, "agent": agent}, fisher, settings)
        for fisher in (case.entries, {task: np.zeros((6, 8), np.float32) for task in TASKS})
    ]
    for merged, counts in results:
        assert np.array_equal(merged, np.where(alone, vlm, agent))
        assert counts.conflicts == 0


def test_blocks_and_pieces_change_no_bit(monkeypatch):
    case = make_case("tied", 2, (23, 41), n_tasks=3)
    for normalization in ("none", "mean", "rank"):
        settings = settings_of(case.parents, density=0.3, normalization=normalization)
        whole, counts = merge_in_pieces("sar", case, settings, "numba", dtype="BF16")
        monkeypatch.setattr("merge.sar.BLOCK", 17)
        parts, other = merge_in_pieces("sar", case, settings, "numba", dtype="BF16", rows_a_piece=3)
        monkeypatch.undo()
        assert whole.tobytes() == parts.tobytes()
        assert counts.conflicts == other.conflicts > 0
        assert counts.conflicts_won.tolist() == other.conflicts_won.tolist()


def test_values_that_are_not_finite_are_named_even_where_they_lose():
    case = make_case("smooth", 0, (4, 5))
    for value in (np.nan, np.inf):
        parents = {task: parent.copy() for task, parent in case.parents.items()}
        parents["agent"][1, 2] = value
        zero = {"vlm": case.entries["vlm"], "agent": np.zeros((4, 5), np.float32)}
        with pytest.raises(MergeError, match=r"agent: tensor layer\.weight holds NaN or infinity"):
            merge_tensor("sar", case.base, parents, zero, settings_of(parents))


def test_missing_fisher_information_says_what_to_run():
    case = make_case("smooth", 0, (4, 5))
    with pytest.raises(MergeError, match="sar needs statistics of vlm; run `obm calibrate`"):
        merge_tensor("sar", case.base, case.parents, None, settings_of(case.parents))


def test_settling_by_hand():
    deltas = np.array([[1, 1, -1, 0, 1e-6], [-1, 1, 1, -1, -1]], np.float32)
    votes = np.array([[3, 3, 2, 0, 9], [2, 9, 2, 0, 0]], np.float32)
    stays, conflict = settle_conflicts(deltas, votes, np.float32(1e-5))
    # 0: 3 > 2; 1: agree; 2: votes and sum tie, so plus; 3: the second alone; 4: 1e-6 is nothing
    assert conflict.tolist() == [True, False, True, False, False]
    assert stays.tolist() == [[True, True, False, False, False], [False, True, True, True, True]]
