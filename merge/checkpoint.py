"""Checkpoints on disk: lazy safetensors in, streamed shards out.

A safetensors file is an 8-byte length, a JSON header, and the tensors' bytes. Headers are parsed
and checked here, before anything else happens, so that a truncated download gives one clear message
and not a half-written output. Tensors are read one at a time, by offset; a written file gets its
header first and then its tensors in order, so no shard is ever held in memory. Two runs with the
same input write the same bytes.

Only safetensors: a pickle can run code when it is opened.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

INDEX_NAME = "model.safetensors.index.json"
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


class Checkpoint:
    """A checkpoint folder: config.json and the headers of its safetensors files.

    Args:
        source: A folder, or the id of a repository on the hub.
        role: base, vlm or agent, for messages.

    Raises:
        MergeError: The folder, config.json or a shard is missing, a shard is truncated, or the
            folder holds pickles only.
    """

    def __init__(self, source: str | Path, role: str) -> None:
        self.source = str(source)
        self.role = role
        self.folder = _resolve_folder(self.source, role)
        self.config = _read_json(self.folder / "config.json", role)
        self.files = [SafetensorsFile(path) for path in _list_shards(self.folder, role)]
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise MergeError(
                        f"{file.path}: tensor {name} is also in {self._file_of[name].path.name}; "
                        "remove the file that does not belong to the checkpoint"
                    )
                self.tensors[name] = info
                self._file_of[name] = file
        self._check_index()

    @property
    def text_config(self) -> dict[str, Any]:
        """Settings of the language module, wherever the architecture keeps them."""
        return dict(self.config.get("text_config") or self.config)

    @property
    def ties_embeddings(self) -> bool:
        """Whether lm_head shares the weight of embed_tokens."""
        tied = self.config.get("tie_word_embeddings")
        return bool(self.text_config.get("tie_word_embeddings", False) if tied is None else tied)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor into memory."""
        return self._file_of[name].read(name)

    def read_chunks(self, name: str) -> Iterator[bytes]:
        """Yields the bytes of one tensor."""
        return self._file_of[name].read_chunks(name)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of each safetensors file, by file name."""
        return {file.path.name: hash_file(file.path) for file in self.files}

    @property
    def sha256(self) -> str:
        """One hash for all weights; see `hash_checkpoint`."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.hashes.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _check_index(self) -> None:
        index_path = self.folder / INDEX_NAME
        if not index_path.exists():
            return
        for name, file_name in _weight_map(index_path, self.role).items():
            if name not in self.tensors or self._file_of[name].path.name != file_name:
                raise MergeError(
                    f"{index_path}: promises tensor {name} in {file_name}, which does not hold it; "
                    "copy the checkpoint again"
                )


def hash_file(path: Path) -> str:
    """Returns the sha256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(COPY_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_checkpoint(source: str | Path) -> str:
    """Returns one sha256 for the weights of a checkpoint.

    It is the hash of the lines `<sha256>  <file name>` of its safetensors files, sorted by name:
    what `sha256sum *.safetensors | sha256sum` prints for a folder that holds nothing else.
    """
    return Checkpoint(source, "checkpoint").sha256


def _resolve_folder(source: str, role: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise MergeError(f"{role} {source}: is a file; give the checkpoint's folder")
    # `runs/vlm` could be a hub id; where a folder `runs` is there, a mistyped path is likelier.
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not folder.parent.is_dir()
    if not is_hub_id:
        raise MergeError(f"{role} {source}: no such folder; check models.{role}")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]
        return Path(snapshot_download(source, allow_patterns=patterns))
    # The hub client has no common base class for "not found", "offline" and "no permission".
    except Exception as error:
        raise MergeError(
            f"{role} {source}: no such folder, and the hub does not give it "
            f"({type(error).__name__}); check models.{role}"
        ) from error


def _read_json(path: Path, role: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MergeError(
            f"{role} {path.parent}: has no {path.name}; give a folder made by save_pretrained"
        ) from error
    except ValueError as error:
        raise MergeError(f"{path}: is not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise MergeError(f"{path}: is not a JSON object; copy it again")
    return content


def _weight_map(index_path: Path, role: str) -> dict[str, str]:
    weight_map = _read_json(index_path, role).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeError(f"{index_path}: has no weight_map; copy the checkpoint again")
    for file_name in weight_map.values():
        if Path(str(file_name)).name != file_name:
            raise MergeError(f"{index_path}: names {file_name!r}, which is not a plain file name")
    return weight_map


def _list_shards(folder: Path, role: str) -> list[Path]:
    if (folder / INDEX_NAME).exists():
        shards = sorted({folder / name for name in _weight_map(folder / INDEX_NAME, role).values()})
    elif (folder / "model.safetensors").exists():
        shards = [folder / "model.safetensors"]
    else:
        shards = _shards_by_number(folder)
    for shard in shards:
        if not shard.exists():
            raise MergeError(
                f"{role} {folder}: {shard.name} is missing; download the checkpoint again"
            )
    if shards:
        return shards
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise MergeError(
            f"{role} {folder}: holds pickled weights only, and opening a pickle can run code; "
            "convert it: load it with transformers and call save_pretrained"
        )
    if (folder / "adapter_model.safetensors").exists():
        raise MergeError(
            f"{role} {folder}: is a LoRA adapter; merge it into its model first "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    raise MergeError(f"{role} {folder}: has no model.safetensors; check models.{role}")


def _shards_by_number(folder: Path) -> list[Path]:
    """Finds model-00001-of-0000N.safetensors without an index; lists the absent ones too."""
    found = sorted(folder.glob("model-*-of-*.safetensors"))
    if not found:
        return []
    match = re.fullmatch(r"model-(\d+)-of-(\d+)\.safetensors", found[0].name)
    if match is None:
        return []
    width, count = len(match[2]), int(match[2])
    return [folder / f"model-{i:0{width}d}-of-{match[2]}.safetensors" for i in range(1, count + 1)]
