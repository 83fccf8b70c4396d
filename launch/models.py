"""Checkpoints for the verbs that run them in this process."""

from __future__ import annotations

from typing import Any


def load_for_inference(folder: str) -> tuple[Any, Any]:
    """Model in evaluation mode and its processor, without a progress bar for each file.

    Raises:
        PolicyLoadError: see `train.policy.load_policy`.
    """
    from transformers.utils.logging import disable_progress_bar

    from train.policy import load_policy

    disable_progress_bar()
    model, processor = load_policy(folder)
    return model.eval(), processor
