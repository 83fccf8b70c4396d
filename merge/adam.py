"""Fisher information from Adam's second moments, which a training checkpoint holds already.

    F[i] = exp_avg_sq[i] / (1 - beta_2^t)        running mean of squared gradients, bias removed

A stand-in that costs nothing, and differs from `fisher` in three ways. The gradient is that of the
training's own loss (for GRPO the policy loss, not log p of an answer); it is squared after a step's
batch has been averaged, so it is smaller; and it looks back some 1 / (1 - beta_2) = 1,000 steps.
Its pattern over entries is what serves.

DeepSpeed keeps its optimizer in pickles, cut up over processes. They are read by torch's restricted
unpickler (`weights_only`), which runs no code of the file; what the files name of DeepSpeed's is
replaced by empty classes. Tensors are mapped, not loaded: one parameter is in memory.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import LINEAR, NORM_BIAS, Family, canonical_name, get_family, group_of
from merge.shards import SafetensorsFile
from merge.stats import FILE_NAMES, StatsWriter
from merge.sums import weight_checksums

KEY = "exp_avg_sq"
FILES = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
"""One a process; their names begin with `bf16_` where the training was in bf16."""


class _Empty:
    """Stands for a class that a checkpoint names; holds what was stored, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
"""Members of DeepSpeed's ZeroStageEnum."""


class _Stage(_Empty):
    pass


class _Scaler(_Empty):
    pass


class _Fragment(_Empty):
    """Where a parameter lies in a process' flat vector."""

    start: int
    numel: int


def _member(owner: type, name: str) -> _Empty:
    """Stands for `getattr`, by which Python 3.11.0 to 3.11.3 name the members of an enum."""
    return owner(STAGES[name]) if owner is _Stage and name in STAGES else _Empty(owner, name)


