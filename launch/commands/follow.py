"""How a run's episodes on chosen evaluation questions changed: answer, reward and searches by step.

Reads trajectories.jsonl of a run folder, also while the run goes on. Which questions are followed
is decided by tracking.follow and environment.data_seed, so two arms of a comparison have the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError

if TYPE_CHECKING:
    from train.followed import Visit

EXAMPLES = (
    "obm follow runs/vlm-s0",
    "obm follow runs/vlm-s0 --question two/jp/currency/0 --text",
)
WIDTHS = {"step": 6, "reward": 7, "answer": 24, "changed": 24}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and what of it."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--question", metavar="ID", help="this question alone")
    parser.add_argument("--text", action="store_true", help="whole episodes where they changed")


def run(options: argparse.Namespace) -> int:
    """Print a block for each question."""
    from compare.trajectory_files import check_row, read_lines
    from train.followed import follow
    from train.terminal import spelt_out

    path = Path(options.run) / "trajectories.jsonl"
    if not os.path.isfile(path):  # which, unlike Path's, takes a name that is too long for none
        raise LaunchError(f"{options.run} holds no trajectories.jsonl; name a run folder")
    rows = []
    for number, row in read_lines(path):
        if row is not None and row.get("followed"):
            check_row(row, f"{path}:{number}")
            rows.append(row)
    prompts = {row["question_id"]: row["prompt"] for row in rows}
    found = follow(rows)
    if options.question:
        found = {name: visits for name, visits in found.items() if name == options.question}
    if not found:
        known = f"; it follows {', '.join(prompts)}" if prompts else "; set tracking.follow above 0"
        raise LaunchError(f"{path} has no evaluation of a followed question as asked{known}")
    for question_id, visits in found.items():
        last = (prompts[question_id].splitlines() or [""])[-1]
        # a policy and the pages it read write what they like, lone surrogates among it
        lines = map(spelt_out, [f"{question_id}  {last}", *_block(visits, options.text)])
        print("\n".join(lines), end="\n\n")
    return 0


def _block(visits: list[Visit], with_text: bool) -> Iterator[str]:
    yield "  " + "".join(name.ljust(width) for name, width in WIDTHS.items()) + "searches"
    for visit in visits:
        cells = {
            "step": str(visit.step),
            "reward": "-" if visit.reward is None else f"{visit.reward:.2f}",
            "answer": visit.answer if visit.answer is not None else f"({visit.stop_reason})",
            "changed": ", ".join(visit.changed) or "-",
        }
        line = "".join(_cell(cells[name], width) for name, width in WIDTHS.items())
        yield f"  {line}{' | '.join(visit.searches)}".rstrip()
        if with_text and (visit.changed or visit is visits[0]):
            yield from (f"      {text}" for text in visit.text.splitlines())


def _cell(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return (flat if len(flat) < width else flat[: width - 2] + "…").ljust(width)
