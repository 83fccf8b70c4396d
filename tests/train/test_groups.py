"""Groups over processes: which questions come in the place of dull ones, and who is credited.

A process here is a `Groups` whose `all_rows` puts the other's rows before or behind its own.
"""

import math

import numpy as np
import pytest
import torch

from configs.sections import Algorithm
from train.groups import Groups, first_hits, total_of
from train.trajectories import Trajectory, Turn

NAN = math.nan


def episode(total, *turns, n_calls=0, accuracy=0.0):
    """Turns as (tokens of the policy, tokens of the observation, hits)."""
    made = [
        Turn("x", [1] * n, [0.0] * n, {"type": "search"}, observation_ids=[2] * m, hits=hits)
        for n, m, hits in turns
    ]
    made += [Turn("x", [1], [0.0], {"type": "search"}) for _ in range(n_calls)]
    rewards = {"total": total, "accuracy": accuracy}
    return Trajectory("q", "two", True, "What?", [], [], made, "answer", "", rewards)


def groups(rank=0, others=(), n_questions=10, size=2, **algorithm):
    """One process of two; `others` are the values of the other one, in the order of the calls."""
    others = iter(others)

    def all_rows(values):
        other = next(others, [])
        return [*values, *other] if rank == 0 else [*other, *values]

    return Groups(Algorithm(**algorithm), size, n_questions, 0, all_rows, rank)


# ---------------------------------------------------------------- dynamic sampling


class Rollouts:
    """Answers by question: rewards by the order of its rows."""

    def __init__(self, rewards):
        self.rewards, self.asked = rewards, []

    def __call__(self, rows, first):
        self.asked.append((list(rows), first))
        seen: dict[int, int] = {}
        made = []
        for row in rows:
            seen[row] = seen.get(row, -1) + 1
            made.append(episode(self.rewards[row][seen[row]]))
        return made


def totals(sampled):
    return [total_of(t) for t in sampled.episodes]


def test_a_dull_group_is_asked_another_question_and_the_shares_say_so():
    # question 0 differs, 1 does not, nor does 2; 3 does: two rounds, each replaces one group of two
    rollouts = Rollouts({0: [1.0, 0.0], 1: [0.0, 0.0], 2: [0.5, 0.5], 3: [0.0, 1.0]})
    rows = [0, 0, 1, 1]
    number = iter([7, 8, 9])
    sampled = groups(n_questions=4, dynamic_sampling=3).sample(rows, rollouts, lambda: next(number))
    first = int(np.random.default_rng([0, 7]).permutation([2, 3])[0])
    assert rollouts.asked[0] == ([0, 0, 1, 1], 0)
    assert rollouts.asked[1] == ([first, first], 0)
    assert rows[:2] == [0, 0]
    assert rows[2:] == [3, 3]
    assert totals(sampled) == [1.0, 0.0, 0.0, 1.0]
    n_rounds = len(rollouts.asked) - 1
    assert n_rounds == (1 if first == 3 else 2)
    assert [total_of(t) for t in sampled.replaced] == [0.0, 0.0, 0.5, 0.5][: 2 * n_rounds]
    assert sampled.metrics["dynamic_sampling/replaced"] == n_rounds / 2  # of two groups
    assert sampled.metrics["dynamic_sampling/without_signal"] == 0.0
    # 1 + 0 + 0 + 0 of the first round, then 0.5 + 0.5 where 2 was asked, 0 + 1 of question 3
    of_all = 2.0 / 6 if n_rounds == 1 else 3.0 / 8
    assert sampled.metrics["dynamic_sampling/reward_of_all"] == pytest.approx(of_all)


def test_rounds_end_at_their_number_and_unscored_episodes_are_in_no_mean():
    rollouts = Rollouts({row: [0.25, NAN] for row in range(9)})
    sampled = groups(n_questions=9, dynamic_sampling=2).sample([0, 0], rollouts, lambda: 0)
    assert len(rollouts.asked) == 3  # the first, and two rounds
    assert len(sampled.replaced) == 4
    assert sampled.metrics == {
        "dynamic_sampling/replaced": 2.0,
        "dynamic_sampling/without_signal": 1.0,
        "dynamic_sampling/reward_of_all": 0.25,
    }


def test_where_nothing_can_be_scored_the_mean_is_nought():
    rollouts = Rollouts({0: [NAN, NAN]})
    sampled = groups(n_questions=1, dynamic_sampling=1).sample([0, 0], rollouts, lambda: 0)
    assert len(rollouts.asked) == 1  # there is no other question
    assert sampled.metrics["dynamic_sampling/reward_of_all"] == 0.0


def test_without_the_switch_each_row_is_asked_once():
    rollouts = Rollouts({0: [0.0, 0.0]})
    sampled = groups(rank=1).sample([0, 0], rollouts, lambda: 0)
    assert rollouts.asked == [([0, 0], 2)]  # behind the two rows of the first process
    assert (totals(sampled), sampled.replaced, sampled.metrics) == ([0.0, 0.0], [], {})


