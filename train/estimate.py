"""What a dry run prints of memory and time: the plan of a settings file, its estimate, the fix.

`obm train --dry-run --machine h100x8` needs no GPU, no weights and no hub: shapes come from a local
config.json or a card (`train.shapes`), the arithmetic from `train.memory` and `train.duration`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from train import plan as assumed
from train.deepspeed_json import deepspeed_path, read_deepspeed
from train.duration import seconds
from train.memory import (
    Memory,
    checkpoint_bytes,
    host_bytes,
    memory,
    server_bytes,
    server_replicas,
    server_slots,
    server_split,
)
from train.network import step_bytes
from train.plan import GB, MACHINES, SERVER_WEIGHTS, Machine, Plan
from train.settings import (
    episode_lengths,
    resolved_grpo,
    steps_per_generation,
    trains_in_bf16,
)
from train.shapes import find_shape
from train.worlds import is_benchmark

if TYPE_CHECKING:
    from configs.schema import Config

DEFAULT_MACHINE = "h100"
CHARS_PER_TOKEN = 4.0
"""Of English in Qwen's vocabulary; prompts and results are counted by it."""
QUESTION_TOKENS, TEMPLATE_TOKENS = 30, 40
"""A question, and what the chat template puts around it."""
MOST_SERVER_GPUS = 64
"""No proposal is larger."""
MOST_PROCESSES = 65536
"""Of a plan, and accelerators of a server; far above the largest clusters."""
MOST_TOKENS = 100_000_000
"""Of a prompt."""
LORA_RANK = 32
"""Of the adapter that is proposed where nothing else helps."""


def add_estimate_arguments(parser: argparse.ArgumentParser) -> None:
    """What a dry run needs beside the settings; both entry points have these."""
    parser.add_argument(
        "--machine",
        default=DEFAULT_MACHINE,
        help=f"of a dry run's estimate: {', '.join(MACHINES)}; h100x8 = eight, one process each",
    )
    parser.add_argument(
        "--server-gpus",
        type=int,
        metavar="N",
        default=1,
        help="of a dry run's estimate: accelerators of the vLLM server, beside the trainer's",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="of a dry run's estimate: a prompt with its picture (default: the environment's)",
    )


def estimate_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Those of a parsed command line, as keyword arguments of `describe_estimate`.

    Raises:
        ConfigError: a number out of range.
    """
    # a server that shares the trainer's accelerators has none beside them
    check_number("--server-gpus", options.server_gpus, 0, MOST_PROCESSES)
    if options.prompt_tokens is not None:
        check_number("--prompt-tokens", options.prompt_tokens, 1, MOST_TOKENS)
    names = ("machine", "prompt_tokens", "server_gpus")
    return {name: getattr(options, name) for name in names}


def check_number(option: str, value: int, low: int, high: int) -> None:
    """Holds the number of an option against its range.

    Raises:
        ConfigError: it lies outside.
    """
    if not low <= value <= high:
        raise ConfigError(f"{option}: {value} is out of range; use a number from {low} to {high}")


@dataclass(frozen=True)
class Estimate:
    """A plan with its expected memory and time on a machine."""

    plan: Plan
    machine: Machine
    memory: Memory
    seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether the peak, and a server's weights, are no larger than the accelerator's memory."""
        weights = server_bytes(self.plan, self.machine) / SERVER_WEIGHTS
        return max(self.memory.peak, weights) <= self.machine.memory

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return sum(self.seconds.values())


def estimate(plan: Plan, machine: Machine) -> Estimate:
    """Memory and time of a plan."""
    return Estimate(plan, machine, memory(plan), seconds(plan, machine))


def find_machine(text: str, n_processes: int) -> tuple[Machine, int]:
    """Reads `h100` or `h100x8`.

    Args:
        text: a name of `MACHINES`, with a number of accelerators or without.
        n_processes: processes that are planned for.

    Returns:
        The machine and the number of processes: that of the name, if it has one.

    Raises:
        ConfigError: unknown name, a number out of range, or two that contradict each other.
    """
    match = re.fullmatch(r"(\w+?)(?:x([1-9]\d*))?", text.lower())
    if match is None or match[1] not in MACHINES:
        raise ConfigError(
            f"--machine: '{text}' is not known; choose one of {', '.join(MACHINES)}, with a number "
            "of accelerators where it matters (h100x8)"
        )
    digits = match[2] or str(n_processes)
    if len(digits) > len(str(MOST_PROCESSES)) or int(digits) > MOST_PROCESSES:
        raise ConfigError(
            f"--machine: '{text}' has too many accelerators; name {MOST_PROCESSES} at most"
        )
    named = int(digits)
    if n_processes not in (1, named):
        raise ConfigError(
            f"--machine: '{text}' has {named} accelerators but {n_processes} processes are asked "
            "for; make them equal"
        )
    return MACHINES[match[1]], named


