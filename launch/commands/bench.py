"""Measure what the documentation promises about this tool itself.

cli   processor time of every verb's --help, target 0.5 s each
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

EXAMPLES = ("obm bench", "obm bench --output runs/bench")
HELP_TARGET_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write."""
    parser.add_argument(
        "--output", metavar="DIR", default="docs/results", help="default: docs/results"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print, write bench-cli.json; exit code 1 if a target is missed."""
    from compare.provenance import code_commit, hardware
    from launch.arguments import command_line
    from launch.cli import VERBS
    from train.run import write_json

    targets = []
    for arguments in ([], *([verb] for verb in VERBS)):
        seconds = min(cpu_seconds([*arguments, "--help"]) for _ in range(3))
        name = " ".join(["obm", *arguments, "--help"])
        met = seconds <= HELP_TARGET_S
        targets.append(
            {"name": name, "value": round(seconds, 3), "target": HELP_TARGET_S, "met": met}
        )
        print(f"{name.ljust(24)} {seconds:.3f} s")
    record = {
        "command": command_line(),
        "commit": code_commit(),
        "hardware": hardware(),
        "targets": targets,
    }
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "bench-cli.json", record)
    return 0 if all(target["met"] for target in targets) else 1


def cpu_seconds(arguments: list[str]) -> float:
    """Processor time of the console script with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
