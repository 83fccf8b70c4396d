"""The trainer logs the parts that the settings name, and nothing else than before by default."""

import pytest

from rewards.compose import part_names

RIGHT = "<think> a </think> <answer> Paris </answer>"
TWICE = "<think> a </think> <search> capital of France </search>"
DEFAULT = {"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1}


def search_twice(question, turn):
    return TWICE if turn < 2 else RIGHT


def logged_parts(line):
    return {k.split("/")[1] for k in line if k.startswith("rewards/") and k.endswith("/mean")}


def train(make_trainer, **settings):
    """The logged line of one step."""
    trainer = make_trainer(script=search_twice, max_steps=1, logging_steps=1, **settings)
    trainer.train()
    return next(row for row in trainer.state.log_history if "loss" in row)


def test_parts_with_a_weight_are_logged_and_enter_the_total(make_trainer, questions):
    weights = DEFAULT | {"evidence": 0.2, "economy": 0.3, "redundancy": 0.4}
    asked = [
        {**question, "gold_passages": [] if i % 2 else ["none"], "hops": 0}
        for i, question in enumerate(questions)
    ]
    line = train(make_trainer, rewards=weights, questions=asked)
    assert logged_parts(line) == set(part_names(weights))
    assert line["rewards/evidence/mean"] == 0.0  # nothing found; None where nothing is known
    assert line["rewards/redundancy/mean"] == pytest.approx(0.5)  # one of two calls
    assert line["rewards/economy/mean"] == pytest.approx(1 / 3)  # (1 + 0) / (1 + 2)
    # 1 * 1 * 0.9 + 0.1 + 0.3 / 3 - 0.4 / 2
    assert line["rewards/total/mean"] == pytest.approx(0.9)
    assert line["reward"] == pytest.approx(0.9)  # only the total is optimised


def test_by_default_the_log_is_what_it_was(make_trainer):
    line = train(make_trainer)
    assert logged_parts(line) == {"total", "accuracy", "format", "search_penalty"}
    assert not any(key.startswith("judge/") for key in line)
