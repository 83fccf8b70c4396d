"""A checkpoint folder: which files belong to it, what they hold, and a hash of its weights.

Only safetensors: a pickle can run code when it is opened.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from merge.errors import MergeError
from merge.shards import SafetensorsFile, TensorInfo, hash_file

INDEX_NAME = "model.safetensors.index.json"


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
