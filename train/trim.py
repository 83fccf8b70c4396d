"""Spares the last layer's work at tokens whose output nobody reads.

The log-prob of a token needs the last layer's output at the token before it, and nothing else: at
all other tokens (prompt, observations) the last layer only has to provide keys and values. In a
model of few layers this is a third of the forward and of the backward. Exact, not an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import ALL_ATTENTION_FUNCTIONS, rotate_half

KNOWN_LAYERS = ("Qwen2DecoderLayer", "Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer")
"""Decoder layers whose arithmetic `_forward_at` repeats."""

KNOWN_ATTENTION = ("sdpa", "slot_attention")


@contextmanager
def only_at(backbone: Any, places: torch.Tensor, masks: torch.Tensor) -> Iterator[bool]:
    """Within the block the backbone's output holds these tokens alone.

    Args:
        backbone: the model without its head; of a VLM, the part that holds `language_model`.
        places: int64 [B, N] tokens of each row whose output is needed.
        masks: bool [B, 1, N, S], what each of them sees.

    Yields:
        True if the output is [B, N, hidden]; False if the model is not of a known kind or
        recomputes its layers, so that the output stays [B, T, hidden].
    """
    language_model = getattr(backbone, "language_model", backbone)
    layer = language_model.layers[-1]
    attention = backbone.config.get_text_config()._attn_implementation
    is_known = type(layer).__name__ in KNOWN_LAYERS and attention in KNOWN_ATTENTION
    if not is_known or recomputes(backbone):
        yield False
        return

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return _forward_at(layer, attention, hidden_states, places, masks, **kwargs)

    layer.forward = forward
    try:
        yield True
    finally:
        del layer.forward


def recomputes(backbone: Any) -> bool:
    """True if the layers run again in the backward (activation checkpointing)."""
    layer = getattr(backbone, "language_model", backbone).layers[-1]
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def _forward_at(
    layer: Any,
    attention_name: str,
    hidden_states: torch.Tensor,
    places: torch.Tensor,
    masks: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    past_key_values: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A decoder layer with keys and values of all tokens, and queries at `places` only.

    Args:
        hidden_states: [B, T, hidden].
        position_embeddings: cos and sin, [B, T, D].

    Returns:
        [B, N, hidden].
    """
    attention = layer.self_attn
    n_rows = len(hidden_states)
    cos, sin = position_embeddings
    row = torch.arange(n_rows, device=places.device)[:, None]

    normed = layer.input_layernorm(hidden_states)
    key = heads(attention.k_proj(normed), attention.head_dim)
    value = heads(attention.v_proj(normed), attention.head_dim)
    key = rotate(key, cos[:, None], sin[:, None])
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    query = heads(attention.q_proj(normed[row, places]), attention.head_dim)
    query = rotate(query, cos[row, places][:, None], sin[row, places][:, None])
    seen, _ = ALL_ATTENTION_FUNCTIONS[attention_name](
        attention, query, key, value, masks, dropout=0.0, scaling=attention.scaling
    )
    output = attention.o_proj(seen.reshape(n_rows, places.shape[1], -1))
    output = hidden_states[row, places] + output
    return output + layer.mlp(layer.post_attention_layernorm(output))


def heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return states.view(*states.shape[:2], -1, head_dim).transpose(1, 2)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: states [B, H, T, D], cos and sin [B, 1, T, D]."""
    return states * cos + rotate_half(states) * sin
