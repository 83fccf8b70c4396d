"""The drill: everything that goes wrong in a long run, done on purpose, on the embedded trio.

kills     SIGKILL of each command's process group at random moments, until it finishes; the result
          has to equal an undisturbed one's, tensors bit by bit
disk      the disk fills up under each command, then has room again
network   the search server's connections are cut, stalled, reset, answered with rubbish
files     truncated, flipped and hostile files in the place of every input
rivals    two commands on one output at once

    make drill                                   (a quarter of an hour on two cores)
    python -m launch.drill --quick --only kills  (two minutes)

Writes docs/results/reliability.md and .json. The exit code is 1 where anything happened that
docs/reliability.md rules out.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.drill_process import Row
from launch.drill_report import make_record, render, write_report

KILLS, QUICK_KILLS = 4, 2
QUICK_TASKS = ("obm calibrate", "obm merge", "obm eval")


@dataclass(frozen=True)
class Drill:
    """What all parts need."""

    base: Path
    """statistics and a merged start, see `drill_tasks.prepare`"""
    folder: Path
    """to work in; of this part alone"""
    dice: random.Random
    quick: bool


def kills(drill: Drill) -> tuple[list[Row], str]:
    """Every command of the pipeline, and the search server."""
    from launch.drill_kills import drill_kills
    from launch.drill_tasks import pipeline

    tasks = [t for t in pipeline(drill.base) if not drill.quick or t.name in QUICK_TASKS]
    rows = drill_kills(tasks, drill.folder, drill.dice, QUICK_KILLS if drill.quick else KILLS)
    return rows, (
        "A killed command is started again with the same words until it ends by itself. Four of "
        "five kills fall while it writes, the others while it starts up."
    )


PARTS = {"kills": kills}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, writes the table.

    Returns:
        0; 1 where anything happened that should not.
    """
    from launch.drill_tasks import prepare

    parser = argparse.ArgumentParser(
        prog="launch.drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=tuple(PARTS), metavar="PART", action="append",
                        help=f"{', '.join(PARTS)}; may be given again")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of moments and damage (default: 0)")
    parser.add_argument("--quick", action="store_true", help="fewer commands, fewer kills")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("runs/drill"), metavar="DIR",
                        help="emptied first (default: runs/drill)")  # fmt: skip
    options = parser.parse_args(argv)
    work, started = options.work.absolute(), time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    prepare(work / "base")
    rows: list[Row] = []
    notes = {}
    for name in options.only or PARTS:
        # each part has dice of its own, so that --only draws what the whole drill draws
        dice = random.Random(f"{options.seed} {name}")
        found, notes[name] = PARTS[name](Drill(work / "base", work / name, dice, options.quick))
        rows += found
        for row in found:
            print(f"{row.what}: {row.how}, {row.n} times: {row.happened} ({row.seconds:.0f} s)")
            for problem in row.problems:
                print(f"  PROBLEM: {problem}", flush=True)
    words = ["python", "-m", "launch.drill", *(sys.argv[1:] if argv is None else argv)]
    record = make_record(
        rows, command=shlex.join(words), seed=options.seed,
        seconds=time.monotonic() - started, notes=notes,
    )  # fmt: skip
    write_report(record, options.output)
    print(f"\n{render(record)}")
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
