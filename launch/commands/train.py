"""Train a checkpoint by GRPO on multi-step search, under DeepSpeed.

The same as `deepspeed launch/train.sh --config FILE key=value ...`, with a --dry-run that prints
the settings, the arithmetic of a step, and the memory and time to expect.
"""

from __future__ import annotations

import argparse
import os
import sys

from launch.arguments import add_config_arguments, config_path, read_config
from train.estimate import (
    MOST_PROCESSES,
    add_estimate_arguments,
    check_number,
    estimate_arguments,
)

EXAMPLES = (
    "obm train --config configs/demo.yaml --dry-run",
    "obm train --config qwen2.5-vl-7b --dry-run --machine h100x8 --prompt-tokens 1500",
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
    add_estimate_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Check the settings here, then hand over to the launcher."""
    check_number("--num-processes", options.num_processes, 1, MOST_PROCESSES)
    config = read_config(options)
    if options.dry_run:
        from train.run import describe_run

        print(describe_run(config, options.num_processes, **estimate_arguments(options)))
        return 0
    from launch.jobs import training_command, training_environment

    arguments = ["--config", str(config_path(options.config)), *options.overrides]
    arguments += [f"--{flag}" for flag in ("resume", "overwrite", "debug") if vars(options)[flag]]
    command = training_command(arguments, n_processes=options.num_processes)
    sys.stdout.flush()
    # The launcher takes our place, so that signals and the exit code are its own.
    os.execve(command[0], command, training_environment(parallel=options.num_processes))
