"""The whole story on the embedded world, on two cores, without a download or an account.

calibrate both parents, merge with four methods, evaluate every merge and the plain VLM as they are,
train the OBM start and the plain VLM by GRPO from the same data order, compare. A second run reuses
what is there.
"""

from __future__ import annotations

import argparse

EXAMPLES = (
    "obm demo",
    "obm demo --output runs/short grpo.max_steps=10 environment.eval_size=32",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and settings to change."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="settings laid over every stage; what an arm or its recipe says itself stays",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="default: runs/demo")
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="trainings at a time (default: what cores, memory and GPUs take)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and list, run nothing")


def run(options: argparse.Namespace) -> int:
    """Run the shipped study `demo`."""
    from launch.arguments import command_line
    from launch.studies.file import Options
    from launch.studies.run import describe_study, read_study, run_study

    study = read_study("demo", options)
    # The demo's folder is the demo's own: changed settings make its stages again.
    how = Options(command_line(), options.overrides, options.parallel, redo=True)
    if options.dry_run:
        print(describe_study(study, how))
    else:
        run_study(study, how)
    return 0
