"""Train a checkpoint by GRPO on multi-step search, under DeepSpeed.

The same as `deepspeed launch/train.sh --config FILE key=value ...`, with a --dry-run that prints
the settings and the arithmetic of a step.
"""

from __future__ import annotations

import argparse
import subprocess
from typing import TYPE_CHECKING

from launch.arguments import add_config_arguments, config_path, read_config
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm train --config configs/demo.yaml --dry-run",
    "obm train models.init=runs/demo/merged/obm output=runs/obm-s1 seed=1 --num-processes 2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings, ranks, and what to do with a run that is there."""
    add_config_arguments(parser)
    parser.add_argument(
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="ranks on this machine (default: 1)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")


def run(options: argparse.Namespace) -> int:
    """Check the settings here, then hand over to the launcher."""
    config = read_config(options)
    if options.dry_run:
        print(describe_plan(config, options.num_processes))
        return 0
    from launch.jobs import training_command, training_environment

    arguments = ["--config", str(config_path(options.config)), *options.overrides]
    arguments += [flag for flag in ("resume", "overwrite") if getattr(options, flag)]
    arguments = [f"--{a}" if a in ("resume", "overwrite") else a for a in arguments]
    command = training_command(arguments, n_processes=options.num_processes)
    return subprocess.run(
        command, env=training_environment(parallel=options.num_processes), check=False
    ).returncode


def describe_plan(config: Config, n_processes: int) -> str:
    """Settings and the arithmetic of one optimizer step.

    Raises:
        LaunchError: the completions of a step cannot be cut into whole groups.
    """
    from configs.schema import dump_config

    grpo = config.grpo
    group = int(grpo.get("num_generations", 8))
    per_device = int(grpo.get("per_device_train_batch_size", 8))
    accumulation = int(grpo.get("gradient_accumulation_steps", 1))
    completions = n_processes * per_device * accumulation
    if completions % group:
        raise LaunchError(
            f"grpo.num_generations: a step has {completions} completions ({n_processes} processes "
            f"x {per_device} x {accumulation}), no multiple of {group}; change one of them"
        )
    length = int(grpo.get("max_completion_length", 256))
    lines = [
        dump_config(config).rstrip(),
        "",
        f"steps                 {grpo.get('max_steps', 'by num_train_epochs')}",
        f"completions per step  {completions} = {n_processes} processes x {per_device} x "
        f"{accumulation} accumulated",
        f"questions per step    {completions // group}, {group} completions each",
        f"tokens per step       at most {completions * length} (max_completion_length {length})",
        f"output                {config.output}",
        f"W&B                   project {config.tracking.project}, group {config.tracking.group}, "
        f"name {config.arm_name}-s{config.seed} ({config.tracking.wandb})",
    ]
    return "\n".join(lines)
