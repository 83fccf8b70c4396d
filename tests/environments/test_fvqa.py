"""FVQA's pickled image searches: read without running anything that they hold."""

import io
import os
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from environments.cache import CacheError, ResultCache
from environments.cached import CachedIndex
from environments.fvqa import (
    PICTURES,
    TITLES,
    DroppedPicture,
    import_fvqa,
    read_fvqa,
    read_plain_pickle,
)

IDENTITY = {"provider": "serpapi"}
ENTRIES = {
    "fvqa_train_0": {TITLES: ["Belarus", "Flag shop"], PICTURES: ["https://t.org/1.jpg", ""]},
    "fvqa_train_1": {TITLES: ["Mali"], PICTURES: []},
    "fvqa_train_9": {TITLES: ["No question"], PICTURES: []},
}


def read(content):
    return read_plain_pickle(io.BytesIO(content))


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    | st.tuples(inner, inner),
    max_leaves=8,
)  # fmt: skip


@given(PLAIN, st.sampled_from(range(pickle.HIGHEST_PROTOCOL + 1)))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    content = pickle.dumps(value, protocol)
    if b"_codecs" in content or b"builtins" in content or b"__builtin__" in content:
        return  # old protocols write bytes as a call of a function
    assert read(content) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_a_program_is_refused_and_nothing_is_run(protocol, tmp_path):
    trace = tmp_path / "trace"
    for evil in [
        Evil(os.system, f"touch {trace}"),
        Evil(os.mkdir, str(trace)),
        Evil(eval, f"open({str(trace)!r}, 'w')"),
        Evil(exec, f"open({str(trace)!r}, 'w')"),
        Evil(getattr, "x", "upper"),
        Evil(__import__, "os"),
    ]:
        content = pickle.dumps({"fvqa_train_0": {TITLES: [evil], PICTURES: []}}, protocol)
        with pytest.raises(CacheError, match="refused"):
            read(content)
        assert not trace.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
        ("subprocess", "Popen"), ("PIL", "Image"), ("PIL.Image", "open"), ("PIL.Image", "open.x"),
        ("PIL.Image.Image", "open"), ("PIL.ImageShow", "register"), ("PIL.Image", "os"),
        ("xPIL.Image", "Image"), ("numpy", "ndarray"), ("collections", "OrderedDict"),
    ],
)  # fmt: skip
def test_no_class_but_pictures_is_found(module, name):
    for stream in (
        f"c{module}\n{name}\n.".encode(),
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
        + b"\x93.",
    ):  # fmt: skip
        with pytest.raises(CacheError, match="wants to run"):
            read(stream)


@pytest.mark.parametrize(
    "stream",
    [
        b"(S'x'\nios\nsystem\n.",  # INST
        b"(cPIL.Image\nImage\nS'x'\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"P1\n.",  # PERSID
        b"\x80\x04\x96" + struct.pack("<Q", 2**62) + b".",  # a byte array of 4 exabytes
        b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",  # memo number 2 billion
        b"]p99999999999\n.",
        b"\x80\x02}.x"[:2],
        b"",
        b"no pickle",
        b"\x80\xff.",
        b"(" * 100,
        b"cPIL.Image\nImage\n(K\x01e.",  # append to a class
    ],
)
def test_strange_streams_are_refused(stream):
    with pytest.raises(CacheError):
        read(stream)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_plain(content):
    try:
        value = read(content)
    except CacheError:
        return
    assert isinstance(
        value, None.__class__ | bool | int | float | str | bytes | bytearray | list | tuple | dict
        | set | frozenset | DroppedPicture,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "none"])
def test_pictures_in_a_pickle_become_nothing(protocol, kind):
    picture = Image.new("RGB", (4, 4), "red")
    if kind != "none":
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        picture = Image.open(buffer)
        picture.load()
    content = pickle.dumps({"a": [picture, "b"]}, protocol)
    value = read(content)
    assert isinstance(value["a"][0], DroppedPicture)
    assert value["a"][1] == "b"


def test_entries_are_titles_and_urls(tmp_path):
    picture = Image.new("RGB", (4, 4))
    content = {"x": {TITLES: ["A", None, "C"], PICTURES: ["https://a.org/1.jpg", picture]}}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    assert read_fvqa(tmp_path / "x.pkl") == {
        "x": [("A", "https://a.org/1.jpg"), ("", ""), ("C", "")]
    }


@pytest.mark.parametrize("content", [[], 3, {"x": []}, {"x": {}}, {"x": {TITLES: 3, PICTURES: []}}])
def test_another_pickle_is_no_image_search_cache(content, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(CacheError, match="no image-search cache of FVQA"):
        read_fvqa(tmp_path / "x.pkl")


@pytest.fixture
def files(tmp_path):
    """The pickle and the questions, with a red and a blue picture."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "cache.pkl").write_bytes(pickle.dumps(ENTRIES))
    rows = []
    for name, colour in (("fvqa_train_0", "red"), ("fvqa_train_1", "blue"), ("fvqa_x", "red")):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
        rows.append({"data_id": name, "images": [{"bytes": buffer.getvalue()}], "prompt": "?"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "questions.parquet")
    return tmp_path / "cache.pkl", tmp_path / "questions.parquet"


def test_published_searches_answer_offline_for_the_questions_picture(files, tmp_path):
    cache = ResultCache(tmp_path / "cache")
    counts = import_fvqa(cache, *files, IDENTITY, k=3)
    assert counts == {"records": 2, "kept": 0, "without_question": 1}
    offline = CachedIndex(
        None, ResultCache(tmp_path / "cache", "offline"), "image_search", IDENTITY
    )
    (hits,) = offline.search([Image.new("RGB", (8, 8), "red")], 3)
    assert [(hit.id, hit.title) for hit in hits] == [
        ("fvqa_train_0:1", "Belarus"), ("fvqa_train_0:2", "Flag shop"),
    ]  # fmt: skip
    with pytest.raises(RuntimeError):
        offline.search([Image.new("RGB", (8, 8), "green")], 3)


def test_small_pictures_are_fetched_where_they_are_wanted_and_still_there(files, tmp_path):
    def fetch(url):
        if url.endswith("1.jpg"):
            return Image.new("RGB", (2, 2), "red")
        raise RuntimeError("gone")

    cache = ResultCache(tmp_path / "cache")
    import_fvqa(cache, *files, IDENTITY, k=3, fetch=fetch)
    index = CachedIndex(None, ResultCache(tmp_path / "cache", "offline"), "image_search", IDENTITY)
    (hits,) = index.search([Image.new("RGB", (8, 8), "red")], 3)
    assert [hit.image is not None for hit in hits] == [True, False]


def test_a_file_that_holds_no_questions_is_named(files, tmp_path):
    with pytest.raises(CacheError, match=r"cache\.pkl: not the questions"):
        import_fvqa(ResultCache(tmp_path / "cache"), files[0], files[0], IDENTITY, k=3)
