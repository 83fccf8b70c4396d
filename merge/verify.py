"""Checks a merged folder against its merge.json: every byte, and whose vision tower it is."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import VISION
from merge.output import RECORD_NAME


def verify_folder(folder: str | Path) -> dict[str, Any]:
    """Re-reads a merged checkpoint and compares it with what was written.

    Every tensor must have its recorded checksum; no tensor may be missing or added. Vision tower
    and projector must be the VLM's: as recorded, and where the VLM is still there, as it is now.

    Args:
        folder: What `obm merge` wrote.

    Returns:
        `tensors` and `vision`, how many were checked; `vlm`, the VLM that the vision tower was
        compared with, or None where it is not there any more.

    Raises:
        MergeError: Names every tensor that differs.
    """
    folder = Path(os.path.expanduser(folder))
    record = read_record(folder)
    checkpoint = Checkpoint(folder, "merged", "the folder")
    checksums: dict[str, str] = {}
    problems = list(_differences(checkpoint, record, checksums))
    vlm = _find_vlm(record)
    if vlm is not None:
        problems += _vision_differences(checksums, record, vlm)
    _refuse(folder, problems)
    vision = [name for name, entry in record["tensors"].items() if entry["group"] == VISION]
    return {
        "tensors": len(record["tensors"]),
        "vision": len(vision),
        "vlm": vlm.source if vlm is not None else None,
    }


def check_folder(folder: str | Path) -> None:
    """Compares names, dtypes and shapes with what was written; no weight is read.

    Args:
        folder: What `obm merge` wrote.

    Raises:
        MergeError: Names every tensor that differs.
    """
    folder = Path(os.path.expanduser(folder))
    record = read_record(folder)
    _refuse(folder, list(_differences(Checkpoint(folder, "merged", "the folder"), record, None)))


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:5]) + (f"; {len(problems) - 5} more" if problems[5:] else "")
        raise MergeError(f"{folder}: {shown}; merge again, or copy the folder again")


def read_record(folder: Path) -> dict[str, Any]:
    """Reads merge.json.

    Args:
        folder: What `obm merge` wrote, or a run folder with the record of its start.

    Raises:
        MergeError: It is missing or damaged.
    """
    path = folder / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for entry in record["tensors"].values():
            _ = entry["checksum"], entry["inputs"], entry["group"], entry["dtype"], entry["shape"]
        _ = record["parents"]["vlm"]["source"]
    except FileNotFoundError as error:
        raise MergeError(f"{path}: is missing; give a folder that `obm merge` wrote") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MergeError(f"{path}: is no record of a merge ({error!r}); merge again") from error
    assert isinstance(record, dict)
    return record


def _differences(
    checkpoint: Checkpoint, record: dict[str, Any], checksums: dict[str, str] | None
) -> Iterator[str]:
    """Compares a checkpoint with its record; `checksums` gets those found, None = read no bytes."""
    recorded = record["tensors"]
    for name in sorted(set(recorded) ^ set(checkpoint.tensors)):
        yield f"tensor {name} is {'missing' if name in recorded else 'not of the merge'}"
    names = [name for name in recorded if name in checkpoint.tensors]
    # None: a bar on a terminal, silence in a log
    for name in tqdm(names, desc="verify", unit="tensor", disable=checksums is None or None):
        entry, info = recorded[name], checkpoint.tensors[name]
        where = f"tensor {name} in {checkpoint.file_of(name).path.name}"
        if checksums is not None:
            checksums[name] = checkpoint.checksum(name)
        if [info.dtype, list(info.shape)] != [entry["dtype"], entry["shape"]]:
            yield (
                f"{where} is {info.dtype} {list(info.shape)}, written was {entry['dtype']} "
                f"{entry['shape']}"
            )
        elif checksums is not None and checksums[name] != entry["checksum"]:
            yield f"{where} has other bytes than were written"
        if entry["group"] == VISION and entry["inputs"].get("vlm") != entry["checksum"]:
            yield f"tensor {name} is not recorded as the VLM's own"


def _find_vlm(record: dict[str, Any]) -> Checkpoint | None:
    """The VLM as it is now, if it lies where it lay; the hub is not asked.

    A published record has names in place of paths; a folder of that name would be another.
    """
    if record.get("published"):
        return None
    source = Path(os.path.expanduser(str(record["parents"]["vlm"]["source"])))
    if not source.is_dir():
        return None
    try:
        return Checkpoint(source, "vlm")
    except MergeError:
        return None


def _vision_differences(
    checksums: dict[str, str], record: dict[str, Any], vlm: Checkpoint
) -> Iterator[str]:
    for name, entry in record["tensors"].items():
        if entry["group"] != VISION or name not in checksums:
            continue
        if name not in vlm.tensors or vlm.checksum(name) != checksums[name]:
            yield f"tensor {name} differs from the VLM's in {vlm.source}"
