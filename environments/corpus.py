"""Passages on disk: one JSON object a line, found by a table of offsets, both memory-mapped.

A corpus to be indexed is a .jsonl or .jsonl.gz file of `{"id", "title", "text"}`, or of
`{"id", "contents"}` whose first line is the title, as Search-R1's Wikipedia has it.
"""

from __future__ import annotations

import gzip
import json
import mmap
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
        if not path.is_file():
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
            EnvironmentSetupError: a line is no row; names the place.
        """
        with self.path.open("rb") as raw:
            self._raw = raw
            packed = self.path.suffix == ".gz"
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
            file.seek(position)
            for line in file:
                position += len(line)
                if line.strip():
                    yield self._row(line, position - len(line)), position

    def bytes_read(self) -> int:
        """How far the file on disk has been read, for a progress bar."""
        return self._raw.tell() if self._raw is not None and not self._raw.closed else self.size

    def _row(self, line: bytes, position: int) -> Row:
        try:
            return read_row(json.loads(line), self.needs_image)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = '"id", "title" and "image"' if self.needs_image else '"title" and "text"'
            raise EnvironmentSetupError(
                f"{self.path}: the line at byte {position} is no passage ({error!r}); "
                f'write one JSON object a line with {wanted}, or with "contents"'
            ) from error


def read_row(row: dict[str, Any], needs_image: bool = False) -> Row:
    """A row of either layout; without an `id` it gets "".

    Raises:
        KeyError: it has neither layout.
    """
    identity = str(row.get("id", row.get("_id", "")))
    if needs_image:
        return Row(identity, str(row["title"]), str(row.get("text", "")), str(row["image"]))
    if "contents" in row and "text" not in row:
        title, _, text = str(row["contents"]).partition("\n")
        return Row(identity, title, text)
    return Row(identity, str(row.get("title", "")), str(row["text"]))
