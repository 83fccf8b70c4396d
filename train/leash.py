"""A training ends with the command that started it, also where that one was killed.

A study starts its trainings in sessions of their own, so that stopping one takes its processes
along; SIGKILL to the study would leave them running, and the same study, started again, would find
their folders in use. The name of the starter goes through an environment variable, since a launcher
stands between the two.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

VARIABLE = "OBM_STARTED_BY"
POLL_S = 1.0
EXIT_CODE = 143
"""that of a process that SIGTERM has ended"""


def name_myself() -> str:
    """This process' number and time of birth: numbers are given out again."""
    return f"{os.getpid()}:{_birth(os.getpid())}"


def is_alive(name: str) -> bool:
    """Whether the process that called itself so still runs."""
    pid, _, born = name.partition(":")
    return _birth(int(pid)) == born


def _birth(pid: int) -> str | None:
    """When a process began; None of one that has gone, or is a zombie.

    In ticks since the system started, where it counts them: psutil adds the clock's time of that
    start, which moves whenever the clock is set.
    """
    if Path("/proc/self/stat").is_file():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        # fields 3 and following: the name before them may hold anything
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        process = psutil.Process(pid)
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return None if is_zombie else str(process.create_time())
    except psutil.NoSuchProcess:
        return None


def end_with_starter(exit_process: Callable[[int], object] = os._exit) -> threading.Thread | None:
    """Watches the process that `OBM_STARTED_BY` names, and ends this one when it has gone.

    Args:
        exit_process: ends this process at once, whatever its other threads do.

    Returns:
        The thread that watches; None where no starter is named.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None

    def watch() -> None:
        while is_alive(name):
            time.sleep(POLL_S)
        print(
            "error: the command that started this training has ended; run it again to go on",
            file=sys.stderr,
            flush=True,
        )
        exit_process(EXIT_CODE)

    thread = threading.Thread(target=watch, name="leash", daemon=True)
    thread.start()
    return thread
