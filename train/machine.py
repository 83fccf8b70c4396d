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
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": ", ".join(gpus) or processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": "gpu" if gpus else "cpu",
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # a container without git
        return None
    return result.stdout.strip() or None


def processor_name() -> str:
    """The processor's model, as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
