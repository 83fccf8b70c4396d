"""Key-value cache with a slot per token and row: rows of any length, no padding inside a row.

`transformers`' DynamicCache appends the same number of columns to every row, so a batch whose rows
get observations of different length fills with holes. Here each row is contiguous: its token i lies
in slot i. Everything is allocated once; a row that ends is overwritten by another.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SLOT_ATTENTION = "slot_attention"
CACHE_SHARE = 0.5
"""Of an accelerator's free memory; the rest is for reading prompts and pictures, and for logits."""


class SlotCache:
    """Live cache of a rollout, with the two members of `transformers.Cache` that a model calls.

    Per layer: keys [rows, H, D, slots], values [rows, H, slots, D]. Decoding one token is bound by
    memory, and this layout lets both products read whole lines.

    Before a model call, `select` says which rows the call works on and in which slots its tokens
    go; `update` then writes there and returns the rows' slots up to `width`.
    """

    def __init__(self, n_rows: int, n_slots: int) -> None:
        self.n_rows = n_rows
        self.n_slots = n_slots
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def select(self, rows: torch.Tensor | int, slots: torch.Tensor, width: int) -> None:
        """Chooses the next call's rows and slots.

        Args:
            rows: an int n for the first n rows (no copy), or int64 [B] row indices (a copy).
            slots: int64 [B, T] slot of each token.
            width: slots that attention sees; at least the largest slot + 1.
        """
        self._rows = slice(rows) if isinstance(rows, int) else rows
        self._index = (torch.arange(rows, device=slots.device) if isinstance(rows, int) else rows)[
            :, None
        ]
        self._slots = slots
        self._width = width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [B, H, T, D] into the chosen slots; returns [B, H, width, D] twice."""
        if layer_idx == len(self.keys):
            heads, dim = key_states.shape[1], key_states.shape[3]
            self.keys.append(_lazy_zeros((self.n_rows, heads, dim, self.n_slots), key_states))
            self.values.append(_lazy_zeros((self.n_rows, heads, self.n_slots, dim), key_states))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._index, :, :, self._slots] = key_states.transpose(1, 2)
        values[self._index, :, self._slots] = value_states.transpose(1, 2)
        visible = keys[self._rows, :, :, : self._width].transpose(2, 3)
        return visible, values[self._rows, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in sight; positions are always given, so nothing derives from it."""
        return self._width

    def copy_rows(
        self, target: torch.Tensor, source: torch.Tensor, width: int, first: int = 0
    ) -> None:
        """Copies slots [first, width) of rows `source` [M] over rows `target` [M]."""
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[target, :, :, first:width] = keys[source, :, :, first:width]
            values[target, :, first:width] = values[source, :, first:width]


def rows_that_fit(config: Any, dtype: torch.dtype, n_slots: int, free: int) -> int:
    """Rows whose cache takes CACHE_SHARE of the free memory, one at least.

    A slot takes 2 L kv e: keys and values of every layer, as in `train.memory.cache_bytes`.

    Args:
        config: of the language module.
        dtype: of the cache.
        n_slots: of a row.
        free: bytes.
    """
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    width = config.num_key_value_heads * head_dim
    row = 2 * config.num_hidden_layers * width * dtype.itemsize * n_slots
    return max(1, int(CACHE_SHARE * free / row))


def _lazy_zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of a tensor's kind; on the CPU memory is only touched where something is written.

    Zeros, since a masked slot still enters a product, with weight 0: it must not be NaN.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    n_bytes = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(n_bytes, dtype=np.uint8)).view(like.dtype).view(shape)


def slot_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a SlotCache: two batched products for one token a row, else SDPA.

    Args:
        module: the attention layer.
        query: [B, Hq, T, D].
        key: [B, H, S, D], a transposed view of the cache; H divides Hq.
        value: [B, H, S, D].
        attention_mask: bool [B, 1, T, S], True = visible; None for one token a row = all visible.
        scaling: factor of the scores.
        **kwargs: for SDPA.

    Returns:
        [B, T, Hq, D] and None.
    """
    n_rows, n_query_heads, n_tokens, dim = query.shape
    if n_tokens > 1:
        # the fast kernels want the last dimension contiguous
        return sdpa_attention_forward(
            module, query, key.contiguous(), value, attention_mask, scaling=scaling, **kwargs
        )
    heads, width = key.shape[1], key.shape[2]
    grouped = query.reshape(n_rows * heads, n_query_heads // heads, dim)
    scores = torch.bmm(grouped, key.transpose(2, 3).view(n_rows * heads, dim, width))
    scores = scores.view(n_rows, -1, width).float().mul_(dim**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask[:, 0], -torch.inf)
    weights = scores.softmax(-1).to(value.dtype).view(n_rows * heads, -1, width)
    output = torch.bmm(weights, value.view(n_rows * heads, width, dim))
    return output.view(n_rows, 1, n_query_heads, dim), None


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
