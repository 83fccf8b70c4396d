"""What a run takes from outside, checked before anything is written.

Questions, reward functions of one's own, the checkpoint it starts from and the pulls towards it,
heads that stay as they are.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import Config, resolve_model
from environments.dialects import get_dialect
from rewards.functions import RewardFunction, check_columns, load_functions
from train.frozen import FrozenHeads, choose_heads
from train.settings import count_completions, resolved_grpo, zero_stage

logger = logging.getLogger(__name__)


@dataclass
class Given:
    """What a run takes from files of the user's or of the world."""

    questions: list[dict[str, Any]]
    """of the training"""
    held_out: list[dict[str, Any]]
    """of the evaluation"""
    functions: list[RewardFunction]
    """reward functions of one's own"""
    frozen: FrozenHeads | None = None
    """heads that stay as they are"""


def read_given(config: Config, n_processes: int = 1) -> Given:
    """Reads questions and reward functions, and checks what can be checked of them.

    Fewer questions than a rollout asks come in it more than once, each time as a group of its own:
    TRL would drop the rollout that it cannot fill, and train nothing without a word.

    Raises:
        BenchmarkError: a bad row.
        RewardError: a function that cannot be used on these questions.
        EnvironmentSetupError: a dialect that cannot be read.
    """
    from train.worlds import count_shared, load_eval_questions, load_train_questions

    get_dialect(config.environment.dialect)
    functions = load_functions(config.reward_functions)
    given = Given(load_train_questions(config), load_eval_questions(config), functions)
    check_columns(functions, given.questions)
    n_shared = count_shared(given.questions, given.held_out)
    if n_shared:
        logger.warning(
            "%d of %d evaluation questions are trained on: the evaluation shows memory; keep them "
            "apart by environment.train_benchmark.split and eval_benchmark.split",
            n_shared, len(given.held_out),
        )  # fmt: skip
    grpo = resolved_grpo(config)
    needed = count_completions(grpo, n_processes)[0] // grpo["num_generations"]
    if len(given.questions) < needed:
        times = math.ceil(needed / len(given.questions))
        logger.info(
            "%d questions for rollouts of %d: each is asked %d times an epoch",
            len(given.questions), needed, times,
        )  # fmt: skip
        given.questions *= times
    return given


def check_one_gpu(command: str) -> None:
    """Refuses several GPUs to a stage that runs in one process.

    transformers would put a replica on each, with a batch of its own, and ours work on the first
    alone.

    Args:
        command: the stage, for the message.

    Raises:
        ConfigError: more than one GPU is visible.
    """
    import torch

    n_gpus = torch.cuda.device_count()
    if n_gpus > 1:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES: {n_gpus} GPUs are visible, and {command} runs on one; set it "
            "to one of them, for instance to 0"
        )


def check_start(init: str) -> None:
    """Checks that a merged start still holds the tensors that its merge.json records.

    Raises:
        ConfigError: A tensor is missing, added, or of another shape.
    """
    if not (Path(init) / "merge.json").is_file():
        return
    from merge.errors import MergeError
    from merge.verify import check_folder

    try:
        check_folder(init)
    except MergeError as error:
        raise ConfigError(
            f"models.init: {error}; `obm merge verify {init}` checks every byte"
        ) from error


def check_pulls(config: Config) -> None:
    """Checks that the pulls towards the start, KL and anchor, can do what they say.

    Raises:
        ConfigError: one of them would do nothing, or something else.
    """
    has_adapter = config.lora.r > 0
    if config.models.reference != "init":
        if not resolved_grpo(config)["beta"]:
            raise ConfigError(
                "models.reference: without a KL term nothing is pulled there; set grpo.beta above "
                "0, or models.reference to init"
            )
        if has_adapter:
            raise ConfigError(
                "models.reference: with an adapter the reference is the policy without it; set "
                "models.reference to init, or lora.r to 0"
            )
    if config.algorithm.anchor > 0.0:
        if has_adapter:
            raise ConfigError(
                "algorithm.anchor: an adapter leaves the anchored weights alone; set "
                "algorithm.anchor to 0, or lora.r to 0"
            )
        if zero_stage(config) == 3:
            raise ConfigError(
                "algorithm.anchor: needs whole parameters, which ZeRO-3 does not keep; use "
                "deepspeed: zero2, or set algorithm.anchor to 0"
            )
        if resolved_grpo(config).get("fp16"):
            raise ConfigError(
                "algorithm.anchor: fp16 scales the gradients of the loss, and not the pull; use "
                "grpo.bf16, or set algorithm.anchor to 0"
            )


def choose_reference(config: Config, init: str) -> str | None:
    """Where TRL shall load the reference policy of the KL term, or None where it loads none.

    Raises:
        ConfigError: no such checkpoint.
        PolicyLoadError: a revision on the hub that cannot be read.
    """
    if not resolved_grpo(config)["beta"] or config.lora.r > 0:
        return None
    from train.policy import snapshot_folder

    reference = config.models.reference
    return snapshot_folder(init if reference == "init" else resolve_model(reference))


def make_anchor(config: Config, init: str, model: Any) -> Any:
    """The pull towards the start that `algorithm.anchor` asks for, or None.

    Raises:
        ConfigError: no statistics, or statistics of another model.
    """
    if config.algorithm.anchor == 0.0:
        return None
    from train.anchor import SaliencyAnchor, anchor_statistics

    folders = config.algorithm.anchor_stats
    return SaliencyAnchor(model, anchor_statistics(init, folders), config.algorithm.anchor)


def choose_frozen(config: Config, init: str) -> FrozenHeads | None:
    """The heads that `freeze_heads` keeps out of the training, or None.

    Raises:
        ConfigError: no conflict map, or heads that are not known.
    """
    if config.freeze_heads.source == "none":
        return None
    from train.heads import head_layout
    from train.policy import load_config as load_model_config

    return choose_heads(config.freeze_heads, head_layout(load_model_config(init)), init)
