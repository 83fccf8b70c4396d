"""Several starts times several seeds, then the comparison.

A study file names settings, the arms (each a checkpoint or a merge recipe) and the seeds; its
`kind` says what is done with them:

  ceiling   every arm is trained with every seed, and compared (the default)
  floor     every arm as it is, before any training
  ablation  one recipe, its settings changed one at a time
  transfer  starts and trained policies where they were not trained
  table     the paper's table: every start in its modes, every trained policy, on each benchmark

What is finished is reused, a broken training goes on from its last checkpoint; settings that have
changed since are refused unless --redo is given. A training that fails does not stop the others.
"""

from __future__ import annotations

import argparse

EXAMPLES = (
    "obm study ceiling --dry-run",
    "obm study floor --dry-run",
    "obm study ablation --dry-run",
    "obm study my_study.yaml --parallel 2 grpo.max_steps=50",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study, and how to run it."""
    parser.add_argument("study", help="YAML file, or the name of a shipped study")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="settings laid over every run; what an arm or its recipe says itself stays",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="default: as the file says")
    parser.add_argument(
        "--report", metavar="DIR", help="where the report goes (default: as the file says)"
    )
    parser.add_argument(
        "--parallel", type=int, metavar="N",
        help="trainings, or evaluations, at a time (default: what cores, memory and GPUs take)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="processes of one training; they share its completions (default: 1)",
    )  # fmt: skip
    parser.add_argument("--redo", action="store_true", help="make changed stages again")
    parser.add_argument(
        "--partial", action="store_true",
        help="where trainings have failed, report what is complete",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="check, list, say what is there; run nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Run what is missing, write the report."""
    from launch.arguments import command_line
    from launch.studies.file import Options
    from launch.studies.run import describe_study, read_study, run_study

    study = read_study(options.study, options)
    how = Options(
        command=command_line(),
        overrides=options.overrides,
        parallel=options.parallel,
        n_processes=options.processes,
        redo=options.redo,
        partial=options.partial,
    )
    if options.dry_run:
        print(describe_study(study, how))
    else:
        run_study(study, how)
    return 0
