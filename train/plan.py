"""A training step as numbers, the machines it may run on, and what the estimate assumes.

The estimate is a model on paper, before anything is loaded: memory counted tensor by tensor from
shapes (`train.memory`), time from work divided by what a machine does at its peak times an assumed
share of it (`train.duration`), bytes between accelerators (`train.network`). Each formula stands
in its function's docstring; docs/real-models.md has the table for the shipped settings and how far
the model was off where it was measured, docs/scale.md what it says from 1 to 512 accelerators.

Symbols: n parameters (n_t trained), N processes, R rows a process and micro-batch, P prompt tokens,
C completion tokens (observations included), L layers, h hidden, q and kv widths of query and
key heads, f width of the MLP, V vocabulary, e bytes of a number (2 in bf16, 4 in fp32).

Sources: 16 bytes a parameter and their partition by stage, ZeRO (arXiv 1910.02054); 2 n FLOPs a
token forward and 4 n backward, Kaplan et al. (arXiv 2001.08361); what a layer keeps for its
backward was counted with saved-tensor hooks on transformers 5.23, see tests/train/test_estimate.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.shapes import ModelShape

GB = 1e9

# ---------------------------------------------------------------- assumptions

MFU_LOSS = 0.40
"""Share of the peak FLOP/s that forward and backward reach."""
MFU_READ = 0.40
"""Share of the peak FLOP/s that reading a prompt reaches."""
BANDWIDTH_SHARE = 0.60
"""Share of the memory bandwidth that decoding and the optimizer reach."""
LINK_SHARE = 0.70
"""Share of the link bandwidth that collectives reach."""
HOP_S = 5e-6
"""Seconds of one hop of a ring, with its share of the launch of the collective."""
SERVER_WEIGHTS = 0.6
"""Share of an accelerator's memory that a server's weights may take; the rest is its cache."""
SERVER_CACHE = 0.9
"""Share of what a server's weights leave free that its cache gets."""
DISK = 2.0 * GB
"""Bytes a second that a checkpoint is written at, or read: one NVMe drive, or a share of more."""
LAUNCH_S = 0.0008
"""Seconds to launch one decoder layer of one token from Python: the floor of a decoding step."""
HANDOVER = 3.0 * GB
"""Bytes a second at which weights are written for a rollout server and read by it."""
MEAN_FILL = 0.5
"""Share of its token budgets that an episode uses in the mean; time only, memory takes all."""
LONGEST_FILL = 0.8
"""Share of the policy's budget that the longest episode of a process uses: its decoding steps."""
CONTEXT_BYTES = 2.0 * GB
"""CUDA context, NCCL buffers and cuBLAS workspaces of a process."""
FRAGMENTATION = 1.10
"""Allocator's overhead on tensors that come and go."""

# ---------------------------------------------------------------- limits of our code and libraries

