"""Bytes that a training step needs on one accelerator, and on the node; symbols in `train.plan`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from train.plan import (
    BUCKET_ROWS,
    CONTEXT_BYTES,
    FRAGMENTATION,
    LIVE_PARAMETERS,
    READ_TOKENS,
    SERVER_CACHE,
    SERVER_WEIGHTS,
    TILE_BYTES,
    WAVE_ROWS,
    WHOLE_LOGITS,
    Machine,
    Plan,
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one accelerator: what is always there, and what each phase adds."""

    always: dict[str, float]
    phases: dict[str, dict[str, float]]

    def total(self, phase: str) -> float:
        """Bytes in a phase."""
        moving = sum(self.phases[phase].values()) * FRAGMENTATION
        return CONTEXT_BYTES + sum(self.always.values()) + moving

    @cached_property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        """Bytes that must fit."""
        return self.total(self.peak_phase)

    @property
    def largest(self) -> str:
        """The largest item at the peak."""
        items = {**self.always, **self.phases[self.peak_phase]}
        return max(items, key=lambda name: items[name])


def memory(plan: Plan) -> Memory:
    """Bytes of one accelerator.

    Always: weights, optimizer states, reference, the start of an anchor, and cast weights of plain
    torch under bf16.
    Rollout: the gathered weights of ZeRO-3, the cache, logits, the forward that reads prompts.
    Loss: gradients, activations, logits. Update: gradients and the optimizer's scratch.
    """
    gradients = gradient_bytes(plan)
    always = {
        "weights": weight_bytes(plan),
        "optimizer": 0.0 if plan.offload_optimizer else optimizer_bytes(plan),
        "reference": reference_bytes(plan),
        "anchor": anchor_bytes(plan),
    }
    # ZeRO-3 never frees its part; between two rollouts of one step gradients are half done
    is_kept = plan.zero >= 3 or plan.accumulation > plan.steps_per_generation
    rollout = {"gradients": gradients if is_kept else 0.0}
    if not plan.server_gpus:
        rollout |= {
            "gathered weights": plan.weight_bytes * plan.n_stored if plan.zero >= 3 else 0.0,
            "cache": cache_bytes(plan),
            "logits": 5 * 4.0 * min(plan.rollout_rows, WAVE_ROWS) * plan.shape.vocabulary,
            "reading": reading_bytes(plan),
        }
    loss = {
        "gradients": gradients,
        "activations": activation_bytes(plan),
        "vision": vision_activation_bytes(plan),
        "logits": loss_logit_bytes(plan),
        "gathered weights": gathered_bytes(plan),
        "cast weights": 0.0 if plan.has_deepspeed or not plan.is_bf16 else 2.0 * plan.n_stored,
    }
    update = {"gradients": gradients, "scratch": update_bytes(plan)}
    return Memory(always, {"rollout": rollout, "loss": loss, "update": update})


def weight_bytes(plan: Plan) -> float:
    """e n, over N under ZeRO-3; 0 if they are offloaded."""
    if plan.offload_parameters:
        return 0.0
    return plan.weight_bytes * plan.n_stored / plan.shares["weights"]


def gradient_bytes(plan: Plan) -> float:
    """e n_t, over N from ZeRO-2 on; 0 if the optimizer is offloaded, they go there."""
    if plan.offload_optimizer:
        return 0.0
    return plan.weight_bytes * plan.n_trained / plan.shares["gradients"]


def optimizer_bytes(plan: Plan) -> float:
    """AdamW in fp32: 8 n_t for its two moments, over N from ZeRO-1 on.

    DeepSpeed adds 4 n_t for its own fp32 copy of the weights.
    """
    per_parameter = 12 if plan.has_deepspeed else 8
    return per_parameter * plan.n_trained / plan.shares["optimizer"]


def update_bytes(plan: Plan) -> float:
    """4 n_t / N for AdamW's denominators; DeepSpeed adds as much for fp32 gradients."""
    if plan.offload_optimizer:
        return 0.0
    per_parameter = 8 if plan.has_deepspeed else 4
    return per_parameter * plan.n_trained / plan.shares["optimizer"]


def reference_bytes(plan: Plan) -> float:
    """e n, over N under ZeRO-3; 0 with an adapter, which is switched off instead."""
    if not plan.has_reference or plan.lora_rank:
        return 0.0
    return plan.weight_bytes * plan.shape.n_parameters / plan.shares["weights"]


def anchor_bytes(plan: Plan) -> float:
    """e for each parameter of the language module, whole; moments, one a channel, are few."""
    return float(plan.weight_bytes * plan.shape.n_language) if plan.has_anchor else 0.0


def gathered_bytes(plan: Plan) -> float:
    """ZeRO-3 keeps up to a billion parameters whole while it computes."""
    return plan.weight_bytes * min(plan.n_stored, LIVE_PARAMETERS) if plan.zero >= 3 else 0.0


def cache_bytes(plan: Plan) -> float:
    """2 L kv e for each of R (P + C + 1) slots, all allocated at the start."""
    shape = plan.shape
    slots = min(plan.rollout_rows, WAVE_ROWS) * (plan.prompt_tokens + plan.completion_tokens + 1)
    return 2.0 * shape.layers * shape.kv_width * plan.weight_bytes * slots


def reading_bytes(plan: Plan) -> float:
    """One layer of the forward that reads prompts: (3 f + 4 h + 2 q) e a token."""
    shape = plan.shape
    n_tokens = min(READ_TOKENS, plan.rollout_prompts * plan.prompt_tokens)
    width = 3 * shape.intermediate + 4 * shape.hidden + 2 * shape.query_width
    return float(plan.weight_bytes * width * n_tokens)


