"""Gated heads after twenty steps of two processes, bit by bit: ZeRO-1, 2, 3, LoRA, bf16, DPO.

All in one launch; a minute on two quiet cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from train.policy import load_policy, load_processor
from train.settings import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

ROOT = Path(__file__).resolve().parents[2]
HEADS = [(0, 1), (1, 0)]
SETTINGS = """
output: {output}
seed: 1
models: {{init: {init}}}
environment: {{train_size: 32, eval_size: 4, kinds: [two, text], eval_kinds: [two, text]}}
grpo:
  per_device_train_batch_size: 4
  num_generations: 4
  max_completion_length: 40
  generation_kwargs: {{max_new_tokens: 8}}
  max_steps: 20
  save_steps: 20
  entropy_coef: 0.05
  learning_rate: 1.0e-3
  weight_decay: 0.1
compare: {{eval_every: 20}}
tracking: {{wandb: disabled}}
freeze_heads: cast(top=50%, map={map})
"""


ADAPTER = ("deepspeed=zero3", "lora.r=4", "grpo.learning_rate=1e-2")
TRAININGS = {**{stage: (f"deepspeed={stage}",) for stage in ("zero1", "zero2", "zero3")},
             "adapter": ADAPTER}  # fmt: skip
CASES = [(stage, "float32", adapter) for stage in (1, 2, 3) for adapter in (False, True)] + [
    (stage, "bfloat16", False) for stage in (1, 2, 3)
]
"""Stage, dtype and whether there is an adapter, for gated_engines.py."""
DPO_HEADS = [[0, 0], [0, 1], [0, 3]]


@pytest.fixture(scope="module")
def launched(tiny_checkpoints, tmp_path_factory):
    """All of it in two processes of one launch; the folder, and what was said."""
    folder = tmp_path_factory.mktemp("gated")
    here = Path(__file__).parent
    programs = [_training(folder / name, tiny_checkpoints["vlm"], overrides)
                for name, overrides in TRAININGS.items()]  # fmt: skip
    programs.append([here / "gated_engines.py", json.dumps(CASES)])
    _save_grouped(folder / "start", load_processor(tiny_checkpoints["agent"]))
    zero3 = ROOT / "configs" / "deepspeed" / "zero3.json"
    programs.append([here / "gated_processes.py", folder / "start", zero3, folder / "policy",
                     json.dumps(DPO_HEADS)])  # fmt: skip
    port = str(free_port())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["deepspeed", "--num_gpus", "2", "--master_port", port, here / "one_after_another.py",
         json.dumps([list(map(str, words)) for words in programs])],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CXX": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-20000:]
    return folder, result.stdout


def _training(folder, init, overrides):
    """Command of a run with the two highest of four heads gated."""
    folder.mkdir()
    conflict = {
        "schema_version": 1,
        "heads": [
            {"layer": layer, "head": head, "score": float((layer, head) in HEADS), "cosine": 0.0}
            for layer in range(2)
            for head in range(2)
        ],
    }
    (folder / "map.json").write_text(json.dumps(conflict))
    path = folder / "settings.yaml"
    path.write_text(SETTINGS.format(output=folder / "run", init=init, map=folder / "map.json"))
    return [ROOT / "launch" / "train.sh", "--config", path, *overrides]


def _save_grouped(folder, tokenizer):
    """A model with grouped keys and values, and its tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def policy_of(run):
    """Folder of the policy that a run of `_training` ended with."""
    assert json.loads((run / "frozen_heads.json").read_text())["heads"] == [list(h) for h in HEADS]
    done = json.loads((run / "done.json").read_text())
    assert done["step"] == 20
    return run / done["policy"]


def parts_of(model, layer, head):
    """A head's own numbers and those of its key-value head, by projection."""
    language = getattr(model.model, "language_model", model.model)
    attention, config = language.layers[layer].self_attn, model.config.get_text_config()
    group = head * config.num_key_value_heads // config.num_attention_heads
    size = attention.head_dim
    own, shared = (slice(i * size, (i + 1) * size) for i in (head, group))
    parts = {"o": attention.o_proj.weight[:, own]}
    for name, cut in (("q", own), ("k", shared), ("v", shared)):
        projection = getattr(attention, f"{name}_proj")
        parts[name], parts[f"{name} bias"] = projection.weight[cut], projection.bias[cut]
    return parts


