"""From the settings file to TRL's GRPOConfig: the defaults, and what a file must not set.

Everything under `grpo:` goes to GRPOConfig as it stands; the defaults below fill the gaps. No torch
at import, so a dry run is quick.
"""

from __future__ import annotations

import atexit
import difflib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from configs.checks import convert
from configs.errors import ConfigError
from configs.sections import Between, NotNegative
from train.deepspeed_json import deepspeed_path, read_deepspeed, require_compiler
from train.gpu import computes_in_bf16

if TYPE_CHECKING:
    from trl import GRPOConfig

    from configs.schema import Config


class Generation(TypedDict):
    """What the rollout reads of `generation_kwargs`."""

    max_new_tokens: Annotated[int, Between(1, 1e9)]


GRPO_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_steps": 40,
    "num_generations": 16,
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 384,
    "generation_kwargs": {"max_new_tokens": 64},  # of one turn
    "temperature": 1.0,
    "beta": 0.0,
    "loss_type": "dapo",
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "activation_checkpointing": False,  # the scoring forward is short; turn on for large models
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # it would log 0 for a loss that is no number
    "save_strategy": "steps",
    "save_steps": 20,
    "save_total_limit": 2,
    "dataloader_num_workers": 0,
    "report_to": "none",  # W&B is fed by train.callbacks, which also keeps the run id
    "log_completions": False,
    "log_multimodal": False,
    "disable_tqdm": True,
}

Count = Annotated[int, Between(1, 1e9)]
Size = Annotated[int, Between(0, 1e9)]
Share = Annotated[float, Between(0, 1)]
Above = Annotated[float, Between(0, above=True)]
NoLess = Annotated[float, NotNegative]
Beta = Annotated[float, Between(0, 0.999999)]

# Type and range of TRL's settings, known without it: importing it takes seconds, which a dry run,
# the plan of a study and `obm watch` need not wait for. Null where TRL and our arithmetic take it;
# whole numbers end where no run gets to and torch still counts.
KINDS: dict[str, Any] = {
    # length of a run, shape of a step
    "max_steps": Count,
    "num_generations": Annotated[int, Between(2, 1e9)],  # one alone has no advantage
    "per_device_train_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "generation_batch_size": Count | None,
    "steps_per_generation": Count | None,
    "num_iterations": Count,
    "shuffle_dataset": bool | None,
    "dataloader_num_workers": Size,
    # sampling
    "max_completion_length": Count,
    "generation_kwargs": Generation | None,
    "temperature": Above,
    "top_p": Annotated[float, Between(0, 1, above=True)],
    "top_k": Size,
    "min_p": Share | None,
    "repetition_penalty": Above,
    # loss
    "loss_type": Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"],
    "beta": NoLess,
    "delta": NoLess | None,
    "epsilon": NoLess,
    "epsilon_high": NoLess | None,
    "entropy_coef": float,
    "top_entropy_quantile": Share,
    "importance_sampling_level": Literal["token", "sequence"],
    "scale_rewards": Literal["group", "batch", "none", True, False],
    "mask_truncated_completions": bool,
    # optimizer
    "optim": Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
        "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad",
        "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit",
        "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
        "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
        "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
        "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
        "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw",
        "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
    ],
    "learning_rate": NoLess,
    "lr_scheduler_type": Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr",
        "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
    ],
    "warmup_steps": NoLess,  # below 1 a share of the run
    "weight_decay": NoLess,
    "adam_beta1": Beta,
    "adam_beta2": Beta,
    "adam_epsilon": NoLess,
    "max_grad_norm": NoLess,
    # precision and memory
    "bf16": bool | None,
    "fp16": bool,
    "tf32": bool | None,
    "use_cpu": bool,
    "activation_checkpointing": bool | None,
    "gradient_checkpointing": bool,
    # files and words
    "logging_steps": Above,  # below 1 a share of the run, as save_steps
    "logging_nan_inf_filter": bool,
    "save_strategy": Literal["no", "steps", "epoch", "best"],
    "save_steps": Above,
    "save_total_limit": Size | None,
    "report_to": str | None,
    "log_completions": bool,
    "log_multimodal": bool,
    "disable_tqdm": bool | None,
}  # fmt: skip
KNOWN_NAMES = frozenset(KINDS)

SAMPLED_WITH = "temperature, top_p and generation_kwargs.max_new_tokens (per turn)"
UNREAD: dict[str, Any] = {"top_k": 0, "min_p": None, "repetition_penalty": 1.0}
"""TRL's settings of sampling that the search rollout does not read, and what changes nothing."""

