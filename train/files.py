"""Files that are there whole or not at all: a temporary name first, then a rename."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.disk import TAKES_NO_MORE, DiskError, writing


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all.

    Args:
        path: the file; replaced if it is there. Its folder must exist.
        text: what it shall hold.

    Raises:
        DiskError: the disk takes no more, or no file of that name; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):  # where it could not be made, it may be no name at all
                temporary.unlink()
            if error.errno in TAKES_NO_MORE:
                raise
            raise DiskError(
                f"{path}: cannot be written ({error.strerror}); name a file in a folder that is "
                "there and may be written to"
            ) from error


ENDINGS = (".json", ".csv", ".md")


def with_ending(path: Path, ending: str) -> Path:
    """A file of results by its name without an ending, which may hold dots: `runs/qwen2.5-vl-3b`.

    Args:
        path: the name; an ending of results that was given with it does not count.
        ending: such as `.json`.
    """
    name = path.stem if path.suffix in ENDINGS else path.name
    return path.with_name(f"{name}{ending}")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented by two, whole or not at all.

    Args:
        path: the file; replaced if it is there. Its folder must exist.
        value: what `json.dumps` takes.

    Raises:
        DiskError: the disk takes no more, or no file of that name; what was there stays.
        TypeError: a value that JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")
