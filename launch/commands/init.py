"""Copy a shipped configuration, with what it inherits from, to a file of your own.

Without a name, the shipped ones are listed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from launch.errors import LaunchError

EXAMPLES = ("obm init", "obm init demo --output my.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which one and where to."""
    parser.add_argument("name", nargs="?", help="a shipped configuration")
    parser.add_argument("--output", metavar="FILE", help="default: NAME.yaml in this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def run(options: argparse.Namespace) -> int:
    """List or copy."""
    from configs.schema import shipped_config
    from train.files import write_text

    if options.name is None:
        folder = shipped_config("demo").parent
        for path in sorted(folder.glob("*.yaml")):
            print(f"{path.stem.ljust(18)} {_purpose(path)}")
        return 0
    source = shipped_config(options.name)
    target = Path(options.output or source.name)
    files = _files(source, target)
    for path in files:
        _check(path, options.overwrite)  # all of them before the first is written
    for path, text in files.items():
        write_text(path, text)
        print(f"wrote {path}")
    return 0


def _check(path: Path, overwrite: bool) -> None:
    """Makes the folder of a file that is to be written.

    Raises:
        LaunchError: it is there already, or it cannot be made.
    """
    try:
        if path.is_dir():
            raise LaunchError(f"{path} is a folder; name a file in it as --output")
        if path.exists() and not overwrite:
            raise LaunchError(f"{path} exists; pass --overwrite or another --output")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"{path}: cannot be written ({error.strerror}); name another file as --output"
        ) from error


def _purpose(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def _files(source: Path, target: Path) -> dict[Path, str]:
    """The file and those it inherits from, each beside the target under its own name.

    Raises:
        LaunchError: the target has the name of one that it inherits from.
    """
    text = source.read_text(encoding="utf-8")
    files = {target: text}
    inherited = re.search(r"^inherits:\s*(\S+)", text, flags=re.MULTILINE)
    if inherited:
        parent = source.parent / inherited.group(1)
        further = _files(parent, target.parent / parent.name)
        if target in further:
            raise LaunchError(
                f"{target}: {source.stem} inherits from {target.name}, which comes to stand "
                "beside it; give --output another name"
            )
        files |= further
    return files
