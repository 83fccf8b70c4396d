"""The merge beside mergekit and beside a raw copy of the same bytes, in one run.

    make bench-merge ARGS="--sizes 0.5b,1.5b,7b"

Each measurement is the real command in a process of its own, start-up included, and each comparison
is on the same files in the same minutes: ours and the copy in turn, three times, and each time
another begins; mergekit once. Before each, what earlier ones wrote is on the disk and deleted, and
the inputs are read once (warm) or dropped from the page cache (cold). The first copy of each size
is discarded. What numba compiles at the first run of all is measured apart, on the tiny trio.
`bench_files` has the files, `bench_peer` mergekit, `bench_report` the targets.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.bench_files import DONORS, ROLES, SIZES, make_trio
from launch.bench_peer import (
    PEER_ENVIRONMENT,
    make_peer_environment,
    peer_command,
    peer_config,
    peer_versions,
)
from launch.errors import JobFailedError, LaunchError

SCRIPT = Path(__file__).with_name("bench_process.py")
EXTRA_SIZES = ("tiny", "0.5b")
"""Where ours without numba and mergekit on one thread are measured, too, once."""
DENSITY = 0.2
TA_WEIGHT = 0.5
PROBE_BYTES = 4096
SPARE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Run:
    """One thing that is measured."""

    size: str
    tool: str
    """ours, ours numpy, mergekit or copy."""
    method: str
    """A merge method; for copy `plain`, or `fsync` (as ours, waits until the disk has it)."""
    threads: int = 1
    """0 = the tool's default."""
    cache: str = "warm"
    """Of the inputs: warm, cold, or sparse (holes have nothing to keep in memory)."""

    @property
    def name(self) -> str:
        """Words that tell it from others of its size."""
        words = [self.tool, self.method]
        if self.tool != "copy" and self.threads:
            words.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return " ".join([*words, *(["cold"] if self.cache == "cold" else [])])


@dataclass
class Bench:
    """Where the bench works, and what it has measured."""

    folder: Path
    """Gets the trios, outputs, logs and numba's cache."""
    runs: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, run: Run, repeat: int = 0) -> dict[str, Any]:
        """Runs one command from a clean start and adds what it took to `runs`.

        Raises:
            JobFailedError: The command failed; names its log.
        """
        trio, output = self.folder / run.size, self.folder / "output"
        command = self._command(run, trio, output)
        remove(output)
        os.sync()
        if run.cache != "sparse":
            prepare_cache(trio, is_cold=run.cache == "cold")
        log = self.folder / "logs" / f"{run.size}-{run.name.replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        load = round(os.getloadavg()[0], 1)
        measured = measure_process(command, log, self._environment(run))
        if measured.pop("code"):
            raise JobFailedError(f"{run.size} {run.name} failed; {log} says why")
        record = {
            "size": run.size, "run": run.name, "tool": run.tool, "method": run.method,
            "threads": run.threads, "cache": run.cache, "repeat": repeat, "load": load, **measured,
        }  # fmt: skip
        self.runs.append(record)
        print(
            f"{run.size.ljust(5)} {run.name.ljust(36)} {record['wall_s']:8.2f} s wall "
            f"{record['cpu_s']:8.2f} s CPU {record['peak_rss_gb']:6.3f} GB",
            flush=True,
        )
        remove(output)
        return record

    def _command(self, run: Run, trio: Path, output: Path) -> list[str]:
        if run.tool == "copy":
            options = ["--sync"] if run.method == "fsync" else []
            folders = [output, *(trio / role for role in ("vlm", "base", "agent"))]
            return [sys.executable, "-I", "-S", str(SCRIPT), "copy", *options, *map(str, folders)]
        config = self.folder / "configs" / f"{run.size}-{run.name.replace(' ', '-')}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        if run.tool == "mergekit":
            settings = peer_config(run.method, trio, DONORS, recipe(run.method))
            config.write_text(yaml.safe_dump(settings), encoding="utf-8")
            return peer_command(PEER_ENVIRONMENT, config, output, run.threads)
        config.write_text(yaml.safe_dump(our_config(run, trio, self.folder)), encoding="utf-8")
        verb = [sys.executable, "-m", "launch.cli", "merge"]
        return [*verb, "--config", str(config), "--output", str(output)]

    def _environment(self, run: Run) -> dict[str, str]:
        # The limits that `make` sets for tests would bind one tool and not the other.
        environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
        environment |= {"HF_HUB_OFFLINE": "1", "NUMBA_CACHE_DIR": str(self.folder / "numba")}
        environment["OBM_KERNELS"] = "numpy" if run.tool == "ours numpy" else "numba"
        return environment


