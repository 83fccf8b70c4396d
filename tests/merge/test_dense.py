"""RegMean against the equations it solves, WUDI against torch's Adam on the loss it states."""

import tracemalloc

import numpy as np
import pytest
import torch

from merge.errors import MergeError
from merge.methods import MethodSettings
from merge.tensor import merge_tensor
from tests.merge.cases import make_case

TASKS = ("vlm", "agent")


def settings_of(weights=(1.0, 1.0), **changes) -> MethodSettings:
    named = dict(zip(TASKS, weights, strict=True))
    return MethodSettings(named, tensor_name="layer.weight", **changes)


def layer(seed, n_out=5, n_in=7, n_tokens=40):
    """A base, two parents, inputs of each, and their Gram matrices E[x x^T]."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n_out, n_in)).astype(np.float32)
    parents = {t: base + rng.normal(size=base.shape).astype(np.float32) for t in TASKS}
    mixing = np.eye(n_in) + 0.2 * rng.normal(size=(n_in, n_in))  # inputs are correlated
    inputs = {t: rng.normal(size=(n_tokens, n_in)) @ mixing for t in TASKS}
    grams = {t: (x.T @ x / n_tokens).astype(np.float32) for t, x in inputs.items()}
    return base, parents, inputs, grams


# ---- RegMean


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
def test_regmean_solves_the_normal_equations(weights):
    base, parents, _, grams = layer(0)
    shrink = 0.8
    merged, _ = merge_tensor("regmean", base, parents, grams, settings_of(weights, shrink=shrink))
    off = 1 - np.eye(7)
    weighted = [
        w * grams[t].astype(np.float64) * (shrink * off + np.eye(7))
        for w, t in zip(weights, TASKS, strict=True)
    ]
    target = sum(parents[t] @ g for t, g in zip(TASKS, weighted, strict=True))
    expected = np.linalg.solve(sum(weighted).T, target.T).T
    # a millionth of the mean diagonal is added to the matrix that is inverted
    assert merged == pytest.approx(expected, abs=2e-5)


def test_regmean_without_shrinking_is_the_least_squares_fit_to_the_parents_outputs():
    base, parents, inputs, grams = layer(1)
    merged, _ = merge_tensor("regmean", base, parents, grams, settings_of((1.0, 3.0), shrink=1.0))
    # min over W of sum_k lambda_k E ||W x - W_k x||^2, as one stacked system of equations
    left = np.concatenate([inputs["vlm"], np.sqrt(3) * inputs["agent"]])
    outputs = {t: inputs[t] @ parents[t].astype(np.float64).T for t in TASKS}
    right = np.concatenate([outputs["vlm"], np.sqrt(3) * outputs["agent"]])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert merged == pytest.approx(expected, abs=1e-4)


def test_regmean_by_hand():
    # shrink 1/2: G_vlm = [[2, 1], [1, 2]], G_agent = [[1, 0], [0, 1]] + the same off-diagonal 0
    # sum = [[3, 1], [1, 3]]. W_vlm = [1, 0]: W G = [2, 1]; W_agent = [0, 1]: W G = [0, 1].
    # x [[3, 1], [1, 3]] = [2, 2]  ->  x = [.5, .5]
    base = np.zeros((1, 2), np.float32)
    parents = {"vlm": np.array([[1, 0]], np.float32), "agent": np.array([[0, 1]], np.float32)}
    grams = {"vlm": np.array([[2, 2], [2, 2]], np.float32), "agent": np.eye(2, dtype=np.float32)}
    merged, _ = merge_tensor("regmean", base, parents, grams, settings_of(shrink=0.5))
    assert merged == pytest.approx(np.array([[0.5, 0.5]]), abs=1e-6)


def test_regmean_shrunk_to_the_diagonal_is_regmean_diagonal():
    base, parents, _, grams = layer(2)
    settings = settings_of((1.0, 0.5), shrink=0.0)
    full, _ = merge_tensor("regmean", base, parents, grams, settings)
    diagonals = {t: np.diagonal(g).copy() for t, g in grams.items()}
    diagonal, _ = merge_tensor("regmean_diagonal", base, parents, diagonals, settings)
    assert full == pytest.approx(diagonal, abs=2e-5)


def test_regmean_inputs_that_were_never_active_give_the_weighted_average():
    base, parents, _, _ = layer(3)
    grams = {t: np.zeros((7, 7), np.float32) for t in TASKS}
    merged, _ = merge_tensor("regmean", base, parents, grams, settings_of((3.0, 1.0)))
    average = (3 * parents["vlm"] + parents["agent"]) / 4
    assert merged == pytest.approx(average, abs=1e-6)

    # weights that sum to nothing: their sum itself, as the other averages have it
    merged, _ = merge_tensor("regmean", base, parents, grams, settings_of((1.0, -1.0)))
    assert merged == pytest.approx(base + parents["vlm"] - parents["agent"], abs=1e-6)


def test_regmean_is_drawn_to_the_base_by_a_millionth():
    # one input: (1 * 1 + 1 * 1) / (2 + 1e-6 * 2)
    one = np.ones((1, 1), np.float32)
    parents, grams = dict.fromkeys(TASKS, one), dict.fromkeys(TASKS, one)
    merged, _ = merge_tensor("regmean", np.zeros_like(one), parents, grams, settings_of())
    assert merged[0, 0] == pytest.approx(1 - 1e-6, abs=1e-7)


def test_regmean_one_dead_input_leaves_the_others_as_they_are():
    base, parents, inputs, _ = layer(4)
    for x in inputs.values():
        x[:, 2] = 0
    grams = {t: (x.T @ x / 40).astype(np.float32) for t, x in inputs.items()}
    merged, _ = merge_tensor("regmean", base, parents, grams, settings_of())
    assert np.isfinite(merged).all()
    alive = [0, 1, 3, 4, 5, 6]
    small = {t: np.ascontiguousarray(p[:, alive]) for t, p in parents.items()}
    small_grams = {t: np.ascontiguousarray(g[np.ix_(alive, alive)]) for t, g in grams.items()}
    expected, _ = merge_tensor(
        "regmean", np.ascontiguousarray(base[:, alive]), small, small_grams, settings_of()
    )
    assert merged[:, alive] == pytest.approx(expected, abs=2e-5)


# ---- WUDI


def wudi_by_autograd(base, parents, settings):
    """Adam as torch has it, on the loss as the paper states it, in fp64."""
    vectors = [
        torch.from_numpy((parent - base).astype(np.float64)) * settings.weights[task]
        for task, parent in parents.items()
    ]
    tau = sum(vectors).clone().requires_grad_()
    adam = torch.optim.Adam([tau], lr=settings.learning_rate)
    losses = []
    for _ in range(settings.steps):
        adam.zero_grad()
        loss = sum(((tau - v) @ v.T).square().sum() / v.square().sum() for v in vectors)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return base + tau.detach().numpy(), losses


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -1.5)])
def test_wudi_is_adam_on_the_stated_loss(weights):
    base, parents, _, _ = layer(5, n_out=6, n_in=9)
    settings = settings_of(weights, steps=60, learning_rate=1e-2)
    merged, _ = merge_tensor("wudi", base, parents, None, settings)
    expected, losses = wudi_by_autograd(base, parents, settings)
    assert losses[-1] < 0.8 * losses[0]
    moved = np.abs(expected - sum(p - base for p in parents.values()) - base).max()
    assert moved > 0.1
    # fp32 against fp64: the moments are some hundred roundings deep
    assert merged == pytest.approx(expected, abs=1e-4)


def test_wudi_first_step_by_hand():
    # One input. tau_vlm = 2, tau_agent = -1, tau = 1. Loss ((1 - 2) 2)^2 / 4 + ((1 + 1) 1)^2 / 1;
    # gradient 2 (tau A - B), A = 1 + 1, B = 2 - 1: 2 (2 - 1) = 2 > 0. Adam's first step is the
    # learning rate against the sign: 1 - .25.
    base = np.zeros((1, 1), np.float32)
    parents = {"vlm": np.array([[2]], np.float32), "agent": np.array([[-1]], np.float32)}
    settings = settings_of(steps=1, learning_rate=0.25)
    merged, counts = merge_tensor("wudi", base, parents, None, settings)
    assert merged == pytest.approx(0.75, abs=1e-6)
    # where the update's sign says who won: the vlm
    assert (counts.conflicts, counts.conflicts_won.tolist()) == (1, [1, 0])


def test_wudi_agent_that_equals_the_base_gives_the_vlm():
    # one task vector interferes with nothing: the loss is zero where Adam starts
    case = make_case("grid", 0, (6, 8))
    parents = {"vlm": case.parents["vlm"], "agent": case.base.copy()}
    merged, _ = merge_tensor("wudi", case.base, parents, None, settings_of())
    assert merged.tobytes() == case.parents["vlm"].tobytes()


def test_wudi_task_vectors_of_zero_give_the_base():
    case = make_case("grid", 0, (6, 8))
    same = {task: case.base.copy() for task in TASKS}
    assert np.array_equal(merge_tensor("wudi", case.base, same, None, settings_of())[0], case.base)


def test_wudi_without_steps_is_task_arithmetic():
    case = make_case("grid", 1, (6, 8))
    settings = settings_of((1.0, 0.5), steps=0)
    merged, _ = merge_tensor("wudi", case.base, case.parents, None, settings)
    plain, _ = merge_tensor("task_arithmetic", case.base, case.parents, None, settings)
    assert np.array_equal(merged, plain)


# ---- both


@pytest.mark.parametrize("method", ["regmean", "wudi"])
def test_counts_say_what_changed_and_what_conflicts(method):
    # entry 0: agree. 1: the vlm alone. 2: opposite signs. 3: nothing.
    base = np.zeros((1, 4), np.float32)
    parents = {
        "vlm": np.array([[1, 2, 3, 0]], np.float32),
        "agent": np.array([[1, 0, -1, 0]], np.float32),
    }
    grams = {task: np.eye(4, dtype=np.float32) for task in TASKS}
    merged, counts = merge_tensor(method, base, parents, grams, settings_of(steps=1))
    assert counts.kept.tolist() == [3, 2]
    assert counts.conflicts == 1
    assert counts.conflicts_won.tolist() == [1, 0]
    assert merged[0, 2] > 0
    assert counts.delta_square.tolist() == [14.0, 2.0]
    assert counts.update_square == pytest.approx(float(np.square(merged).sum()))


@pytest.mark.parametrize("method", ["regmean", "wudi"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_with_its_role(method, bad):
    for role in ("base", *TASKS):
        base, parents, _, grams = layer(6)
        {"base": base, **parents}[role][1, 2] = bad
        with pytest.raises(MergeError, match=rf"{role}: tensor layer.weight holds NaN or infinity"):
            merge_tensor(method, base, parents, grams, settings_of())


@pytest.mark.parametrize("method", ["regmean", "wudi"])
def test_inputs_are_left_alone(method):
    base, parents, _, grams = layer(7)
    arrays = [base, *parents.values(), *grams.values()]
    before = [array.copy() for array in arrays]
    merge_tensor(method, base, parents, grams, settings_of(steps=3))
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


# ---- memory


def test_the_parents_are_not_copied_on_their_way_to_a_dense_method(monkeypatch):
    base, parents, _, grams = layer(0, n_out=4096)
    done = merge_tensor("regmean", base, parents, grams, settings_of())
    monkeypatch.setattr("merge.tensor.merge_matrix", lambda *_: done)
    tracemalloc.start()
    merge_tensor("regmean", base, parents, grams, settings_of())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < base.nbytes
