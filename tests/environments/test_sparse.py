"""BM25 on disk: bm25s's scores to the last bit, whatever the shards, resumed, never half."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import typeof

from environments import sparse
from environments.atlas.entities import HEADLINE_RELATIONS, load_entities
from environments.atlas.passages import load_passages
from environments.atlas.world import load_text_index
from environments.building import INDEX_FILE
from environments.errors import EnvironmentSetupError
from environments.indexing import open_image_index, open_text_index
from environments.retrieval import BM25TextIndex, split_words
from environments.sparse import MappedBM25Index, build_bm25, top_passages

ROOT = Path(__file__).parents[2]


def write_corpus(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def atlas_rows():
    return [{"id": p.id, "title": p.title, "text": p.text} for p in load_passages()]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    build_bm25(write_corpus(folder / "corpus.jsonl", atlas_rows()), folder / "index", shard_rows=99)
    return folder / "index"


def files_of(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != INDEX_FILE
    }  # fmt: skip


def test_hits_and_scores_equal_those_of_the_index_in_memory(atlas):
    queries = [f"{r} of {e.name}" for e in load_entities().values() for r in HEADLINE_RELATIONS]
    queries += ["", "of the", "xylophone", "capital capital Mali", "CÔTE d'Ivoire currency"]
    ours = MappedBM25Index(atlas, snippet_words=40).search(queries, 5)
    assert ours == load_text_index().search(queries, 5)


def test_bm25s_reads_the_matrix_and_gives_the_same_scores(atlas):
    loaded = bm25s.BM25.load(atlas, mmap=True, load_vocab=False)
    index = MappedBM25Index(atlas)
    words = [index.words.find(word) for word in ("capital", "france")]
    scores = loaded.get_scores_from_ids(words)
    (first,) = index.search(["capital of France"], 1)[0]
    assert first.score == float(scores.max())
    assert index.corpus[int(scores.argmax())].id == first.id == "fr/government"
    assert first.text == index.corpus[int(scores.argmax())].text  # whole, unless cut to snippets


def test_bounds_equal_the_highest_score_of_a_word(atlas):
    index = MappedBM25Index(atlas)
    assert (np.diff(index._indptr) > 0).all()
    highest = np.maximum.reduceat(index._data, index._indptr[:-1])
    assert np.load(atlas / sparse.MOST_FILE).tolist() == highest.tolist()


def test_the_size_of_the_shards_and_packing_change_nothing(atlas, tmp_path):
    source = write_corpus(tmp_path / "corpus.jsonl.gz", atlas_rows())
    build_bm25(source, tmp_path / "index", shard_rows=10_000)
    assert files_of(tmp_path / "index") == files_of(atlas)


def test_numba_sees_one_type_of_array_in_memory_and_on_disk(atlas):
    inside, outside = MappedBM25Index(atlas, mapped=False), MappedBM25Index(atlas)
    for name in ("_data", "_indices", "_indptr"):
        one, other = getattr(inside, name), getattr(outside, name)
        assert typeof(one) == typeof(other)
        assert not typeof(one).mutable


def test_matrix_and_passages_stay_on_disk(atlas):
    index = MappedBM25Index(atlas)
    for array in (index._data, index._indices, index._indptr):
        assert isinstance(array.base, np.memmap)
    inside = MappedBM25Index(atlas, mapped=False)
    assert not isinstance(inside._data.base, np.memmap)
    assert inside.search(["capital of Mali"], 3) == index.search(["capital of Mali"], 3)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.text("abcdé x.", max_size=30)),
        min_size=1,
        max_size=12,
    ),
    st.text("abcdéz ", max_size=12),
    st.integers(1, 5),
    st.integers(1, 6),
)
def test_any_corpus_gives_what_the_index_in_memory_gives(
    tmp_path_factory, passages, query, shard_rows, k
):
    folder = tmp_path_factory.mktemp("any")
    titles, texts = zip(*passages, strict=True)
    ids = [str(i) for i in range(len(titles))]
    rows = [{"id": i, "title": t, "text": x} for i, t, x in zip(ids, titles, texts, strict=True)]
    source = write_corpus(folder / "c.jsonl", rows)
    if not any(split_words(f"{title} {text}") for title, text in passages):
        with pytest.raises(EnvironmentSetupError, match="no words"):
            build_bm25(source, folder / "index", shard_rows=shard_rows)
        return
    build_bm25(source, folder / "index", shard_rows=shard_rows)
    found = MappedBM25Index(folder / "index", snippet_words=40).search([query], k)
    assert found == BM25TextIndex(ids, titles, texts).search([query], k)


def test_ties_go_to_the_earlier_passage_and_the_room_is_clean_again():
    # three words of one passage each, equal scores; passage 2 has two of them
    data = np.array([1, 1, 1, 1], np.float32)
    indices, indptr = np.array([3, 2, 0, 2], np.int32), np.array([0, 1, 2, 4], np.int64)
    scores, touched = np.zeros(4, np.float32), np.empty(4, np.int32)
    words, most = np.array([0, 1, 2], np.int64), np.ones(3, np.float32)
    for k, expected in ((1, [2]), (2, [2, 0]), (9, [2, 0, 3])):
        best, best_scores = top_passages(data, indices, indptr, most, words, scores, touched, k)
        assert best.tolist() == expected
        assert best_scores.tolist() == [2, 1, 1][:k]
        assert not scores.any()


@pytest.mark.parametrize("k", [1, 3, 10])
def test_skipping_the_long_lists_changes_no_bit(k):
    """Words of very unlike frequency, against the plain sum of all lists in the query's order."""
    rng = np.random.default_rng(k)
    n_passages, shares = 20_000, (0.9, 0.5, 0.3, 0.01, 0.002)
    lists = [np.flatnonzero(rng.random(n_passages) < share) for share in shares]
    weights = [np.log(1 + 1 / share) for share in shares]
    values = [w * rng.uniform(0.3, 1, len(x)) for w, x in zip(weights, lists, strict=True)]
    data = np.concatenate(values).astype(np.float32)
    indices = np.concatenate(lists).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    most = np.maximum.reduceat(data, indptr[:-1])
    scores, touched = np.zeros(n_passages, np.float32), np.empty(n_passages, np.int32)
    for _ in range(60):
        words = rng.integers(0, 5, rng.integers(1, 6))
        expected = np.zeros(n_passages, np.float32)
        for word in words:
            at = slice(indptr[word], indptr[word + 1])
            expected[indices[at]] += data[at]
        order = np.argsort(-expected, kind="stable")[:k]
        order = order[expected[order] > 0]
        best, found = top_passages(data, indices, indptr, most, words, scores, touched, k)
        assert best.tolist() == order.tolist()
        assert found.tolist() == expected[order].tolist()
        assert not scores.any()