# ---------------------------------------------------------------- from settings to a plan


def plan_of(
    config: Config, n_processes: int, prompt_tokens: int | None = None, server_gpus: int = 1
) -> Plan:
    """The numbers of a settings file.

    Args:
        config: the experiment.
        n_processes: processes of the trainer.
        prompt_tokens: tokens of a prompt with its picture; None = those of the environment.
        server_gpus: accelerators of the rollout server, where the settings name one.

    Raises:
        ConfigError: the model's shape is not known here, or settings that contradict each other.
    """
    grpo = resolved_grpo(config)
    shape, _ = find_shape(_local(config.models.init), config.models.vlm)
    lengths = episode_lengths(grpo)
    completion, per_turn = lengths["max_completion_length"], lengths["max_new_tokens"]
    searches = config.environment.image_searches + config.environment.text_searches
    turns = min(config.environment.max_turns, searches + config.environment.visits + 1)
    text, picture = world_prompt(config)
    prompt = text + picture if prompt_tokens is None else prompt_tokens
    accumulation = grpo["gradient_accumulation_steps"]
    rows = grpo["per_device_train_batch_size"]
    return Plan(
        shape=shape,
        n_processes=n_processes,
        rows=rows,
        accumulation=accumulation,
        group=grpo["num_generations"],
        prompt_tokens=prompt,
        picture_tokens=(prompt - text if prompt > text else 0) if shape.vision else 0,
        policy_tokens=min(turns * per_turn, completion),
        completion_tokens=completion,
        steps_per_generation=steps_per_generation(grpo, n_processes),
        has_own_steps_per_generation=bool(grpo.get("steps_per_generation")),
        iterations=grpo.get("num_iterations") or 1,
        is_bf16=trains_in_bf16(grpo),
        is_checkpointed=bool(
            grpo.get("gradient_checkpointing", grpo.get("activation_checkpointing"))
        ),
        has_reference=grpo["beta"] != 0.0,
        has_anchor=config.algorithm.anchor > 0,
        lora_rank=config.lora.r or None,
        lora_targets=tuple(config.lora.target_modules) if config.lora.target_modules else None,
        is_vision_frozen=config.models.freeze_vision,
        server_gpus=server_gpus if config.rollout.backend == "vllm" else 0,
        **_sharding(config),
    )


