"""What the episodes of a group say about each other beyond GRPO's advantage. Pure functions.

The rows of a group are neighbours: rows [0, G) answer the first question, [G, 2G) the second. A
reward of NaN stands for an episode that cannot be scored; it counts nowhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

STD_FLOOR = 1e-4
"""Added to a deviation before dividing, as TRL does."""


def groups_without_signal(rewards: Sequence[float], group_size: int) -> list[int]:
    """Groups from which nothing can be learnt: all of their scored episodes got one reward.

    Source: dynamic sampling of DAPO (arXiv 2503.14476, section 3.2), which replaces them.

    Args:
        rewards: N totals.
        group_size: G, episodes per question.

    Returns:
        Numbers of those groups, ascending.
    """
    rows = np.asarray(rewards, dtype=np.float64).reshape(-1, group_size)
    return [g for g, row in enumerate(rows) if np.unique(row[~np.isnan(row)]).size < 2]


def efficiency_bonuses(
    is_right: Sequence[bool], n_calls: Sequence[int], group_size: int
) -> np.ndarray:
    """Rank of each right episode's thrift among the right ones of its group, in (-1, 1).

        bonus_i = (|{j: calls_j > calls_i}| - |{j: calls_j < calls_i}|) / n

    over the n episodes of the group that answer right and search. All others get 0: not to search
    is no merit, it may be luck. The bonuses of a group add up to 0, so thrift is worth nothing
    where all are alike, and the mean reward of a group does not rise by it.

    Source: the ranks of TRACE (HyperEyes, arXiv 2605.07177), without its cached reference.

    Args:
        is_right: N answers.
        n_calls: N numbers of searches.
        group_size: G.

    Returns:
        float64 [N].
    """
    calls = np.asarray(n_calls)
    counts = np.asarray(is_right, dtype=bool) & (calls > 0)
    bonuses = np.zeros(len(calls))
    for start in range(0, len(calls), group_size):
        members = start + np.flatnonzero(counts[start : start + group_size])
        difference = calls[members][None, :] - calls[members][:, None]
        bonuses[members] = np.sign(difference).sum(axis=1) / max(1, len(members))
    return bonuses


def overlong_penalty(n_tokens: int, budget: int, buffer: int, is_cut: bool) -> float:
    """Soft punishment of an episode that comes close to its budget, in [-1, 0].

    0 up to budget - buffer, then falling linearly to -1 at the budget; -1 for an episode that was
    cut. Source: DAPO (arXiv 2503.14476), equation 13.

    Args:
        n_tokens: tokens of the episode, observations included.
        budget: tokens that it may have.
        buffer: tokens before the budget in which the punishment grows.
        is_cut: the budget ended it.
    """
    if is_cut:
        return -1.0
    return -min(1.0, max(0.0, (n_tokens - (budget - buffer)) / buffer))


def hop_advantages(
    rewards: Sequence[float],
    retrieved: Sequence[Mapping[Hashable, int]],
    n_turns: Sequence[int],
    group_size: int,
    normalize: bool = True,
) -> list[np.ndarray]:
    """Advantage of each turn against the episodes that had come as far.

    The episodes of a group that retrieved the same gold document are compared among themselves,
    from the turn of that retrieval on, until a later gold document has its own comparison: who got
    lost after a good search is measured against those who made it, too, and not against the whole
    group; what came before the search is not touched. A document that fewer than two scored
    episodes found, or whose finders all got one reward, compares nothing.

    Source: hop-anchored advantages of HaPO (SearchEyes).

    Args:
        rewards: N totals.
        retrieved: per row, gold document -> first turn whose result held it.
        n_turns: turns of each row.
        group_size: G.
        normalize: divide by the deviation among the finders.

    Returns:
        Per row float64 [turns]; NaN where no comparison holds.
    """
    totals = np.asarray(rewards, dtype=np.float64)
    found: list[list[tuple[int, float]]] = [[] for _ in totals]
    for start in range(0, len(totals), group_size):
        group = range(start, start + group_size)
        for document in dict.fromkeys(name for i in group for name in retrieved[i]):
            finders = [i for i in group if document in retrieved[i] and not np.isnan(totals[i])]
            if np.unique(totals[finders]).size < 2:
                continue
            relative = totals[finders] - totals[finders].mean()
            if normalize:
                relative = relative / (totals[finders].std(ddof=1) + STD_FLOOR)
            for i, advantage in zip(finders, relative.tolist(), strict=True):
                found[i].append((retrieved[i][document], advantage))
    result = []
    for comparisons, n in zip(found, n_turns, strict=True):
        per_turn = np.full(n, np.nan)
        for turn, advantage in sorted(comparisons, key=lambda pair: pair[0]):
            per_turn[turn:] = advantage
        result.append(per_turn)
    return result
