"""Which numbers of which parameters belong to an attention head of the language module.

Of layer l with H query heads, K key-value heads and D numbers a head, query head h owns

    rows    [h D, (h + 1) D)  of q_proj.weight [H D, hidden] and q_proj.bias
    columns [h D, (h + 1) D)  of o_proj.weight [hidden, H D]

and shares with the H / K heads of its group g = h K // H

    rows    [g D, (g + 1) D)  of k_proj and v_proj, weight [K D, hidden] and bias.

All heads of a layer share q_norm and k_norm [D] (Qwen3) and o_proj.bias [hidden].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from configs.errors import ConfigError

KNOWN_TYPES = ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl")
"""`model_type` of the architectures whose decoder layers are as described above."""

_ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn$")


class Head(NamedTuple):
    """A query head: number of its decoder layer, number within the layer."""

    layer: int
    head: int


@dataclass(frozen=True)
class HeadLayout:
    """How many heads a model has, and how large they are."""

    model_type: str
    n_layers: int
    n_heads: int
    """query heads a layer"""
    n_kv_heads: int
    """key-value heads a layer"""
    head_dim: int

    def heads(self) -> list[Head]:
        """All query heads, layer by layer."""
        return [Head(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]

    def group_of(self, head: int) -> int:
        """Number of the key-value head that a query head reads."""
        return head * self.n_kv_heads // self.n_heads

    def members(self, group: int) -> range:
        """Query heads that read a key-value head."""
        size = self.n_heads // self.n_kv_heads
        return range(group * size, (group + 1) * size)


@dataclass(frozen=True)
class Slice:
    """Part of one parameter of an attention module: `start` to `stop` along `dim`."""

    projection: str
    """q_proj, k_proj, v_proj, o_proj, q_norm or k_norm"""
    part: str
    """weight or bias"""
    dim: int
    start: int
    stop: int


def head_layout(config: Any) -> HeadLayout:
    """Reads the layout from a model's config.

    Args:
        config: transformers config of the whole model.

    Raises:
        ConfigError: an architecture whose heads are not known, or numbers that fit no heads.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in KNOWN_TYPES:
        raise ConfigError(
            f"the attention heads of model_type {model_type!r} are not known; "
            f"known are {', '.join(KNOWN_TYPES)}"
        )
    text = config.get_text_config()
    n_heads = int(text.num_attention_heads)
    n_kv_heads = int(getattr(text, "num_key_value_heads", None) or n_heads)
    if n_heads % n_kv_heads:
        raise ConfigError(
            f"{model_type}: {n_heads} query heads cannot share {n_kv_heads} key-value heads; "
            "correct config.json"
        )
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // n_heads)
    return HeadLayout(model_type, int(text.num_hidden_layers), n_heads, n_kv_heads, head_dim)


def own_slices(layout: HeadLayout, head: int) -> list[Slice]:
    """What a query head alone uses."""
    start, stop = head * layout.head_dim, (head + 1) * layout.head_dim
    return [
        Slice("q_proj", "weight", 0, start, stop),
        Slice("q_proj", "bias", 0, start, stop),
        Slice("o_proj", "weight", 1, start, stop),
    ]


def group_slices(layout: HeadLayout, group: int) -> list[Slice]:
    """What all query heads of a group use: a key-value head."""
    start, stop = group * layout.head_dim, (group + 1) * layout.head_dim
    return [
        Slice(projection, part, 0, start, stop)
        for projection in ("k_proj", "v_proj")
        for part in ("weight", "bias")
    ]


def layer_slices(layout: HeadLayout, hidden: int) -> list[Slice]:
    """What all heads of a layer use.

    Args:
        layout: gives the size of a norm.
        hidden: width of the residual stream.
    """
    return [
        Slice("q_norm", "weight", 0, 0, layout.head_dim),
        Slice("k_norm", "weight", 0, 0, layout.head_dim),
        Slice("o_proj", "bias", 0, 0, hidden),
    ]


def attention_modules(model: Any, layout: HeadLayout) -> list[tuple[str, Any]]:
    """(name, self-attention) of every decoder layer of the language module, in order.

    Args:
        model: the policy, inside a PEFT wrapper or not.
        layout: of the policy.

    Raises:
        ConfigError: not one module a layer, or projections of other sizes than the config says.
    """
    from train.policy import causal_model  # late: it imports transformers

    core = causal_model(model)
    found: dict[int, tuple[str, Any]] = {}
    for name, module in core.named_modules():
        match = _ATTENTION.search(name)
        if match and hasattr(module, "q_proj") and "visual" not in name.split("."):
            found[int(match[1])] = (name, module)
    if sorted(found) != list(range(layout.n_layers)):
        raise ConfigError(
            f"{layout.model_type}: found the attention of layers {sorted(found)}, expected "
            f"{layout.n_layers} layers with q_proj, k_proj, v_proj and o_proj"
        )
    for name, module in found.values():
        _check_sizes(name, module, layout)
    return [found[layer] for layer in range(layout.n_layers)]


def _check_sizes(name: str, module: Any, layout: HeadLayout) -> None:
    queries, keys = layout.n_heads * layout.head_dim, layout.n_kv_heads * layout.head_dim
    wanted = {"q_proj": (0, queries), "k_proj": (0, keys), "v_proj": (0, keys)}
    for projection, (dim, size) in {**wanted, "o_proj": (1, queries)}.items():
        shape = full_shape(base_layer(getattr(module, projection)).weight)
        if len(shape) != 2 or shape[dim] != size:
            raise ConfigError(
                f"{name}.{projection}: has {shape}, which does not fit {layout.n_heads} query and "
                f"{layout.n_kv_heads} key-value heads of {layout.head_dim}; its heads are not known"
            )


def base_layer(projection: Any) -> Any:
    """The linear itself, or the one inside an adapter."""
    return projection.base_layer if hasattr(projection, "base_layer") else projection


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole parameter, of which ZeRO-3 keeps a share in each process."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def head_tensors(
    attention: Any, layout: HeadLayout, head: int, read: Callable[[Any], Any]
) -> Iterator[Any]:
    """The slices that a head works with, its group's keys and values included.

    Args:
        attention: self-attention of the head's layer, without an adapter.
        layout: of the model.
        head: number of the head in its layer.
        read: parameter -> tensor of its shape that is cut, its gradient for instance.

    Yields:
        Views: of q, k and v [D, hidden] and [D], of o [hidden, D].
    """
    for cut in [*own_slices(layout, head), *group_slices(layout, layout.group_of(head))]:
        parameter = getattr(getattr(attention, cut.projection), cut.part, None)
        if parameter is not None:
            yield read(parameter).narrow(cut.dim, cut.start, cut.stop - cut.start)