def recipe(method: str) -> dict[str, float]:
    """Weight of each donor, and density: with these, both tools make the same merge."""
    if method == "task_arithmetic":
        return {"weight": TA_WEIGHT}
    return {"weight": 1.0, "density": DENSITY}


def our_config(run: Run, trio: Path, folder: Path) -> dict[str, Any]:
    """Settings for `obm merge`: all weights are merged; OBM leaves to TIES what is not linear."""
    elsewhere = "ties" if run.method == "obm" else run.method
    return {
        "output": str(folder / "run"),
        "models": {role: str(trio / role) for role in ROLES},
        "calibration": {"output": str(trio / "stats")},
        "merge": {
            "method": run.method,
            "density": DENSITY,
            "weights": dict.fromkeys(DONORS, recipe(run.method)["weight"]),
            "scope": {"linear": "method", "norm_bias": elsewhere, "embedding": elsewhere},
            "threads": run.threads,
        },
    }


def measure_process(command: list[str], log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What `bench_process.measure` finds of a command, run under a small parent."""
    answer = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "measure", str(log), *command],
        env=environment, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return dict(json.loads(answer.stdout))


def prepare_cache(trio: Path, *, is_cold: bool) -> None:
    """Brings all shards of a trio into the page cache, or drops them from it."""
    buffer = bytearray(4 * 1024 * 1024)
    for path in sorted(trio.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            if is_cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.readinto(buffer):
                pass


def can_be_cold(trio: Path) -> bool:
    """Whether dropping files from the page cache works on this file system."""
    if not hasattr(os, "posix_fadvise"):
        return False
    prepare_cache(trio, is_cold=True)
    largest = max(trio.glob("*/*.safetensors"), key=lambda path: path.stat().st_size)
    with largest.open("rb", buffering=0) as file:
        try:
            os.preadv(file.fileno(), [bytearray(PROBE_BYTES)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def remove(folder: Path) -> None:
    """Deletes an output and what a merge that failed left beside it."""
    for path in (folder, folder.with_name(f".{folder.name}.part")):
        shutil.rmtree(path, ignore_errors=True)


def plan_rounds(
    size: str, *, peer: bool, cold: bool, repeats: int, peer_repeats: int
) -> Iterator[tuple[int, Run]]:
    """Yields (repeat, run): all tools in turn, so that a busy minute hits none of them alone.

    Each repeat begins elsewhere, since what is first also pays for what was done before.
    """
    if SIZES[size].is_sparse:
        yield from ((0, Run(size, "ours", method, 2, "sparse")) for method in ("obm", "ties"))
        return
    runs = [
        Run(size, "copy", "plain"),
        Run(size, "copy", "fsync"),
        *(
            Run(size, "ours", method, threads)
            for method in ("task_arithmetic", "ties", "obm")
            for threads in (1, 2)
        ),
    ]
    if cold:
        runs += [
            Run(size, "copy", "plain", cache="cold"),
            *(Run(size, "ours", method, 2, cache="cold") for method in ("ties", "obm")),
        ]
    for repeat in range(max(repeats, peer_repeats if peer else 0)):
        if repeat < repeats:
            first = repeat * len(runs) // repeats
            yield from ((repeat, run) for run in [*runs[first:], *runs[:first]])
        if peer and repeat < peer_repeats:
            yield repeat, Run(size, "mergekit", "task_arithmetic", 0)
            yield repeat, Run(size, "mergekit", "ties", 0)
    if size in EXTRA_SIZES:
        yield from ((0, Run(size, "ours numpy", method, 2)) for method in ("ties", "obm"))
        if peer:
            yield 0, Run(size, "mergekit", "ties", 1)


def bench_merge(
    sizes: Sequence[str],
    folder: Path,
    *,
    peer: bool = True,
    repeats: int = 3,
    peer_repeats: int = 1,
    keep: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Makes the files, measures, and removes the files.

    Args:
        sizes: Names in `SIZES`.
        folder: Gets everything that the bench writes; nothing else may be in it.
        peer: Whether mergekit is measured, too.
        repeats: How often ours and the copy are measured.
        peer_repeats: How often mergekit is.
        keep: Leave the trios for another run.

    Returns:
        Every measurement, and the first runs (with what numba compiles) beside the second ones.

    Raises:
        LaunchError: Not enough space.
        JobFailedError: A command failed.
    """
    check_space(sizes, folder, keep=keep)
    if peer:
        make_peer_environment(PEER_ENVIRONMENT)
    bench = Bench(folder.absolute())
    is_done = False
    try:
        compiled = measure_compilation(bench)
        for size in sizes:
            trio = bench.folder / size
            print(f"{size}: making the files", flush=True)
            make_trio(trio, SIZES[size])
            os.sync()
            cold = not SIZES[size].is_sparse and can_be_cold(trio)
            if not SIZES[size].is_sparse:
                bench.measure(Run(size, "copy", "plain"))
                bench.runs.pop()
            for repeat, run in plan_rounds(
                size, peer=peer, cold=cold, repeats=repeats, peer_repeats=peer_repeats
            ):
                bench.measure(run, repeat)
            if not keep:
                remove(trio)
        is_done = True
    finally:
        # After a failure the logs and settings stay, and the trios only if they were to be kept.
        for name in ["output", "numba", "run", *([] if keep else ["tiny", *sizes])]:
            remove(bench.folder / name)
        if is_done and not keep:
            remove(bench.folder)
    return bench.runs, compiled


def versions(peer: bool) -> dict[str, str]:
    """Versions of what was measured."""
    found = {name: importlib.metadata.version(name) for name in ("numba", "numpy")}
    if peer:
        found |= peer_versions(PEER_ENVIRONMENT)
    return {"python": platform.python_version(), **found}


def measure_compilation(bench: Bench) -> list[dict[str, Any]]:
    """First and second run of each method on the tiny trio, from an empty numba cache."""
    shutil.rmtree(bench.folder / "numba", ignore_errors=True)
    make_trio(bench.folder / "tiny", SIZES["tiny"])
    compiled = []
    for method in ("ties", "obm", "task_arithmetic"):
        run = Run("tiny", "ours", method, 2)
        first, second = bench.measure(run), bench.measure(run)
        compiled.append(
            {"method": method, "first_cpu_s": first["cpu_s"], "first_wall_s": first["wall_s"],
             "second_cpu_s": second["cpu_s"], "second_wall_s": second["wall_s"]}
        )  # fmt: skip
    bench.runs.clear()
    return compiled


def bytes_needed(sizes: Sequence[str], *, keep: bool) -> int:
    """Disk space that the trios and one output at a time take."""
    trios = [3 * SIZES[size].n_written for size in sizes]
    output = max(SIZES[size].n_bytes for size in sizes)
    return (sum(trios) if keep else max(trios)) + output + SPARE_BYTES


def check_space(sizes: Sequence[str], folder: Path, *, keep: bool) -> None:
    """Refuses to start what would fill the disk.

    Raises:
        LaunchError: Says what is needed and what is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = bytes_needed(sizes, keep=keep), shutil.disk_usage(folder).free
    if needed > free:
        raise LaunchError(
            f"the bench needs {needed / 1e9:.0f} GB in {folder}, {free / 1e9:.0f} GB are free; "
            "pass another --work DIR or fewer --sizes"
        )
