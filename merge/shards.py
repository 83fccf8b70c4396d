"""One safetensors file: a checked header, and tensors by offset. No torch.

A safetensors file is an 8-byte length, a JSON header, and the tensors' bytes. Headers are parsed
and checked here, before anything else happens, so that a truncated download gives one clear message
and not a half-written output. Tensors are read by offset, whole or in pieces, into memory that the
caller owns; an output's header is encoded before any of its tensors exists, so that each has its
final place and no shard is ever held in memory.
"""

import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from merge.errors import MergeError

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "C64": 8,
}
MERGEABLE_DTYPES = ("F64", "F32", "F16", "BF16")
# What numpy calls the stored items; bf16, which numpy does not know, travels as its bits.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
# The bits of an item's exponent: all set in NaN and infinity, in nothing else.
EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}

MAX_HEADER_BYTES = 100_000_000
COPY_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header."""

    name: str
    dtype: str
    """Name in the file format, such as BF16."""
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte, from the start of the file."""
    end: int

    @property
    def n_bytes(self) -> int:
        """Length in the file."""
        return self.end - self.begin


class SafetensorsFile:
    """One safetensors file: its checked header, and its tensors on demand.

    The file is opened for each read sequence through `descriptor`, which is kept; reads are by
    offset, so any number of threads may read at once.

    Raises:
        MergeError: The file is missing, truncated, or its header does not fit its size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self.tensors = _read_header(path)
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int:
        """A file descriptor for positioned reads."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._descriptor

    def close(self) -> None:
        """Closes the descriptor; it is opened again when needed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def read_into(self, name: str, begin: int, buffer: Any) -> None:
        """Fills a buffer with bytes of a tensor.

        Args:
            name: Tensor.
            begin: Offset in the tensor, in bytes.
            buffer: Writable and contiguous; its size says how much is read.

        Raises:
            MergeError: The file ends before, or the disk fails.
        """
        view = memoryview(buffer).cast("B")
        offset, n_read = self.tensors[name].begin + begin, 0
        while n_read < len(view):
            try:
                n = os.preadv(self.descriptor, [view[n_read:]], offset + n_read)
            except OSError as error:
                raise MergeError(
                    f"{self.path}: tensor {name} cannot be read ({error.strerror}); check the disk"
                ) from error
            if n == 0:
                raise MergeError(f"{self.path}: ends inside tensor {name}; copy it again")
            n_read += n

    def will_need(self, name: str) -> None:
        """Tells the system that a tensor is read soon, so that a cold disk works ahead."""
        info = self.tensors[name]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, info.begin, info.n_bytes, os.POSIX_FADV_WILLNEED)

    def read_bytes(self, name: str, begin: int = 0, n: int | None = None) -> bytearray:
        """Reads the bytes of a tensor, or `n` of them from `begin` on."""
        buffer = bytearray(self.tensors[name].n_bytes - begin if n is None else n)
        if buffer:
            self.read_into(name, begin, buffer)
        return buffer

    def read_chunks(self, name: str) -> Iterator[bytearray]:
        """Yields the bytes of a tensor as they lie in the file, in pieces."""
        n_bytes = self.tensors[name].n_bytes
        for begin in range(0, n_bytes, COPY_CHUNK_BYTES):
            yield self.read_bytes(name, begin, min(COPY_CHUNK_BYTES, n_bytes - begin))

    def read(self, name: str) -> np.ndarray:
        """Reads a floating-point tensor into memory as fp32, in its shape.

        Raises:
            MergeError: Another dtype, or the file ends before.
        """
        info = self.tensors[name]
        if info.dtype not in MERGEABLE_DTYPES:
            raise MergeError(
                f"{self.path}: tensor {name} is {info.dtype}; "
                f"needed is one of {', '.join(MERGEABLE_DTYPES)}"
            )
        stored = np.frombuffer(self.read_bytes(name), NUMPY_DTYPES[info.dtype])
        return to_float(stored, info.dtype).reshape(info.shape)

    def checksum(self, name: str) -> str:
        """Returns the xxh3_128 of a tensor's bytes as hexadecimal text."""
        digest = xxhash.xxh3_128()
        for chunk in self.read_chunks(name):
            digest.update(chunk)
        return digest.hexdigest()


