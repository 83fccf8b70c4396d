"""FVQA's pickled image searches: read without running anything that they hold."""

import io
import os
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from environments.benchmarks.pictures import decode_picture
from environments.cache import CacheError, ResultCache
from environments.cached import CachedIndex
from environments.content import picture_hash
from environments.fvqa import (
    PICTURES,
    TITLES,
    DroppedPicture,
    hash_pictures,
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
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps(ENTRIES))
    red, blue = (encoded(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue"))
    pictures = {"fvqa_train_0": red, "fvqa_train_1": blue, "fvqa_x": red}
    write_questions(tmp_path / "questions.parquet", pictures)
    return tmp_path / "cache.pkl", tmp_path / "questions.parquet"


def encoded(picture, **settings):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **settings)
    return buffer.getvalue()


def write_questions(path, pictures):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"data_id": name, "images": [{"bytes": content}], "prompt": "?"}
        for name, content in pictures.items()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def take_over(cache, pickled, questions, **settings):
    entries = read_fvqa(pickled)
    return import_fvqa(
        cache, entries, hash_pictures(questions, entries), IDENTITY, k=3, **settings
    )  # fmt: skip


def test_published_searches_answer_offline_for_the_questions_picture(files, tmp_path):
    cache = ResultCache(tmp_path / "cache")
    counts = take_over(cache, *files)
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
    take_over(cache, *files, fetch=fetch)
    index = CachedIndex(None, ResultCache(tmp_path / "cache", "offline"), "image_search", IDENTITY)
    (hits,) = index.search([Image.new("RGB", (8, 8), "red")], 3)
    assert [hit.image is not None for hit in hits] == [True, False]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_picture_has_the_hash_of_the_one_that_a_run_searches_with(mode, tmp_path):
    picture = Image.effect_mandelbrot((9, 7), (-2, -1.5, 1, 1.5), 50).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    content = encoded(picture, exif=exif)
    write_questions(tmp_path / "q.parquet", {"a": content})
    asked = decode_picture(content, tmp_path)
    assert asked.size == (7, 9)
    assert hash_pictures(tmp_path / "q.parquet", {"a"}) == [("a", picture_hash(asked))]


def test_a_broken_picture_is_named_by_its_row(tmp_path):
    whole = encoded(Image.effect_noise((64, 64), 50))
    write_questions(tmp_path / "q.parquet", {"a": whole, "b": whole[:200], "c": b"none"})
    with pytest.raises(CacheError, match=r"q\.parquet, row 2, column 'images': a broken picture"):
        hash_pictures(tmp_path / "q.parquet", {"a", "b"})
    assert len(hash_pictures(tmp_path / "q.parquet", {"a"})) == 1


def test_a_file_that_holds_no_questions_is_named(files):
    with pytest.raises(CacheError, match=r"cache\.pkl: not the questions"):
        hash_pictures(files[0], ENTRIES)
