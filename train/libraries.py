"""How the libraries below behave: quick to load, silent, sending nothing; what they need here."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import warnings

USUAL_THRESHOLD = gc.get_threshold()


def keep_to_ourselves() -> None:
    """Nobody is told that this machine trains: no usage reports of TRL and W&B.

    TRL's trainers report to huggingface.co what they train, W&B to its maker how its client fares,
    offline runs included. Must be called before the libraries are imported; a variable that the
    user has set stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def load_quickly() -> None:
    """The garbage collector looks less often, until `run_as_usual`: what an import makes stays.

    With Python's 700 new objects between two looks, half a million objects of torch, transformers
    and TRL are gone through a thousand times: a fifth of a training's start.
    """
    gc.set_threshold(10_000, *USUAL_THRESHOLD[1:])


def run_as_usual() -> None:
    """The libraries are there. A model's tensors may hang in cycles, which only the collector ends.

    A training step of a tiny model makes fewer new objects than `load_quickly` waits for.
    """
    gc.set_threshold(*USUAL_THRESHOLD)


def be_quiet() -> None:
    """No notes that a user can do nothing about: deprecations between the libraries we pin."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch)\b")
    # a filter, since this library sets its own level when it is imported
    logging.getLogger("bm25s").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class CompilerMissingError(RuntimeError):
    """No C compiler on this machine. Other machines of a run may have one, so each says it."""

    exit_code = 2


def c_compiler() -> str | None:
    """The C compiler that Triton finds on this machine: CC, else gcc or clang."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def require_c_compiler() -> None:
    """Checks that TRL's kernels for long batches can be built; Triton compiles C to call them.

    Raises:
        CompilerMissingError: none; Triton would fail with a traceback that names no package.
    """
    if c_compiler() is None:
        raise CompilerMissingError(
            "grpo: on a GPU the log-probs of long batches are computed by Triton, which needs a C "
            "compiler, and there is none (CC, gcc, clang); install gcc and the C library's headers "
            "(libc6-dev)"
        )
