"""Candidates for a step: executed, exact, independent of each other; and the pairs made of them."""

import pytest
import torch

from configs.sections import Sport
from environments.episode import SearchEnvironment
from train.rollout import RolloutEngine
from train.sport_sampling import (
    TurnEngine,
    choose,
    is_near_duplicate,
    make_pairs,
    sample_steps,
    similarity,
    without_repeats,
)
from train.sport_verify import FactVerifier
from train.trajectories import Trajectory, Turn

LIMITS = {"max_new_tokens_per_turn": 40, "max_completion_tokens": 300}


@pytest.fixture
def step_script(mixed_script):
    """The script of whole episodes, asked from a step of one."""

    def say(row, turn):
        state = row["state"]
        return mixed_script(state.question, len(state.trajectory.turns))

    return say


def token_view(trajectory):
    """An episode without clocks and what the policy thought of its tokens."""
    return [
        (turn.token_ids, turn.observation_ids, turn.action, turn.hits, len(turn.images))
        for turn in trajectory.turns
    ], (trajectory.stop_reason, trajectory.answer)


class Indifferent:
    """A verifier for which all steps are alike."""

    last_error = ""

    def score(self, steps):
        return [[0.5] * len(step.turns) for step in steps]


class Failing:
    """A verifier that never has a verdict."""

    last_error = "it is down"

    def score(self, steps):
        return [[None] * len(step.turns) for step in steps]


def test_steps_one_by_one_are_the_episode_in_one_go(
    policy, environment, questions, make_engine, step_script
):
    """Same tokens, observations, pictures and ends as a whole rollout under the same script."""
    asked = [
        q for q in questions if int(q["id"][1:]) % 4 != 3
    ]  # those that are scripted to the end
    whole = make_engine().rollout(asked)
    engine = TurnEngine(*policy, environment, script=step_script, **LIMITS)
    sampled = sample_steps(engine, asked, Indifferent(), Sport(samples=2), number=1)
    assert [token_view(e) for e in sampled.episodes] == [token_view(e) for e in whole]
    assert sampled.pairs == []
    assert sampled.n_unverified == 0
    assert sampled.n_candidates == 2 * sum(len(e.turns) for e in whole)


def test_candidates_are_sampled_given_everything_before_them(
    policy, environment, questions, step_script, full_forward
):
    """The sampled tokens' log-probs are those of a plain forward, pictures of results included."""
    engine = TurnEngine(*policy, environment, script=step_script, seed=3, **LIMITS)
    state = engine.begin(questions[0])  # scripted: image search, text search, answer
    for _ in range(2):
        [[state, _other]] = engine.sample_turns([state], 2, number=5)
    assert len(state.trajectory.all_images) == 3  # the photo and two thumbnails
    engine.script = None
    [candidates] = engine.sample_turns([state], 3, number=7)
    for candidate in candidates:
        logps, _ = full_forward(engine, candidate.trajectory)
        turn = candidate.trajectory.turns[-1]
        start = len(state.trajectory.completion_ids)
        found = logps[start : start + len(turn.token_ids)]
        torch.testing.assert_close(found, torch.tensor(turn.logprobs), atol=2e-4, rtol=0)


