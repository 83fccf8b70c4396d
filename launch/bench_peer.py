"""mergekit for the bench: an environment of its own, since its dependencies are not ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

PEER_ENVIRONMENT = Path(".cache/mergekit-venv")
# torch first, in the version that the project's own CPU results were made with
PEER_PACKAGES = (["torch==2.13.0"], ["mergekit==0.1.5"])


def make_peer_environment(folder: Path, run: Callable[..., Any] = subprocess.run) -> None:
    """Makes mergekit's environment unless it is there.

    Raises:
        LaunchError: It cannot be installed.
    """
    if (folder / "bin" / "mergekit-yaml").exists():
        return
    print(f"making mergekit's environment in {folder}", flush=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    try:
        run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in PEER_PACKAGES:
            run([*pip, *packages], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(
            f"mergekit cannot be installed in {folder} ({error}); "
            "pass --peer none to measure without it"
        ) from error


def peer_versions(folder: Path) -> dict[str, str]:
    """What is installed in mergekit's environment: mergekit and its torch."""
    found = {}
    for name in ("mergekit", "torch"):
        for path in folder.glob(f"lib/python*/site-packages/{name}-*.dist-info"):
            found[name] = path.name.removeprefix(f"{name}-").removesuffix(".dist-info")
    return found


def peer_command(folder: Path, config: Path, output: Path, threads: int) -> list[str]:
    """The command of one merge; 0 threads leave the number to mergekit."""
    flags = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    if threads:
        flags += ["--num-threads", str(threads)]
    program = folder.absolute() / "bin" / "mergekit-yaml"
    return [str(program), str(config), str(output), *flags]


def peer_config(
    method: str, trio: Path, donors: Sequence[str], parameters: dict[str, float]
) -> dict[str, Any]:
    """Settings of one merge, in bf16 maths, which is mergekit's default and its faster way."""
    return {
        "merge_method": method,
        "base_model": str(trio / "base"),
        "models": [{"model": str(trio / role), "parameters": parameters} for role in donors],
        "dtype": "bfloat16",
    }
