"""The client of a search server: equal to the index behind it, patient with faults, no hangs."""

import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from environments import remote
from environments.atlas.entities import load_flag
from environments.atlas.photos import render_photo
from environments.atlas.world import load_image_index, load_text_index
from environments.cache import ResultCache
from environments.episode import SearchEnvironment
from environments.errors import EnvironmentSetupError
from environments.remote import (
    RemoteImageIndex,
    RemoteTextIndex,
    SearchServer,
    SearchServerError,
    connect,
)
from environments.tools import Hit, image_search, text_search
from environments.wire import decode_image, encode_image, from_base64

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from environments.serve import make_app
from train.settings import free_port

QUERIES = ["capital of France", "currency of Guyana", "xylophone", "highest point Mali"]
RESULT = {"result": [[{"document": {"id": "a", "contents": "A\ntext"}, "score": 1.0}]]}
HIT = Hit("a", "A", "text", 1.0)


@pytest.fixture
def atlas_url(serve):
    return serve(make_app(load_text_index(snippet_words=None), load_image_index()))


class Script:
    """A server that gives the scripted answers, one a request, the last one for ever."""

    def __init__(self, *answers):
        self.answers, self.requests, self.clients = list(answers), [], set()

    def app(self):
        async def retrieve(request):
            self.requests.append((await request.json(), dict(request.headers)))
            self.clients.add(request.client)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

        return Starlette(routes=[Route("/retrieve", retrieve, methods=["POST"])])


def failing(status, headers=None):
    return JSONResponse({"error": "not now"}, status, headers)


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)


def test_remote_hits_equal_those_of_the_index_itself(atlas_url):
    text, images = connect(atlas_url, thumbnails=True)
    assert text.search(QUERIES, 3) == load_text_index().search(QUERIES, 3)
    photos = [render_photo(load_flag(iso), 9, 0.5) for iso in ("fr", "jp", "br")]
    local, far = load_image_index().search(photos, 3), images.search(photos, 3)
    for here, there in zip(chain(*local), chain(*far), strict=True):
        assert (here.id, here.title, here.score) == (there.id, there.title, there.score)
        assert here.image.tobytes() == there.image.tobytes()
    assert connect(atlas_url)[1].search(photos[:1], 1)[0][0].image is None


def test_an_episode_sees_as_many_words_as_the_server_is_asked_for(serve):
    passage = " ".join(f"word{i}" for i in range(100))
    document = {"id": "a", "contents": f"A\n{passage}"}
    script = Script(JSONResponse({"result": [[{"document": document, "score": 1.0}]]}))
    index = RemoteTextIndex(SearchServer(serve(script.app())), 100)
    episode = SearchEnvironment(index, None).start({"question": "q"})
    assert text_search(episode, "word").documents[0].text == passage
    assert script.requests[0][0]["snippet_words"] == 100


def test_an_episode_sees_no_difference(atlas_url):
    photo = render_photo(load_flag("ml"), 3, 0.4)
    question = {"question": "What is the capital of this place?", "image": photo}
    local = SearchEnvironment(load_text_index(), load_image_index()).start(question)
    far = SearchEnvironment(*connect(atlas_url)).start(question)
    for tool, argument in ((image_search, "full"), (text_search, "capital of Mali")):
        here, there = tool(local, argument), tool(far, argument)
        assert (here.text, here.hits, here.fault) == (there.text, there.hits, None)


def test_a_large_picture_is_sent_small_and_a_small_one_as_it_is(monkeypatch):
    sent = []

    def post(path, body):
        sent.extend(body["images"])
        return {"result": [[] for _ in body["images"]]}

    index = RemoteImageIndex(SearchServer("http://127.0.0.1:9"))
    monkeypatch.setattr(index.server, "post", post)
    large = Image.new("P", (2048, 512), 3)
    small = Image.effect_noise((1024, 600), 80)
    assert index.search([large, small], 1) == [[], []]
    assert decode_image(from_base64(sent[0]), 10**6).size == (1024, 256)
    assert large.size == (2048, 512)
    assert sent[1] == encode_image(small)


def test_grey_with_sixteen_bits_keeps_its_shades_on_the_server():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 65_535]], dtype=np.uint16)).save(buffer, "PNG")
    picture = decode_image(buffer.getvalue(), 10**6)
    # the upper eight bits: value // 256
    assert np.asarray(picture)[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


def test_many_threads_share_few_connections(serve):
    script = Script(JSONResponse(RESULT))
    index = RemoteTextIndex(SearchServer(serve(script.app())))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: index.search([str(i)], 1), range(60)))
    assert found == [[[HIT]]] * 60
    assert len(script.requests) == 60
    assert len(script.clients) <= 4


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_passing_faults_are_tried_again(serve, status):
    script = Script(failing(status), failing(status), JSONResponse(RESULT))
    assert RemoteTextIndex(SearchServer(serve(script.app()))).search(["q"], 1) == [[HIT]]
    assert len(script.requests) == 3


