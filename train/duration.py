"""Seconds that a training step takes on a machine; symbols and assumptions in `train.plan`."""

from __future__ import annotations

import math

from train.memory import server_replicas, server_slots, server_split
from train.network import (
    collective_seconds,
    exchange_seconds,
    gather_seconds,
    update_gather_bytes,
)
from train.plan import (
    BANDWIDTH_SHARE,
    BUCKET_PARAMETERS,
    HANDOVER,
    LAUNCH_S,
    LONGEST_FILL,
    MEAN_FILL,
    MFU_LOSS,
    MFU_READ,
    WAVE_ROWS,
    Machine,
    Plan,
)
from train.shapes import ModelShape


def seconds(plan: Plan, machine: Machine) -> dict[str, float]:
    """Seconds of an optimizer step by stage, under the names of the timers in docs/metrics.md.

    `exchange` (gradients, and the weights of ZeRO-3, in the loss) has no timer of its own: it is
    measured inside `loss`.
    """
    return {
        "prefill": read_seconds(plan, machine),
        "decode": decode_seconds(plan, machine),
        "vision": vision_seconds(plan, machine),
        "tools": plan.tool_s * plan.rollouts,
        "gather": gather_seconds(plan, machine),
        "sync": sync_seconds(plan),
        "reference": reference_seconds(plan, machine),
        "loss": loss_seconds(plan, machine),
        "exchange": exchange_seconds(plan, machine),
        "optimizer": optimizer_seconds(plan, machine),
    }


def forward_flops(shape: ModelShape, n_tokens: float, mean_context: float) -> float:
    """2 n_linear + 4 L q context FLOPs a token: products with weights, and with what it sees."""
    return n_tokens * (2.0 * shape.n_linear + 4.0 * shape.layers * shape.query_width * mean_context)


def loss_flops(plan: Plan, fill: float = MEAN_FILL) -> float:
    """FLOPs of forward and backward of a process' optimizer step.

    Args:
        plan: of the step.
        fill: share of its token budgets that an episode uses.

    A backward is two forwards, one where only an adapter is trained. Checkpointed, the decoder runs
    once more, each layer up to its last product (h f weights), and a prompt is read with every row
    of its group. The head works on the policy's tokens alone. Left out: the last layer, too, is
    spared where no token is predicted.
    """
    shape = plan.shape
    completion, prompt = fill * plan.completion_tokens, plan.prompt_tokens
    n_prompts = plan.rows if plan.is_checkpointed else plan.loss_prompts
    n_tokens = n_prompts * prompt + plan.rows * completion
    forward = forward_flops(shape, n_tokens, (prompt + completion) / 2)
    passes = 2 if plan.lora_rank else 3
    decoder = passes * forward
    if plan.is_checkpointed:
        decoder += forward - 2.0 * shape.layers * shape.hidden * shape.intermediate * n_tokens
    head = passes * 2.0 * shape.n_head * plan.rows * fill * plan.policy_tokens
    return plan.accumulation * (decoder + head)


def loss_seconds(plan: Plan, machine: Machine) -> float:
    """loss_flops at the assumed share of the peak."""
    return loss_flops(plan) / (machine.flops * MFU_LOSS)


def reference_seconds(plan: Plan, machine: Machine) -> float:
    """A forward over the batch for the reference, and one for the old log-probs where needed.

    They are needed where a rollout serves several optimizer steps, or came from another engine;
    several passes over a rollout have the same.
    """
    is_off_policy = plan.accumulation % (plan.steps_per_generation * plan.iterations) != 0
    n_forwards = int(plan.has_reference) + int(is_off_policy or plan.server_gpus > 0)
    passes = (2 if plan.lora_rank else 3) + int(plan.is_checkpointed)
    return n_forwards * loss_seconds(plan, machine) / passes / plan.iterations


def read_seconds(plan: Plan, machine: Machine) -> float:
    """Reading prompts, once a group, and observations, once a row."""
    observed = MEAN_FILL * plan.observation_tokens
    n_tokens = plan.rollout_prompts * plan.prompt_tokens + plan.rollout_rows * observed
    flops = forward_flops(plan.shape, n_tokens, plan.prompt_tokens / 2)
    return plan.rollouts * flops / (machine.flops * MFU_READ) / _server_share(plan)


