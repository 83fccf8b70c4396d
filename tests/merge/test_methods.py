"""The merge methods against slow references, by hand, and at their limits.

Values are small multiples of 1/4 or 1/16: sums and products of them are exact in fp32, so that a
reference in Python's own numbers must agree bit for bit, and ties and zeros are frequent.
"""

import math

import numpy as np
import pytest
import torch

from merge.errors import MergeError
from merge.methods import (
    METHODS,
    MethodSettings,
    dare,
    keep_top,
    normalise_saliency,
    obm,
    stable_sum,
    task_arithmetic,
    ties,
)

TASKS = ("vlm", "agent")


def settings(weights=(1.0, 1.0), **changes) -> MethodSettings:
    return MethodSettings(weights=dict(zip(TASKS, weights, strict=True)), **changes)


def deltas_of(*rows) -> dict[str, torch.Tensor]:
    return {task: torch.tensor([row]) for task, row in zip(TASKS, rows, strict=True)}


def random_case(seed: int, shape=(6, 8)):
    generator = np.random.default_rng(seed)

    def grid(low, high, step, size):
        return torch.from_numpy(generator.integers(low, high, size).astype(np.float32) * step)

    base = grid(-8, 9, 0.25, shape)
    deltas = {task: grid(-4, 5, 0.25, shape) for task in TASKS}
    moments = {task: grid(0, 5, 0.25, shape[1]) for task in TASKS}
    return base, deltas, moments


def reference(method, base, deltas, moments, weights, density, combine="sum"):
    """OBM, TIES and task arithmetic entry by entry, as the formulas say."""
    rows, columns = base.shape
    places = [(i, j) for i in range(rows) for j in range(columns)]
    n_keep = math.floor(density * len(places) + 0.5)
    delta = {t: {p: deltas[t][p].item() for p in places} for t in TASKS}
    score = {t: {p: abs(delta[t][p]) for p in places} for t in TASKS}
    if method == "obm":
        score = {t: {p: moments[t][p[1]].item() * delta[t][p] ** 2 for p in places} for t in TASKS}
    kept = {}
    for t in TASKS:
        nonzero = [p for p in places if delta[t][p] != 0]
        ranked = sorted((-score[t][p], p) for p in nonzero)
        kept[t] = {p for _, p in (ranked if method == "task_arithmetic" else ranked[:n_keep])}
    merged = base.clone()
    for p in places:
        present = [t for t in TASKS if p in kept[t]]
        if method == "obm":
            vote = sum(score[t][p] * math.copysign(1, delta[t][p]) for t in present)
            vote = vote or sum(delta[t][p] for t in present)
        else:
            vote = sum(delta[t][p] for t in present)
        if present and vote == 0:
            vote = delta[present[0]][p]
        if method != "task_arithmetic":
            present = [t for t in present if delta[t][p] * vote > 0]
        update = sum(weights[TASKS.index(t)] * delta[t][p] for t in present)
        if present and (method == "ties" or combine == "mean"):
            update /= len(present)
        merged[p] = base[p].item() + update
    return merged


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_obm_equals_a_slow_reference(seed, density, combine):
    base, deltas, moments = random_case(seed)
    weights = (1.0, 0.5)
    merged, _ = obm(base, deltas, moments, settings(weights, density=density, combine=combine))
    assert torch.equal(merged, reference("obm", base, deltas, moments, weights, density, combine))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_ties_equals_a_slow_reference(seed, density):
    base, deltas, _ = random_case(seed)
    weights = (2.0, 0.5)
    merged, _ = ties(base, deltas, None, settings(weights, density=density))
    assert torch.equal(merged, reference("ties", base, deltas, None, weights, density))


@pytest.mark.parametrize("seed", range(5))
def test_task_arithmetic_equals_a_slow_reference(seed):
    base, deltas, _ = random_case(seed)
    weights = (0.5, -2.0)
    merged, _ = task_arithmetic(base, deltas, None, settings(weights))
    assert torch.equal(merged, reference("task_arithmetic", base, deltas, None, weights, 1.0))


