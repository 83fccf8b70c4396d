"""Shapes of a policy, from its config alone: how many parameters lie where. No torch, no hub.

A config comes from a checkpoint folder, or, for models that were not downloaded, from a card in
configs/shapes: the numbers of the hub's config.json that decide on shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from configs.errors import ConfigError

VISION_TYPES = ("qwen2_5_vl",)
TEXT_TYPES = ("qwen2",)


@dataclass(frozen=True)
class VisionShape:
    """Vision tower of Qwen2.5-VL: patch embedding, gated blocks, merger."""

    layers: int
    hidden: int
    intermediate: int
    out_hidden: int
    """width of the language module"""
    patch_values: int
    """values of one patch: channels x frames x height x width"""
    patches_per_token: int
    """patches merged into one token of the language module"""

    @property
    def n_parameters(self) -> int:
        """Every linear but the patch embedding has a bias, every norm one weight a channel."""
        d, f = self.hidden, self.intermediate
        merged = d * self.patches_per_token
        block = 4 * d * d + 4 * d + 3 * d * f + 2 * f + d + 2 * d
        merger = d + merged * merged + merged + merged * self.out_hidden + self.out_hidden
        return self.patch_values * d + self.layers * block + merger


@dataclass(frozen=True)
class ModelShape:
    """Decoder of the Qwen2 family, and its vision tower if it has one."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    """output head and token embeddings are one matrix"""
    vision: VisionShape | None = None

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the key heads, and of the value heads."""
        return self.kv_heads * self.head_dim

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's seven linears, by name."""
        h, q, kv, f = self.hidden, self.query_width, self.kv_width, self.intermediate
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }

    @property
    def n_linear(self) -> int:
        """Weights of the decoder's linears: what a token is multiplied by."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_sizes.values())

    @property
    def n_head(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    @property
    def n_language(self) -> int:
        """Decoder: linears, biases of q, k and v, two norms a layer and the last one."""
        small = self.query_width + 2 * self.kv_width + 2 * self.hidden
        return self.n_linear + self.layers * small + self.hidden

    @property
    def n_embedding(self) -> int:
        """Token embeddings, and the output head where it is another matrix."""
        return self.n_head * (1 if self.is_tied else 2)

    @property
    def n_vision(self) -> int:
        """Vision tower and merger."""
        return self.vision.n_parameters if self.vision else 0

    @property
    def n_parameters(self) -> int:
        """All of them."""
        return self.n_language + self.n_embedding + self.n_vision

    def n_lora(self, rank: int, targets: Sequence[str] | None = None) -> int:
        """An adapter: rank x (inputs + outputs) for each linear, in every layer.

        Args:
            rank: of the adapter.
            targets: ends of the names of the linears that get one; None = all seven.
        """
        sizes = self.linear_sizes
        chosen = [n for n in sizes if targets is None or any(n.endswith(t) for t in targets)]
        return self.layers * rank * sum(sum(sizes[name]) for name in chosen)


def shape_of(config: Mapping[str, Any], origin: str) -> ModelShape:
    """Reads a model's config: one level, as on the hub, or nested, as transformers 5 saves it.

    Args:
        config: content of a config.json.
        origin: where it is from, for messages.

    Raises:
        ConfigError: another architecture, or a key is missing.
    """
    kind = config.get("model_type")
    if kind not in VISION_TYPES + TEXT_TYPES:
        raise ConfigError(
            f"{origin}: no memory model for the architecture '{kind}'; "
            f"there is one for {', '.join(VISION_TYPES + TEXT_TYPES)}"
        )
    text = {**config, **(config.get("text_config") or {})}
    try:
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        return ModelShape(
            layers=text["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            intermediate=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            is_tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings"))),
            vision=_vision(config["vision_config"]) if kind in VISION_TYPES else None,
        )
    except KeyError as error:
        raise ConfigError(
            f"{origin}: the config has no {error}; take the model's whole config.json"
        ) from error


def _vision(config: Mapping[str, Any]) -> VisionShape:
    channels = config.get("in_channels", config.get("in_chans", 3))
    return VisionShape(
        layers=config["depth"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        out_hidden=config["out_hidden_size"],
        patch_values=channels * config["temporal_patch_size"] * config["patch_size"] ** 2,
        patches_per_token=config["spatial_merge_size"] ** 2,
    )


@cache
def shape_cards() -> dict[str, dict[str, Any]]:
    """The shipped configs, by hub id."""
    cards = {}
    folder = Path(str(resources.files("configs"))) / "shapes"
    for path in sorted(folder.glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        cards.update(dict.fromkeys(card["names"], card))
    return cards


def find_shape(*references: str | None) -> tuple[ModelShape, str]:
    """Shape of the first reference that is known; a merged folder that is still to be made has the
    shape of the VLM that is named after it.

    Args:
        references: checkpoint folders or hub ids, None = not set.

    Returns:
        The shape and where it is from.

    Raises:
        ConfigError: none of them is known here.
    """
    for reference in references:
        if not reference:
            continue
        path = Path(reference) / "config.json"
        if path.is_file():
            return shape_of(json.loads(path.read_text(encoding="utf-8")), str(path)), str(path)
        name = reference.partition("@")[0]
        if name in shape_cards():
            return shape_of(shape_cards()[name], name), f"card of {name}"
    named = ", ".join(reference for reference in references if reference)
    raise ConfigError(
        f"models.init: no config.json of {named or 'any model'} here, no card in configs/shapes; "
        "download the model, or name its folder"
    )
