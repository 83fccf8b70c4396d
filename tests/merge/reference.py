"""Every method as its paper has it: entry by entry in plain Python, with sorts, slowly.

Nothing here is shared with the kernels. Numbers are `np.float32` scalars, one operation at a time
and in the order of the tasks, so the kernels can be asked for the same bits. The one exception is
`normalization="mean"`, whose mean is exact here and within 0.2 % in the kernels.
"""

import bisect
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from merge.methods import MethodSettings

F = np.float32
ZERO, ONE = F(0), F(1)


@dataclass
class Problem:
    """One tensor: everything as flat lists of fp32, [K][n]."""

    tasks: list[str]
    origin: list[np.float32]
    parents: list[list[np.float32]]
    columns: int
    statistics: list[np.ndarray]
    settings: MethodSettings
    deltas: list[list[np.float32]] = field(init=False)
    weights: list[np.float32] = field(init=False)
    parties: list[set[int]] | None = None
    """Who meets in a conflict, where that is not what is kept (SAR: the supports)."""

    def __post_init__(self) -> None:
        self.deltas = [
            [theirs - ours for theirs, ours in zip(parent, self.origin, strict=True)]
            for parent in self.parents
        ]
        self.weights = [F(self.settings.weights[task]) for task in self.tasks]

    @property
    def n(self) -> int:
        return len(self.origin)

    @property
    def n_keep(self) -> int:
        return math.floor(self.settings.density * self.n + 0.5)


@dataclass
class Result:
    """What the kernels are compared with."""

    merged: np.ndarray
    kept: list[set[int]]
    """The entries that each task keeps before signs are compared."""
    conflicts: int
    conflicts_won: list[int]
    margins: dict[int, float]
    """OBM: |sum of votes| / sum of |votes| at each entry with a conflict."""


def merge_slowly(
    method: str,
    base: np.ndarray,
    parents: Mapping[str, np.ndarray],
    statistics: Mapping[str, np.ndarray] | None,
    settings: MethodSettings,
) -> Result:
    """Takes what `merge_tensor` takes, for every method that has a rule."""
    problem = Problem(
        tasks=list(parents),
        origin=list(base.reshape(-1)),
        parents=[list(parent.reshape(-1)) for parent in parents.values()],
        columns=base.shape[-1],
        statistics=[statistics[task].reshape(-1) for task in parents] if statistics else [],
        settings=settings,
    )
    margins: dict[int, float] = {}
    with np.errstate(all="ignore"):
        kept, updates, winners = METHODS[method](problem, margins)
        merged = [_restored(problem, i, updates[i]) for i in range(problem.n)]
    conflicts, conflicts_won = 0, [0] * len(kept)
    parties = problem.parties or kept
    for i in range(problem.n):
        keepers = [k for k in range(len(kept)) if i in parties[k]]
        if len({bool(problem.deltas[k][i] > 0) for k in keepers}) == 2:
            conflicts += 1
            for k in keepers:
                conflicts_won[k] += bool(problem.deltas[k][i] * winners[i] > 0)
    return Result(np.array(merged, F).reshape(base.shape), kept, conflicts, conflicts_won, margins)


def _restored(problem: Problem, i: int, update: np.float32) -> np.float32:
    """base + update; what fp32 cannot tell from a parent is the parent's own value."""
    merged = problem.origin[i] + update
    for parent in problem.parents:
        if merged == problem.origin[i] + (parent[i] - problem.origin[i]):
            return parent[i]
    return problem.origin[i] if merged == problem.origin[i] else merged


# ---- keep


def _changed(problem: Problem, k: int) -> list[int]:
    return [i for i in range(problem.n) if problem.deltas[k][i] != 0]


def _ranked(entries: list[int], score: Callable[[int], np.float32]) -> list[int]:
    """Largest score first; equal scores by their index."""
    return sorted(entries, key=lambda i: (-score(i), i))


def _keep_all(problem: Problem) -> list[set[int]]:
    return [set(_changed(problem, k)) for k in range(len(problem.tasks))]


def _keep_top(
    problem: Problem, score: Callable[[int, int], np.float32], skipped: int = 0
) -> list[set[int]]:
    kept = []
    for k in range(len(problem.tasks)):
        ranked = _ranked(_changed(problem, k), lambda i, k=k: score(k, i))
        kept.append(set(ranked[skipped : skipped + problem.n_keep]))
    return kept