def assert_gated(start, policy, heads, free):
    """Every bit of `heads` is as it was; of every other parameter, and of `free`, most changed."""
    for head in heads:
        before, after = parts_of(start, *head), parts_of(policy, *head)
        for name in before:
            assert torch.equal(before[name], after[name]), (head, name)
    for head in free:
        before, after = parts_of(start, *head), parts_of(policy, *head)
        for name in ("q", "k", "v", "o"):
            assert (before[name] != after[name]).float().mean() > 0.5, (head, name)
    mlp = [m.model for m in (start, policy)]
    mlp = [getattr(m, "language_model", m).layers[0].mlp.up_proj.weight for m in mlp]
    assert (mlp[0] != mlp[1]).float().mean() > 0.5


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_gated_heads_keep_every_bit_under_zero(tiny_checkpoints, launched, stage):
    start, _ = load_policy(tiny_checkpoints["vlm"])
    policy, _ = load_policy(policy_of(launched[0] / stage / "run"))
    assert_gated(start, policy, HEADS, [(0, 0), (1, 1)])


def test_gated_heads_keep_every_bit_in_every_stage_whole_bf16_and_with_adapters(launched):
    """Heads 0.0, 0.1 and 1.3 of 2 x 4; 0 and 1 share key-value head 0, 2 and 3 head 1.

    Of an adapter the weight with its product counts; in bf16 the masters are float32.
    """
    lines = launched[1].splitlines()
    found = [json.loads(line)["changed"] for line in lines if line.startswith('{"changed"')]
    assert len(found) == len(CASES)
    of_layer = (
        {"q_proj": [2, 3], "k_proj": [1], "v_proj": [1], "o_proj": [2, 3]},
        {"q_proj": [0, 1, 2], "k_proj": [0, 1], "v_proj": [0, 1], "o_proj": [0, 1, 2]},
    )
    expected = {f"{i}.{name}": heads for i in (0, 1) for name, heads in of_layer[i].items()}
    for case, changed in zip(CASES, found, strict=True):
        assert changed == expected, case


def test_a_run_with_an_adapter_under_zero3(tiny_checkpoints, launched):
    factors = load_file(policy_of(launched[0] / "adapter" / "run") / "adapter_model.safetensors")
    start, _ = load_policy(tiny_checkpoints["vlm"])
    size = start.model.language_model.layers[0].self_attn.head_dim
    for layer in (0, 1):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            end = f"layers.{layer}.self_attn.{name}.lora_"
            b, a = (next(v for k, v in factors.items() if end + part in k) for part in "BA")
            per_head = (b @ a).unflatten(1 if name == "o_proj" else 0, (-1, size))
            for head in (0, 1):
                part = per_head[:, head] if name == "o_proj" else per_head[head]
                assert (part == 0).all() if (layer, head) in HEADS else (part != 0).any()


def test_dpo_with_grouped_keys_keeps_every_bit_under_zero3(launched):
    """Heads 0 and 1 share key-value head 0: both gated, so it is, too. Of heads 2, 3 one is."""
    folder, output = launched
    # rows and columns of 3 heads of 8 x 32 and 3 x 8 biases; one key-value head, 2 x (8 x 32 + 8)
    n_numbers = 3 * (2 * 8 * 32 + 8) + 2 * (8 * 32 + 8)
    assert f"20 steps, {n_numbers} numbers gated" in output
    start, policy = (load_policy(folder / name)[0] for name in ("start", "policy"))
    assert_gated(start, policy, [(0, 0), (0, 1)], [(0, 2), (1, 0), (1, 3)])
    before, after = parts_of(start, 0, 3), parts_of(policy, 0, 3)
    for name in ("q", "q bias", "o"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["k"], after["k"])