def test_contents_are_title_and_text_and_rows_get_numbers_for_names(tmp_path):
    rows = [{"contents": '"Mali"\nBamako is\nthe capital.'}, {"id": 7, "contents": "Only a title"}]
    index = build_bm25(write_corpus(tmp_path / "c.jsonl", rows), tmp_path / "index")
    first, second = (MappedBM25Index(index).search([q], 1)[0][0] for q in ("bamako", "only"))
    assert (first.id, first.title, first.text) == ("0", '"Mali"', "Bamako is\nthe capital.")
    assert (second.id, second.title, second.text) == ("7", "Only a title", "")


# --- builds that are cut short


def test_a_build_that_was_cut_short_goes_on_and_ends_alike(atlas, tmp_path, monkeypatch):
    source, made = write_corpus(tmp_path / "corpus.jsonl", atlas_rows()), []
    make_shard = sparse._make_shard

    def cut_short(rows, stem, title_weight):
        made.append(stem.name)
        if len(made) == 4:
            raise KeyboardInterrupt
        return make_shard(rows, stem, title_weight)

    monkeypatch.setattr(sparse, "_make_shard", cut_short)
    with pytest.raises(KeyboardInterrupt):
        build_bm25(source, tmp_path / "index", shard_rows=99)
    assert not (tmp_path / "index").exists()
    with (tmp_path / ".index.building" / "corpus.jsonl").open("ab") as file:
        file.write(b'{"id": "half')  # what a kill left behind the last shard
    build_bm25(source, tmp_path / "index", shard_rows=99)
    assert made[3:5] == ["shard-00003", "shard-00003"]
    assert len(made) == 1 + -(-len(load_passages()) // 99)
    assert files_of(tmp_path / "index") == files_of(atlas)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "index"}


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(tmp_path):
    rows = [
        {"id": str(i), "title": f"t{i % 97}", "text": f"word{i} and word{i % 1000} " * 8}
        for i in range(10_000)
    ]
    source = write_corpus(tmp_path / "corpus.jsonl", rows)
    command = [
        sys.executable, "-m", "launch.cli", "index", "bm25", str(source),
        "--output", str(tmp_path / "index"), "--shard-rows", "200",
    ]  # fmt: skip
    progress = tmp_path / ".index.building" / "progress.json"
    process = subprocess.Popen(command, cwd=ROOT)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if progress.exists() and len(json.loads(progress.read_text())["shards"]) >= 5:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "index").exists()
    n_shards = len(json.loads(progress.read_text())["shards"])
    assert n_shards >= 5
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("10000 rows in ")
    whole = build_bm25(source, tmp_path / "whole", shard_rows=200)
    assert files_of(tmp_path / "index") == files_of(whole)


