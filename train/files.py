"""Files that are there whole or not at all: a temporary name first, then a rename."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all.

    Args:
        path: the file; replaced if it is there. Its folder must exist.
        text: what it shall hold.

    Raises:
        OSError: the folder is missing, or the disk full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented by two, whole or not at all.

    Args:
        path: the file; replaced if it is there. Its folder must exist.
        value: what `json.dumps` takes.

    Raises:
        OSError: the folder is missing, or the disk full.
        TypeError: a value that JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")
