"""The output folder: its files, may it be written, what comes along, and moving it into place."""

import json
import math
import os
import re
import reprlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from merge.checkpoint import INDEX_NAME, Checkpoint
from merge.errors import MergeError
from merge.memory import size_words
from merge.plan import MergePlan, PlannedTensor
from merge.shards import ITEM_SIZES

RECORD_NAME = "merge.json"

# What a checkpoint needs beside its weights: configuration, tokenizer, processor, chat template.
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model")
COPIED_NAMES = ("LICENSE", "LICENSE.md", "NOTICE")
COPIED_FOLDERS = ("additional_chat_templates", "chat_templates")
NOT_COPIED = (
    RECORD_NAME,
    "cost.json",
    "adapter_config.json",
    "all_results.json",
    "train_results.json",
    "trainer_state.json",
)


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Length in the file."""
        n_bytes = ITEM_SIZES[self.dtype]
        for length in self.shape:
            n_bytes *= length
        return n_bytes


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file of the output, and what it holds in order."""

    name: str
    tensors: tuple[OutputTensor, ...]
    metadata: Mapping[str, str]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def plan_files(plan: MergePlan, vlm: Checkpoint, shard_size: str | int | None) -> list[OutputFile]:
    """Decides which file each tensor goes to.

    Args:
        plan: What is written.
        vlm: Its files' names and metadata are taken over where no size is given.
        shard_size: Largest number of bytes of tensors in a file, or text such as `5GB`; a tensor
            that is larger gets a file of its own.

    Raises:
        MergeError: The size cannot be read.
    """
    if shard_size is None:
        planned = {tensor.name: tensor for tensor in plan.tensors}
        return [
            OutputFile(
                file.path.name,
                tuple(_output(planned[t.name]) for t in plan.tensors if t.name in file.tensors),
                file.metadata or {"format": "pt"},
            )
            for file in vlm.files
        ]
    limit = parse_size(shard_size)
    groups: list[list[OutputTensor]] = [[]]
    for tensor in map(_output, plan.tensors):
        if groups[-1] and sum(t.n_bytes for t in groups[-1]) + tensor.n_bytes > limit:
            groups.append([])
        groups[-1].append(tensor)
    n = len(groups)
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    if n == 1:
        names = ["model.safetensors"]
    return [
        OutputFile(name, tuple(group), {"format": "pt"})
        for name, group in zip(names, groups, strict=True)
    ]


def parse_size(size: str | int) -> int:
    """Reads a number of bytes, such as 5000000, `5GB` or `500 MB`.

    Raises:
        MergeError: It is no such thing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(KB|MB|GB|TB|)", str(size).strip().upper())
    n_bytes = float(match[1]) * UNITS.get(match[2], 1) if match else 0.0
    if n_bytes == 0 or math.isinf(n_bytes):
        shown = reprlib.repr(size)  # of hundreds of digits, if it is beyond a float
        raise MergeError(f"merge.shard_size: {shown} is no size; write one such as 5GB or 500MB")
    return int(n_bytes)


def _output(tensor: PlannedTensor) -> OutputTensor:
    return OutputTensor(tensor.name, tensor.dtype, tensor.shape)


def output_path(output: str | Path) -> Path:
    """The output with the home folder in the place of `~`.

    Raises:
        MergeError: It is the home of an unknown user.
    """
    try:
        return Path(output).expanduser()
    except RuntimeError as error:
        raise MergeError(
            f"{output}: cannot be a folder ({error}); choose another output"
        ) from error


def part_folder(output: Path) -> Path:
    """Where a merge lies until it is whole, and from where a broken one goes on."""
    return output.with_name(f".{output.name}.part")


def check_output(output: Path, sources: Mapping[str, Path], n_bytes: int, overwrite: bool) -> None:
    """Checks that the output may be written, before anything is.

    Args:
        output: Folder to write.
        sources: Role -> folder that is read; must not be the output or lie in it.
        n_bytes: How much will be written.
        overwrite: Whether an earlier merge may be replaced.

    Raises:
        MergeError: It is a file, a link, a mount point, a source or above one, exists (unless
            `overwrite` and an earlier merge wrote it), or the disk is too small.
    """
    for role, source in sources.items():
        if output.resolve() in (source.resolve(), *source.resolve().parents):
            raise MergeError(f"{output}: is or holds the {role} itself; choose another output")
    if not output.name:  # the current folder, or the root
        raise MergeError(f"{output}: has no name of its own; choose another output")
    part = part_folder(output)
    try:
        existing = next(p for p in (output, *output.absolute().parents) if p.exists())
        part.exists()  # its name is the longer one
    except OSError as error:  # too long a name, no access
        raise MergeError(
            f"{output}: cannot be written ({error.strerror}); choose another output"
        ) from error
    if not existing.is_dir():
        reason = "is a file" if existing == output else f"lies below {existing}, which is a file"
        raise MergeError(f"{output}: {reason}; choose another output")
    # the finished folder is renamed to its place, which none can be to these
    if output.is_symlink() or os.path.ismount(output):
        kind = "a symbolic link" if output.is_symlink() else "a mount point"
        raise MergeError(
            f"{output}: is {kind}; name a folder inside {output.resolve()} as the output"
        )
    n_there = sum(path.stat().st_blocks * 512 for path in part.glob("*.safetensors"))
    n_free = shutil.disk_usage(existing).free + n_there
    if n_free < n_bytes:
        raise MergeError(
            f"{output}: needs {size_words(n_bytes)}, the disk has {size_words(n_free)} free; "
            "free space or choose another output"
        )
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise _exists(output)
    # a run folder holds its settings, and a copy of its start's record
    is_run = (output / "config.yaml").exists()
    if is_run or not all((output / name).is_file() for name in (RECORD_NAME, "config.json")):
        raise MergeError(
            f"{output}: exists and was not written by a merge (it lacks {RECORD_NAME} or "
            "config.json, or is a run folder), so it is not overwritten; choose another output, or "
            "remove it yourself"
        )


def copy_companions(source: Path, folder: Path) -> None:
    """Copies configuration, tokenizer, processor, chat template and licence; no weights."""
    for path in sorted(source.iterdir()):
        is_wanted = path.suffix in COPIED_SUFFIXES or path.name in COPIED_NAMES
        is_index = path.name.endswith(".index.json")
        if path.is_file() and is_wanted and path.name not in NOT_COPIED and not is_index:
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name in COPIED_FOLDERS:
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)


def write_index(folder: Path, files: Sequence[OutputFile]) -> None:
    """Writes the index that transformers needs to find several files."""
    if [file.name for file in files] == ["model.safetensors"]:
        return
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    index = {
        "metadata": {"total_size": sum(file.n_bytes for file in files)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def move_into_place(part: Path, output: Path, overwrite: bool) -> None:
    """Renames a finished folder to its place; an earlier one stays until the new one is there.

    Raises:
        MergeError: Something came to lie there meanwhile.
    """
    if not output.exists() or not any(output.iterdir()):
        part.replace(output)
        return
    if not overwrite:
        raise _exists(output)
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    output.replace(old)
    try:
        part.replace(output)
    except OSError:
        with suppress(OSError):
            old.replace(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exists(output: Path) -> MergeError:
    return MergeError(f"{output}: exists; choose another output, or pass --overwrite")
