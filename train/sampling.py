"""Drawing tokens: pure functions on probabilities."""

from __future__ import annotations

import torch


def inverse_cdf(probs: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Token whose share of the cumulative mass contains the draw.

    Args:
        probs: float [n, V], not necessarily normalised, at least one entry above 0 per row.
        draw: float [n] in [0, 1).

    Returns:
        int64 [n]; never a token of probability 0.
    """
    cumulative = probs.cumsum(dim=-1)
    threshold = draw[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # rounding can put the threshold at the very end, behind the last token with any mass
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(token, last)


def nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zeroes tokens outside the smallest set whose mass reaches top_p of the total, [n, V]."""
    ordered, index = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered[before >= top_p * ordered.sum(dim=-1, keepdim=True)] = 0.0
    return torch.zeros_like(probs).scatter(1, index, ordered)
