"""The result cache: its modes, its keys, many processes at once, and what is never kept."""

import json
import multiprocessing
import sqlite3
import threading
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from environments.cache import CacheError, CacheMissError, Question, ResultCache
from environments.cached import CachedIndex, CachedReader, StoredRefusalError, identity_of
from environments.content import encode_png, normalised, picture_hash, write_whole
from environments.episode import SearchEnvironment
from environments.results import Hit, Page
from environments.retrieval import BM25TextIndex, ColourImageIndex
from environments.tools import BadCall, text_search


class Engine:
    """A search engine whose answers change with every call."""

    identity = {"provider": "engine", "country": "us"}

    def __init__(self, image=None, error=None, empty=False):
        self.calls, self.image, self.error, self.empty = [], image, error, empty

    def search(self, queries, k):
        self.calls.append((list(queries), k))
        if self.error:
            raise self.error
        if self.empty:
            return [[] for _ in queries]
        n = len(self.calls)
        return [
            [Hit(f"{n}-{i}", f"{q} {n}", "text", 1 / (i + 3), self.image, "https://a.org/")
             for i in range(k)]
            for q in queries
        ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def cached(folder, engine, mode="read", tool="text_search"):
    return CachedIndex(engine, ResultCache(folder, mode), tool)


# ---------------------------------------------------------------- modes


def test_read_asks_once_and_answers_the_same_ever_after(folder):
    engine = Engine()
    index = cached(folder, engine)
    first = index.search(["a"], 2)
    assert index.search(["a"], 2) == first
    assert cached(folder, engine).search(["a"], 2) == first
    assert engine.calls == [(["a"], 2)]
    assert index.cache.counts == {"misses": 1, "stored": 1, "changed": 0, "hits": 1}
    assert first[0][0] == Hit("1-0", "a 1", "text", 1 / 3, None, "https://a.org/")


def test_offline_answers_from_the_cache_and_never_asks(folder):
    first = cached(folder, Engine()).search(["a"], 2)
    dead = Engine(error=ConnectionError("down"))
    index = cached(folder, dead, "offline")
    assert index.search(["a"], 2) == first
    question = Question("text_search", index._provider, "b", 2)
    with pytest.raises(CacheMissError, match=question.key) as caught:
        index.search(["b"], 2)
    assert "text_search of 'b'" in str(caught.value)
    assert dead.calls == []


def test_an_offline_miss_is_a_fault_of_infrastructure_whose_log_names_the_key(folder, caplog):
    cached(folder, Engine()).search(["a"], 2)
    index = cached(folder, Engine(), "offline")
    episode = SearchEnvironment(index, None, retries=3).start({"question": "q"})
    result = text_search(episode, "b")
    assert (result.fault, result.is_error, result.retries) == ("infrastructure", True, 0)
    assert "CacheMissError" in result.text
    assert Question("text_search", index._provider, "b", 2).key in caplog.text


def test_write_always_asks_and_keeps_what_was_there(folder):
    first = cached(folder, Engine()).search(["a"], 1)
    engine = Engine()
    engine.calls.append("an earlier call")
    index = cached(folder, engine, "write")
    fresh = index.search(["a"], 1)
    assert fresh != first
    index.search(["a"], 1)
    index.search(["b"], 1)
    assert len(engine.calls) == 4
    assert index.cache.counts["changed"] == 2  # what the service says now is another answer
    assert index.cache.counts["stored"] == 1
    assert cached(folder, Engine(), "offline").search(["a"], 1) == first


def test_refresh_asks_once_more_and_replaces(folder):
    first = cached(folder, Engine()).search(["a"], 1)
    engine = Engine()
    engine.calls.append("an earlier call")
    index = cached(folder, engine, "refresh")
    fresh = index.search(["a"], 1)
    assert fresh != first
    assert index.search(["a"], 1) == fresh  # one run is of one mind
    assert len(engine.calls) == 2
    assert cached(folder, Engine(), "offline").search(["a"], 1) == fresh


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("error", [RuntimeError("down"), TimeoutError(), MemoryError()])
def test_an_error_of_infrastructure_is_not_kept(error, folder):
    engine = Engine(error=error)
    index = cached(folder, engine)
    with pytest.raises(type(error)):
        index.search(["a"], 1)
    assert list(index.cache.records()) == []
    engine.error = None
    assert index.search(["a"], 1)[0]
    assert index.cache.counts["errors"] == 1


class Gappy(Engine):
    """Of the first answer one hit lacks its page; the later ones are whole."""

    def search(self, queries, k):
        found = super().search(queries, k)
        if len(self.calls) == 1:
            found[0][-1] = replace(found[0][-1], is_partial=True)
        return found


@pytest.mark.parametrize("mode", ["read", "write", "refresh"])
def test_what_lacks_a_part_is_answered_and_not_kept(mode, folder):
    index = cached(folder, Gappy(), mode)
    first, other = index.search(["a", "b"], 2)
    assert [hit.title for hit in (*first, *other)] == ["a 1", "a 1", "b 1", "b 1"]
    assert [record.question.query for record in index.cache.records()] == ["b"]
    (whole,) = index.search(["a"], 2)
    assert [hit.title for hit in whole] == ["a 2", "a 2"]
    assert cached(folder, Engine(), "offline").search(["a", "b"], 2) == [whole, other]


def test_what_lacks_a_part_does_not_replace_what_is_whole(folder):
    whole = cached(folder, Engine()).search(["a"], 2)
    cached(folder, Gappy(), "refresh").search(["a"], 2)
    assert cached(folder, Engine(), "offline").search(["a"], 2) == whole


@pytest.mark.parametrize("sent", [None, [], [None], [[None]], [["text"]], [[], []]])
def test_an_answer_of_the_wrong_shape_is_not_kept(sent, folder):
    engine = Engine()
    engine.search = lambda queries, k: sent
    index = cached(folder, engine)
    with pytest.raises((TypeError, AttributeError, ValueError)):
        index.search(["a"], 1)
    assert list(index.cache.records()) == []
    assert index.cache._running == {}


def test_nothing_found_is_kept(folder):
    assert cached(folder, Engine(empty=True)).search(["a"], 1) == [[]]
    assert cached(folder, Engine(), "offline").search(["a"], 1) == [[]]


def test_odd_fields_come_back_as_the_promised_types(folder):
    engine = Engine()
    engine.search = lambda queries, k: [[Hit(7, None, None, 1)]]
    hits = cached(folder, engine).search(["a"], 1)
    assert hits == [[Hit("7", "", "", 1.0)]] == cached(folder, engine, "offline").search(["a"], 1)


@given(st.lists(st.tuples(st.text(), st.text(), st.floats(allow_nan=False)), max_size=4))
def test_any_hits_come_back_exactly(tmp_path_factory, rows):
    engine = Engine()
    engine.search = lambda queries, k: [[Hit(i, t, t + i, s, None, i) for i, t, s in rows]]
    folder = tmp_path_factory.mktemp("cache")
    first = cached(folder, engine).search(["a"], 4)
    assert first == engine.search(["a"], 4)
    assert cached(folder, engine, "offline").search(["a"], 4) == first


# ---------------------------------------------------------------- keys


def test_tool_provider_query_and_k_make_the_key():
    base = Question("text_search", "{}", "a", 2)
    others = [
        Question("visit", "{}", "a", 2),
        Question("text_search", '{"country":"de"}', "a", 2),
        Question("text_search", "{}", "b", 2),
        Question("text_search", "{}", "a", 3),
    ]
    assert len({question.key for question in [base, *others]}) == 5
    assert base.key == Question("text_search", "{}", "a", 2).key


@pytest.mark.parametrize("query", ["  capital   of\tFrance ", "capital of\nFrance"])
def test_white_space_makes_no_other_query_and_the_engine_sees_what_the_key_says(query, folder):
    engine = Engine()
    index = cached(folder, engine)
    index.search(["capital of France"], 1)
    index.search([query], 1)
    assert engine.calls == [(["capital of France"], 1)]


def test_composed_and_decomposed_letters_are_one_and_case_is_not():
    assert normalised("Zu\u0308rich") == normalised("Z\u00fcrich")
    assert normalised("Paris") != normalised("paris")


def test_equal_queries_of_one_call_are_asked_once_and_all_misses_together(folder):
    engine = Engine()
    index = cached(folder, engine)
    index.search(["b"], 1)
    hits = index.search(["a", "b", "a", "c"], 1)
    assert engine.calls == [(["b"], 1), (["a", "c"], 1)]
    assert [h[0].title for h in hits] == ["a 2", "b 1", "a 2", "c 2"]


def test_a_picture_is_its_pixels_not_its_file():
    picture = Image.new("RGB", (6, 4), "red")
    same = picture.copy()
    same.info["comment"] = b"from elsewhere"
    assert picture_hash(picture) == picture_hash(same)
    assert picture_hash(picture) != picture_hash(picture.crop((0, 0, 3, 4)))
    assert picture_hash(picture) != picture_hash(picture.transpose(Image.Transpose.ROTATE_90))
    assert picture_hash(picture.convert("P")) == picture_hash(picture.convert("RGBA"))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"):
        assert len(picture_hash(Image.new(mode, (3, 3)))) == 64


def test_identities_tell_back_ends_apart():
    one = BM25TextIndex(["1"], ["Mali"], ["Bamako ."])
    two = BM25TextIndex(["1"], ["Mali"], ["Timbuktu ."])
    assert identity_of(one) == identity_of(BM25TextIndex(["1"], ["Mali"], ["Bamako ."]))
    assert identity_of(one) != identity_of(two)
    assert identity_of(one) != identity_of(BM25TextIndex(["1"], ["Mali"], ["Bamako ."], None))
    views = np.zeros((1, 380), np.float32)
    plain, turned = (
        ColourImageIndex(["1"], ["Mali"], views, turns=turns) for turns in (False, True)
    )
    assert identity_of(plain) == identity_of(ColourImageIndex(["1"], ["Mali"], views.copy()))
    assert identity_of(plain) != identity_of(ColourImageIndex(["1"], ["Mali"], views + 1))
    assert identity_of(plain) != identity_of(turned)
    assert identity_of(Engine()) == Engine.identity
    with pytest.raises(CacheError, match="identity"):
        identity_of(object())


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_pictures_come_back_pixel_by_pixel_and_alike_from_engine_and_cache(mode, folder):
    picture = Image.effect_mandelbrot((9, 7), (-2, -1.5, 1, 1.5), 50).convert(mode)
    first = cached(folder, Engine(picture)).search(["a"], 1)[0][0].image
    again = cached(folder, Engine(), "offline").search(["a"], 1)[0][0].image
    assert (first.mode, first.size, first.tobytes()) == (again.mode, again.size, again.tobytes())
    if mode in ("RGB", "L", "RGBA"):
        assert (first.mode, first.tobytes()) == (mode, picture.tobytes())
    assert first.info == {}


def test_equal_pictures_are_one_file_that_is_named_by_its_hash(folder):
    index = cached(folder, Engine(Image.new("RGB", (3, 3), "red")))
    index.search(["a", "b"], 3)
    (file,) = (folder / "images").rglob("*.png")
    assert file.parent.name == file.stem[:2]
    assert not list(folder.rglob(".part-*"))


def test_a_lost_picture_is_fetched_again_and_is_a_miss_offline(folder):
    engine = Engine(Image.new("RGB", (3, 3), "red"))
    index = cached(folder, engine)
    index.search(["a"], 1)
    (file,) = (folder / "images").rglob("*.png")
    file.unlink()
    with pytest.raises(CacheMissError):
        cached(folder, engine, "offline").search(["a"], 1)
    (hit,) = index.search(["a"], 1)[0]
    assert hit.image.getpixel((0, 0)) == (255, 0, 0)
    assert len(engine.calls) == 2
    assert cached(folder, engine, "offline").search(["a"], 1)[0][0].image is not None


def test_a_damaged_picture_is_not_shown(folder):
    index = cached(folder, Engine(Image.new("RGB", (3, 3), "red")))
    index.search(["a"], 1)
    (file,) = (folder / "images").rglob("*.png")
    file.write_bytes(encode_png(Image.new("RGB", (3, 3), "blue")))
    with pytest.raises(CacheMissError, match="damaged"):
        index.search(["a"], 1)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "x" / "y.png", b"abc")
    assert list((tmp_path / "x").iterdir()) == []


