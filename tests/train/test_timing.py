"""Timers of work that happens inside libraries, and speeds computed from them."""

import pytest
import torch

from train.timing import speeds, time_forward


def test_every_forward_is_reported_and_changes_nothing():
    seconds, layer = [], torch.nn.Linear(2, 2)
    x = torch.randn(3, 2)
    expected = layer(x)
    time_forward(layer, seconds.append)
    assert torch.equal(layer(x), expected)
    layer(x)
    assert len(seconds) == 2
    assert all(s >= 0 for s in seconds)


def test_a_forward_that_fails_does_not_shift_the_next():
    seconds, layer = [], torch.nn.Linear(2, 2)
    time_forward(layer, seconds.append)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 5))
    layer(torch.randn(3, 2))
    assert len(seconds) == 2


def test_speed_counts_the_step_and_the_rollout_with_its_waiting():
    seconds = {"generate": 6.0, "rollout": 4.0, "sync": 1.0, "loss": 3.0, "optimizer": 1.0}
    # 1000 tokens in 6 + 3 + 1 s, and in 4 + 1 s
    assert speeds(1000, seconds) == {
        "speed/tokens_per_s": 100.0,
        "speed/rollout_tokens_per_s": 200.0,
    }


def test_a_step_that_rolled_nothing_out_has_no_speed():
    assert speeds(0, {"loss": 3.0}) == {}
