"""The merge methods, one pure function each, on one tensor.

Every method has the signature `(base, deltas, second_moments, settings) -> (merged, statistics)`:

    base            fp32 [out, in] (or [n]): the base model's tensor, theta_B
    deltas          task -> fp32, shape of base: theta_k - theta_B; the order of tasks breaks ties
    second_moments  task -> fp32 [in]: h_k[j] = mean over calibration tokens of x_j^2; only OBM
    merged          fp32, shape of base: theta_M = theta_B + update
    statistics      counts and squared norms, see `_statistics`

What all share, where papers differ or are silent:

* `weights` scale the task vectors in the final sum and nowhere else. Which entries are kept and
  which sign wins does not depend on them, so a weight can be tuned without changing the masks.
* Density is exact: `keep_top` keeps k = floor(density * n + 1/2) entries of n, fewer only when
  fewer entries are not zero. A zero delta is never kept. Equal scores at the threshold (the rule,
  not the exception, for bf16 weights after light training) go to the lowest row-major index.
* The same bits for any number of threads: sums that steer a decision use `stable_sum`.

Everything here is on the CPU and knows nothing of files or names, apart from the name that seeds
DARE's random stream.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge.errors import MergeError

NORMALIZATIONS = ("none", "mean", "rank")
COMBINATIONS = ("sum", "mean")
SUM_BLOCK = 65_536


@dataclass(frozen=True)
class MethodSettings:
    """What a method needs beside tensors."""

    weights: Mapping[str, float]
    """Task -> lambda_k, scale of its task vector."""
    density: float = 0.5
    """Share of entries that each task vector keeps, 0 to 1 (task arithmetic keeps all)."""
    normalization: str = "none"
    """How saliencies of different tasks are made comparable before they vote: none, mean, rank."""
    combine: str = "sum"
    """How OBM adds what survived: sum, or mean over the tasks that survive at an entry."""
    seed: int = 0
    """Seed of DARE's random choice."""
    tensor_name: str = field(default="")
    """Canonical name of the tensor; with `seed` and the task it fixes DARE's random stream."""


Statistics = dict[str, Any]
Method = Callable[
    [Tensor, Mapping[str, Tensor], Mapping[str, Tensor] | None, MethodSettings],
    tuple[Tensor, Statistics],
]


def task_arithmetic(
    base: Tensor,
    deltas: Mapping[str, Tensor],
    second_moments: Mapping[str, Tensor] | None,
    settings: MethodSettings,
) -> tuple[Tensor, Statistics]:
    """Adds the weighted task vectors: theta_M = theta_B + sum_k lambda_k * delta_k.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089.

    Args:
        base: fp32, theta_B.
        deltas: Task -> fp32, shape of base.
        second_moments: Not used.
        settings: `weights`.

    Returns:
        theta_M in fp32, and statistics. An entry where the task vectors disagree counts as won by
        the side whose sign the update has.
    """
    masks = {task: delta != 0 for task, delta in deltas.items()}
    update = _combine(deltas, masks, settings.weights, "sum")
    return base + update, _statistics(deltas, masks, update, winner=torch.sign(update))


def ties(
    base: Tensor,
    deltas: Mapping[str, Tensor],
    second_moments: Mapping[str, Tensor] | None,
    settings: MethodSettings,
) -> tuple[Tensor, Statistics]:
    """Trims by magnitude, elects a sign by summed magnitude, takes the disjoint mean.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv
    2306.01708: trim each delta_k to its largest entries; sigma = sign(sum_k trimmed delta_k);
    theta_M = theta_B + lambda * mean of the trimmed entries that are not zero and agree with sigma.

    Two things differ from the authors' program. Trimming keeps exactly k entries where theirs keeps
    everything at the threshold. Each task may have its own lambda_k: the mean runs over
    lambda_k * delta_k, which for equal weights is the paper's formula. Where trimmed entries cancel
    exactly, the first task's sign is elected.

    Args:
        base: fp32, theta_B.
        deltas: Task -> fp32, shape of base.
        second_moments: Not used.
        settings: `weights`, `density`.

    Returns:
        theta_M in fp32, and statistics.
    """
    kept = {
        task: keep_top(delta.abs(), delta != 0, settings.density) for task, delta in deltas.items()
    }
    trimmed = {task: torch.where(kept[task], delta, 0.0) for task, delta in deltas.items()}
    total = _sum(trimmed.values())
    elected = _first_nonzero(
        [torch.sign(total), *(torch.sign(delta) for delta in trimmed.values())]
    )
    agreeing = {task: kept[task] & (torch.sign(deltas[task]) == elected) for task in deltas}
    update = _combine(deltas, agreeing, settings.weights, "mean")
    return base + update, _statistics(deltas, kept, update, winner=elected)