def test_obm_by_hand():
    # saliency: vlm 1 * [2, -1, 1, 0]^2 = [4, 1, 1, 0]; agent [1, 1, 1, .25] * [-1, -1, 3, 4]^2
    # = [1, 1, 9, 4]. Density .75 keeps 3: vlm 0, 1, 2; agent 2, 3 and, of the tied 0 and 1, the 0.
    # Entry 0: +4 against -1, the vlm wins. Entry 2: both agree. Entry 1: vlm alone. 3: agent alone.
    base = torch.tensor([[10.0, 10.0, 10.0, 10.0]])
    deltas = deltas_of([2.0, -1.0, 1.0, 0.0], [-1.0, -1.0, 3.0, 4.0])
    moments = {"vlm": torch.ones(4), "agent": torch.tensor([1.0, 1.0, 1.0, 0.25])}
    summed, statistics = obm(base, deltas, moments, settings((1.0, 0.5), density=0.75))
    assert summed.tolist() == [[12.0, 9.0, 12.5, 12.0]]  # entry 2: 1 * 1 + .5 * 3
    mean, _ = obm(base, deltas, moments, settings((1.0, 0.5), density=0.75, combine="mean"))
    assert mean.tolist() == [[12.0, 9.0, 11.25, 12.0]]  # entry 2: (1 + 1.5) / 2
    assert statistics["kept"] == {"vlm": 3, "agent": 3}
    assert statistics["conflicts"] == 1
    assert statistics["conflicts_won"] == {"vlm": 1, "agent": 0}
    assert statistics["delta_square"] == {"vlm": 6.0, "agent": 27.0}
    assert statistics["update_square"] == 4 + 1 + 6.25 + 4


def test_obm_lets_the_second_moment_decide_what_stays():
    # Equal deltas: only h tells which of the two entries is kept.
    base = torch.zeros(1, 2)
    deltas = deltas_of([1.0, 1.0], [0.0, 0.0])
    for h, expected in (([3.0, 2.0], [[1.0, 0.0]]), ([2.0, 3.0], [[0.0, 1.0]])):
        moments = {"vlm": torch.tensor(h), "agent": torch.ones(2)}
        merged, _ = obm(base, deltas, moments, settings(density=0.5))
        assert merged.tolist() == expected


def test_obm_normalisation_decides_conflicts_but_not_what_is_kept():
    # saliency: vlm [16, 16], agent [1, 1/64]. Entry 0 is the conflict.
    # none: 16 > 1, vlm. mean: 16/16 = 1 against 1/(65/128) = 1.97, agent.
    # rank: 1 against 1, a tie, so the larger summed delta 4 - 1 > 0 decides: vlm.
    base = torch.zeros(1, 2)
    deltas = deltas_of([4.0, 4.0], [-1.0, 0.125])
    moments = {task: torch.ones(2) for task in TASKS}
    expected = {"none": [[4.0, 4.125]], "mean": [[-1.0, 4.125]], "rank": [[4.0, 4.125]]}
    for normalization, values in expected.items():
        merged, statistics = obm(
            base, deltas, moments, settings(density=1.0, normalization=normalization)
        )
        assert merged.tolist() == values, normalization
        assert statistics["kept"] == {"vlm": 2, "agent": 2}


def test_obm_inputs_that_were_never_active_fall_back_to_the_larger_delta_then_the_first_task():
    base = torch.zeros(1, 3)
    deltas = deltas_of([1.0, -1.0, -2.0], [-3.0, 1.0, 0.0])
    moments = {task: torch.zeros(3) for task in TASKS}
    merged, statistics = obm(base, deltas, moments, settings(density=1.0))
    assert merged.tolist() == [[-3.0, -1.0, -2.0]]
    assert statistics["conflicts_won"] == {"vlm": 1, "agent": 1}