# ---------------------------------------------------------------- pages


class Reader:
    """Reads pages and refuses some."""

    identity = {"reader": "test"}

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def read(self, url, question):
        self.calls.append((url, question))
        if self.error:
            raise self.error
        return Page("Title", f"{question}?", url)


def test_pages_and_refusals_are_kept_and_troubles_are_not(folder):
    page = CachedReader(Reader(), ResultCache(folder)).read("https://a.org", "who")
    refusing = CachedReader(Reader(BadCall("Only public pages.")), ResultCache(folder))
    for _ in range(2):
        with pytest.raises(StoredRefusalError, match="Only public pages") as caught:
            refusing.read("http://10.0.0.1", "who")
        assert caught.value.fault == "model"
    assert len(refusing.reader.calls) == 1
    failing = CachedReader(Reader(TimeoutError()), ResultCache(folder))
    with pytest.raises(TimeoutError):
        failing.read("https://b.org", "who")

    replay = CachedReader(Reader(AssertionError("asked")), ResultCache(folder, "offline"))
    assert replay.read("https://a.org", "who") == page == Page("Title", "who?", "https://a.org")
    with pytest.raises(StoredRefusalError):
        replay.read("http://10.0.0.1", "who")
    with pytest.raises(CacheMissError):
        replay.read("https://b.org", "who")
    with pytest.raises(CacheMissError):
        replay.read("https://a.org", "when")


