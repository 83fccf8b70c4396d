"""`obm cache`: carry it, look into it, tidy it up."""

import dataclasses
import io
import json
import pickle

import pytest
from PIL import Image

from environments.cache import ResultCache
from environments.cached import CachedIndex
from environments.results import Hit


class Engine:
    identity = {"provider": "serper"}

    def search(self, queries, k):
        return [[Hit("1", query, "text", 1.0, Image.new("RGB", (2, 2)))] for query in queries]


@pytest.fixture
def folder(tmp_path):
    cache = ResultCache(tmp_path / "cache")
    CachedIndex(Engine(), cache, "text_search").search(["a", "b"], 1)
    cache.close()
    return tmp_path / "cache"


@pytest.fixture
def export(obm, folder):
    """An export beside the cache."""
    obm("cache", "export", folder, f"{folder}-export")


def test_a_cache_goes_from_machine_to_machine(obm, folder, tmp_path):
    code, out, _ = obm("cache", "export", str(folder), str(tmp_path / "x.tar.gz"))
    assert (code, out) == (0, f"2 records and 1 pictures in {tmp_path / 'x.tar.gz'}\n")
    other = str(tmp_path / "other")
    assert obm("cache", "import", other, str(tmp_path / "x.tar.gz"))[1].startswith("2 records")
    _, again, _ = obm("cache", "import", other, str(tmp_path / "x.tar.gz"))
    assert again == "0 records taken over, 2 were there already\n"
    _, stats, _ = obm("cache", "stats", other)
    assert '| text_search | {"provider":"serper"} | 2 | 0 | 0 | 2 |' in stats


def test_prune_says_what_it_dropped(obm, folder):
    assert obm("cache", "prune", str(folder), "--older-than", "1h")[1].startswith("0 records")
    assert obm("cache", "prune", str(folder), "--provider", "serper")[1].startswith("2 records")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "nowhere", "x"], "there is no cache"),
        (["stats", "nowhere"], "there is no cache"),
        (["export", "FOLDER"], "needs a second path"),
        (["import", "FOLDER", "nothing.tar"], "does not exist"),
        (["import", "/etc/passwd/x", "FOLDER-export"], "no usable cache folder ("),
        (["import", "x" * 300, "FOLDER-export"], "File name too long"),
        (["prune", "FOLDER", "--older-than", "soon"], "12h or 30d"),
        (["stats", "x" * 300], "there is no cache"),
        (["export", "FOLDER", "/proc/x"], "/proc/x: cannot be written ("),
        (["export", "FOLDER", "/etc/passwd/x"], "(/etc/passwd is no folder); name"),
        (["export", "FOLDER", "/etc/passwd/x.tar"], "(/etc/passwd is no folder); name"),
        (["export", "FOLDER", "x" * 300], "(File name too long); name another one"),
        (["import", "FOLDER", "x.pkl", "--fvqa", "q", "--k", "0"], "--k has to be from 1"),
        (["import", "FOLDER", "x.pkl", "--fvqa", "q", "--k", "1" * 21], "--k has to be from 1"),
    ],
)
@pytest.mark.usefixtures("export")
def test_a_mistake_is_one_clear_line(arguments, says, obm, folder):
    code, _, error = obm("cache", *[a.replace("FOLDER", str(folder)) for a in arguments])
    assert code == 2
    assert says in error


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nosuch", None, "nosuch does not exist"),
        ("x" * 300, None, "does not exist"),
        ("cache.pkl", pickle.dumps({}), "pickles are not imported"),
        ("x.tar", b"no tar", "neither a folder nor a tar file"),
        ("export", b'{"tool": "shell"}\n', "line 1"),
        ("export", b"[" * 100_000, "line 1"),
    ],
)
def test_for_a_source_that_is_refused_no_cache_is_made(obm, tmp_path, name, content, says):
    source = tmp_path / name
    if name == "export":
        source.mkdir()
        (source / "results.jsonl").write_bytes(content)
    elif content is not None:
        source.write_bytes(content)
    code, out, error = obm("cache", "import", tmp_path / "new", source)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert says in error
    assert not (tmp_path / "new").exists()


