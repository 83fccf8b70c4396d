"""Numbers over a whole tensor that its entries are decided by: thresholds, scales, streams.

A threshold is an exact k-th value, found without a sort: a histogram over the leading bits of the
scores says in which bin it lies, a second one over the trailing bits of that bin says where. Both
are sums over pieces, so a tensor of any size, a layer or a whole model can share one budget, and
the result is the same for any number of pieces.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from merge.errors import MergeError
from merge.kernels import ALL_TIES, N_LEADING, N_TRAILING, TRAILING_BITS, Decision, Piece
from merge.methods import MethodSettings, Rule

Pieces = Callable[[], Iterable[Piece]]
"""Gives the pieces of a tensor, in order, each time it is called."""


@dataclass
class Cut:
    """Where a share of the largest scores ends: those above are in, and the first that tie."""

    threshold: float
    ties: int
    """How many entries at the threshold are in, from the lowest index on."""


EVERYTHING = Cut(-1.0, ALL_TIES)
NOTHING = Cut(math.inf, 0)


@dataclass
class Level:
    """Histograms of one tensor: leading bits of the scores of its changed entries."""

    leading: np.ndarray
    """int64 [K, 65,536]; [1, 65,536] for a score that all tasks share."""
    n_entries: int

    @property
    def n_changed(self) -> np.ndarray:
        """int64 [K]: entries that can be kept at all."""
        return self.leading.sum(axis=1)


def score_of(rule: Rule) -> str | None:
    """Returns what the rule ranks entries by, or None if it needs no threshold and no scale."""
    if rule.keep == "variance":
        return "variance"
    if rule.keep in ("top", "band") or rule.elect == "saliency":
        return rule.score
    return None


def count_level(pieces: Pieces, score: str, n_tasks: int, kernels: ModuleType) -> Level:
    """Counts a tensor's scores by their leading bits."""
    n_rows = 1 if score == "variance" else n_tasks
    leading, unchanged = np.zeros((n_rows, N_LEADING), np.int64), np.zeros(n_rows, np.int64)
    for piece in pieces():
        kernels.histogram(piece, score, leading, unchanged)
    return Level(leading, int(leading[0].sum() + unchanged[0]))


def share_of(density: float, n_entries: int) -> int:
    """Number of entries that a density stands for: floor(density * n + 1/2)."""
    return math.floor(density * n_entries + 0.5)


