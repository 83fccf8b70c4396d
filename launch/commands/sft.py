"""Cold start: teach the plain VLM to search from episodes of a solver, before GRPO.

Takes episodes with a right answer on questions of the training split, from the atlas's solver or
another checkpoint (sft.teacher), and trains on the policy's tokens alone. The result,
OUTPUT/policy, starts a training by GRPO (models.init); OUTPUT/cost.json says what it cost.
docs/sport.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import add_config_arguments, read_config

EXAMPLES = (
    "obm sft models.init=atlas://vlm output=runs/cold --dry-run",
    "obm sft models.init=atlas://vlm output=runs/cold sft.episodes=256 sft.steps=60",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings, and what to do with a run that is there."""
    add_config_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")


def run(options: argparse.Namespace) -> int:
    """Collect and train."""
    config = read_config(options)
    from train.cold_start import describe_cold_start, run_cold_start
    from train.lock import locked

    if options.dry_run:
        print(describe_cold_start(config))
        return 0
    from launch.arguments import show_progress

    show_progress()
    with locked(Path(config.output), setting="output"):
        policy = run_cold_start(config, overwrite=options.overwrite)
    print(f"written to {policy}; train it with models.init={policy}")
    return 0
