"""Training steps of one side on one or more workloads, in a process of its own.

    python -m launch.bench_rollout_step '{"side": "ours", "works": [{"policy": "tiny"}]}' FILE

Writes one record a workload to FILE: what was done, CPU seconds by stage, peak memory. Started by
`launch.bench_rollout`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import TrainerCallback
from trl import GRPOConfig

from environments.dialects import SEARCH_R1
from environments.episode import SearchEnvironment
from environments.tools import Hit
from launch.bench_rollout_clock import PeakMemory, StageClock
from launch.bench_rollout_peer import make_peer
from launch.bench_rollout_work import OURS, TITLE, Script, Workload, make_policy
from train.batch import TokenBatch
from train.grpo import SearchGRPOTrainer


def main(arguments: list[str]) -> int:
    """Measures the workloads of a task one after the other."""
    task, path = json.loads(arguments[0]), Path(arguments[1])
    torch.set_num_threads(1)
    records = [
        measure(task["side"], Workload(**work), task["steps"], task["warm_steps"])
        for work in task["works"]
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return 0


def measure(side: str, work: Workload, steps: int = 1, warm_steps: int = 0) -> dict[str, Any]:
    """Trains some steps.

    Args:
        side: ours or trl.
        work: the group.
        steps: counted steps.
        warm_steps: steps before them.

    Returns:
        The workload; the policy's number of parameters; `done`, what one step read and wrote;
        `figures`: CPU seconds, means over the steps, and growth of resident memory in MB
        (`*_mb`), that of the worst step.
    """
    with StageClock() as clock, tempfile.TemporaryDirectory() as folder:
        settings = common_settings(work, steps + warm_steps, folder)
        trainer = (make_ours if side == "ours" else make_peer)(work, settings, clock)
        watch = Watch(trainer, clock)
        warm_up(trainer.model)
        trainer.train()
    counted = watch.steps[warm_steps:]
    figures = {
        name: (max if name.endswith("_mb") else mean)([step[name] for step in counted])
        for name in counted[0]
    }
    n_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "side": side,
        "work": asdict(work),
        "parameters": n_parameters,
        "done": watch.done,
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }


def common_settings(work: Workload, n_steps: int, folder: str) -> dict[str, Any]:
    """GRPOConfig's arguments for both sides: one group a step, no activation checkpointing."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": n_steps,
        "per_device_train_batch_size": work.group,
        "num_generations": work.group,
        "max_completion_length": work.completion_tokens,
        "learning_rate": 1e-6,
        "dataloader_pin_memory": False,
    }


