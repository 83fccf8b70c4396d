"""How the libraries below behave: silent about what a user cannot change, and sending nothing."""

from __future__ import annotations

import logging
import os
import warnings


def keep_to_ourselves() -> None:
    """Nobody is told that this machine trains: no usage reports of TRL and W&B.

    TRL's trainers report to huggingface.co what they train, W&B to its maker how its client fares,
    offline runs included. Must be called before the libraries are imported; a variable that the
    user has set stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def be_quiet() -> None:
    """No notes that a user can do nothing about: deprecations between the libraries we pin."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch)\b")
    # a filter, since this library sets its own level when it is imported
    logging.getLogger("bm25s").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
