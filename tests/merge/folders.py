"""What the tests of whole merges do with checkpoint folders: write, merge, read, compare."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.engine import merge
from merge.errors import MergeError
from merge.shards import encode_header, from_float
from merge.stats import FILE_NAMES, save_stats

ADDITIVE = (
    "obm", "task_arithmetic", "ties", "dare", "dare_ties", "della", "breadcrumbs", "sce", "ram",
    "ram_plus",
)  # fmt: skip
"""Methods that add what is kept of the task vectors to the base."""
KEEP_ALL = {"density": 1.0, "window": 0.0, "outliers": 0.0, "threshold": 0.0}
"""Settings with which these methods keep every changed entry."""


def run(trio: Any, output: Path, **changes: Any) -> dict[str, Any]:
    """Merges a trio; `changes` may name another base, vlm or agent."""
    paths = {role: changes.pop(role, path) for role, path in trio.paths.items()}
    return merge(**paths, output=output, **changes)


def refuse(tmp_path: Path, match: str, trio: Any, **changes: Any) -> None:
    """A merge that must fail: one clear line, nothing left behind, the inputs as before."""
    before = hash_files(tmp_path)
    inputs = {path: hash_files(path) for path in trio.paths.values()}
    with pytest.raises(MergeError, match=match) as caught:
        run(trio, tmp_path / "out", **({"method": "task_arithmetic"} | changes))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert hash_files(tmp_path) == before
    assert {path: hash_files(path) for path in trio.paths.values()} == inputs


def hash_files(folder: str | Path) -> dict[str, str]:
    """Relative path -> sha256 of the file, or `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(Path(folder).rglob("*"))
    }


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(folder: str | Path) -> dict[str, bytes]:
    """Tensor -> its bytes."""
    return {name: bits(tensor) for name, tensor in weights_of(folder).items()}


def recast(source: str | Path, folder: Path, dtype: torch.dtype) -> str:
    """A copy of a one-file checkpoint in another dtype."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((Path(source) / "config.json").read_bytes())
    tensors = {name: value.to(dtype) for name, value in weights_of(source).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def change_tensors(folder: str | Path, **changed: torch.Tensor) -> Path:
    """Replaces tensors in the file that holds the first of them; returns the file."""
    first = next(iter(changed))
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(path)
        if first in tensors:
            save_file(tensors | changed, path, metadata={"format": "pt"})
            return path
    raise KeyError(first)


def flip_byte(path: Path, offset: int) -> None:
    """Turns over one bit of a file; offsets below zero count from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def write_text_checkpoint(
    folder: str | Path, tensors: Mapping[str, np.ndarray], dtype: str = "F32"
) -> str:
    """A checkpoint of a text model with these tensors alone, each fp32 rounded to `dtype`."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = {"model_type": "qwen2", "hidden_size": 64, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    layout = [(name, dtype, value.shape) for name, value in tensors.items()]
    header, _ = encode_header(layout, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for value in tensors.values():
            file.write(from_float(np.ascontiguousarray(value, np.float32), dtype).tobytes())
    return str(folder)


def write_stats(
    folder: Path,
    seed: int,
    shapes: Mapping[str, Iterable[int]],
    weights: Mapping[str, str] | None = None,
) -> None:
    """Statistics of all kinds for a pico trio, of random inputs, as calibration would leave them.

    Args:
        folder: Gets a file a kind.
        seed: Of the inputs.
        shapes: Canonical name -> shape, for fisher.
        weights: Canonical name -> checksum.
    """
    generator = np.random.default_rng(seed)
    tensors: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in FILE_NAMES}
    aliases = {}
    sites = {"self_attn.q_proj": 64, "self_attn.o_proj": 64, "mlp.gate_proj": 64,
             "mlp.down_proj": 96}  # fmt: skip
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for site, n_inputs in sites.items():
            inputs = generator.normal(size=(200, n_inputs)) * generator.lognormal(size=n_inputs)
            gram = inputs.T @ inputs / len(inputs)
            inverse = np.linalg.inv(gram + 0.01 * np.diag(gram).mean() * np.eye(n_inputs))
            tensors["gram"][prefix + site] = gram.astype(np.float32)
            tensors["diagonal"][prefix + site] = np.diag(gram).astype(np.float32)
            tensors["inverse"][prefix + site] = (1 / np.diag(inverse)).astype(np.float32)
        aliases |= {f"{prefix}self_attn.{x}_proj": f"{prefix}self_attn.q_proj" for x in "kv"}
        aliases[f"{prefix}mlp.up_proj"] = f"{prefix}mlp.gate_proj"
    for name, shape in shapes.items():
        tensors["fisher"][name] = generator.random(tuple(shape), np.float32)
    folder.mkdir(parents=True)
    metadata = {"tokens": "200", "weights": json.dumps(dict(weights or {}))}
    for kind, file_name in FILE_NAMES.items():
        shared = None if kind == "fisher" else aliases
        save_stats(folder / file_name, kind, tensors[kind], metadata, shared)
