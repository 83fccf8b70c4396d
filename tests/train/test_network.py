"""Bytes and seconds between accelerators, and a server of several, computed by hand."""

from dataclasses import replace

import pytest

from train.duration import (
    decode_bounds,
    decode_seconds,
    decode_step_seconds,
    decode_tokens_per_second,
    decoding_rows,
    optimizer_seconds,
)
from train.estimate import estimate, repair
from train.memory import (
    checkpoint_bytes,
    server_bytes,
    server_replicas,
    server_slots,
    server_split,
)
from train.network import (
    bus_bandwidth,
    collective_seconds,
    exchange_bytes,
    exchange_calls,
    exchange_seconds,
    gather_bytes,
    gather_seconds,
    step_bytes,
)
from train.plan import GB, MACHINES, Plan
from train.shapes import ModelShape, find_shape

H100 = MACHINES["h100"]
SHAPE = ModelShape(
    layers=2, hidden=4, heads=2, kv_heads=1, head_dim=2, intermediate=8, vocabulary=10,
    is_tied=True,
)  # fmt: skip
PLAN = Plan(
    SHAPE, 4, 3, rows=2, accumulation=3, group=2, prompt_tokens=10, policy_tokens=10,
    completion_tokens=20, steps_per_generation=3,
)  # fmt: skip
# a layer: q 4x4, k and v 4x2 each, o 4x4, three of 4x8, biases 4 + 2 + 2, norms 2 x 4:
# 16 + 8 + 8 + 16 + 96 + 8 + 8 = 160; two of them, the last norm 4, embeddings 40
N = 2 * 160 + 4 + 40


@pytest.fixture
def large():
    shape, _ = find_shape("Qwen/Qwen2.5-VL-72B-Instruct")
    return Plan(
        shape, 64, 3, rows=4, accumulation=8, group=8, prompt_tokens=1500, policy_tokens=2000,
        completion_tokens=3072, steps_per_generation=8, is_checkpointed=True,
    )  # fmt: skip


def test_the_bus_is_the_links_in_a_node_and_the_adapters_beyond():
    assert bus_bandwidth(8, H100) == pytest.approx(0.7 * 450 * GB)
    # eight adapters of 50 GB/s are slower than the links
    assert bus_bandwidth(9, H100) == pytest.approx(0.7 * 400 * GB)
    # of an L40S the links are: 25 against 8 x 12.5
    assert bus_bandwidth(64, MACHINES["l40s"]) == pytest.approx(0.7 * 25 * GB)


def test_a_collective_moves_all_but_ones_own_part_and_hops():
    # 315 GB/s; 4 processes: 3/4 of 630 GB is 1.5 s, 10 calls of 3 hops of 5 microseconds
    assert collective_seconds(630 * GB, 10, 4, H100) == pytest.approx(1.5 + 150e-6)
    assert collective_seconds(630 * GB, 10, 1, H100) == 0.0


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (0, 2 * 2 * N),  # an all-reduce of bf16 gradients a step
        (1, 2 * 2 * N),
        (2, 3 * 2 * N),  # a reduce-scatter in each of three micro-batches
        (3, 3 * (2 * N + 2 * 2 * N)),  # and weights for forward and backward
    ],
)
def test_bytes_of_the_loss_by_stage(zero, expected):
    assert SHAPE.n_parameters == N
    assert exchange_bytes(replace(PLAN, zero=zero)) == expected


def test_only_zero_3_gathers_for_a_rollout():
    assert gather_bytes(PLAN) == 2 * N  # one rollout a step
    assert gather_bytes(replace(PLAN, accumulation=6)) == 2 * 2 * N
    assert gather_bytes(replace(PLAN, zero=2)) == gather_seconds(replace(PLAN, zero=2), H100) == 0


def test_a_step_moves_all_of_it_but_ones_own_part():
    # 3/4 of loss 18 N and rollout 2 N; ZeRO-2: loss 6 N and the new weights 2 N
    assert step_bytes(PLAN) == pytest.approx(0.75 * 20 * N)
    assert step_bytes(replace(PLAN, zero=2)) == pytest.approx(0.75 * 8 * N)
    assert step_bytes(replace(PLAN, n_processes=1)) == 0.0


def test_zero_3_calls_every_layer_three_times():
    assert exchange_calls(PLAN) == 3 * 2 * 3
    assert exchange_calls(replace(PLAN, zero=2)) == 3  # one bucket each
    assert exchange_calls(replace(PLAN, zero=0)) == 2