def _draw(problem: Problem, chance: Callable[[int, int], np.float32]) -> list[set[int]]:
    kept = []
    for k, task in enumerate(problem.tasks):
        stream = uniform(problem.settings, task, problem.n)
        kept.append({i for i in _changed(problem, k) if stream[i] < chance(k, i)})
    return kept


def uniform(settings: MethodSettings, task: str, n: int) -> list[float]:
    """Steele et al.'s splitmix64, as its authors wrote it, seeded by a hash; 24 bits a number."""
    text = f"{settings.seed}/{task}/{settings.tensor_name}"
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return [number / 2**24 for number in (z >> 40 for z in splitmix64(state, n))]


def splitmix64(state: int, n: int) -> list[int]:
    numbers = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


# ---- elect


def _elect(
    problem: Problem, kept: list[set[int]], values: list[dict[int, np.float32]], votes: list[dict]
) -> list[np.float32]:
    """Sign of the votes, else of the sum of kept values, else plus."""
    winners = []
    for i in range(problem.n):
        keepers = [k for k in range(len(kept)) if i in kept[k]]
        winner = _sum(votes[k][i] for k in keepers)
        winner = winner or _sum(values[k][i] for k in keepers)
        winners.append(winner or np.float32(1))
    return winners


def _sum(terms) -> np.float32:
    total = ZERO
    for term in terms:
        total = total + term
    return total


def _values(problem: Problem, kept: list[set[int]]) -> list[dict[int, np.float32]]:
    return [{i: problem.deltas[k][i] for i in kept[k]} for k in range(len(kept))]


def _survivors(
    problem: Problem, kept: list[set[int]], winners: list[np.float32]
) -> list[list[int]]:
    """The tasks that survive at each entry."""
    return [
        [k for k in range(len(kept)) if i in kept[k] and problem.deltas[k][i] * winners[i] > 0]
        for i in range(problem.n)
    ]


# ---- the methods: each returns what is kept, the update, and whose sign won


def linear(problem: Problem, margins: dict):
    """theta_M - theta_B = sum_k lambda_k delta_k / sum_k lambda_k."""
    kept, total = _keep_all(problem), _sum(problem.weights)
    updates = [
        _sum(d[i] * w for d, w in zip(problem.deltas, problem.weights, strict=True))
        / (total or ONE)
        for i in range(problem.n)
    ]
    return kept, updates, updates


def task_arithmetic(problem: Problem, margins: dict):
    """sum_k lambda_k delta_k."""
    return _added(problem, _keep_all(problem))


def _added(problem: Problem, kept: list[set[int]], values: list[dict] | None = None):
    values = values or _values(problem, kept)
    updates = [
        _sum(values[k][i] * problem.weights[k] for k in range(len(kept)) if i in kept[k])
        for i in range(problem.n)
    ]
    return kept, updates, updates


def _elected(problem: Problem, kept: list[set[int]], values, votes, mean: bool):
    """Adds the survivors of an election, or takes their mean."""
    winners = _elect(problem, kept, values, votes)
    updates = []
    for i, survivors in enumerate(_survivors(problem, kept, winners)):
        update = _sum(values[k][i] * problem.weights[k] for k in survivors)
        updates.append(update / F(len(survivors)) if mean and survivors else update)
    return kept, updates, winners


def ties(problem: Problem, margins: dict):
    """Trim to the largest |delta|; sign of their sum; mean of those that agree."""
    kept = _keep_top(problem, lambda k, i: abs(problem.deltas[k][i]))
    values = _values(problem, kept)
    return _elected(problem, kept, values, values, mean=True)


def _dared(problem: Problem):
    density = F(problem.settings.density)
    kept = _draw(problem, lambda k, i: density)
    return kept, [{i: problem.deltas[k][i] / density for i in kept[k]} for k in range(len(kept))]


def dare(problem: Problem, margins: dict):
    """delta_k * m / p with m ~ Bernoulli(p), added."""
    return _added(problem, *_dared(problem))


def dare_ties(problem: Problem, margins: dict):
    """The same, of which those that agree with the sign of their sum are added."""
    kept, values = _dared(problem)
    return _elected(problem, kept, values, values, mean=False)


def della(problem: Problem, margins: dict):
    """p_i = density - window + 2 window rank_i / (n - 1) in each row; delta_i / p_i; then TIES."""
    middle, window = F(problem.settings.density), F(problem.settings.window)
    last = F(max(problem.columns - 1, 1))
    chances = []
    for delta in problem.deltas:
        chance = [ZERO] * problem.n
        for row in range(0, problem.n, problem.columns):
            ascending = sorted(range(row, row + problem.columns), key=lambda i: (abs(delta[i]), i))
            for rank, i in enumerate(ascending):
                chance[i] = (middle - window) + F(2) * window * (F(rank) / last)
        chances.append(chance)
    kept = _draw(problem, lambda k, i: chances[k][i])
    values = [{i: problem.deltas[k][i] / chances[k][i] for i in kept[k]} for k in range(len(kept))]
    return _elected(problem, kept, values, values, mean=True)


