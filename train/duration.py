"""Seconds that a training step takes on a machine; symbols and assumptions in `train.plan`."""

from __future__ import annotations

from train.plan import (
    BANDWIDTH_SHARE,
    HANDOVER,
    LAUNCH_S,
    LINK_SHARE,
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

    They are needed where a rollout serves several optimizer steps, or came from another engine.
    """
    is_off_policy = plan.accumulation % (plan.steps_per_generation * plan.iterations) != 0
    n_forwards = int(plan.has_reference) + int(is_off_policy or plan.server_gpus > 0)
    passes = (2 if plan.lora_rank else 3) + int(plan.is_checkpointed)
    return n_forwards * loss_seconds(plan, machine) / passes


def read_seconds(plan: Plan, machine: Machine) -> float:
    """Reading prompts, once a group, and observations, once a row."""
    observed = MEAN_FILL * plan.observation_tokens
    n_tokens = plan.rollout_prompts * plan.prompt_tokens + plan.rollout_rows * observed
    flops = forward_flops(plan.shape, n_tokens, plan.prompt_tokens / 2)
    return plan.rollouts * flops / (machine.flops * MFU_READ) / _server_share(plan)


def decode_seconds(plan: Plan, machine: Machine) -> float:
    """Steps of the longest episode, each as long as the slowest of three things takes.

    Reading weights and cache from memory, multiplying, and launching the layers from Python (a
    server replays recorded launches).
    """
    shape = plan.shape
    n_steps = LONGEST_FILL * plan.policy_tokens
    rows = min(plan.rollout_rows, WAVE_ROWS) / _server_share(plan)
    context = plan.prompt_tokens + MEAN_FILL * plan.completion_tokens / 2
    weights = plan.weight_bytes * (shape.n_language + shape.n_head)
    cache = 2.0 * shape.layers * shape.kv_width * plan.weight_bytes * rows * context
    memory_s = (weights + cache) / (machine.bandwidth * BANDWIDTH_SHARE)
    flops = forward_flops(shape, rows, context) + 2.0 * shape.n_head * rows
    compute_s = flops / (machine.flops * MFU_READ)
    launch_s = 0.0 if plan.server_gpus else LAUNCH_S * shape.layers
    n_waves = -(-plan.rollout_rows // WAVE_ROWS)
    return plan.rollouts * n_waves * n_steps * max(memory_s, compute_s, launch_s)


def vision_seconds(plan: Plan, machine: Machine) -> float:
    """2 n_vision FLOPs a patch: a forward in the rollout, one, three or four in the loss."""
    vision = plan.shape.vision
    if vision is None:
        return 0.0
    patches = plan.picture_tokens * vision.patches_per_token
    passes = 1 if not plan.trains_vision else 4 if plan.is_checkpointed else 3
    n_read = plan.rollouts * plan.rollout_prompts + plan.accumulation * passes * plan.loss_prompts
    return n_read * patches * 2.0 * vision.n_parameters / (machine.flops * MFU_READ)


def exchange_seconds(plan: Plan, machine: Machine) -> float:
    """Gradients over links: e n_t bytes, twice that for the all-reduce of ZeRO-0 and 1.

    Under ZeRO-3 the weights follow, for forward and backward, in every micro-batch.
    """
    if plan.n_processes == 1:
        return 0.0
    e, away = float(plan.weight_bytes), (plan.n_processes - 1) / plan.n_processes
    moved = e * plan.n_trained * (1.0 if plan.zero >= 2 else 2.0)
    if plan.zero >= 3:
        moved += 2.0 * e * plan.n_stored
    # plain data parallelism and ZeRO-1 wait for the last micro-batch
    times = plan.accumulation if plan.zero >= 2 else 1
    return times * moved * away / (machine.link * LINK_SHARE)


def gather_seconds(plan: Plan, machine: Machine) -> float:
    """ZeRO-3 makes the weights whole for each rollout: e n (N - 1) / N over links."""
    if plan.zero < 3:
        return 0.0
    moved = plan.weight_bytes * plan.n_stored * (1 - 1 / plan.n_processes)
    return plan.rollouts * moved / (machine.link * LINK_SHARE)


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
        n_local = min(plan.n_processes, 8)
        update = 28.0 * n * n_local / (machine.host_bandwidth * BANDWIDTH_SHARE)
        update += 2.0 * e * n / machine.host_link
    if plan.zero in (1, 2):
        away = (plan.n_processes - 1) / plan.n_processes
        update += e * plan.n_trained * away / (machine.link * LINK_SHARE)
    return update


def _server_share(plan: Plan) -> float:
    """Accelerators of the server for each process of the trainer; 1 for rollouts in process."""
    return plan.server_gpus / plan.n_processes if plan.server_gpus else 1.0
