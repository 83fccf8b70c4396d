"""Log-probs of sampled tokens under the current policy, with gradients: the forward of the loss.

Differs from TRL's forward in cost, not in value. Each distinct picture goes through the vision
tower once, each distinct prompt through the language module once (its keys and values serve the
whole group, gradients included), and of equal episodes one. Completions are sorted by length into
buckets, so that short ones are not padded to the longest. The last layer and the LM head work only
where a token of the policy is predicted. Positions are those of the rollout.

The work happens inside `model.forward` (a keyword switches to it), because DeepSpeed and DDP hook
that call.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

from train.libraries import require_c_compiler
from train.trim import only_at, recomputes
from train.vision import EncodedImage, encode_pictures, mrope_positions

logger = logging.getLogger(__name__)

ROWS_PER_BUCKET = 32
"""Rows padded to a common length in one forward; small enough for a core's cache to matter."""

MAX_LOGITS = 2**26
"""Logits kept whole (256 MiB); more go through TRL's kernel, which computes them twice instead."""


@dataclass
class ScoredRows:
    """What the scoring forward needs of a batch of B episodes."""

    prompt_ids: list[list[int]]
    """prompt tokens of each row"""
    completion_ids: list[list[int]]
    """completion tokens of each row, at least one"""
    policy_mask: list[np.ndarray]
    """bool [C_b]: completion tokens to score"""
    pictures: list[list[EncodedImage]]
    """pictures of each row, in the order of their placeholders"""
    width: int
    """C, columns of the result"""
    n_buckets: int
    """forwards to split the rows into; the same on every process, for ZeRO-3 makes each of them a
    collective; a process with fewer rows reads one of them again without scoring it"""
    with_entropy: bool = False
    """the entropy is part of the loss, too"""


def rows_from_padded(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    policy_mask: torch.Tensor,
    pictures: list[list[EncodedImage]],
    n_buckets: int,
    with_entropy: bool = False,
) -> ScoredRows:
    """Strips TRL's padding (prompts on the left, completions on the right).

    Args:
        input_ids: int64 [B, P + C].
        attention_mask: int [B, P + C], 1 for real tokens.
        policy_mask: int [B, C], 1 for tokens to score.
        pictures: B lists.
        n_buckets, with_entropy: see ScoredRows.
    """
    width = policy_mask.shape[1]
    is_real = attention_mask.bool().cpu().numpy()
    ids, wanted = input_ids.cpu().numpy(), policy_mask.bool().cpu().numpy()
    prompts = [row[:-width][real[:-width]] for row, real in zip(ids, is_real, strict=True)]
    completions = [row[-width:][real[-width:]] for row, real in zip(ids, is_real, strict=True)]
    return ScoredRows(
        prompt_ids=[row.tolist() for row in prompts],
        completion_ids=[row.tolist() for row in completions],
        policy_mask=[row[: len(c)] for row, c in zip(wanted, completions, strict=True)],
        pictures=pictures,
        width=width,
        n_buckets=n_buckets,
        with_entropy=with_entropy,
    )


def install(model: Any, *, temperature: float, merge_size: int, blank: EncodedImage | None) -> None:
    """Teaches `model.forward` the keyword `scored_rows`.

    Args:
        model: the causal model (inside a PEFT wrapper: the base model).
        temperature: the logits are divided by it, as in sampling.
        merge_size: patches merged per side into one picture token.
        blank: encoded instead of pictures where a batch has none, so that every process runs the
            vision tower (ZeRO would wait for ever otherwise); None for a text model.
    """
    original = model.forward

    def forward(self: Any, *args: Any, scored_rows: ScoredRows | None = None, **kwargs: Any) -> Any:
        if scored_rows is None:
            return original(*args, **kwargs)
        return score_rows(self, scored_rows, temperature, merge_size, blank)

    model.forward = types.MethodType(forward, model)


def why_not_shared(model: Any) -> str | None:
    """Why the prompts of a group cannot be read once for all its rows; None if they can.

    A prefix needs explicit masks, and keys and values that are not thrown away. Rows of several
    prompts, and prompts with and without pictures, are no obstacle.
    """
    attention = model.config.get_text_config()._attn_implementation
    if attention != "sdpa":
        return f"attention '{attention}' takes no mask of a prefix (attn_implementation sdpa does)"
    if recomputes(model.model):
        return (
            "activation checkpointing throws keys and values away "
            "(grpo.activation_checkpointing: false shares the prompts of a group)"
        )
    return None


