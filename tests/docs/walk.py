"""A newcomer's path from a clean clone, timed: writes its table into docs/quickstart.md.

    make walk                      (or: python tests/docs/walk.py docs/quickstart.md)
    python tests/docs/walk.py --plan docs/quickstart.md        the commands alone, nothing is run

Clones the committed state of this checkout into an empty folder and does there what the page says,
with an environment of its own. Needs no package but Python's own, some 3 GB of disk for a while,
and a quarter of an hour on two quiet cores.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.docs.blocks import blocks  # noqa: E402

BEGIN, END = "<!-- walk: make walk -->", "<!-- end of walk -->"
RECIPES = "docs/recipes.md"


@dataclass(frozen=True)
class Step:
    """What is done in one go; `files` are blocks of docs/recipes.md that the reader copies."""

    title: str
    commands: tuple[str, ...]
    files: tuple[str, ...] = ()


STEPS = (
    Step("clone", ("git clone URL obm-warmstart", "cd obm-warmstart")),
    Step("install", ("make install", "source .venv/bin/activate", "obm doctor")),
    Step("demo", ("make demo",)),
    Step(
        "your settings",
        ("obm init demo --output my.yaml", "obm train --config my.yaml --dry-run"),
    ),
    Step(
        "your ten rows with pictures",
        (
            "python make_rows.py",
            "obm eval runs/demo/merged/obm --config my_rows.yaml --dry-run",
            "obm eval runs/demo/merged/obm --config my_rows.yaml --output runs/eval/rows",
        ),
        ("make_rows.py", "my_rows.yaml"),
    ),
    Step(
        "your reward",
        (
            "obm train --config my_reward.yaml models.init=runs/demo/merged/obm grpo.max_steps=2",
            "obm follow runs/reward",
        ),
        ("my_rewards.py", "my_reward.yaml"),
    ),
    Step(
        "your models and retriever, two processes, killed and gone on with",
        (
            "python make_models.py",
            "python my_server.py 8003 &",
            "obm calibrate --config all.yaml",
            "obm merge --config all.yaml --output runs/all-merged",
            "timeout --signal=KILL 20 obm train --config all.yaml --num-processes 2",
            "obm train --config all.yaml --num-processes 2 --resume",
            "obm compare runs/all --output runs/all-report",
            "obm view runs/all --output runs/all-view.html",
        ),
        ("make_models.py", "my_server.py", "all.yaml"),
    ),
)
KILLED = "timeout --signal=KILL "
"""Beginning of a command that may end so: its group is killed, `timeout` itself with it."""


@dataclass(frozen=True)
class Timed:
    """Seconds of a step: on the clock, and of all its processes' work."""

    step: Step
    wall_s: float
    cpu_s: float


def walk(folder: Path) -> list[Timed]:
    """Does every step in an empty folder.

    Raises:
        SystemExit: a command failed.
    """
    texts = {block.file_name: block.text for block in blocks(RECIPES)}
    checkout = folder / "obm-warmstart"
    timed = []
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for step in STEPS:
            before, start = _cpu_s(), time.monotonic()
            for name in step.files:
                (checkout / name).write_text(texts[name], encoding="utf-8")
            for command in step.commands:
                if command.startswith(("cd ", "source ")):
                    continue  # `_run` is in that folder, with that environment, already
                command = command.replace("URL", str(ROOT))
                print(f"$ {command}", flush=True)
                servers += _run(command, checkout if checkout.exists() else folder)
            timed.append(Timed(step, time.monotonic() - start, _cpu_s() - before))
            print(f"  {step.title}: {timed[-1].wall_s:.1f} s", flush=True)
    finally:
        for server in servers:
            server.kill()
            server.wait()
    return timed


def _run(command: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Runs a command to its end; one that ends in `&` is started, and returned."""
    variables = {
        name: value for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "OMP_NUM_THREADS")
    }  # fmt: skip
    variables["PATH"] = f"{folder / '.venv/bin'}{os.pathsep}{variables['PATH']}"
    variables["WANDB_MODE"] = "disabled"
    background = command.endswith("&")
    words = ["bash", "-c", f"exec {command.removesuffix('&')}" if background else command]
    process = subprocess.Popen(words, cwd=folder, env=variables)
    if background:
        return [process]
    code = process.wait()
    if code != 0 and not (command.startswith(KILLED) and code == -signal.SIGKILL):
        raise SystemExit(f"error: '{command}' ended with code {code}")
    return []


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(timed: list[Timed], load: float, date: str) -> str:
    """Markdown: each step's commands and times, and how busy the machine was."""
    lines = ["| step | commands | seconds | CPU seconds |", "| --- | --- | ---: | ---: |"]
    for one in timed:
        commands = "<br>".join(f"`{command}`" for command in one.step.commands)
        files = ", ".join(f"`{name}`" for name in one.step.files)
        copied = f"<br>with {files} from [recipes.md](recipes.md)" if files else ""
        lines.append(
            f"| {one.step.title} | {commands}{copied} | {one.wall_s:.0f} | {one.cpu_s:.0f} |"
        )
    wall, cpu = sum(one.wall_s for one in timed), sum(one.cpu_s for one in timed)
    lines.append(f"| in all | | {wall:.0f} | {cpu:.0f} |")
    cores = len(os.sched_getaffinity(0))
    lines += ["", f"Measured on {date} with Python {platform.python_version()} on {cores} cores."]
    if load > cores:
        lines[-1] += (
            f" Other work ran meanwhile (load {load:.0f} on {cores} cores), so the seconds on the "
            "clock are too many; those of CPU are what a quiet machine has to do, on one core."
        )
    return "\n".join(lines)


def plan(page: str) -> str:
    """The table of a path that has changed since it was measured: times where a step has not.

    Args:
        page: text that holds the table as it was measured.
    """
    old = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    measured = {line.rsplit(" | ", 2)[0]: line for line in old if line.startswith("| ")}
    empty = table([Timed(step, 0.0, 0.0) for step in STEPS], load=0.0, date="")
    lines = []
    for line in empty.splitlines()[:-1]:
        known = "" if line.startswith("| in all") else measured.get(line.rsplit(" | ", 2)[0], "")
        lines.append(known or line.replace("| 0 | 0 |", "| - | - |"))
    notes = [line for line in old if line.startswith("Measured on ")]
    return "\n".join([*lines, *notes, "Steps without a number are new: `make walk` measures them."])


def write_table(page: Path, text: str) -> None:
    """Puts the table between its marks, whole or not at all."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{page}: '{BEGIN}' and '{END}' have to stand in it"
    temporary = page.with_name(f".{page.name}.tmp")
    temporary.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    temporary.replace(page)


def commands_of(page: str) -> list[str]:
    """Commands that the table of the page shows, in order."""
    between = page.partition(BEGIN)[2].partition(END)[0]
    cells = [row.split(" | ")[1] for row in between.splitlines() if row.startswith("| ")]
    shown = [command for cell in cells for command in re.findall(r"`([^`]+)`", cell)]
    return [command for command in shown if not re.fullmatch(r"[\w.-]+\.(py|yaml)", command)]


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--plan"]
    page = Path(arguments[0]) if arguments else None
    if "--plan" in sys.argv and page is not None:
        write_table(page, plan(page.read_text(encoding="utf-8")))
        return 0
    with tempfile.TemporaryDirectory(prefix="obm-walk-") as folder:
        timed = walk(Path(folder))
    text = table(timed, os.getloadavg()[2], time.strftime("%Y-%m-%d"))
    print(text)
    if page is not None:
        write_table(page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
