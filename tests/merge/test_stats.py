"""Statistics files: written whole, read lazily, refused when they are something else."""

import json
import subprocess
import sys

import numpy as np
import pytest

from merge.errors import MergeError
from merge.stats import FILE_NAMES, KINDS, StatsWriter, open_stats, save_stats

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
VECTOR = np.array([4.0, 0.0, 0.25], np.float32)
METADATA = {"tokens": "7", "weights": json.dumps({f"{Q}.weight": "ab"})}


def fp32(*rows):
    return np.array(rows, np.float32)


def test_a_vector_is_found_under_every_linear_that_shares_it(tmp_path):
    save_stats(tmp_path / "stats.safetensors", "diagonal", {Q: VECTOR}, METADATA, {K: Q})
    stats = open_stats(tmp_path, "diagonal")
    assert stats.names == [f"{K}.weight", f"{Q}.weight"]
    assert stats.shape_of(f"{K}.weight") == (3,)
    assert stats.shape_of("lm_head.weight") is None
    np.testing.assert_array_equal(stats.vector(f"{K}.weight"), VECTOR)
    assert stats.vector(f"{Q}.weight").dtype == np.float32
    assert stats.weights == {f"{Q}.weight": "ab"}
    assert stats.metadata["tokens"] == "7"
    assert stats.kind == "diagonal"


def test_a_gram_matrix_may_have_negative_products_but_no_negative_squares(tmp_path):
    path = tmp_path / "gram.safetensors"
    gram = fp32([2, -1], [-1, 3])
    save_stats(path, "gram", {Q: gram}, METADATA, {K: Q})
    np.testing.assert_array_equal(open_stats(path, "gram").gram(f"{K}.weight"), gram)
    with pytest.raises(MergeError, match="negative"):
        save_stats(path, "gram", {Q: -gram}, METADATA)


def test_entries_of_a_fisher_statistic_are_read_by_their_place(tmp_path):
    entries = np.arange(12, dtype=np.float32).reshape(4, 3)
    tensors = {f"{Q}.weight": entries, "model.norm.weight": VECTOR}
    save_stats(tmp_path / "fisher.safetensors", "fisher", tensors, METADATA)
    stats = open_stats(tmp_path, "fisher")
    np.testing.assert_array_equal(stats.entries("model.norm.weight", 0, len(VECTOR)), VECTOR)
    np.testing.assert_array_equal(stats.entries(f"{Q}.weight", 5, 2), [5, 6])
    assert stats.names == [f"{Q}.weight", "model.norm.weight"]


def test_equal_statistics_give_equal_bytes_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "stats.safetensors"
    save_stats(path, "diagonal", {Q: VECTOR, "b": VECTOR}, METADATA, {K: Q, "a": Q})
    written = path.read_bytes()
    save_stats(path, "diagonal", {"b": VECTOR, Q: VECTOR}, METADATA, {"a": Q, K: Q})
    assert path.read_bytes() == written
    assert [entry.name for entry in path.parent.iterdir()] == ["stats.safetensors"]


def test_a_writer_goes_on_with_what_a_killed_one_wrote(tmp_path):
    path = tmp_path / "stats.safetensors"
    shapes = {Q: (3,), "b": (3,)}
    first = StatsWriter(path, "diagonal", shapes, METADATA)
    assert not first.is_resumed
    first.write(Q, VECTOR)
    second = StatsWriter(path, "diagonal", shapes, METADATA)
    assert second.is_resumed
    assert not path.exists()
    second.write("b", VECTOR)
    second.finish()
    np.testing.assert_array_equal(open_stats(path, "diagonal").vector(Q), VECTOR)
    assert not StatsWriter(path, "diagonal", shapes, {"tokens": "8"}).is_resumed


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    for kind in KINDS:
        with pytest.raises(MergeError, match=rf"{FILE_NAMES[kind]}: no .*kinds=\[{kind}\]"):
            open_stats(tmp_path / "nowhere", kind)


def test_files_that_are_no_statistics_of_the_kind_are_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    save_stats(path, "diagonal", {Q: VECTOR}, METADATA)
    with pytest.raises(MergeError, match=r"holds diagonal statistics, needed are inverse"):
        open_stats(path, "inverse")
    with pytest.raises(MergeError, match=r"has no diagonal statistic of lm_head\.weight"):
        open_stats(path, "diagonal").vector("lm_head.weight")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MergeError, match="truncated"):
        open_stats(path, "diagonal")
    save_stats(path, "diagonal", {Q: VECTOR}, {"format": "something else"})
    with pytest.raises(MergeError, match="holds no statistics"):
        open_stats(path, "diagonal")
    save_stats(path, "diagonal", {Q: VECTOR}, {"weights": "[1]"})
    with pytest.raises(MergeError, match="weights is not a JSON object"):
        open_stats(path, "diagonal")
    save_stats(path, "diagonal", {Q: fp32([1, 2, 3], [4, 5, 6])}, METADATA)
    with pytest.raises(MergeError, match=r"has shape \[2, 3\], which is no diagonal"):
        open_stats(path, "diagonal").vector(Q)


@pytest.mark.parametrize(("bad", "message"), [(np.nan, "finite"), (np.inf, "finite"), (-1, "neg")])
def test_what_no_mean_of_squares_can_be_is_refused_in_writing_and_in_reading(
    tmp_path, bad, message
):
    path = tmp_path / "stats.safetensors"
    with pytest.raises(MergeError, match=message):
        save_stats(path, "diagonal", {Q: fp32(1, bad)}, METADATA)
    assert not path.exists()
    save_stats(path, "diagonal", {Q: fp32(1, 123)}, METADATA)
    path.write_bytes(path.read_bytes().replace(fp32(123).tobytes(), fp32(bad).tobytes()))
    with pytest.raises(MergeError, match=message):
        open_stats(path, "diagonal").vector(Q)


def test_a_merge_that_reads_statistics_needs_no_torch():
    code = "import sys, merge.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
