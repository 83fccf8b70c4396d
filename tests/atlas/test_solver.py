"""The atlas's solver: right wherever it answers, and silent where the tools do not show it."""

import pytest

from environments.actions import Answer, ImageSearch, Invalid, Search
from environments.atlas.editions import Edition
from environments.atlas.questions import load_questions
from environments.atlas.solver import next_turn
from environments.atlas.world import load_environment
from environments.dialects import DIALECTS
from environments.errors import EnvironmentSetupError
from environments.tools import Hit
from rewards.answer import exact_match


def play(environment, question):
    """The turns of a whole episode; the last is None where the solver gave up."""
    episode, turns = environment.start(question), []
    while not episode.done:
        turns.append(next_turn(episode))
        if turns[-1] is None:
            break
        episode.step(turns[-1])
    return episode, turns


@pytest.mark.parametrize("edition", [Edition(counterfactual=0), Edition(news="both")])
def test_it_answers_by_the_facts_of_the_edition(edition):
    environment = load_environment(edition)
    questions = load_questions("train", ["text", "two", "three"], 30, seed=3, edition=edition)
    played = [(play(environment, question)[0], question) for question in questions]
    answered = [(episode, question) for episode, question in played if episode.done]
    assert len(answered) > 15
    assert all(exact_match(episode.answer, question["answers"]) for episode, question in answered)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_it_answers_is_right_and_well_formed(dialect):
    environment = load_environment(dialect=dialect)
    kinds = ("look", "image", "text", "two", "three")
    questions = load_questions("train", kinds, 60, seed=3)
    ended = {kind: [] for kind in kinds}
    for question in questions:
        episode, turns = play(environment, question)
        ended[question["kind"]].append(episode.stop_reason)
        if episode.done:
            assert episode.stop_reason == "answer"
            assert exact_match(episode.answer, question["answers"])
            assert environment.dialect.check_format(turns)
    # places that the image search takes for others are given up
    share = sum(reason == "answer" for reasons in ended.values() for reason in reasons) / 60
    assert share > 0.7
    assert all(reasons.count("answer") > 0 for reasons in ended.values())


def test_it_searches_with_the_picture_only_where_the_vlm_has_not_seen_it():
    environment = load_environment()
    for question in load_questions("train", ["two"], 30, seed=1):
        episode, _ = play(environment, question)
        assert episode.n_image == (0 if question["seen"] else 1)


def test_a_scene_is_searched_on_the_side_that_is_asked_about():
    environment = load_environment()
    questions = load_questions("train", ["pair"], 20, seed=1)
    unseen = [question for question in questions if not question["seen"]]
    for question in unseen:
        _, turns = play(environment, question)
        side = ("left", "right")[question["scene"].index(question["entity"])]
        assert turns[0].endswith(f"<search> <img> {side} </search>")
    assert unseen


class Elsewhere:
    """Finds what nobody asked for."""

    in_memory = True

    def search(self, queries, k):
        return [[Hit("nowhere/economy", "Nowhere", "Nowhere currency shell.")] for _ in queries]


def test_it_gives_up_rather_than_answer_what_no_tool_has_shown():
    environment = load_environment()
    environment.text_index = environment.image_index = Elsewhere()
    for question in load_questions("train", ["text", "two", "three"], 12, seed=2):
        episode, turns = play(environment, question)
        assert turns[-1] is None
        assert episode.answer is None


def test_it_gives_up_where_the_searches_do_not_reach():
    environment = load_environment(text_searches=1)
    question = load_questions("train", ["three"], 1, seed=2)[0] | {"seen": True}
    assert play(environment, question)[1] == [None]


def test_another_worlds_question_is_refused():
    episode = load_environment().start({"id": "x", "kind": "text", "question": "?"})
    with pytest.raises(EnvironmentSetupError, match="none of the atlas"):
        next_turn(episode)


def test_a_fork_of_an_episode_goes_on_by_itself():
    environment = load_environment(image_searches=1)
    episode = environment.start(load_questions("train", ["two"], 1)[0])
    fork = episode.fork()
    fork.step("<think> x </think> <search> <img> </search>")
    fork.step("<think> x </think> <search> capital of Mali </search>")
    assert (episode.n_image, episode.n_text, episode.actions, episode.queries) == (0, 0, [], [])
    assert (fork.n_image, fork.n_text, len(fork.actions)) == (1, 1, 2)
    second = fork.fork()
    second.step("<think> x </think> <answer> Bamako </answer>")
    assert not fork.done
    assert second.answer == "Bamako"


ACTIONS = [Search('fish "n" chips'), ImageSearch(), ImageSearch("left"), Answer("São Tomé")]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_dialect_reads_back_what_it_writes(dialect, action):
    written = dialect.write("a thought", action)
    assert dialect.parse(written) == action
    assert written.startswith(f"<{dialect.think}> a thought </{dialect.think}>")
    with pytest.raises(ValueError, match="cannot write"):
        dialect.write("a thought", Invalid("nothing"))
