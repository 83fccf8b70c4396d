"""One token a row through the language module: where a rollout on the CPU spends most of its time.

With few rows a product reads a weight once and computes little with it. The plain forward reads
each weight in a layout that such products first have to reorder; here the weights are reordered
once a rollout (oneDNN's packed layout), query, key and value are one product, and so are gate and
up. The arithmetic is that of the model's layers; only the order of the sums differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from train.cache import SlotCache, slot_attention
from train.shared_prompts import SharedPrompts
from train.trim import KNOWN_LAYERS, heads, rotate

MAX_PACKED_BYTES = 2**32
"""Of weights; a larger model decodes with its own forward rather than need that much twice."""
PACKED_FOR_ROWS = 8
"""Rows for which oneDNN chooses the layout; it serves other numbers as well."""


class FastDecoder:
    """A copy of a language module's weights that decodes.

    Args:
        backbone: the model without its head; of a VLM, the part that holds `language_model`.
        head: the LM head.
    """

    def __init__(self, backbone: Any, head: Any) -> None:
        self._model = _language_model(backbone)
        self._layers = [_Layer(layer) for layer in self._model.layers]
        self._head = _Packed(head)

    @torch.inference_mode()
    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: SlotCache,
        masks: torch.Tensor | None,
        shared: SharedPrompts | None = None,
    ) -> torch.Tensor:
        """Logits behind each token, [n, V].

        Args:
            token_ids: int64 [n].
            positions: int64 [3, n, 1], or [n, 1] for a text model.
            cache: with the rows and slots of these tokens selected.
            masks: bool [n, 1, 1, S], the slots that each row sees; None for all.
            shared: the prompts of these rows, if several rows have the same.
        """
        hidden = self._model.embed_tokens(token_ids)
        cos, sin = self._model.rotary_emb(hidden, positions)
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, cache, masks, shared)
        return self._head(_normed(self._model.norm, hidden))


def can_decode_fast(backbone: Any, head: Any) -> bool:
    """True if the model is one whose arithmetic is known here, in float32 on the CPU."""
    layers = _language_model(backbone).layers
    if not torch.backends.mkldnn.is_available():
        return False
    if any(type(layer).__name__ not in KNOWN_LAYERS for layer in layers):
        return False
    linears = [head, *(linear for layer in layers for linear in _linears(layer))]
    # an adapter or a quantised layer is another class
    is_plain = all(
        type(linear) is torch.nn.Linear
        and linear.weight.dtype == torch.float32
        and linear.weight.device.type == "cpu"
        # ZeRO-3 leaves an empty weight where it was not gathered
        and linear.weight.numel() == linear.in_features * linear.out_features
        for linear in linears
    )
    n_bytes = sum(linear.weight.numel() * 4 for linear in linears) if is_plain else 0
    return is_plain and n_bytes <= MAX_PACKED_BYTES


class _Packed:
    """One or more linears with the same input as one product."""

    def __init__(self, *linears: Any) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.sizes = [len(part) for part in weights]
        self.bias = torch.cat(biases) if biases else None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, sum of out]."""
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs one by one."""
        return self(states).split(self.sizes, dim=-1)


class _Layer:
    """A decoder layer with packed weights."""

    def __init__(self, layer: Any) -> None:
        query, key, value, output, gate, up, down = _linears(layer)
        self.attention = layer.self_attn
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.query_key_value = _Packed(query, key, value)
        self.output, self.gate_up, self.down = _Packed(output), _Packed(gate, up), _Packed(down)

    def __call__(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: SlotCache,
        masks: torch.Tensor | None,
        shared: SharedPrompts | None,
    ) -> torch.Tensor:
        """[n, hidden] -> [n, hidden]; cos and sin [n, 1, D]."""
        attention = self.attention
        parts = self.query_key_value.split(_normed(self.norms[0], hidden))
        query, key, value = (heads(part[:, None], attention.head_dim) for part in parts)
        query = rotate(query, cos[:, None], sin[:, None])
        key = rotate(key, cos[:, None], sin[:, None])
        keys, values = cache.update(key, value, attention.layer_idx)
        scaling = attention.scaling
        if shared is None:
            seen, _ = slot_attention(attention, query, keys, values, masks, scaling=scaling)
            seen = seen.reshape(len(hidden), -1)
        else:
            layer = attention.layer_idx
            seen = shared.attend(
                query[:, :, 0], keys.transpose(2, 3), values, masks, scaling, layer
            )
        hidden = hidden + self.output(seen)
        gate, up = self.gate_up.split(_normed(self.norms[1], hidden))
        return hidden + self.down(functional.silu(gate).mul_(up))


def _normed(norm: Any, states: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(states, (states.shape[-1],), norm.weight, norm.variance_epsilon)


def _language_model(backbone: Any) -> Any:
    return getattr(backbone, "language_model", backbone)


def _linears(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip
