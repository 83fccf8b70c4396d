"""DeepSpeed's settings files: the shipped ones, and what a user's own needs of the machine.

Offload keeps torch's AdamW (`zero_force_ds_cpu_optimizer: false`), so none of the shipped files
needs a compiler. A file that asks for an optimizer of DeepSpeed's has it compiled at first start.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import SHIPPED_DEEPSPEED

NULLABLE = ("offload_optimizer", "offload_param", "optimizer")
"""Sections that a file may set to null, as if they were not there."""
FOLDER = Path(__file__).resolve().parent.parent / "configs" / "deepspeed"


def deepspeed_path(name: str | None) -> str | None:
    """Path of the DeepSpeed settings, or None for plain torch.

    Args:
        name: the setting `deepspeed`: a shipped name, `none`, or the path of a JSON file.

    Raises:
        ConfigError: neither a shipped name nor a file.
    """
    if name is None or name == "none":
        return None
    if name in SHIPPED_DEEPSPEED:
        return str(FOLDER / f"{name}.json")
    if not Path(name).is_file():
        raise ConfigError(
            f"deepspeed: no file '{name}'; write {', '.join(SHIPPED_DEEPSPEED)}, none, or the path "
            "of a JSON file"
        )
    return name


def read_deepspeed(path: str | Path) -> dict[str, Any]:
    """Content of a DeepSpeed settings file.

    Raises:
        ConfigError: not a JSON object, or one whose sections are not DeepSpeed's.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"deepspeed: {path} cannot be read as JSON ({error}); correct it"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed: {path} is no JSON object; see configs/deepspeed/zero2.json")
    _check_sections(content, path)
    return content


def _check_sections(content: dict[str, Any], path: str | Path) -> None:
    """Holds what the plan and the check for a compiler read against DeepSpeed's own types."""

    def section(above: dict[str, Any], name: str, key: str) -> dict[str, Any]:
        found = above.get(name, {})
        if found is None and name in NULLABLE:
            return {}
        if not isinstance(found, dict):
            raise ConfigError(
                f"deepspeed: {path}: {key} is {_shown(found)}, not an object; "
                "see configs/deepspeed/zero2.json"
            )
        return found

    zero = section(content, "zero_optimization", "zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"deepspeed: {path}: zero_optimization.stage is {_shown(stage)}; write 0, 1, 2 or 3"
        )
    for name in ("offload_optimizer", "offload_param"):
        key = f"zero_optimization.{name}"
        device = section(zero, name, key).get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise ConfigError(
                f"deepspeed: {path}: {key}.device is {_shown(device)}; write none, cpu or nvme"
            )
    optimizer = section(content, "optimizer", "optimizer")
    section(optimizer, "params", "optimizer.params")


def _shown(value: Any) -> str:
    """A value as JSON has it, cut to what a message can hold."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def compiled_optimizer(settings: dict[str, Any]) -> str | None:
    """What DeepSpeed compiles for these settings' optimizer; None = it is torch's own."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    is_offloaded = offload.get("device", "none") != "none"
    optimizer = settings.get("optimizer")
    if optimizer is None:
        forced = settings.get("zero_force_ds_cpu_optimizer", True)
        return "cpu_adam" if is_offloaded and forced else None
    if optimizer.get("params", {}).get("torch_adam", False):
        return None
    kind = str(optimizer.get("type", "")).lower()
    if kind in ("adam", "adamw"):
        return "cpu_adam" if is_offloaded else "fused_adam"
    return {"adagrad": "cpu_adagrad", "lion": "cpu_lion" if is_offloaded else "fused_lion",
            "lamb": "fused_lamb"}.get(kind)  # fmt: skip


def require_compiler(path: str | Path) -> None:
    """Checks that what a settings file needs compiled can be compiled here.

    Raises:
        ConfigError: no C++ compiler; DeepSpeed would fail minutes later with its traceback.
    """
    operator = compiled_optimizer(read_deepspeed(path))
    if operator is None or shutil.which(os.environ.get("CXX", "c++")):
        return
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get(operator, False):
        return
    raise ConfigError(
        f"deepspeed: {path} uses DeepSpeed's own optimizer ({operator}), which is compiled at the "
        "first start, and there is no C++ compiler (CXX, c++); install g++, or keep torch's AdamW: "
        'no "optimizer" block, and "zero_force_ds_cpu_optimizer": false if the optimizer is '
        "offloaded (as in configs/deepspeed/zero3_offload.json)"
    )