def layer_bytes(plan: Plan) -> float:
    """What a decoder layer keeps of one token for its backward.

    The seven linears keep their inputs, the gate its two factors and the silu its input (4 f), the
    attention q, k, v and its output (2 q + 2 kv). A norm keeps its input and the normalised values
    in fp32 or, under bf16, both and the result in bf16: 3 h in fp32, 8 h bytes in bf16.
    """
    shape = plan.shape
    inner = 4 * shape.intermediate + 2 * shape.query_width + 2 * shape.kv_width
    if not plan.is_bf16:
        return 4.0 * (inner + 6 * shape.hidden)
    if plan.has_deepspeed:
        return 2.0 * (inner + 8 * shape.hidden)
    # autocast: linears in bf16, but the residual stream and the norms in fp32
    return 2.0 * inner + 28.0 * shape.hidden


def activation_bytes(plan: Plan) -> float:
    """Decoder activations of a micro-batch.

    Checkpointed: every layer's input, e h L a token, and one layer of a bucket in full; each row is
    read with its prompt. Otherwise a prompt is read once a group, and each completion keeps
    besides its own layers the keys and values it looks at, for every query head, and its mask.
    """
    shape, e = plan.shape, 2 if plan.is_bf16 else 4
    length = plan.prompt_tokens + plan.completion_tokens
    if plan.is_checkpointed:
        inputs = e * shape.hidden * shape.layers * plan.rows * length
        return inputs + layer_bytes(plan) * min(plan.rows, BUCKET_ROWS) * length
    n_tokens = plan.loss_prompts * plan.prompt_tokens + plan.rows * plan.completion_tokens
    seen = plan.rows * length * 2 * (shape.query_width - shape.kv_width)
    masks = plan.rows * plan.completion_tokens * length
    return float(shape.layers * (layer_bytes(plan) * n_tokens + e * (seen + masks)))


def vision_activation_bytes(plan: Plan) -> float:
    """The tower's activations, as a decoder's whose heads are as wide as it is.

    Four patches a picture token; each distinct picture is read once a micro-batch.
    """
    vision = plan.shape.vision
    if vision is None or not plan.trains_vision:
        return 0.0
    n_patches = plan.loss_prompts * plan.picture_tokens * vision.patches_per_token
    e = 2 if plan.is_bf16 else 4
    block = e * (4 * vision.intermediate + 12 * vision.hidden)
    if plan.is_checkpointed:
        return float(n_patches * (e * vision.hidden * vision.layers + block))
    return float(n_patches * block * vision.layers)


def loss_logit_bytes(plan: Plan) -> float:
    """14 bytes a logit while they are kept whole; else the head's gradient in fp32 and tiles."""
    n_logits = plan.rows * plan.policy_tokens * plan.shape.vocabulary
    if n_logits <= WHOLE_LOGITS:
        return 14.0 * n_logits
    return 4.0 * plan.shape.n_head + TILE_BYTES


def server_split(plan: Plan, machine: Machine) -> int:
    """Accelerators of a replica of the rollout server: the smallest power of two that holds it.

    Its weights in bf16 may take SERVER_WEIGHTS of the memory; the rest is its cache. At most all of
    the server's accelerators, whether they hold it or not.
    """
    split = 1
    while 2.0 * plan.shape.n_parameters / split > SERVER_WEIGHTS * machine.memory:
        split *= 2
    return min(split, max(1, plan.server_gpus))


def server_replicas(plan: Plan, machine: Machine) -> int:
    """Copies of the model that the rollout server answers from."""
    return max(1, plan.server_gpus // server_split(plan, machine))


def server_bytes(plan: Plan, machine: Machine) -> float:
    """A rollout server's weights in bf16 on each of its accelerators."""
    if not plan.server_gpus:
        return 0.0
    return 2.0 * plan.shape.n_parameters / server_split(plan, machine)


def server_slots(plan: Plan, machine: Machine) -> float:
    """Tokens of cache in SERVER_CACHE of what a replica's weights leave free."""
    split = server_split(plan, machine)
    free = max(0.0, split * machine.memory - 2.0 * plan.shape.n_parameters)
    return SERVER_CACHE * free / (4.0 * plan.shape.layers * plan.shape.kv_width)


def checkpoint_bytes(plan: Plan) -> float:
    """A training checkpoint: weights, and 12 bytes a trained parameter for AdamW in fp32.

    DeepSpeed's: fp32 weights and two moments; an adapter is saved alone.
    """
    stored = plan.n_trained if plan.lora_rank else plan.n_stored
    return float(plan.weight_bytes * stored + (12 if plan.has_deepspeed else 8) * plan.n_trained)


def host_bytes(plan: Plan, n_local: int) -> float:
    """Main memory of a node: every process loads the model in fp32; offloaded states stay there.

    Under ZeRO-3 a process keeps no more than its part, and that on its accelerator. The first alone
    reads the files (in bf16), and it holds all weights while it saves, beside what is offloaded.
    Not in it: the processes themselves, without a model.
    """
    states = 0.0
    if plan.offload_optimizer:
        states += 16.0 * plan.n_trained * n_local / plan.shares["optimizer"]
    if plan.offload_parameters:
        states += plan.weight_bytes * plan.n_stored * n_local / plan.shares["weights"]
    if plan.zero >= 3:
        return states + plan.weight_bytes * plan.n_stored
    return max(4.0 * plan.shape.n_parameters * n_local, states)
