"""The four parts of the floor, by hand."""

import pytest

from compare.evaluate import evaluate
from train.evaluation import outcome, summarize
from train.trajectories import Trajectory, Turn


def episode(*turns, stop="answer"):
    actions = {"search": "query", "image_search": "region", "answer": "text", "invalid": "reason"}
    made = [
        Turn(
            text=f"<answer>{value}</answer>" if kind == "answer" else "",
            token_ids=[1, 2],
            logprobs=[0.0, 0.0],
            action={"type": kind, actions[kind]: value},
            hits=hits,
        )
        for kind, value, hits in turns
    ]
    return Trajectory("q", "two", True, "", [], [], made, stop)


QUESTION = {
    "kind": "two",
    "seen": True,
    "answers": ["Paris"],
    "entity_names": ["France", "French Republic"],
    "gold_passages": ["fr/capital"],
}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("answer", "Rome", [])], (False, False, False, False)),
        ([("answer", "paris.", [])], (False, False, False, True)),
        ([("image_search", "full", ["fr"])], (True, False, False, False)),
        ([("search", "capital of Italy", ["it/capital"])], (True, False, False, False)),
        ([("search", "capital of france", ["x"])], (True, True, False, False)),
        ([("search", "the French Republic", ["x", "fr/capital"])], (True, True, True, False)),
        # the name must be a whole word, the passage a hit of a text search
        ([("search", "Francesca", [])], (True, False, False, False)),
        ([("image_search", "full", ["fr/capital"])], (True, False, False, False)),
    ],
)
def test_each_part_by_hand(turns, expected):
    parts = outcome(episode(*turns), QUESTION)
    assert tuple(parts[name] for name in ("searched", "entity", "passage", "accuracy")) == expected


def test_means_and_groups():
    other = {**QUESTION, "kind": "look", "seen": False, "gold_passages": []}
    episodes = [
        episode(("search", "capital of France", ["fr/capital"]), ("answer", "Paris", [])),
        episode(("image_search", "full", []), ("search", "x", []), stop="turn_limit"),
        episode(("answer", "Paris", [])),
        episode(("invalid", "nothing", []), stop="invalid"),
    ]
    metrics = summarize(episodes, [QUESTION, QUESTION, other, other])
    assert metrics["searched"] == 0.5
    assert metrics["accuracy"] == 0.5
    assert metrics["search_rate_text"] == 0.5
    assert metrics["search_rate_image"] == 0.25
    assert metrics["calls_per_episode"] == 0.75  # 1 + 2 + 0 + 0 over 4
    assert metrics["n"] == 4
    assert metrics["stop/answer"] == 0.5
    assert metrics["stop/turn_limit"] == metrics["stop/invalid"] == 0.25
    assert metrics["kind/two/passage"] == 0.5
    assert metrics["kind/look/searched"] == 0.0
    assert metrics["seen/accuracy"] == 0.5
    assert metrics["unseen/n"] == 2


def test_a_group_without_questions_has_no_numbers():
    metrics = summarize([episode(("answer", "x", []))], [QUESTION])
    assert "seen/n" in metrics
    assert not any(name.startswith("unseen/") for name in metrics)


def test_no_episodes_is_an_error():
    with pytest.raises(ValueError, match="no episode"):
        summarize([], [])


def test_evaluation_is_greedy_and_leaves_the_random_numbers_alone(make_engine, questions):
    engine = make_engine(script=None)
    _, first = evaluate(engine, questions)
    metrics, second = evaluate(engine, questions)
    assert [t.completion_ids for t in first] == [t.completion_ids for t in second]
    assert engine.n_rollouts == 0
    assert metrics["n"] == len(questions)