def test_a_group_across_two_processes_is_replaced_on_both():
    # rows of process 0: questions 0 0 1, of process 1: 1 2 2; the second and third group are dull
    rollouts = Rollouts({row: [0.0, 1.0] for row in range(3, 6)} | {1: [0.5], 2: [0.5, 0.5]})
    others = [
        [1.0, 0.0, 0.5], [1.0, 0.0, 0.5], [0, 0, 1],  # totals, new totals, questions
        [1.0, 0.0, 0.5], [0.5], [0, 0, 3],
    ]  # fmt: skip
    rows = [1, 2, 2]
    process = groups(rank=1, others=others, n_questions=6, dynamic_sampling=1)
    sampled = process.sample(rows, rollouts, lambda: 4)
    second, third = np.random.default_rng([0, 4]).permutation([3, 4, 5]).tolist()[:2]
    assert rows == [second, third, third]
    # of the second group one row lies before this process' own, of the third none
    assert rollouts.asked == [([1, 2, 2], 3), ([second, third, third], 1)]
    assert totals(sampled) == [0.0, 0.0, 1.0]
    assert sampled.metrics["dynamic_sampling/replaced"] == pytest.approx(2 / 3)
    # all of both rounds: 1 + 0 + 0.5 + 0.5 + 0.5 + 0.5, then 0.5 + 0 + 0 + 1
    assert sampled.metrics["dynamic_sampling/reward_of_all"] == pytest.approx(4.5 / 10)


# ---------------------------------------------------------------- bonuses


def test_thrift_counts_among_all_processes_rows():
    # a group of four: two calls and one call here, three calls and a wrong answer there
    mine = [episode(1.0, n_calls=2, accuracy=1.0), episode(1.0, n_calls=1, accuracy=1.0)]
    process = groups(rank=1, others=[[(True, 3), (False, 1)]], size=4, efficiency_bonus=0.5)
    process.add_bonuses(mine, mine)
    # of three right ones: as many above as below 0; two above 2 / 3
    assert [t.rewards["efficiency"] for t in mine] == pytest.approx([0.0, 0.5 * 2 / 3])
    assert [t.rewards["total"] for t in mine] == pytest.approx([1.0, 1.0 + 1 / 3])


def test_a_part_of_an_answer_is_no_right_answer_and_unscored_episodes_get_nothing():
    mine = [
        episode(0.6, n_calls=1, accuracy=0.6),
        episode(None, n_calls=1, accuracy=1.0),
        episode(1.0, n_calls=3, accuracy=1.0),
    ]
    process = groups(size=3, efficiency_bonus=1.0)
    process.add_bonuses(mine, mine[:2])
    assert mine[0].rewards["efficiency"] == 0.0
    assert "efficiency" not in mine[1].rewards
    assert "efficiency" not in mine[2].rewards  # it had its bonus before


@pytest.mark.parametrize(("strength", "has_part"), [(0.0, False), (1.0, True)])
def test_a_strength_of_nought_adds_no_part(strength, has_part):
    mine = [episode(1.0, n_calls=n, accuracy=1.0) for n in (1, 2)]
    groups(efficiency_bonus=strength).add_bonuses(mine, mine)
    assert ("efficiency" in mine[0].rewards) == has_part


# ---------------------------------------------------------------- hop credit


def test_hop_credit_is_mixed_in_token_by_token():
    # both find "page", the first in its first turn, the second in its second
    mine = [
        episode(1.0, (2, 1, ["page"]), (1, 0, [])),
        episode(0.0, (1, 2, ["other"]), (2, 1, ["page"])),
    ]
    process = groups(hop_credit=0.25)
    questions = [{"gold_passages": ["page"]}] * 2
    credited = process.with_hop_credit(torch.tensor([4.0, -4.0]), mine, questions, 7, False)
    # relative to the mean 0.5 of the finders: +0.5 and -0.5, a quarter of the credit
    first = [0.75 * 4 + 0.25 * 0.5] * 4 + [4.0] * 3  # columns behind the episode stay
    second = [-4.0] * 3 + [0.75 * -4 + 0.25 * -0.5] * 3 + [-4.0]
    torch.testing.assert_close(credited, torch.tensor([first, second]))


def test_finders_of_other_processes_count_and_deviations_divide():
    mine = [episode(1.0, (1, 1, ["page"])), episode(0.0, (1, 1, []))]
    other = [(0.0, {"page": 0}, 1), (0.0, {"page": 0}, 1)]
    process = groups(rank=1, others=[other], size=4, hop_credit=1.0)
    questions = [{"entity": "page"}] * 2
    credited = process.with_hop_credit(torch.tensor([9.0, 9.0]), mine, questions, 2, True)
    # 1, 0, 0: mean 1/3, deviation sqrt((4/9 + 1/9 + 1/9) / 2) = sqrt(1/3)
    advantage = (2 / 3) / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(credited, torch.tensor([[advantage] * 2, [9.0] * 2]))


def test_first_hits_are_gold_documents_in_readable_results():
    found = episode(
        1.0, (1, 0, ["page"]), (1, 1, ["other", "place"]), (1, 1, ["page"]), (1, 1, ["place"])
    )
    question = {"gold_passages": ["page"], "entity": "place"}
    # the first "page" did not fit the budget: nobody could read it
    assert first_hits(found, question) == {"place": 1, "page": 2}
    assert first_hits(found, {"gold_passages": [], "entity": None}) == {}