STAND_INS = [
    (_member, "builtins.getattr"),
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Scaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Scaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass
class AdamStates:
    """The optimizer of a DeepSpeed checkpoint: the files of all processes, mapped."""

    folder: Path
    stage: int
    ranks: list[dict[str, Any]]
    """`optimizer_state_dict` of every process, in order."""
    shapes: list[dict[str, tuple[int, ...]]]
    """Name -> shape, for each group of parameters, in the order in which they are laid out."""

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and fp32 exp_avg_sq, without Adam's bias, of every trained parameter."""
        states, correction = self._states(), self._correction()
        found = self._of_stage_3(states) if self.stage == 3 else self._of_stage_2(states)
        for name, shape, flat in found:
            if flat.numel() != math.prod(shape):
                raise MergeError(
                    f"{self.folder}: holds {flat.numel()} second moments of {name}, whose shape is "
                    f"{list(shape)}; a process' file is missing or of another checkpoint"
                )
            yield name, flat.reshape(shape).float() / correction

    @property
    def step(self) -> int:
        """Optimizer steps that were taken."""
        return int(self._states()[0][0]["step"])

    def _states(self) -> list[dict[int, dict[str, Any]]]:
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        states = [rank[key]["state"] for rank in self.ranks]
        if not states[0] or any(KEY not in group for own in states for group in own.values()):
            raise MergeError(f"{self.folder}: its optimizer has no second moments; it is no Adam")
        return states

    def _correction(self) -> float:
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        beta = float(self.ranks[0][key]["param_groups"][0]["betas"][1])
        return 1.0 - beta**self.step

    def _of_stage_2(
        self, states: list[dict[int, dict[str, Any]]]
    ) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Stages 1 and 2: a group is one vector, cut into equal parts, one a process."""
        for group, shapes in enumerate(self.shapes):
            for name, shape in shapes.items():
                parts = []
                for rank, state in zip(self.ranks, states, strict=True):
                    place = rank["param_slice_mappings"][group].get(name)
                    if place is not None:
                        own = state[group][KEY]
                        parts.append(own[place.start : place.start + place.numel])
                yield name, shape, torch.cat(parts) if parts else torch.empty(0)

    def _of_stage_3(
        self, states: list[dict[int, dict[str, Any]]]
    ) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Stage 3: every parameter is cut into equal parts, the last one padded, one a process."""
        vectors = [[state[group][KEY] for group in sorted(state)] for state in states]
        begin = 0
        for shapes in self.shapes:
            for name, shape in shapes.items():
                n = math.prod(shape)
                length = -(-n // len(vectors))
                parts = [_slice(own, begin, length) for own in vectors]
                begin += length
                yield name, shape, torch.cat(parts)[:n]


def _slice(vectors: list[Tensor], begin: int, length: int) -> Tensor:
    """Entries of several vectors as if they were one."""
    parts = []
    for vector in vectors:
        if begin < len(vector) and length > 0:
            parts.append(vector[begin : begin + length])
            length -= len(parts[-1])
            begin = 0
        else:
            begin -= len(vector)
    return torch.cat(parts) if parts else torch.empty(0)


def open_adam(folder: str | Path) -> AdamStates:
    """Opens the optimizer of a training checkpoint.

    Args:
        folder: `checkpoint-N` of a run under DeepSpeed, or its `global_stepN` itself.

    Raises:
        MergeError: No DeepSpeed states there, a process' file is missing, or one names a class that
            no sound checkpoint needs.
    """
    folder = Path(os.path.expanduser(folder))  # the ~ of an unknown user stays
    states = _states_folder(folder)
    paths = sorted(states.glob(FILES), key=_rank_of)
    ranks = [_load(path)["optimizer_state_dict"] for path in paths]
    stage = ranks[0]["zero_stage"]
    stage = stage.arguments[0] if isinstance(stage, _Stage) else stage
    if stage not in STAGES.values():
        raise MergeError(
            f"{paths[0]}: its zero_stage is none of {sorted(STAGES.values())}; it is no checkpoint "
            "of DeepSpeed, or damaged: copy it again"
        )
    counts = ranks[0]["partition_count"]
    n_ranks = max(counts) if isinstance(counts, list) else int(counts)
    numbers = [_rank_of(path) for path in paths]
    if numbers != list(range(n_ranks)):
        raise MergeError(
            f"{states}: was written by {n_ranks} processes, there are files of {numbers}; copy the "
            "whole folder"
        )
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else (
        "mp_rank_00_model_states.pt"
    )  # fmt: skip
    shapes = [
        {name: tuple(shape) for name, shape in group.items()}
        for group in _load(states / name)["param_shapes"]
    ]
    return AdamStates(folder, stage, ranks, shapes)


def _states_folder(folder: Path) -> Path:
    candidates = [folder, *sorted(folder.glob("global_step*"))]
    found = [path for path in candidates if any(path.glob(FILES))]
    if found:
        return found[-1]
    if (folder / "optimizer.pt").exists():
        raise MergeError(
            f"{folder}: was trained without DeepSpeed, and optimizer.pt does not say which moment "
            "is of which parameter; run `obm calibrate calibration.kinds=[fisher]` instead"
        )
    raise MergeError(
        f"{folder}: holds no optimizer of DeepSpeed ({FILES}); give a run's "
        "checkpoints/checkpoint-N"
    )


def _rank_of(path: Path) -> int:
    """The process that wrote a file of `FILES`."""
    return int(path.name.partition("zero_pp_rank_")[2].partition("_")[0])


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise MergeError(f"{path}: is missing; copy the whole checkpoint") from error
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {found[1]}" if found else " ".join(str(error).split())[:200]
        raise MergeError(
            f"{path}: is not read, because {reason}; a checkpoint of DeepSpeed needs no other code "
            "than its own"
        ) from error
    if not isinstance(content, dict):
        raise MergeError(f"{path}: holds no checkpoint of DeepSpeed")
    return content


def adam_fisher(
    source: str | Path,
    checkpoint: Checkpoint,
    output: str | Path,
    *,
    families: str | Path | None = None,
) -> Path:
    """Writes Adam's second moments as a statistics file of kind fisher.

    Args:
        source: See `open_adam`.
        checkpoint: The model that will be merged: it must be what this optimizer had arrived at.
        output: Folder of the statistics file.
        families: YAML file with further families.

    Returns:
        The file.

    Raises:
        MergeError: See `open_adam`; the checkpoint holds other weights, a tensor is missing (a
            frozen one, an adapter), or a moment is not finite.
    """
    family = get_family(checkpoint.config.get("model_type"), str(checkpoint.folder), families)
    adam = open_adam(source)
    weights = weight_checksums(checkpoint, family, "fisher")
    _check_weights(adam.folder, family, weights)
    shapes = _language_shapes(checkpoint, family)
    metadata = {
        "origin": f"{KEY} of Adam, ZeRO-{adam.stage}",
        "steps": str(adam.step),
        "mask_rule": "what the training's loss counted",
        "weights": json.dumps(dict(sorted(weights.items()))),
    }
    writer = StatsWriter(Path(output) / FILE_NAMES["fisher"], "fisher", shapes, metadata)
    missing = set(shapes)
    for name, moment in adam.moments():
        canonical = canonical_name(family, name)
        if canonical not in shapes:
            continue
        if tuple(moment.shape) != shapes[canonical]:
            raise MergeError(
                f"{adam.folder}: {name} has shape {list(moment.shape)}, {checkpoint.source} "
                f"{list(shapes[canonical])}; give the model that was trained"
            )
        if not bool(torch.isfinite(moment).all()):
            raise MergeError(f"{adam.folder}: the second moments of {name} are not finite")
        writer.write(canonical, np.ascontiguousarray(moment.numpy()))
        missing.discard(canonical)
    if missing:
        raise MergeError(
            f"{adam.folder}: has no second moments of {sorted(missing)[0]} and {len(missing) - 1} "
            "more; it was frozen or an adapter was trained. Calibrate by gradients instead"
        )
    return writer.finish()


def _language_shapes(checkpoint: Checkpoint, family: Family) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, info in checkpoint.tensors.items():
        canonical = canonical_name(family, name)
        if canonical is not None and group_of(family, canonical) in (LINEAR, NORM_BIAS):
            shapes[canonical] = info.shape
    return shapes


def _check_weights(folder: Path, family: Family, expected: dict[str, str]) -> None:
    """Compares the weights beside the optimizer, where they are, with the model's."""
    for place in (folder, folder.parent):
        for path in sorted(place.glob("model*.safetensors")):
            file = SafetensorsFile(path)
            for name in file.tensors:
                canonical = canonical_name(family, name)
                if canonical in expected and file.checksum(name) != expected[canonical]:
                    raise MergeError(
                        f"{folder}: is the optimizer of other weights ({canonical} differs); merge "
                        f"that checkpoint itself, or calibrate by gradients"
                    )
        if (place / "config.json").exists():
            return