def test_the_pause_that_the_server_asks_for_is_kept(serve):
    script = Script(failing(429, {"Retry-After": "1"}), JSONResponse(RESULT))
    start = time.monotonic()
    RemoteTextIndex(SearchServer(serve(script.app()))).search(["q"], 1)
    assert time.monotonic() - start >= 1


def test_a_pause_that_is_no_number_is_none(serve):
    script = Script(failing(429, {"Retry-After": "\xb2"}), JSONResponse(RESULT))
    assert RemoteTextIndex(SearchServer(serve(script.app()))).search(["q"], 1) == [[HIT]]


@pytest.mark.parametrize("status", [200, 400, 503])
def test_an_answer_that_is_nested_too_deep_is_one_error_at_the_start(serve, status):
    script = Script(Response("[" * 100_000, status))
    with pytest.raises(EnvironmentSetupError, match="no search server can be used"):
        connect(serve(script.app()), timeout_s=0.5)


def test_a_score_that_no_float_holds_is_no_answer(serve):
    text = '{"result": [[{"document": {"contents": "a"}, "score": 1' + "0" * 400 + "}]]}"
    with pytest.raises(SearchServerError, match="not as expected"):
        RemoteTextIndex(SearchServer(serve(Script(Response(text)).app()))).search(["q"], 1)


def test_attempts_end_with_one_error_that_says_what_the_server_said(serve):
    script = Script(failing(503))
    server = SearchServer(serve(script.app()), retries=2)
    with pytest.raises(SearchServerError, match=r"/retrieve: 503 not now after 3 attempts"):
        RemoteTextIndex(server).search(["q"], 1)
    assert len(script.requests) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 404, 413])
def test_what_will_never_work_is_asked_once(serve, status):
    script = Script(failing(status, {"Location": "http://127.0.0.1:9/"}))
    with pytest.raises(SearchServerError, match=f"{status} not now"):
        RemoteTextIndex(SearchServer(serve(script.app()))).search(["q"], 1)
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Response("no JSON"),
        JSONResponse([]),
        JSONResponse({"result": []}),
        JSONResponse({"result": [[{"score": 1}]]}),
        JSONResponse({"result": [[{"document": {"contents": "A"}, "score": "high"}]]}),
        JSONResponse({"result": [[{"document": {"contents": "A", "image": "!"}, "score": 1}]]}),
    ],
)
def test_an_answer_of_another_layout_is_an_error_and_not_a_result(serve, answer):
    with pytest.raises(SearchServerError):
        RemoteTextIndex(SearchServer(serve(Script(answer).app()))).search(["q"], 1)


def test_an_endless_answer_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(remote, "MAX_ANSWER_BYTES", 1000)
    script = Script(Response("x" * 5000), JSONResponse(RESULT))
    index = RemoteTextIndex(SearchServer(serve(script.app())))
    with pytest.raises(SearchServerError, match="longer than 1000"):
        index.search(["q"], 1)
    assert index.search(["q"], 1) == [[HIT]]  # the connection is not used with the rest in it


def test_a_server_that_says_nothing_costs_the_time_limit_and_no_more():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(SearchServerError, match="timed out"):
            RemoteTextIndex(SearchServer(url, timeout_s=0.3)).search(["q"], 1)
        assert 0.3 <= time.monotonic() - start < 3


def test_while_a_server_is_down_calls_fail_at_once_and_then_it_is_asked_again(serve, monkeypatch):
    monkeypatch.setattr(remote, "COOL_DOWN_S", 0.5)
    server = SearchServer(f"http://127.0.0.1:{free_port()}", retries=1)
    index = RemoteTextIndex(server)
    with pytest.raises(SearchServerError, match="refused after 2 attempts"):
        index.search(["q"], 1)
    start = time.monotonic()
    for _ in range(50):
        with pytest.raises(SearchServerError, match="not asked again"):
            index.search(["q"], 1)
    assert time.monotonic() - start < 0.4
    server.url = serve(Script(JSONResponse(RESULT)).app())
    time.sleep(0.6)
    assert index.search(["q"], 1) == [[HIT]]


