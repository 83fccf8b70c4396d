"""Which attention heads search and perception pull apart: the conflict map of CAST.

The paper (arXiv 2601.04262) joins *optimisation conflict* and *functional sensitivity* per head
into one map; its formulas are not public. Our reading, for head h with the numbers theta_h that it
works with (`train.heads`: rows of q, k, v and their biases, columns of o; keys and values of a
group count for each of its heads):

    opposition    O_h = max(0, -cos(g_h, k_h)),  g = dL_search / dtheta,  k = dL_keep / dtheta
    sensitivity   S_h = L_keep(output of h set to 0 before o_proj) - L_keep
    score         C_h = rank(O_h) rank(S_h),  ranks from 1/n (lowest) to 1, ties share their mean

A step that descends on search ascends on keep where O_h is above 0, and S_h says what is at stake.
Gradients are those of the whole objective, summed over its batches. Every score is of the start
alone, before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from train.heads import HeadLayout, attention_modules, head_tensors

Loss = Callable[[], torch.Tensor]
"""Runs a forward and gives the part of an objective that one batch adds, a scalar."""
Gradients = dict[int, torch.Tensor]
"""id of a parameter -> gradient, float32, of its shape."""


@dataclass
class ConflictMap:
    """What the diagnosis found, each float64 [layers, heads]."""

    cosine: torch.Tensor
    """cos(g_h, k_h) of the whole objectives"""
    halves: torch.Tensor
    """[2, layers, heads]: the same of their even and of their odd batches alone"""
    search_norm: torch.Tensor
    """||g_h||"""
    keep_norm: torch.Tensor
    """||k_h||"""
    sensitivity: torch.Tensor
    """S_h, in nats a token"""
    keep_loss: float
    """L_keep with all heads"""

    @property
    def opposition(self) -> torch.Tensor:
        """O_h, from 0 to 1."""
        return (-self.cosine).clamp(min=0.0)


def diagnose(
    model: Any, layout: HeadLayout, search: Sequence[Loss], keep: Sequence[Loss]
) -> ConflictMap:
    """Compares the gradients of two objectives head by head, and switches every head off once.

    Needs memory for four gradients of the attention's parameters beside the model.

    Args:
        model: the policy, whole and without an adapter; its weights are not changed.
        layout: of the policy.
        search: batches of the objective that will be trained; their sum is the objective.
        keep: batches of the objective whose loss shall not rise.
    """
    attentions = [attention for _, attention in attention_modules(model, layout)]
    with only_attention(model, attentions):
        # four sums, so that the halves say how far a cosine is noise
        gradients = [
            [sum_gradients(attentions, losses[half::2]) for half in (0, 1)]
            for losses in (search, keep)
        ]
        per_half = [
            head_cosines(attentions, layout, gradients[0][half], gradients[1][half])
            for half in (0, 1)
        ]
        (g, g_odd), (k, k_odd) = gradients
        for total, odd in ((g, g_odd), (k, k_odd)):
            for key, gradient in odd.items():
                total[key] += gradient
        return ConflictMap(
            cosine=head_cosines(attentions, layout, g, k),
            halves=torch.stack(per_half),
            search_norm=head_products(attentions, layout, g, g).sqrt(),
            keep_norm=head_products(attentions, layout, k, k).sqrt(),
            sensitivity=head_sensitivity(attentions, layout, keep),
            keep_loss=total_loss(keep),
        )


# ---------------------------------------------------------------- optimisation conflict


@contextmanager
def only_attention(model: Any, attentions: Sequence[Any]) -> Iterator[None]:
    """The model in evaluation mode, with gradients for the projections of its heads alone."""
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    model.eval()
    model.requires_grad_(False)
    for attention in attentions:
        attention.requires_grad_(True)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
        model.train(was_training)


def sum_gradients(attentions: Sequence[Any], losses: Sequence[Loss]) -> Gradients:
    """Gradient of the sum of the losses; zeros where nothing depends on a parameter."""
    parameters = [p for attention in attentions for p in attention.parameters()]
    for parameter in parameters:
        parameter.grad = None
    for loss in losses:
        loss().backward()
    found = {
        id(p): torch.zeros(p.shape, device=p.device) if p.grad is None else p.grad.float()
        for p in parameters
    }
    for parameter in parameters:
        parameter.grad = None
    return found


def head_products(
    attentions: Sequence[Any], layout: HeadLayout, one: Gradients, two: Gradients
) -> torch.Tensor:
    """Scalar products of two gradients over each head's numbers, float64 [layers, heads]."""
    products = torch.zeros(layout.n_layers, layout.n_heads, dtype=torch.float64)
    for layer, attention in enumerate(attentions):
        for head in range(layout.n_heads):
            pairs = zip(
                head_tensors(attention, layout, head, lambda parameter: one[id(parameter)]),
                head_tensors(attention, layout, head, lambda parameter: two[id(parameter)]),
                strict=True,
            )
            products[layer, head] = sum(float((a.double() * b.double()).sum()) for a, b in pairs)
    return products


