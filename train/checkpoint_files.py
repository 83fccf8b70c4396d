"""Whether the files of a training's checkpoint are those that were written.

Sizes stand in rollout.json, so that a file that a full disk, a lost mount or a broken copy has cut
short is found before anything is loaded. DeepSpeed and torch keep optimizer and random state in
pickles, which can run code when they are opened: here they are looked through first, and one that
names anything else than a checkpoint needs is refused. The weights themselves are safetensors.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from configs.errors import ConfigError

PLAIN = frozenset(
    {
        "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct", "numpy.dtypes.UInt32DType",
        "_codecs.encode", "train.vision.EncodedImage",
    }
)  # fmt: skip
"""What pickles of ours may name beside torch's own list, and DeepSpeed's classes."""
PICKLES = ("*.pt", "*.pth")
TAG_FILES = ("latest", "latest_universal")
"""In these DeepSpeed looks up which folder it loads."""
TAG = re.compile(r"global_step\d+(_universal)?")
"""What DeepSpeed calls that folder."""
RECORD = "rollout.json"
"""Written last; holds the sizes of the others."""


def measure_files(checkpoint: Path) -> dict[str, int]:
    """Size in bytes of every file of a checkpoint but its record, by its path in it."""
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(paths)
        if path.name != RECORD and not path.name.startswith(".")
    }


def find_damage(checkpoint: Path, files: dict[str, int]) -> str | None:
    """What is wrong with the first file that is missing or has another size; None = nothing.

    Args:
        checkpoint: the folder.
        files: of `measure_files`, when it was written.
    """
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, and was written with {size}"
    return None


def check_pickles(checkpoint: Path) -> None:
    """Looks through the pickles of a checkpoint without opening any.

    Raises:
        ConfigError: one is broken, or names code that no checkpoint needs; or DeepSpeed would
            open others than these.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    _check_within(checkpoint)
    for path in sorted(found for pattern in PICKLES for found in checkpoint.rglob(pattern)):
        try:
            names = get_unsafe_globals_in_checkpoint(path)
        # torch says what is wrong with a file by errors of many classes
        except Exception as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ConfigError(
                f"--resume: {path} cannot be read ({reason}); copy the run again, or remove this "
                "checkpoint to go on from the one before"
            ) from error
        for name in sorted(names):
            if name not in PLAIN and not _is_deepspeed_class(name):
                raise ConfigError(
                    f"--resume: {path} is not opened, because it names {name}, which no "
                    "checkpoint needs: a pickle can run code; take the run from a source that you "
                    "trust"
                )


def _check_within(checkpoint: Path) -> None:
    """Refuses links and names of folders that would lead DeepSpeed past what is looked through."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_symlink():
            raise ConfigError(
                f"--resume: {path} is a link, and what it leads to is not looked through; copy the "
                "run again with the files themselves (cp -rL)"
            )
    for path in (checkpoint / name for name in TAG_FILES):
        tag = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
        if tag is not None and not TAG.fullmatch(tag):
            raise ConfigError(
                f"--resume: {path} names {tag[:80]!r}, which is no folder that DeepSpeed wrote; "
                "take the run from a source that you trust"
            )


def _is_deepspeed_class(name: str) -> bool:
    """Whether a global is a class that DeepSpeed itself defines, where it says it lies."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith("deepspeed."):
        return False
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return False
    return isinstance(found, type) and found.__module__ == module
