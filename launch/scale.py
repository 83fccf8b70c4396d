"""What the whole pipeline costs from 1 to 512 accelerators, as pure functions.

Training, rollouts and network are the model of a dry run (`train.memory`, `train.duration`,
`train.network`); here stand the stages around it, plans for any number of accelerators, and the
coefficients that were measured on a CPU (docs/results/bench-*.json). `launch.scale_page` writes
docs/scale.md from all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from compare.figures import Results, value_of
from configs.schema import load_config, shipped_config
from launch.bench_files import SIZES as SYNTHETIC
from train.duration import forward_flops, loss_flops
from train.estimate import Estimate, estimate, plan_of, repair
from train.plan import DISK, HANDOVER, MFU_READ, Machine, Plan
from train.shapes import ModelShape, find_shape

MODELS = {"7B": "Qwen/Qwen2.5-VL-7B-Instruct", "72B": "Qwen/Qwen2.5-VL-72B-Instruct"}
SETTINGS = "qwen2.5-vl-7b"
"""The file whose step is scaled; the 72B takes it with another model."""
EPISODES = 256
"""Of an optimizer step in that file, eight processes."""
PROMPT_TOKENS = 1500
"""A question with a photo of a megapixel."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MERGE_THREADS = 2
CALIBRATION_SAMPLES = 64


@dataclass(frozen=True)
class Measured:
    """Coefficients of two cores of a CPU; everything else in the page is a model."""

    merge_s: float
    """CPU seconds for each merged number, OBM, two threads, dense files"""
    merge_gb: float
    """peak memory of a merge of 7B"""
    merge_7b_s: float
    """wall seconds of that merge, its files sparse"""
    watch_share: float
    """of a forward pass in bf16, what watching its inputs adds"""
    query_s: tuple[float, float]
    """CPU seconds of a text query at 64 clients: the atlas, and a million passages"""
    passages: tuple[int, int]
    index_bytes: float
    """resident memory of the server of a million passages"""
    loss_flops: float
    """FLOP/s of forward and backward at 85M, fp32, one thread"""
    decode_bandwidth: float
    """bytes of weights a second that decoding read in that run"""


BENCH_SHAPE = ModelShape(
    layers=12, hidden=640, heads=10, kv_heads=2, head_dim=64, intermediate=2560, vocabulary=8192,
    is_tied=True,
)  # fmt: skip
"""Language module of the policy `80m` of `launch.bench_rollout_work`."""
BENCH_ROWS, BENCH_POLICY_TOKENS = 8, 160
ATLAS_PASSAGES = 1315


def measured(results: Results) -> Measured:
    """Reads the coefficients from the committed benches."""

    def value(text: str) -> float:
        return float(value_of(text, results))

    dense = "bench-merge.json: runs[size=1.5b, run=ours obm 2 threads]"
    whole = "bench-merge.json: runs[size=7b, run=ours obm 2 threads]"
    names = "part=headline, side=ours, work.policy=80m, work.results=distinct"
    ours = f"bench-rollout.json: runs[{names}]"
    served = "bench-serve.json: runs[server=ours, clients=64"
    done = {
        key: value(f'{ours}.done."{key}"') / BENCH_ROWS
        for key in ("prompt tokens", "policy tokens", "observation tokens")
    }
    work = Plan(
        BENCH_SHAPE, 1, 0, rows=BENCH_ROWS, accumulation=1, group=BENCH_ROWS,
        prompt_tokens=round(done["prompt tokens"]), policy_tokens=round(done["policy tokens"]),
        completion_tokens=round(done["policy tokens"] + done["observation tokens"]),
        has_deepspeed=False, is_bf16=False,
    )  # fmt: skip
    loss_s = value(f'{ours}.figures."loss forward"') + value(f"{ours}.figures.backward")
    # the tower's backward is inside the whole one: twice its forward
    loss_s -= 3 * value(f'{ours}.figures."vision in loss"')
    read = 4.0 * (BENCH_SHAPE.n_language + BENCH_SHAPE.n_head) * work.policy_tokens
    watched = 'targets[name="calibration overhead, bfloat16"].value'
    return Measured(
        merge_s=value(f"median({dense}.cpu_s)") / (SYNTHETIC["1.5b"].n_bytes / 2),
        merge_gb=value(f"{whole}.peak_rss_gb"),
        merge_7b_s=value(f"{whole}.wall_s"),
        watch_share=value(f"bench-calibration.json: {watched}"),
        query_s=(value(f"{served}, corpus=atlas].cpu_ms") / 1e3,
                 value(f"{served}, corpus=synthetic].cpu_ms") / 1e3),
        passages=(ATLAS_PASSAGES, round(value("bench-serve.json: passages"))),
        index_bytes=1e9 * value("bench-serve.json: memory[corpus=synthetic, server=ours].rss_gb"),
        loss_flops=loss_flops(work, fill=1.0) / loss_s,
        decode_bandwidth=read / value(f"{ours}.figures.decode"),
    )  # fmt: skip


