"""Synthetic trios for the bench: checkpoint folders of Qwen2's shapes, filled with noise.

Every folder is what `save_pretrained` leaves: config.json, shards, an index. Weights are bf16 and
say nothing about quality, only about bytes and work:

    base         N(0, 0.02), norms around 1
    vlm, agent   base + N(0, std), std 1e-3 and 1e-4 in turn from tensor to tensor, rounded to bf16;
                 at 1e-4 a third of the entries does not change, and most of the rest tie

Both donors are text models, so that a tool without vision models can do the same merge. The 7B trio
is sparse: its files have their full length, but only the embedding and the first layer are
written, the rest are holes that read as zero. It shows memory, not speed.

Tensors are written piece by piece; memory stays below 100 MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge.shards import ShardWriter, from_float
from merge.stats import FILE_NAMES, save_stats

ROLES = ("base", "vlm", "agent")
DONORS = ("vlm", "agent")
BASE_STD = 0.02
UPDATE_STDS = (1e-3, 1e-4)
CHUNK = 1 << 20
DONE_NAME = "trio.json"


@dataclass(frozen=True)
class Size:
    """Shapes of one model and how they are stored."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = True
    is_sparse: bool = False
    shard_bytes: int = 1_000_000_000

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors, in file order."""
        hidden, wide = self.hidden_size, self.intermediate_size
        keys = hidden // self.num_attention_heads * self.num_key_value_heads
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name, n_out in (("q", hidden), ("k", keys), ("v", keys)):
                yield f"{prefix}self_attn.{name}_proj.weight", (n_out, hidden)
                yield f"{prefix}self_attn.{name}_proj.bias", (n_out,)
            yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
            yield f"{prefix}mlp.gate_proj.weight", (wide, hidden)
            yield f"{prefix}mlp.up_proj.weight", (wide, hidden)
            yield f"{prefix}mlp.down_proj.weight", (hidden, wide)
            yield f"{prefix}input_layernorm.weight", (hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)

    @property
    def n_bytes(self) -> int:
        """Length of one model's tensors."""
        return 2 * sum(int(np.prod(shape)) for _, shape in self.shapes())

    @property
    def n_written(self) -> int:
        """Bytes of one model that take space on the disk."""
        return 2 * sum(
            int(np.prod(shape)) for name, shape in self.shapes() if self.is_written(name)
        )

    def is_written(self, name: str) -> bool:
        """Whether a tensor is more than a hole."""
        return not self.is_sparse or name.startswith(("model.embed_tokens.", "model.layers.0."))


SIZES = {
    "tiny": Size(512, 64, 176, 2, 4, 2, shard_bytes=100_000),
    "0.5b": Size(151936, 896, 4864, 24, 14, 2, shard_bytes=400_000_000),
    "1.5b": Size(151936, 1536, 8960, 28, 12, 2),
    "7b": Size(
        152064, 3584, 18944, 28, 28, 4,
        tie_word_embeddings=False, is_sparse=True, shard_bytes=4_000_000_000,
    ),
}  # fmt: skip


def make_trio(folder: Path, size: Size, seed: int = 0) -> None:
    """Writes base, vlm, agent and their statistics under a folder, unless they are there.

    Args:
        folder: Gets `base`, `vlm`, `agent` and `stats`.
        size: Shapes.
        seed: Of all numbers.
    """
    done = folder / DONE_NAME
    recipe = {"config": model_config(size), "seed": seed, "sparse": size.is_sparse}
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == recipe:
        return
    done.unlink(missing_ok=True)
    shards = _split(size)
    for role in ROLES:
        _write_companions(folder / role, size, shards)
    generator = np.random.Generator(np.random.SFC64(seed))
    index = 0
    for file_name, entries in shards.items():
        stored = [(name, "BF16", shape) for name, shape in entries]
        metadata = {"format": "pt"}
        writers = {role: ShardWriter(folder / role / file_name, stored, metadata) for role in ROLES}
        for name, shape in entries:
            if size.is_written(name):
                std = UPDATE_STDS[index % len(UPDATE_STDS)]
                _fill(writers, name, int(np.prod(shape)), std, generator)
            index += 1
        for writer in writers.values():
            writer.close()
    for role in DONORS:
        _write_statistics(folder / "stats" / role / FILE_NAMES["diagonal"], size, generator)
    done.write_text(json.dumps(recipe), encoding="utf-8")


def _fill(
    writers: dict[str, ShardWriter],
    name: str,
    n_entries: int,
    update_std: float,
    generator: np.random.Generator,
) -> None:
    """Writes one tensor of all three models, a piece at a time."""
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    for begin in range(0, n_entries, CHUNK):
        n = min(CHUNK, n_entries - begin)
        noise = generator.standard_normal(n, dtype=np.float32)
        stored = from_float(noise * np.float32(BASE_STD) + np.float32(mean), "BF16")
        writers["base"].write(name, 2 * begin, stored)
        base = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        for role in DONORS:
            update = generator.standard_normal(n, dtype=np.float32) * np.float32(update_std)
            writers[role].write(name, 2 * begin, from_float(base + update, "BF16"))


def _split(size: Size) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Shares the tensors out over shards: file name -> its tensors."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    n_bytes = 0
    for name, shape in size.shapes():
        n_tensor = 2 * int(np.prod(shape))
        if groups[-1] and n_bytes + n_tensor > size.shard_bytes:
            groups.append([])
            n_bytes = 0
        groups[-1].append((name, shape))
        n_bytes += n_tensor
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def model_config(size: Size) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "tie_word_embeddings": size.tie_word_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    }


def _write_companions(
    folder: Path, size: Size, shards: dict[str, list[tuple[str, tuple[int, ...]]]]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {name: file_name for file_name, group in shards.items() for name, _ in group}
    index = {"metadata": {"total_size": size.n_bytes}, "weight_map": weight_map}
    files = {"config.json": model_config(size), "model.safetensors.index.json": index}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _write_statistics(path: Path, size: Size, generator: np.random.Generator) -> None:
    """Second moments as lopsided as real ones: lognormal with sigma 1, one number an input."""
    vectors, aliases = {}, {}
    for layer in range(size.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        inputs = {
            "self_attn.q_proj": size.hidden_size,
            "self_attn.o_proj": size.hidden_size,
            "mlp.gate_proj": size.hidden_size,
            "mlp.down_proj": size.intermediate_size,
        }
        for name, n in inputs.items():
            vectors[prefix + name] = generator.lognormal(0.0, 1.0, n).astype(np.float32)
        for name in ("k", "v"):
            aliases[f"{prefix}self_attn.{name}_proj"] = f"{prefix}self_attn.q_proj"
        aliases[f"{prefix}mlp.up_proj"] = f"{prefix}mlp.gate_proj"
    metadata = {"tokens": "0", "batches": "0", "data_sha256": "", "mask_rule": "synthetic"}
    save_stats(path, "diagonal", vectors, metadata, aliases)