def test_ties_by_hand():
    # Density 2/3 keeps 2: vlm [3, 0, -2], agent [-1, 4, 0]. Sums [2, 4, -2].
    # Disjoint means: entry 0 vlm alone (agent disagrees), 1 agent alone, 2 vlm alone.
    base = torch.zeros(1, 3)
    deltas = deltas_of([3.0, 1.0, -2.0], [-1.0, 4.0, -0.5])
    merged, statistics = ties(base, deltas, None, settings(density=2 / 3))
    assert merged.tolist() == [[3.0, 4.0, -2.0]]
    assert statistics["conflicts"] == 1
    assert statistics["conflicts_won"] == {"vlm": 1, "agent": 0}
    both, _ = ties(base, deltas, None, settings((1.0, 0.5), density=1.0))
    assert both.tolist() == [[3.0, (1 + 0.5 * 4) / 2, (-2 - 0.5 * 0.5) / 2]]


def test_ties_elects_the_first_task_where_trimmed_values_cancel():
    merged, _ = ties(torch.zeros(1, 1), deltas_of([-2.0], [2.0]), None, settings(density=1.0))
    assert merged.tolist() == [[-2.0]]


def test_dare_keeps_about_its_density_and_rescales_what_it_keeps():
    base = torch.zeros(100, 100)
    deltas = {task: torch.ones(100, 100) for task in TASKS}
    merged, statistics = dare(base, deltas, None, settings((1.0, 0.0), density=0.25, seed=3))
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    # Binomial(10^4, .25) has a standard deviation of 43; five of them
    assert abs(statistics["kept"]["vlm"] - 2500) < 220
    assert abs(statistics["kept"]["agent"] - 2500) < 220
    # Independent choices agree on a sixteenth of the entries
    both, _ = dare(base, deltas, None, settings(density=0.25, seed=3))
    assert abs(int((both == 8.0).sum()) - 625) < 125


def test_dare_depends_on_seed_task_and_name_and_on_nothing_else():
    base = torch.zeros(32, 32)
    deltas = {task: torch.ones(32, 32) for task in TASKS}

    def run(**changes):
        return dare(base, deltas, None, settings((1.0, 3.0), density=0.5, **changes))[0]

    first = run(seed=1, tensor_name="a")
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first, run(seed=1, tensor_name="a"))
    assert not torch.equal(first, run(seed=2, tensor_name="a"))
    assert not torch.equal(first, run(seed=1, tensor_name="b"))
    reverse = {task: deltas[task] for task in reversed(TASKS)}
    swapped, _ = dare(
        base, reverse, None, settings((1.0, 3.0), density=0.5, seed=1, tensor_name="a")
    )
    assert torch.equal(first, swapped)


@pytest.mark.parametrize("name", METHODS)
def test_zero_weights_give_the_base(name):
    base, deltas, moments = random_case(0)
    merged, _ = METHODS[name](base, deltas, moments, settings((0.0, 0.0)))
    assert torch.equal(merged, base)


@pytest.mark.parametrize("name", ["obm", "ties", "dare"])
def test_zero_density_gives_the_base(name):
    base, deltas, moments = random_case(0)
    merged, statistics = METHODS[name](base, deltas, moments, settings(density=0.0))
    assert torch.equal(merged, base)
    assert statistics["kept"] == {"vlm": 0, "agent": 0}


@pytest.mark.parametrize("name", METHODS)
def test_full_density_without_conflicts_is_plain_addition(name):
    base, deltas, moments = random_case(1)
    # One delta at an entry at most, or TIES would take means; any signs then agree
    alone = torch.arange(base.numel()).reshape(base.shape) % 2 == 0
    deltas = {
        "vlm": torch.where(alone, deltas["vlm"], 0.0),
        "agent": torch.where(alone, 0.0, deltas["agent"]),
    }
    merged, _ = METHODS[name](base, deltas, moments, settings(density=1.0))
    assert torch.equal(merged, base + deltas["vlm"] + deltas["agent"])


