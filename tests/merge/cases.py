"""Small tensors for the tests of methods and kernels, whole or in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge.kernels import Counts, Piece
from merge.methods import METHODS, MethodSettings
from merge.shards import from_float, to_float
from merge.tensor import add_counts, apply_decision, decide, load_kernels, needs_entries, needs_rows

TASKS = ("vlm", "agent", "donor")
WEIGHTS = (1.0, 0.7, -0.3)
WITH_RULE = [name for name, method in METHODS.items() if method.rule is not None]


@dataclass
class Case:
    """One tensor of each parent, and statistics of every kind."""

    base: np.ndarray
    parents: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    entries: dict[str, np.ndarray]

    def statistics(self, method: str) -> dict[str, np.ndarray] | None:
        return {None: None, "vector": self.vectors, "fisher": self.entries}[METHODS[method].needs]

    def fits(self, method: str) -> bool:
        return self.base.ndim == 2 or METHODS[method].needs != "vector"


def make_case(kind: str, seed: int, shape: tuple[int, ...], n_tasks: int = 2) -> Case:
    """Makes a case.

    Args:
        kind: smooth: fp32 deltas that all differ. grid: multiples of 1/4, whose sums and products
            are exact, with many ties and zeros. tied: bf16 weights after light training, where a
            third of the deltas are zero and the others have few values. far: parents that fp32
            cannot reach by adding a difference to the base, and zeros of both signs.
        seed: For all numbers.
        shape: Of the tensor.
        n_tasks: 2 or 3.
    """
    rng = np.random.default_rng(seed)
    tasks = TASKS[:n_tasks]

    def grid(low: int, high: int, size: tuple[int, ...]) -> np.ndarray:
        return rng.integers(low, high, size).astype(np.float32) / 4

    if kind == "grid":
        base = grid(-8, 9, shape)
        return Case(
            base=base,
            parents={task: base + grid(-4, 5, shape) for task in tasks},
            vectors={task: grid(0, 5, shape[-1:]) for task in tasks},
            entries={task: grid(0, 3, shape) for task in tasks},
        )
    base = rng.normal(0, 0.02, shape).astype(np.float32)
    step = 1e-4 if kind == "tied" else 0.01
    parents = {task: base + rng.normal(0, step, shape).astype(np.float32) for task in tasks}
    if kind == "far":
        base = rng.choice([-1, 0.0, -0.0, 1e-7, 0.3, 2], shape).astype(np.float32)
        others = rng.choice([-0.0, 0.0, 1e-9, -0.1, 3], (n_tasks, *shape)).astype(np.float32)
        parents = {
            task: np.where(rng.random(shape) < 0.5, other, base)
            for task, other in zip(tasks, others, strict=True)
        }
    if kind == "tied":
        base, parents = round_bf16(base), {task: round_bf16(p) for task, p in parents.items()}
    return Case(
        base=base,
        parents=parents,
        vectors={task: rng.lognormal(0, 1, shape[-1]).astype(np.float32) for task in tasks},
        entries={task: rng.lognormal(0, 1, shape).astype(np.float32) for task in tasks},
    )


def settings_of(tasks: Sequence[str], weights: Sequence[float] = WEIGHTS, **changes):
    """Settings with the numbers of small tensors, for tests that need any."""
    small = {"outliers": 0.1, "threshold": 2e-5, "tensor_name": "layer.weight"}
    named = dict(zip(tasks, weights[: len(tasks)], strict=True))
    return MethodSettings(weights=named, **(small | changes))


def round_bf16(values: np.ndarray) -> np.ndarray:
    return to_float(from_float(values, "BF16"), "BF16")


def merge_in_pieces(
    method: str,
    case: Case,
    settings: MethodSettings,
    kernels: str,
    *,
    dtype: str = "F32",
    out_dtype: str | None = None,
    rows_a_piece: int | None = None,
) -> tuple[np.ndarray, Counts]:
    """Merges as the engine does: pieces of some rows, bf16 bits or fp32 in and out.

    Returns:
        What was written for all pieces, flat; the summed counts.
    """
    tasks = list(case.parents)
    rule = METHODS[method].rule(settings)
    module = load_kernels(kernels)
    columns = case.base.shape[-1]
    n_rows = case.base.size // columns
    rows_a_piece = rows_a_piece or n_rows
    base = from_float(case.base.reshape(-1), dtype)
    parents = np.stack([from_float(p.reshape(-1), dtype) for p in case.parents.values()])
    statistics = case.statistics(method)
    stacked = np.stack([statistics[t].reshape(-1) for t in tasks]) if statistics else None
    empty = np.zeros((len(tasks), 0), np.float32)

    def pieces():
        for row in range(0, n_rows, rows_a_piece):
            part = slice(row * columns, min(row + rows_a_piece, n_rows) * columns)
            yield Piece(
                base=base[part].copy(),
                tasks=parents[:, part].copy(),
                n_columns=columns if needs_rows(rule) else part.stop - part.start,
                begin=part.start,
                vectors=stacked if rule.score == "saliency" else empty,
                entries=stacked[:, part].copy() if needs_entries(rule) else empty,
            )

    decision = decide(pieces, rule, settings, tasks, module)
    merged, total = [], None
    for piece in pieces():
        out = np.empty(piece.base.size, np.uint16 if (out_dtype or dtype) == "BF16" else np.float32)
        counts = apply_decision(piece, decision, out, module)
        merged.append(out)
        total = counts if total is None else add_counts(total, counts)
    return np.concatenate(merged), total