# ---------------------------------------------------------------- many at once


def test_equal_questions_of_many_threads_are_asked_once(folder):
    started, release = threading.Event(), threading.Event()

    class Slow(Engine):
        def search(self, queries, k):
            started.set()
            release.wait(10)
            return super().search(queries, k)

    engine = Slow()
    index = cached(folder, engine)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(index.search(["a"], 1))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    started.wait(10)
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert all(hits == found[0] for hits in found)
    assert len(engine.calls) == 1


def test_a_failure_reaches_every_thread_that_waited_and_the_next_call_asks_anew(
    folder, monkeypatch
):
    gate, is_followed = threading.Barrier(2, timeout=10), threading.Event()

    class Watched(Future):
        def result(self, timeout=None):
            is_followed.set()
            return super().result(timeout)

    class Failing(Engine):
        def search(self, queries, k):
            gate.wait()
            assert is_followed.wait(10)
            raise ConnectionError("down")

    monkeypatch.setattr("environments.cache.Future", Watched)
    index = cached(folder, Failing())
    errors = []

    def ask():
        try:
            index.search(["a"], 1)
        except ConnectionError as error:
            errors.append(error)

    leader = threading.Thread(target=ask)
    leader.start()
    gate.wait()
    follower = threading.Thread(target=ask)
    follower.start()
    leader.join(10)
    follower.join(10)
    assert len(errors) == 2
    index.index = Engine()
    assert index.search(["a"], 1)[0]