def test_a_busy_server_is_not_taken_for_a_dead_one(serve):
    script = Script(failing(429, {"Retry-After": "1"}), JSONResponse(RESULT))
    index = RemoteTextIndex(SearchServer(serve(script.app()), retries=0))
    with pytest.raises(SearchServerError, match="429"):
        index.search(["q"], 1)
    assert index.search(["q"], 1) == [[HIT]]


def test_a_fault_is_the_infrastructures_in_an_episode():
    index = RemoteTextIndex(SearchServer(f"http://127.0.0.1:{free_port()}", retries=0))
    result = text_search(SearchEnvironment(index, None).start({"question": "q"}), "capital")
    assert (result.is_error, result.fault) == (True, "infrastructure")


def test_the_token_comes_from_the_environment_and_stays_out_of_messages(serve, monkeypatch):
    monkeypatch.setenv("OBM_SEARCH_TOKEN", "open sesame")
    script = Script(failing(400))
    with pytest.raises(SearchServerError) as caught:
        RemoteTextIndex(SearchServer(serve(script.app()))).search(["q"], 1)
    assert script.requests[0][1]["authorization"] == "Bearer open sesame"
    assert "sesame" not in str(caught.value)


# --- connect


def test_only_what_is_served_is_offered(serve):
    text, images = connect(serve(make_app(load_text_index(), None)))
    assert isinstance(text, RemoteTextIndex)
    assert images is None
    text, images = connect(serve(make_app(None, load_image_index())))
    assert text is None
    assert isinstance(images, RemoteImageIndex)


def test_a_server_of_search_r1_has_text_and_no_health_page(serve):
    document = {"title": "A", "text": "text", "contents": '"A"\ntext'}
    script = Script(
        JSONResponse({"result": []}),
        JSONResponse({"result": [[{"document": document, "score": 2.5}]]}),
    )
    text, images = connect(serve(script.app()))
    assert images is None
    assert text.search(["q"], 1) == [[Hit('"A"', '"A"', "text", 2.5)]]
    assert script.requests[1][0]["queries"] == ["q"]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://user:pw@host", "http://a b", ""]
)
def test_a_wrong_address_is_named(url):
    with pytest.raises(EnvironmentSetupError, match=r"environment\.retrieval: .*http://host:port"):
        connect(url)


def test_a_missing_server_or_token_is_one_clear_error(serve):
    with pytest.raises(EnvironmentSetupError, match="obm serve"):
        connect(f"http://127.0.0.1:{free_port()}")
    url = serve(make_app(load_text_index(), None, token="open sesame"))
    with pytest.raises(EnvironmentSetupError, match="OBM_SEARCH_TOKEN"):
        connect(url)
    assert connect(url, token="open sesame")[0].search(["capital of Mali"], 1)[0]


def test_the_setting_takes_the_tools_to_the_server(atlas_url):
    from configs.schema import load_config, shipped_config
    from train.worlds import load_environment

    overrides = [f"environment.retrieval={atlas_url}", "environment.top_k_text=1"]
    environment = load_environment(load_config(shipped_config("demo"), overrides))
    episode = environment.start({"question": "q"})
    assert isinstance(environment.text_index, RemoteTextIndex)
    assert text_search(episode, "capital of Mali").hits == ["ml/government"]
    assert environment.text_index.server.timeout_s == episode.timeout_s


def test_a_replay_has_the_tools_of_the_run_that_was_recorded(serve, tmp_path):
    from configs.schema import load_config, shipped_config
    from train.worlds import load_environment

    def load(url, mode):
        overrides = {"retrieval": url, "cache": tmp_path, "cache_mode": mode}
        settings = [f"environment.{name}={value}" for name, value in overrides.items()]
        environment = load_environment(load_config(shipped_config("demo"), settings))
        return environment.text_index is not None, environment.image_index is not None

    url = serve(make_app(load_text_index(), None))
    assert load(url, "read") == load(url, "offline") == (True, False)
    cache = ResultCache(tmp_path)
    cache.delete([record.question.key for record in cache.records()])
    assert load(url, "offline") == (True, True)  # a cache that does not say it


def test_parallel_ranks_lose_nothing(atlas_url):
    """Eight clients, forty queries each, at once: every answer is the right one."""
    expected = dict(zip(QUERIES, load_text_index().search(QUERIES, 2), strict=True))
    barrier = threading.Barrier(8)

    def rank(number):
        text, _ = connect(atlas_url)
        barrier.wait()
        asked = [QUERIES[(number + i) % len(QUERIES)] for i in range(40)]
        return all(text.search([query], 2)[0] == expected[query] for query in asked)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(rank, range(8)))
