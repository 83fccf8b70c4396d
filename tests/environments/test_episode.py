"""Episodes: budgets, how they end, and what they remember."""

import json
import threading

import pytest
from PIL import Image

from environments.dialects import Answer, ImageSearch, Invalid, Parallel, Search
from environments.episode import STOP_REASONS, SearchEnvironment
from environments.errors import EnvironmentSetupError
from environments.tools import Hit, Page


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


# ---------------------------------------------------------------- several calls in one turn


def json_calls(*calls):
    lines = [
        json.dumps({"name": name, "arguments": arguments}, ensure_ascii=True)
        for name, arguments in calls
    ]
    return "\n".join(f"<tool_call>\n{line}\n</tool_call>" for line in lines)


def ask_text(query):
    return ("text_search", {"query": query})


ASK_IMAGE = ("image_search", {})


def test_calls_of_one_turn_are_all_carried_out_and_answered_in_their_order():
    episode = start(dialect="hermes")
    step = episode.step(json_calls(ask_text("a"), ASK_IMAGE, ask_text("b")))
    assert step.action == Parallel((Search("a"), ImageSearch(), Search("b")))
    assert step.observation.count("<tool_response>") == 3
    assert [hit.split()[-1] for hit in step.result.hits[::2]] == ["a", "b"]
    assert (episode.n_text, episode.n_image, episode.queries) == (2, 1, ["a", "b"])
    assert len(episode.actions) == len(episode.results) == 1
    assert episode.step("<answer>x</answer>").stop_reason == "answer"


def test_budgets_count_calls_and_what_exceeds_them_is_refused_in_the_same_observation():
    episode = start(dialect="hermes", text_searches=2, max_turns=9)
    step = episode.step(json_calls(ask_text("a"), ask_text("b"), ask_text("c")))
    assert (episode.n_text, episode.text_index.n_calls) == (2, 2)
    assert [part.fault for part in step.result.parts] == [None, None, "model"]
    assert (step.result.is_error, step.result.fault) == (True, "model")
    assert step.observation.count("No searches left for text") == 1
    # told once already: who asks for nothing else has not read it
    assert episode.step(json_calls(ask_text("d"), ask_text("e"))).stop_reason == "budget"


def test_a_turn_of_which_something_is_left_goes_on():
    episode = start(dialect="hermes", text_searches=0, image_searches=1, max_turns=9)
    assert not episode.step(json_calls(ask_text("a"))).done
    step = episode.step(json_calls(ask_text("a"), ASK_IMAGE))
    assert not step.done
    assert [part.fault for part in step.result.parts] == ["model", None]


def test_services_are_asked_at_the_same_time():
    meet = threading.Barrier(3, timeout=5)

    class Meeting(Index):
        in_memory = False

        def search(self, queries, k):
            meet.wait()  # breaks unless three calls are under way together
            return super().search(queries, k)

    world = SearchEnvironment(Meeting(), Meeting(), dialect="hermes")
    step = world.start(QUESTION).step(json_calls(ask_text("a"), ASK_IMAGE, ask_text("b")))
    assert not step.result.is_error
    assert step.result.seconds < 5


def test_one_failing_call_of_several_is_the_services_fault_and_the_rest_is_shown():
    world = SearchEnvironment(Index(OSError()), Index(), dialect="hermes")
    episode = world.start(QUESTION)
    step = episode.step(json_calls(ask_text("a"), ASK_IMAGE))
    assert step.result.fault == "infrastructure"
    assert "The search failed (OSError)" in step.observation
    assert "Doc 1(Title: Title)" in step.observation
    assert episode.metrics()["infrastructure_faults"] == 1


def test_pictures_of_several_results_stand_in_their_own_responses():
    class Pictures(Index):
        def search(self, pictures, k):
            return [[Hit(str(i), "T", image=Image.new("RGB", (2, 2))) for i in range(k)]]

    world = SearchEnvironment(Index(), Pictures(), dialect="hermes", thumbnails=True, top_k_image=2)
    step = world.start(QUESTION).step(json_calls(ASK_IMAGE, ask_text("a")))
    first, second = step.observation.split("</tool_response>")[:2]
    assert (first.count("\ufffc"), second.count("\ufffc"), len(step.images)) == (2, 0, 2)


