"""Tools: results, bad calls, and services that fail or hang."""

import threading
import time

import pytest
from PIL import Image

from environments.dialects import SEARCH_R1
from environments.episode import SearchEnvironment
from environments.tools import (
    MAX_QUERY_CHARS,
    BadCall,
    Hit,
    Page,
    crop,
    guard,
    image_search,
    text_search,
    visit,
)


class TextTable:
    """A text back end that returns what it is told to."""

    in_memory = True

    def __init__(self, *hits, error=None):
        self.hits, self.error, self.calls = list(hits), error, []

    def search(self, queries, k):
        self.calls.append((queries, k))
        if self.error:
            raise self.error
        return [self.hits[:k] for _ in queries]


class ImageTable(TextTable):
    """The same for pictures; remembers the pictures."""


def episode(text=None, image=None, picture=None, **budgets):
    question = {"question": "q", "image": picture}
    return SearchEnvironment(text, image, **budgets).start(question)


class Reader:
    """A page reader that remembers what it was asked."""

    in_memory = True

    def __init__(self, page=None, error=None):
        self.page, self.error, self.calls = page, error, []

    def read(self, url, question):
        self.calls.append((url, question))
        if self.error:
            raise self.error
        return self.page or Page("Bamako", "Bamako is the capital of Mali.", url)


def reading(reader, text=None, **settings):
    """An episode that may visit pages."""
    settings = {"visits": 2, "visit_urls": "any", **settings}
    return SearchEnvironment(text, None, reader, **settings).start({"question": "Which city?"})


def two_colours(width=5):
    """A picture whose left part is red and whose right half is blue."""
    picture = Image.new("RGB", (width, 2), "red")
    picture.paste("blue", ((width + 1) // 2, 0, width, 2))
    return picture


def test_a_text_search_returns_titles_snippets_and_ids():
    index = TextTable(
        Hit("p1", "France", "Paris .", 2.0), Hit("p2", "Mali", "Bamako ."), Hit("p3", "x")
    )
    result = text_search(episode(index), "  capital of France ")
    assert index.calls == [(["capital of France"], 2)]
    assert result.hits == ["p1", "p2"]
    assert [(hit.title, hit.text) for hit in result.documents] == [
        ("France", "Paris ."),
        ("Mali", "Bamako ."),
    ]
    assert (result.is_error, result.fault, result.tool) == (False, None, "text")
    assert result.text == "France: Paris .\nMali: Bamako ."
    assert result.seconds > 0


def test_snippets_are_cut_to_forty_words_and_shorter_ones_left_alone():
    spaced = "two  spaces" + " w" * 38  # exactly forty words
    index = TextTable(Hit("a", "t", "w " * 41), Hit("b", "t", spaced))
    first, second = text_search(episode(index), "q").documents
    assert first.text.split() == ["w"] * 40
    assert second.text == spaced


def test_an_index_that_promises_more_words_shows_them_all():
    index = TextTable(Hit("a", "t", "fourteen-chars " * 101))
    for n_words in (40, 100):
        index.words_shown = n_words
        result = text_search(episode(index), "q")
        assert SEARCH_R1.render_observation(result, "q").count("fourteen-chars") == n_words


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_picture_that_cannot_be_read_is_a_fault_of_infrastructure(in_memory):
    class Gone(dict):
        def get(self, key, default=None):
            if key == "image":
                raise OSError("no route to the host")
            return super().get(key, default)

    index = ImageTable(Hit("fr", "France"))
    index.in_memory = in_memory
    result = image_search(SearchEnvironment(None, index).start(Gone(question="q")))
    assert (result.is_error, result.fault) == (True, "infrastructure")
    assert index.calls == []


def test_an_image_search_returns_names_only():
    index = ImageTable(Hit("fr", "France", "Capital Paris", 0.9, Image.new("RGB", (3, 3))))
    result = image_search(episode(image=index, picture=two_colours()))
    assert result.hits == ["fr"]
    assert (result.text, result.images) == ("France", [])
    assert result.documents == [Hit("fr", "France", "", 0.9, None)]


def test_thumbnails_come_when_asked_for_and_never_from_a_text_search():
    picture = Image.new("RGB", (3, 3))
    index = ImageTable(Hit("fr", "France", "", 0.9, picture), Hit("it", "Italy"))
    result = image_search(episode(image=index, picture=two_colours(), thumbnails=True))
    assert result.images == [picture]
    assert text_search(episode(index, thumbnails=True), "q").images == []


@pytest.mark.parametrize(
    ("region", "size", "colours"),
    [
        ("full", (5, 2), {"red", "blue"}),
        ("left", (3, 2), {"red"}),
        ("right", (3, 2), {"red", "blue"}),
        ("LEFT ", (3, 2), {"red"}),
    ],
)
def test_a_region_is_the_left_or_the_right_half(region, size, colours):
    index = ImageTable(Hit("a", "A"))
    image_search(episode(image=index, picture=two_colours()), region)
    ((pictures, k),) = index.calls
    named = {(255, 0, 0): "red", (0, 0, 255): "blue"}
    assert pictures[0].size == size
    assert {named[colour] for _, colour in pictures[0].getcolors()} == colours
    assert k == 3


def test_halves_of_an_even_width_do_not_overlap():
    picture = two_colours(4)
    assert crop(picture, "left").getcolors() == [(4, (255, 0, 0))]
    assert crop(picture, "right").getcolors() == [(4, (0, 0, 255))]
    assert crop(Image.new("RGB", (1, 1)), "left").size == (1, 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: text_search(episode(TextTable()), "  "), "query is empty"),
        (lambda: text_search(episode(None), "q"), "no text search"),
        (lambda: image_search(episode(image=None, picture=two_colours())), "no image search"),
        (lambda: image_search(episode(image=TextTable())), "no image"),
        (
            lambda: image_search(episode(image=TextTable(), picture=two_colours()), "<top>"),
            "Unknown region '‹top›'. Use full, left or right.",
        ),
    ],
)
def test_a_bad_call_is_the_models_fault_and_says_what_to_do(call, says):
    result = call()
    assert says in result.text
    assert (result.is_error, result.fault, result.hits) == (True, "model", [])


