"""The fused loops for two bf16 task vectors give what the plain kernels give, ties included."""

import numpy as np
import pytest

from merge import kernels, kernels_numpy, kernels_pair
from merge.kernels import Piece
from merge.methods import METHODS, MethodSettings
from merge.shards import from_float, to_float
from merge.tensor import decide

TASKS = ("vlm", "agent")


def make_bf16(shape, std, seed=1):
    """Base and two updates of it: at 1e-5 nearly all deltas are zero or one unit, and tie."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    base = from_float(rng.normal(0, 0.02, n).astype(np.float32), "BF16")
    values = to_float(base, "BF16")
    updates = [values + rng.normal(0, s, n).astype(np.float32) for s in (std, std / 3)]
    tasks = np.stack([from_float(update, "BF16") for update in updates])
    vectors = np.abs(rng.normal(0, 1, (2, shape[-1]))).astype(np.float32)
    vectors[:, :2] = 0  # inputs that were never active
    return base, tasks, vectors


def merge_with(module, method, shape, data, settings, n_pieces=3):
    base, tasks, vectors = data
    rule = METHODS[method].rule(settings)
    n_rows, n_columns = shape
    step = max(1, n_rows // n_pieces) * n_columns

    def pieces():
        for begin in range(0, base.size, step):
            part = slice(begin, begin + step)
            is_weighed = method == "obm"
            yield Piece(
                base=base[part],
                tasks=np.ascontiguousarray(tasks[:, part]),
                n_columns=n_columns if is_weighed else base[part].size,
                begin=begin,
                vectors=vectors if is_weighed else np.zeros((2, 0), np.float32),
                entries=np.zeros((2, 0), np.float32),
            )

    decision = decide(pieces, rule, settings, TASKS, module)
    outs, counts = [], []
    for piece in pieces():
        outs.append(np.empty_like(piece.base))
        counts.append(module.apply(piece, decision, outs[-1]))
    return np.concatenate(outs), counts


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "obm"])
@pytest.mark.parametrize("std", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (5, 9001), (64, 64)])
def test_fused_loops_give_the_bits_and_counts_of_numpy(shape, std, method):
    data = make_bf16(shape, std)
    for density in (0.0, 0.1, 0.3, 0.9, 1.0):
        for combine in ("sum", "mean"):
            settings = MethodSettings(
                {"vlm": 1.0, "agent": 0.7}, density, normalization="mean", combine=combine
            )
            ours, ours_counts = merge_with(kernels, method, shape, data, settings)
            plain, plain_counts = merge_with(kernels_numpy, method, shape, data, settings)
            np.testing.assert_array_equal(ours, plain)
            for mine, other in zip(ours_counts, plain_counts, strict=True):
                assert mine.kept.tolist() == other.kept.tolist()
                assert mine.conflicts == other.conflicts
                assert mine.conflicts_won.tolist() == other.conflicts_won.tolist()
                np.testing.assert_allclose(mine.delta_square, other.delta_square, rtol=1e-5)
                np.testing.assert_allclose(mine.update_square, other.update_square, rtol=1e-5)
                assert (mine.saliency is not None) == (method == "obm")
                if mine.saliency is not None:
                    np.testing.assert_allclose(mine.saliency, other.saliency, rtol=1e-6)
                    np.testing.assert_allclose(mine.saliency_kept, other.saliency_kept, rtol=1e-6)


def test_the_usual_methods_take_the_fused_loops_and_others_do_not():
    base, tasks, vectors = make_bf16((4, 8), 1e-3)
    chosen = {}
    for name, method in METHODS.items():
        if method.rule is None:
            continue
        # sar settles conflicts by a statistic of every entry
        n_entries = tasks.shape[1] if name == "sar" else 0
        piece = Piece(base, tasks, 8, 0, vectors, np.ones((2, n_entries), np.float32))
        settings = MethodSettings({"vlm": 1.0, "agent": 1.0})
        rule = method.rule(settings)
        decision = decide(lambda piece=piece: [piece], rule, settings, TASKS, kernels)
        chosen[name] = kernels._pair_rule(piece, decision, np.empty_like(base)) is not None
    assert {name for name, is_fused in chosen.items() if is_fused} == {
        "obm",
        "task_arithmetic",
        "ties",
    }


@pytest.mark.parametrize(("where", "bit"), [("base", 0), ("vlm", 1), ("agent", 2)])
def test_a_value_that_is_not_finite_is_reported(where, bit):
    base, tasks, vectors = make_bf16((4, 8), 1e-3)
    target = base if where == "base" else tasks[TASKS.index(where)]
    target[5] = 0x7F80  # infinity
    piece = Piece(base, tasks, 8, 0, vectors, np.zeros((2, 0), np.float32))
    settings = MethodSettings({"vlm": 1.0, "agent": 1.0}, density=0.5)
    for name in ("task_arithmetic", "ties", "obm"):
        decision = decide(lambda: [piece], METHODS[name].rule(settings), settings, TASKS, kernels)
        assert kernels.apply(piece, decision, np.empty_like(base)).not_finite >> bit & 1


def test_a_tie_that_ends_inside_a_tile_is_found():
    n = kernels_pair.TILE + 100
    base = from_float(np.full(n, 0.5, np.float32), "BF16")
    task = from_float(np.full(n, 0.75, np.float32), "BF16")
    tasks = np.stack([task, base])
    piece = Piece(base, tasks, n, 0, np.zeros((2, 0), np.float32), np.zeros((2, 0), np.float32))
    settings = MethodSettings({"vlm": 1.0, "agent": 1.0}, density=0.5)
    decision = decide(lambda: [piece], METHODS["ties"].rule(settings), settings, TASKS, kernels)
    out = np.empty_like(base)
    counts = kernels.apply(piece, decision, out)
    # all tie: the first half is kept, to the entry
    assert counts.kept.tolist() == [n // 2, 0]
    assert (out[: n // 2] == task[0]).all()
    assert (out[n // 2 :] == base[0]).all()
