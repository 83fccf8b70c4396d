"""How many trainings or evaluations a machine takes at a time: by cores, memory and GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merge.memory import available_memory

if TYPE_CHECKING:
    from configs.schema import Config
    from train.memory import Memory

PROCESS_BYTES = 1_000_000_000
"""Python and its libraries in one process that runs a model (1.0 GB measured, the trio's weights
and activations included)."""
LAUNCHER_BYTES = 500_000_000
"""The launcher's two processes beside a training (2 x 250 MB measured)."""
MEMORY_SHARE = 0.9
"""Of the memory that is available, what trainings may fill."""


@dataclass(frozen=True)
class Machine:
    """What is there to share."""

    n_cores: int
    memory: int
    """bytes that are available now"""
    n_gpus: int = 0


@dataclass(frozen=True)
class Share:
    """How many at a time, and what decided it."""

    parallel: int
    words: str


def this_machine() -> Machine:
    """Cores that this process may use, memory that is free, GPUs that torch sees."""
    import torch

    return Machine(len(os.sched_getaffinity(0)), available_memory(), torch.cuda.device_count())


def training_bytes(config: Config, n_processes: int = 1) -> int:
    """Main memory that one training on the processor takes, all of its processes.

    The peak of `train.memory` without a GPU's context, with full token budgets, so rather too much;
    besides it Python and its libraries. A model whose shape is not known here counts as nothing
    but those.
    """
    from train.plan import CONTEXT_BYTES

    found = _memory(config, n_processes)
    peak = 0.0 if found is None else found.peak - CONTEXT_BYTES
    return LAUNCHER_BYTES + n_processes * (PROCESS_BYTES + int(peak))


def evaluation_bytes(config: Config) -> int:
    """Main memory of one evaluation on the processor: the policy and its rollout, a merge before.

    A merge holds three parents' pages at most, as large as the policy's weights each.
    """
    found = _memory(config, 1)
    if found is None:
        return PROCESS_BYTES
    rollout = sum(found.phases["rollout"].values())
    return PROCESS_BYTES + int(4 * found.always["weights"] + rollout)


def _memory(config: Config, n_processes: int) -> Memory | None:
    """Of a training step; the VLM's shape stands for a merge's, which may not be there yet."""
    from configs.errors import ConfigError
    from train.estimate import plan_of
    from train.memory import memory

    models = replace(config.models, init=config.models.vlm or config.models.init)
    try:
        return memory(plan_of(replace(config, models=models), n_processes))
    except ConfigError:
        return None


def share_evaluations(config: Config, wanted: int | None = None) -> Share:
    """How many evaluations without training run at a time, one process each.

    Args:
        config: of one of them.
        wanted: see `share_trainings`.
    """
    n_bytes = evaluation_bytes(config)
    return share_trainings(this_machine(), n_bytes, wanted=wanted, of="an evaluation")


def share_trainings(
    machine: Machine,
    n_bytes: int,
    *,
    n_processes: int = 1,
    wanted: int | None = None,
    of: str = "a training",
) -> Share:
    """How many trainings, or evaluations, run at a time.

    Args:
        machine: what is there.
        n_bytes: main memory of one training, see `training_bytes`; not looked at on GPUs.
        n_processes: of one training; on GPUs each has one of its own.
        wanted: what the user asked for; taken as it is, with a warning where it is too much.
        of: what runs, in words.

    Returns:
        At least one: whether that fits is the training's own to say.
    """
    if machine.n_gpus:
        fits, words = _by_gpus(machine.n_gpus, n_processes, of)
    else:
        fits, words = _by_cores(machine, n_bytes, n_processes)
    if wanted is None:
        return Share(max(1, fits), words)
    if machine.n_gpus and wanted > fits:
        return Share(max(1, fits), f"{words}; --parallel {wanted} would share a GPU")
    warning = f"; --parallel {wanted} is more than fits" if wanted > fits else ""
    return Share(wanted, f"as --parallel says ({words}{warning})")


def _by_gpus(n_gpus: int, n_processes: int, of: str) -> tuple[int, str]:
    each = f"{n_processes} GPU{'s' if n_processes > 1 else ''} {of}"
    return n_gpus // n_processes, f"{each}, {n_gpus} there"


def _by_cores(machine: Machine, n_bytes: int, n_processes: int) -> tuple[int, str]:
    by_cores = machine.n_cores // n_processes
    by_memory = int(MEMORY_SHARE * machine.memory) // max(1, n_bytes)
    words = f"{machine.n_cores} cores, {machine.memory / 1e9:.1f} GB free, {n_bytes / 1e9:.1f} each"
    return min(by_cores, by_memory), words


def gpu_groups(n_gpus: int, n_processes: int) -> list[tuple[int, ...]]:
    """GPUs of each training that runs at a time: `gpu_groups(5, 2)` is `[(0, 1), (2, 3)]`."""
    starts = range(0, n_gpus - n_processes + 1, n_processes)
    return [tuple(range(start, start + n_processes)) for start in starts]


def time_left(seconds: Sequence[float], n_left: int, parallel: int) -> float | None:
    """Seconds until the rest is done, when it goes on as it went; None where nothing is known.

    Args:
        seconds: that each finished one took, of those that ran `parallel` at a time.
        n_left: not finished yet.
        parallel: at a time.
    """
    if not seconds:
        return None
    n_rounds = n_left / max(1, min(parallel, n_left)) if n_left else 0
    return n_rounds * sum(seconds) / len(seconds)


def duration_words(seconds: float | None) -> str:
    """A duration for people: `50 s`, `4 min`, `2.5 h`; `unknown` for None."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
