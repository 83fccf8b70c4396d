"""What this machine has: versions, cores, memory, devices, disk, logins, and what is missing.

The output is meant to be pasted into an issue. Exit code 1 if something needed is missing.
--markdown prints docs/versions.md instead: what pyproject.toml asks for beside what is here;
--constraints prints constraints.txt, the same versions for pip.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXAMPLES = (
    "obm doctor",
    "obm doctor --output runs/demo",
    "obm doctor --markdown",
    "obm doctor --constraints",
)

# Free space that the demo needs: six merged checkpoints, two runs, the environment's caches.
NOT_TESTED = "not tested"
"""In the table of versions: an extra that is not installed where the tests ran."""
DEMO_DISK_GB = 2.0
DEMO_MEMORY_GB = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where runs will be written."""
    parser.add_argument(
        "--output", metavar="DIR", default="runs", help="where runs go (default: runs)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--markdown", action="store_true", help="print the table of versions for docs/versions.md"
    )
    instead.add_argument(
        "--constraints", action="store_true", help="print these versions for constraints.txt"
    )


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    if options.markdown:
        print(versions_page(), end="")
        return 0
    if options.constraints:
        print(constraints(), end="")
        return 0
    missing: list[str] = []
    rows = [
        ("obm-warmstart", metadata.version("obm-warmstart")),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        *_packages(missing),
        ("cores", str(len(os.sched_getaffinity(0)))),
        ("memory", _memory(missing)),
        ("disk", _disk(Path(options.output), missing)),
        ("devices", _devices(missing)),
        ("C compiler", _compiler(missing)),
        ("deepspeed launcher", _launcher(missing)),
        ("W&B", _wandb_login()),
        ("Hugging Face", _hub_login()),
        ("atlas checkpoints", _atlas(missing)),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}")
    print("\nmissing: " + ("; ".join(missing) if missing else "nothing"))
    return 1 if missing else 0


def requirements() -> dict[str, list[Requirement]]:
    """What the package asks for: extra ("" for none) -> requirements.

    In a checkout they are read from pyproject.toml, which an older install may lag behind.
    """
    from packaging.requirements import Requirement

    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        import tomllib

        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        lines = {"": table["dependencies"], **table["optional-dependencies"]}
        return {extra: [Requirement(line) for line in lines[extra]] for extra in lines}
    extras = metadata.metadata("obm-warmstart").get_all("Provides-Extra") or []
    found: dict[str, list[Requirement]] = {"": [], **{extra: [] for extra in extras}}
    for requirement in map(Requirement, metadata.requires("obm-warmstart") or []):
        marker = requirement.marker
        for extra in found:
            if marker is None or marker.evaluate({"extra": extra}):
                found[extra].append(requirement)
                break
    return found


def versions_page() -> str:
    """docs/versions.md: a table of what is asked for and what is installed here."""
    lines = [
        "# Versions",
        "",
        "What `pyproject.toml` allows, and the versions that the tests ran with. Made by",
        "`obm doctor --markdown > docs/versions.md` in the environment that passed them; a test",
        "holds this page against `pyproject.toml` and against what is installed. `make install`",
        "and the `Dockerfile` install these versions (`constraints.txt`, made by",
        "`obm doctor --constraints > constraints.txt`); pip alone takes any that are allowed.",
        "",
        f"Python {platform.python_version()} on {platform.system()}, {platform.machine()}.",
        "",
        "| package | asked for | tested | part of |",
        "| --- | --- | --- | --- |",
    ]
    for extra, requirement, version in _tested():
        asked = str(requirement.specifier) or "any"
        part = f"`[{extra}]`" if extra else "all"
        lines.append(f"| {requirement.name} | `{asked}` | {version} | {part} |")
    lines += [
        "",
        "Which build of torch is installed, for the CPU or for CUDA, your package index says.",
        "A vLLM server has an environment of its own; tested with vLLM 0.32.0",
        "([vllm.md](vllm.md)).",
    ]
    return "\n".join(lines) + "\n"


