"""Which weights are trained: LoRA adapters by peft, or the policy without its vision tower.

An adapter's reference policy (`grpo.beta` above 0) is the policy without the adapter, so no second
model is held. Only linears of the language module get one unless `lora.train_vision` says so.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from configs.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

    from configs.sections import Lora

LANGUAGE, VISION = "language_model", "visual"


def make_lora(model: Any, settings: Lora) -> LoraConfig | None:
    """peft's settings, or None where no adapter is asked for (r = 0).

    Args:
        model: the policy, bare.
        settings: the section `lora`.

    Raises:
        ConfigError: a target module that no linear is called by.
    """
    if settings.r == 0:
        return None
    from peft import LoraConfig

    linears = _linears(model, settings.train_vision)
    ends = sorted({_end(name) for name in linears})
    wanted = settings.target_modules or ends
    for target in wanted:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            where = "the policy" if settings.train_vision else "the language module"
            raise ConfigError(
                f"lora.target_modules: no linear of {where} ends in '{target}'; "
                f"there are {', '.join(ends)}"
            )
    # one expression rather than the ends alone: the vision tower's linears have the same ends
    roots = sorted({_root(name) for name in linears})
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"({_any_of(roots)})\.(.*\.)?({_any_of(wanted)})",
        task_type="CAUSAL_LM",
    )


def freeze_vision(model: Any) -> int:
    """Takes vision tower and projector out of the training; returns how many numbers that are."""
    tower = getattr(model.model, VISION, None)
    if tower is None:
        return 0
    tower.requires_grad_(False)
    return sum(parameter.numel() for parameter in tower.parameters())


def _linears(model: Any, with_vision: bool) -> list[str]:
    """Full names of the linears that may get an adapter; the output head is none of them."""
    core = model.model
    parts = {"model": core}  # a text model is its own language module
    if hasattr(core, LANGUAGE):
        parts = {f"model.{LANGUAGE}": getattr(core, LANGUAGE)}
    if with_vision and hasattr(core, VISION):
        parts[f"model.{VISION}"] = getattr(core, VISION)
    return [
        f"{root}.{name}"
        for root, part in parts.items()
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _root(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2] if parts[1] in (LANGUAGE, VISION) else parts[:1])


def _end(name: str) -> str:
    """What tells a linear from others: the last part, or two where that is a number (`mlp.0`)."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _any_of(names: list[str]) -> str:
    return "|".join(map(re.escape, names))
