"""One safetensors file: a checked header, tensors on demand, and writing front to back.

A safetensors file is an 8-byte length, a JSON header, and the tensors' bytes. Headers are parsed
and checked here, before anything else happens, so that a truncated download gives one clear message
and not a half-written output. Tensors are read one at a time, by offset; a written file gets its
header first and then its tensors in order, so no shard is ever held in memory. Equal input gives
equal bytes.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge.errors import MergeError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MERGEABLE_DTYPES = ("F64", "F32", "F16", "BF16")

MAX_HEADER_BYTES = 100_000_000
COPY_CHUNK_BYTES = 16 * 1024 * 1024


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
        return self.end - self.begin


class SafetensorsFile:
    """One safetensors file: its checked header, and its tensors on demand.

    Raises:
        MergeError: The file is missing, truncated, or its header does not fit its size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self.tensors = _read_header(path)

    def read_chunks(self, name: str) -> Iterator[bytes]:
        """Yields the bytes of a tensor as they lie in the file."""
        info = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(info.begin)
            n_left = info.n_bytes
            while n_left:
                chunk = file.read(min(n_left, COPY_CHUNK_BYTES))
                if not chunk:
                    raise MergeError(f"{self.path}: ends inside tensor {name}; copy it again")
                n_left -= len(chunk)
                yield chunk

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor into memory, in its stored dtype and shape."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise MergeError(f"{self.path}: tensor {name} has the unknown dtype {info.dtype}")
        if info.n_bytes == 0:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        buffer = bytearray(info.n_bytes)
        with self.path.open("rb") as file:
            file.seek(info.begin)
            if file.readinto(buffer) != info.n_bytes:
                raise MergeError(f"{self.path}: ends inside tensor {name}; copy it again")
        return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).reshape(info.shape)


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
    except ValueError as error:
        if isinstance(error, MergeError):
            raise
        raise MergeError(f"{path}: has a broken safetensors header; copy it again") from error

    start = 8 + n_header
    try:
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {
            name: TensorInfo(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                begin=start + entry["data_offsets"][0],
                end=start + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise MergeError(f"{path}: has a broken safetensors header; copy it again") from error

    n_needed = max((info.end for info in tensors.values()), default=start)
    if n_needed > n_file:
        raise MergeError(
            f"{path}: is truncated (tensors need {n_needed} bytes, file has {n_file}); "
            "copy it again"
        )
    for info in tensors.values():
        n_items = 1
        for length in info.shape:
            n_items *= length
        if info.dtype in DTYPES and info.n_bytes != n_items * DTYPES[info.dtype].itemsize:
            raise MergeError(
                f"{path}: tensor {info.name} of shape {list(info.shape)} and dtype {info.dtype} "
                f"cannot have {info.n_bytes} bytes; copy the file again"
            )
    return metadata, tensors


def write_safetensors(
    path: Path,
    tensors: Sequence[TensorInfo],
    read: Callable[[str], Iterable[bytes]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file tensor by tensor.

    Args:
        path: File to write; the caller renames it into place.
        tensors: What to write, in this order; offsets are computed anew.
        read: Gives the bytes of the tensor of a name, in pieces.
        metadata: Text entries of the header.

    Raises:
        MergeError: The disk is full or not writable.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in tensors:
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.n_bytes],
        }
        offset += info.n_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8

    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)))
            file.write(encoded)
            for info in tensors:
                n_written = sum(file.write(chunk) for chunk in read(info.name))
                if n_written != info.n_bytes:
                    raise AssertionError(f"{info.name}: {n_written} bytes, not {info.n_bytes}")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MergeError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another output"
        ) from error


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Returns the bytes of a tensor in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Writes tensors that are in memory, in the order of their names."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    infos = [
        TensorInfo(name, names[value.dtype], tuple(value.shape), 0, value.numel() * value.itemsize)
        for name, value in sorted(tensors.items())
    ]
    write_safetensors(path, infos, lambda name: [tensor_bytes(tensors[name])], metadata)


def hash_file(path: Path) -> str:
    """Returns the sha256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(COPY_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
