"""Trainings as child processes: how one is started, and how several run side by side.

Each is one `deepspeed launch/train.sh ...`, or a verb of `obm`, with its own port and log file.
Progress is read from the runs' `metrics.jsonl`, so what is shown is what was written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from launch.errors import JobFailedError, LaunchError
from train.leash import VARIABLE, name_myself
from train.settings import free_port
from train.status import is_line

POLL_S = 0.5
LOG_TAIL_LINES = 25


@dataclass
class Job:
    """One training.

    Attributes:
        name: for messages, e.g. `obm-s0`.
        arguments: of train.sh or of the verb: `--config`, `--resume`, `key=value`.
        output: the run folder.
        log: file that takes what the processes print.
        n_processes: ranks.
        verb: of `obm`, for work of one process that is no training by train.sh.
    """

    name: str
    arguments: list[str]
    output: Path
    log: Path
    n_processes: int = 1
    verb: str | None = None


@dataclass
class _Running:
    """A job under way."""

    job: Job
    process: subprocess.Popen[bytes]
    devices: tuple[int, ...]
    follower: Follower
    started: float = field(default_factory=time.monotonic)


def deepspeed_launcher() -> Path:
    """The `deepspeed` script that belongs to this Python.

    Raises:
        LaunchError: it is not installed.
    """
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if not found:
        raise LaunchError("the `deepspeed` launcher is not installed; pip install deepspeed")
    return Path(found)


def training_command(
    arguments: Sequence[str], *, n_processes: int = 1, devices: Sequence[int] = ()
) -> list[str]:
    """The command line of one training.

    Args:
        arguments: of train.sh.
        n_processes: ranks on this machine.
        devices: GPUs' indexes, one a rank, to keep parallel trainings apart; none takes the first
            of CUDA_VISIBLE_DEVICES, or lets DeepSpeed choose where that is not set.

    Raises:
        LaunchError: CUDA_VISIBLE_DEVICES has too few, or names that DeepSpeed does not know.
    """
    script = str(Path(str(resources.files("launch"))) / "train.sh")
    where = ["--num_gpus", str(n_processes)]
    if devices or _is_restricted():
        # DeepSpeed ignores the variable beside its own options and counts all of the machine
        names = physical_devices(devices or range(n_processes))
        if not all(name.isdecimal() for name in names):
            raise LaunchError(
                f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}: the DeepSpeed "
                "launcher takes numbers only; write them as `nvidia-smi -L` counts"
            )
        where = ["--include", f"localhost:{','.join(names)}"]
    return [
        str(deepspeed_launcher()), *where, "--master_port", str(free_port()), script, *arguments
    ]  # fmt: skip


def _is_restricted() -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves this process some of the machine's GPUs."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return False
    import torch

    return torch.cuda.device_count() > 0


def physical_devices(devices: Sequence[int]) -> list[str]:
    """The machine's own names of GPUs, as CUDA_VISIBLE_DEVICES gives them.

    Args:
        devices: indexes as this process counts its GPUs.

    Raises:
        LaunchError: the variable names fewer.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in text.split(",")] if text else []
    if names and max(devices) >= len(names):
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES={text}: names {len(names)} GPUs, one a process, and "
            f"{max(devices) + 1} are asked for; name more, or ask for fewer processes"
        )
    return [names[device] if names else str(device) for device in devices]


def training_environment(*, parallel: int = 1) -> dict[str, str]:
    """Environment variables of a training's processes.

    Args:
        parallel: processes at a time, of all trainings; they share the cores.
    """
    environment = dict(os.environ)
    environment["PYTHONSAFEPATH"] = "1"
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, parallel))
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    # The launcher starts `python` by this name; another one on the path would lack our packages.
    bin_folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([bin_folder, environment.get("PATH", "")])
    return environment