def test_an_unfinished_build_of_something_else_is_refused(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "corpus.jsonl", atlas_rows()[:30])

    def fail(building):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sparse, "_finish", fail)
        with pytest.raises(KeyboardInterrupt):
            build_bm25(source, tmp_path / "index", shard_rows=10)
    with pytest.raises(EnvironmentSetupError, match="other settings"):
        build_bm25(source, tmp_path / "index", shard_rows=11)
    write_corpus(source, atlas_rows()[:31])
    with pytest.raises(EnvironmentSetupError, match="another source"):
        build_bm25(source, tmp_path / "index", shard_rows=10)
    build_bm25(source, tmp_path / "index", shard_rows=10, overwrite=True)
    assert len(open_text_index(tmp_path / "index")) == 31


def test_an_index_is_replaced_only_when_told_to(tmp_path):
    source = write_corpus(tmp_path / "corpus.jsonl", atlas_rows()[:5])
    index = build_bm25(source, tmp_path / "index")
    with pytest.raises(EnvironmentSetupError, match="--overwrite"):
        build_bm25(source, index)
    write_corpus(source, atlas_rows()[:7])
    assert len(MappedBM25Index(build_bm25(source, index, overwrite=True))) == 7
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "index"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", "byte 41"),
        ('{"id": "a"}', "KeyError"),
        ("[1]", "byte 41"),
    ],
)
def test_a_bad_line_is_named_with_its_place(tmp_path, line, says):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "a", "title": "b", "text": "cde"}\n' + line + "\n")
    with pytest.raises(EnvironmentSetupError, match=says):
        build_bm25(path, tmp_path / "index")


def test_what_is_no_index_or_no_corpus_is_one_clear_line(tmp_path, atlas, capsys):
    from launch.cli import main

    empty = write_corpus(tmp_path / "empty.jsonl", [])
    with pytest.raises(EnvironmentSetupError, match="nothing to index"):
        build_bm25(empty, tmp_path / "index")
    with pytest.raises(EnvironmentSetupError, match="obm index"):
        open_text_index(tmp_path)
    with pytest.raises(EnvironmentSetupError, match="not of pictures"):
        open_image_index(atlas)
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / INDEX_FILE).write_text('{"format": 99}')
    with pytest.raises(EnvironmentSetupError, match="format 99"):
        open_text_index(tmp_path / "later")
    output = str(tmp_path / "index")
    assert main(["index", "bm25", str(tmp_path / "no.jsonl"), "--output", output]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["index", "dense", str(empty), "--output", output]) == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data.csc.index.npy", "words.txt", "corpus.jsonl", "most.npy"])
def test_a_file_that_is_cut_short_is_found_when_the_index_is_opened(atlas, tmp_path, name):
    folder = shutil.copytree(atlas, tmp_path / "index")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    words = rf"{name}: has {len(content) - 1} bytes, and was {len(content)} long"
    with pytest.raises(EnvironmentSetupError, match=words):
        open_text_index(folder)
    (folder / name).unlink()
    with pytest.raises(EnvironmentSetupError, match=rf"{name}: is missing"):
        open_text_index(folder)


def test_an_array_that_is_a_pickle_is_not_opened(atlas, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    folder = shutil.copytree(atlas, tmp_path / "index")
    np.save(folder / "most.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["files"]["most.npy"] = (folder / "most.npy").stat().st_size
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(EnvironmentSetupError, match="index: a file of the index cannot be read"):
        open_text_index(folder)
    assert not (tmp_path / "ran").exists()


def test_an_index_of_an_older_version_says_no_sizes_and_is_opened(atlas, tmp_path):
    folder = shutil.copytree(atlas, tmp_path / "index")
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index.pop("files")["corpus.jsonl"] == (folder / "corpus.jsonl").stat().st_size
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert len(open_text_index(folder)) == len(open_text_index(atlas))


def test_a_full_disk_ends_a_build_with_its_name_and_the_build_goes_on(tmp_path):
    import resource

    corpus = write_corpus(tmp_path / "corpus.jsonl", atlas_rows())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(EnvironmentSetupError, match=r"index.*cannot be written \(.*too large"):
            build_bm25(corpus, tmp_path / "index", shard_rows=99)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "index").exists()
    build_bm25(corpus, tmp_path / "index", shard_rows=99)
    assert len(open_text_index(tmp_path / "index")) == len(atlas_rows())