def world_prompt(config: Config) -> tuple[int, int]:
    """Tokens of a prompt's text and of its picture, by the environment's own sizes.

    Text: the dialect's instruction by CHARS_PER_TOKEN, the question, the template. Picture: one
    token for 28 x 28 pixels, Qwen2.5-VL's patches of 14 merged two by two; of a benchmark's
    pictures those that models.max_pixels lets through.
    """
    from environments.atlas.photos import PHOTO_SIZE
    from environments.dialects import get_dialect

    messages = get_dialect(config.environment.dialect).prompt("", has_image=True)
    n_chars = sum(len(part.get("text", "")) for m in messages for part in _parts(m["content"]))
    text = round(n_chars / CHARS_PER_TOKEN) + QUESTION_TOKENS + TEMPLATE_TOKENS
    limit = config.models.max_pixels
    if limit is not None and is_benchmark(config.environment.train_benchmark):
        return text, limit // 28**2
    return text, (PHOTO_SIZE // 28) ** 2


def _parts(content: Any) -> list[dict[str, Any]]:
    """The parts of a chat message, of which a plain text is one."""
    return [{"text": content}] if isinstance(content, str) else content


def _local(reference: str | None) -> str | None:
    """A shipped checkpoint's folder; other references as they are."""
    if reference and reference.startswith("atlas://"):
        from configs.schema import resolve_model

        return resolve_model(reference)
    return reference


def _sharding(config: Config) -> dict[str, Any]:
    """ZeRO stage and offload of the DeepSpeed settings."""
    path = deepspeed_path(config.deepspeed)
    if path is None:
        return {"zero": 0, "has_deepspeed": False}
    zero = read_deepspeed(path).get("zero_optimization", {})
    return {
        "zero": int(zero.get("stage", 0)),
        "offload_optimizer": _is_offloaded(zero.get("offload_optimizer")),
        "offload_parameters": _is_offloaded(zero.get("offload_param")),
    }


def _is_offloaded(section: dict[str, Any] | None) -> bool:
    return bool(section) and (section or {}).get("device", "none") != "none"


# ---------------------------------------------------------------- the fix


def repair(found: Estimate) -> tuple[list[str], Estimate]:
    """Changes after which a plan fits, the cheap ones first; none if it fits or nothing helps.

    Returns:
        Settings to change, in words, and the estimate with them.
    """
    best = found
    for change in _repairs(found.plan, found.machine):
        if best.fits:
            break
        tried = estimate(replace(best.plan, **change), found.machine)
        if tried.memory.peak < best.memory.peak:
            best = tried
    return (_difference(found.plan, best.plan), best) if best.fits else ([], found)


def _repairs(plan: Plan, machine: Machine) -> Iterator[dict[str, Any]]:
    """Changes of a plan's fields, from the cheapest to the dearest."""
    yield {"is_checkpointed": True}
    if plan.n_processes > 1:
        # an anchor goes neither with ZeRO-3 nor with an adapter
        for stage in range(plan.zero + 1, 3 if plan.has_anchor else 4):
            if stage > 1:
                yield {"zero": stage, "has_deepspeed": True}
    if not plan.server_gpus and plan.weight_bytes * plan.n_stored > machine.memory:
        # no sharding helps a rollout, which needs whole weights: sample on other accelerators
        most = replace(plan, server_gpus=MOST_SERVER_GPUS)
        yield {"server_gpus": server_split(most, machine)}
    rows, factor = plan.rows, 1
    while rows > 1 and rows % 2 == 0:
        # the same completions a step and a rollout, in twice as many micro-batches
        rows, factor = rows // 2, factor * 2
        yield {
            "rows": rows,
            "accumulation": plan.accumulation * factor,
            "steps_per_generation": plan.steps_per_generation * factor,
        }
    stage = 3 if plan.zero >= 3 else 2
    yield {"zero": stage, "has_deepspeed": True, "offload_optimizer": True}
    if not plan.has_anchor:
        yield {"lora_rank": LORA_RANK}


def _difference(before: Plan, after: Plan) -> list[str]:
    """The settings that make one plan of the other."""
    changes = []
    if after.is_checkpointed != before.is_checkpointed:
        changes.append("grpo.activation_checkpointing=true")
    if (after.zero, after.offload_optimizer) != (before.zero, before.offload_optimizer):
        offload = "_offload" if after.offload_optimizer else ""
        changes.append(f"deepspeed=zero{after.zero}{offload}")
    if after.rows != before.rows:
        changes += [
            f"grpo.per_device_train_batch_size={after.rows}",
            f"grpo.gradient_accumulation_steps={after.accumulation}",
        ]
        if after.has_own_steps_per_generation:  # otherwise it follows
            changes.append(f"grpo.steps_per_generation={after.steps_per_generation}")
    if after.lora_rank != before.lora_rank:
        changes.append(f"lora.r={after.lora_rank}")
    if after.server_gpus != before.server_gpus:
        changes.append(f"rollout.backend=vllm --server-gpus {after.server_gpus}")
    return changes


# ---------------------------------------------------------------- the text


def describe_estimate(
    config: Config,
    n_processes: int,
    machine: str = DEFAULT_MACHINE,
    prompt_tokens: int | None = None,
    server_gpus: int = 1,
) -> str:
    """Expected memory and time as text for a dry run.

    A model whose shape is not known here is no mistake: the text says why there is no estimate.

    Raises:
        ConfigError: an unknown machine, or settings that contradict each other.
    """
    accelerator, n_processes = find_machine(machine, n_processes)
    try:
        _, origin = find_shape(_local(config.models.init), config.models.vlm)
    except ConfigError as error:
        return f"no estimate of memory and time: {error}"
    plan = plan_of(config, n_processes, prompt_tokens, server_gpus)
    found = estimate(plan, accelerator)
    return "\n".join(
        [
            *_head_lines(plan, accelerator, origin),
            *_prompt_lines(config, prompt_tokens),
            *_memory_lines(found),
            *_time_lines(found, resolved_grpo(config)["max_steps"]),
            *_assumption_lines(plan, accelerator),
        ]
    )


def _head_lines(plan: Plan, machine: Machine, origin: str) -> list[str]:
    shape = plan.shape
    sharded = f"ZeRO-{plan.zero}" if plan.has_deepspeed else "no DeepSpeed"
    parts = [
        f"vision {shape.n_vision / 1e6:,.1f}",
        f"embedding {shape.n_embedding / 1e6:,.1f}",
        f"language {shape.n_language / 1e6:,.1f}",
    ]
    words = [
        sharded + (" with offload" if plan.offload_optimizer else ""),
        "bf16" if plan.is_bf16 else "fp32",
        "checkpointed" if plan.is_checkpointed else "activations kept",
    ]
    words += [f"LoRA rank {plan.lora_rank}"] if plan.lora_rank else []
    return [
        f"expected on {plan.n_processes} x {machine.name} ({', '.join(words)})",
        f"parameters    {shape.n_parameters / 1e6:,.1f} M ({', '.join(parts)}; {origin})",
        f"an episode    prompt {plan.prompt_tokens} tokens ({plan.picture_tokens} of a picture), "
        f"policy at most {plan.policy_tokens}, with observations {plan.completion_tokens}",
    ]


def _prompt_lines(config: Config, prompt_tokens: int | None) -> list[str]:
    is_counted = prompt_tokens is not None or config.models.max_pixels is not None
    if is_counted or not is_benchmark(config.environment.train_benchmark):
        return []
    return [
        "WARNING: a prompt is counted with the atlas's small photo, not with a picture of "
        "environment.train_benchmark; say --prompt-tokens or set models.max_pixels"
    ]


def _memory_lines(found: Estimate) -> list[str]:
    result, plan = found.memory, found.plan
    always = [f"{name} {b / GB:.1f}" for name, b in result.always.items() if b]
    lines = [f"memory, GB    always {', '.join(always)}, context {assumed.CONTEXT_BYTES / GB:.1f}"]
    for phase, items in result.phases.items():
        shown = [f"{name} {b / GB:.1f}" for name, b in items.items() if b >= 0.05 * GB]
        total = result.total(phase) / GB
        lines.append(f"  {phase:<11} {total:6.1f} = always + {', '.join(shown) or 'little'}")
    n_local = min(plan.n_processes, found.machine.node)
    lines.append(f"  main memory {host_bytes(plan, n_local) / GB:6.0f} a node")
    lines.append(f"  disk        {checkpoint_bytes(plan) / GB:6.0f} a training checkpoint")
    share = result.peak / found.machine.memory
    lines.append(
        f"  peak        {result.peak / GB:6.1f} of {found.machine.memory / GB:.0f} ({share:.0%}), "
        f"in the {result.peak_phase}; largest: {result.largest}"
    )
    if plan.server_gpus:
        weights = server_bytes(plan, found.machine)
        split, n_replicas = server_split(plan, found.machine), server_replicas(plan, found.machine)
        lines.append(
            f"  server      {weights / GB:6.1f} of weights on each of {plan.server_gpus} cards "
            f"({n_replicas} x {split}), {server_slots(plan, found.machine):,.0f} tokens of cache a "
            f"replica in {assumed.SERVER_CACHE:.0%} of the rest"
        )
    if not found.fits:
        changes, repaired = repair(found)
        if changes:
            needs = f"{repaired.memory.peak / GB:.1f} GB"
            lines.append(f"WARNING: does not fit; with {' '.join(changes)} it needs {needs}")
        else:
            lines.append(
                "WARNING: does not fit, and neither checkpointing, ZeRO, fewer rows, offload nor "
                "an adapter helps; take more or larger accelerators, or a smaller model"
            )
    return lines


def _time_lines(found: Estimate, n_steps: int) -> list[str]:
    parts = sorted(found.seconds.items(), key=lambda part: -part[1])
    shown = [f"{name} {s:.1f}" for name, s in parts if s >= 0.01 * found.step_s]
    plan, step_s = found.plan, found.step_s
    n_tokens = plan.rollouts * plan.rollout_rows * plan.n_processes
    n_tokens *= assumed.MEAN_FILL * plan.policy_tokens
    return [
        f"time, s       {step_s:.1f} a step: {', '.join(shown)}",
        f"  {n_steps} steps  {n_steps * step_s / 3600:.1f} h without evaluations; "
        f"{n_tokens / step_s:,.0f} policy tokens/s; dominated by {parts[0][0]}",
        f"  network     {step_bytes(plan) / GB:.1f} GB a step into each accelerator",
    ]


def _assumption_lines(plan: Plan, machine: Machine) -> list[str]:
    reached = [
        f"{machine.flops / 1e12:.0f} TFLOP/s x {assumed.MFU_LOSS:.0%}",
        f"{machine.bandwidth / 1e12:.2f} TB/s x {assumed.BANDWIDTH_SHARE:.0%}",
        f"links {machine.link / GB:.0f} GB/s x {assumed.LINK_SHARE:.0%}",
    ]
    if plan.n_processes > machine.node:
        reached.append(f"network {machine.network / GB:.0f} GB/s an accelerator")
    launch_ms = assumed.LAUNCH_S * plan.shape.layers * 1e3
    return [
        f"assumed       {', '.join(reached)}; at least {launch_ms:.0f} ms a decoding step;",
        f"  episodes use {assumed.MEAN_FILL:.0%} of their budgets, the longest "
        f"{assumed.LONGEST_FILL:.0%} (memory: all); tools answer at once; every group has signal;",
        f"  {assumed.FRAGMENTATION - 1:.0%} of fragmentation; rows of {plan.rows} in "
        f"{plan.accumulation} micro-batches",
    ]
