"""Where a number comes from: the commit of the code and the machine it ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from train.run import processor_name


def code_commit() -> str:
    """Commit of the checkout that this package is imported from, `-dirty` where files differ;
    `unknown` outside git."""
    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return "unknown"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit[:12]}-dirty" if changed else commit[:12]


def hardware() -> str:
    """One line on the machine: processor, cores, memory, system."""
    cores = len(os.sched_getaffinity(0))
    return f"{processor_name()}, {cores} cores, {_memory_gb():.0f} GB, {platform.system()}"


def _git(root: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return 0.0