def dare(
    base: Tensor,
    deltas: Mapping[str, Tensor],
    second_moments: Mapping[str, Tensor] | None,
    settings: MethodSettings,
) -> tuple[Tensor, Statistics]:
    """Drops entries at random, rescales the rest, and adds as task arithmetic does.

    Source: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models
    as a Free Lunch", arXiv 2311.03099: delta_k * m / p with m ~ Bernoulli(p), p the share kept.

    The choice is Bernoulli as in the paper, so the realised density varies a little around p. The
    random stream depends on the seed, the task and the tensor's name alone: neither the order of
    tensors nor the number of threads changes it.

    Args:
        base: fp32, theta_B.
        deltas: Task -> fp32, shape of base.
        second_moments: Not used.
        settings: `weights`, `density`, `seed`, `tensor_name`.

    Returns:
        theta_M in fp32, and statistics (winner as in `task_arithmetic`).
    """
    masks = {
        task: (_uniform(delta.shape, settings, task) < settings.density) & (delta != 0)
        for task, delta in deltas.items()
    }
    rescale = 1.0 / settings.density if settings.density > 0 else 0.0
    scales = {task: settings.weights[task] * rescale for task in deltas}
    update = _combine(deltas, masks, scales, "sum")
    return base + update, _statistics(deltas, masks, update, winner=torch.sign(update))


def obm(
    base: Tensor,
    deltas: Mapping[str, Tensor],
    second_moments: Mapping[str, Tensor] | None,
    settings: MethodSettings,
) -> tuple[Tensor, Statistics]:
    """Optimal Brain Merging: keeps what is costly to drop, lets the cost decide on the sign.

    Source: Wang et al., arXiv 2603.01416 (OBM), with the diagonal Hessian of its predecessor OBIM,
    arXiv 2502.12217. With layer inputs X the layer-wise squared error has the Hessian
    H = 2 E[x x^T], so dropping one entry of a task vector costs

        s_k[i, j] = 1/2 * H_jj * delta_k[i, j]^2 = h_k[j] * delta_k[i, j]^2      (saliency)
        kept_k    = the top share p of s_k, zero deltas excluded                  (density)
        sigma     = sign(sum_k s_k * sign(delta_k)) over kept entries             (consensus)
        theta_M   = theta_B + sum_k lambda_k * delta_k * [kept_k and sign(delta_k) = sigma]

    Not stated by the paper, hence settings: p; lambda_k; whether saliencies of tasks whose deltas
    differ in size are normalised before they vote (`normalise_saliency`; keeping is per task, and
    does not change); `sum`, or `mean` over the tasks that survive at an entry. Only kept entries
    vote. Where the votes cancel (equal saliencies, or inputs that were zero in calibration), the
    sign of the larger summed delta is taken, and after that the first task's.

    Args:
        base: fp32 [out, in], theta_B.
        deltas: Task -> fp32 [out, in].
        second_moments: Task -> fp32 [in], h_k.
        settings: `weights`, `density`, `normalization`, `combine`.

    Returns:
        theta_M in fp32, and statistics.

    Raises:
        MergeError: Second moments are missing or of another length than the tensor's last axis.
    """
    saliency = {
        task: _saliency(delta, second_moments, task, settings) for task, delta in deltas.items()
    }
    kept = {
        task: keep_top(saliency[task], delta != 0, settings.density)
        for task, delta in deltas.items()
    }
    votes = {
        task: torch.where(
            kept[task],
            normalise_saliency(saliency[task], settings.normalization) * torch.sign(delta),
            0.0,
        )
        for task, delta in deltas.items()
    }
    trimmed = {task: torch.where(kept[task], delta, 0.0) for task, delta in deltas.items()}
    consensus = _first_nonzero(
        [
            torch.sign(_sum(votes.values())),
            torch.sign(_sum(trimmed.values())),
            *(torch.sign(delta) for delta in trimmed.values()),
        ]
    )
    surviving = {task: kept[task] & (torch.sign(deltas[task]) == consensus) for task in deltas}
    update = _combine(deltas, surviving, settings.weights, settings.combine)
    return base + update, _statistics(deltas, kept, update, winner=consensus)


METHODS: dict[str, Method] = {
    "obm": obm,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
}


def keep_top(score: Tensor, eligible: Tensor, density: float) -> Tensor:
    """Marks the entries with the largest scores.

    Args:
        score: fp32, any shape, not negative.
        eligible: bool, same shape; entries that may be kept at all.
        density: Share of all entries to keep, 0 to 1.

    Returns:
        bool, same shape: exactly k = floor(density * n + 1/2) entries, or all eligible ones if they
        are fewer. Entries that tie at the k-th value are kept from the lowest row-major index on.
    """
    n_keep = math.floor(density * score.numel() + 0.5)
    n_eligible = int(eligible.sum())
    if n_keep >= n_eligible:
        return eligible.clone()
    if n_keep == 0:
        return torch.zeros_like(eligible)
    # A partition finds the k-th value in linear time; a sort would cost some forty times as much.
    candidates = score[eligible].numpy()
    threshold = float(np.partition(candidates, n_eligible - n_keep)[n_eligible - n_keep])
    keep = eligible & (score > threshold)
    tied = torch.nonzero((eligible & (score == threshold)).reshape(-1)).reshape(-1)
    keep.view(-1)[tied[: n_keep - int(keep.sum())]] = True
    return keep