# ---------------------------------------------------------------- plans of any size


def shape_of_model(name: str) -> ModelShape:
    """Shape of a model of `MODELS`."""
    return find_shape(MODELS[name])[0]


@cache
def shipped_plan(name: str) -> Plan:
    """The step of `SETTINGS` on its eight processes, with a model of `MODELS`."""
    model = f"models.init={MODELS[name]}"
    config = load_config(shipped_config(SETTINGS), [model, f"models.vlm={MODELS[name]}"])
    return plan_of(config, 8, PROMPT_TOKENS)


def step_plan(name: str, n: int, n_serving: int = 0, episodes: int = EPISODES) -> Plan:
    """The step of `SETTINGS` on another number of accelerators.

    Args:
        name: of `MODELS`.
        n: accelerators that train.
        n_serving: those of a rollout server.
        episodes: of a step, all processes together; at least one each.

    Raises:
        ValueError: the episodes cannot be shared out evenly.
    """
    each, rest = divmod(episodes, n)
    if rest or not each:
        raise ValueError(f"{episodes} episodes cannot be shared out to {n} processes")
    plan = shipped_plan(name)
    rows = min(plan.rows, each)
    return replace(
        plan,
        n_processes=n,
        rows=rows,
        accumulation=each // rows,
        steps_per_generation=each // rows,
        server_gpus=n_serving,
    )


def fitted(plan: Plan, machine: Machine) -> tuple[Estimate, list[str]]:
    """The plan as it is, or with the cheapest changes with which it fits, and these changes."""
    found = estimate(plan, machine)
    changes, repaired = repair(found)
    return repaired, changes


# ---------------------------------------------------------------- stages around the training


def calibration_seconds(
    shape: ModelShape, n_tokens: float, n_picture_tokens: float, machine: Machine, share: float
) -> float:
    """Reading one parent's weights from the disk, then forwards alone: 2 n FLOPs a token.

    Args:
        shape: of the parent.
        n_tokens: of all its samples.
        n_picture_tokens: those of pictures among them, read by the vision tower before.
        machine: the one accelerator that computes.
        share: what watching the inputs adds (`Measured.watch_share`).
    """
    length = PROMPT_TOKENS
    flops = forward_flops(shape, n_tokens, length / 2)
    if shape.vision:
        patches = n_picture_tokens * shape.vision.patches_per_token
        flops += 2.0 * shape.vision.n_parameters * patches
    return 2.0 * shape.n_parameters / DISK + (1 + share) * flops / (machine.flops * MFU_READ)


def calibration_bytes(shape: ModelShape) -> float:
    """A layer at a time in bf16: embeddings, head and vision tower, and one decoder layer."""
    layer = shape.n_language / shape.layers
    return 2.0 * (shape.n_embedding + shape.n_vision + layer)


def merge_seconds(n_numbers: float, number_s: float, n_threads: int) -> float:
    """The longer of computing and of moving bytes: three models read, one written, two bytes each.

    Args:
        n_numbers: of the merged model.
        number_s: CPU seconds of one (`Measured.merge_s`).
        n_threads: that compute.
    """
    return max(n_numbers * number_s / n_threads, 4 * 2.0 * n_numbers / DISK)


def parents_bytes(shape: ModelShape) -> float:
    """Three parents in bf16, of which base and agent have no vision tower."""
    return 2.0 * (3 * shape.n_parameters - 2 * shape.n_vision)


def handover_seconds(shape: ModelShape) -> float:
    """New weights in bf16 for a rollout server, once a step."""
    return 2.0 * shape.n_parameters / HANDOVER


def query_seconds(n_passages: int, found: Measured) -> tuple[float, float]:
    """CPU seconds of a text query over more passages than were measured: at least, at most.

    A query reads the postings of its words, and these grow with the corpus: at most in proportion,
    from the larger of the two that were measured; at least not at all.
    """
    largest, seconds = found.passages[1], found.query_s[1]
    if n_passages <= found.passages[0]:
        return found.query_s[0], found.query_s[0]
    return seconds, seconds * max(1.0, n_passages / largest)


def sizes_of(name: str, machine: Machine, is_served: bool) -> Iterator[tuple[int, Plan]]:
    """Accelerators in all, and the plan: half of them serve, where there is a server.

    Episodes a step stay `EPISODES`, so the row ends where a process would have none.
    """
    for n in SIZES:
        n_training = n // 2 if is_served else n
        if n_training and EPISODES % n_training == 0:
            yield n, step_plan(name, n_training, n - n_training)
