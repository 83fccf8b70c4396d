"""The estimate against what can be measured here: tensors that DeepSpeed holds, activations that
autograd keeps, FLOPs that run; and against its own logic."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from configs.errors import ConfigError
from configs.schema import load_config
from configs.sections import Benchmark
from train.duration import (
    decode_seconds,
    forward_flops,
    loss_flops,
    reference_seconds,
    seconds,
)
from train.estimate import describe_estimate, estimate, find_machine, plan_of, repair
from train.memory import (
    activation_bytes,
    cache_bytes,
    gradient_bytes,
    host_bytes,
    layer_bytes,
    memory,
    optimizer_bytes,
    reference_bytes,
    weight_bytes,
)
from train.plan import MACHINES, Plan
from train.scoring import ScoredRows, score_rows
from train.settings import free_port
from train.shapes import find_shape, shape_of

ROOT = Path(__file__).parents[2]
H100 = MACHINES["h100"]
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
SHAPE = shape_of({"model_type": "qwen2", **SMALL}, "test")
SMALL_PLAN = Plan(
    SHAPE, 1, 0, rows=8, accumulation=1, group=4, prompt_tokens=64, policy_tokens=48,
    completion_tokens=96, is_bf16=False,
)  # fmt: skip


@pytest.fixture
def plan():
    """Qwen2.5-VL-7B on eight processes."""
    shape, _ = find_shape("Qwen/Qwen2.5-VL-7B-Instruct")
    return Plan(
        shape, 8, 3, rows=4, accumulation=2, group=8, prompt_tokens=500, policy_tokens=1024,
        completion_tokens=2048, picture_tokens=256, steps_per_generation=2, is_checkpointed=True,
    )  # fmt: skip


# ---------------------------------------------------------------- against measurements


@pytest.mark.slow
def test_deepspeed_holds_what_the_model_says():
    """Two processes, bf16; every storage that a tensor points to after the second step."""
    cases = [(1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"), (2, "float32")]
    port = str(free_port())
    command = [
        sys.executable, str(Path(__file__).parent / "zero_states.py"),
        json.dumps(SMALL), json.dumps(cases),
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    output, errors = processes[0].communicate(timeout=240)
    assert processes[1].wait(timeout=60) == 0
    assert processes[0].returncode == 0, errors[-2000:]
    measured = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [(row["stage"], row["dtype"]) for row in measured] == cases
    for row in measured:
        plan = replace(
            SMALL_PLAN, n_processes=2, zero=row["stage"], is_bf16=row["dtype"] == "bfloat16"
        )
        expected = weight_bytes(plan) + optimizer_bytes(plan)
        expected += gradient_bytes(plan) if row["stage"] == 3 else 0.0
        # ZeRO-3 keeps small tensors whole; all keep buffers of the communication
        assert row["states"] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_the_model_says(dtype):
    """Bytes of distinct storages that autograd saves, four layers less two."""
    n_tokens, kept = 128, {}
    for n_layers in (2, 4):
        config = Qwen2Config(**{**SMALL, "num_hidden_layers": n_layers})
        model = Qwen2ForCausalLM(config).to(dtype).train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages, alive = {}, []

        def pack(tensor, own=own, storages=storages, alive=alive):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        ids = torch.zeros((1, n_tokens), dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            masks = {"full_attention": None}
            model.model(input_ids=ids, attention_mask=masks, use_cache=False)
        kept[n_layers] = sum(storages.values())
    measured = (kept[4] - kept[2]) / 2 / n_tokens
    plan = replace(SMALL_PLAN, is_bf16=dtype == torch.bfloat16)
    # the model leaves out a few numbers a token: statistics of norms and of the softmax
    assert measured == pytest.approx(layer_bytes(plan), rel=0.02)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_loss_runs_the_flops_that_the_model_says(is_checkpointed):
    """torch counts no CPU attention, so that part is taken out of the model's number."""
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL)).train()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    plan = replace(SMALL_PLAN, is_checkpointed=is_checkpointed)
    draw = np.random.default_rng(0).integers
    prompts = [draw(0, 99, plan.prompt_tokens).tolist() for _ in range(plan.loss_prompts)]
    n, width = plan.rows, plan.completion_tokens
    rows = ScoredRows(
        [prompts[i // plan.group] for i in range(n)],
        [draw(0, 99, width).tolist() for _ in range(n)],
        [np.arange(width) < plan.policy_tokens for _ in range(n)],
        [[] for _ in range(n)],
        width,
        n_buckets=1,
    )
    with FlopCounterMode(display=False) as counter:
        score_rows(model, rows, 1.0)[0].sum().backward()
    n_prompts = plan.rows if is_checkpointed else plan.loss_prompts
    n_tokens = n_prompts * plan.prompt_tokens + n * width
    context = (plan.prompt_tokens + width) / 2
    attention = forward_flops(SHAPE, n_tokens, context) - forward_flops(SHAPE, n_tokens, 0)
    expected = loss_flops(plan, fill=1.0) - (4 if is_checkpointed else 3) * attention
    ratio = counter.get_total_flops() / expected
    if is_checkpointed:
        assert ratio == pytest.approx(1.0, rel=0.01)
    else:  # one layer of four works for the policy's tokens only
        assert 1 - 1 / SHAPE.layers < ratio < 1.0


# ---------------------------------------------------------------- arithmetic by hand


def test_sixteen_bytes_a_parameter_shared_out_by_stage(plan):
    n = plan.shape.n_parameters
    states = {}
    for stage in (0, 1, 2, 3):
        p = replace(plan, zero=stage)
        states[stage] = weight_bytes(p) + gradient_bytes(p) + optimizer_bytes(p)
    # ZeRO, figure 1: 2 + 2 + 12 bytes, over 8 processes
    assert states[0] == 16 * n
    assert states[1] == pytest.approx((4 + 12 / 8) * n)
    assert states[2] == pytest.approx((2 + 14 / 8) * n)
    assert states[3] == pytest.approx(16 / 8 * n)


def test_offloaded_states_lie_in_main_memory(plan):
    offloaded = replace(plan, zero=2, offload_optimizer=True)
    assert optimizer_bytes(replace(plan, zero=2)) > 0
    assert memory(offloaded).always["optimizer"] == 0
    assert gradient_bytes(offloaded) == 0
    # eight processes load 4 n each; later the node holds 16 n
    n = plan.shape.n_parameters
    assert host_bytes(offloaded, n_local=8) == 32 * n
    assert host_bytes(replace(offloaded, n_processes=1), n_local=1) == 16 * n


def test_under_zero3_main_memory_holds_the_weights_once(plan):
    n = plan.shape.n_parameters
    assert host_bytes(plan, n_local=8) == 2 * n
    # two nodes of eight: half of the 16 n of AdamW, and half of the 2 n that are shared out
    offloaded = replace(plan, n_processes=16, offload_optimizer=True, offload_parameters=True)
    assert host_bytes(offloaded, n_local=8) == 8 * n + 1 * n + 2 * n


def test_the_cache_is_keys_and_values_of_every_slot(plan):
    # 28 layers, 4 heads of 128, keys and values, 2 bytes; 8 rows of 500 + 2048 + 1 slots
    assert cache_bytes(plan) == 28 * 4 * 128 * 2 * 2 * 8 * 2549


@pytest.mark.parametrize(
    ("rows", "n_prompts"), [(1, 1), (4, 1), (8, 1), (16, 2), (6, 2), (12, 2), (20, 3)]
)
def test_a_micro_batch_may_begin_within_a_group(plan, rows, n_prompts):
    # groups of 8, one behind the other
    starts = range(0, 8 * rows, rows)
    assert max(len({i // 8 for i in range(s, s + rows)}) for s in starts) == n_prompts
    assert replace(plan, rows=rows).loss_prompts == n_prompts


def test_passes_over_a_rollout_share_its_reference(plan):
    once = replace(plan, has_reference=True, accumulation=4, steps_per_generation=2)
    twice = replace(once, iterations=2)
    assert reference_seconds(once, H100) > 0
    assert reference_seconds(twice, H100) == pytest.approx(reference_seconds(once, H100) / 2)


def test_an_adapter_needs_states_for_itself_alone(plan):
    adapted = replace(plan, zero=2, lora_rank=16, has_reference=True)
    assert plan.shape.n_lora(16) == adapted.n_trained < 0.01 * plan.shape.n_parameters
    assert optimizer_bytes(adapted) == 12 * adapted.n_trained / 8
    assert reference_bytes(adapted) == 0.0
    assert reference_bytes(replace(plan, zero=2, has_reference=True)) == 2 * (
        plan.shape.n_parameters
    )


def test_an_anchor_keeps_the_language_module_twice(plan, config):
    assert not plan_of(config, 1).has_anchor
    config.algorithm.anchor = 0.1
    assert plan_of(config, 1).has_anchor
    whole = replace(plan, zero=2)
    anchored = replace(whole, has_anchor=True)
    assert memory(anchored).always["anchor"] == 2 * plan.shape.n_language
    more = memory(anchored).peak - memory(whole).peak
    assert more == pytest.approx(2 * plan.shape.n_language)


def test_a_frozen_tower_has_no_states_and_no_activations(plan):
    frozen = replace(plan, is_vision_frozen=True)
    assert plan.n_trained - frozen.n_trained == plan.shape.n_vision
    assert memory(frozen).phases["loss"]["vision"] == 0
    assert weight_bytes(frozen) == weight_bytes(plan)
    assert seconds(frozen, H100)["vision"] < 0.5 * seconds(plan, H100)["vision"]


def test_decoding_reads_all_weights_or_waits_for_python(plan):
    n_steps = 0.8 * plan.policy_tokens
    # 7.6 GB of weights at 0.6 x 3.35 TB/s is 7.6 ms; launching 28 layers takes 22.4 ms
    assert decode_seconds(plan, H100) == pytest.approx(n_steps * 28 * 0.0008)
    served = replace(plan, server_gpus=8)
    assert decode_seconds(served, H100) < 0.5 * decode_seconds(plan, H100)


# ---------------------------------------------------------------- monotone


def test_more_zero_never_needs_more_for_states_or_for_the_loss(plan):
    for bf16 in (True, False):
        for n in (1, 2, 8):
            plans = [replace(plan, zero=z, n_processes=n, is_bf16=bf16) for z in range(4)]
            for items in (weight_bytes, gradient_bytes, optimizer_bytes):
                values = [items(p) for p in plans]
                assert values == sorted(values, reverse=True)
    losses = [memory(replace(plan, zero=z)).total("loss") for z in range(4)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    "field", ["rows", "prompt_tokens", "completion_tokens", "accumulation", "picture_tokens"]
)
def test_more_of_anything_needs_no_less(plan, field):
    larger = replace(plan, **{field: 2 * getattr(plan, field)})
    for phase in memory(plan).phases:
        assert memory(larger).total(phase) >= memory(plan).total(phase)
    assert sum(seconds(larger, H100).values()) >= sum(seconds(plan, H100).values())


def test_checkpointing_trades_time_for_memory(plan):
    kept = replace(plan, is_checkpointed=False)
    assert activation_bytes(plan) < 0.3 * activation_bytes(kept)
    assert loss_flops(plan) > loss_flops(kept)


def test_a_faster_machine_is_never_slower(plan):
    faster = replace(H100, flops=2 * H100.flops, bandwidth=2 * H100.bandwidth)
    assert sum(seconds(plan, faster).values()) < sum(seconds(plan, H100).values())


# ---------------------------------------------------------------- the fix


def test_what_does_not_fit_gets_settings_with_which_it_does(plan):
    greedy = replace(plan, zero=0, has_deepspeed=False, is_checkpointed=False, rows=32)
    found = estimate(greedy, H100)
    assert not found.fits
    changes, repaired = repair(found)
    assert repaired.fits
    assert "grpo.activation_checkpointing=true" in changes
    assert any(change.startswith("deepspeed=zero") for change in changes)
    before, after = greedy, repaired.plan
    assert before.rows * before.accumulation == after.rows * after.accumulation


def test_one_gpu_is_offered_offload_and_no_sharding(plan):
    alone = replace(plan, n_processes=1, zero=2)
    changes, repaired = repair(estimate(alone, H100))
    assert changes == ["deepspeed=zero2_offload"]
    assert repaired.fits


def test_an_anchor_is_offered_neither_zero3_nor_an_adapter(plan):
    for rows in (4, 64):
        anchored = replace(plan, zero=1, rows=rows, has_anchor=True)
        for memory_gb in (5, 40, 60, 80):
            changes, _ = repair(estimate(anchored, replace(H100, memory=memory_gb * 1e9)))
            assert not any("zero3" in change or "lora" in change for change in changes)


def test_a_fix_names_the_steps_of_a_rollout_only_where_they_are_set(plan):
    large = replace(plan, rows=32, accumulation=1, steps_per_generation=2, completion_tokens=8192)
    changes, repaired = repair(estimate(large, H100))
    assert repaired.plan.rows < 32
    assert not any("steps_per_generation" in change for change in changes)
    changes, repaired = repair(estimate(replace(large, has_own_steps_per_generation=True), H100))
    assert f"grpo.steps_per_generation={repaired.plan.steps_per_generation}" in changes


def test_what_fits_is_left_alone_and_what_nothing_helps_is_said(plan):
    assert repair(estimate(plan, H100))[0] == []
    tiny = replace(H100, memory=5e9)
    assert repair(estimate(plan, tiny))[0] == []


# ---------------------------------------------------------------- settings and text


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("output: x\nmodels: {vlm: Qwen/Qwen2.5-VL-7B-Instruct, init: runs/merged}\n")
    return load_config(path)


def test_a_plan_reads_the_settings(config):
    config.grpo = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "num_generations": 8,
        "beta": 0.001,
        "max_completion_length": 3000,
        "generation_kwargs": {"max_new_tokens": 512},
        "gradient_checkpointing": True,
    }
    config.deepspeed = "zero3"
    plan = plan_of(config, 8)
    assert (plan.rows, plan.accumulation, plan.group, plan.zero) == (4, 8, 8, 3)
    assert (plan.steps_per_generation, plan.rollout_rows, plan.rollout_prompts) == (8, 32, 4)
    # one image search, two text searches and the answer
    assert (plan.policy_tokens, plan.completion_tokens) == (4 * 512, 3000)
    assert plan.is_checkpointed
    assert plan.has_reference
    assert plan.is_bf16
    assert plan_of(config, 8, prompt_tokens=1500).picture_tokens > 1000


def test_visits_of_pages_are_turns(config):
    config.grpo = {"max_completion_length": 3000, "generation_kwargs": {"max_new_tokens": 100}}
    config.environment.max_turns = 6
    before = plan_of(config, 1)
    config.environment.visits = 1
    assert plan_of(config, 1).policy_tokens == before.policy_tokens + 100


def test_a_picture_of_another_size_than_the_atlas_has_is_warned_of(config):
    words = "WARNING: a prompt is counted with the atlas's small photo"
    assert words not in describe_estimate(config, 1)
    config.environment.train_benchmark = Benchmark(name="fvqa_train")
    assert words in describe_estimate(config, 1)
    assert words not in describe_estimate(config, 1, prompt_tokens=1500)
    config.models.max_pixels = 1280 * 28 * 28
    assert words not in describe_estimate(config, 1)
    assert plan_of(config, 1).picture_tokens == 1280


def test_offload_is_read_from_a_deepspeed_file(config, tmp_path):
    path = tmp_path / "own.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    path.write_text(json.dumps({"zero_optimization": zero}))
    config.deepspeed = str(path)
    plan = plan_of(config, 2)
    assert (plan.zero, plan.offload_optimizer, plan.offload_parameters) == (3, True, False)


def test_the_text_names_peak_fix_and_assumptions(config):
    config.grpo = {"per_device_train_batch_size": 16, "num_generations": 8}
    text = describe_estimate(config, 1)
    assert "8,292.2 M" in text
    assert "WARNING: does not fit" in text
    assert "deepspeed=zero2_offload" in text
    assert "989 TFLOP/s x 40%" in text
    config.deepspeed = "zero3"
    config.grpo["activation_checkpointing"] = True
    assert "WARNING" not in describe_estimate(config, 1, machine="h100x8")


def test_an_unknown_model_is_no_mistake_but_has_no_estimate(config):
    config.models.vlm, config.models.init = None, "owner/unknown"
    assert describe_estimate(config, 1).startswith("no estimate of memory and time: models.init")


def test_a_machine_may_name_the_number_of_processes():
    assert find_machine("h100x8", 1) == (H100, 8)
    assert find_machine("H100", 4) == (H100, 4)
    with pytest.raises(ConfigError, match="8 accelerators but 4"):
        find_machine("h100x8", 4)
    with pytest.raises(ConfigError, match="a100, h100"):
        find_machine("tpu", 1)


@pytest.mark.parametrize("number", ["99999999999999999999", "65537", "9" * 5000])
def test_a_machine_of_too_many_accelerators_is_refused(number):
    with pytest.raises(ConfigError, match=r"^--machine: .* too many accelerators; name 65536"):
        find_machine(f"h100x{number}", 1)
    assert find_machine("h100x65536", 1) == (H100, 65536)