class Watch(TrainerCallback):
    """Takes the figures of every step.

    Args:
        trainer: of either side, its own stages wrapped already.
        clock: has them.
    """

    def __init__(self, trainer: Any, clock: StageClock) -> None:
        self.clock = clock
        self.steps: list[dict[str, float]] = []
        self.done: dict[str, int] = {}
        self._memory_mb: dict[str, float] = {}
        trainer.add_callback(self)
        # outermost first: what is noted before the loss is no part of it
        clock.wrap(trainer, "compute_loss", "loss")
        note = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, *a, **k: note(
            model, self._note(inputs), *a, **k
        )
        clock.wrap(trainer.accelerator, "backward", "backward")
        clock.wrap(trainer.model.model.visual, "forward", "vision")
        clock.wrap(trainer.processing_class.image_processor, "preprocess", "pixels")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts clock and memory."""
        self.clock.seconds.clear()
        self._memory = PeakMemory()
        self._begin = time.process_time()

    def _note(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the step is about to learn from; handed on as it is."""
        self._memory_mb = {"rollout_mb": self._memory.growth_mb}
        self.done = describe(inputs)
        return inputs

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the backward."""
        self._memory_mb["backward_mb"] = self._memory.growth_mb
        self._before_optimizer = time.process_time()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the optimizer's own step."""
        self._optimizer_s = time.process_time() - self._before_optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds a record."""
        step_s = time.process_time() - self._begin
        total = self.clock.total
        prefill = total("prefill", within="rollout")
        self.steps.append(
            {
                "step": step_s,
                "rollout": total("rollout"),
                "prefill": prefill,
                # TRL samples inside `generate`; what is not its prefill is decoding
                "decode": total("decode") or total("generate") - prefill,
                "pixels": total("pixels"),
                "vision in rollout": total("vision", within="rollout"),
                "vision in loss": total("vision", within="loss"),
                "loss forward": total("loss"),
                "backward": total("backward"),
                "optimizer": self._optimizer_s,
                **self._memory_mb,
                "step_mb": self._memory.growth_mb,
            }
        )


def describe(inputs: dict[str, Any]) -> dict[str, int]:
    """What a batch holds: the part that has to be equal on both sides."""
    policy = inputs["completion_mask"] * inputs["tool_mask"]
    pictures = inputs["pictures"] if "pictures" in inputs else inputs["num_images"]
    return {
        "rows": len(policy),
        "rows with a gradient": int((inputs["advantages"] != 0).sum()),
        "different rows": len({tuple(row) for row in inputs["completion_ids"].tolist()}),
        "prompt tokens": int(inputs["prompt_mask"].sum()),
        "policy tokens": int(policy.sum()),
        "observation tokens": int(inputs["completion_mask"].sum() - policy.sum()),
        "pictures": sum(len(row) if isinstance(row, list) else int(row) for row in pictures),
    }


def warm_up(model: Any) -> None:
    """A forward and a backward of a few tokens: what the libraries do once is not measured."""
    ids = torch.zeros((2, 16), dtype=torch.long)
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    model.zero_grad()


# ---------------------------------------------------------------- our side


def make_ours(work: Workload, settings: dict[str, Any], clock: StageClock) -> SearchGRPOTrainer:
    """Our trainer for a workload, with its stages timed.

    Args:
        work: the group.
        settings: of GRPOConfig, those of both sides.
        clock: gets the stages.
    """
    model, processor = make_policy(work.policy)
    script = Script(work, OURS, processor)
    picture = script.picture()
    spoken = dict.fromkeys(range(work.turns + 1), 0)

    def say(question: dict[str, Any], turn: int) -> str:
        # rows of a turn come in order, step after step
        row = spoken[turn] % work.group
        spoken[turn] += 1
        return script.turn(row, turn)

    def render(question: str) -> str:
        messages = SEARCH_R1.prompt(question, has_image=True)
        prompt = processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(prompt)

    question = {
        "id": "q",
        "question": script.question(render, picture),
        "answers": [TITLE],
        "image": picture,
    }
    environment = SearchEnvironment(
        _Texts(script), _Pictures(script), dialect=SEARCH_R1, thumbnails=True,
        text_searches=work.turns, image_searches=work.turns, max_turns=work.turns + 1,
    )  # fmt: skip
    trainer = SearchGRPOTrainer(
        model,
        args=GRPOConfig(**settings, generation_kwargs={"max_new_tokens": work.turn_tokens}),
        questions=[question],
        environment=environment,
        rewards={"accuracy": 1.0, "format": 0.0, "search_penalty": 0.0},
        processing_class=processor,
        script=say,
    )
    clock.wrap(trainer, "_generate", "rollout")
    # the class itself: a wave makes its own batch
    for method, stage in (("append", "prefill"), ("sample", "decode"), ("decode", "decode")):
        clock.wrap(TokenBatch, method, stage)
    return trainer


class _Texts:
    """Text search of the script."""

    in_memory = True

    def __init__(self, script: Script) -> None:
        self.script = script

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """One passage a query."""
        return [[Hit("p", TITLE, self.script.text_result())] for _ in queries]


class _Pictures:
    """Image search of the script."""

    in_memory = True

    def __init__(self, script: Script) -> None:
        self.script = script

    def search(self, images: list[Any], k: int) -> list[list[Hit]]:
        """Two pictures a query, the first of them with a long title."""
        found = []
        for _ in images:
            words, pictures = self.script.image_result()
            titles = (TITLE + words, TITLE)
            found.append(
                [Hit("p", title, image=p) for title, p in zip(titles, pictures, strict=True)]
            )
        return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