def test_an_empty_result_is_nobodys_fault():
    result = text_search(episode(TextTable()), "q")
    assert (result.text, result.is_error, result.fault) == ("Nothing found.", False, None)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("down"), KeyError("x"), MemoryError()])
def test_a_failing_service_becomes_a_result(error, in_memory):
    index = TextTable(error=error)
    index.in_memory = in_memory
    result = text_search(episode(index), "q")
    assert (result.is_error, result.fault) == (True, "infrastructure")
    assert type(error).__name__ in result.text
    assert "down" not in result.text  # a service's message is no text for the policy


@pytest.mark.parametrize("sent", [[], None, [[None]], [["text"]]])
def test_a_service_that_breaks_its_contract_becomes_a_result(sent):
    class Broken:
        def search(self, queries, k):
            return sent

    result = text_search(episode(Broken()), "q")
    assert (result.is_error, result.fault) == (True, "infrastructure")


def test_odd_fields_of_a_hit_do_not_reach_the_dialect():
    index = TextTable(Hit(7, None, None))
    current = episode(index)
    result = text_search(current, "q")
    assert result.hits == ["7"]
    assert current.dialect.render_observation(result, "q").startswith("\n\n<information> Doc 1")


def test_a_broken_picture_becomes_a_result():
    result = image_search(episode(image=ImageTable(), picture=object()), "left")
    assert (result.is_error, result.fault) == (True, "infrastructure")


def test_a_hanging_service_is_given_up_after_the_limit():
    release = threading.Event()

    class Hanging:
        def search(self, queries, k):
            release.wait(30)
            return [[Hit("late", "late")]]

    start = time.perf_counter()
    result = text_search(episode(Hanging(), timeout_s=0.05), "q")
    elapsed = time.perf_counter() - start
    release.set()
    assert (result.is_error, result.fault, result.hits) == (True, "infrastructure", [])
    assert "no result within 0.05 s" in result.text
    assert 0.05 <= result.seconds <= elapsed < 5


def test_only_back_ends_that_are_not_in_memory_get_a_thread():
    seen = []

    class Index:
        def search(self, queries, k):
            seen.append(threading.current_thread() is threading.main_thread())
            return [[Hit("a", "A")]]

    remote, local = Index(), Index()
    local.in_memory = True
    text_search(episode(remote), "q")
    text_search(episode(local), "q")
    text_search(episode(remote, timeout_s=None), "q")
    assert seen == [False, True, True]


def test_an_interrupt_is_no_tool_failure():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard(interrupt, "text", None)


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0.0, 0.0, 1.0, 1.0), (100, 50)),
        ((0.25, 0.5, 0.75, 1.0), (50, 25)),
        ((0.5, 0.0, 1.0, 1.0), (50, 50)),
        ((10.0, 5.0, 30.0, 50.0), (20, 45)),
        ((-20.0, -20.0, 30.0, 9000.0), (30, 50)),  # cut off at the edges
        ((0.001, 0.001, 0.002, 0.002), (1, 1)),
    ],
)
def test_a_box_is_relative_or_in_pixels(box, size):
    index = ImageTable(Hit("a", "A"))
    image_search(episode(image=index, picture=two_colours().resize((100, 50))), box)
    ((pictures, _),) = index.calls
    assert pictures[0].size == size


def test_the_right_half_as_a_box_is_the_right_half():
    picture = two_colours(4)
    assert crop(picture, (0.5, 0, 1, 1)).tobytes() == crop(picture, "right").tobytes()


@pytest.mark.parametrize(
    "box", [(0.5, 0, 0.5, 1), (0.9, 0, 0.1, 1), (900, 0, 950, 10), (2, 2, 1, 1)]
)
def test_an_empty_box_is_the_models_fault_and_says_how_large_the_picture_is(box):
    index = ImageTable(Hit("a", "A"))
    result = image_search(episode(image=index, picture=two_colours()), box)
    assert (result.fault, index.calls) == ("model", [])
    assert "5 wide and 2 high" in result.text
    with pytest.raises(BadCall, match="not finite"):
        crop(two_colours(), (0.0, 0.0, float("nan"), 1.0))


