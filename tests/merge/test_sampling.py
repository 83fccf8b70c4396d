"""Thresholds from a sample: the same entries as the histograms keep, for every kernel and shape."""

import numpy as np
import pytest

from merge import sampling
from merge.kernels import Piece
from merge.sampling import (
    RUN,
    SMALL,
    cut_by_sample,
    find_brackets,
    run_starts,
    sample_vectors,
    take_sample,
)
from merge.selection import EVERYTHING, NOTHING, Cut, count_level, cut_tensor
from merge.shards import from_float, to_float
from merge.tensor import load_kernels

KERNELS = ("numba", "numpy", "torch")
N = 4 * SMALL


def make_piece(
    spread: float, n_tasks: int = 2, n_columns: int = 512, n: int = N, dtype: str = "BF16"
) -> Piece:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, n).astype(np.float32)
    # rows differ in scale: entries of a run are alike
    scale = np.repeat(rng.lognormal(0, 1, n // n_columns), n_columns).astype(np.float32)
    tasks = base + spread * scale * rng.normal(size=(n_tasks, n)).astype(np.float32)
    if dtype == "BF16":
        base, tasks = from_float(base, "BF16"), from_float(tasks, "BF16")
    vectors = rng.lognormal(0, 1, (n_tasks, n_columns)).astype(np.float32)
    return Piece(base, tasks, n_columns, 0, vectors, np.zeros((n_tasks, 0), np.float32))


def in_pieces(piece: Piece, n_pieces: int) -> list[Piece]:
    n = piece.base.size // n_pieces
    return [
        Piece(
            piece.base[i * n : (i + 1) * n],
            np.ascontiguousarray(piece.tasks[:, i * n : (i + 1) * n]),
            piece.n_columns,
            i * n,
            piece.vectors,
            piece.entries,
        )
        for i in range(n_pieces)
    ]


def by_histogram(piece: Piece, score: str, n_wanted: int) -> list[Cut]:
    kernels, n_tasks = load_kernels("numpy"), len(piece.tasks)
    level = count_level(lambda: [piece], score, n_tasks, kernels)
    return cut_tensor(lambda: [piece], score, level, [n_wanted] * n_tasks, kernels)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("score", ["magnitude", "saliency"])
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("n_tasks", "dtype"), [(2, "BF16"), (3, "BF16"), (2, "F32")])
def test_same_cuts_as_histograms(
    name: str, score: str, spread: float, n_tasks: int, dtype: str
) -> None:
    piece = make_piece(spread, n_tasks, dtype=dtype)
    for density in (0.02, 0.2, 0.6):
        n_wanted = int(density * N)
        expected = by_histogram(piece, score, n_wanted)
        for pieces in ([piece], in_pieces(piece, 4)):
            cuts = cut_by_sample(
                lambda pieces=pieces: pieces, score, take_sample(piece), n_wanted,
                load_kernels(name),
            )  # fmt: skip
            if cuts is None:  # where very many entries tie, the histograms count them
                assert (score, dtype, spread < 1e-2) == ("magnitude", "BF16", True)
            else:
                assert cuts == expected


def test_bracket_holds_few_entries() -> None:
    piece = make_piece(1e-2)
    sample = take_sample(piece)
    lowest, highest = find_brackets(sample, "saliency", N // 5)
    above, inside = np.zeros(2, np.int64), np.zeros(2, np.int64)
    found = np.empty((2, N), np.uint32)
    load_kernels("numba").select(piece, "saliency", lowest, highest, above, inside, found)
    assert (above < N // 5).all()
    assert (above + inside >= N // 5).all()
    assert (inside < N // 8).all()
    for k in range(2):
        assert (found[k, : inside[k]] >= lowest[k]).all()
        assert (found[k, : inside[k]] <= highest[k]).all()


@pytest.mark.parametrize("name", KERNELS)
def test_wrong_bracket_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = make_piece(1e-2)
    bits = np.array([0x38000000] * 2, np.uint32)
    for low, high in ((bits, bits), (bits, bits + np.uint32(9))):
        monkeypatch.setattr(sampling, "find_brackets", lambda *_, low=low, high=high: (low, high))
        kernels = load_kernels(name)
        assert cut_by_sample(lambda: [piece], "magnitude", take_sample(piece), 99, kernels) is None


@pytest.mark.parametrize("name", KERNELS)
def test_too_many_inside_are_not_collected(name: str) -> None:
    piece = make_piece(1e-2)
    lowest, highest = np.ones(2, np.uint32), np.full(2, 0x7F800000, np.uint32)
    above, inside = np.zeros(2, np.int64), np.zeros(2, np.int64)
    found = np.zeros((2, 100), np.uint32)
    load_kernels(name).select(piece, "magnitude", lowest, highest, above, inside, found)
    delta = to_float(piece.tasks, "BF16") - to_float(piece.base, "BF16")
    assert inside.tolist() == (delta != 0).sum(axis=1).tolist()
    assert above.tolist() == [0, 0]


def test_small_tensor_is_its_own_sample() -> None:
    piece = make_piece(1e-3, n=SMALL)
    sample = take_sample(piece)
    assert sample.piece is piece
    cuts = cut_by_sample(lambda: [piece], "saliency", sample, 777, load_kernels("numba"))
    assert cuts == by_histogram(piece, "saliency", 777)


def test_nothing_and_everything() -> None:
    piece, kernels = make_piece(1e-3), load_kernels("numba")
    sample = take_sample(piece)
    assert cut_by_sample(lambda: [piece], "magnitude", sample, 0, kernels) == [NOTHING] * 2
    assert cut_by_sample(lambda: [piece], "magnitude", sample, N, kernels) == [EVERYTHING] * 2


def test_unchanged_entries_are_never_kept() -> None:
    piece = make_piece(1e-3)
    piece.tasks[:, N // 10 :] = piece.base[N // 10 :]
    sample, kernels = take_sample(piece), load_kernels("numba")
    lowest, _ = find_brackets(sample, "magnitude", N // 5)
    assert (lowest > 0).all()
    # such a bracket cannot hold so many
    assert cut_by_sample(lambda: [piece], "magnitude", sample, N // 5, kernels) is None


def test_runs_start_anywhere_once() -> None:
    starts = run_starts(100, RUN, 100_000)
    assert (np.diff(starts) >= RUN).all()
    assert starts[0] >= 0
    assert starts[-1] + RUN <= 100_000
    assert (starts % RUN == 0).all()
    assert (run_starts(100, RUN, 100_000) == starts).all()


def test_vectors_of_runs_that_cross_rows() -> None:
    vectors = np.arange(14, dtype=np.float32).reshape(2, 7)
    starts = np.array([0, 5, 20])
    places = (starts[:, None] + np.arange(16)) % 7
    expected = vectors[:, places].reshape(2, -1)
    assert (sample_vectors(vectors, starts, 16) == expected).all()
