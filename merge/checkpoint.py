"""A checkpoint: a folder or a repository on the hub, its settings, and what its files hold.

Only safetensors: a pickle can run code when it is opened.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from merge.errors import MergeError
from merge.shards import SafetensorsFile, TensorInfo

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")

# Some repositories hold their weights twice: `original/`, or Mistral's own `consolidated` files.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]
HUB_SKIPS = ["*/*.safetensors", "consolidated*.safetensors"]


class Checkpoint:
    """A checkpoint: config.json and the headers of its safetensors files.

    Args:
        source: A folder, or the id of a repository on the hub: `org/name` or `org/name@revision`.
        role: base, vlm, agent or the name of a donor, for messages.
        where: What names the source, for messages; None for the setting of the role.

    Raises:
        MergeError: The folder, the repository, config.json or a shard is missing, a shard is
            truncated, or the weights are pickles.
    """

    def __init__(self, source: str | Path, role: str, where: str | None = None) -> None:
        where = where or _setting(role)
        self.source = str(source)
        self.role = role
        # revision: the commit, if the folder is a snapshot of a repository on the hub
        self.folder, self.revision = _resolve(self.source, role, where)
        self.config = _read_json(self.folder / "config.json", role)
        if not isinstance(self.config.get("text_config") or {}, dict):
            raise MergeError(
                f"{self.folder / 'config.json'}: text_config is not an object; copy it again"
            )
        self.files = [SafetensorsFile(path) for path in _list_shards(self.folder, role, where)]
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

    def file_of(self, name: str) -> SafetensorsFile:
        """Returns the file that holds a tensor."""
        return self._file_of[name]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into memory as fp32, in its shape."""
        return self._file_of[name].read(name)

    def checksum(self, name: str) -> str:
        """Returns the xxh3_128 of a tensor's stored bytes as hexadecimal text."""
        return self._file_of[name].checksum(name)

    def _check_index(self) -> None:
        index_path = self.folder / INDEX_NAME
        if not index_path.exists():
            return
        promised = _weight_map(index_path, self.role)
        if not {file.path.name for file in self.files} & set(promised.values()):
            return  # of shards that were there before
        for name, file_name in promised.items():
            if name not in self.tensors or self._file_of[name].path.name != file_name:
                raise MergeError(
                    f"{index_path}: promises tensor {name} in {file_name}, which does not hold it; "
                    "copy the checkpoint again"
                )


def _setting(role: str) -> str:
    return f"models.{role}" if role in ("base", "vlm", "agent") else f"models.donors.{role}"


def _resolve(source: str, role: str, where: str) -> tuple[Path, str | None]:
    folder = Path(os.path.expanduser(source))  # the ~ of an unknown user stays
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise MergeError(f"{role} {source}: is a file; give the checkpoint's folder")
    # `runs/vlm` could be a hub id; where a folder `runs` is there, a mistyped path is likelier.
    match = HUB_ID.fullmatch(source)
    if match is None or Path(source.partition("/")[0]).is_dir():
        raise MergeError(f"{role} {source}: no such folder; check {where}")
    folder = _download(match[1], match[2], role, where)
    # A snapshot's folder is named by its commit.
    return folder, folder.name


def _download(repository: str, revision: str | None, role: str, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    what = f"{role} {repository}" + (f"@{revision}" if revision else "")
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=HUB_FILES,
                ignore_patterns=HUB_SKIPS,
            )
        )
    except RevisionNotFoundError as error:
        raise MergeError(
            f"{what}: the repository has no revision {revision!r}; "
            f"give a branch, tag or commit of it in {where}"
        ) from error
    except RepositoryNotFoundError as error:
        raise MergeError(
            f"{what}: no such folder, and the hub has no such repository or does not show it; "
            f"check {where}, or log in with 'hf auth login'"
        ) from error
    # The client lets errors of its transport through, which have no class in common.
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise MergeError(
            f"{what}: no such folder, and the hub does not give it "
            f"({type(error).__name__}: {reason}); check {where} and the network"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise MergeError(
            f"{what}: has no safetensors; pickled weights are not downloaded, because opening a "
            "pickle can run code. Name a revision that has safetensors (hub: refs/pr/...), or "
            "convert the model in a place of its own"
        )
    return folder


def _read_json(path: Path, role: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MergeError(
            f"{role} {path.parent}: has no {path.name}; give a folder made by save_pretrained"
        ) from error
    except OSError as error:
        raise MergeError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
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


def _list_shards(folder: Path, role: str, where: str) -> list[Path]:
    # first as transformers has it: an index beside the one file is left of shards that were there
    if (folder / SINGLE_NAME).exists():
        shards = [folder / SINGLE_NAME]
    elif (folder / INDEX_NAME).exists():
        shards = sorted({folder / name for name in _weight_map(folder / INDEX_NAME, role).values()})
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
            f"{role} {folder}: is a LoRA adapter; put it into its model first "
            f"(obm merge adapter {folder} --output DIR)"
        )
    raise MergeError(f"{role} {folder}: has no model.safetensors; check {where}")


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
