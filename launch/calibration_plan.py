"""What a calibration will take: memory, disk, and whether a layer at a time is needed.

All from the headers of the checkpoint's files; nothing is read or run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from launch.errors import LaunchError
from merge.memory import available_memory, size_words
from train.gpu import free_bytes

if TYPE_CHECKING:
    from merge.checkpoint import Checkpoint
    from merge.families import Family

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
HEADROOM = 1.25
"""Memory that a model needs, over its weights: activations of a batch."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that calibrating one checkpoint takes."""

    whole: int
    """memory with the whole model in it"""
    streamed: int
    """memory a layer at a time"""
    hidden_per_token: int
    """disk for hidden states, a layer at a time"""
    files: dict[str, int]
    """kind -> size of its file"""

    def describe(self, streams: bool, kinds: Sequence[str]) -> str:
        """One line for a person."""
        memory = self.streamed if streams else self.whole
        parts = [f"about {size_words(int(memory * HEADROOM))} of memory"]
        if streams:
            parts.append(f"{size_words(1000 * self.hidden_per_token)} of disk per 1000 tokens")
        parts += [f"{kind} file {size_words(self.files[kind])}" for kind in kinds]
        return ", ".join(parts)


def estimate(checkpoint: Checkpoint, family: Family, kinds: Sequence[str], dtype: str) -> Estimate:
    """Sizes from headers.

    Args:
        checkpoint: of `family`.
        family: says which tensors are which.
        kinds: statistics that will be made.
        dtype: float32, bfloat16 or auto (as stored).
    """
    from merge.families import LINEAR, NORM_BIAS, canonical_name, group_of, layer_of

    total = language = 0
    layers: dict[int, int] = {}
    entries: dict[int, int] = {}
    widths: dict[int, list[int]] = {}
    for name, info in checkpoint.tensors.items():
        canonical = canonical_name(family, name) or name
        n_bytes = prod(info.shape) * ITEM_BYTES[dtype] if dtype != "auto" else info.n_bytes
        total += n_bytes
        layer = layer_of(canonical)
        if group_of(family, canonical) in (LINEAR, NORM_BIAS):
            language += prod(info.shape)
        if layer is None:
            continue
        layers[layer] = layers.get(layer, 0) + n_bytes
        entries[layer] = entries.get(layer, 0) + prod(info.shape)
        site = canonical.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")
        if site in family.input_sites and canonical.endswith(".weight"):
            widths.setdefault(layer, []).append(info.shape[1])
    if not widths:
        raise LaunchError(
            f"{checkpoint.folder}: holds no decoder layers of {family.model_type}; "
            "check that the folder is the model's"
        )
    flat = [width for layer in widths.values() for width in layer]
    squares = max(sum(width**2 for width in layer) for layer in widths.values())
    grams = 8 * squares if {"inverse", "gram"} & set(kinds) else 0
    if "inverse" in kinds:  # the factor of the widest, and a copy of it
        grams += 16 * max(flat) ** 2
    largest = max(layers.values())
    # a gradient and a sum for each weight: of the whole model, or of one layer
    an_entry = 4 + ITEM_BYTES.get(dtype, 4) if "fisher" in kinds else 0
    gradients = an_entry * max(entries.values())
    hidden = int(checkpoint.text_config.get("hidden_size", flat[0]))
    return Estimate(
        whole=total + an_entry * language,
        streamed=max(total - sum(layers.values()), largest + max(grams, gradients)),
        # of one layer and of the next; gradients need the inputs of all layers
        hidden_per_token=(len(layers) + 2 if an_entry else 2) * hidden * ITEM_BYTES.get(dtype, 4),
        files={
            "diagonal": 4 * sum(flat),
            "inverse": 4 * sum(flat),
            "gram": 4 * sum(width**2 for width in flat),
            "fisher": 4 * language,
        },
    )


def must_stream(
    expected: Estimate, kinds: Sequence[str], streaming: str | bool, device: str
) -> bool:
    """Whether statistics of inputs are made a layer at a time."""
    if {"inverse", "gram"} & set(kinds) or streaming is True:
        return True
    return streaming == "auto" and not fits(expected, device)


def fits(expected: Estimate, device: str) -> bool:
    """Whether the whole model fits into the memory that is free now."""
    return expected.whole * HEADROOM < free_memory(device)


def free_memory(device: str) -> int:
    """Bytes that a process can take now: of the machine's memory within its limit, or of the GPU's.

    Raises:
        LaunchError: there is no GPU.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise LaunchError("calibration.device=cuda: torch sees no GPU; set cpu")
        return free_bytes(torch.device("cuda")) or 0
    return available_memory()