def head_cosines(
    attentions: Sequence[Any], layout: HeadLayout, one: Gradients, two: Gradients
) -> torch.Tensor:
    """Cosines of two gradients over each head's numbers, [layers, heads]; 0 where one is 0."""
    dot = head_products(attentions, layout, one, two)
    squares = head_products(attentions, layout, one, one) * head_products(
        attentions, layout, two, two
    )
    return torch.where(squares > 0, dot / squares.clamp(min=1e-300).sqrt(), 0.0).clamp(-1.0, 1.0)


# ---------------------------------------------------------------- functional sensitivity


@torch.no_grad()
def head_sensitivity(
    attentions: Sequence[Any], layout: HeadLayout, losses: Sequence[Loss]
) -> torch.Tensor:
    """Rise of the summed losses with each head off, float64 [layers, heads]; below 0 if it falls.

    One forward a batch and head.
    """
    before = total_loss(losses)
    rise = torch.zeros(layout.n_layers, layout.n_heads, dtype=torch.float64)
    for layer, attention in enumerate(attentions):
        for head in range(layout.n_heads):
            with head_off(attention, layout, head):
                rise[layer, head] = total_loss(losses) - before
    return rise


@torch.no_grad()
def total_loss(losses: Sequence[Loss]) -> float:
    """The objective: the sum over its batches."""
    return sum(float(loss()) for loss in losses)


@contextmanager
def head_off(attention: Any, layout: HeadLayout, head: int) -> Iterator[None]:
    """Within the block a head's output [.., D] is 0 where o_proj reads it."""
    start, stop = head * layout.head_dim, (head + 1) * layout.head_dim

    def mask(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states = inputs[0].clone()
        states[..., start:stop] = 0.0
        return (states, *inputs[1:])

    handle = attention.o_proj.register_forward_pre_hook(mask)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- the score


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Share of values that are not larger, float64 of the same shape, from 1/n to 1.

    Equal values share the mean of their places: [3, 1, 1, 5] gives [3, 1.5, 1.5, 4] / 4.
    """
    flat = values.double().flatten()
    smaller = (flat[None, :] < flat[:, None]).sum(1)
    equal = (flat[None, :] == flat[:, None]).sum(1)
    return ((smaller + (equal + 1) / 2) / len(flat)).view(values.shape)


def conflict_score(found: ConflictMap, join: str) -> torch.Tensor:
    """C_h, float64 [layers, heads], higher is more conflict.

    Args:
        found: opposition and sensitivity.
        join: `ranks`, `product` (of O_h and the rise S_h, where it is a rise), or one of the two.
    """
    if join == "ranks":
        return ranks(found.opposition) * ranks(found.sensitivity)
    if join == "product":
        return found.opposition * found.sensitivity.clamp(min=0.0)
    return found.opposition if join == "opposition" else found.sensitivity