def breadcrumbs(problem: Problem, margins: dict):
    """Without the largest |delta|, the next largest, added."""
    n_outliers = math.floor(problem.settings.outliers * problem.n + 0.5)
    kept = _keep_top(problem, lambda k, i: abs(problem.deltas[k][i]), skipped=n_outliers)
    return _added(problem, kept)


def sce(problem: Problem, margins: dict):
    """Select by variance, weigh by the share of squares, erase the minority's sign."""
    deltas, n_tasks = problem.deltas, F(len(problem.tasks))

    def variance(i: int) -> np.float32:
        mean = _sum(delta[i] for delta in deltas) / n_tasks
        return _sum((delta[i] - mean) * (delta[i] - mean) for delta in deltas) / n_tasks

    anywhere = [i for i in range(problem.n) if any(delta[i] != 0 for delta in deltas)]
    chosen = set(_ranked(anywhere, variance)[: problem.n_keep])
    kept = [chosen & set(_changed(problem, k)) for k in range(len(deltas))]
    squares = [
        math.fsum(float(delta[i] * delta[i]) for i in kept[k]) for k, delta in enumerate(deltas)
    ]
    total = sum(squares) or 1.0
    # shares are rounded to 2^-20, as the kernels have them, whatever the order of summing
    shares = [F(round(square / total * 2**20) / 2**20) for square in squares]
    etas = [weight * share for weight, share in zip(problem.weights, shares, strict=True)]
    values = _values(problem, kept)
    winners = _elect(problem, kept, values, values)
    updates = []
    for i, survivors in enumerate(_survivors(problem, kept, winners)):
        divisor = _sum(etas[k] for k in survivors)
        updates.append(_sum(deltas[k][i] * etas[k] for k in survivors) / (divisor or ONE))
    return kept, updates, winners


def ram(problem: Problem, margins: dict, boosts: list[np.float32] | None = None):
    """Mean over the tasks whose |delta| is above the threshold; times a boost where it is one."""
    kept = _above(problem)
    updates = []
    for i in range(problem.n):
        keepers = [k for k in range(len(kept)) if i in kept[k]]
        gain = boosts[keepers[0]] if boosts and len(keepers) == 1 else ONE
        update = _sum(problem.deltas[k][i] * gain * problem.weights[k] for k in keepers)
        updates.append(update / F(len(keepers) or 1))
    return kept, updates, updates


def _above(problem: Problem) -> list[set[int]]:
    threshold = F(problem.settings.threshold)
    return [{i for i, d in enumerate(delta) if abs(d) > threshold} for delta in problem.deltas]


def ram_plus(problem: Problem, margins: dict):
    """RAM with a boost of 1 + r min(shared / unique, alpha)."""
    kept, boosts = _above(problem), []
    for k, own in enumerate(kept):
        others = set().union(*(kept[j] for j in range(len(kept)) if j != k))
        n_shared, n_unique = len(own & others), len(own - others)
        ratio = min(n_shared / max(n_unique, 1), problem.settings.boost_limit)
        boosts.append(F(1 + problem.settings.boost * ratio))
    return ram(problem, margins, boosts)


def obm(problem: Problem, margins: dict):
    """s = v_j delta^2; the top share; sign of sum s sign(delta); those that agree."""
    squares = [
        [v[i % problem.columns] * (d * d) for i, d in enumerate(delta)]
        for v, delta in zip(problem.statistics, problem.deltas, strict=True)
    ]
    kept = _keep_top(problem, lambda k, i: squares[k][i])
    scores = [_normalised(row, problem.settings.normalization) for row in squares]
    votes = [
        {i: scores[k][i] if problem.deltas[k][i] > 0 else -scores[k][i] for i in kept[k]}
        for k in range(len(kept))
    ]
    for i in set.union(*kept):
        cast = [float(vote[i]) for vote in votes if i in vote]
        if min(cast) < 0 < max(cast):
            margins[i] = abs(sum(cast)) / sum(map(abs, cast))
    values = _values(problem, kept)
    return _elected(problem, kept, values, votes, mean=problem.settings.combine == "mean")