def test_an_answer_that_is_not_kept_reaches_every_thread_that_waited(folder, monkeypatch):
    gate, is_followed = threading.Barrier(2, timeout=10), threading.Event()

    class Watched(Future):
        def result(self, timeout=None):
            is_followed.set()
            return super().result(timeout)

    class Slow(Gappy):
        def search(self, queries, k):
            gate.wait()
            assert is_followed.wait(10)
            return super().search(queries, k)

    monkeypatch.setattr("environments.cache.Future", Watched)
    engine, found = Slow(), []
    index = cached(folder, engine)
    threads = [
        threading.Thread(target=lambda: found.append(index.search(["a"], 1))) for _ in range(2)
    ]
    threads[0].start()
    gate.wait()
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert [hits[0][0].title for hits in found] == ["a 1", "a 1"]
    assert (len(engine.calls), list(index.cache.records())) == (1, [])


def test_a_hanging_twin_holds_nobody_up_for_ever(folder, monkeypatch):
    monkeypatch.setattr("environments.cache.TWIN_TIMEOUT_S", 0.1)
    release = threading.Event()

    class Hanging(Engine):
        def search(self, queries, k):
            if threading.current_thread() is not threading.main_thread():
                release.wait(10)
            return super().search(queries, k)

    index = cached(folder, Hanging())
    hung = threading.Thread(target=index.search, args=(["a"], 1), daemon=True)
    hung.start()
    while not index.cache._running:
        pass
    hits = index.search(["a"], 1)
    release.set()
    hung.join(10)
    assert hits[0][0].title == "a 1"
    assert index.search(["a"], 1) == hits