@pytest.mark.parametrize("name", ["task_arithmetic", "dare", "obm"])
def test_full_density_and_agreeing_signs_give_plain_addition(name):
    base, deltas, moments = random_case(2)
    deltas = {task: delta.abs() for task, delta in deltas.items()}
    merged, _ = METHODS[name](base, deltas, moments, settings(density=1.0))
    assert torch.equal(merged, base + deltas["vlm"] + deltas["agent"])


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_left_alone(name):
    base, deltas, moments = random_case(3)
    before = [tensor.clone() for tensor in (base, *deltas.values(), *moments.values())]
    METHODS[name](base, deltas, moments, settings())
    after = (base, *deltas.values(), *moments.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("normalization", ["none", "mean", "rank"])
def test_same_bits_for_any_number_of_threads(name, normalization):
    generator = torch.Generator().manual_seed(0)
    shape = (300, 400)  # more than one block of stable_sum
    base = torch.randn(shape, generator=generator)
    deltas = {task: torch.randn(shape, generator=generator) for task in TASKS}
    moments = {task: torch.rand(shape[1], generator=generator) for task in TASKS}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                METHODS[name](base, deltas, moments, settings(normalization=normalization))
            )
    finally:
        torch.set_num_threads(threads)
    for merged, statistics in results[1:]:
        assert torch.equal(merged, results[0][0])
        assert statistics == results[0][1]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.5, 0.99, 1.0])
def test_density_is_exact_where_no_delta_is_zero(density):
    # bf16-like ties: 10^4 entries of 8 magnitudes
    score = torch.randint(1, 9, (100, 100), generator=torch.Generator().manual_seed(0)).float()
    keep = keep_top(score, torch.ones_like(score, dtype=torch.bool), density)
    assert int(keep.sum()) == round(density * 10_000)
    if 0 < density < 1:
        assert score[keep].min() >= score[~keep].max()


def test_tied_scores_are_kept_from_the_front():
    score = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    keep = keep_top(score, torch.ones_like(score, dtype=torch.bool), 4 / 6)
    assert keep.tolist() == [[True, True, True], [False, False, True]]


def test_a_zero_delta_is_never_kept():
    score = torch.tensor([0.0, 0.0, 0.0, 5.0])
    eligible = torch.tensor([False, True, False, True])
    assert keep_top(score, eligible, 0.75).tolist() == [False, True, False, True]
    assert keep_top(score, eligible, 0.25).tolist() == [False, False, False, True]


def test_half_an_entry_rounds_up():
    ones = torch.ones(5)
    assert int(keep_top(ones, ones.bool(), 0.5).sum()) == 3  # floor(2.5 + .5)
    assert int(keep_top(ones, ones.bool(), 0.49).sum()) == 2


def test_rank_shares_ties_and_leaves_zero():
    ranks = normalise_saliency(torch.tensor([0.0, 2.0, 1.0, 2.0]), "rank")
    assert ranks.tolist() == [0.0, 1.0, 0.5, 1.0]


def test_mean_normalisation_of_nothing_is_nothing():
    assert normalise_saliency(torch.zeros(3), "mean").tolist() == [0.0, 0.0, 0.0]
    assert normalise_saliency(torch.tensor([1.0, 3.0]), "mean").tolist() == [0.5, 1.5]


def test_stable_sum_is_a_sum():
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    assert stable_sum(values) == pytest.approx(values.double().sum().item(), rel=1e-12)
    assert stable_sum(torch.empty(0)) == 0.0


def test_obm_without_moments_or_with_others_is_an_error():
    base, deltas, moments = random_case(0)
    with pytest.raises(MergeError, match="calibrate"):
        obm(base, deltas, None, settings())
    with pytest.raises(MergeError, match=r"\[3\].*\[6, 8\]"):
        obm(base, deltas, {**moments, "agent": torch.ones(3)}, settings())
