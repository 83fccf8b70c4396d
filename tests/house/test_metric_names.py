"""A metric has one name: what is recorded stands in docs/metrics.md, and what stands there exists.

`tests/train/test_run.py` holds the lines of a real run to the page.
"""

import re

import pytest

from tests.house.metric_names import (
    PAGE,
    evaluation_names,
    is_in_code,
    names_in_code,
    tables,
    timers,
    training_names,
    undescribed,
)
from train.episode_metrics import episode_sums
from train.evaluation import summarize_measured
from train.health import RULES
from train.timing import speeds
from train.trajectories import Trajectory, Turn


@pytest.mark.parametrize("name", [*evaluation_names(), *training_names()])
def test_a_name_of_the_page_is_written_somewhere(name):
    assert is_in_code(name), f"{PAGE}: nothing records {name}"


def test_a_timer_of_the_page_is_a_stage():
    stages = tables("### Timers", "### Health")
    assert len(stages) > 10
    strings, _ = names_in_code()
    assert not set(stages) - strings


def test_the_page_has_every_rule_of_health():
    assert [name for name in tables("### Health", "## Live view") if name in RULES] == [*RULES]


def test_what_a_rollout_counts_is_described():
    turns = [Turn("a", [1], [-0.5], {"type": "answer", "text": "x"}, [0.5])]
    episode = Trajectory("q", "two", True, "What?", [4], [], turns, "answer", "x")
    episode.rewards = {"total": 1.0, "efficiency": 0.1}
    sums = episode_sums([episode], [], ["efficiency", "overlong"])
    # these two become n_policy_tokens and num_tokens
    assert {"tokens", "prompt_tokens"} < set(sums)
    assert not undescribed(set(sums) - {"tokens", "prompt_tokens"})
    assert not undescribed(speeds(8, {"rollout": 1.0, "generate": 2.0}))


def test_what_an_evaluation_counts_is_described():
    episode = {
        "searched": 1, "entity": 1, "passage": 0, "accuracy": 0, "n_text": 1, "n_image": 0,
        "n_calls": 1, "n_tokens": 9, "stop_reason": "answer", "kind": "two", "seen": True,
    }  # fmt: skip
    names = summarize_measured([episode, {**episode, "seen": False}])
    assert "kind/two/accuracy" in names
    assert "unseen/n" in names
    assert not undescribed(f"eval/{name}" for name in names)


def test_a_name_that_is_missing_is_found():
    names = ["search/rate_video", "eval/kind/two/luck", "step", "time/decode_s", "time/nap_s"]
    assert undescribed(names) == ["eval/kind/two/luck", "search/rate_video", "time/nap_s"]
    assert not is_in_code("search/rate_video")
    assert all(re.fullmatch(r"time/\w+_s", name) for name in timers())
