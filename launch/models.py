"""Checkpoints for the verbs that run them in this process."""

from __future__ import annotations

from typing import Any


def load_for_inference(folder: str, device: str | None = None, **settings: Any) -> tuple[Any, Any]:
    """As `train.policy.load_for_inference`, without a progress bar for each file."""
    from transformers.utils.logging import disable_progress_bar

    from train.policy import load_for_inference as load

    disable_progress_bar()
    return load(folder, device, **settings)
