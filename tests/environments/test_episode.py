"""Episodes: budgets, how they end, and what they remember."""

import pytest
from PIL import Image

from environments.dialects import Answer, ImageSearch, Invalid, Search
from environments.episode import STOP_REASONS, SearchEnvironment
from environments.errors import EnvironmentSetupError
from environments.tools import Hit


class Index:
    """Returns one hit that quotes the query."""

    in_memory = True

    def __init__(self, error=None):
        self.error, self.n_calls = error, 0

    def search(self, queries, k):
        self.n_calls += 1
        if self.error:
            raise self.error
        return [[Hit(f"hit of {query}", "Title", "text")][:k] for query in queries]


QUESTION = {"question": "Which city?", "image": Image.new("RGB", (8, 8))}
TEXT = "<think> t </think> <search> q </search>"
IMAGE = "<think> t </think> <search> <img> </search>"
ANSWER = "<think> t </think> <answer> Paris </answer>"


def start(question=QUESTION, **settings):
    return SearchEnvironment(Index(), Index(), **settings).start(question)


def test_a_whole_episode():
    episode = start()
    step = episode.step(IMAGE)
    assert step.action == ImageSearch("full")
    assert step.observation == "\n\n<information> Doc 1(Title: Title) </information>\n\n"
    assert (step.done, step.stop_reason, step.images) == (False, None, [])
    step = episode.step(TEXT)
    assert step.observation == "\n\n<information> Doc 1(Title: Title) text </information>\n\n"
    assert step.result.hits == ["hit of q"]
    step = episode.step(ANSWER)
    assert (step.done, step.stop_reason, step.observation, step.result) == (
        True,
        "answer",
        None,
        None,
    )
    assert episode.answer == "Paris"
    assert episode.actions == [ImageSearch(), Search("q"), Answer("Paris")]
    assert episode.queries == ["q"]
    assert (episode.n_text, episode.n_image, episode.stop_reason) == (1, 1, "answer")
    assert [result is None for result in episode.results] == [False, False, True]
    metrics = episode.metrics()
    assert (metrics["turns"], metrics["text_searches"], metrics["image_searches"]) == (3, 1, 1)
    assert metrics["tool_s"] == sum(result.seconds for result in episode.results[:2])


def test_an_answer_in_the_last_turn_counts():
    episode = start(max_turns=1)
    assert episode.step(ANSWER).stop_reason == "answer"
    assert episode.answer == "Paris"


def test_a_call_in_the_last_turn_ends_without_asking_the_tool():
    episode = start(max_turns=2)
    assert not episode.step(TEXT).done
    step = episode.step(TEXT)
    assert (step.done, step.stop_reason, step.observation) == (True, "turn_limit", None)
    assert step.action == Search("q")
    assert episode.text_index.n_calls == episode.n_text == 1
    assert episode.answer is None


def test_the_first_call_over_budget_is_refused_and_the_second_ends():
    episode = start(text_searches=1, max_turns=9)
    episode.step(TEXT)
    refused = episode.step(TEXT)
    assert "No searches left for text" in refused.observation
    assert (refused.done, refused.result.is_error, refused.result.fault) == (False, True, "model")
    assert episode.n_text == episode.text_index.n_calls == 1
    last = episode.step(TEXT)
    assert (last.done, last.stop_reason) == (True, "budget")


def test_the_budgets_of_text_and_image_are_apart():
    episode = start(text_searches=1, image_searches=1, max_turns=9)
    assert not episode.step(TEXT).result.is_error
    assert not episode.step(IMAGE).result.is_error
    refused = episode.step(IMAGE)
    assert "No searches left for the image" in refused.observation
    assert episode.step(ANSWER).stop_reason == "answer"


def test_a_budget_of_nothing_refuses_the_first_call():
    assert "No searches left" in start(text_searches=0).step(TEXT).observation
    assert "No searches left" in start(image_searches=0).step(IMAGE).observation


