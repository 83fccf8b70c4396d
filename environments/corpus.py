"""Passages on disk: one JSON object a line, found by a table of offsets, both memory-mapped.

A corpus to be indexed is a .jsonl or .jsonl.gz file of `{"id", "title", "text"}`, or of
`{"id", "contents"}` whose first line is the title, as Search-R1's Wikipedia has it.
"""

from __future__ import annotations

import gzip
import json
import math
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from environments.errors import EnvironmentSetupError

ROWS_FILE = "corpus.jsonl"
OFFSETS_FILE = "corpus.offsets.npy"


@dataclass(frozen=True)
class Row:
    """One entry of a corpus; `image` is a picture's path or, in an index, its thumbnail."""

    id: str
    title: str
    text: str = ""
    image: str | None = None

    def line(self) -> bytes:
        """The row as it is stored."""
        row = {"id": self.id, "title": self.title, "text": self.text}
        if self.image is not None:
            row["image"] = self.image
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"


class Corpus:
    """The rows of an index by number; nothing is read before it is asked for.

    Args:
        folder: an index that `environments.indexing` has built.
    """

    def __init__(self, folder: Path):
        self._offsets = np.load(folder / OFFSETS_FILE, mmap_mode="r")
        with (folder / ROWS_FILE).open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Row:
        start, end = self._offsets[number], self._offsets[number + 1]
        return Row(**json.loads(self._bytes[start:end]))


class JsonLines:
    """A corpus file, read from any position on.

    Args:
        path: .jsonl or .jsonl.gz.
        needs_image: rows must name a picture.
    """

    def __init__(self, path: Path, needs_image: bool = False):
        if not os.path.isfile(path):  # a name that is too long is none
            raise EnvironmentSetupError(f"{path}: no such file; name a .jsonl or .jsonl.gz")
        self.path = path
        self.needs_image = needs_image
        self._raw: IO[bytes] | None = None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        """What tells this file from a changed one."""
        status = self.path.stat()
        return {"path": str(self.path), "bytes": status.st_size, "changed": status.st_mtime_ns}

    def read(self, position: int = 0) -> Iterator[tuple[Row, int]]:
        """Rows, each with the position after it (in unpacked bytes).

        Raises:
            EnvironmentSetupError: a line is no row, or the file cannot be read; names the place.
        """
        packed = self.path.suffix == ".gz"
        try:
            with self.path.open("rb") as raw:
                self._raw = raw
                file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
                file.seek(position)
                for line in file:
                    position += len(line)
                    if line.strip():
                        yield self._row(line, position - len(line)), position
        except (OSError, EOFError, zlib.error) as error:
            kind = "gzip file, packed again" if packed else "file that can be read"
            raise EnvironmentSetupError(
                f"{self.path}: cannot be read beyond byte {position} ({error}); name a whole {kind}"
            ) from error

    def bytes_read(self) -> int:
        """How far the file on disk has been read, for a progress bar."""
        return self._raw.tell() if self._raw is not None and not self._raw.closed else self.size

    def _row(self, line: bytes, position: int) -> Row:
        try:
            return read_row(json.loads(line), self.needs_image)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # not its repr: that of a decoding error holds the whole line
            reason = f"{type(error).__name__}: {error}"
            wanted = '"id", "title" and "image"' if self.needs_image else '"title" and "text"'
            raise EnvironmentSetupError(
                f"{self.path}: the line at byte {position} is no passage ({reason}); "
                f'write one JSON object a line with {wanted}, or with "contents"'
            ) from error


def read_row(row: dict[str, Any], needs_image: bool = False) -> Row:
    """A row of either layout; without an `id` it gets "".

    Raises:
        TypeError: it is no object.
        KeyError: it has neither layout.
        ValueError: a field is no text, or one that cannot be stored.
    """
    if not isinstance(row, dict):
        raise TypeError("it is no object")
    identity = _text(row, "id" if "id" in row else "_id", "")
    if needs_image:
        read = Row(identity, _text(row, "title"), _text(row, "text", ""), _text(row, "image"))
        if "\0" in cast(str, read.image):
            raise ValueError('"image" has a NUL, which no path has')
    elif "contents" in row and "text" not in row:
        title, _, text = _text(row, "contents").partition("\n")
        read = Row(identity, title, text)
    else:
        read = Row(identity, _text(row, "title", ""), _text(row, "text"))
    for field in (read.id, read.title, read.text, read.image or ""):
        field.encode()  # half a surrogate pair, which JSON can write, is a UnicodeEncodeError
    return read


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    """A field as text; a number is taken as it is written, anything else is a mistake."""
    value = row[key] if default is None else row.get(key, default)
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if not isinstance(value, str) and (isinstance(value, bool) or not is_number):
        raise ValueError(f'"{key}" is {json.dumps(value)[:80]}, and has to be text')
    return str(value)
