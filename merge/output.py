"""The output folder: may it be written, what comes along from the VLM, and moving it into place."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from merge.checkpoint import INDEX_NAME, Checkpoint
from merge.errors import MergeError
from merge.shards import SafetensorsFile

RECORD_NAME = "merge.json"

# What a checkpoint needs beside its weights: configuration, tokenizer, processor, chat template.
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model")
COPIED_NAMES = ("LICENSE", "LICENSE.md", "NOTICE")
COPIED_FOLDERS = ("additional_chat_templates", "chat_templates")
NOT_COPIED = (
    RECORD_NAME,
    "adapter_config.json",
    "all_results.json",
    "train_results.json",
    "trainer_state.json",
)


def check_output(output: Path, parents: Mapping[str, Checkpoint], overwrite: bool) -> None:
    """Checks that the output may be written, before anything is.

    Raises:
        MergeError: It is a file, a parent or above one, exists (unless `overwrite` and an earlier
            merge wrote it), or the disk is too small.
    """
    for role, parent in parents.items():
        if output.resolve() in (parent.folder.resolve(), *parent.folder.resolve().parents):
            raise MergeError(f"{output}: is or holds the {role} itself; choose another output")
    if output.is_file():
        raise MergeError(f"{output}: is a file; choose another output")
    if not output.exists() or not any(output.iterdir()):
        n_needed = sum(path.path.stat().st_size for path in parents["vlm"].files)
        existing = next(p for p in (output, *output.absolute().parents) if p.exists())
        n_free = shutil.disk_usage(existing).free
        if n_free < n_needed:
            raise MergeError(
                f"{output}: needs {n_needed / 1e9:.1f} GB, the disk has {n_free / 1e9:.1f} GB "
                "free; free space or choose another output"
            )
        return
    if not overwrite:
        raise MergeError(f"{output}: exists; choose another output, or pass --overwrite")
    if not (output / RECORD_NAME).exists():
        raise MergeError(
            f"{output}: exists and was not written by a merge (no {RECORD_NAME}), so it is not "
            "overwritten; choose another output, or remove it yourself"
        )


def copy_companions(source: Path, folder: Path) -> None:
    """Copies configuration, tokenizer, processor, chat template and licence; no weights."""
    for path in sorted(source.iterdir()):
        is_wanted = path.suffix in COPIED_SUFFIXES or path.name in COPIED_NAMES
        is_index = path.name.endswith(".index.json") and path.name != INDEX_NAME
        if path.is_file() and is_wanted and path.name not in NOT_COPIED and not is_index:
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name in COPIED_FOLDERS:
            shutil.copytree(path, folder / path.name)
    _write_index(folder)


def _write_index(folder: Path) -> None:
    """Gives shards that came without an index one, since transformers cannot find them without."""
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if not shards or (folder / INDEX_NAME).exists():
        return
    weight_map = {
        name: shard.name for shard in shards for name in sorted(SafetensorsFile(shard).tensors)
    }
    n_bytes = sum(
        info.n_bytes for shard in shards for info in SafetensorsFile(shard).tensors.values()
    )
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def move_into_place(part: Path, output: Path) -> None:
    """Renames a finished folder to its place; an earlier one stays until the new one is there."""
    if not output.exists() or not any(output.iterdir()):
        part.replace(output)
        return
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    output.replace(old)
    try:
        part.replace(output)
    except OSError:
        with suppress(OSError):
            old.replace(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
