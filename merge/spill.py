"""Activations on disk: nested values with tensors in them, one safetensors file each.

The structure (dicts, lists, tuples, plain values) stands as JSON in the header, tensors are
numbered; a tensor that occurs twice is stored once. A file is there whole or not at all. Tensors
come back in fresh memory, not mapped, so that kernels meet them aligned as they were.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from merge.errors import MergeError


def empty_folder(folder: Path) -> None:
    """Makes a folder for such files; what is there goes.

    Raises:
        MergeError: It cannot be made.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise MergeError(f"{folder}: cannot be made ({error.strerror}); choose another") from error


def write_values(path: Path, value: Any) -> None:
    """Writes a nested value.

    Args:
        path: File to write, replaced when it exists.
        value: dict with text keys, list, tuple, tensor, text, number, bool or None, nested.

    Raises:
        MergeError: Something else is in it, or the disk is full.
    """
    tensors: dict[int, tuple[str, Tensor]] = {}
    structure = _pack(value, tensors)
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(
            # cloned, for two views of one memory are refused
            {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
             for name, tensor in tensors.values()},
            part,
            {"structure": json.dumps(structure)},
        )  # fmt: skip
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise MergeError(
            f"{path}: cannot be written ({error}); free space or choose another output"
        ) from error


def read_values(path: Path, device: torch.device, *keys: str | int) -> Any:
    """Reads a nested value, or what lies under some keys of it.

    Args:
        path: File that `write_values` wrote.
        device: Where tensors go.
        keys: Keys and indices into the value; tensors elsewhere are not read.

    Raises:
        MergeError: The file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            structure = json.loads(file.metadata()["structure"])
            for key in keys:
                structure = _child(structure, key)
            return _unpack(structure, file, device)
    except (OSError, SafetensorError, ValueError) as error:
        raise MergeError(
            f"{path}: cannot be read ({error}); remove {path.parent} to start anew"
        ) from error


def _pack(value: Any, tensors: dict[int, tuple[str, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in tensors:
            tensors[id(value)] = (str(len(tensors)), value)
        return {"tensor": tensors[id(value)][0]}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise MergeError(
        f"calibration: the layers get a {type(value).__name__}, which cannot be kept; "
        "pass calibration.streaming=false"
    )


def _child(structure: dict[str, Any], key: str | int) -> Any:
    (content,) = structure.values()
    return content[key]


def _unpack(structure: dict[str, Any], file: Any, device: torch.device) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return file.get_tensor(content).clone().to(device)
    if kind == "dict":
        return {key: _unpack(item, file, device) for key, item in content.items()}
    if kind == "value":
        return content
    items = [_unpack(item, file, device) for item in content]
    return items if kind == "list" else tuple(items)
