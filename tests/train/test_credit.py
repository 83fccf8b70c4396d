"""Group credit: each formula against numbers worked out by hand."""

import math

import numpy as np
import pytest

from train.credit import (
    efficiency_bonuses,
    groups_without_signal,
    hop_advantages,
    overlong_penalty,
)

NAN = math.nan


def test_a_group_has_a_signal_when_its_scored_episodes_differ():
    rewards = [0, 0, 0, 1, NAN, 1, NAN, NAN, 1, 1, 0, NAN]
    assert groups_without_signal(rewards, 2) == [0, 2, 3, 4, 5]
    assert groups_without_signal(rewards, 4) == [1]
    assert groups_without_signal(rewards, 12) == []


def test_thrift_is_ranked_among_right_episodes_that_searched():
    is_right = [True, True, True, False, True]
    bonuses = efficiency_bonuses(is_right, [1, 2, 2, 1, 0], group_size=5)
    assert bonuses == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0])
    assert bonuses.sum() == pytest.approx(0)


def test_thrift_is_worth_nothing_where_all_are_alike_and_stays_within_the_group():
    assert not efficiency_bonuses([True] * 4, [2, 2, 1, 1], group_size=2).any()
    assert not efficiency_bonuses([False] * 4, [1, 2, 3, 4], group_size=4).any()


@pytest.mark.parametrize(
    ("n_tokens", "is_cut", "expected"),
    [
        (60, False, 0.0),
        (80, False, 0.0),
        (90, False, -0.5),
        (100, False, -1.0),
        (140, False, -1.0),
        (40, True, -1.0),
    ],
)
def test_the_punishment_of_length_grows_within_the_buffer(n_tokens, is_cut, expected):
    assert overlong_penalty(n_tokens, budget=100, buffer=20, is_cut=is_cut) == expected


def test_finders_of_a_document_are_compared_from_its_turn_on():
    retrieved = [{"flag": 0, "page": 1}, {"flag": 0, "page": 2}, {"flag": 1}, {}]
    first, second, third, fourth = hop_advantages(
        [1.0, 0.0, 0.0, 1.0], retrieved, [3, 3, 2, 1], group_size=4, normalize=False
    )
    # flag: mean of 1, 0, 0; page: mean of 1, 0
    assert first == pytest.approx([2 / 3, 0.5, 0.5])
    assert second == pytest.approx([-1 / 3, -1 / 3, -0.5])
    assert np.isnan(third[0])
    assert third[1] == pytest.approx(-1 / 3)
    assert np.isnan(fourth).all()


def test_a_document_without_a_difference_leaves_the_earlier_comparison():
    retrieved = [{"flag": 0, "page": 1}, {"flag": 0}, {"flag": 0, "page": 1}, {"page": 0}]
    rows = hop_advantages([1.0, 0.0, 1.0, NAN], retrieved, [2] * 4, group_size=4)
    deviation = np.std([1, 0, 1], ddof=1) + 1e-4
    assert rows[0] == pytest.approx([1 / 3 / deviation] * 2)
    assert rows[1] == pytest.approx([-2 / 3 / deviation] * 2)
    assert np.isnan(rows[3]).all()


def test_groups_do_not_see_each_other():
    rows = hop_advantages([1.0, 1.0, 0.0, 0.0], [{"page": 0}] * 4, [1] * 4, group_size=2)
    assert all(np.isnan(row).all() for row in rows)
