"""Whatever a policy writes and a service does, an episode keeps its budgets and comes to an end."""

import json

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from environments.actions import calls_of
from environments.dialects import DIALECTS, IMAGE_MARK, TAGS
from environments.episode import STOP_REASONS, SearchEnvironment
from environments.tools import BadCall, Hit, Page

QUESTION = {"question": "Which city?", "image": Image.new("RGB", (8, 8))}
ERRORS = (None, None, ConnectionError("x"), BadCall("no"), KeyError(), ValueError("<answer>"))
CALLS = (
    ("text_search", {"query": "q"}),
    ("search", {"query_list": ["a", "b", "c"]}),
    ("image_search", {"region": "left"}),
    ("image_search", {"box": [0, 0, 0.5, 0.5]}),
    ("image_search", {"box": [9, 9, 9, 9]}),
    ("visit", {"url": ["https://a.org", "file:///x"], "goal": "g"}),
    ("text_search", {}),
    ("no_such_tool", {}),
)

json_turn = st.lists(st.sampled_from(CALLS), min_size=1, max_size=4).map(
    lambda calls: "\n".join(
        f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
        for name, arguments in calls
    )
)
tag_turn = st.sampled_from(
    [
        "<think> t </think> <search> q </search>",
        "<reason> r </reason><search><img></search>",
        "<search> <img> 0 0 1 1 </search>",
        "<search> <img> sky </search>",
        "<text_search>q</text_search>",
        "<image_search></image_search>",
        "<visit> https://a.org </visit>",
        "<visit> nowhere </visit>",
    ]
)
soup = st.lists(
    st.sampled_from(
        [f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS] + ["x", " ", "{}"]
    ),
    max_size=8,
).map("".join)
turns = st.lists(json_turn | tag_turn | soup | st.just("<answer> x </answer>"), max_size=12)
settings = st.fixed_dictionaries(
    {
        "image_searches": st.integers(0, 2),
        "text_searches": st.integers(0, 4),
        "visits": st.integers(0, 2),
        "max_turns": st.integers(1, 6),
        "invalid_ends": st.booleans(),
        "thumbnails": st.booleans(),
        "visit_urls": st.sampled_from(["results", "any"]),
    }
)


class Web:
    """Answers or fails by turns, as the list of errors says."""

    in_memory = True

    def __init__(self, errors):
        self.errors, self.n_calls = errors, 0

    def _fail(self):
        self.n_calls += 1
        error = self.errors[self.n_calls % len(self.errors)]
        if error is not None:
            raise error

    def search(self, queries, k):
        self._fail()
        image = Image.new("RGB", (4, 4))
        return [[Hit("a", "A", "text", image=image, url="https://a.org")] for _ in queries]

    def read(self, url, question):
        self._fail()
        return Page("A", "text", url)


@given(
    st.sampled_from(list(DIALECTS)),
    settings,
    turns,
    st.lists(st.sampled_from(ERRORS), min_size=1, max_size=5),
)
def test_an_episode_keeps_its_word(dialect, budgets, said, errors):
    web = Web(errors)
    episode = SearchEnvironment(web, web, web, dialect=dialect, **budgets).start(QUESTION)
    n_asked = 0
    for number, turn in enumerate(said, 1):
        step = episode.step(turn)
        n_asked += len(calls_of(step.action))
        assert len(episode.actions) == len(episode.results) == number <= budgets["max_turns"]
        assert step.done == (step.observation is None) == (step.stop_reason is not None)
        if step.done:
            assert step.stop_reason in STOP_REASONS
            assert (episode.answer is not None) == (step.stop_reason == "answer")
            break
        assert step.observation.count(IMAGE_MARK) == len(step.images)
        assert step.result.is_error == (step.result.fault is not None)
        assert episode.shortened(0).count(IMAGE_MARK) == len(step.images)
        if number == budgets["max_turns"]:
            raise AssertionError("an episode went on after its last turn")
    assert episode.n_text <= budgets["text_searches"]
    assert episode.n_image <= budgets["image_searches"]
    assert episode.n_visits <= budgets["visits"]
    assert web.n_calls <= episode.n_text + episode.n_image + episode.n_visits <= n_asked
    assert len(episode.queries) == episode.n_text