def normalise_saliency(saliency: Tensor, normalization: str) -> Tensor:
    """Makes the saliencies of one task comparable with another task's.

    Args:
        saliency: fp32, any shape, not negative.
        normalization: `none` leaves it; `mean` divides by the mean over all entries of the tensor,
            zeros included; `rank` takes the share of entries that are not larger, in (0, 1], equal
            saliencies sharing the highest rank and zero staying zero.

    Returns:
        fp32, same shape.
    """
    if normalization == "mean":
        total = stable_sum(saliency)
        return saliency * (saliency.numel() / total) if total > 0 else saliency
    if normalization == "rank":
        flat = saliency.reshape(-1).numpy()
        rank = np.searchsorted(np.sort(flat), flat, side="right") / max(flat.size, 1)
        ranked = torch.from_numpy(rank.astype(np.float32)).reshape(saliency.shape)
        return torch.where(saliency > 0, ranked, 0.0)
    return saliency


def stable_sum(values: Tensor) -> float:
    """Sums in fp64 with the same bits for any number of threads.

    Blocks of 65,536 entries are summed one by one and their totals added exactly, so a caller that
    works through a tensor in multiples of a block finds the same number.
    """
    flat = values.reshape(-1).numpy()
    blocks = range(0, flat.size, SUM_BLOCK)
    return math.fsum(float(flat[i : i + SUM_BLOCK].sum(dtype=np.float64)) for i in blocks)


def _saliency(
    delta: Tensor,
    second_moments: Mapping[str, Tensor] | None,
    task: str,
    settings: MethodSettings,
) -> Tensor:
    name = settings.tensor_name or "the tensor"
    if second_moments is None or task not in second_moments:
        raise MergeError(
            f"{name}: obm needs the second moments of {task}; run `obm calibrate`, or choose "
            "merge.method=task_arithmetic"
        )
    moments = second_moments[task]
    if delta.dim() != 2 or moments.shape != delta.shape[-1:]:
        raise MergeError(
            f"{name}: second moments of {task} have shape {list(moments.shape)}, the tensor has "
            f"{list(delta.shape)}; calibrate with this checkpoint"
        )
    return moments * delta.square()  # [in] * [out, in]


def _uniform(shape: torch.Size, settings: MethodSettings, task: str) -> Tensor:
    key = hashlib.sha256(f"{settings.seed}/{task}/{settings.tensor_name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    return torch.from_numpy(generator.random(tuple(shape), dtype=np.float32))


def _combine(
    deltas: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    weights: Mapping[str, float],
    combine: str,
) -> Tensor:
    """Sums weighted deltas under their masks, or takes the mean over the tasks masked in."""
    update = _sum(
        torch.where(masks[task], delta * weights[task], 0.0) for task, delta in deltas.items()
    )
    if combine == "mean":
        update = update / _sum(mask.float() for mask in masks.values()).clamp(min=1.0)
    return update


def _sum(tensors: Any) -> Tensor:
    first, *rest = tensors
    total: Tensor = first
    for tensor in rest:
        total = total + tensor
    return total


def _first_nonzero(signs: list[Tensor]) -> Tensor:
    """Returns, entry by entry, the first sign of the list that is not zero."""
    result = signs[0]
    for sign in signs[1:]:
        result = torch.where(result == 0, sign, result)
    return result


def _statistics(
    deltas: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    update: Tensor,
    winner: Tensor,
) -> Statistics:
    """Counts what the report needs; counts and squares add up over tensors.

    Returns:
        entries: number of entries; kept: task -> entries kept before signs were compared;
        conflicts: entries where kept deltas of two tasks have opposite signs;
        conflicts_won: task -> conflicts that its sign won;
        delta_square, update_square: squared Frobenius norms of each delta and of the update.
    """
    signs = {
        task: torch.where(kept[task], torch.sign(delta), 0.0) for task, delta in deltas.items()
    }
    any_up = torch.stack([sign > 0 for sign in signs.values()]).any(0)
    any_down = torch.stack([sign < 0 for sign in signs.values()]).any(0)
    conflict = any_up & any_down
    return {
        "entries": update.numel(),
        "kept": {task: int(mask.sum()) for task, mask in kept.items()},
        "conflicts": int(conflict.sum()),
        "conflicts_won": {
            task: int((conflict & (sign == winner)).sum()) for task, sign in signs.items()
        },
        "delta_square": {task: stable_sum(delta.square()) for task, delta in deltas.items()},
        "update_square": stable_sum(update.square()),
    }