def test_questions_that_are_not_there_are_named_before_a_cache_is_made(obm, tmp_path):
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps({}))
    code, _, error = obm(
        "cache",
        "import",
        tmp_path / "new",
        tmp_path / "cache.pkl",
        "--fvqa",
        tmp_path / "q.parquet",
    )
    assert code == 2
    assert "q.parquet does not exist" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("pickled", [b"no pickle", pickle.dumps({})])
def test_published_searches_that_are_refused_leave_no_cache(obm, tmp_path, pickled):
    (tmp_path / "cache.pkl").write_bytes(pickled)
    (tmp_path / "q.parquet").write_bytes(b"no table")
    code, out, error = obm(
        "cache", "import", tmp_path / "new", tmp_path / "cache.pkl",
        "--fvqa", tmp_path / "q.parquet",
    )  # fmt: skip
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"k": 10**21}, {"query": "\ud800"}, {"created": 10**400}])
def test_an_import_takes_over_all_or_nothing(obm, folder, tmp_path, change):
    obm("cache", "export", folder, tmp_path / "export")
    file = tmp_path / "export" / "results.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    file.write_text(json.dumps(first) + "\n" + json.dumps({**second, **change}) + "\n")
    (tmp_path / "other").mkdir()
    ResultCache(tmp_path / "other").close()
    code, out, error = obm("cache", "import", tmp_path / "other", tmp_path / "export")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "line 2" in error
    assert list(ResultCache(tmp_path / "other").records()) == []


@pytest.mark.parametrize("created", [float("inf"), -1e300])
def test_stats_of_a_cache_without_dates(obm, folder, created):
    cache = ResultCache(folder)
    (record, _) = cache.records()
    cache.put(dataclasses.replace(record, created=created), replace=True)
    cache.close()
    code, out, _ = obm("cache", "stats", folder)
    assert code == 0
    assert "no date" in out


@pytest.mark.parametrize("action", ["stats", "prune", "export"])
def test_a_damaged_database_is_named(obm, folder, tmp_path, action):
    path = folder / "results.sqlite"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    before = sorted(tmp_path.rglob("*"))
    code, out, error = obm("cache", action, folder, *[tmp_path / "x"] * (action == "export"))
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "results.sqlite: cannot be read (" in error
    assert not {path for path in set(tmp_path.rglob("*")) - set(before) if "x" in path.name}


def test_a_pickle_is_refused_with_the_way_to_do_it(obm, folder, tmp_path):
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps({}))
    code, _, error = obm("cache", "import", str(folder), str(tmp_path / "cache.pkl"))
    assert code == 2
    assert "--fvqa" in error


def test_published_image_searches_are_taken_over(obm, tmp_path):
    import pyarrow
    import pyarrow.parquet

    entry = {"tool_returned_web_title_list": ["Mali"], "tool_returned_images_urls": [""]}
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps({"fvqa_0": entry}))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    rows = [{"data_id": "fvqa_0", "images": [{"bytes": buffer.getvalue()}]}]
    questions = tmp_path / "questions.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), questions)
    code, out, _ = obm(
        "cache", "import", str(tmp_path / "c"), str(tmp_path / "cache.pkl"),
        "--fvqa", str(questions),
    )  # fmt: skip
    assert code == 0
    assert out.startswith("1 image searches taken over")

    # the identity is that of the settings that a run would name
    from configs.sections import Environment, Live
    from environments.live import live_tools

    environment = Environment(
        image_provider="serpapi", cache=str(tmp_path / "c"), cache_mode="offline"
    )
    _, images, _ = live_tools(environment, Live(), None, None)
    (hits,) = images.search([Image.new("RGB", (8, 8), "red")], environment.top_k_image)
    assert [hit.title for hit in hits] == ["Mali"]