VLLM_KEYS = (
    "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length",
    "vllm_tensor_parallel_size", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
)  # fmt: skip
"""TRL's settings of its own vLLM support, and of the correction that `rollout` sets."""

RESERVED = {
    "output_dir": "set `output`",
    "seed": "set the top-level `seed`",
    "data_seed": "set the top-level `seed` (order) or `environment.data_seed` (questions)",
    "num_train_epochs": "set `grpo.max_steps`",
    "deepspeed": "set the top-level `deepspeed`",
    "run_name": "set `tracking.arm`",
    "reward_weights": "set the section `rewards`",
    "use_vllm": "set `rollout.backend: vllm`; docs/vllm.md says how to serve",
    **dict.fromkeys(VLLM_KEYS, "set the section `rollout`: url, importance_correction and others"),
    "eval_strategy": "set `compare.eval_every`",
    "eval_steps": "set `compare.eval_every`",
    "ds3_gather_for_generation": "processes take different numbers of turns, so weights in shares "
    "would be waited for; where they do not fit as a whole, set `rollout.backend: vllm`",
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        "`models.reference` stays what it is for the whole run; no checkpoint holds one that "
        "moves, so `--resume` would go on from the first",
    ),
    "chat_template_kwargs": "a prompt is the dialect's, by the checkpoint's own chat template; "
    "change the template",
    "save_only_model": "a run goes on from the optimizer too; set `grpo.save_total_limit` to save "
    "disk",
}


def resolved_grpo(config: Config) -> dict[str, Any]:
    """The `grpo:` section over the defaults.

    Raises:
        ConfigError: an unknown key, one that another section decides or the rollout does not read,
            or a value that is no setting of its key.
    """
    for name in config.grpo:
        if name in RESERVED:
            raise ConfigError(f"grpo.{name}: decided elsewhere; {RESERVED[name]}")
        if name not in KNOWN_NAMES and name not in (known := _grpo_names()):
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean '{near[0]}'?" if near else "see TRL's GRPOConfig for the names"
            raise ConfigError(f"grpo.{name}: unknown key; {fix}")
        _check_value(name, config.grpo[name])
        if name in UNREAD and config.grpo[name] != UNREAD[name]:
            raise ConfigError(
                f"grpo.{name}: not read by the search rollout, which samples with {SAMPLED_WITH}; "
                "remove it"
            )
    settings = {**GRPO_DEFAULTS, **config.grpo}
    if "gradient_checkpointing" in config.grpo:  # the older name of the same switch
        settings.pop("activation_checkpointing")
    if settings["loss_type"] == "cispo" and settings.get("epsilon_high") is None:
        raise ConfigError(
            "grpo.epsilon_high: missing; loss_type cispo clips at epsilon_high alone and TRL would "
            "take 0.2, which stops learning; set it, 5.0 for instance"
        )
    if config.rollout.backend == "vllm":
        _check_for_server(config, settings)
    return settings


def episode_lengths(grpo: Mapping[str, Any]) -> dict[str, int]:
    """Most tokens of an episode (`max_completion_length`) and of one turn (`max_new_tokens`).

    Args:
        grpo: of `resolved_grpo`.
    """
    budget = grpo["max_completion_length"]
    per_turn = (grpo["generation_kwargs"] or {}).get("max_new_tokens", budget)
    return {"max_completion_length": budget, "max_new_tokens": per_turn}


def _check_value(name: str, value: Any) -> None:
    """Holds a value against `KINDS`; TRL gets it as it was written.

    Raises:
        ConfigError: wrong type, out of range or unknown choice.
    """
    kind = KINDS.get(name, Any)
    if name == "report_to" and isinstance(value, list):
        kind = list[str]
    try:
        convert(value, kind, f"grpo.{name}", lambda key: "")
    except ConfigError as error:  # which file set it is not known here
        raise ConfigError(str(error).removeprefix(":")) from None


