"""Safetensors files: checked headers, bytes by offset, rounding, files written in place."""

import json
import struct
import threading

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from merge.errors import MergeError
from merge.output import parse_size
from merge.shards import (
    COPY_CHUNK_BYTES,
    SafetensorsFile,
    ShardWriter,
    encode_header,
    from_float,
    is_finite,
    to_float,
)

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                "BF16": torch.bfloat16}  # fmt: skip


def write_file(path, header, n_bytes=0):
    """A file of any header, sound or not."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(n_bytes))
    return path


def entry(dtype="F32", shape=(2, 2), begin=0, end=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# ---- reading


def test_tensors_and_metadata_are_those_that_safetensors_wrote(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c": torch.randn(2, 2, 2, generator=generator).half(),
        "d": torch.randn((), generator=generator).double(),
        "e": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(tensors)
    for name, value in tensors.items():
        assert file.tensors[name].shape == tuple(value.shape)
        np.testing.assert_array_equal(file.read(name), value.float().numpy())
        stored = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        assert bytes(file.read_bytes(name)) == stored
        assert b"".join(file.read_chunks(name)) == stored
        assert file.checksum(name) == xxhash.xxh3_128_hexdigest(stored)
    assert bytes(file.read_bytes("a", 4, 8)) == tensors["a"].numpy().tobytes()[4:12]


def test_a_tensor_larger_than_a_chunk_is_read_whole(tmp_path):
    values = np.arange(COPY_CHUNK_BYTES // 4 + 1000, dtype=np.float32)
    save_file({"a": torch.from_numpy(values)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert [len(chunk) for chunk in file.read_chunks("a")] == [COPY_CHUNK_BYTES, 4000]
    assert file.checksum("a") == xxhash.xxh3_128_hexdigest(values.tobytes())
    np.testing.assert_array_equal(file.read("a"), values)


def test_many_threads_read_one_file(tmp_path):
    values = {f"t{i}": torch.full((1000,), float(i)) for i in range(20)}
    save_file(values, tmp_path / "x.safetensors")
    file, wrong = SafetensorsFile(tmp_path / "x.safetensors"), []

    def read(index):
        for _ in range(20):
            if set(file.read(f"t{index}").tolist()) != {float(index)}:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_integers_are_copied_but_not_read_as_numbers(tmp_path):
    save_file({"ids": torch.arange(3)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert bytes(file.read_bytes("ids")) == np.arange(3).tobytes()
    with pytest.raises(MergeError, match="tensor ids is I64; needed is one of F64, F32, F16, BF16"):
        file.read("ids")


@pytest.mark.parametrize(
    ("header", "n_bytes", "match"),
    [
        (b"", 0, "broken safetensors header"),
        (b"{", 0, "broken safetensors header"),
        (b"[]", 0, "broken safetensors header"),
        (b"\xff\xfe{}", 0, "broken safetensors header"),
        ({"a": 1}, 0, "broken safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2, 2]}}, 16, "broken safetensors header"),
        ({"a": {**entry(), "data_offsets": [0]}}, 16, "broken safetensors header"),
        ({"a": {**entry(), "shape": "x"}}, 16, "broken safetensors header"),
        ({"__metadata__": 3, "a": entry()}, 16, "broken safetensors header"),
        ({"a": entry()}, 15, r"is truncated \(tensors need \d+ bytes, file has \d+\)"),
        ({"a": entry(shape=(2, 3))}, 16, r"a of shape \[2, 3\] and dtype F32 cannot have 16 bytes"),
        ({"a": entry(dtype="BF16")}, 16, "a of shape .* cannot have 16 bytes"),
        ({"a": entry(shape=(-2, -2))}, 16, "a lies over another one|cannot have"),
        ({"a": entry(begin=16, end=0)}, 16, "cannot have -16 bytes"),
        ({"a": entry(begin=-16, end=0)}, 16, "a lies over another one"),
        ({"a": entry(), "b": entry(begin=8, end=24)}, 24, "b lies over another one"),
        ({"a": entry(dtype="F4", end=2)}, 2, "a has dtype F4, which can neither be merged"),
    ],
)
def test_a_header_that_does_not_fit_its_file(tmp_path, header, n_bytes, match):
    path = write_file(tmp_path / "x.safetensors", header, n_bytes)
    with pytest.raises(MergeError, match=match) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_a_page_of_html_or_a_pointer_is_no_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(MergeError, match=r"not a safetensors file .*download it again"):
        SafetensorsFile(path)


def test_a_missing_file_and_one_that_shrinks(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(MergeError, match=r"cannot be read \(No such file"):
        SafetensorsFile(path)
    save_file({"a": torch.ones(8)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MergeError, match="ends inside tensor a; copy it again"):
        file.read("a")


# ---- decoding and encoding

FP32_BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50)


@given(FP32_BITS)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_rounding_is_to_nearest_even_as_in_torch(dtype, words):
    values = np.array(words, np.uint32).view(np.float32)
    values = np.where(np.isnan(values), np.float32(0), values)  # the bits of NaN are free
    ours = from_float(values, dtype)
    theirs = torch.from_numpy(values).to(TORCH_DTYPES[dtype])
    assert ours.tobytes() == bytes(theirs.view(torch.uint8).tolist())
    np.testing.assert_array_equal(to_float(ours, dtype), theirs.float().numpy())


def test_halves_round_to_even_in_bf16():
    # bf16 has 7 bits of fraction: 1 + 1/256 lies half way to 1 + 1/128, 1 + 3/256 to 1 + 2/128
    values = np.array([1 + 1 / 256, 1 + 3 / 256, 1 + 3 / 512, -1 - 1 / 256], np.float32)
    assert to_float(from_float(values, "BF16"), "BF16").tolist() == [1, 1.015625, 1.0078125, -1]


@given(FP32_BITS)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_what_is_not_finite_is_found_in_stored_items(dtype, words):
    values = from_float(np.array(words, np.uint32).view(np.float32), dtype)
    assert is_finite(values, dtype) == bool(np.isfinite(to_float(values, dtype)).all())


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_nan_and_infinity_are_not_finite_and_the_largest_number_is(dtype):
    largest = torch.finfo(TORCH_DTYPES[dtype]).max
    for value, expected in ((largest, True), (np.inf, False), (-np.inf, False), (np.nan, False)):
        stored = torch.tensor([0.0, value], dtype=TORCH_DTYPES[dtype]).view(torch.uint8).numpy()
        assert is_finite(stored, dtype) is expected


# ---- writing

LAYOUT = [("a", "BF16", (3, 2)), ("b", "F32", ()), ("empty", "F16", (0, 4)), ("c", "F64", (5,))]


def test_a_header_says_where_everything_goes_before_it_exists(tmp_path):
    header, infos = encode_header(LAYOUT, {"format": "pt", "note": "ü"})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(12 + 4 + 0 + 40))
    file = SafetensorsFile(path)
    assert file.tensors == infos
    assert file.metadata == {"format": "pt", "note": "ü"}
    with safe_open(path, "pt") as theirs:
        assert theirs.get_tensor("c").shape == (5,)
        assert theirs.metadata() == file.metadata


def test_tensors_are_written_in_any_order_and_in_pieces(tmp_path):
    path = tmp_path / "x.safetensors"
    writer = ShardWriter(path, LAYOUT, {"format": "pt"})
    n_bytes = path.stat().st_size
    writer.write("c", 16, np.array([2.0, 3.0, 4.0]))
    writer.write("a", 0, from_float(np.arange(6, dtype=np.float32), "BF16"))
    writer.write("c", 0, np.array([0.0, 1.0]))
    writer.write("b", 0, np.float32(7).tobytes())
    writer.write("empty", 0, b"")
    assert writer.checksum("c") == xxhash.xxh3_128_hexdigest(np.arange(5.0).tobytes())
    writer.close()
    assert path.stat().st_size == n_bytes
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").tolist() == [[0, 1], [2, 3], [4, 5]]
        assert file.get_tensor("b").item() == 7
        assert file.get_tensor("c").tolist() == [0, 1, 2, 3, 4]


def test_a_file_that_was_begun_keeps_its_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    writer = ShardWriter(path, LAYOUT, {})
    writer.write("c", 0, np.arange(5.0))
    writer.close()
    path.write_bytes(path.read_bytes() + b"what another program appended")
    writer = ShardWriter(path, LAYOUT, {})
    assert writer.checksum("c") == xxhash.xxh3_128_hexdigest(np.arange(5.0).tobytes())
    writer.close()
    assert SafetensorsFile(path).read("c").tolist() == [0, 1, 2, 3, 4]


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(MergeError, match=r"cannot be written \(No such file.*free space or choose"):
        ShardWriter(tmp_path / "nowhere" / "x.safetensors", LAYOUT, {})


# ---- sizes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5kb", 1500), (" 2TB ", 2 * 10**12),
     ("12345", 12345), (12345, 12345)],
)  # fmt: skip
def test_sizes_are_read(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "0GB",
        "-1GB",
        "5 GiB",
        "5,5GB",
        "many",
        "9" * 400,
        "9" * 400 + "GB",
        "9" * 305 + "GB",
    ],
)
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(MergeError, match=r"merge.shard_size: .* is no size; write one such as 5GB"):
        parse_size(text)