def score_rows(
    model: Any,
    rows: ScoredRows,
    temperature: float,
    merge_size: int = 2,
    blank: EncodedImage | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the chosen tokens.

    Returns:
        log-probs and entropies, float32 [B, C]; 0 where policy_mask is 0. Differentiable.
    """
    reader = _Reader(model, merge_size)
    shown = [picture for pictures in rows.pictures for picture in pictures]
    reader.features = encode_pictures(model.model, shown or ([blank] if blank else []))
    number, first = _distinct(_row_key(rows, i) for i in range(len(rows.completion_ids)))
    prefix = _read_prompts(reader, rows, first) if reader.can_share else None

    by_length = sorted(range(len(first)), key=lambda n: len(rows.completion_ids[first[n]]))
    ballast = max(0, rows.n_buckets - len(first))
    order = np.array([by_length[0]] * ballast + by_length)
    hidden: list[torch.Tensor] = []
    targets: list[int] = []
    where: dict[int, np.ndarray] = {}  # distinct row -> its entries in the flat lists
    for bucket in np.array_split(np.arange(len(order)), rows.n_buckets):
        distinct = order[bucket]
        chosen = [
            np.flatnonzero(rows.policy_mask[first[n]] & (place >= ballast))
            for place, n in zip(bucket, distinct, strict=True)
        ]
        for n, tokens, states in zip(
            distinct,
            chosen,
            _read_bucket(reader, rows, [first[n] for n in distinct], chosen, prefix),
            strict=True,
        ):
            if len(tokens):
                where[int(n)] = np.arange(len(targets), len(targets) + len(tokens))
            hidden.append(states)
            targets += [rows.completion_ids[first[n]][t] for t in tokens]
    target = torch.tensor(targets, dtype=torch.long, device=reader.device)
    logps, entropies = _head(model, torch.cat(hidden), target, temperature, rows.with_entropy)
    if blank is not None and not shown:
        # keeps the vision tower in the graph with a gradient of zero
        logps = logps + 0.0 * next(iter(reader.features.values())).sum().to(logps.dtype)

    # equal rows share their entries; their gradients add up there
    source = np.concatenate([where.get(n, np.empty(0, np.int64)) for n in number])
    place = np.concatenate(
        [i * rows.width + np.flatnonzero(mask) for i, mask in enumerate(rows.policy_mask)]
    )
    flat_source = torch.as_tensor(source, dtype=torch.long, device=reader.device)
    flat_place = torch.as_tensor(place, dtype=torch.long, device=reader.device)
    empty = torch.zeros(len(number) * rows.width, device=reader.device, dtype=logps.dtype)
    shape = (len(number), rows.width)
    return (
        empty.index_put((flat_place,), logps.index_select(0, flat_source)).view(shape),
        empty.index_put((flat_place,), entropies.index_select(0, flat_source)).view(shape),
    )


# ---------------------------------------------------------------- reading tokens


class _Reader:
    """Runs rows of tokens through the backbone, with or without a prefix before them."""

    def __init__(self, model: Any, merge_size: int) -> None:
        self.model = model
        self.merge_size = merge_size
        self.device = model.device  # the head's own would have ZeRO-3 keep that whole from now on
        self.image_token_id = getattr(model.config, "image_token_id", None)
        self.attention = model.config.get_text_config()._attn_implementation
        self.features: dict[str, torch.Tensor] = {}
        obstacle = why_not_shared(model)
        self.can_share = obstacle is None
        if obstacle is not None and not getattr(model, "_said_not_shared", False):
            logger.info("every row reads its whole prompt: %s", obstacle)
            model._said_not_shared = True

    def read(
        self,
        token_ids: Sequence[list[int]],
        pictures: Sequence[list[EncodedImage]],
        starts: Sequence[int],
        places: Sequence[np.ndarray],
        cache: _Prefix | None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Hidden states of chosen tokens.

        Args:
            token_ids: b rows, padded here on the right, behind all that counts.
            pictures: b lists.
            starts: M-RoPE position of each row's first token.
            places: per row the tokens whose states are wanted.
            cache: takes or gives keys and values; None to read rows by themselves.

        Returns:
            [b, N, hidden], rows with fewer than N places padded; next position of each row.
        """
        n_rows, width = len(token_ids), max(map(len, token_ids))
        ids = np.zeros((n_rows, width), dtype=np.int64)
        positions = np.zeros((3, n_rows, width), dtype=np.int64)
        wanted = np.zeros((n_rows, max(1, *map(len, places))), dtype=np.int64)
        after = []
        for i, tokens in enumerate(token_ids):
            ids[i, : len(tokens)] = tokens
            wanted[i, : len(places[i])] = places[i]
            positions[:, i, : len(tokens)], end = mrope_positions(
                tokens,
                [picture.grid for picture in pictures[i]],
                self.image_token_id,
                self.merge_size,
                starts[i],
            )
            after.append(end)
        inputs: dict[str, Any] = {"input_ids": torch.as_tensor(ids, device=self.device)}
        shown = [picture for images in pictures for picture in images]
        if shown:
            pooled = tuple(self.features[picture.key] for picture in shown)
            inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=pooled)}
        place = torch.as_tensor(wanted, device=self.device)
        position_ids = torch.as_tensor(positions, device=self.device)
        masks, seen = self._masks(token_ids, width, place, cache)
        with only_at(self.model.model, place, seen) as is_trimmed:
            states = self.model.model(
                **inputs,
                position_ids=position_ids if self.image_token_id is not None else position_ids[0],
                attention_mask=masks,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        if not is_trimmed:
            states = states[torch.arange(n_rows, device=self.device)[:, None], place]
        return states, after

    def _masks(
        self, token_ids: Sequence[list[int]], width: int, place: torch.Tensor, cache: _Prefix | None
    ) -> tuple[Any, torch.Tensor]:
        """Masks for the model, and bool [b, 1, N, S] for the chosen tokens alone."""
        token = torch.arange(width, device=self.device)
        seen = token <= place[:, :, None]
        if cache is not None and cache.rows is not None:
            before = cache.visible()[:, None]
            seen = torch.cat([before.expand(-1, place.shape[1], -1), seen], dim=2)
            causal = (token <= token[:, None]).expand(len(place), -1, -1)
            full = torch.cat([before.expand(-1, width, -1), causal], dim=2)[:, None]
            return {"full_attention": full, "sliding_attention": full}, seen[:, None]
        if self.attention == "sdpa":
            # plain causal attention, the fast kernel; padding lies behind
            return {"full_attention": None, "sliding_attention": None}, seen[:, None]
        lengths = torch.tensor([len(tokens) for tokens in token_ids], device=self.device)
        return (token < lengths[:, None]).long(), seen[:, None]


class _Prefix:
    """Keys and values of the distinct prompts, handed to the rows that go on from them.

    Has the members of `transformers.Cache` that a model's forward calls. While `rows` is None it
    records; afterwards `rows` [b] says which prompt each row of the call continues.
    """

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.rows: torch.Tensor | None = None
        self.lengths = torch.empty(0)
        self.states = torch.empty(0)
        self.after: list[int] = []
        self.number: dict[int, int] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Records [Q, H, P, D], or puts the prompts before [b, H, T, D]."""
        if self.rows is None:
            self.keys.append(key_states)
            self.values.append(value_states)
            return key_states, value_states
        # index_select, not indexing: its backward adds whole prompts, not single numbers
        key = self.keys[layer_idx].index_select(0, self.rows)
        value = self.values[layer_idx].index_select(0, self.rows)
        return torch.cat([key, key_states], dim=2), torch.cat([value, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so nothing derives from it."""
        return 0

    def visible(self) -> torch.Tensor:
        """bool [b, P]: prompt tokens that are no padding."""
        assert self.rows is not None
        slots = torch.arange(self.keys[0].shape[2], device=self.rows.device)
        return slots < self.lengths[self.rows][:, None]


def _read_prompts(reader: _Reader, rows: ScoredRows, first: list[int]) -> _Prefix:
    """Reads every distinct prompt of the rows `first` once."""
    prefix = _Prefix()
    owner, leaders = _distinct(
        (tuple(rows.prompt_ids[i]), tuple(p.key for p in _split_pictures(reader, rows, i)[0]))
        for i in first
    )
    prefix.number = dict(zip(first, owner, strict=True))
    chosen = [first[n] for n in leaders]
    lengths = [len(rows.prompt_ids[i]) for i in chosen]
    states, prefix.after = reader.read(
        [rows.prompt_ids[i] for i in chosen],
        [_split_pictures(reader, rows, i)[0] for i in chosen],
        [0] * len(chosen),
        [np.array([n - 1]) for n in lengths],
        prefix,
    )
    prefix.states = states[:, 0]
    prefix.lengths = torch.tensor(lengths, device=reader.device)
    return prefix


def _read_bucket(
    reader: _Reader,
    rows: ScoredRows,
    bucket: list[int],
    chosen: list[np.ndarray],
    prefix: _Prefix | None,
) -> list[torch.Tensor]:
    """Per row the states from which its chosen completion tokens are predicted, [n, hidden].

    A token is predicted at the one before it; the first one at the prompt's last.
    """
    if prefix is None:
        full = [rows.prompt_ids[i] + rows.completion_ids[i] for i in bucket]
        places = [len(rows.prompt_ids[i]) + c - 1 for i, c in zip(bucket, chosen, strict=True)]
        pictures = [rows.pictures[i] for i in bucket]
        states, _ = reader.read(full, pictures, [0] * len(bucket), places, None)
        return [states[k, : len(c)] for k, c in enumerate(chosen)]
    numbers = [prefix.number[i] for i in bucket]
    prefix.rows = torch.tensor(numbers, device=reader.device)
    states, _ = reader.read(
        [rows.completion_ids[i] for i in bucket],
        [_split_pictures(reader, rows, i)[1] for i in bucket],
        [prefix.after[n] for n in numbers],
        [c[c > 0] - 1 for c in chosen],
        prefix,
    )
    found = []
    for k, (n, c) in enumerate(zip(numbers, chosen, strict=True)):
        own = states[k, : int((c > 0).sum())]
        has_first = len(c) > 0 and c[0] == 0
        found.append(torch.cat([prefix.states[n : n + 1], own]) if has_first else own)
    return found


def _head(
    model: Any, hidden: torch.Tensor, target: torch.Tensor, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target token and entropy of its distribution, float32 [N].

    Args:
        model: gives the LM head.
        hidden: [N, hidden].
        target: int64 [N].
        temperature: the logits are divided by it.
        with_entropy: the entropy is part of the loss, too.
    """
    head = model.get_output_embeddings()
    if len(hidden) * head.out_features > MAX_LOGITS:
        if hidden.is_cuda:
            require_c_compiler()
        with _in_tiles(head, target, temperature, with_entropy):
            log_probs, entropy = head(hidden)
        return log_probs, entropy
    log_probs = (head(hidden).float() / temperature).log_softmax(-1)
    with torch.set_grad_enabled(with_entropy and torch.is_grad_enabled()):
        entropy = -torch.linalg.vecdot(log_probs.exp(), log_probs)
    return log_probs.gather(1, target[:, None])[:, 0], entropy


@contextmanager
def _in_tiles(
    head: Any, target: torch.Tensor, temperature: float, with_entropy: bool
) -> Iterator[None]:
    """Within the block the head gives [2, N], log-probs and entropies, and keeps no logits.

    ZeRO-3 gathers the weight where the head itself is called, in the backward too, and wants the
    same calls of every process, whichever way each of them takes. A backward begins once for each
    tensor that a call returns; hence a single one, as with whole logits.
    """

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        log_probs, entropy, *_ = _ChunkedLogProbFunction.apply(
            hidden,
            head.weight,
            head.bias,
            target,
            temperature,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            ("log_probs", "entropy"),
        )
        return torch.stack([log_probs, entropy if with_entropy else entropy.detach()])

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


# ---------------------------------------------------------------- helpers


def _distinct(keys: Any) -> tuple[list[int], list[int]]:
    """Number of each key in order of appearance, and the index at which each number appeared."""
    numbers: dict[Hashable, int] = {}
    number: list[int] = []
    first: list[int] = []
    for i, key in enumerate(keys):
        if key not in numbers:
            numbers[key] = len(first)
            first.append(i)
        number.append(numbers[key])
    return number, first


def _row_key(rows: ScoredRows, i: int) -> Hashable:
    pictures = tuple(picture.key for picture in rows.pictures[i])
    tokens = (tuple(rows.prompt_ids[i]), tuple(rows.completion_ids[i]))
    return (*tokens, pictures, rows.policy_mask[i].tobytes())


def _split_pictures(
    reader: _Reader, rows: ScoredRows, i: int
) -> tuple[list[EncodedImage], list[EncodedImage]]:
    """Pictures of a row's prompt, and those that came back in its observations."""
    pictures = rows.pictures[i]
    if not pictures:
        return [], []
    left = rows.prompt_ids[i].count(reader.image_token_id)  # type: ignore[arg-type]
    n_prompt = 0
    while left > 0:
        left -= pictures[n_prompt].n_tokens
        n_prompt += 1
    return pictures[:n_prompt], pictures[n_prompt:]