def test_candidates_differ_repeat_by_seed_and_leave_the_state_alone(policy, environment, questions):
    engine = TurnEngine(*policy, environment, seed=3, **LIMITS)
    state = engine.begin(questions[0])
    [first] = engine.sample_turns([state], 4, number=5)
    [again] = engine.sample_turns([state], 4, number=5)
    [other] = engine.sample_turns([state], 4, number=6)
    tokens = [[c.trajectory.turns[-1].token_ids for c in found] for found in (first, again, other)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    assert len({tuple(ids) for ids in tokens[0]}) == 4
    assert state.trajectory.turns == []
    assert state.episode.actions == []


def test_every_candidate_has_budgets_of_its_own(policy, text_environment, step_script, questions):
    engine = TurnEngine(*policy, text_environment, script=step_script, **LIMITS)
    state = engine.begin(questions[1])  # scripted: text search, answer
    [found] = engine.sample_turns([state], 3, number=1)
    # one search is allowed: each of the three had it
    assert [c.trajectory.turns[-1].is_error for c in found] == [False] * 3
    assert {c.episode.n_text for c in found} == {1}


@pytest.fixture
def text_environment(environment):
    return SearchEnvironment(environment.text_index, None, text_searches=1)


def test_a_budget_of_tokens_ends_an_episode_as_in_a_rollout(
    policy, environment, questions, step_script, mixed_script
):
    # 70 tokens do not hold the first observation of a scripted episode
    limits = {"max_new_tokens_per_turn": 40, "max_completion_tokens": 70}
    whole = RolloutEngine(*policy, environment, script=mixed_script, **limits)
    engine = TurnEngine(*policy, environment, script=step_script, **limits)
    asked = questions[:3]
    sampled = sample_steps(engine, asked, Indifferent(), Sport(samples=2), number=1)
    expected = whole.rollout(asked)
    assert [e.stop_reason for e in sampled.episodes] == [e.stop_reason for e in expected]
    assert "length" in {e.stop_reason for e in expected}


def test_without_verdicts_a_task_goes_on_and_makes_no_pair(policy, environment, questions):
    engine = TurnEngine(*policy, environment, **LIMITS)
    sampled = sample_steps(engine, questions[:2], Failing(), Sport(samples=2), number=1)
    assert sampled.pairs == []
    assert sampled.n_unverified == len(sampled.journal) >= 2
    assert all(episode.stop_reason for episode in sampled.episodes)


def test_the_best_candidate_is_the_one_that_the_task_goes_on_with(policy, environment, questions):
    """One candidate searches well, the others answer wrongly: the search is chosen every time."""
    said = iter(["<think> x </think> <answer> Rome </answer>"] * 2 + [SEARCH] + [RIGHT] * 3)

    engine = TurnEngine(*policy, environment, script=lambda row, turn: next(said), **LIMITS)
    sampled = sample_steps(engine, questions[1:2], FactVerifier(), Sport(samples=3), number=1)
    [episode] = sampled.episodes
    assert [turn.action["type"] for turn in episode.turns] == ["search", "answer"]
    assert episode.answer == "Paris"
    assert [line["chosen"] for line in sampled.journal] == [2, 0]
    # the two wrong answers are one and the same candidate
    [pair] = sampled.pairs
    assert (pair.chosen, pair.rejected) == (episode.turns[0].text, sampled_text(engine, pair))
    assert pair.margin == pytest.approx(0.9)  # 1 for the search, .1 for a wrong answer
    assert pair.prompt_ids == episode.prompt_ids


SEARCH = "<think> France </think> <search> capital of France </search>"
RIGHT = "<think> Paris </think> <answer> Paris </answer>"


def sampled_text(engine, pair):
    return engine.tokenizer.decode(pair.rejected_ids, skip_special_tokens=True)


# ---------------------------------------------------------------- pairs


class Past:
    def __init__(self, trajectory):
        self.trajectory = trajectory


def a_turn(text, kind="answer", ids=None, **values):
    action = {"type": kind, "text": text} if kind == "answer" else {"type": kind, "reason": text}
    return Turn(text, ids or list(text.encode()), [0.0], action, **values)


def pairs_of(turns, scores, **settings):
    past = Past(Trajectory("q", "two", True, "", [1, 2], []))
    return [(p.chosen, p.rejected) for p in make_pairs(past, turns, scores, Sport(**settings))]


def test_the_highest_score_is_chosen_the_first_of_equals():
    assert choose([0.1, 0.9, 0.9]) == 1
    assert choose([None, 0.0, None]) == 1
    assert choose([None, None]) == 0


def test_a_pair_needs_a_margin():
    turns = [a_turn("a b"), a_turn("c d"), a_turn("e f")]
    assert pairs_of(turns, [0.9, 0.75, 0.5], margin=0.2) == [("a b", "e f")]
    assert pairs_of(turns, [0.5, 0.5, 0.5]) == []
    assert pairs_of(turns, [0.5, None, None]) == []
    assert pairs_of(turns, [0.4, 0.2, None], margin=0.2) == [("a b", "c d")]  # exactly the margin


def test_no_more_than_two_illegal_steps_are_rejected():
    bad = [a_turn(f"x{i} y{i}", "invalid") for i in range(4)]
    assert len(pairs_of([a_turn("good"), *bad], [1.0, 0, 0, 0, 0], max_illegal=2)) == 2
    assert len(pairs_of([a_turn("good"), *bad], [1.0, 0, 0, 0, 0], max_illegal=4)) == 4


def test_near_duplicates_are_dropped():
    # 2 M / T of words: 3 of 4 in order -> 2 * 3 / 8 = .75; 9 of 10 -> .9
    assert similarity("a b c d", "a b c x") == pytest.approx(0.75)
    ten = "a b c d e f g h i j"
    assert similarity(ten, ten.replace("j", "x")) == pytest.approx(0.9)
    one, other = a_turn(f"{ten} k"), a_turn(f"{ten} x")  # 2 * 10 / 22 = .909
    assert is_near_duplicate(one, other, 0.9)
    assert not is_near_duplicate(one, other, 0.95)
    assert pairs_of([one, other], [1.0, 0.0]) == []
    # another thought before the same answer
    same = Turn("I say: Paris!", [5], [0.0], {"type": "answer", "text": "Paris!"})
    assert is_near_duplicate(a_turn("paris"), same, 0.9)
    # two invalid turns are alike only if their texts are
    assert not is_near_duplicate(a_turn("a b", "invalid"), a_turn("c d", "invalid"), 0.9)


def test_equal_candidates_and_equal_pairs_count_once():
    turns = [a_turn("good"), a_turn("bad one"), a_turn("bad one")]
    assert len(pairs_of(turns, [1.0, 0.0, 0.0])) == 1
    past = Past(Trajectory("q", "two", True, "", [1, 2], []))
    pairs = make_pairs(past, turns[:2], [1.0, 0.0], Sport())
    assert len(without_repeats(pairs + pairs)) == 1
