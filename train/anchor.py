"""A pull towards the warm start, as strong as the merge found each weight to matter.

    L = a/2 sum_ij h_j (theta_ij - theta0_ij)^2

over the linears of the language module: h_j is the second moment of input channel j, the number
that OBM weighs the entry with (`merge.calibration`), summed over the parents and scaled to a mean
of 1 over all anchored entries. So the directions that carried the parents' skills give way last.

Form: elastic weight consolidation (arXiv 1612.00796), with the layer-wise second moments of the
merge in the place of the Fisher information. The gradient a h (theta - theta0) joins the policy's
where it is accumulated, so clipping, ZeRO-1 and ZeRO-2 see one gradient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import ConfigError
from merge.errors import MergeError
from merge.families import canonical_name, get_family
from merge.stats import Stats, open_stats


class SaliencyAnchor:
    """Holds theta0 and h, and adds the pull to the gradients.

    Args:
        model: the policy at its start, whole parameters (no ZeRO-3, no adapter).
        stats: statistics of kind diagonal, one per parent.
        strength: a.

    Raises:
        ConfigError: the statistics fit no linear of the policy, or not its shape.
    """

    def __init__(self, model: Any, stats: Sequence[Stats], strength: float) -> None:
        self.strength = strength
        self.accumulation_steps = 1
        """backward passes whose gradients are summed before a step"""
        moments = _second_moments(model, stats)
        n_entries = sum(p.numel() for _, p, _ in moments)
        mean = sum(float(h.sum()) * len(p) for _, p, h in moments) / n_entries
        self._anchored = [(p, p.detach().clone(), (h / mean).to(p)) for _, p, h in moments]
        for number, (parameter, _, _) in enumerate(self._anchored):
            parameter.register_hook(self._pull(number))

    def _pull(self, number: int) -> Any:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            scale = self.strength / self.accumulation_steps
            moment, away = self._away(number)
            return gradient + (scale * moment * away).to(gradient.dtype)

        return hook

    def _away(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """h [in] and theta - theta0 [out, in] of an anchored weight.

        DeepSpeed moves and casts the policy after this was made. Start and moments follow it once;
        the start is rounded as the weights are, so that rounding is no distance.
        """
        parameter, start, moment = self._anchored[number]
        start, moment = start.to(parameter), moment.to(parameter.device)
        self._anchored[number] = parameter, start, moment
        return moment, parameter.detach() - start

    @torch.no_grad()
    def loss(self) -> float:
        """The value of L: how far the policy has been pulled away."""
        total = 0.0
        for number in range(len(self._anchored)):
            moment, away = self._away(number)
            total += float((away.float().square() * moment).sum())
        return 0.5 * self.strength * total


def anchor_statistics(init: str, folders: Sequence[str]) -> list[Stats]:
    """Statistics of the second moments: those given, or those that merged the start.

    Args:
        init: folder of the start.
        folders: files or folders of `obm calibrate`; empty = ask the start's merge.json.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    paths = list(folders) or _recorded_statistics(Path(init))
    if not paths:
        raise ConfigError(
            f"algorithm.anchor: {init} was not merged with second moments; name statistics of "
            "`obm calibrate` in algorithm.anchor_stats"
        )
    try:
        return [open_stats(path, "diagonal") for path in paths]
    except MergeError as error:
        raise ConfigError(f"algorithm.anchor_stats: {error}") from error


def _recorded_statistics(folder: Path) -> list[str]:
    """Files of kind diagonal in the record of a merge."""
    record = folder / "merge.json"
    if not record.is_file():
        return []
    entries = json.loads(record.read_text(encoding="utf-8"))["stats"]
    return [entry["source"] for key, entry in entries.items() if key.endswith("/diagonal")]


def _second_moments(
    model: Any, stats: Sequence[Stats]
) -> list[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """(name, weight [out, in], summed second moments [in]) of every linear that has a statistic."""
    family = get_family(model.config.model_type, "models.init")
    known = {name for one in stats for name in one.names}
    found = []
    for name, parameter in model.named_parameters():
        canonical = canonical_name(family, name)
        if canonical not in known or not parameter.requires_grad:
            continue
        moments = [one.vector(canonical) for one in stats if canonical in one.names]
        for moment in moments:
            if parameter.dim() != 2 or moment.shape != parameter.shape[1:]:
                raise ConfigError(
                    f"algorithm.anchor_stats: {canonical} has {moment.shape} channels there and "
                    f"{tuple(parameter.shape)} entries in the policy; calibrate this architecture"
                )
        found.append((name, parameter, torch.from_numpy(np.sum(moments, axis=0))))
    if not found:
        raise ConfigError(
            "algorithm.anchor_stats: no linear of the policy has a statistic there, or all are "
            "frozen; give the statistics of its own parents"
        )
    return found
