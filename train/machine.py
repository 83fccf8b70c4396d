"""What a run is made by: versions, commit, hardware, command; a part of its environment.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft", "wandb")
RESULTS = ":(exclude)docs/results"


def describe_machine() -> dict[str, Any]:
    """Returns versions, commit, hardware and command of this process, as plain data."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join(sys.argv),
        "commit": code_commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": ", ".join(gpus) or processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": "gpu" if gpus else "cpu",
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def code_commit() -> str:
    """Commit of the checkout that this package is imported from, `-dirty` where files differ;
    `unknown` outside git, and for a package that was installed within another repository.

    Results do not count: of several made one after another only the first would be clean.
    """
    root = Path(__file__).resolve().parent.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if not commit or Path(top).resolve() != root:
        return "unknown"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", RESULTS)
    return f"{commit[:12]}-dirty" if changed else commit[:12]


def _git(root: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # a container without git
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def processor_name() -> str:
    """The processor's model, as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
