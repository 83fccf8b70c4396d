"""The drill: everything that goes wrong in a long run, done on purpose, on the embedded trio.

kills     SIGKILL of each command's process group at random moments, until it finishes; the result
          has to equal an undisturbed one's, tensors bit by bit
disk      the disk fills up under each command, then has room again
network   the search server's connections are cut, stalled, reset, answered with rubbish
files     truncated, flipped and hostile files in the place of every input
rivals    two commands on one output at once

    make drill                                   (a quarter of an hour on two cores)
    python -m launch.drill --quick --only kills  (two minutes)

Writes docs/results/reliability.md and .json; a part, or a quick drill, writes them into --work, so
that the whole one's stay. The exit code is 1 where anything happened that docs/reliability.md rules
out.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from launch.drill_process import Row
from launch.drill_report import make_record, write_report

if TYPE_CHECKING:
    from launch.drill_tasks import Task, Whole

KILLS, QUICK_KILLS = 4, 2
QUICK_TASKS = ("obm calibrate", "obm merge")
FULL_DISKS = ("obm calibrate", "obm merge", "obm train", "obm study")
RIVALS = ("obm calibrate", "obm merge", "obm train", "obm eval", "obm study")
QUICK_CASES = 12
SIDE_BY_SIDE = 2


class Drill:
    """What all parts share.

    Args:
        work: folder to work in.
        seed: of moments and damage.
        quick: fewer commands, fewer kills.
    """

    def __init__(self, work: Path, seed: int, quick: bool) -> None:
        from launch.drill_tasks import pipeline, prepare

        self.work, self.seed, self.quick = work, seed, quick
        self.base = work / "base"
        self.start = prepare(self.base)
        self._tasks = pipeline(self.base)
        self._whole: dict[str, Whole] = {}

    def dice(self, name: str) -> random.Random:
        """Of a part or a task: --only draws what the whole drill draws."""
        return random.Random(f"{self.seed} {name}")

    def tasks(self, names: Sequence[str] = ()) -> list[Task]:
        """Commands by name, all of them without; those of a quick drill."""
        found = [task for task in self._tasks if not names or task.name in names]
        return [task for task in found if not self.quick or task.name in QUICK_TASKS]

    def whole(self, task: Task) -> Whole:
        """A command's undisturbed run; made once."""
        from launch.drill_tasks import run_undisturbed

        if task.name not in self._whole:
            place = self.work / "whole" / task.name.replace(" ", "-")
            self._whole[task.name] = run_undisturbed(task, place)
        return self._whole[task.name]

    def each(self, tasks: Sequence[Task], drill: Callable[[Task], Row]) -> list[Row]:
        """One row a task, two at a time: most commands keep one core busy."""
        with ThreadPoolExecutor(SIDE_BY_SIDE) as executor:
            return list(executor.map(drill, tasks))


def kills(drill: Drill) -> tuple[list[Row], str]:
    """Every command of the pipeline, and the search server."""
    from launch.drill_kills import drill_kills
    from launch.drill_network import drill_serve

    n_kills = QUICK_KILLS if drill.quick else KILLS

    def one(task: Task) -> Row:
        folder = drill.work / "kills" / task.name.replace(" ", "-")
        return drill_kills(task, drill.whole(task), folder, drill.dice(task.name), n_kills)

    rows = drill.each(drill.tasks(), one)
    rows.append(drill_serve(drill.work / "kills" / "serve", drill.dice("obm serve"), n_kills))
    return rows, (
        "A killed command is started again with the same words until it ends by itself. Four of "
        "five kills fall while it writes, the others while it starts up. Compared are the tensors "
        "bit by bit and every number of the records; clocks and provenance are left out."
    )


def disk(drill: Drill) -> tuple[list[Row], str]:
    """Calibrate, merge, a training's checkpoint, a study."""
    from launch.drill_disk import disk_words, drill_disk, kind_of_disk

    folder = drill.work / "disk"
    kind = kind_of_disk(folder)

    def one(task: Task) -> Row:
        place = folder / task.name.replace(" ", "-")
        return drill_disk(task, drill.whole(task), place, kind)

    return drill.each(drill.tasks(FULL_DISKS), one), disk_words(kind)


def network(drill: Drill) -> tuple[list[Row], str]:
    """A training and an evaluation behind a proxy."""
    from launch.drill_network import drill_network

    rows = drill_network(drill.start, drill.work / "network", drill.dice("network"), drill.quick)
    return rows, (
        "A proxy stands between the tools and `obm serve`. After some sound requests it dooms "
        "most: resets the connection, cuts the answer in its middle, lets nothing come, sends "
        "bytes that are no HTTP, JSON that is no answer, or a gateway's page; then it is healed."
    )


def files(drill: Drill) -> tuple[list[Row], str]:
    """Damaged and hostile inputs."""
    from launch.drill_cases import CASES
    from launch.drill_files import drill_files, prepare_files

    cases = CASES[:QUICK_CASES] if drill.quick else CASES
    prepare_files(drill.base, with_training=not drill.quick)
    rows = drill_files(drill.base, drill.work / "files", str(drill.seed), cases)
    return rows, (
        "Each case runs the real command on a copy. Right is: exit code 2, one line that names the "
        "file, the reason and the fix, no traceback, nothing written, no pickle opened."
    )


def rivals(drill: Drill) -> tuple[list[Row], str]:
    """Two of each at once."""
    from launch.drill_rivals import drill_overwrite, drill_rivals

    folder = drill.work / "rivals"

    def one(task: Task) -> Row:
        return drill_rivals(task, drill.whole(task), folder / task.name.replace(" ", "-"))

    # pairs run one after another: each is two processes already
    rows = [one(task) for task in drill.tasks(RIVALS)]
    for task in drill.tasks(("obm train",)):
        rows.append(drill_overwrite(task, drill.whole(task), folder / "overwrite", drill.start))
    return rows, "The winner's result is compared with the undisturbed one's."


PARTS = {"kills": kills, "disk": disk, "network": network, "files": files, "rivals": rivals}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, writes the table.

    Returns:
        0; 1 where anything happened that should not.
    """
    options = _parse(argv)
    output = options.output or (
        options.work if options.only or options.quick else Path("docs/results")
    )
    work, started = options.work.absolute(), time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    drill = Drill(work, options.seed, options.quick)
    rows: list[Row] = []
    notes = {}
    for name in PARTS:
        if options.only and name not in options.only:
            continue
        found, notes[name] = PARTS[name](drill)
        rows += found
        for row in found:
            print(f"{row.what}: {row.how}, {row.n} times: {row.happened} ({row.seconds:.0f} s)")
            for problem in row.problems:
                print(f"  PROBLEM: {problem}")
        sys.stdout.flush()
    words = ["python", "-m", "launch.drill", *(sys.argv[1:] if argv is None else argv)]
    record = make_record(
        rows, command=shlex.join(words), seed=options.seed,
        seconds=time.monotonic() - started, notes=notes,
    )  # fmt: skip
    write_report(record, output)
    print(f"{len(rows)} disturbances, {record['problems']} problems: {output}")
    return 1 if record["problems"] else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.drill", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--only", choices=tuple(PARTS), metavar="PART", action="append",
        help=f"{', '.join(PARTS)}; may be given several times (default: all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of moments and damage (default: 0)")
    parser.add_argument("--quick", action="store_true", help="fewer commands, fewer kills")
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="of the report (default: docs/results; with --only or --quick that of --work)",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, default=Path("runs/drill"), metavar="DIR",
        help="emptied first (default: runs/drill)",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
