"""docs/licences.md: the licence of every direct dependency, from the metadata that is installed.

python -m launch.licences            writes the page again; a test misses a dependency
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.commands.doctor import requirements
from train.files import write_text

PAGE = "docs/licences.md"
NOT_INSTALLED = "not installed where this was made"
NOT_STATED = "not stated in its metadata"
NO_LICENCE = ("OSI Approved", "DFSG approved")
"""Classifiers that name none."""
LONGEST = 60
"""Characters of a free `License` field; longer ones hold the whole text."""
HEAD = """# Licences

obm-warmstart itself: Apache-2.0 ([LICENSE](../LICENSE)). What it carries: facts, flags and maps of
the atlas ([SOURCES.md](../environments/atlas/data/SOURCES.md)) and the tiny checkpoints, which were
trained here. What it installs, by the metadata of the installed packages; what these install in
turn is theirs to say. Made by `python -m launch.licences`.

"""


def licence_of(name: str) -> str:
    """The licence that a package's metadata states: SPDX expression, classifiers, or free text."""
    try:
        found: Any = metadata.metadata(name)  # a Message; its stub lacks `get`
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
    expression = found.get("License-Expression")
    if expression:
        return expression
    classifiers = found.get_all("Classifier") or []
    names = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")]
    names = [name for name in names if name not in NO_LICENCE]
    if names:
        return ", ".join(sorted(set(names)))
    text = (found.get("License") or "").strip()
    first = text.splitlines()[0].strip() if text else ""
    return first if 0 < len(first) <= LONGEST else NOT_STATED


def licences_page() -> str:
    """The page: one row a direct dependency, in the order of pyproject.toml."""
    lines = ["| package | licence | part of |", "| --- | --- | --- |"]
    for extra, needed in requirements().items():
        for requirement in needed:
            name, part = requirement.name, f"`[{extra}]`" if extra else "all"
            if name != "obm-warmstart":
                lines.append(f"| {name} | {licence_of(name)} | {part} |")
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    """Writes the page."""
    write_text(Path(PAGE), licences_page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
