"""Key-value cache with a slot per token and row: rows of any length, no padding inside a row.

`transformers`' DynamicCache appends the same number of columns to every row, so a batch whose rows
get observations of different length fills with holes. Here each row is contiguous: its token i lies
in slot i. Everything is allocated once; a row that ends is overwritten by another.
Both classes have the two members of `transformers.Cache` that a model's forward calls.
"""

from __future__ import annotations

import torch


class PrefillCache:
    """Keeps what one prefill computes: per layer keys and values [B, H, T, D]."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one layer; attention sees this call's tokens only."""
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing came before."""
        return 0


class SlotCache:
    """Live cache of a rollout: per layer keys and values [capacity, slots, H, D].

    Before a model call, `select` says which rows the call works on and in which slots its tokens
    go; `update` then writes there and returns the rows' slots up to `width`.
    """

    def __init__(self, capacity: int, n_slots: int) -> None:
        self.capacity = capacity
        self.n_slots = n_slots
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def fill(self, prefill: PrefillCache, counts: list[int], first: int) -> None:
        """Repeats each prefilled prompt for its group, into rows from `first` on.

        Args:
            prefill: keys and values of Q right-padded prompts [Q, H, P, D]; what lies in the
                padding is overwritten before any token may look at it.
            counts: Q group sizes.
            first: first row to write.
        """
        device = prefill.keys[0].device
        repeats = torch.repeat_interleave(torch.tensor(counts, device=device))
        if not self.keys:
            for layer in prefill.keys:
                shape = (self.capacity, self.n_slots, layer.shape[1], layer.shape[3])
                self.keys.append(layer.new_empty(shape))
                self.values.append(layer.new_empty(shape))
        rows = slice(first, first + len(repeats))
        width = prefill.keys[0].shape[2]
        for index, (key, value) in enumerate(zip(prefill.keys, prefill.values, strict=True)):
            self.keys[index][rows, :width] = key.transpose(1, 2)[repeats]
            self.values[index][rows, :width] = value.transpose(1, 2)[repeats]

    def select(self, rows: torch.Tensor | int, slots: torch.Tensor, width: int) -> None:
        """Chooses the next call's rows and slots.

        Args:
            rows: an int n for the first n rows (no copy), or int64 [B] row indices (a copy).
            slots: int64 [B, T] slot of each token.
            width: slots that attention sees; at least the largest slot + 1.
        """
        self._rows = rows
        self._slots = slots
        self._width = width
        self._index = torch.arange(rows, device=slots.device) if isinstance(rows, int) else rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [B, H, T, D] into the chosen slots; returns [B, H, width, D] twice."""
        index = self._index[:, None]
        visible = []
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            layer = store[layer_idx]
            layer[index, self._slots] = states.transpose(1, 2)
            rows = slice(self._rows) if isinstance(self._rows, int) else self._rows
            visible.append(layer[rows, : self._width].transpose(1, 2))
        return visible[0], visible[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in sight; positions are always given, so nothing derives from it."""
        return self._width

    def move(self, target: torch.Tensor, source: torch.Tensor, width: int) -> None:
        """Copies rows `source` [M] over rows `target` [M], slots below `width`."""
        for store in (*self.keys, *self.values):
            store[target, :width] = store[source, :width]
