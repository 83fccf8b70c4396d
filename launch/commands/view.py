"""Recorded episodes as one page: filter and sort them, read them, two side by side, over training.

Reads trajectories.jsonl of runs and evaluations, also while they go on, and their pictures. The
page is one file that needs a browser and nothing else. docs/viewer.md says what is on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError

if TYPE_CHECKING:
    from compare.trajectory_files import TrajectoryFile
    from compare.viewer import Packed

EXAMPLES = (
    "obm view runs/obm-s0",
    "obm view runs/demo/runs/* --output runs/view.html --phase eval",
    "obm view runs/obm-s0 runs/vlm-s0 --steps 0,60 --questions 'two/jp/*' --output ab.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to read, which of it, and where to."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="run folder, folder of `obm eval`, or a trajectories.jsonl; several are put together",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FILE", help="default: view.html beside the first RUN's episodes"
    )
    parser.add_argument("--phase", choices=("eval", "train"), help="only these episodes")
    parser.add_argument(
        "--steps", metavar="LIST", help="only these steps, such as 0,30-60 or 100- (default: all)"
    )
    parser.add_argument(
        "--questions", metavar="ID", action="append",
        help="only this question; * and ? stand for any text; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="N",
        help="at most about N episodes: whole questions are left out, the same for every run",
    )  # fmt: skip
    parser.add_argument("--no-pictures", action="store_true", help="leave pictures out")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")


def run(options: argparse.Namespace) -> int:
    """Read, pack, write, say what came of it."""
    from compare.trajectory_files import find_file
    from compare.viewer import pack, write_page
    from compare.viewer_choice import Choice, read_files

    choice = Choice.parse(options.phase, options.steps, options.questions, options.limit)
    paths = [find_file(place) for place in options.runs]
    output = Path(options.output or paths[0].parent / "view.html")
    try:
        is_there, is_folder = output.exists(), output.is_dir()
    except OSError as error:  # such as a name that is too long
        raise LaunchError(
            f"--output {output}: cannot be written ({error.strerror}); name another file"
        ) from error
    if is_there and not options.overwrite:
        raise LaunchError(f"{output} exists; pass --overwrite or another --output")
    if is_folder:
        raise LaunchError(f"{output} is a folder; name a file, such as {output}/view.html")
    files = read_files(paths, choice)
    packed = pack(files, with_pictures=not options.no_pictures)
    names = [run["name"] for run in packed.index["runs"]]
    size = write_page(packed, output, _title(names))
    print("\n".join(describe(packed, files, output, size)))
    return 0


def describe(packed: Packed, files: Sequence[TrajectoryFile], output: Path, size: int) -> list[str]:
    """What is in the page and what is not."""
    n_runs, n_questions = len(packed.index["runs"]), len(packed.index["questions"])
    lines = [
        f"{packed.n_episodes:,} episodes of {_of(n_runs, 'run')} on {_of(n_questions, 'question')}"
        f", {len(packed.pictures) - packed.n_missing:,} pictures"
    ]
    lines += [f"note: the last line of {file.path} was torn and is left out"
              for file in files if file.is_torn]  # fmt: skip
    if packed.n_missing:
        lines.append(
            f"note: {_of(packed.n_missing, 'picture')} not in a folder pictures/ "
            "(tracking.picture_size was 0, or an earlier version recorded the run)"
        )
    return [*lines, f"written to {output} ({size / 1e6:.1f} MB)"]


def _of(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def _title(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"Episodes of {shown}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
