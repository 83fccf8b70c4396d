"""Where a run goes on: the newest whole checkpoint, also for another number of processes.

What TRL's checkpoint does not say stands in its rollout.json: how many processes wrote it, whether
a generation buffer was half used up, how many completions a step had. A checkpoint inside a buffer
fits only the number of processes that wrote it, since each holds its share of the episodes, cut
into micro-batches; at a boundary nothing of ours depends on either, and DeepSpeed's part is
converted to a universal checkpoint (its `ds_to_universal`), which any number of processes can load.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from train.checkpoint_files import RECORD, find_damage
from train.settings import count_completions, resolved_grpo, zero_stage
from train.watchdog import progress

if TYPE_CHECKING:
    from configs.schema import Config

logger = logging.getLogger(__name__)

STATE = "rollout_state.pt"
UNIVERSAL_TAG = "latest_universal"
"""DeepSpeed's file that names the universal folder of a checkpoint; written when it is complete."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says about the processes that wrote it."""

    n_processes: int
    is_boundary: bool
    """no episode of a generation buffer was left to train on"""
    per_rollout: int
    """completions of a rollout, all processes"""
    per_step: int
    """completions of an optimizer step, all processes"""
    zero_stage: int
    """0 = without DeepSpeed"""
    files: dict[str, int] = field(default_factory=dict)
    """size of every file when the checkpoint was complete; none in checkpoints of older versions"""
    per_batch: int | None = None
    """completions of a micro-batch of one process; None in checkpoints of older versions"""

    def write(self, checkpoint: Path) -> None:
        """Puts it beside the weights."""
        temporary = checkpoint / f".{RECORD}.tmp"
        temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        temporary.replace(checkpoint / RECORD)


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from."""

    path: Path
    saved: Saved
    needs_conversion: bool
    """DeepSpeed's part was written by another number of processes"""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.path.name.rpartition("-")[2])


def state_name(rank: int) -> str:
    """File of a process' share of the rollout state."""
    return f"{Path(STATE).stem}_{rank}{Path(STATE).suffix}"


