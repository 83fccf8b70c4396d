"""Attention of decoding rows whose contexts begin with the same prompt.

Each row's cache has the whole prompt, and decoding is bound by reading the cache. Here the prompt's
keys and values are read once for all of its rows: their queries are one product with it, the rest
of each context is a product a row, and one softmax runs over both. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from train.cache import SlotCache


class SharedPrompts:
    """One copy of the distinct prompts' first slots.

    Args:
        cache: after all prompts were read.
        leaders: int64 [Q], a row of each prompt.
        width: slots to share: the shortest prompt's tokens.
    """

    def __init__(self, cache: SlotCache, leaders: torch.Tensor, width: int) -> None:
        self.width = width
        self._keys = [keys[leaders, :, :, :width] for keys in cache.keys]
        self._values = [values[leaders, :, :width] for values in cache.values]
        self._numbers = {number: number for number in range(len(leaders))}
        self._members = torch.empty(0)
        self._places = torch.empty(0)

    def arrange(self, prompts: Sequence[int], n_rows: int) -> None:
        """Says whose prompt is which before the next tokens.

        Args:
            prompts: for each row the number of its prompt, in the order of `leaders`.
            n_rows: rows that decode; those behind them wait and will need their prompts again.
        """
        present = sorted(set(prompts))
        if 2 * len(present) <= len(self._numbers):
            kept = torch.tensor([self._numbers[number] for number in present])
            self._keys = [keys[kept] for keys in self._keys]
            self._values = [values[kept] for values in self._values]
            self._numbers = {number: place for place, number in enumerate(present)}
        rows: list[list[int]] = [[] for _ in self._numbers]
        ranks = []
        for row, number in enumerate(prompts[:n_rows]):
            members = rows[self._numbers[number]]
            ranks.append((self._numbers[number], len(members)))
            members.append(row)
        longest = max(map(len, rows))
        # shorter groups are filled up with row 0, whose results are not read there
        self._members = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
        self._places = torch.tensor([place * longest + rank for place, rank in ranks])

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        masks: torch.Tensor | None,
        scaling: float,
        layer: int,
    ) -> torch.Tensor:
        """Attention of one token a row.

        Args:
            query: [n, Hq, D].
            keys: [n, H, D, S], as the cache has them; H divides Hq.
            values: [n, H, S, D].
            masks: bool [n, 1, 1, S], slots in sight; None for all.
            scaling: factor of the scores.
            layer: index of the layer.

        Returns:
            [n, Hq * D].
        """
        n_rows, heads, dim, n_slots = keys.shape
        own = n_slots - self.width
        by_head = query.view(n_rows, heads, -1, dim)
        of_prompts = self._spread(by_head) @ self._keys[layer]
        of_rows = torch.bmm(
            query.view(n_rows * heads, -1, dim),
            keys[..., self.width :].view(n_rows * heads, dim, own),
        )
        scores = torch.cat([self._collect(of_prompts), of_rows.view(n_rows, heads, -1, own)], -1)
        scores *= scaling
        if masks is not None:
            scores.masked_fill_(~masks, -torch.inf)
        weights = scores.softmax(-1)
        from_prompts = self._spread(weights[..., : self.width]) @ self._values[layer]
        from_rows = torch.bmm(
            weights[..., self.width :].reshape(n_rows * heads, -1, own),
            values[:, :, self.width :].view(n_rows * heads, own, dim),
        )
        return (self._collect(from_prompts) + from_rows.view(by_head.shape)).flatten(1)

    def _spread(self, by_row: torch.Tensor) -> torch.Tensor:
        """[n, H, r, X] -> [Q, H, m * r, X], the rows of each prompt side by side."""
        _, heads, ratio, size = by_row.shape
        n_prompts, longest = self._members.shape
        grouped = by_row if n_prompts == 1 else by_row[self._members.view(-1)]
        grouped = grouped.view(n_prompts, longest, heads, ratio, size).transpose(1, 2)
        return grouped.reshape(n_prompts, heads, longest * ratio, size)

    def _collect(self, by_prompt: torch.Tensor) -> torch.Tensor:
        """The way back, [n, H, r, X]."""
        n_prompts, longest = self._members.shape
        _, heads, _, size = by_prompt.shape
        grouped = by_prompt.view(n_prompts, heads, longest, -1, size).transpose(1, 2)
        by_row = grouped.reshape(n_prompts * longest, heads, -1, size)
        return by_row if n_prompts == 1 else by_row[self._places]
