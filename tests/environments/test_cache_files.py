"""Export and import of a cache, and what an import does not believe."""

import gzip
import io
import json
import os
import pickle
import tarfile

import pytest
from PIL import Image

from environments.cache import CacheError, Question, Record, ResultCache
from environments.cache_files import (
    ORPHAN_AGE_S,
    cache_stats,
    export_cache,
    import_cache,
    prune_cache,
)
from environments.cached import CachedIndex, CachedReader
from environments.results import Hit, Page
from environments.tools import BadCall

HASH = "a" * 64


class Engine:
    def __init__(self, name="engine"):
        self.identity = {"provider": name}

    def search(self, queries, k):
        picture = Image.new("RGB", (3, 3), "red")
        return [[Hit("1", f"{q} ü", "text", 1 / 3, picture)] if q else [] for q in queries]


class Reader:
    identity = {"reader": "test"}

    def read(self, url, question):
        if "secret" in url:
            raise BadCall("No.")
        return Page("T", question, url)


@pytest.fixture
def cache(tmp_path):
    """Two text searches (one empty), an image search, a page and a refusal."""
    cache = ResultCache(tmp_path / "cache")
    CachedIndex(Engine(), cache, "text_search").search(["a", ""], 2)
    CachedIndex(Engine("lens"), cache, "image_search").search([Image.new("RGB", (5, 5))], 1)
    reader = CachedReader(Reader(), cache)
    reader.read("https://a.org", "who")
    with pytest.raises(RuntimeError):
        reader.read("https://secret.org", "who")
    return cache


def contents(cache):
    return {r.question.key: (r.question, r.value, r.created) for r in cache.records()}


@pytest.mark.parametrize("name", ["out", "out.tar", "out.tar.gz"])
def test_an_export_brings_everything_to_another_folder(name, cache, tmp_path):
    assert export_cache(cache, tmp_path / name) == {"records": 5, "images": 1}
    other = ResultCache(tmp_path / "other")
    assert import_cache(other, tmp_path / name) == {"records": 5, "kept": 0, "images": 1}
    assert contents(other) == contents(cache)
    offline = ResultCache(tmp_path / "other", "offline")
    (hits,) = CachedIndex(None, offline, "text_search", {"provider": "engine"}).search(["a"], 2)
    assert (hits[0].title, hits[0].score) == ("a ü", 1 / 3)
    assert hits[0].image.getpixel((1, 1)) == (255, 0, 0)


def test_two_exports_of_one_cache_are_equal(cache, tmp_path):
    export_cache(cache, tmp_path / "one.tar")
    export_cache(cache, tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_an_export_overwrites_nothing(cache, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CacheError, match="exists"):
        export_cache(cache, tmp_path / "out")


@pytest.mark.parametrize("name", ["out", "out.tar", "out.tar.gz"])
def test_an_export_that_fails_leaves_nothing(name, cache, tmp_path):
    (image,) = (cache.folder / "images").rglob("*.png")
    cache.save_image(Image.new("RGB", (2, 2), "blue"))
    image.unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError, match="lacks pictures"):
        export_cache(cache, tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("suffix", ["", ".tar", ".tar.gz"])
@pytest.mark.parametrize("name", ["/proc/x", "FILE/x", "x" * 300, "FILE/deep/x"])
def test_a_target_that_cannot_be_written_is_named(name, suffix, cache, tmp_path):
    (tmp_path / "file").write_text("mine")
    target = tmp_path / (name.replace("FILE", "file") + suffix)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError, match=r"cannot be written \(.*\); name another one"):
        export_cache(cache, target)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_import_keeps_what_is_there_unless_told_otherwise(cache, tmp_path):
    export_cache(cache, tmp_path / "out")
    file = tmp_path / "out" / "results.jsonl"
    file.write_text(file.read_text().replace('"title":"a \\u00fc"', '"title":"changed"'))
    before = contents(cache)
    assert import_cache(cache, tmp_path / "out") == {"records": 0, "kept": 5, "images": 1}
    assert contents(cache) == before
    import_cache(cache, tmp_path / "out", replace=True)
    assert "changed" in json.dumps([value for _, value, _ in contents(cache).values()])


# ---------------------------------------------------------------- distrust


