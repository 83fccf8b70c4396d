"""Diagonal Fisher information of the language module: what Fisher merging weighs entries by.

    F[i] = mean over sequences of (d log p(answer | prompt) / d theta_i)^2

with the data's own answers (the empirical Fisher of Matena and Raffel, arXiv 2111.09832). The
log-likelihood is the sum over the answer's tokens, and each sequence's gradient is squared on its
own: squaring the gradient of a batch would let sequences cancel. The whole model, its gradients and
the sums are in memory; a killed run starts anew, since its sums are as large as the model.
`fisher_streaming` does the same with one decoder layer in memory.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge.errors import MergeError
from merge.families import LINEAR, NORM_BIAS, canonical_name, get_family, group_of
from merge.inputs import check_record, count_batch, model_inputs, numbered
from merge.sums import WHOLE, Record, Shard, SumWriter

IGNORED_LABEL = -100


@dataclass
class Fisher:
    """Sums of squared gradients, and what they run over."""

    sums: dict[str, Tensor]
    """Canonical tensor name -> fp32, shaped as the tensor."""
    record: Record
    shard: Shard = WHOLE


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    shard: Shard = WHOLE,
    families: str | Path | None = None,
) -> Fisher:
    """Sums squared gradients of each sequence's log-likelihood over a model's language tensors.

    Args:
        model: A causal language model or vision-language model of a known family, in bfloat16 or
            float32; its weights are not changed.
        batches: Keyword arguments for `model(**batch)`, as for second moments. The tokens that are
            scored are those of `labels` (not -100) if given, else of `calibration_mask`, else all
            but padding; the first token of a sequence has no probability and is never scored. One
            sequence a batch is fastest: each further one costs a backward pass over the whole
            batch.
        shard: (rank, world) when `batches` are every world-th from the rank-th on.
        families: YAML file with further families.

    Returns:
        Sums for all linears, biases and norms of the language module; not for embeddings.

    Raises:
        MergeError: An unsupported model, no tokens, or a mask of the wrong shape.
    """
    where = type(model).__name__
    family = get_family(getattr(model.config, "model_type", None), where, families)
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        canonical = canonical_name(family, name)
        if canonical is not None and group_of(family, canonical) in (LINEAR, NORM_BIAS):
            parameters[canonical] = parameter
    sums = {
        name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for name, parameter in parameters.items()
    }
    record = Record()
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    model.eval()
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for number, batch in numbered(batches, shard, "fisher"):
            scored = scored_tokens(record, number, batch)
            likelihoods = sequence_log_likelihoods(model, batch, scored)
            # a sequence without an answer has no likelihood, and no part in the mean
            record.sequences -= len(scored) - len(likelihoods)
            for row, likelihood in enumerate(likelihoods):
                gradients = torch.autograd.grad(
                    likelihood,
                    list(parameters.values()),
                    retain_graph=row + 1 < len(likelihoods),
                    allow_unused=True,
                )
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient.float(), gradient.float())
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
    check_record(record)
    return Fisher(sums, record, shard)


def sequence_log_likelihoods(
    model: nn.Module, batch: Mapping[str, Any], scored: Tensor
) -> list[Tensor]:
    """Computes log p of each sequence's scored tokens, given all before them.

    Args:
        model: Causal; its logits at t are of token t + 1.
        batch: See `collect_fisher`.
        scored: Bool [B, T].

    Returns:
        One fp32 scalar with a graph for each sequence that has scored tokens.
    """
    device = next(model.parameters()).device
    ids, scored = batch["input_ids"].to(device), scored.to(device)
    targets = scored[:, 1:]
    # logits of the places that any row scores, not of all: a vocabulary is wide
    places = targets.any(0).nonzero().squeeze(1)
    if not len(places):
        return []
    logits = model(**model_inputs(batch, device), logits_to_keep=places).logits.float()
    chosen = ids[:, places + 1].unsqueeze(-1)
    log_probabilities = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)  # [B, places]
    is_target = targets[:, places]
    # selected, not multiplied: padding may hold infinities
    return [
        row[keep].sum()
        for row, keep in zip(log_probabilities, is_target, strict=True)
        if bool(keep.any())
    ]


def save_fisher(
    fisher: Fisher, path: str | Path, *, weights: Mapping[str, str] | None = None
) -> Path:
    """Writes a statistics file of kind fisher, or a shard's sums.

    Args:
        fisher: What `collect_fisher` returned.
        path: File to write, replaced when it exists.
        weights: Canonical name -> checksum of the checkpoint's tensor; empty when unknown.

    Raises:
        MergeError: Gradients that are not finite, or the file cannot be written.
    """
    writer = SumWriter(
        path,
        "fisher",
        {name: tuple(total.shape) for name, total in fisher.sums.items()},
        fisher.record,
        weights=weights,
        shard=fisher.shard,
    )
    for name, total in fisher.sums.items():
        writer.write(name, total)
    return writer.finish()


def scored_tokens(record: Record, number: int, batch: Mapping[str, Any]) -> Tensor:
    """Enters a batch into the record; returns bool [B, T] of the tokens that are scored."""
    labels = batch.get("labels")
    if labels is not None:
        if labels.shape != batch["input_ids"].shape:
            raise MergeError(
                f"calibration: labels have shape {list(labels.shape)}, input_ids "
                f"{list(batch['input_ids'].shape)}; they must agree"
            )
        batch = {**batch, "calibration_mask": labels != IGNORED_LABEL}
    scored = count_batch(record, number, batch).clone()
    attention = batch.get("attention_mask")
    mask = torch.ones_like(scored) if attention is None else attention.bool()
    # the first token of each row: with padding on the left it is not at 0
    scored[torch.arange(len(mask)), mask.int().argmax(1)] = False
    return scored