def read_saved(checkpoint: Path) -> Saved | None:
    """What a checkpoint says of its making; None if it was not written to its end.

    Whether its files are still those that were written, `train.checkpoint_files` says.
    """
    try:
        saved = Saved(**json.loads((checkpoint / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    files = ["trainer_state.json", *map(state_name, range(saved.n_processes))]
    return saved if all((checkpoint / name).is_file() for name in files) else None


def forget_saved(checkpoint: Path) -> None:
    """A checkpoint that is about to be written again is not whole until it is written."""
    (checkpoint / RECORD).unlink(missing_ok=True)


def whole_checkpoints(folder: Path) -> list[tuple[Path, Saved]]:
    """The checkpoints of a run that were written to their end by all processes, oldest first.

    One that has been damaged since is left out.
    """
    return [(path, saved) for path, saved, damage in _finished(folder) if damage is None]


def _finished(folder: Path) -> list[tuple[Path, Saved, str | None]]:
    """As `whole_checkpoints`, with those that are damaged and what is wrong with them."""
    found = [(path, read_saved(path)) for path in own_checkpoints(folder / "checkpoints")]
    finished = [(path, saved) for path, saved in found if saved is not None]
    return [(path, saved, find_damage(path, saved.files)) for path, saved in finished]


def own_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by step, finished or not.

    Copies of the user's beside them, checkpoint-40-good, are none.
    """
    named = folder.glob("checkpoint-*")
    ours = [path for path in named if re.fullmatch(r"checkpoint-\d{1,18}", path.name)]
    return sorted(ours, key=lambda path: int(path.name.rpartition("-")[2]))


def find_start(folder: Path, config: Config, n_processes: int) -> Start | None:
    """The newest checkpoint that this many processes can go on from; None if there is none at all.

    Args:
        folder: the run folder.
        config: the settings to go on with.
        n_processes: of the continuation.

    Raises:
        ConfigError: there are checkpoints, but none that fits, or all are damaged; or other
            completions a step, or another stage of ZeRO.
    """
    finished = _finished(folder)
    whole = [(path, saved) for path, saved, damage in finished if damage is None]
    damages = [damage for _, _, damage in finished if damage is not None]
    if damages and not whole:
        raise ConfigError(
            f"--resume: {damages[-1]}; copy the run again, or begin it anew with --overwrite"
        )
    for damage in damages:
        logger.warning("%s: this checkpoint is not used", damage)
    if not whole:
        return None
    per_batch = resolved_grpo(config)["per_device_train_batch_size"]
    for path, saved in reversed(whole):
        same = saved.n_processes == n_processes
        if saved.is_boundary or (same and saved.per_batch in (None, per_batch)):
            _check_batch(path, saved, config, n_processes)
            stage = _check_stage(path, saved, config)
            return Start(path, saved, needs_conversion=stage > 0 and not same)
    path, saved = whole[-1]
    cut, keep = "", ""
    if saved.per_batch is not None:
        cut = f" in micro-batches of {saved.per_batch}"
        keep = f" of grpo.per_device_train_batch_size={saved.per_batch}"
    raise ConfigError(
        f"--resume: every checkpoint of {folder} lies inside a generation buffer that "
        f"{saved.n_processes} processes share{cut}; go on with {saved.n_processes} processes{keep} "
        "and save at a boundary (grpo.save_steps a multiple of the steps of a buffer), then change "
        "the numbers"
    )


def _check_batch(path: Path, saved: Saved, config: Config, n_processes: int) -> None:
    grpo = resolved_grpo(config)
    per_rollout, per_step = count_completions(grpo, n_processes)
    if (per_rollout, per_step) == (saved.per_rollout, saved.per_step):
        return
    accumulated = grpo["gradient_accumulation_steps"]
    rows, rest = divmod(saved.per_step, n_processes * accumulated)
    fix = f"set it to {rows}"
    if (per_step, bool(grpo.get("steps_per_generation"))) == (saved.per_step, True):
        rows = n_processes * grpo["per_device_train_batch_size"]
        fix = f"set grpo.steps_per_generation to {saved.per_rollout // rows}"
    elif rest:
        fix = f"choose a number of processes that divides {saved.per_step // accumulated}"
    raise ConfigError(
        f"grpo.per_device_train_batch_size: {path.name} was trained with {saved.per_step} "
        f"completions a step and {saved.per_rollout} a rollout; {n_processes} processes x "
        f"{grpo['per_device_train_batch_size']} x {accumulated} make {per_step} and {per_rollout}; "
        f"{fix}"
    )


def _check_stage(path: Path, saved: Saved, config: Config) -> int:
    stage = zero_stage(config)
    if stage != saved.zero_stage:
        raise ConfigError(
            f"deepspeed: {path.name} holds the optimizer of {_stage_name(saved.zero_stage)}, which "
            f"{_stage_name(stage)} cannot load; go on with the one that it was started with"
        )
    return stage


def _stage_name(stage: int) -> str:
    return f"ZeRO-{stage}" if stage else "plain torch"


# ---------------------------------------------------------------- universal checkpoints


def convert(start: Start, rank: int) -> None:
    """Makes the universal part of a checkpoint; the first process does, the others wait.

    Needs room for the fp32 weights and both moments once more.

    Raises:
        ConfigError: DeepSpeed's converter failed; shows its last lines.
    """
    import torch.distributed as dist

    if rank == 0 and not (start.path / UNIVERSAL_TAG).is_file():
        _run_converter(start)
    if dist.is_initialized():
        dist.barrier()


def _run_converter(start: Start) -> None:
    tag = (start.path / "latest").read_text(encoding="utf-8").strip()
    output = start.path / f"{tag}_universal"
    shutil.rmtree(output, ignore_errors=True)  # of a conversion that was interrupted
    n_workers = str(max(1, min(4, len(os.sched_getaffinity(0)) // 2)))
    command: list[Any] = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
        "--input_folder", start.path / tag, "--output_folder", output,
        "--num_extract_workers", n_workers, "--num_merge_workers", n_workers,
    ]  # fmt: skip
    if start.saved.zero_stage < 3:
        # the key that marks a checkpoint as convertible is written by other frameworks only
        command.append("--inject_missing_state")
    logger.info(
        "converting %s from %d processes to any number", start.path.name, start.saved.n_processes
    )
    alone = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    log = start.path / "ds_to_universal.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=alone, stdout=file, stderr=subprocess.STDOUT)
        while True:
            progress.begin("convert")  # as long as the converter lives this is no hang
            try:
                code = process.wait(timeout=2.0)
                break
            except subprocess.TimeoutExpired:
                continue
    if code != 0:
        tail = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-500:]
        raise ConfigError(
            f"--resume: DeepSpeed cannot convert {start.path} to another number of processes "
            f"(exit code {code}: {tail}); go on with {start.saved.n_processes}"
        )
    log.unlink()
    (start.path / UNIVERSAL_TAG).write_text(output.name, encoding="utf-8")


_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a process takes itself for one of the run's."""
