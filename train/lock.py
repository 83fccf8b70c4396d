"""One process at a time on an output: a lock file that says who has it.

The kernel lets go of a lock when its process ends, however it ends, so a kill leaves nothing to
clean up: the file that it leaves is taken over.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import ConfigError
from merge.lock import lock, open_locked

LOCK_NAME = ".lock"


@contextmanager
def locked(output: Path, name: str = LOCK_NAME, *, setting: str = "--output") -> Iterator[None]:
    """Hold an output folder.

    Args:
        output: the folder; made where missing, and removed again if it stays empty.
        name: of the lock file in it; parts that may be written side by side have one each.
        setting: how a user names another folder, for the message.

    Raises:
        ConfigError: another process holds it (names process, machine, time and command), or it
            cannot be written.
    """
    path = output / name
    try:
        descriptor = open_locked(path, "process")
    except BlockingIOError as error:
        raise ConfigError(
            f"{output} is in use by {_holder(path)}; wait for it, or choose another {setting}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another {setting}"
        ) from error
    try:
        _sign(descriptor)
        yield
    finally:
        # while it is held: whoever waits for this file will see that it is another one now
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        with suppress(OSError):
            output.rmdir()  # only where nothing was written


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold a lock file for a moment, after whoever has it now; the file stays.

    Args:
        path: the file, in a folder that is there.
    """
    with path.open("w") as file:
        lock(file.fileno(), path, fcntl.LOCK_EX, "process")
        yield


def _sign(descriptor: int) -> None:
    holder = {
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError:
        return  # a full disk: what is written next says so by its name


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return (
            f"process {holder['process']} on {holder['machine']} since {holder['since']} "
            f"({holder['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # between its lock and its first write
