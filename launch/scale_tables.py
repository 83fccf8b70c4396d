"""The tables of docs/scale.md: one function a table, text out; `launch.scale_page` writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from launch.scale import (
    CALIBRATION_SAMPLES,
    MERGE_THREADS,
    MODELS,
    PROMPT_TOKENS,
    Measured,
    calibration_bytes,
    calibration_seconds,
    fitted,
    handover_seconds,
    merge_seconds,
    parents_bytes,
    query_seconds,
    shape_of_model,
    sizes_of,
    step_plan,
)
from train.duration import (
    decode_bounds,
    decode_step_seconds,
    decode_tokens_per_second,
    decoding_rows,
)
from train.estimate import estimate
from train.memory import checkpoint_bytes, host_bytes, memory, server_split
from train.network import exchange_seconds, gather_seconds, step_bytes
from train.plan import DISK, GB, MACHINES, Plan

H100 = MACHINES["h100"]
SHARDINGS: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"zero": 0},
    "ZeRO-1": {"zero": 1},
    "ZeRO-2": {"zero": 2},
    "ZeRO-3": {"zero": 3},
    "ZeRO-2, optimizer offloaded": {"zero": 2, "offload_optimizer": True},
    "ZeRO-3, optimizer and weights offloaded": {
        "zero": 3, "offload_optimizer": True, "offload_parameters": True,
    },
    "ZeRO-2, LoRA of rank 32": {"zero": 2, "lora_rank": 32},
    "ZeRO-3, LoRA of rank 32": {"zero": 3, "lora_rank": 32},
}  # fmt: skip
SHOWN = (8, 64, 512)
ROWS_DECODED = (8, 32, 128, 512)
CORPORA = {"atlas": 1315, "a million": 1_000_000, "Wikipedia 2018": 21_015_324}
"""Passages; the last is wiki-18 of Search-R1, in parts of a hundred words (DPR)."""
SEARCHES = 2.0
"""Text searches of an episode."""


def row(cells: Sequence[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table whose first column is text."""
    return [row(header), row(["---", *["---:"] * (len(header) - 1)]), *map(row, rows)]


def memory_table(name: str) -> list[str]:
    """Peak of an accelerator by sharding: of training alone, and with rollouts in process."""
    rows = []
    for label, change in SHARDINGS.items():
        cells = [label]
        for n in SHOWN:
            plan = replace(step_plan(name, n, 0, 32 * n), **change)
            found = memory(plan)
            alone = max(found.total("loss"), found.total("update"))
            cells += [f"{alone / GB:,.0f}", f"{found.total('rollout') / GB:,.0f}"]
        host = host_bytes(replace(step_plan(name, 8, 0, 256), **change), H100.node)
        rows.append([*cells, f"{host / GB:,.0f}"])
    columns = [text for n in SHOWN for text in (f"{n}: training", "rollout")]
    return table(["sharding", *columns, "main memory a node"], rows)


def step_table(name: str, is_served: bool) -> list[str]:
    """A step of `EPISODES` on more and more accelerators."""
    rows, first = [], None
    for n, plan in sizes_of(name, H100, is_served):
        found, _ = fitted(plan, H100)
        if not found.fits:
            rows.append([n, "does not fit", f"{found.memory.peak / GB:,.0f}", *[""] * 6])
            continue
        work = n * found.step_s
        first = first or work
        spent = found.seconds
        network = spent["exchange"] + spent["gather"]
        rows.append([
            n, _sharding(found.plan), f"{found.memory.peak / GB:.0f}", f"{found.step_s:.0f}",
            f"{spent['decode']:.0f}", f"{spent['loss'] + spent['reference']:.0f}",
            f"{network:.1f}", f"{spent['sync']:.0f}", f"{first / work:.0%}",
        ])  # fmt: skip
    return table(
        ["GPUs", "sharding", "peak GB", "s a step", "decode", "loss", "network", "sync", "yield"],
        rows,
    )


def _sharding(plan: Plan) -> str:
    words = [f"ZeRO-{plan.zero}"]
    words += ["offload"] if plan.offload_optimizer else []
    words += [f"LoRA {plan.lora_rank}"] if plan.lora_rank else []
    words += [f"{plan.rows} rows"]
    return ", ".join(words)


def weak_table() -> list[str]:
    """32 episodes for every accelerator that trains: the step grows with the machine."""
    rows = []
    for name, is_served in (("7B", False), ("72B", True)):
        for total in (16, 32, 64, 128, 256, 512):
            n = total // 2 if is_served else total
            found, _ = fitted(step_plan(name, n, total - n, 32 * n), H100)
            spent = found.seconds
            rows.append([
                name, total, f"{32 * n:,}", _sharding(found.plan) if found.fits else "does not fit",
                f"{found.step_s:.0f}", f"{spent['exchange'] + spent['gather']:.1f}",
                f"{32 * n / found.step_s / total * 3600:,.0f}",
            ])  # fmt: skip
    header = ["model", "GPUs", "episodes a step", "sharding", "s a step", "network"]
    return table([*header, "episodes a GPU and hour"], rows)


def decode_table() -> list[str]:
    """Tokens a second of one replica while all rows go on, and what holds it up."""
    rows = []
    for name in MODELS:
        for engine, n_serving in (("in process", 0), ("server", 64)):
            for n_rows in ROWS_DECODED:
                plan = step_plan(name, 1, n_serving, n_rows)
                split = server_split(plan, H100) if n_serving else 1
                plan = replace(plan, server_gpus=split if n_serving else 0)
                many = replace(plan, n_processes=64)
                if not n_serving and memory(many).total("rollout") > H100.memory:
                    continue
                bounds = decode_bounds(plan, H100)
                most = max(bounds, key=lambda bound: bounds[bound])
                rate = decode_tokens_per_second(plan, H100)
                rows.append([
                    name, engine, split, f"{decoding_rows(plan, H100):.0f}",
                    f"{1e3 * decode_step_seconds(plan, H100):.1f}", f"{rate:,.0f}",
                    f"{rate / split:,.0f}", most,
                ])  # fmt: skip
    header = ["model", "engine", "GPUs", "rows", "ms a token", "tokens/s", "a GPU", "held up by"]
    return table(header, rows)


