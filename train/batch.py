"""The device side of a rollout: rows of tokens that decode together over one cache.

Knows tokens, positions and log-probs; what a turn means and what a tool answers is
`train.rollout`'s affair.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from train.cache import SlotCache
from train.decode import FastDecoder, can_decode_fast
from train.sampling import inverse_cdf, nucleus
from train.shared_prompts import SharedPrompts
from train.trim import only_at
from train.vision import EncodedImage, encode_pictures, mrope_positions

MAX_TOKENS_PER_READ = 32768
"""Padded tokens that one forward reads; bounds the memory of long prompts."""


class TokenBatch:
    """Rows under way: row i of every tensor and of the cache belong together.

    Rows [0, n_active) decode; the rows behind them wait. `number` says which episode a row is, so
    rows can be reordered freely.

    Args:
        core: the causal model.
        n_rows: rows at the start.
        longest_prompt: tokens of the longest prompt.
        budget: tokens of a completion, observations included.
        uniforms: float32 [n_rows, budget] in [0, 1), the randomness of each row.
        temperature: of sampling and log-probs.
        top_p: nucleus.
        greedy: most likely tokens instead of samples.
        suppressed: token ids never chosen.
        merge_size: patches merged per side into one picture token.
    """

    STATE = (
        "number",
        "prompt",
        "length",
        "limit",
        "position",
        "n_sampled",
        "n_in_turn",
        "last_token",
    )

    def __init__(
        self,
        core: Any,
        n_rows: int,
        longest_prompt: int,
        budget: int,
        uniforms: np.ndarray,
        *,
        temperature: float,
        top_p: float,
        greedy: bool,
        suppressed: Sequence[int],
        merge_size: int,
    ) -> None:
        self.backbone, self.head = core.model, core.get_output_embeddings()
        self.image_token_id = getattr(core.config, "image_token_id", None)
        self.temperature, self.top_p, self.greedy = temperature, top_p, greedy
        self.merge_size = merge_size
        self.device = self.head.weight.device
        # one spare slot takes the padding of short observations
        self.cache = SlotCache(n_rows, longest_prompt + budget + 1)
        _refuse_sliding_window(core, self.cache.n_slots)
        long = {"dtype": torch.long, "device": self.device}
        self.n_active = n_rows
        self.budget = budget
        self.number = torch.arange(n_rows, **long)
        self.prompt = torch.arange(n_rows, **long)  # number of the row's prompt
        self.length = torch.zeros(n_rows, **long)  # tokens in the cache
        self.limit = torch.full((n_rows,), self.cache.n_slots, **long)  # length without budget left
        self.position = torch.zeros(n_rows, **long)  # M-RoPE position of the next token
        self.n_sampled = torch.zeros(n_rows, **long)  # policy tokens of the episode
        self.n_in_turn = torch.zeros(n_rows, **long)  # policy tokens of the turn
        self.last_token = torch.zeros(n_rows, **long)  # sampled, not yet in the cache
        # indexed by number, not by row
        self.tokens = torch.zeros((n_rows, budget), **long)
        self.logprobs = torch.zeros((n_rows, budget), device=self.device)
        self.entropies = torch.zeros((n_rows, budget), device=self.device)
        self.forced = torch.full((n_rows, 1), -1, **long)  # tokens of scripted turns
        self.uniforms = torch.from_numpy(uniforms).to(self.device)
        self.suppressed = torch.tensor(list(suppressed), **long)
        self.slot_numbers = torch.arange(self.cache.n_slots, device=self.device)
        self.features: dict[str, torch.Tensor] = {}
        self.logits = torch.empty((n_rows, self.head.weight.shape[0]), device=self.device)
        self._is_fast = can_decode_fast(self.backbone, self.head)
        self._decoder: FastDecoder | None = None
        self._shared: SharedPrompts | None = None
        self._is_arranged = False

    # ---------------------------------------------------------------- reading

    def prefill(
        self,
        token_ids: Sequence[list[int]],
        pictures: Sequence[list[EncodedImage]],
        keys: Sequence[Hashable],
    ) -> None:
        """Reads the prompts of all rows; equal keys mean the same prompt, read once."""
        self.append(range(len(token_ids)), token_ids, pictures, keys)
        self.limit = self.length + self.budget
        leaders: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            leaders.setdefault(key, row)
        numbers = {key: number for number, key in enumerate(leaders)}
        self.prompt = torch.tensor([numbers[key] for key in keys], device=self.device)
        if self._is_fast and len(leaders) < len(keys):
            rows = torch.tensor(list(leaders.values()))
            self._shared = SharedPrompts(self.cache, rows, int(self.length.min()))
            self._is_arranged = False

    def append(
        self,
        rows: Sequence[int],
        token_ids: Sequence[list[int]],
        pictures: Sequence[list[EncodedImage]],
        keys: Sequence[Hashable],
    ) -> None:
        """Appends tokens to some rows and makes them ready to sample.

        Rows with equal keys have the same history and get the same tokens: one of them is read,
        its cache is copied to the others.

        Args:
            rows: R rows.
            token_ids: R lists of tokens with expanded image placeholders.
            pictures: R lists, in the order of the placeholders.
            keys: R keys.
        """
        leaders: dict[Hashable, int] = {}
        for i, key in enumerate(keys):
            leaders.setdefault(key, i)
        chosen = list(leaders.values())
        before = int(self.length[torch.tensor(list(rows), device=self.device)].min())
        longest = max(len(token_ids[i]) for i in chosen)
        step = max(1, MAX_TOKENS_PER_READ // longest)
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            self._read(
                [rows[i] for i in part],
                [token_ids[i] for i in part],
                [pictures[i] for i in part],
            )
        followers = [i for i, key in enumerate(keys) if leaders[key] != i]
        if followers:
            source = torch.tensor([rows[leaders[keys[i]]] for i in followers], device=self.device)
            target = torch.tensor([rows[i] for i in followers], device=self.device)
            width = int(self.length[source].max())
            self.cache.copy_rows(target, source, width, first=before)
            for values in (self.length, self.position, self.logits):
                values[target] = values[source]
        self.n_in_turn[torch.tensor(list(rows), device=self.device)] = 0

    def _read(
        self,
        rows: list[int],
        token_ids: list[list[int]],
        pictures: list[list[EncodedImage]],
    ) -> None:
        """One forward over right-padded tokens; padding lies behind what any token looks at."""
        index = torch.tensor(rows, device=self.device)
        width = max(map(len, token_ids))
        ids = np.zeros((len(rows), width), dtype=np.int64)
        positions = np.zeros((3, len(rows), width), dtype=np.int64)
        after = []
        for i, (tokens, images, start) in enumerate(
            zip(token_ids, pictures, self.position[index].tolist(), strict=True)
        ):
            ids[i, : len(tokens)] = tokens
            positions[:, i, : len(tokens)], end = mrope_positions(
                tokens, [p.grid for p in images], self.image_token_id, self.merge_size, start
            )
            after.append(end)
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(self.device)}
        shown = [picture for images in pictures for picture in images]
        if shown:
            new = [picture for picture in shown if picture.key not in self.features]
            self.features |= encode_pictures(self.backbone, new)
            pooled = tuple(self.features[picture.key] for picture in shown)
            inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=pooled)}
        before = self.length[index]
        slots = before[:, None] + torch.arange(width, device=self.device)
        slots.clamp_(max=self.cache.n_slots - 1)
        visible = int(slots.max()) + 1
        masks = (self.slot_numbers[:visible] <= slots[:, :, None])[:, None]
        lengths = torch.tensor([len(tokens) for tokens in token_ids], device=self.device)
        row, last = torch.arange(len(rows), device=self.device), lengths - 1
        self.cache.select(index, slots, visible)
        with only_at(self.backbone, last[:, None], masks[row, :, last][:, None]) as is_trimmed:
            hidden = self._forward(inputs, torch.from_numpy(positions).to(self.device), masks)
        self.logits[index] = self.head(hidden[:, 0] if is_trimmed else hidden[row, last]).float()
        self.length[index] = before + lengths
        self.position[index] = torch.tensor(after, device=self.device)

    def _forward(
        self, inputs: dict[str, Any], positions: torch.Tensor, masks: torch.Tensor
    ) -> torch.Tensor:
        """Backbone call with explicit positions [3, B, T] and masks [B, 1, T, S]."""
        return self.backbone(
            **inputs,
            position_ids=positions if self.image_token_id is not None else positions[0],
            attention_mask={"full_attention": masks, "sliding_attention": masks},
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    # ---------------------------------------------------------------- writing

    def sample(self) -> torch.Tensor:
        """Draws one token for every active row; returns them, int64 [n_active].

        The log-prob is that of the full distribution at this temperature, as the loss has it:
        suppressed tokens and the nucleus change what is drawn, not what is recorded.
        """
        n = self.n_active
        logits = self.logits[:n] / self.temperature
        normalizer = torch.logsumexp(logits, dim=-1)
        number, drawn = self.number[:n], self.n_sampled[:n]
        probs = torch.exp(logits - normalizer[:, None])
        self.entropies[number, drawn] = normalizer - torch.linalg.vecdot(probs, logits)
        if self.greedy:
            token = logits.index_fill(1, self.suppressed, -torch.inf).argmax(dim=-1)
        else:
            probs[:, self.suppressed] = 0.0
            if self.top_p < 1.0:
                probs = nucleus(probs, self.top_p)
            token = inverse_cdf(probs, self.uniforms[number, drawn])
        if self.forced.shape[1] > 1:
            at = self.n_in_turn[:n].clamp(max=self.forced.shape[1] - 1)
            forced = self.forced[number, at]
            token = torch.where(forced >= 0, forced, token)
        self.tokens[number, drawn] = token
        self.logprobs[number, drawn] = logits.gather(1, token[:, None])[:, 0] - normalizer
        self.last_token[:n] = token
        self.n_sampled[:n] += 1
        self.n_in_turn[:n] += 1
        return token

    def decode(self) -> None:
        """Feeds the last token of every active row."""
        n = self.n_active
        slots = self.length[:n, None]
        shortest, longest = slots.aminmax()
        width = int(longest) + 1
        self.cache.select(n, slots, width)
        positions = self.position[:n, None].expand(3, n, 1)
        masks = (self.slot_numbers[:width] <= slots)[:, None, None]
        if self._is_fast:
            places = positions if self.image_token_id is not None else positions[0]
            seen = None if shortest == longest else masks
            self.logits[:n] = self._decode_fast(self.last_token[:n], places, seen)
        else:
            hidden = self._forward({"input_ids": self.last_token[:n, None]}, positions, masks)
            self.logits[:n] = self.head(hidden[:, -1])
        self.length[:n] += 1
        self.position[:n] += 1

    def _decode_fast(
        self, token_ids: torch.Tensor, positions: torch.Tensor, masks: torch.Tensor | None
    ) -> torch.Tensor:
        if self._decoder is None:
            self._decoder = FastDecoder(self.backbone, self.head)
        if self._shared is not None and not self._is_arranged:
            self._shared.arrange(self.prompt.tolist(), len(token_ids))
            self._is_arranged = True
        return self._decoder(token_ids, positions, self.cache, masks, self._shared)

    def force(self, number: int, token_ids: list[int] | None) -> None:
        """Makes episode `number` say these tokens in its turn; None lets it sample."""
        if self.forced.shape[1] < self.budget + 1:
            shape = (len(self.tokens), self.budget + 1)
            self.forced = torch.full(shape, -1, dtype=torch.long, device=self.device)
        self.forced[number] = -1
        ids = (token_ids or [])[: self.budget]
        self.forced[number, : len(ids)] = torch.tensor(ids, dtype=torch.long, device=self.device)

    def room(self, row: int) -> int:
        """Completion tokens that the row may still get, its last sampled one counted."""
        return int(self.limit[row] - self.length[row]) - 1

    # ---------------------------------------------------------------- order

    def reorder(self, active: list[int], waiting: list[int]) -> list[int]:
        """Puts the active rows first, then the waiting ones; all others are dropped.

        Returns:
            The old row of each new row. Rows that can stay where they are do.
        """
        order = fill_holes(active, 0) + fill_holes(waiting, len(active))
        target = [row for row, source in enumerate(order) if row != source]
        if target:
            source = torch.tensor([order[row] for row in target], device=self.device)
            width = int(self.length[source].max())
            self.cache.copy_rows(torch.tensor(target, device=self.device), source, width)
            self.logits[torch.tensor(target, device=self.device)] = self.logits[source]
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        for name in self.STATE:
            setattr(self, name, getattr(self, name)[index])
        self.n_active = len(active)
        self._is_arranged = False
        return order


def fill_holes(members: list[int], start: int) -> list[int]:
    """Order of `members` in places start, start + 1, ...; a member in its own place stays there."""
    places = range(start, start + len(members))
    outside = [member for member in members if member not in places]
    inside = {member for member in members if member in places}
    return [place if place in inside else outside.pop() for place in places]


def _refuse_sliding_window(core: Any, n_slots: int) -> None:
    config = core.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or []
    if window and "sliding_attention" in layers and n_slots > window:
        raise ValueError(
            f"episodes of up to {n_slots} tokens do not fit the model's sliding window of {window};"
            " lower the completion budget or set use_sliding_window to false in its config"
        )