def find_bins(leading: np.ndarray, wanted: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Finds the bins that hold the k-th largest scores.

    Args:
        leading: int64 [K, 65,536].
        wanted: k of each task.

    Returns:
        int64 [K], the bin, or -1 where all or none of the entries are wanted; int64 [K], how many
        of the bin's entries are wanted.
    """
    bins, remaining = np.full(len(leading), -1, np.int64), np.zeros(len(leading), np.int64)
    for k, (counts, n_wanted) in enumerate(zip(leading, wanted, strict=True)):
        if 0 < n_wanted < counts.sum():
            from_top = np.cumsum(counts[::-1])
            place = int(np.searchsorted(from_top, n_wanted))
            bins[k] = len(counts) - 1 - place
            remaining[k] = n_wanted - (from_top[place] - counts[bins[k]])
    return bins, remaining


def require_same_scores(
    leading: np.ndarray, bins: np.ndarray, trailing: np.ndarray, where: str
) -> None:
    """Refuses a second pass that did not see what the first one saw.

    Args:
        leading: int64 [K, 65,536], of the first pass.
        bins: int64 [K], or -1 where the second pass did not look.
        trailing: int64 [K, 32,768], of the second pass.
        where: Whose scores, for the message.

    Raises:
        MergeError: The bins hold other numbers of entries.
    """
    rows = np.flatnonzero(bins >= 0)
    if (trailing[rows].sum(axis=1) != leading[rows, bins[rows]]).any():
        raise MergeError(
            f"{where or 'the tensor'}: two passes over the weights found other scores; merge again "
            "when nothing writes to the models, and where that does not help with OBM_KERNELS=numpy"
        )


def find_cut(
    n_changed: int, n_wanted: int, leading_bin: int, remaining: int, trailing: np.ndarray
) -> Cut:
    """Finds the exact threshold inside a bin.

    Args:
        n_changed: Entries that can be kept at all.
        n_wanted: How many are to be kept.
        leading_bin: Bin of the k-th largest score; see `find_bins`.
        remaining: How many of the bin's entries are wanted.
        trailing: int64 [32,768], counts of the trailing bits in this bin.
    """
    if n_wanted <= 0:
        return NOTHING
    if n_wanted >= n_changed:
        return EVERYTHING
    from_top = np.cumsum(trailing[::-1])
    place = int(np.searchsorted(from_top, remaining))
    low = N_TRAILING - 1 - place
    bits = np.uint32((leading_bin << TRAILING_BITS) | low)
    n_tied = int(trailing[low])
    n_ties = int(remaining - (from_top[place] - n_tied))
    return Cut(float(bits.view(np.float32)), ALL_TIES if n_ties == n_tied else n_ties)


def cut_tensor(
    pieces: Pieces,
    score: str,
    level: Level,
    n_wanted: Sequence[int],
    kernels: ModuleType,
    where: str = "",
) -> list[Cut]:
    """Finds the cuts of one tensor, by name `where`, with a second pass where one is needed."""
    bins, remaining = find_bins(level.leading, n_wanted)
    trailing = np.zeros((len(bins), N_TRAILING), np.int64)
    if bool((bins >= 0).any()):
        for piece in pieces():
            kernels.refine(piece, score, bins, trailing)
        require_same_scores(level.leading, bins, trailing, where)
    return [
        find_cut(int(n), wanted, int(bins[k]), int(remaining[k]), trailing[k])
        for k, (n, wanted) in enumerate(zip(level.n_changed, n_wanted, strict=True))
    ]


def vote_scales(level: Level) -> np.ndarray:
    """Scales that make the saliencies of tasks comparable by their mean.

    The mean runs over all entries of the tensor, zeros included. It is taken from the histogram,
    each saliency standing at the centre of its bin: at most 0.2 % off, and the same number whatever
    the order of the entries.

    Returns:
        fp32 [K]: 1 / mean, or 1 where nothing is changed.
    """
    half = 1 << (TRAILING_BITS - 1)
    bits = (np.arange(N_LEADING, dtype=np.uint32) << np.uint32(TRAILING_BITS)) | np.uint32(half)
    largest = np.finfo(np.float32).max.view(np.uint32)
    centres = np.minimum(bits, largest).view(np.float32).astype(np.float64)
    centres[0] = 0.0  # saliencies of zero, and what is too small to tell from it
    totals = [math.fsum((counts * centres)[counts > 0]) for counts in level.leading]
    scales = [level.n_entries / total if total > 0 else 1.0 for total in totals]
    return np.minimum(np.array(scales), 3.4e38).astype(np.float32)


def vote_ranks(level: Level) -> np.ndarray:
    """Tables that make the saliencies of tasks comparable by their rank.

    Returns:
        fp32 [K, 65,536]: share of the tensor's entries whose leading bits are not larger, above 0
        and up to 1. Saliencies that agree in their leading bits (8 of exponent, 8 of fraction)
        share a rank.
    """
    larger = np.cumsum(level.leading[:, ::-1], axis=1)[:, ::-1] - level.leading
    return ((level.n_entries - larger) / max(level.n_entries, 1)).astype(np.float32)


def vote_tables(
    level: Level | None, normalization: str, n_tasks: int
) -> tuple[np.ndarray, np.ndarray]:
    """What turns scores into votes: scales fp32 [K], and ranks fp32 [K, 65,536] or [K, 0]."""
    scales, ranks = np.ones(n_tasks, np.float32), np.zeros((n_tasks, 0), np.float32)
    if level is not None and normalization == "mean":
        scales = vote_scales(level)
    elif level is not None and normalization == "rank":
        ranks = vote_ranks(level)
    return scales, ranks


def random_key(settings: MethodSettings, task: str) -> np.uint64:
    """The key of a task's random stream in a tensor; neither order nor threads change it."""
    text = f"{settings.seed}/{task}/{settings.tensor_name}"
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def make_decision(
    rule: Rule,
    settings: MethodSettings,
    tasks: Sequence[str],
    level: Level | None,
    cuts: Sequence[Cut],
    outer_cuts: Sequence[Cut] = (),
) -> Decision:
    """Puts together what the kernels need for one tensor.

    Args:
        rule: The method's rule.
        settings: The tensor's settings.
        tasks: Names of the tasks, in order.
        level: The tensor's own histograms, for the scales of votes; None when not needed.
        cuts: Where each task's kept share ends; empty for rules without a threshold.
        outer_cuts: Where each task's outliers end (band).
    """
    n_tasks = len(tasks)
    # one cut for all tasks stands for each of them
    cuts = list(cuts) * (n_tasks if len(cuts) == 1 else 1) or [EVERYTHING] * n_tasks
    outer_cuts = list(outer_cuts) or [NOTHING] * n_tasks
    votes = level if rule.elect == "saliency" else None
    scales, ranks = vote_tables(votes, settings.normalization, n_tasks)
    return Decision(
        rule=rule,
        weights=np.array([settings.weights[task] for task in tasks], np.float32),
        thresholds=np.array([cut.threshold for cut in cuts], np.float32),
        ties=np.array([cut.ties for cut in cuts], np.int64),
        upper=np.array([cut.threshold for cut in outer_cuts], np.float32),
        ties_dropped=np.array([cut.ties for cut in outer_cuts], np.int64),
        scales=scales,
        ranks=ranks,
        keys=np.array([random_key(settings, task) for task in tasks], np.uint64),
        boosts=np.ones(n_tasks, np.float32),
        probability=np.float32(settings.density),
        window=np.float32(settings.window),
        changed_above=np.float32(settings.threshold),
    )
