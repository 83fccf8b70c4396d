"""The four parts of the floor, by hand; and how an evaluation is shared out over processes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from compare.evaluate import evaluate
from configs.errors import ConfigError
from environments.dialects import get_dialect
from rewards.errors import RewardError
from rewards.functions import RewardFunction
from train.callbacks import EvaluationCallback
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


# ---------------------------------------------------------------- over processes


class Engine:
    """Answers every question alike, and notes how many were asked together."""

    is_remote = False
    environment = SimpleNamespace(dialect=get_dialect("search_r1"))

    def __init__(self):
        self.asked = []

    def rollout_rows(self, questions, *, greedy, number):
        self.asked.append(len(questions))
        episodes = [episode(("answer", "Paris", [])) for _ in questions]
        for made, question in zip(episodes, questions, strict=True):
            made.question_id, made.images = question["id"], [question["image"]]
        return episodes

    def release_images(self):
        self.asked.append("released")


def process(questions, rank=0, world=1, device="cpu", functions=()):
    """The evaluation of one process, and what it records."""
    recorded = []
    recorder = SimpleNamespace(
        is_main=rank == 0,
        not_training=nullcontext,
        metrics=lambda *values: None,
        trajectories=lambda step, phase, episodes, questions: recorded.extend(episodes),
    )
    trainer = SimpleNamespace(
        engine=Engine(),
        accelerator=SimpleNamespace(
            process_index=rank, num_processes=world, device=torch.device(device)
        ),
        args=SimpleNamespace(per_device_train_batch_size=2, steps_per_generation=2),
        policy_for_generation=nullcontext,
        reward_settings={"accuracy": 1.0, "format": 0.0, "search_penalty": 0.0},
        judge=None,
        functions=functions,
        state=SimpleNamespace(global_step=0),
        n_policy_tokens=0,
    )
    return EvaluationCallback(trainer, recorder, questions, every=1), recorded


@pytest.fixture
def asked():
    return [{**QUESTION, "id": f"q{number}", "image": f"picture {number}"} for number in range(5)]


@pytest.mark.parametrize(
    ("device", "is_remote", "expected"),
    [
        ("cpu", False, [5, "released"]),
        ("cuda", True, [5, "released"]),
        ("cuda", False, [4, "released", 1, "released"]),
    ],
)
def test_an_accelerator_holds_no_more_episodes_than_in_training(asked, device, is_remote, expected):
    callback, recorded = process(asked, device=device)
    callback.trainer.engine.is_remote = is_remote
    callback.evaluate()
    assert callback.trainer.engine.asked == expected
    assert [e.question_id for e in recorded] == ["q0", "q1", "q2", "q3", "q4"]


@pytest.fixture
def two_processes(asked, monkeypatch):
    """Makes both; what the first one broadcasts reaches the second, which runs after it."""
    shared = [None]

    def gather(numbered):
        assert not any(one.images for _, one in numbered)  # pictures of questions do not travel
        here = dict(numbered)
        there = {n: episode(("answer", "Rome", [])) for n in range(len(asked)) if n not in here}
        return [*numbered, *there.items()]

    def broadcast(objects):
        if objects == [None]:
            objects[:] = shared
        shared[:] = objects

    monkeypatch.setattr("train.callbacks.gather_object", gather)
    monkeypatch.setattr("train.callbacks.broadcast_object_list", broadcast)
    return lambda call: [
        process(asked, rank, 2, functions=[RewardFunction("own", 1.0, call)]) for rank in (0, 1)
    ]


def test_only_the_first_process_scores_and_all_know_the_metrics(two_processes, asked):
    calls = []
    (first, recorded), (second, _) = two_processes(lambda t: calls.append(t) or [2.0] * len(t))
    metrics = first.evaluate()
    assert metrics["eval_rewards/own/mean"] == 2.0
    assert metrics["eval_accuracy"] == 0.6  # three of five are its own, and right
    assert [e.images for e in recorded] == [[question["image"]] for question in asked]
    del metrics["eval_time_s"]
    assert metrics.items() <= second.evaluate().items()
    assert len(calls) == 1


def test_where_the_first_process_cannot_score_all_end(two_processes):
    (first, _), (second, _) = two_processes(lambda t: [])
    with pytest.raises(RewardError, match="returned 0 values for 5 episodes"):
        first.evaluate()
    with pytest.raises(ConfigError, match="the first process could not score it"):
        second.evaluate()