def to_float(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Decodes stored items to fp32; fp32 is returned as it is, without a copy."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):  # an fp64 value beyond fp32 becomes infinite, and is refused
        return stored.astype(np.float32, copy=False)


def from_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Encodes fp32 as stored items, rounded to nearest even; fp32 is returned as it is."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(NUMPY_DTYPES[dtype], copy=False)


def is_finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether no stored item of a floating-point dtype is NaN or infinite."""
    bits = stored.view(f"<u{ITEM_SIZES[dtype]}")
    exponent = bits.dtype.type(EXPONENTS[dtype])
    return not bool(((bits & exponent) == exponent).any())


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    try:
        n_file = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise MergeError(f"{path}: is truncated (only {n_file} bytes); copy it again")
            n_header = struct.unpack("<Q", prefix)[0]
            if n_header > MAX_HEADER_BYTES:
                raise MergeError(
                    f"{path}: is not a safetensors file (its header would be {n_header} bytes; "
                    "a git-lfs pointer or an HTML page?); download it again"
                )
            if 8 + n_header > n_file:
                raise MergeError(
                    f"{path}: is truncated (header needs {8 + n_header} bytes, file has {n_file}); "
                    "copy it again"
                )
            header = json.loads(file.read(n_header))
    except OSError as error:
        raise MergeError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    # RecursionError: JSON that is nested thousands deep
    except (ValueError, RecursionError) as error:
        if isinstance(error, MergeError):
            raise
        raise MergeError(f"{path}: has a broken safetensors header; copy it again") from error

    start = 8 + n_header
    try:
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        tensors = {
            name: TensorInfo(
                name=name,
                dtype=str(entry["dtype"]),
                shape=tuple(int(length) for length in entry["shape"]),
                begin=start + int(entry["data_offsets"][0]),
                end=start + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
        }
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise MergeError(f"{path}: has a broken safetensors header; copy it again") from error
    _check_layout(path, tensors, start, n_file)
    return metadata, tensors


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], start: int, n_file: int) -> None:
    """Checks that every tensor has the bytes its shape needs, inside the file, each its own."""
    n_needed = max((info.end for info in tensors.values()), default=start)
    if n_needed > n_file:
        raise MergeError(
            f"{path}: is truncated (tensors need {n_needed} bytes, file has {n_file}); "
            "copy it again"
        )
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        n_items = 1
        for length in info.shape:
            n_items *= length
        if info.dtype not in ITEM_SIZES:
            raise MergeError(
                f"{path}: tensor {info.name} has dtype {info.dtype}, which can neither be merged "
                f"nor copied; use a checkpoint in one of {', '.join(MERGEABLE_DTYPES)}"
            )
        if info.n_bytes != n_items * ITEM_SIZES[info.dtype]:
            raise MergeError(
                f"{path}: tensor {info.name} of shape {list(info.shape)} and dtype {info.dtype} "
                f"cannot have {info.n_bytes} bytes; copy the file again"
            )
        if info.begin < end or min(info.shape, default=0) < 0:
            raise MergeError(
                f"{path}: tensor {info.name} lies over another one; copy the file again"
            )
        end = info.end


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lays out a safetensors file before any of its tensors exists.

    Args:
        tensors: (name, dtype, shape) in the order in which they lie in the file.
        metadata: Text entries of the header.

    Returns:
        The bytes that come before the first tensor, and where each tensor goes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    sizes = []
    offset = 0
    for name, dtype, shape in tensors:
        n_bytes = ITEM_SIZES[dtype]
        for length in shape:
            n_bytes *= length
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + n_bytes],
        }
        sizes.append((name, dtype, shape, offset, offset + n_bytes))
        offset += n_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    start = 8 + len(encoded)
    infos = {
        name: TensorInfo(name, dtype, shape, start + begin, start + end)
        for name, dtype, shape, begin, end in sizes
    }
    return struct.pack("<Q", len(encoded)) + encoded, infos


class ShardWriter:
    """A safetensors file whose header is written first, and whose tensors come in any order.

    The file has its final length from the start, so tensors can be written by several threads at
    once, and a write that was broken off can go on.

    Args:
        path: File; kept as it is when it has this header and length already.
        tensors: (name, dtype, shape) in file order.
        metadata: Text entries of the header.

    Raises:
        MergeError: The disk is full or not writable.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        # The system writes to a file one call at a time, and lets the others spin; they sleep here.
        self._turn = threading.Lock()
        header, self.tensors = encode_header(tensors, metadata)
        n_bytes = max((info.end for info in self.tensors.values()), default=len(header))
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._descriptor, n_bytes)
            write_all(self._descriptor, header, 0)
        except OSError as error:
            raise cannot_write(path, error) from error

    def write(self, name: str, begin: int, data: Any) -> None:
        """Writes bytes of a tensor from an offset in it on.

        Raises:
            MergeError: The disk is full or fails.
        """
        try:
            with self._turn:
                write_all(self._descriptor, data, self.tensors[name].begin + begin)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def checksum(self, name: str) -> str:
        """Returns the xxh3_128 of what the file holds in a tensor's place."""
        info, digest = self.tensors[name], xxhash.xxh3_128()
        for begin in range(info.begin, info.end, COPY_CHUNK_BYTES):
            digest.update(
                os.pread(self._descriptor, min(COPY_CHUNK_BYTES, info.end - begin), begin)
            )
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the file. Its bytes reach the disk when the system finds time to write them."""
        os.close(self._descriptor)


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Writes bytes at an offset; the system may take them in several parts."""
    view = memoryview(data).cast("B")
    n_written = 0
    while n_written < len(view):
        n_written += os.pwrite(descriptor, view[n_written:], offset + n_written)


def cannot_write(path: Path, error: OSError) -> MergeError:
    """The one line for a file or folder that the system does not let be written."""
    return MergeError(
        f"{path}: cannot be written ({error.strerror}); free space or choose another output"
    )
