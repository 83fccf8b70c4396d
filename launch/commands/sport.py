"""Step-wise preference tuning (SPORT): sample steps, verify them, tune by DPO, again.

Several candidates for every step of an episode are executed in the real environment and scored;
pairs of a better and a worse step tune the policy. The result, OUTPUT/policy, starts a training by
GRPO (models.init) or stands for itself; OUTPUT/cost.json says what it cost. docs/sport.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import add_config_arguments, read_config

EXAMPLES = (
    "obm sport models.init=runs/merged/obm output=runs/sport --dry-run",
    "obm sport models.init=runs/merged/obm output=runs/sport sport.iterations=2 sport.tasks=128",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings, and what to do with a run that is there."""
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on after the last iteration")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")


def run(options: argparse.Namespace) -> int:
    """Run the iterations that are missing."""
    config = read_config(options)
    from train.lock import locked
    from train.sport import describe_sport, run_sport

    if options.dry_run:
        print(describe_sport(config))
        return 0
    from launch.arguments import show_progress

    show_progress()
    with locked(Path(config.output), setting="output"):
        policy = run_sport(config, resume=options.resume, overwrite=options.overwrite)
    print(f"written to {policy}; train it with models.init={policy}")
    return 0
