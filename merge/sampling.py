"""An exact threshold from one pass over a tensor: a sample says between which scores it must lie.

A few runs of entries are scored first. Where the k-th largest score of the whole tensor is, they
tell up to a margin, and one pass then counts what lies above this bracket and collects what lies
inside, mostly one or two entries in a hundred. The exact k-th value is selected among those. The
counts tell whether the bracket held it; if not, which a wide margin makes rare, `selection` counts
histograms. The threshold is the same either way, so a sample changes the time and never a bit.
"""

import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from merge.kernels import ALL_TIES, Piece
from merge.kernels_numpy import scored
from merge.selection import EVERYTHING, NOTHING, Cut, Pieces

SMALL = 1 << 16
"""A tensor of up to so many entries is its own sample."""
RUN = 32
"""Entries that are taken side by side: those of a cache line or two."""
MARGIN = 4.0
"""Half the width of a bracket, in standard errors of the sample's rank."""
MAX_ROOM = 1 << 21
"""Entries of one task that are collected at most: 8 MB."""


@dataclass
class Sample:
    """Some entries of a tensor, in runs of the same length."""

    piece: Piece
    """The entries as one row: a vector has a number an entry."""
    n_entries: int
    """Entries of the whole tensor."""
    run: int
    """Length of a run; 0 where the sample is the whole tensor."""


def run_starts(n_runs: int, run: int, n_entries: int) -> np.ndarray:
    """Chooses where runs begin: one in each of as many equal parts of the tensor.

    Returns:
        int64 [n_runs], multiples of `run`; the same for the same arguments.
    """
    n_places = n_entries // run
    edges = np.arange(n_runs + 1, dtype=np.int64) * n_places // n_runs
    jitter = np.random.default_rng(n_entries).random(n_runs)
    return (edges[:-1] + (jitter * np.diff(edges)).astype(np.int64)) * run


def n_sampled(n_entries: int) -> int:
    """How many entries of a tensor make a sample: one in 128, at least 16,384."""
    return min(max(n_entries // 128, 1 << 14), 1 << 18)


def take_sample(piece: Piece) -> Sample:
    """Samples a tensor that is in memory as one piece."""
    n = piece.base.size
    if n <= SMALL:
        return Sample(piece, n, run=0)
    starts = run_starts(n_sampled(n) // RUN, RUN, n)
    base, *tasks = (
        values[: n // RUN * RUN].reshape(-1, RUN)[starts // RUN].reshape(-1)
        for values in (piece.base, *piece.tasks)
    )
    vectors = sample_vectors(piece.vectors, starts, RUN)
    return Sample(as_row(base, np.stack(tasks), vectors), n, RUN)


def sample_vectors(vectors: np.ndarray, starts: np.ndarray, run: int) -> np.ndarray:
    """Returns the vectors' numbers for the entries of runs.

    Args:
        vectors: fp32 [K, columns], or [K, 0].
        starts: int64 [n_runs], row-major indices.
        run: Length of a run.

    Returns:
        fp32 [K, n_runs * run], or [K, 0].
    """
    n_columns = vectors.shape[1]
    if not n_columns:
        return vectors
    n_repeats = 1 + -(-run // n_columns)  # a run may end in a later row
    windows = np.lib.stride_tricks.sliding_window_view(np.tile(vectors, n_repeats), run, axis=1)
    return windows[:, starts % n_columns].reshape(len(vectors), -1)


def as_row(base: np.ndarray, tasks: np.ndarray, vectors: np.ndarray) -> Piece:
    """Makes a piece of one row of sampled entries."""
    return Piece(
        base=base,
        tasks=tasks,
        n_columns=base.size,
        begin=0,
        vectors=vectors,
        entries=np.zeros((len(tasks), 0), np.float32),
    )


def find_brackets(sample: Sample, score: str, n_wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Says between which scores the k-th largest of the whole tensor should lie.

    Args:
        sample: Of the tensor.
        score: magnitude or saliency.
        n_wanted: k, above 0 and below the number of entries.

    Returns:
        uint32 [K] each, lowest and highest: bits of non-negative fp32, so they are ordered as the
        scores are. The lowest is above zero, and so no entry that is unchanged lies above it.
    """
    n_tasks = len(sample.piece.tasks)
    lowest, highest = np.ones(n_tasks, np.uint32), np.full(n_tasks, 0x7F800000, np.uint32)
    share = n_wanted / sample.n_entries
    for k, (scores, _) in enumerate(scored(sample.piece, score)):
        bits = scores.view(np.uint32)
        n = bits.size
        if not sample.run:
            lowest[k] = highest[k] = max(np.partition(bits, n - n_wanted)[n - n_wanted], 1)
            continue
        rank = min(round(share * n), n - 1)
        middle = np.partition(bits, n - 1 - rank)[n - 1 - rank]
        # entries of a run are alike; how much so, its own count of large scores tells
        of_run = (bits.reshape(-1, sample.run) > middle).sum(axis=1)
        margin = MARGIN * math.sqrt(of_run.size * float(of_run.var())) + 2.0
        last, first = math.ceil(rank + margin), math.floor(rank - margin)
        wanted = [n - 1 - place for place in (last, first) if 0 <= place < n]
        ordered = np.partition(bits, wanted) if wanted else bits
        if last < n:
            lowest[k] = max(ordered[n - 1 - last], 1)
        if first >= 0:
            highest[k] = max(ordered[n - 1 - first], lowest[k])
    return lowest, highest


def cut_by_sample(
    pieces: Pieces, score: str, sample: Sample, n_wanted: int, kernels: ModuleType
) -> list[Cut] | None:
    """Finds each task's exact threshold in one pass over a tensor.

    Args:
        pieces: Gives the tensor's pieces.
        score: magnitude or saliency.
        sample: Of the tensor.
        n_wanted: Entries that are kept of each task.
        kernels: Module of kernels.

    Returns:
        The cuts, equal to those of `selection.cut_tensor` in what they keep; None where a bracket
        did not hold the threshold, or too many entries.
    """
    n_tasks = len(sample.piece.tasks)
    if n_wanted <= 0:
        return [NOTHING] * n_tasks
    if n_wanted >= sample.n_entries:
        return [EVERYTHING] * n_tasks
    lowest, highest = find_brackets(sample, score, n_wanted)
    above, inside = np.zeros(n_tasks, np.int64), np.zeros(n_tasks, np.int64)
    room = min(sample.n_entries // 4, MAX_ROOM)
    found = np.empty((n_tasks, room), np.uint32)
    for piece in pieces():
        kernels.select(piece, score, lowest, highest, above, inside, found)
    cuts = []
    for k in range(n_tasks):
        is_point = lowest[k] == highest[k]
        n_left = int(n_wanted - above[k])
        if not (0 < n_left <= inside[k] and (is_point or inside[k] <= room)):
            return None
        if is_point:
            cuts.append(_cut_at(lowest[k], n_left, int(inside[k])))
            continue
        band = found[k, : inside[k]]
        bits = np.partition(band, band.size - n_left)[band.size - n_left]
        n_ties = n_left - int((band > bits).sum())
        cuts.append(_cut_at(bits, n_ties, int((band == bits).sum())))
    return cuts


def _cut_at(bits: np.uint32, n_ties: int, n_tied: int) -> Cut:
    return Cut(float(bits.view(np.float32)), ALL_TIES if n_ties == n_tied else n_ties)
