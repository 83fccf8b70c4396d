"""Files that are there whole or not at all: a temporary name first, then a rename."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.disk import writing


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all.

    Args:
        path: the file; replaced if it is there. Its folder must exist.
        text: what it shall hold.

    Raises:
        DiskError: the disk takes no more; what was there stays.
        OSError: the folder is missing.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented by two, whole or not at all.

    Args:
        path: the file; replaced if it is there. Its folder must exist.
        value: what `json.dumps` takes.

    Raises:
        DiskError: the disk takes no more; what was there stays.
        OSError: the folder is missing.
        TypeError: a value that JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")