def constraints() -> str:
    """constraints.txt: the versions of docs/versions.md, as pip's --constraint reads them."""
    lines = ["# Versions that the tests ran with: obm doctor --constraints > constraints.txt"]
    for _, requirement, version in _tested():
        if version != NOT_TESTED:
            # without its build (+cpu): torch for a GPU has the same version
            lines.append(f"{requirement.name}=={version.partition('+')[0]}")
    return "\n".join(lines) + "\n"


def _tested() -> list[tuple[str, Requirement, str]]:
    """(extra, requirement, version that is installed here) of all that the package asks for."""
    rows = []
    for extra, needed in requirements().items():
        for requirement in needed:
            if requirement.name == "obm-warmstart":
                continue
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = NOT_TESTED
            rows.append((extra, requirement, version))
    return rows


def _packages(missing: list[str]) -> list[tuple[str, str]]:
    """Installed version of every dependency, with a note where it is not the one asked for."""
    rows = []
    for requirement in requirements()[""]:
        line = str(requirement)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            rows.append((requirement.name, "not installed"))
            missing.append(f"{line} (pip install '{line}')")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            rows.append((requirement.name, version))
        else:
            rows.append((requirement.name, f"{version}, asked for {requirement.specifier}"))
            missing.append(f"{line} (pip install '{line}')")
    return rows


def _memory(missing: list[str]) -> str:
    try:
        import psutil
    except ImportError:
        return "unknown (psutil is not installed)"
    memory = psutil.virtual_memory()
    if memory.total < DEMO_MEMORY_GB * 1e9:
        missing.append(f"memory: the demo needs {DEMO_MEMORY_GB:.0f} GB")
    return f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available"


def _disk(output: Path, missing: list[str]) -> str:
    try:
        folder = output.resolve()
        while not folder.exists():
            folder = folder.parent
        free_gb = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        raise LaunchError(
            f"--output {output}: no folder of that name can be made ({error.strerror}); "
            "name another one"
        ) from error
    if not folder.is_dir():
        raise LaunchError(f"--output {output}: {folder} is a file; name a folder")
    if free_gb < DEMO_DISK_GB:
        missing.append(f"disk: {folder} has {free_gb:.1f} GB, the demo needs {DEMO_DISK_GB:.0f}")
    if not os.access(folder, os.W_OK):
        missing.append(f"write access to {folder}")
    return f"{free_gb:.1f} GB free in {folder}"


def _devices(missing: list[str]) -> str:
    try:
        import torch
    except Exception as error:  # a broken install must not end the report that shows it
        missing.append("a torch that imports (see devices)")
        return f"torch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return "no GPU; the processor is used"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{device.name} {device.total_memory / 1e9:.0f} GB" for device in names)


def _compiler(missing: list[str]) -> str:
    from train.libraries import c_compiler

    found = c_compiler()
    if found is not None:
        return found
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        missing.append("a C compiler, for Triton's kernels on the GPU (gcc and libc6-dev)")
    return "not found; needed on a GPU alone"


def _launcher(missing: list[str]) -> str:
    from launch.jobs import deepspeed_launcher

    try:
        return str(deepspeed_launcher())
    except ValueError as error:
        missing.append(str(error))
        return "not found"


def _wandb_login() -> str:
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return f"WANDB_MODE={mode}"
    try:
        # What training itself asks before it decides between online and offline.
        from train.callbacks import has_wandb_login
    except ImportError as error:
        return f"not usable ({error}); runs are kept offline"
    return "logged in" if has_wandb_login() else "no login; runs are kept offline (wandb login)"


def _hub_login() -> str:
    try:
        from huggingface_hub import get_token
    except ImportError:
        return "huggingface_hub is not installed"
    return "logged in" if get_token() else "no login (only private models need one)"


def _atlas(missing: list[str]) -> str:
    from configs.schema import resolve_model

    found = []
    for name in ("base", "vlm", "agent"):
        try:
            resolve_model(f"atlas://{name}")
            found.append(name)
        except ValueError:
            missing.append(f"atlas://{name} (obm atlas build)")
    return ", ".join(found) or "none"