def test_too_many_calls_are_refused_together():
    episode = start(dialect="hermes", text_searches=99)
    step = episode.step(json_calls(*[ask_text("a")] * 9))
    assert "more than 8 calls in one turn" in step.observation
    assert episode.n_text == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("", "the call is empty"),
        ("capital of Mali", "no valid JSON: expecting value at character 1"),
        ('{"name": "text_search",}', "no valid JSON"),
        ("[1]", "must be a JSON object in braces, not a list"),
        ('{"arguments": {}}', 'the call has no "name"'),
        (
            '{"name": "browse", "arguments": {}}',
            "no tool 'browse'; use text_search or image_search",
        ),
        ('{"name": "text_search"}', "text_search needs the argument 'query'"),
        ('{"name": "text_search", "arguments": []}', "must be a JSON object in braces, not a list"),
        ('{"name": "text_search", "arguments": {"querry": "x"}}', "did you mean 'query'?"),
        ('{"name": "text_search", "arguments": {"zzz": "x"}}', "it takes query"),
        ('{"name": "text_search", "arguments": {"query": 7}}', "must be text, not a number"),
        ('{"name": "text_search", "arguments": {"query": " "}}', "'query' is empty"),
        ('{"name": "image_search", "arguments": {"box": [1, 2]}}', "must be four numbers"),
        ('{"name": "image_search", "arguments": {"box": [1, 2, 3, true]}}', "must be four numbers"),
        ('{"name": "image_search", "arguments": {"box": [0, 0, NaN, 1]}}', "must be four numbers"),
    ],
)
def test_a_call_that_cannot_be_read_comes_back_with_what_is_wrong(call, says):
    episode = start(dialect="hermes")
    step = episode.step(f"<tool_call>{call}</tool_call>")
    assert isinstance(step.action, Invalid)
    assert not step.done
    assert says in step.observation
    assert (step.result.fault, episode.n_text, episode.n_image) == ("model", 0, 0)
    # and not for ever
    for _ in range(3):
        step = episode.step(f"<tool_call>{call}</tool_call>")
    assert step.stop_reason == "turn_limit"


# ---------------------------------------------------------------- visits


class Reader:
    in_memory = True

    def read(self, url, question):
        return Page("A page", f"text for {question}", url)


def test_visits_have_a_budget_of_their_own():
    world = SearchEnvironment(Index(), Index(), Reader(), visits=1, visit_urls="any", max_turns=9)
    episode = world.start(QUESTION)
    step = episode.step("<think> t </think> <visit> https://a.org </visit>")
    assert "Doc 1(Title: A page) text for Which city? </information>" in step.observation
    assert (episode.n_visits, episode.metrics()["visits"]) == (1, 1)
    assert "No visits left" in episode.step("<visit> https://a.org </visit>").observation


def test_visits_are_offered_only_where_they_are_allowed():
    for dialect, word in (
        ("search_r1", "<visit>"),
        ("search_r1_full", "<visit>"),
        ("mmsearch_r1", "<visit>"),
        ("hermes", '"visit"'),
    ):
        with_visits = SearchEnvironment(Index(), Index(), Reader(), dialect=dialect, visits=1)
        assert word in str(with_visits.start(QUESTION).prompt())
        assert word not in str(start(dialect=dialect).prompt())


def test_visits_without_a_reader_are_a_users_mistake():
    with pytest.raises(EnvironmentSetupError, match=r"set environment\.visits to 0"):
        SearchEnvironment(Index(), Index(), visits=1)


def test_a_tool_without_a_budget_is_not_offered():
    prompt = start(dialect="hermes", image_searches=0).prompt()
    assert '"image_search"' not in prompt[0]["content"]
