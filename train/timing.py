"""Seconds of the stages of a step, and of work that no line of ours surrounds: a module's forward,
the optimizer's step.

A GPU works on after a call has returned, so on CUDA every timer waits for the
device first; otherwise a stage's time would be found in the next one that reads a number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from train.watchdog import WHOLE_STEP, progress

Record = Callable[[float], None]
"""Takes the seconds of one call."""


def clock() -> float:
    """Seconds of a steady clock, with the device's work up to here done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def timed(stage: str, record: Record) -> Iterator[None]:
    """The block is a stage for the watchdog; its seconds are reported, also when it raises."""
    start = clock()
    try:
        with progress.stage(stage):
            yield
    finally:
        record(clock() - start)


def time_forward(module: Any, record: Record) -> None:
    """Reports the seconds of every forward of `module`; its backward is not seen."""
    started: list[float] = []

    def start(*_: Any) -> None:
        started.append(clock())

    def stop(*_: Any) -> None:
        if started:
            record(clock() - started.pop())

    module.register_forward_pre_hook(start)
    # also when the forward raises, so that a later call does not count from this one's start
    module.register_forward_hook(stop, always_call=True)


class OptimizerStage(TrainerCallback):
    """Times the update: plain torch's between two events, DeepSpeed's within the backward.

    Args:
        trainer: of transformers.
        timed: gives a block that counts for a stage.
    """

    def __init__(self, trainer: Any, timed: Callable[[str], AbstractContextManager[None]]) -> None:
        self.trainer, self.timed, self._stack = trainer, timed, ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the timer around DeepSpeed's step, where there is one."""
        engine = self.trainer.deepspeed
        if engine is None:
            return
        step = engine.step

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            with self.timed("optimizer"):
                return step(*args, **kwargs)

        engine.step = timed_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The update begins."""
        self._stack.enter_context(self.timed("optimizer"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The update has ended."""
        self._stack.close()


def speeds(n_tokens: int, seconds: Mapping[str, float]) -> dict[str, float]:
    """Policy tokens per second, of all processes together.

    Args:
        n_tokens: tokens that the policies of all processes sampled.
        seconds: of one process by stage; the processes wait for each other, so its wall is theirs.

    Returns:
        `speed/tokens_per_s` over whole training steps (evaluations and checkpoints left out) and
        `speed/rollout_tokens_per_s` over rollouts with the wait for the slowest process; neither
        where nothing was rolled out.
    """
    rollout = seconds.get("rollout", 0.0) + seconds.get("sync", 0.0)
    step = sum(seconds.get(stage, 0.0) for stage in WHOLE_STEP)
    if not n_tokens or not rollout or not step:
        return {}
    return {
        "speed/tokens_per_s": round(n_tokens / step, 2),
        "speed/rollout_tokens_per_s": round(n_tokens / rollout, 2),
    }
