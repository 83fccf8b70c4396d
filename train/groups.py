"""The groups of a batch over all processes: replaced without signal, and credited among themselves.

A group is the G episodes of one question. TRL cuts a batch into groups without regard to where a
process' rows end, so everything here is computed from all rows, alike in every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from configs.sections import Algorithm
from train import credit
from train.trajectories import Trajectory

RollOut = Callable[[list[int], int], list[Trajectory]]
"""(question numbers, number of the first row among all processes' rows) -> scored episodes"""


@dataclass
class Sampled:
    """What a batch was made of."""

    episodes: list[Trajectory]
    """one per row of this process"""
    replaced: list[Trajectory] = field(default_factory=list)
    """episodes of this process that were sampled and are not trained on"""
    metrics: dict[str, float] = field(default_factory=dict)


class Groups:
    """Group arithmetic of one process.

    Args:
        algorithm: the section `algorithm` of the settings.
        size: G.
        n_questions: how many questions there are to choose from.
        seed: of the choice of questions that replace others.
        all_rows: gathers one value a row from all processes, in the order of the rows.
        rank: number of this process.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        size: int,
        n_questions: int,
        seed: int,
        all_rows: Callable[[list[Any]], list[Any]],
        rank: int,
    ) -> None:
        self.algorithm = algorithm
        self.size = size
        self.n_questions = n_questions
        self.seed = seed
        self.all_rows = all_rows
        self.rank = rank

    def sample(self, rows: list[int], roll_out: RollOut, number: Callable[[], int]) -> Sampled:
        """One scored episode per row of the batch.

        With `algorithm.dynamic_sampling` groups without signal are replaced by groups of questions
        that this batch does not hold, round after round. Every process takes part in every round,
        with or without a row of its own.

        Args:
            rows: question number of each row of this process; changed where groups are replaced.
            roll_out: see RollOut.
            number: number of the next rollout, from which the choice of questions follows.
        """
        before, n_rounds, n_replaced = self.rank * len(rows), 0, 0
        if self.algorithm.dynamic_sampling == 0:
            episodes = roll_out(rows, before)
            self.add_bonuses(episodes, episodes)
            return Sampled(episodes)
        found: dict[int, Trajectory] = {}
        replaced: list[Trajectory] = []
        tried: set[int] = set()
        sampled: list[float] = []
        places, first = list(range(len(rows))), before
        while True:
            new = roll_out([rows[i] for i in places], first)
            replaced += [found[i] for i in places if i in found]
            found.update(zip(places, new, strict=True))
            episodes = [found[i] for i in range(len(rows))]
            self.add_bonuses(episodes, new)
            totals = self.all_rows([total_of(t) for t in episodes])
            sampled += self.all_rows([total_of(t) for t in new])
            dull = credit.groups_without_signal(totals, self.size)
            tried.update(self.all_rows(rows))
            spare = [row for row in range(self.n_questions) if row not in tried]
            if not dull or not spare or n_rounds == self.algorithm.dynamic_sampling:
                break
            chosen = np.random.default_rng([self.seed, number()]).permutation(spare).tolist()
            question_of = dict(zip(dull, chosen, strict=False))  # fewer, if questions run out
            places = [i for i in range(len(rows)) if (before + i) // self.size in question_of]
            for i in places:
                rows[i] = question_of[(before + i) // self.size]
            first = sum(min(self.size, max(0, before - g * self.size)) for g in question_of)
            n_rounds, n_replaced = n_rounds + 1, n_replaced + len(question_of)
        n_groups = len(totals) // self.size
        scored = [total for total in sampled if not math.isnan(total)]
        metrics = {
            "dynamic_sampling/replaced": n_replaced / n_groups,
            "dynamic_sampling/without_signal": len(dull) / n_groups,
            "dynamic_sampling/reward_of_all": sum(scored) / max(1, len(scored)),
        }
        return Sampled(episodes, replaced, metrics)

    def add_bonuses(self, episodes: list[Trajectory], new: list[Trajectory]) -> None:
        """Adds the part `efficiency` to the rewards of the new episodes among these.

        Args:
            episodes: one per row of this process' batch.
            new: those without a bonus yet; whole groups.
        """
        if self.algorithm.efficiency_bonus == 0.0:
            return
        mine = [(t.rewards["accuracy"] == 1.0, t.n_calls) for t in episodes]
        is_right, n_calls = zip(*self.all_rows(mine), strict=True)
        bonuses = credit.efficiency_bonuses(is_right, n_calls, self.size)
        fresh = {id(t) for t in new}
        for episode, bonus in zip(episodes, self._mine(bonuses.tolist(), episodes), strict=True):
            total = episode.rewards["total"]
            if id(episode) in fresh and total is not None:
                bonus *= self.algorithm.efficiency_bonus
                episode.rewards |= {"efficiency": bonus, "total": total + bonus}

    def with_hop_credit(
        self,
        advantages: torch.Tensor,
        episodes: list[Trajectory],
        questions: Sequence[dict[str, Any]],
        width: int,
        normalize: bool,
    ) -> torch.Tensor:
        """(1 - w) A_episode + w A_hop for every token.

        Args:
            advantages: float [B].
            episodes: B episodes of this process.
            questions: B questions.
            width: C, columns of the result.
            normalize: divide a hop's advantages by their deviation.

        Returns:
            float [B, C].
        """
        share = self.algorithm.hop_credit
        mine = [
            (total_of(t), first_hits(t, question), len(t.turns))
            for t, question in zip(episodes, questions, strict=True)
        ]
        rewards, retrieved, n_turns = zip(*self.all_rows(mine), strict=True)
        hops = credit.hop_advantages(rewards, retrieved, n_turns, self.size, normalize)
        per_token = advantages[:, None].repeat(1, width)
        for row, (episode, per_turn) in enumerate(
            zip(episodes, self._mine(hops, episodes), strict=True)
        ):
            begin = 0
            for turn, hop in zip(episode.turns, per_turn.tolist(), strict=True):
                end = begin + len(turn.token_ids) + len(turn.observation_ids)
                if not math.isnan(hop):
                    per_token[row, begin:end] *= 1.0 - share
                    per_token[row, begin:end] += share * hop
                begin = end
        return per_token

    def _mine(self, values: list[Any], episodes: list[Trajectory]) -> list[Any]:
        """This process' part of the values of all rows."""
        start = self.rank * len(episodes)
        return values[start : start + len(episodes)]


def punish_length(episode: Trajectory, algorithm: Algorithm, budget: int) -> None:
    """Adds the part `overlong` to an episode's reward, if there is one.

    Args:
        episode: scored.
        algorithm: the section `algorithm` of the settings.
        budget: tokens that an episode may have.
    """
    weight, total = algorithm.overlong_penalty, episode.rewards["total"]
    if weight == 0.0 or total is None:
        return
    penalty = weight * credit.overlong_penalty(
        len(episode.completion_ids),
        budget,
        algorithm.overlong_buffer,
        is_cut=episode.stop_reason == "length",
    )
    episode.rewards |= {"overlong": penalty, "total": total + penalty}


def total_of(episode: Trajectory) -> float:
    """The episode's reward; NaN if it cannot be scored."""
    total = episode.rewards["total"]
    return math.nan if total is None else total


def first_hits(episode: Trajectory, question: dict[str, Any]) -> dict[str, int]:
    """Gold documents that the episode retrieved and could read -> turn that brought each first."""
    gold = {*question.get("gold_passages", ()), question.get("entity")}
    found: dict[str, int] = {}
    for number, turn in enumerate(episode.turns):
        for document in turn.hits if turn.observation_ids else ():
            if document in gold:
                found.setdefault(document, number)
    return found