def decode_bounds(plan: Plan, machine: Machine) -> dict[str, float]:
    """Seconds of one decoding step by what may hold it up; the longest of the first three does.

    Weights and cache are read at the memory's bandwidth, products run at the peak for reading, and
    in process Python launches every layer (a server replays recorded launches). On a server of t
    accelerators a replica each reads and multiplies its share, and a layer's two results are summed
    over the links: 2 L all-reduces of rows x h numbers (Megatron-LM, arXiv 1909.08053).
    """
    shape, rows = plan.shape, decoding_rows(plan, machine)
    context = plan.prompt_tokens + MEAN_FILL * plan.completion_tokens / 2
    weights = plan.weight_bytes * (shape.n_language + shape.n_head)
    cache = 2.0 * shape.layers * shape.kv_width * plan.weight_bytes * rows * context
    flops = forward_flops(shape, rows, context) + 2.0 * shape.n_head * rows
    split = server_split(plan, machine) if plan.server_gpus else 1
    summed = 2.0 * (2.0 * shape.layers) * rows * shape.hidden * plan.weight_bytes
    return {
        "weights and cache": (weights + cache) / split / (machine.bandwidth * BANDWIDTH_SHARE),
        "products": flops / split / (machine.flops * MFU_READ),
        "launches": 0.0 if plan.server_gpus else LAUNCH_S * shape.layers,
        "links": collective_seconds(summed, 4.0 * shape.layers, split, machine),
    }


def decoding_rows(plan: Plan, machine: Machine) -> float:
    """Episodes that decode together on a process, or on a replica of the server."""
    return min(replica_rows(plan, machine), most_rows(plan, machine))


def replica_rows(plan: Plan, machine: Machine) -> float:
    """Episodes of a rollout that a process, or a replica of the server, has to sample."""
    if not plan.server_gpus:
        return plan.rollout_rows
    return plan.rollout_rows * plan.n_processes / server_replicas(plan, machine)


def most_rows(plan: Plan, machine: Machine) -> float:
    """Rows that can decode together: WAVE_ROWS, on a server also what its cache has room for.

    A server gives a row the tokens that it has, not those that it may have.
    """
    if not plan.server_gpus:
        return WAVE_ROWS
    length = plan.prompt_tokens + MEAN_FILL * plan.completion_tokens
    return max(1.0, min(WAVE_ROWS, server_slots(plan, machine) // length))


def decode_seconds(plan: Plan, machine: Machine) -> float:
    """Steps of the longest episode, each as long as its slowest part, in waves."""
    n_waves = math.ceil(replica_rows(plan, machine) / most_rows(plan, machine))
    n_steps = LONGEST_FILL * plan.policy_tokens * n_waves
    return plan.rollouts * n_steps * decode_step_seconds(plan, machine)


def decode_step_seconds(plan: Plan, machine: Machine) -> float:
    """One token for every row: the longest of the bounds that overlap, and the links."""
    bounds = decode_bounds(plan, machine)
    longest = max(seconds for name, seconds in bounds.items() if name != "links")
    return longest + bounds["links"]


def decode_tokens_per_second(plan: Plan, machine: Machine) -> float:
    """Tokens that a process, or a replica of the server, samples while all its rows go on."""
    return decoding_rows(plan, machine) / decode_step_seconds(plan, machine)


def vision_seconds(plan: Plan, machine: Machine) -> float:
    """2 n_vision FLOPs a patch: a forward in the rollout, one, three or four in the loss."""
    vision = plan.shape.vision
    if vision is None:
        return 0.0
    patches = plan.picture_tokens * vision.patches_per_token
    passes = 1 if not plan.trains_vision else 4 if plan.is_checkpointed else 3
    n_read = plan.rollouts * plan.rollout_prompts + plan.accumulation * passes * plan.loss_prompts
    return n_read * patches * 2.0 * vision.n_parameters / (machine.flops * MFU_READ)


def sync_seconds(plan: Plan) -> float:
    """Handing the weights to a server, once an optimizer step."""
    return plan.weight_bytes * plan.n_stored / HANDOVER if plan.server_gpus else 0.0


def optimizer_seconds(plan: Plan, machine: Machine) -> float:
    """AdamW reads weights, gradient and moments and writes all but the gradient: 28 bytes n_t / N.

    Offloaded: in main memory, with gradients and weights on the way to and fro. Under ZeRO-1 and 2
    the new weights are gathered.
    """
    n, e = plan.n_trained / plan.shares["optimizer"], float(plan.weight_bytes)
    update = 28.0 * n / (machine.bandwidth * BANDWIDTH_SHARE)
    if plan.offload_optimizer:
        n_local = min(plan.n_processes, machine.node)
        update = 28.0 * n * n_local / (machine.host_bandwidth * BANDWIDTH_SHARE)
        update += 2.0 * e * n / machine.host_link
    moved = update_gather_bytes(plan)
    n_calls = -(-plan.n_trained // BUCKET_PARAMETERS) if moved else 0
    return update + collective_seconds(moved, n_calls, plan.n_processes, machine)


def _server_share(plan: Plan) -> float:
    """Accelerators of the server for each process of the trainer; 1 for rollouts in process."""
    return plan.server_gpus / plan.n_processes if plan.server_gpus else 1.0
