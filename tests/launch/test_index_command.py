"""`obm index`: what cannot be indexed is one clear line, and leaves the disk as it was."""

import gzip
import json

import pytest
from PIL import Image

GOOD = {"id": "a", "title": "Mali", "text": "Bamako is the capital."}
PACKED = gzip.compress(json.dumps(GOOD).encode() * 1000)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def everything(folder):
    """Names and contents of all that lies below a folder."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def check_refused(obm, folder, says, *arguments):
    """The command ends with one line that says all of `says`, and changes nothing."""
    before = everything(folder)
    code, out, error = obm("index", *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")
    assert len(error) < 1000
    for words in says:
        assert words in error
    assert everything(folder) == before


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["photos", "photos/deep", ".idx.building"])
def test_a_folder_that_holds_the_source_is_never_replaced(obm, tmp_path, name, overwrite):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "a.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "photos").mkdir(exist_ok=True)
    (tmp_path / "photos" / "index.json").write_text('{"format": 1}')  # even if it looks like ours
    output = tmp_path / ("idx" if name.startswith(".") else "photos")
    check_refused(
        obm, tmp_path, [str(tmp_path / name.split("/")[0]), "holds the source"],
        "bm25", tmp_path / name / "a.jsonl", "--output", output, *["--overwrite"] * overwrite,
    )  # fmt: skip


@pytest.mark.parametrize("index", [None, "[", "3", "[]", '{"pages": 3}', "[" * 100_000, "\udcff"])
def test_overwrite_replaces_nothing_but_an_index(obm, tmp_path, index):
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines(GOOD))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "thesis.txt").write_text("years of work")
    if index is not None:
        (tmp_path / "photos" / "index.json").write_text(index, errors="surrogateescape")
    check_refused(
        obm, tmp_path, ["photos: is no index", "choose another --output"],
        "bm25", source, "--output", tmp_path / "photos", "--overwrite",
    )  # fmt: skip


def test_overwrite_takes_an_empty_folder_and_a_damaged_index(obm, tmp_path):
    source, output = tmp_path / "a.jsonl", tmp_path / "index"
    source.write_bytes(lines(GOOD))
    output.mkdir()
    assert obm("index", "bm25", source, "--output", output, "--overwrite")[0] == 0
    (output / "words.txt").unlink()
    assert obm("index", "bm25", source, "--output", output, "--overwrite")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "index"}


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("file", "file: is a file; choose another --output"),
        ("file/x", "Not a directory); choose another --output"),
        ("x" * 300, "File name too long); choose another --output"),
        ("/proc/x", "cannot be written ("),
        ("ring", "ring: is a link to nowhere"),
        ("nowhere", "nowhere: is a link to nowhere"),
        ("", "names no folder of its own"),
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_that_cannot_be_is_named(obm, tmp_path, monkeypatch, output, says, overwrite):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "nowhere").symlink_to("nosuch")
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    check_refused(
        obm, tmp_path, [says], "bm25", "a.jsonl", "--output", output, *["--overwrite"] * overwrite
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.jsonl.gz", PACKED[:-12], "cannot be read beyond byte "),
        ("c.jsonl.gz", PACKED[:20] + b"\xff" * 30 + PACKED[50:], "cannot be read beyond byte 0"),
        ("c.jsonl.gz", lines(GOOD), "Not a gzipped file"),
        ("c.jsonl", b"[" * 100_000 + b"\n", "RecursionError"),
        ("c.jsonl", b'{"title": ' + b"[" * 100_000 + b"\n", "RecursionError"),
        ("c.jsonl", b'{"title": "a", "text": "\\ud800"}\n', "surrogates not allowed"),
        ("c.jsonl", b'{"title": "\xed\xa0\x80", "text": "a"}\n', "surrogates not allowed"),
        ("c.jsonl", b'{"id": "\\ud800", "text": "a"}\n', "surrogates not allowed"),
        ("c.jsonl", lines({"text": None}), '"text" is null, and has to be text'),
        ("c.jsonl", lines({"text": {"en": "a"}}), '"text" is {"en": "a"}, and has to be'),
        ("c.jsonl", lines({"text": ["a"]}), '"text" is ["a"], and has to be text'),
        ("c.jsonl", lines({"text": True}), '"text" is true, and has to be text'),
        ("c.jsonl", lines({"text": "a", "title": None}), '"title" is null'),
        ("c.jsonl", lines({"text": "a", "title": float("nan")}), '"title" is NaN'),
        ("c.jsonl", lines({"text": "a", "id": None}), '"id" is null'),
        ("c.jsonl", lines({"text": "a", "_id": []}), '"_id" is []'),
        ("c.jsonl", lines({"contents": None}), '"contents" is null'),
        ("c.jsonl", lines({"contents": 10**400, "text": None}), '"text" is null'),
        ("c.jsonl", b"[1]\n", "TypeError: it is no object"),
        ("c.jsonl", b'{"text": "' + b"\xff" * 99_999, "UnicodeDecodeError: 'utf-8' codec"),
        ("c.jsonl", lines({"text": "..."}), "the corpus has no words to index"),
        ("c.jsonl", b"", "there is nothing to index in it"),
    ],
)
def test_a_source_that_is_no_corpus_is_named_and_leaves_nothing(obm, tmp_path, name, content, says):
    source = tmp_path / name
    source.write_bytes(content)
    check_refused(
        obm, tmp_path, [f"error: {source}: ", says], "bm25", source, "--output", tmp_path / "index"
    )


def test_a_source_with_an_impossible_name_is_named(obm, tmp_path):
    check_refused(
        obm, tmp_path, ["no such file"], "bm25", "x" * 300, "--output", tmp_path / "index"
    )


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("a\0.png", '"image" has a NUL'),
        (None, '"image" is null'),
        ({}, '"image" is {}'),
        ("x" * 300, "File name too long"),
        (".", "Is a directory"),
        ("\ud800.png", "surrogates not allowed"),
    ],
)
def test_a_picture_that_cannot_be_is_named_and_leaves_nothing(obm, tmp_path, image, says):
    source = tmp_path / "c.jsonl"
    source.write_bytes(lines({"id": "a", "title": "A", "image": image}))
    check_refused(obm, tmp_path, [says], "images", source, "--output", tmp_path / "index")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--title-weight", -1, "--title-weight has to be 0 or more, not -1"),
        ("--title-weight", 99999999999, "--title-weight has to be 1000 or less, not 99999999999"),
        ("--max-tokens", -1, "--max-tokens has to be 1 or more, not -1"),
        ("--max-tokens", 0, "--max-tokens has to be 1 or more, not 0"),
        ("--thumbnails", -3, "--thumbnails has to be 0 or more, not -3"),
        ("--shard-rows", 0, "--shard-rows has to be 1 or more, not 0"),
    ],
)
@pytest.mark.parametrize("kind", ["bm25", "images", "dense"])
def test_a_number_out_of_range_is_named(obm, tmp_path, kind, option, value, says):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "c.jsonl").write_bytes(lines({**GOOD, "image": "a.png"}))
    check_refused(
        obm, tmp_path, [says], kind, tmp_path / "c.jsonl", "--output", tmp_path / "index",
        "--model", "nosuch", option, value,
    )  # fmt: skip


def test_once_the_source_is_mended_the_same_command_works(obm, tmp_path):
    source, command = tmp_path / "c.jsonl", ("index", "bm25", tmp_path / "c.jsonl", "--output")
    source.write_bytes(lines(GOOD, {"id": "b"}))
    assert obm(*command, tmp_path / "index")[0] == 2
    source.write_bytes(lines(GOOD, GOOD))
    assert obm(*command, tmp_path / "index")[:2][0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"c.jsonl", "index"}


def test_a_build_that_died_before_its_first_shard_stands_in_no_way(obm, tmp_path):
    source, part = tmp_path / "c.jsonl", tmp_path / ".index.building"
    source.write_bytes(lines(GOOD))
    part.mkdir()
    (part / "progress.json").write_text('{"identity": {"source": "another"}, "shards": []}')
    assert obm("index", "bm25", source, "--output", tmp_path / "index")[0] == 0
    assert not part.exists()


@pytest.mark.parametrize("progress", ["", "[", "3", "{}", '{"identity": 1}', "[" * 100_000])
def test_a_damaged_progress_is_named_and_overwrite_starts_anew(obm, tmp_path, progress):
    source, part = tmp_path / "c.jsonl", tmp_path / ".index.building"
    source.write_bytes(lines(GOOD))
    part.mkdir()
    (part / "lock").touch()
    (part / "progress.json").write_text(progress)
    command = ("bm25", source, "--output", tmp_path / "index")
    check_refused(obm, tmp_path, ["progress.json", "--overwrite"], *command)
    assert obm("index", *command, "--overwrite")[0] == 0


def test_a_finished_shard_is_kept_when_a_later_row_is_bad(obm, tmp_path):
    source, part = tmp_path / "c.jsonl", tmp_path / ".index.building"
    source.write_bytes(lines(GOOD, {"id": "b"}))
    code, _, _ = obm(
        "index", "bm25", source, "--output", tmp_path / "index", "--shard-rows", 1
    )  # fmt: skip
    assert code == 2
    assert len(json.loads((part / "progress.json").read_text())["shards"]) == 1


def test_numbers_are_texts_as_they_are_written(tmp_path):
    from environments.corpus import JsonLines

    source = tmp_path / "c.jsonl"
    source.write_bytes(lines({"id": 7, "title": 1984, "text": 2.5}, {"contents": "T\nx"}))
    rows = [row for row, _ in JsonLines(source).read()]
    assert [(row.id, row.title, row.text) for row in rows] == [("7", "1984", "2.5"), ("", "T", "x")]