def network_table() -> list[str]:
    """Bytes into each accelerator in a step of 32 episodes a process, and their seconds."""
    rows = []
    for name in MODELS:
        for label in ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3, LoRA of rank 32"):
            cells: list[object] = [name, label]
            for n in SHOWN:
                plan = replace(step_plan(name, n, 0, 32 * n), **SHARDINGS[label])
                spent = exchange_seconds(plan, H100) + gather_seconds(plan, H100)
                cells += [f"{step_bytes(plan) / GB:,.1f}", f"{spent:.2f}"]
            rows.append(cells)
    columns = [text for n in SHOWN for text in (f"{n}: GB", "s")]
    return table(["model", "sharding", *columns], rows)


def stage_table(found: Measured) -> list[str]:
    """Calibration, merge and files of both models."""
    columns = []
    for name in MODELS:
        shape, plan = shape_of_model(name), step_plan(name, 8, 0, 256)
        n_tokens = CALIBRATION_SAMPLES * PROMPT_TOKENS
        n_pictures = CALIBRATION_SAMPLES * plan.picture_tokens
        calibration = calibration_seconds(shape, n_tokens, n_pictures, H100, found.watch_share)
        n = shape.n_parameters
        columns.append([
            f"{parents_bytes(shape) / GB:,.0f}",
            f"{calibration:.0f}",
            f"{calibration_bytes(shape) / GB:.0f}",
            f"{merge_seconds(n, found.merge_s, MERGE_THREADS):,.0f}",
            f"{merge_seconds(n, found.merge_s, 16):,.0f}",
            f"{2 * n / GB:,.0f}",
            f"{checkpoint_bytes(plan) / GB:,.0f}",
            f"{3 * checkpoint_bytes(plan) / GB:,.0f}",
            f"{checkpoint_bytes(plan) / DISK:,.0f}",
            f"{handover_seconds(shape):.0f}",
        ])  # fmt: skip
    samples = f"{CALIBRATION_SAMPLES} samples of {PROMPT_TOKENS} tokens"
    labels = [
        "three parents on disk, GB",
        f"calibrating one parent, s ({samples}, one H100)",
        "memory of it, a layer at a time, GB",
        f"merging by OBM on {MERGE_THREADS} threads, s",
        "on 16 threads, s",
        "merged checkpoint, GB",
        "training checkpoint, GB",
        "two kept and one being written, GB",
        "writing one, s",
        "handing weights to a server, s a step",
    ]
    return table(["", *MODELS], [list(cells) for cells in zip(labels, *columns, strict=True)])


def retrieval_table(found: Measured) -> list[str]:
    """Cores that answer a step's text searches while its rollout goes on."""
    rows = []
    for n in (8, 64, 512):
        episodes = 32 * n
        plan = step_plan("7B", n, 0, episodes)
        rollout_s = sum(estimate(plan, H100).seconds[stage] for stage in ("prefill", "decode"))
        rate = SEARCHES * episodes / rollout_s
        cells = []
        for n_passages in CORPORA.values():
            low, high = (rate * seconds for seconds in query_seconds(n_passages, found))
            cells.append(f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}")
        rows.append([n, f"{episodes:,}", f"{rate:,.0f}", *cells])
    return table(["GPUs", "episodes", "searches/s", *(f"cores, {name}" for name in CORPORA)], rows)


def measured_table(found: Measured) -> list[str]:
    """The coefficients, each with its source."""
    merge, rollout, serve = "bench-merge.json", "bench-rollout.json", "bench-serve.json"
    small, large = (f"{seconds * 1e3:.2f} ms" for seconds in found.query_s)
    gflops = f"{found.loss_flops / 1e9:.0f} GFLOP/s"
    read = f"{found.decode_bandwidth / GB:.1f} GB/s"
    rows = [
        ["CPU time of one merged number, OBM", f"{found.merge_s * 1e9:.1f} ns", merge],
        ["peak memory of merging 7B", f"{found.merge_gb:.2f} GB", merge],
        ["merging 7B on two threads, sparse files", f"{found.merge_7b_s:.0f} s", merge],
        ["watching a forward pass, bf16", f"{found.watch_share:.1%}", "bench-calibration.json"],
        ["a text query, 1,315 passages", small, serve],
        ["a text query, a million passages", large, serve],
        ["server of a million passages", f"{found.index_bytes / GB:.1f} GB", serve],
        ["forward and backward, 85M, fp32, one thread", gflops, rollout],
        ["weights that decoding read there", read, rollout],
    ]
    linked = [[what, value, f"[{file}](results/{file})"] for what, value, file in rows]
    return table(["what", "measured", "source"], linked)


TABLES: dict[str, Callable[[Measured], list[str]]] = {
    "measured": measured_table,
    "stages": stage_table,
    "memory 7B": lambda found: memory_table("7B"),
    "memory 72B": lambda found: memory_table("72B"),
    "decode": lambda found: decode_table(),
    "network": lambda found: network_table(),
    "step 7B in process": lambda found: step_table("7B", False),
    "step 7B with a server": lambda found: step_table("7B", True),
    "step 72B with a server": lambda found: step_table("72B", True),
    "weak": lambda found: weak_table(),
    "retrieval": retrieval_table,
}
