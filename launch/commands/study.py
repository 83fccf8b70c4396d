"""Several starts times several seeds, then the comparison.

A study file names the training settings, the arms (each a checkpoint or a merge recipe) and the
seeds. What is finished is reused, a broken training goes on from its last checkpoint; settings that
have changed since are refused unless --redo is given. A study of floors trains nothing: it shows
what every start does as it is. A study with benchmarks makes the paper's table: every start in its
modes, and every trained policy, on each benchmark.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = (
    "obm study ceiling --dry-run",
    "obm study floor --dry-run",
    "obm study paper --dry-run",
    "obm study my_study.yaml --parallel 2 grpo.max_steps=50",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study, and how to run it."""
    parser.add_argument("study", help="YAML file, or the name of a shipped study")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings laid over every run"
    )
    parser.add_argument("--output", metavar="DIR", help="default: as the file says")
    parser.add_argument(
        "--report", metavar="DIR", help="where the report goes (default: as the file says)"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="trainings, or evaluations, at a time (default: GPUs, else cores)",
    )
    parser.add_argument("--redo", action="store_true", help="make changed stages again")
    parser.add_argument("--dry-run", action="store_true", help="check and list, run nothing")


def run(options: argparse.Namespace) -> int:
    """Run what is missing, write the report."""
    from launch.arguments import check_overrides, command_line
    from launch.studies.ceiling import describe_study, run_ceiling
    from launch.studies.file import load_study
    from launch.studies.floor import run_floor
    from launch.studies.paper_table import run_table

    check_overrides(options.overrides)
    study = load_study(options.study)
    if options.output:
        study.output = Path(options.output)
    if options.report:
        study.report = Path(options.report)
    if options.dry_run:
        print(describe_study(study, options.overrides))
        return 0
    runners = {"ceiling": run_ceiling, "floor": run_floor, "table": run_table}
    runners[study.kind](
        study,
        command=command_line(),
        overrides=options.overrides,
        parallel=options.parallel,
        redo=options.redo,
    )
    return 0
