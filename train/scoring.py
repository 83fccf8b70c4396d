"""Log-probs of sampled tokens under the current policy, with gradients: the forward of the loss.

Differs from TRL's forward in cost, not in value: each distinct picture goes through the vision
tower once, however many rows show it; rows are sorted by length into buckets, so that short
episodes are not padded to the longest; the LM head reads only positions whose token the policy
chose; positions are those of the rollout. The head itself is TRL's chunked kernel.

The work happens inside `model.forward` (a keyword switches to it), because DeepSpeed and DDP hook
that call.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import (
    _CHUNKED_LOGPROB_CHUNK_SIZE,
    _ChunkedLogProbFunction,
    maybe_gather_lm_head_ctx,
)

from train.trim import only_at
from train.vision import EncodedImage, encode_pictures, mrope_positions

ROWS_PER_BUCKET = 32
"""Rows padded to a common length in one forward; small enough for a core's cache to matter."""


@dataclass
class ScoredRows:
    """What the scoring forward needs of a batch of B episodes."""

    token_ids: list[list[int]]
    """prompt and completion of each row, no padding"""
    n_prompt: list[int]
    """prompt tokens of each row"""
    policy_mask: list[np.ndarray]
    """bool [C_b]: completion tokens to score"""
    pictures: list[list[EncodedImage]]
    """pictures of each row, in the order of their placeholders"""
    width: int
    """C, columns of the result"""
    n_buckets: int
    """forwards to split the rows into; the same on every process, for ZeRO-3 makes each of them a
    collective; a process with fewer rows reads one of them again without scoring it"""


def rows_from_padded(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    policy_mask: torch.Tensor,
    pictures: list[list[EncodedImage]],
    n_buckets: int,
) -> ScoredRows:
    """Strips TRL's padding (prompts on the left, completions on the right).

    Args:
        input_ids: int64 [B, P + C].
        attention_mask: int [B, P + C], 1 for real tokens.
        policy_mask: int [B, C], 1 for tokens to score.
        pictures: B lists.
        n_buckets: see ScoredRows.
    """
    width = policy_mask.shape[1]
    is_real = attention_mask.bool().cpu().numpy()
    ids, wanted = input_ids.cpu().numpy(), policy_mask.bool().cpu().numpy()
    n_prompt = is_real[:, :-width].sum(axis=1)
    n_completion = is_real[:, -width:].sum(axis=1)
    return ScoredRows(
        token_ids=[row[real].tolist() for row, real in zip(ids, is_real, strict=True)],
        n_prompt=n_prompt.tolist(),
        policy_mask=[row[:n] for row, n in zip(wanted, n_completion, strict=True)],
        pictures=pictures,
        width=width,
        n_buckets=n_buckets,
    )


def install(
    model: Any,
    *,
    temperature: float,
    merge_size: int,
    blank: EncodedImage | None,
) -> None:
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
    backbone = model.model
    device = model.get_output_embeddings().weight.device
    n_rows = len(rows.token_ids)
    shown = [picture for pictures in rows.pictures for picture in pictures]
    features = encode_pictures(backbone, shown or ([blank] if blank is not None else []))
    by_length = np.argsort([len(ids) for ids in rows.token_ids], kind="stable")
    ballast = max(0, rows.n_buckets - n_rows)
    order = np.concatenate([np.repeat(by_length[:1], ballast), by_length])
    scored = np.concatenate([np.zeros(ballast, dtype=bool), np.ones(n_rows, dtype=bool)])
    hidden, targets, places = [], [], []
    for bucket, is_scored in zip(
        np.array_split(order, rows.n_buckets), np.array_split(scored, rows.n_buckets), strict=True
    ):
        chosen = [
            np.flatnonzero(rows.policy_mask[row] & is_own)
            for row, is_own in zip(bucket, is_scored, strict=True)
        ]
        at = [rows.n_prompt[row] + tokens for row, tokens in zip(bucket, chosen, strict=True)]
        states = _bucket_states(model, rows, bucket, at, features, merge_size, device)
        hidden += [states[i, : len(tokens)] for i, tokens in enumerate(chosen)]
        targets += [np.asarray(rows.token_ids[r])[t] for r, t in zip(bucket, at, strict=True)]
        places += [r * rows.width + tokens for r, tokens in zip(bucket, chosen, strict=True)]
    flat_hidden = torch.cat(hidden)
    target = torch.as_tensor(np.concatenate(targets), device=device)
    place = torch.as_tensor(np.concatenate(places), device=device)
    logps, entropies = _head(model, flat_hidden, target, temperature)
    if blank is not None and not shown:
        # keeps the vision tower in the graph with a gradient of zero
        logps = logps + 0.0 * next(iter(features.values())).sum().to(logps.dtype)
    empty = torch.zeros(n_rows * rows.width, device=device, dtype=logps.dtype)
    shape = (n_rows, rows.width)
    return (
        empty.index_put((place,), logps).view(shape),
        empty.index_put((place,), entropies).view(shape),
    )


def _bucket_states(
    model: Any,
    rows: ScoredRows,
    bucket: np.ndarray,
    at: list[np.ndarray],
    features: dict[str, torch.Tensor],
    merge_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Hidden states [b, N, H] from which the tokens `at` of some rows are predicted.

    Args:
        bucket: the rows.
        at: per row the index of each scored token; rows with fewer than N are padded.
    """
    image_token_id = getattr(model.config, "image_token_id", None)
    width = max(len(rows.token_ids[row]) for row in bucket)
    ids = np.zeros((len(bucket), width), dtype=np.int64)
    real = np.zeros((len(bucket), width), dtype=np.int64)
    positions = np.zeros((3, len(bucket), width), dtype=np.int64)
    for i, row in enumerate(bucket):
        tokens = rows.token_ids[row]
        ids[i, : len(tokens)] = tokens
        real[i, : len(tokens)] = 1
        grids = [picture.grid for picture in rows.pictures[row]]
        positions[:, i, : len(tokens)], _ = mrope_positions(
            tokens, grids, image_token_id, merge_size
        )
    inputs: dict[str, Any] = {"input_ids": torch.as_tensor(ids, device=device)}
    shown = [picture for row in bucket for picture in rows.pictures[row]]
    if shown:
        pooled = tuple(features[picture.key] for picture in shown)
        inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=pooled)}
    before = np.zeros((len(bucket), max(1, *map(len, at))), dtype=np.int64)
    for i, scored in enumerate(at):
        before[i, : len(scored)] = scored - 1
    places = torch.as_tensor(before, device=device)
    sees = torch.arange(width, device=device) <= places[:, :, None]
    if model.config.get_text_config()._attn_implementation == "sdpa":
        # padding lies behind every token that counts: plain causal attention, the fast kernel
        masks: Any = {"full_attention": None, "sliding_attention": None}
    else:
        masks = torch.as_tensor(real, device=device)
    position_ids = torch.as_tensor(positions, device=device)
    with only_at(model.model, places, sees[:, None]) as is_trimmed:
        states = model.model(
            **inputs,
            position_ids=position_ids if image_token_id is not None else position_ids[0],
            attention_mask=masks,
            use_cache=False,
        ).last_hidden_state
    if is_trimmed:
        return states
    return states[torch.arange(len(bucket), device=device)[:, None], places]


def _head(
    model: Any, hidden: torch.Tensor, target: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target token and entropy of its distribution, float32 [N]."""
    head = model.get_output_embeddings()
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
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
    return log_probs, entropy