def _check_for_server(config: Config, settings: dict[str, Any]) -> None:
    """Settings that do not go with a vLLM server.

    Raises:
        ConfigError: a nucleus, a temperature above 2, or a correction that the loss cannot take.
    """
    if settings.get("top_p", 1.0) < 1.0:
        raise ConfigError(
            "grpo.top_p: a vLLM server reports the log-probs of the nucleus, not the policy's; "
            "set it to 1.0, or rollout.backend to in_process"
        )
    if settings["temperature"] > 2.0:
        raise ConfigError(
            f"grpo.temperature: a vLLM server takes 2.0 at most, not {settings['temperature']}; "
            "lower it, or set rollout.backend to in_process"
        )
    correction = config.rollout.importance_correction
    if settings["loss_type"] == "vespo" and correction.startswith("sequence"):
        raise ConfigError(
            "rollout.importance_correction: loss_type vespo weighs sequences itself; "
            "use token_truncate, token_mask or none"
        )


def zero_stage(config: Config) -> int:
    """Stage of ZeRO that the DeepSpeed settings ask for; 0 without DeepSpeed.

    Raises:
        ConfigError: see `train.deepspeed_json.read_deepspeed`.
    """
    path = deepspeed_path(config.deepspeed)
    if path is None:
        return 0
    return int(read_deepspeed(path).get("zero_optimization", {}).get("stage", 0))


def asked_words(environment: Mapping[str, Any], per: str = "", *, has_kinds: bool = True) -> str:
    """What an evaluation asks, for example `128 dev questions (kinds: two)`.

    Args:
        environment: the section as plain data, as reports keep it.
        per: stands behind `questions`, such as ` a seed`.
        has_kinds: name the kinds of the atlas' questions; those of a benchmark always are.
    """
    chosen: dict[str, Any] = {}
    benchmark = environment.get("eval_benchmark") or {}
    if benchmark.get("name", "atlas") != "atlas":
        which = benchmark["name"]
        keys = ("source", "split", "kinds", "pictured", "limit")
        chosen = {key: benchmark[key] for key in keys if benchmark.get(key)}
    else:
        which = f"{environment.get('eval_size')} {environment.get('eval_split')}"
        if has_kinds:
            chosen = {"kinds": environment.get("eval_kinds") or []}
    details = "; ".join(
        f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in chosen.items()
    )
    return f"{which} questions{per}{f' ({details})' if details else ''}"


def check_rollout_address(config: Config) -> None:
    """Holds the vLLM server's address against what its client takes; asks nobody.

    Raises:
        ConfigError: it is no address.
    """
    if config.rollout.backend != "vllm":
        return
    from train.vllm_client import VLLMClient

    try:
        VLLMClient(config.rollout.url)
    except (ValueError, RuntimeError) as error:  # what the client raises for it
        raise ConfigError(str(error)) from error