def _work(folder, number, queue):
    """A process that asks the same queries as all others; every process has other answers."""

    class Numbered(Engine):
        def search(self, queries, k):
            picture = Image.new("RGB", (4, 4), (number, 0, 0))
            return [[Hit(f"{number}", q, "x" * 2000, 1.0, picture)] for q in queries]

    index = CachedIndex(Numbered(), ResultCache(folder), "text_search")
    seen = [index.search([f"q{i}"], 1)[0][0] for i in range(40)]
    queue.put([(hit.id, hit.image.getpixel((0, 0))[0]) for hit in seen])


@pytest.mark.slow
def test_processes_that_start_together_all_give_the_answers_that_are_stored(folder):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_work, args=(folder, n, queue)) for n in range(6)]
    for worker in workers:
        worker.start()
    seen = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert all(answers == seen[0] for answers in seen)
    stored = [h[0] for h in cached(folder, Engine(), "offline").search(
        [f"q{i}" for i in range(40)], 1)]  # fmt: skip
    assert [(hit.id, hit.image.getpixel((0, 0))[0]) for hit in stored] == seen[0]


def test_a_writer_that_holds_the_database_is_waited_for(folder):
    index = cached(folder, Engine())
    other = sqlite3.connect(
        folder / "results.sqlite", isolation_level=None, check_same_thread=False
    )
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, lambda: other.execute("COMMIT")).start()
    assert index.search(["a"], 1)[0]
    assert list(index.cache.records())


# ---------------------------------------------------------------- folders


def test_a_folder_that_cannot_be_used_is_named(folder, tmp_path):
    with pytest.raises(CacheError, match="no cache to replay"):
        ResultCache(folder, "offline")
    assert not folder.exists()
    with pytest.raises(CacheError, match="choose among read"):
        ResultCache(folder, "sometimes")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="no usable cache folder"):
        ResultCache(tmp_path / "file")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "results.sqlite").write_text("this is no database " * 100)
    with pytest.raises(CacheError, match="broken"):
        ResultCache(broken)


def test_a_cache_of_another_version_is_refused(folder):
    ResultCache(folder).close()
    with sqlite3.connect(folder / "results.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(CacheError, match="another version"):
        ResultCache(folder)


def test_a_stored_value_is_plain_json(folder):
    index = cached(folder, Engine())
    index.search(["Zürich"], 1)
    (record,) = index.cache.records()
    assert record.question.query == "Zürich"
    assert json.loads(record.question.provider) == Engine.identity
    assert json.loads(record.value)["hits"][0]["title"] == "Zürich 1"
    assert record.value.isascii()