@pytest.mark.parametrize(
    "box", ["-1e308 0 1 1", "0 -1e308 0.5 1", "0 0 1e308 1e308", "-1e10 0 1 1", "0 0 1 -1.1e9"]
)
def test_a_box_beyond_any_picture_is_the_models_fault_and_not_the_services(box):
    index = ImageTable(Hit("a", "A"))
    step = episode(image=index, picture=two_colours()).step(f"<search> <img> {box} </search>")
    assert (step.result.fault, index.calls) == ("model", [])
    assert "too large" in step.result.text
    infinite = image_search(episode(image=index, picture=two_colours()), (0, 0, 1, float("inf")))
    assert (infinite.fault, index.calls) == ("model", [])


# ---------------------------------------------------------------- visits


def test_a_visit_reads_the_page_with_the_question_in_mind():
    reader = Reader()
    result = visit(reading(reader), "https://a.org/bamako", "the country")
    assert reader.calls == [("https://a.org/bamako", "the country")]
    assert (result.tool, result.hits, result.fault) == ("page", ["https://a.org/bamako"], None)
    assert result.documents[0].text == "Bamako is the capital of Mali."
    visit(reading(reader), "https://a.org/bamako")
    assert reader.calls[-1] == ("https://a.org/bamako", "Which city?")


def test_a_page_is_cut_to_three_hundred_words():
    result = visit(reading(Reader(Page("t", "w " * 5000, "u"))), "https://a.org")
    assert len(result.documents[0].text.split()) == 300


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "is no address"),
        ("a.org", "is no address"),
        ("file:///etc/passwd", "is no address"),
        ("javascript:alert(1)", "is no address"),
        ("https://a.org and more", "is no address"),
        ("https://a.org/" + "x" * 600, "longer than 500"),
    ],
)
def test_what_is_no_web_address_is_not_given_to_the_reader(url, says):
    reader = Reader()
    result = visit(reading(reader), url)
    assert (result.fault, reader.calls) == ("model", [])
    assert says in result.text


def test_only_pages_that_a_search_showed_can_be_visited():
    reader = Reader()
    shown = "https://a.org/x?a=1&b=\u202e2"  # the policy sees it without the control character
    index = TextTable(Hit("p", "Mali", "Bamako .", url=shown))
    world = reading(reader, index, visit_urls="results")
    refused = world.step("<visit> https://evil.org </visit>")
    assert (refused.result.fault, reader.calls) == ("model", [])
    assert "in no search result" in refused.observation
    step = world.step("<search> q </search>")
    assert "Doc 1(Title: Mali) https://a.org/x?a=1&b=2 Bamako ." in step.observation
    world.step("<visit> https://a.org/x?a=1&b=2 </visit>")
    assert reader.calls == [(shown, "Which city?")]


def test_addresses_are_shown_only_where_they_are_of_use():
    index = TextTable(Hit("p", "Mali", "Bamako .", url="https://a.org"))
    assert "a.org" not in episode(index).step("<search> q </search>").observation


def test_a_page_that_must_not_be_read_is_the_models_fault_a_dead_service_is_not():
    refused = visit(reading(Reader(error=BadCall("This address is private."))), "http://10.0.0.1")
    assert (refused.fault, refused.text) == ("model", "This address is private.")
    dead = visit(reading(Reader(error=ConnectionError("key=secret"))), "https://a.org")
    assert dead.fault == "infrastructure"
    assert "secret" not in dead.text


def test_without_visits_there_is_nothing_to_visit():
    assert visit(episode(TextTable()), "https://a.org").fault == "model"


# ---------------------------------------------------------------- what a back end gets wrong


def test_a_query_gone_wrong_is_not_sent():
    index = TextTable(Hit("a", "A"))
    result = text_search(episode(index), "x" * (MAX_QUERY_CHARS + 1))
    assert (result.fault, index.calls) == ("model", [])
    text_search(episode(index), "a\ud800b")  # JSON can spell it, no request can
    assert index.calls[0][0] == ["a?b"]


def test_more_hits_than_asked_for_are_left_out():
    class Generous:
        in_memory = True

        def search(self, queries, k):
            return [[Hit(str(i), "t", "x") for i in range(1000)]]

    result = text_search(episode(Generous()), "q")
    assert result.hits == ["0", "1"]


def test_ids_are_short_and_can_be_written():
    result = text_search(episode(TextTable(Hit("\ud800" + "x" * 10**6, "t"))), "q")
    assert len(result.hits[0]) == 500
    result.hits[0].encode("utf-8")


def test_the_settings_of_the_environment_reach_the_call():
    class Flaky:
        n_calls = 0

        def search(self, queries, k):
            self.n_calls += 1
            if self.n_calls < 3:
                raise OSError("busy")
            return [[Hit("a", "A")]]

    result = text_search(episode(Flaky(), retries=2, backoff_s=0.001), "q")
    assert (result.hits, result.retries) == (["a"], 2)
    assert text_search(episode(Flaky(), retries=1, backoff_s=0.001), "q").fault == "infrastructure"