def test_an_invalid_turn_ends_the_episode():
    episode = start()
    step = episode.step("I give up")
    assert (step.done, step.stop_reason, step.action) == (
        True,
        "invalid",
        Invalid("neither a call nor an answer"),
    )


def test_an_invalid_turn_can_be_given_a_second_chance():
    episode = start(invalid_ends=False, max_turns=3)
    step = episode.step("I give up")
    assert not step.done
    assert "No valid action: neither a call nor an answer." in step.observation
    assert step.result.fault == "model"
    episode.step("again")
    assert episode.step("and again").stop_reason == "turn_limit"


def test_a_turn_cut_by_the_token_limit_ends_as_length():
    assert start().step("<think> so", truncated=True).stop_reason == "length"
    assert start(invalid_ends=False).step("<think>", truncated=True).stop_reason == "length"
    # a complete action that happens to fill the limit is an action
    assert start().step(ANSWER, truncated=True).stop_reason == "answer"


def test_an_episode_can_be_stopped_from_outside_once():
    episode = start()
    episode.stop("length")
    episode.stop("budget")
    assert episode.stop_reason == "length"
    assert episode.done
    with pytest.raises(ValueError, match="unknown stop reason 'tired'"):
        start().stop("tired")


def test_stepping_a_finished_episode_is_the_callers_error():
    episode = start()
    episode.step(ANSWER)
    with pytest.raises(RuntimeError, match="ended already"):
        episode.step(ANSWER)


def test_a_failing_tool_costs_budget_but_not_the_episode():
    episode = SearchEnvironment(Index(ConnectionError()), None).start(QUESTION)
    step = episode.step(TEXT)
    assert (step.done, step.result.fault) == (False, "infrastructure")
    assert "The search failed (ConnectionError)" in step.observation
    assert episode.n_text == 1
    assert episode.metrics()["infrastructure_faults"] == 1
    assert episode.step(ANSWER).stop_reason == "answer"


def test_a_bad_region_costs_budget_and_says_so():
    episode = start()
    step = episode.step("<search> <img> sky </search>")
    assert "Unknown region 'sky'" in step.observation
    assert (episode.n_image, episode.metrics()["model_faults"]) == (1, 1)


def test_a_question_without_an_image_prompts_without_one():
    episode = start({"question": "Which city?", "image": None})
    assert not episode.has_image
    assert [part["type"] for part in episode.prompt()[0]["content"]] == ["text"]
    assert [part["type"] for part in start().prompt()[0]["content"]] == ["image", "text"]
    assert "no image" in episode.step(IMAGE).observation


def test_thumbnails_arrive_with_one_mark_each():
    class Pictures(Index):
        def search(self, pictures, k):
            return [[Hit(str(i), "T", image=Image.new("RGB", (2, 2))) for i in range(k)]]

    episode = SearchEnvironment(None, Pictures(), thumbnails=True).start(QUESTION)
    step = episode.step(IMAGE)
    assert len(step.images) == step.observation.count("\ufffc") == 3


def test_the_mmsearch_dialect_runs_the_same_episode():
    episode = start(dialect="mmsearch_r1")
    step = episode.step("<reason> r </reason> <search><img></search>")
    assert "Original user's question: Which city?\n" in step.observation
    step = episode.step("<reason> r </reason> <text_search>q</text_search>")
    assert "[Text Search Results]" in step.observation
    assert episode.step("<reason> r </reason> <answer>x</answer>").stop_reason == "answer"


def test_episodes_share_nothing():
    environment = SearchEnvironment(Index(), Index())
    first, second = environment.start(QUESTION), environment.start(QUESTION)
    first.step(TEXT)
    assert (second.actions, second.queries, second.n_text) == ([], [], 0)


def test_an_unknown_setting_is_a_users_mistake():
    with pytest.raises(EnvironmentSetupError, match="max_turnz"):
        SearchEnvironment(None, None, max_turnz=3)


def test_every_ending_has_a_name():
    assert set(STOP_REASONS) == {"answer", "invalid", "turn_limit", "budget", "length"}