def tar_with(path, *members):
    """A tar file of (name, content) or TarInfo members."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        ("../outside.png", b"x"),
        ("/tmp/outside.png", b"x"),
        ("images/../../outside.png", b"x"),
        (f"images/aa/../../../{HASH}.png", b"x"),
        (f"images/bb/{HASH}.png", b"x"),
        (f"images/aa/{HASH}.png", b"content of another hash"),
        (f"images/aa/{HASH.upper()}.png", b"x"),
        (f"images/aa/{HASH}.png.pkl", b"x"),
        ("results.sqlite", b"x"),
        ("evil.pkl", pickle.dumps({})),
        link("results.jsonl", "/etc/passwd", tarfile.SYMTYPE),
        link(f"images/aa/{HASH}.png", "../../../x", tarfile.LNKTYPE),
        link("fifo", "", tarfile.FIFOTYPE),
        link("device", "", tarfile.CHRTYPE),
    ],
)
def test_a_tar_with_anything_else_in_it_is_refused_whole(member, cache, tmp_path):
    export_cache(cache, tmp_path / "out")
    records = (tmp_path / "out" / "results.jsonl").read_bytes()
    (image,) = (tmp_path / "out").rglob("*.png")
    good = [("results.jsonl", records), (f"images/{image.parent.name}/{image.name}",
            image.read_bytes())]  # fmt: skip
    source = tar_with(tmp_path / "evil.tar", *good, member)
    other = ResultCache(tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError, match=r"evil\.tar"):
        import_cache(other, source)
    assert contents(other) == {}
    assert sorted(tmp_path.rglob("*")) == before


def test_links_in_a_folder_are_refused(cache, tmp_path):
    export_cache(cache, tmp_path / "out")
    os.symlink("/etc/passwd", tmp_path / "out" / "images" / "link.png")
    with pytest.raises(CacheError, match="no plain file"):
        import_cache(ResultCache(tmp_path / "other"), tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"tool": "shell"},
        {"provider": "serper"},
        {"query": 3},
        {"k": "2"},
        {"k": True},
        {"k": -5},
        {"tool": "text_search", "k": 0},
        {"k": 10**21},
        {"k": 2**31},
        {"created": None},
        {"created": True},
        {"created": float("nan")},
        {"created": float("inf")},
        {"created": -1e300},
        {"created": 1e300},
        {"created": 10**400},
        {"created": -1},
        {"query": "\ud800"},
        {"value": {}},
        {"value": {"hits": {}}},
        {"value": {"hits": [{}]}},
        {"value": {"hits": [{"id": "1", "title": "t", "text": "", "url": "", "score": 1}]}},
        {"value": {"hits": [{"id": "1", "title": "t", "text": "", "url": "", "score": "1",
                             "image": None}]}},
        {"value": {"hits": [{"id": "1", "title": "t", "text": "", "url": "", "score": 10**400,
                             "image": None}]}},
        {"value": {"hits": [{"id": "1", "title": "t", "text": "", "url": "", "image": None,
                             "score": float("nan")}]}},
        {"value": {"hits": [{"id": "1", "title": "t", "text": "", "url": "", "score": 1,
                             "image": "../../etc/passwd"}]}},
        {"value": {"hits": [{"id": "1", "title": None, "text": "", "url": "", "score": 1,
                             "image": None}]}},
        {"value": {"page": {"title": "t"}}},
        {"value": {"refused": 1}},
        {"value": {"hits": [], "page": {}}},
        {"extra": 1},
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_refused_with_its_line(change, cache, tmp_path):
    export_cache(cache, tmp_path / "out")
    file = tmp_path / "out" / "results.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    file.write_text("\n".join(lines))
    other = ResultCache(tmp_path / "other")
    with pytest.raises(CacheError, match="line 2"):
        import_cache(other, tmp_path / "out")
    assert contents(other) == {}


def test_the_dates_and_numbers_at_the_edge_are_taken(cache, tmp_path):
    export_cache(cache, tmp_path / "out")
    file = tmp_path / "out" / "results.jsonl"
    row = next(r for r in map(json.loads, file.open()) if r["tool"] == "text_search")
    edges = [{"created": 0}, {"created": 253402300799, "k": 2**31 - 1}, {"k": 1}]
    rows = [{**row, "query": str(i), **edge} for i, edge in enumerate(edges)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = ResultCache(tmp_path / "other")
    assert import_cache(other, tmp_path / "out")["records"] == 3


def test_records_are_stored_all_or_none(cache, tmp_path):
    export_cache(cache, tmp_path / "out")
    other = ResultCache(tmp_path / "other")
    records = list(cache.records())
    question = Question("visit", "{}", "q", 10**21)
    with pytest.raises(OverflowError):
        other.put_all([*records, Record(question, "{}", 0.0)], replace=True)
    assert contents(other) == {}
    # the cache is not left in the middle of a transaction
    assert other.put_all(records, replace=False) == 5
    assert other.put_all(records, replace=False) == 0
    assert other.put_all(records, replace=True) == 5


def test_a_cache_that_takes_no_more_is_named_and_gets_no_record(cache, tmp_path):
    export_cache(cache, tmp_path / "out")
    other = ResultCache(tmp_path / "other")
    size = other._execute("PRAGMA page_count")[0][0][0]
    other._execute(f"PRAGMA max_page_count = {size}")
    file = tmp_path / "out" / "results.jsonl"
    rows = [json.loads(line) for line in file.open()]
    long = [{**rows[0], "query": f"{i} " * 5000} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + long))
    with pytest.raises(CacheError, match=r"other: cannot be written \(.*full\)"):
        import_cache(other, tmp_path / "out")
    assert contents(other) == {}


def test_a_key_cannot_be_forged(cache, tmp_path):
    # the file has no keys: they follow from what was asked
    export_cache(cache, tmp_path / "out")
    assert "key" not in json.loads((tmp_path / "out" / "results.jsonl").open().readline())


def test_a_picture_that_a_record_shows_must_come_along(cache, tmp_path):
    export_cache(cache, tmp_path / "out")
    (image,) = (tmp_path / "out").rglob("*.png")
    image.unlink()
    with pytest.raises(CacheError, match="lacks the picture"):
        import_cache(ResultCache(tmp_path / "other"), tmp_path / "out")
    assert import_cache(cache, tmp_path / "out")["kept"] == 5  # here it is already


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no tar",
        b"\x1f\x8b broken gzip",
        gzip.compress(bytes(range(256)) * 99)[:-12],
        gzip.compress(b"a" * 9999)[:12] + b"\xff" * 99,
    ],
)
def test_what_is_no_export_is_refused(content, cache, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(CacheError, match="neither a folder nor a tar"):
        import_cache(cache, tmp_path / "x.tar")


def test_broken_xz_is_refused(cache, tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:xz") as tar:
        entry = tarfile.TarInfo("results.jsonl")
        entry.size = 200_000
        tar.addfile(entry, io.BytesIO(b"\n" * entry.size))
    content = bytearray(path.read_bytes())
    content[-20] ^= 0x55  # behind what opening the file reads
    path.write_bytes(content)
    with pytest.raises(CacheError, match="neither a folder nor a tar"):
        import_cache(cache, path)


def test_an_export_without_its_records_is_refused(cache, tmp_path):
    """They stand last: such are a tar file that was cut between two entries, and any folder."""
    export_cache(cache, tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        end = tar.getmember("results.jsonl").offset
    (tmp_path / "x.tar").write_bytes(content[:end])
    (tmp_path / "empty").mkdir()
    for source in ("x.tar", "empty"):
        with pytest.raises(CacheError, match=r"lacks results\.jsonl; name what obm cache export"):
            import_cache(ResultCache(tmp_path / "other"), tmp_path / source)
    assert not list((tmp_path / "other").rglob("*.png"))


# ---------------------------------------------------------------- upkeep


def test_stats_count_by_tool_and_provider(cache):
    rows = {row["tool"]: row for row in cache_stats(cache)}
    assert (rows["text_search"]["records"], rows["text_search"]["empty"]) == (2, 1)
    assert (rows["image_search"]["records"], rows["image_search"]["images"]) == (1, 1)
    assert (rows["visit"]["records"], rows["visit"]["refused"]) == (2, 1)
    assert json.loads(rows["image_search"]["provider"]) == {"provider": "lens"}


def test_prune_drops_the_old_and_the_chosen_and_their_pictures(cache):
    (created,) = {max(r.created for r in cache.records())}
    assert prune_cache(cache) == {"records": 0, "broken": 0, "images": 0}
    assert prune_cache(cache, older_than_s=60, now=created + 30)["records"] == 0
    assert prune_cache(cache, provider="lens")["records"] == 1
    assert prune_cache(cache, provider="lens")["records"] == 0
    counts = prune_cache(cache, older_than_s=60, now=created + ORPHAN_AGE_S + 60)
    assert counts == {"records": 4, "broken": 0, "images": 1}
    assert list(cache.records()) == []
    assert not list((cache.folder / "images").rglob("*.png"))


def test_prune_leaves_young_pictures_whose_record_may_be_on_its_way(cache):
    cache.save_image(Image.new("RGB", (2, 2), "blue"))
    assert prune_cache(cache)["images"] == 0


def test_prune_drops_records_that_lost_their_picture(cache, tmp_path):
    (image,) = (cache.folder / "images").rglob("*.png")
    image.unlink()
    with pytest.raises(CacheError, match="obm cache prune"):
        export_cache(cache, tmp_path / "out")
    assert prune_cache(cache) == {"records": 2, "broken": 2, "images": 0}
    assert export_cache(cache, tmp_path / "again")["records"] == 3