READ_TOKENS = 32768
"""Tokens of one forward in the rollout, train.batch.MAX_TOKENS_PER_READ."""
WAVE_ROWS = 512
"""Rows that decode together, RolloutEngine.max_rows."""
BUCKET_ROWS = 32
"""Rows of one forward in the loss, train.scoring.ROWS_PER_BUCKET."""
WHOLE_LOGITS = 2**26
"""Logits kept whole in the loss, train.scoring.MAX_LOGITS; more go through TRL's tiles."""
TILE_BYTES = 3 * 4096 * 32768 * 2
"""TRL's tiles of logits: 4096 tokens x 32768 entries in bf16, and two results of that size."""
BUCKET_PARAMETERS = 500_000_000
"""Gradients that ZeRO-1 and 2 reduce at a time, DeepSpeed's reduce_bucket_size."""
LIVE_PARAMETERS = 1_000_000_000
"""Gathered parameters that ZeRO-3 keeps at a time, DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class Machine:
    """One accelerator and its surroundings; bandwidths in bytes a second, one direction."""

    name: str
    flops: float
    """peak of dense bf16 products, FLOP/s"""
    memory: float
    """bytes"""
    bandwidth: float
    """memory"""
    link: float
    """to the other accelerators of the node"""
    network: float
    """to other nodes, an accelerator's share of the node's adapters"""
    host_bandwidth: float = 200 * GB
    """main memory of the node"""
    host_link: float = 50 * GB
    """accelerator to main memory"""
    node: int = 8
    """accelerators of a node"""


# NVIDIA's data sheets: dense bf16, HBM, NVLink (half of the figure for both directions), PCIe;
# network: an InfiniBand adapter of 200 Gb/s for each A100, of 400 for each H100 and H200 (DGX),
# of 200 for two L40S
MACHINES = {
    "a100": Machine("a100", 312e12, 80 * GB, 2.04e12, 300 * GB, 25 * GB, 200 * GB, 25 * GB),
    "h100": Machine("h100", 989e12, 80 * GB, 3.35e12, 450 * GB, 50 * GB),
    "h200": Machine("h200", 989e12, 141 * GB, 4.80e12, 450 * GB, 50 * GB),
    "l40s": Machine("l40s", 362e12, 48 * GB, 0.864e12, 25 * GB, 12.5 * GB, 200 * GB, 25 * GB),
}


@dataclass(frozen=True)
class Plan:
    """A training step, as numbers."""

    shape: ModelShape
    n_processes: int
    zero: int
    """ZeRO stage, 0 to 3"""
    rows: int
    """R: completions a process and micro-batch"""
    accumulation: int
    """micro-batches an optimizer step"""
    group: int
    """completions a question"""
    prompt_tokens: int
    policy_tokens: int
    """tokens that the policy may write in an episode"""
    completion_tokens: int
    """C at most, observations included"""
    picture_tokens: int = 0
    """picture tokens in a prompt, contained in prompt_tokens"""
    steps_per_generation: int = 1
    """micro-batches that one rollout serves"""
    has_own_steps_per_generation: bool = False
    """it is set, and does not follow from the accumulation"""
    iterations: int = 1
    """passes over a rollout"""
    has_deepspeed: bool = True
    offload_optimizer: bool = False
    offload_parameters: bool = False
    is_bf16: bool = True
    is_checkpointed: bool = False
    """activations are computed again in the backward"""
    lora_rank: int | None = None
    """an adapter on the language module is trained instead of the model"""
    lora_targets: tuple[str, ...] | None = None
    is_vision_frozen: bool = False
    has_reference: bool = False
    """beta > 0"""
    has_anchor: bool = False
    """algorithm.anchor > 0"""
    server_gpus: int = 0
    """accelerators of a rollout server beside the trainer's; 0 = rollouts in process"""
    tool_s: float = 0.0
    """seconds that an episode waits for tools"""

    @property
    def n_trained(self) -> int:
        """Parameters with a gradient."""
        shape = self.shape
        if self.lora_rank:
            return shape.n_lora(self.lora_rank, self.lora_targets)
        return shape.n_parameters - (shape.n_vision if self.is_vision_frozen else 0)

    @property
    def trains_vision(self) -> bool:
        """Whether the vision tower has a backward."""
        return not self.is_vision_frozen and not self.lora_rank

    @property
    def n_stored(self) -> int:
        """Parameters in memory."""
        return self.shape.n_parameters + (self.n_trained if self.lora_rank else 0)

    @property
    def weight_bytes(self) -> int:
        """e of the weights: DeepSpeed casts them to bf16, plain torch keeps fp32."""
        return 2 if self.is_bf16 and self.has_deepspeed else 4

    @property
    def shares(self) -> dict[str, int]:
        """Over how many processes weights, gradients and optimizer states are spread."""
        n = self.n_processes
        return {
            "weights": n if self.zero >= 3 else 1,
            "gradients": n if self.zero >= 2 else 1,
            "optimizer": n if self.zero >= 1 else 1,
        }

    @property
    def rollout_rows(self) -> int:
        """Episodes of a process in one rollout."""
        return self.rows * self.steps_per_generation

    @property
    def rollouts(self) -> float:
        """Rollouts an optimizer step."""
        return self.accumulation / (self.steps_per_generation * self.iterations)

    @property
    def rollout_prompts(self) -> int:
        """Distinct prompts of a process in one rollout."""
        return -(-self.rollout_rows // self.group)

    @property
    def loss_prompts(self) -> int:
        """Distinct prompts of a micro-batch, which may begin within a group."""
        return -(-(self.rows + self.group - math.gcd(self.rows, self.group)) // self.group)

    @property
    def observation_tokens(self) -> int:
        """C less what the policy writes."""
        return self.completion_tokens - self.policy_tokens