def test_an_adapter_moves_its_own_gradients_and_all_weights(large):
    adapted = replace(large, lora_rank=16)
    n_adapter = large.shape.n_lora(16)
    n_stored = large.shape.n_parameters + n_adapter
    assert exchange_bytes(adapted) == 8 * (2 * n_adapter + 4 * n_stored)
    assert exchange_seconds(adapted, H100) < exchange_seconds(large, H100)


def test_more_nodes_are_never_faster_to_cross(large):
    seconds = [exchange_seconds(replace(large, n_processes=n), H100) for n in (8, 16, 64, 512)]
    assert seconds == sorted(seconds)


# ---------------------------------------------------------------- servers of several accelerators


def test_a_replica_is_the_smallest_power_of_two_that_holds_the_weights(large):
    served = replace(large, server_gpus=16)
    # 147 GB: 36.7 on each of four is below 0.6 x 80 = 48, 73.4 on each of two is not
    assert server_split(served, H100) == 4
    assert server_replicas(served, H100) == 4
    assert server_bytes(served, H100) == 2 * large.shape.n_parameters / 4
    assert server_split(served, MACHINES["h200"]) == 2
    # too few accelerators: all of them, and it does not fit
    assert server_split(replace(large, server_gpus=2), H100) == 2
    assert not estimate(replace(large, server_gpus=2, n_processes=256), H100).fits
    assert estimate(replace(large, server_gpus=4, n_processes=256), H100).fits


def test_the_cache_bounds_what_decodes_together(large):
    served = replace(large, server_gpus=4, n_processes=1, rows=512, steps_per_generation=1)
    # 320 GB less 146.8 of weights, 90 % of it, 2 x 80 x 1024 numbers of two bytes a token
    slots = 0.9 * (320e9 - 2 * large.shape.n_parameters) / (4 * 80 * 1024)
    assert server_slots(served, H100) == pytest.approx(slots)
    # a row has 1500 + 3072 / 2 tokens in the mean
    assert decoding_rows(served, H100) == slots // 3036
    assert decoding_rows(replace(large, steps_per_generation=2), H100) == 8
    # 512 rows in four waves of 156
    n_steps = 0.8 * 2000 * 4 * 8
    assert decode_seconds(served, H100) == pytest.approx(
        n_steps * decode_step_seconds(served, H100)
    )


def test_a_replica_shares_reading_and_products_and_sums_over_links(large):
    served = replace(large, server_gpus=4, n_processes=1, steps_per_generation=2)
    shape, rows = large.shape, 8
    found = decode_bounds(served, H100)
    read = 2 * (shape.n_language + shape.n_head) + 4 * 80 * 1024 * rows * (1500 + 3072 / 4)
    assert found["weights and cache"] == pytest.approx(read / 4 / (0.6 * 3.35e12))
    assert found["launches"] == 0.0
    # two all-reduces a layer, each 2 x 3/4 of 8 rows x 8192 bf16 numbers, and 2 x 3 hops
    moved = 2 * 80 * 2 * 0.75 * rows * 8192 * 2 / (0.7 * 450 * GB)
    assert found["links"] == pytest.approx(moved + 2 * 80 * 2 * 3 * 5e-6)
    assert decode_tokens_per_second(served, H100) == pytest.approx(
        rows / (found["weights and cache"] + found["links"])
    )


# ---------------------------------------------------------------- files, and the fix


def test_a_checkpoint_has_fourteen_bytes_a_parameter_or_an_adapter_alone(large):
    n = large.shape.n_parameters
    assert checkpoint_bytes(large) == 14 * n
    assert checkpoint_bytes(replace(large, is_bf16=False)) == 16 * n
    assert checkpoint_bytes(replace(large, lora_rank=16)) == 14 * large.shape.n_lora(16)


def test_weights_that_no_card_holds_whole_are_sampled_on_a_server(large):
    changes, found = repair(estimate(replace(large, n_processes=128), H100))
    assert changes == ["rollout.backend=vllm --server-gpus 4"]
    assert found.fits


def test_new_weights_cross_the_network_under_zero_2(large):
    plan = replace(large, zero=2)
    n = large.shape.n_parameters
    # 28 bytes a parameter over 64, then 63/64 of 2 n bytes in 147 buckets of 63 hops
    update = 28 * n / 64 / (0.6 * 3.35e12)
    moved = 2 * n * 63 / 64 / (0.7 * 400 * GB) + 147 * 63 * 5e-6
    assert optimizer_seconds(plan, H100) == pytest.approx(update + moved)
