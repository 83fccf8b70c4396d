"""The drill's table: docs/results/reliability.md, and the same as json."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.drill_process import Row

TITLES = {
    "kills": "Killed at random moments",
    "disk": "A full disk",
    "network": "A search server behind a bad network",
    "files": "Truncated, flipped and hostile files",
    "rivals": "Two commands on one output",
}
"""Part -> heading, in the order in which they run."""


def make_record(
    rows: Sequence[Row], *, command: str, seed: int, seconds: float, notes: dict[str, str]
) -> dict[str, Any]:
    """What the json holds.

    Args:
        rows: of all parts.
        command: that ran them.
        seed: of the moments and the damage.
        seconds: of the whole drill.
        notes: part -> how it was done on this machine.
    """
    from compare.provenance import hardware
    from train.machine import code_commit

    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": command,
        "commit": code_commit(),
        "seed": seed,
        "hardware": hardware(),
        "seconds": round(seconds, 1),
        "processor_s": round(spent.ru_utime + spent.ru_stime, 1),
        "notes": notes,
        "rows": [{**asdict(row), "seconds": round(row.seconds, 1)} for row in rows],
        "problems": sum(len(row.problems) for row in rows),
    }


def render(record: dict[str, Any]) -> str:
    """docs/results/reliability.md."""
    n, n_bad = len(record["rows"]), sum(bool(row["problems"]) for row in record["rows"])
    verdict = "no problem in any" if not n_bad else f"PROBLEMS in {n_bad}, listed below"
    lines = [
        "# Reliability: the drill",
        "",
        f"`{record['command']}` runs it again (`launch/drill.py`); `make drill` runs all of it.",
        f"Commit {record['commit']}, seed {record['seed']}, {record['hardware']}; "
        f"{record['seconds']:.0f} s on the clock, {record['processor_s']:.0f} s of processor time.",
        "",
        f"{n} disturbances, {verdict}. What is promised: [reliability.md](../reliability.md).",
        "",
    ]
    for part, title in TITLES.items():
        rows = [row for row in record["rows"] if row["part"] == part]
        if not rows:
            continue
        lines += [f"## {title}", ""]
        if record["notes"].get(part):
            lines += [record["notes"][part], ""]
        lines += ["| what | disturbed by | times | what happened | s |",
                  "| --- | --- | ---: | --- | ---: |"]  # fmt: skip
        lines += [
            f"| {_cell(row['what'])} | {_cell(row['how'])} | {row['n']} "
            f"| {_cell(row['happened'])} | {row['seconds']:.0f} |"
            for row in rows
        ]
        lines.append("")
    problems = [(row["what"], line) for row in record["rows"] for line in row["problems"]]
    if problems:
        lines += ["## Problems", ""]
        lines += [f"* {_cell(what)}: {_cell(line)}" for what, line in problems]
        lines.append("")
    return "\n".join(lines)


def write_report(record: dict[str, Any], folder: Path) -> None:
    """Writes reliability.json and reliability.md."""
    from train.files import write_json, write_text

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "reliability.json", record)
    write_text(folder / "reliability.md", render(record))


def _cell(text: str) -> str:
    """Text for a cell of a table: what a command printed is data."""
    for letter, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "'")):
        text = text.replace(letter, safe)
    return " ".join(text.split())
