"""What a merge has finished, line by line, so that a broken one goes on where it stopped.

The journal lies in the unfinished folder. Its first line says what is being made: a digest of the
recipe, of the inputs' headers, sizes and times, and of the output's layout. Each further line is
one finished tensor: its checksum, what was counted, and the checksums of its inputs. A line counts
only if the bytes in the file still have its checksum, so it may have been written before they
reached the disk.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge.errors import MergeError
from merge.lock import open_locked
from merge.shards import cannot_write

JOURNAL_NAME = ".journal.jsonl"


def hold_folder(folder: Path) -> int:
    """Makes an unfinished folder, and holds it against other processes by a lock file beside it.

    Args:
        folder: `.NAME.part` beside the output; the lock file is `.NAME.lock`.

    Returns:
        A descriptor, for `let_go`.

    Raises:
        MergeError: Another process is writing this output, or the folder cannot be made.
    """
    try:
        descriptor = open_locked(_lock_path(folder), "merge")
    except BlockingIOError as error:
        raise MergeError(
            f"{folder.parent / folder.name.strip('.').removesuffix('.part')}: another merge is "
            "writing it; wait for it, or choose another output"
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        let_go(folder, descriptor)
        raise cannot_write(folder, error) from error
    return descriptor


def let_go(folder: Path, descriptor: int) -> None:
    """Lets go of a folder that `hold_folder` holds, wherever it lies now."""
    # while it is held: whoever has opened it meanwhile will see that it is no longer there
    with suppress(OSError):
        _lock_path(folder).unlink()
    os.close(descriptor)


def _lock_path(folder: Path) -> Path:
    return folder.with_suffix(".lock")


class Journal:
    """The journal of one unfinished folder, held against other processes.

    Args:
        folder: The unfinished folder; made when it is not there, emptied when it holds something
            else than this merge.
        digest: Says what is being made.

    Raises:
        MergeError: Another process is writing this output, or the folder cannot be written.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.finished: dict[str, dict[str, Any]] = {}
        self._lock = hold_folder(folder)
        self._file = -1
        try:
            path = folder / JOURNAL_NAME
            entries, n_bytes = _read(path)
            if not entries or entries[0].get("digest") != digest:
                empty_folder(folder)
                entries, n_bytes = [{"digest": digest}], 0
            # What is there stays as it is: whenever the next kill comes, nothing is lost.
            self.finished = {entry["tensor"]: entry for entry in entries[1:]}
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, n_bytes)
            if n_bytes == 0:
                self._write(entries[0])
        except OSError as error:
            self.abandon()
            raise cannot_write(folder, error) from error

    def add(self, tensor: str, entry: Mapping[str, Any]) -> None:
        """Notes that a tensor is in its place."""
        try:
            self._write({"tensor": tensor, **entry})
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def remove(self, output: Path) -> None:
        """Deletes the journal of a folder that is complete and in its place; it stays held."""
        with suppress(OSError):  # one that stays does no harm there
            (output / JOURNAL_NAME).unlink()

    def abandon(self) -> None:
        """Removes the unfinished folder and lets go of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        if self._file >= 0:
            os.close(self._file)
        if self._lock >= 0:
            let_go(self.folder, self._lock)
        self._file = self._lock = -1

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = memoryview((json.dumps(entry) + "\n").encode())
        while line:
            line = line[os.write(self._file, line) :]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the lines that are whole, and their length in bytes; a kill may have torn the last."""
    entries: list[dict[str, Any]] = []
    n_bytes = 0
    if not path.exists():
        return entries, n_bytes
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        entries.append(entry)
        n_bytes += len(line)
    return entries, n_bytes


def empty_folder(folder: Path) -> None:
    """Removes all that a folder holds; the folder stays, and stays held."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
