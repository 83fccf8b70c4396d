"""One `obm study` at a time on a folder; a second one is told who is there."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.errors import LaunchError

NAME = ".lock"


@contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Hold a study's folder.

    The kernel lets go of the lock when its process ends, however it ends, so a killed study leaves
    nothing to clean up. The file stays; what is in it says who wrote it last.

    Args:
        folder: of the study; made where missing.
        command: told to whoever comes second.

    Raises:
        LaunchError: another process holds it; names process, machine, time and command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaunchError(
                f"{folder} is in use by {_holder(path)}; wait for it, or choose another --output"
            ) from error
        holder = {
            "process": os.getpid(),
            "machine": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": command,
        }
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return (
            f"process {holder['process']} on {holder['machine']} since {holder['since']} "
            f"({holder['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        # between its lock and its first write
        return "another `obm study`"