def _normalised(scores: list[np.float32], normalization: str) -> list[np.float32]:
    """none; divided by the mean; or the share of scores that are not larger (0 stays 0)."""
    if normalization == "none":
        return scores
    if normalization == "mean":
        mean = math.fsum(map(float, scores)) / len(scores)
        return [score * F(1 / mean) if mean else score for score in scores]
    # scores that agree in 9 significant bits, what a histogram's bin holds, share a rank
    coarse = [_round_down(float(score)) for score in scores]
    ascending = sorted(coarse)
    return [
        F(bisect.bisect_right(ascending, own) / len(coarse)) if score else ZERO
        for own, score in zip(coarse, scores, strict=True)
    ]


def _round_down(score: float) -> float:
    mantissa, exponent = math.frexp(score)
    return math.ldexp(math.floor(mantissa * 2**9), exponent - 9)


def regmean_diagonal(problem: Problem, margins: dict):
    """sum_k lambda_k h_k[j] delta_k / sum_k lambda_k h_k[j]."""
    wide = [np.tile(h, problem.n // problem.columns) for h in problem.statistics]
    return _ratio(problem, wide)


def fisher(problem: Problem, margins: dict):
    """sum_k lambda_k F_k delta_k / sum_k lambda_k F_k."""
    return _ratio(problem, problem.statistics)


def sar(problem: Problem, margins: dict):
    """Conflicts in the supports go to the largest F delta^2; of what is left the largest stay."""
    supports = _above(problem)
    squares = [
        [f[i] * (d * d) for i, d in enumerate(delta)]
        for f, delta in zip(problem.statistics, problem.deltas, strict=True)
    ]
    votes = [_normalised(row, problem.settings.normalization) for row in squares]
    winners: list[np.float32] = [ZERO] * problem.n
    settled = [set(support) for support in supports]
    for i in range(problem.n):
        changers = [k for k in range(len(supports)) if i in supports[k]]
        ups = [votes[k][i] for k in changers if problem.deltas[k][i] > 0]
        downs = [votes[k][i] for k in changers if problem.deltas[k][i] < 0]
        if not (ups and downs):
            continue
        total = _sum(problem.deltas[k][i] for k in changers)
        if max(ups) == max(downs):
            winners[i] = ONE if total >= 0 else -ONE
        else:
            winners[i] = ONE if max(ups) > max(downs) else -ONE
        for k in changers:
            if problem.deltas[k][i] * winners[i] < 0:
                settled[k].discard(i)
    kept, gains = [], []
    for k, delta in enumerate(problem.deltas):
        ranked = _ranked(sorted(settled[k]), lambda i, delta=delta: abs(delta[i]))
        kept.append(set(ranked[: problem.n_keep]))
        before, after = (
            math.fsum(float(delta[i]) ** 2 for i in entries) for entries in (settled[k], kept[k])
        )
        factor = math.sqrt(before / after) if after else 1.0
        # factors are rounded to 2^-20, as the kernels have them, whatever the order of summing
        gains.append(F(round(factor * 2**20) / 2**20) * problem.weights[k])
    updates = []
    for i in range(problem.n):
        keepers = [k for k in range(len(kept)) if i in kept[k]]
        update = _sum(problem.deltas[k][i] * gains[k] for k in keepers)
        is_mean = problem.settings.combine == "mean" and keepers
        updates.append(update / F(len(keepers)) if is_mean else update)
    problem.parties = supports
    # what a task lost is the base's from there on (which shows in the sign of a zero)
    problem.parents = [
        [theirs if i in own or delta[i] == 0 else problem.origin[i] for i, theirs in enumerate(row)]
        for row, own, delta in zip(problem.parents, settled, problem.deltas, strict=True)
    ]
    return kept, updates, winners


def _ratio(problem: Problem, factors: list[np.ndarray]):
    updates = []
    for i in range(problem.n):
        deltas = [delta[i] for delta in problem.deltas]
        shares = [w * f[i] for w, f in zip(problem.weights, factors, strict=True)]
        if _sum(shares) == 0:  # nothing tells the tasks apart
            shares = problem.weights
        update = _sum(d * share for d, share in zip(deltas, shares, strict=True))
        updates.append(update / (_sum(shares) or ONE))
    return _keep_all(problem), updates, updates


METHODS = {
    rule.__name__: rule
    for rule in (
        linear, task_arithmetic, ties, dare, dare_ties, della, breadcrumbs, sce, ram, ram_plus,
        obm, regmean_diagonal, fisher, sar,
    )
}  # fmt: skip