def steps_per_generation(grpo: dict[str, Any], n_processes: int) -> int:
    """Micro-batches that a rollout serves, as TRL derives them."""
    if grpo.get("generation_batch_size"):
        rows = grpo["per_device_train_batch_size"] * n_processes
        return max(1, grpo["generation_batch_size"] // rows)
    return int(grpo.get("steps_per_generation") or grpo["gradient_accumulation_steps"])


def trains_in_bf16(grpo: dict[str, Any]) -> bool:
    """Whether a GPU computes in bfloat16, on which evaluations there follow the training."""
    return bool(grpo.get("bf16", True))


def count_completions(grpo: dict[str, Any], n_processes: int) -> tuple[int, int]:
    """Completions of a rollout and of an optimizer step, all processes together."""
    rows = grpo["per_device_train_batch_size"] * n_processes
    served = rows * steps_per_generation(grpo, n_processes)
    per_step = rows * grpo["gradient_accumulation_steps"]
    return grpo.get("generation_batch_size") or served, per_step


def describe_step(config: Config, n_processes: int) -> list[tuple[str, str]]:
    """The arithmetic of one optimizer step, as (name, value) pairs for a dry run.

    Raises:
        ConfigError: the completions of a step cannot be cut into whole groups, DeepSpeed's settings
            cannot be read, or an address is none.
    """
    grpo = resolved_grpo(config)
    zero_stage(config)
    check_rollout_address(config)
    per_device, group = grpo["per_device_train_batch_size"], grpo["num_generations"]
    completions, per_step = count_completions(grpo, n_processes)
    if completions % group:
        served = steps_per_generation(grpo, n_processes)
        raise ConfigError(
            f"grpo.num_generations: {completions} completions ({n_processes} processes x "
            f"{per_device} x {served}) cannot be cut into groups of {group}; "
            "change one of the numbers"
        )
    return [
        ("optimizer steps", str(grpo["max_steps"])),
        ("completions per step", f"{per_step} ({n_processes} processes x {per_device} x "
         f"{grpo['gradient_accumulation_steps']})"),
        ("questions per rollout", f"{completions // group} x {group} completions"),
        ("rollout", config.rollout.backend if config.rollout.backend == "in_process" else
         f"vLLM at {config.rollout.url}, correction {config.rollout.importance_correction}"),
        ("tokens per episode", f"at most {grpo['max_completion_length']}, observations included"),
        ("evaluations", f"every {config.compare.eval_every} steps, "
         f"{asked_words(asdict(config.environment))}"),
        ("deepspeed", config.deepspeed or "none"),
        ("output", config.output),
        ("W&B", f"{config.tracking.project} / {config.tracking.group or '-'} / "
         f"{config.arm_name}-s{config.seed}"),
    ]  # fmt: skip


def build_grpo_config(
    config: Config, checkpoints: Path, *, load_universal: bool = False
) -> GRPOConfig:
    """TRL's settings of a run.

    Creating them starts torch.distributed when a launcher asked for it.

    Args:
        config: the experiment.
        checkpoints: folder for transformers' checkpoints.
        load_universal: DeepSpeed goes on from a checkpoint of another number of processes.

    Raises:
        ConfigError: a value that TRL refuses; the message is TRL's.
    """
    import torch
    from trl import GRPOConfig

    has_gpu = torch.cuda.is_available()
    settings = {
        "use_cpu": not has_gpu,
        "bf16": computes_in_bf16(),
        "ddp_timeout": collective_timeout_s(config.hang_timeout_s),
        **resolved_grpo(config),
    }
    path = deepspeed_path(config.deepspeed)
    if path is not None:
        require_compiler(path)
        prepare_deepspeed(has_gpu)
        settings["deepspeed"] = path
        if load_universal:
            settings["deepspeed"] = {**read_deepspeed(path), "checkpoint": {"load_universal": True}}
    try:
        return GRPOConfig(output_dir=str(checkpoints), seed=config.seed, **settings)
    except (TypeError, ValueError, AttributeError) as error:  # a value of another type than theirs
        raise ConfigError(f"grpo: {error}") from error


def collective_timeout_s(hang_timeout_s: float | None) -> int:
    """Seconds after which torch.distributed itself gives up on a collective.

    Later than the watchdog, which says who was where; a process may wait so long for one that
    still makes progress.
    """
    week = 7 * 24 * 3600
    return week if hang_timeout_s is None else int(2 * hang_timeout_s) + 60


def prepare_deepspeed(has_gpu: bool) -> None:
    """Makes DeepSpeed start on any machine: without a compiler and without its launcher."""
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    import deepspeed

    if not has_gpu:
        # an optional shared-memory collective that DeepSpeed would compile with g++ at start;
        # gloo does the same work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if sys.version_info < (3, 11, 4):
        name_enums_by_value()


LET_GO_S = 0.5
"""Time that the threads of a group get which something still refers to."""


def leave_group_at_exit() -> None:
    """Has a process whose work is done leave torch.distributed before its interpreter ends.

    A thread of gloo may still hold the tensors of the last collective. Letting go of them while the
    interpreter ends aborts the process, and the launcher calls a finished run failed. A process
    that fails must not ask for it: it could wait for others in a collective that they never join.
    Later and not at once, since a program may train again with the same group.
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # What DeepSpeed still refers to outlives this, its threads too. One that has a tensor to
        # let go of waits for the interpreter's lock, which a sleeping process has given up.
        time.sleep(LET_GO_S)


def name_enums_by_value() -> None:
    """Checkpoints hold a member of an enum as class and value, in every Python alike.

    Python 3.11.0 to 3.11.3 pickle it as `getattr(class, name)`, and a file that names `getattr` can
    run code: the check before resuming would refuse our own checkpoint.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _grpo_names() -> set[str]:
    from trl import GRPOConfig

    return {item.name for item in fields(GRPOConfig) if item.init}


def refuse_unused_sampling(args: Any, generation: dict[str, Any]) -> None:
    """Settings that the rollout does not read must not be set in silence.

    Args:
        args: TRL's GRPOConfig.
        generation: what is left of its `generation_kwargs`.

    Raises:
        ValueError: names them.
    """
    unused = [f"generation_kwargs.{name}" for name in generation]
    unused += [name for name, value in UNREAD.items() if getattr(args, name) != value]
    unused += ["use_vllm"] if args.use_vllm else []
    if unused:
        raise ValueError(
            f"grpo: {', '.join(unused)} is not supported by the search rollout; it samples with "
            f"{SAMPLED_WITH}"
        )