def run_jobs(
    jobs: Sequence[Job],
    *,
    parallel: int = 1,
    on_line: Callable[[Job, dict[str, Any]], None] | None = None,
    on_done: Callable[[Job, float], None] | None = None,
    on_failed: Callable[[Job, Exception], None] | None = None,
    devices: Sequence[tuple[int, ...]] = (),
) -> None:
    """Run trainings, at most `parallel` at a time. One that fails does not stop the others.

    Args:
        jobs: in the order to start.
        parallel: how many at once; on GPUs one a group of devices.
        on_line: called with every new line of a job's metrics.jsonl.
        on_done: called with a job that has ended well, and the seconds that it took.
        on_failed: called with a job that has failed, and what it would raise; without it the first
            failure is raised when all jobs have ended.
        devices: GPU indexes of each job that runs at a time; empty for the processor.

    Raises:
        LaunchError: a job ended with a user's mistake; the message is the job's own.
        JobFailedError: a job failed otherwise; says which, and shows the end of its log.
    """
    waiting, free = list(jobs), list(devices)
    running: list[_Running] = []
    failed: list[Exception] = []
    ranks = max((job.n_processes for job in jobs), default=1)
    environment = training_environment(parallel=min(parallel, len(jobs) or 1) * ranks)
    with terminate_as_interrupt(), _stopping(running):
        while waiting or running:
            while waiting and len(running) < parallel and (free or not devices):
                running.append(_start(waiting.pop(0), environment, free.pop(0) if devices else ()))
            for one in list(running):
                code = one.process.poll()
                # After poll: what a process wrote before it ended is read in the same round.
                for line in one.follower.new_lines():
                    if on_line:
                        on_line(one.job, line)
                if code is None:
                    continue
                running.remove(one)
                if one.devices:
                    free.append(one.devices)
                if code != 0:
                    failed.append(failure_of(one.job, code))
                    if on_failed:
                        on_failed(one.job, failed[-1])
                elif on_done:
                    on_done(one.job, time.monotonic() - one.started)
            if running:
                time.sleep(POLL_S)
    if failed and not on_failed:
        raise failed[0]


class Follower:
    """Reads the lines that a run appends to its metrics.jsonl.

    Args:
        path: the file; it need not exist yet.
        from_start: also what it holds now.
    """

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._offset = 0 if from_start else self._size()
        self.n_cuts = 0
        """times that the file became shorter and was read again from its start"""

    def new_lines(self) -> list[dict[str, Any]]:
        """Complete lines since the last call; what is no line of metrics is passed over.

        Whoever watches a run must not end by what a disk or another program did to its file.
        """
        with suppress(OSError):  # the run may replace the file at any time
            return self._read()
        return []

    def _read(self) -> list[dict[str, Any]]:
        if self._size() < self._offset:
            # Resuming cuts the file back to its checkpoint, overwriting starts it anew.
            self._offset = 0
            self.n_cuts += 1
        if self._size() == self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        rows = map(_parsed, complete.splitlines())
        return [row for row in rows if is_line(row)]

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.is_file() else 0


def _parsed(line: bytes) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _start(job: Job, environment: dict[str, str], devices: tuple[int, ...]) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    if job.verb:
        command = [sys.executable, "-m", "launch.cli", job.verb, *job.arguments]
        if devices:
            visible = ",".join(physical_devices(devices))
            environment = {**environment, "CUDA_VISIBLE_DEVICES": visible}
    else:
        command = training_command(job.arguments, n_processes=job.n_processes, devices=devices)
    follower = Follower(job.output / "metrics.jsonl")
    # Its own session would outlive us if we were killed; it ends by itself then.
    environment = {**environment, VARIABLE: name_myself()}
    with job.log.open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        # A session of its own, so that stopping it takes the ranks along.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
    return _Running(job, process, devices, follower)


@contextmanager
def _stopping(running: list[_Running]) -> Iterator[None]:
    """Whatever ends the loop early also ends what is still running."""
    try:
        yield
    finally:
        for one in running:
            _stop(one.process)


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, which by default ends Python at once, must not leave trainings behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def failure_of(job: Job, code: int) -> Exception:
    """What a failed job would raise: its own message for a user's mistake, else code and log.

    Of the latter the end of the log is shown. Only what the last attempt wrote is looked at.
    """
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    lines = lines[begins[-1] :] if begins else lines
    mistakes = [line for line in lines if line.startswith("error: ")]
    if mistakes:
        return LaunchError(f"{job.name}: {mistakes[-1].removeprefix('error: ')}")
    for line in lines[-LOG_TAIL_LINES:]:
        print(f"  | {line}", file=sys.stderr)
    return JobFailedError(f"{job.name} ended with code {code}; its log is {job.log}")
