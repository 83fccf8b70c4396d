"""A command's time and memory, and a raw copy to compare them with.

A script that needs the standard library alone, because of how memory is counted: a child starts as
a copy of its parent, and the system counts that copy into the child's peak. Started by the bench,

    python -I -S launch/bench_process.py measure LOG COMMAND ...
    python -I -S launch/bench_process.py copy [--sync] OUTPUT VLM BASE AGENT

it is a parent of 10 MB, and the figures are the command's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

SAMPLE_S = 0.05
BLOCK_BYTES = 4 * 1024 * 1024


def main(arguments: list[str]) -> int:
    """Runs one of the two; `measure` prints JSON on one line."""
    verb, *rest = arguments
    if verb == "measure":
        print(json.dumps(measure(Path(rest[0]), rest[1:])))
    else:
        is_synced = rest[0] == "--sync"
        copy(*map(Path, rest[is_synced:]), is_synced=is_synced)
    return 0


def measure(log: Path, command: list[str]) -> dict[str, float]:
    """Runs a command, start-up included.

    Args:
        log: Gets what the command prints.
        command: Program and arguments.

    Returns:
        code: exit code. wall_s, cpu_s (user and system, all threads and children), peak_rss_gb
        (what the system counts, mapped files included), peak_anon_gb (memory that no file backs,
        sampled every 50 ms; 0 where the system does not say).
    """
    peak_anon, is_over = 0, threading.Event()
    with log.open("wb") as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=output)

        def watch() -> None:
            nonlocal peak_anon
            while not is_over.wait(SAMPLE_S):
                peak_anon = max(peak_anon, anonymous_bytes(child.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - start
    is_over.set()
    watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    return {
        "code": child.returncode,
        "wall_s": round(wall_s, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 4),
        "peak_anon_gb": round(peak_anon / 1e9, 4),
    }


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs, or 0."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def copy(output: Path, vlm: Path, *others: Path, is_synced: bool) -> None:
    """Reads every shard of all folders and writes the first one's: the least a merge can do."""
    output.mkdir(parents=True)
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for folder in (vlm, *others):
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as source:
                if folder != vlm:
                    while source.readinto(buffer):
                        pass
                    continue
                with (output / path.name).open("wb", buffering=0) as target:
                    while n := source.readinto(buffer):
                        target.write(buffer[:n])
                    if is_synced:
                        os.fsync(target.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
