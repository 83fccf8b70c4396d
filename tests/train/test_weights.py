"""Weights as they are handed to a server: names, adapters, shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from train.settings import free_port
from train.weights import merged_weights, weight_bytes, write_weights


def read(folder):
    return {k: v for file in sorted(folder.glob("*")) for k, v in load_file(file).items()}


def test_every_weight_is_written_once_and_a_tied_head_as_embedding(policy, tmp_path):
    model, _ = policy
    n = write_weights(model, tmp_path)
    written, expected = read(tmp_path), dict(model.named_parameters())
    assert n == len(written) == len(expected)
    assert "lm_head.weight" not in written
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_shards_hold_the_same_as_one_file(policy, tmp_path):
    model, _ = policy
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    write_weights(model, whole)
    write_weights(model, parts, shard_bytes=100_000)
    assert len(list(parts.glob("*"))) > 2
    assert read(whole).keys() == read(parts).keys()
    assert all(torch.equal(tensor, read(parts)[name]) for name, tensor in read(whole).items())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_is_merged_into_the_copy_alone(fresh_policy, settings):
    model, _ = fresh_policy
    names = set(dict(model.named_parameters()))
    config = LoraConfig(
        r=4,
        target_modules=r"model\.language_model.*\.(q_proj|up_proj)",
        modules_to_save=["visual.merger"],
        **settings,
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    copied, n_bytes = dict(merged_weights(wrapped)), weight_bytes(wrapped)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())
    assert not any(getattr(module, "merged", False) for module in wrapped.modules())
    merged = dict(wrapped.merge_and_unload().named_parameters())
    assert copied.keys() == merged.keys() == names
    assert n_bytes == sum(tensor.nbytes for tensor in copied.values())
    assert all(torch.allclose(copied[name], merged[name], atol=1e-6) for name in names)
    changed = "model.language_model.layers.0.mlp.up_proj.weight"
    base = changed.replace(".weight", ".base_layer.weight")
    assert not torch.equal(copied[changed], before[f"base_model.model.{base}"])


@pytest.mark.slow
def test_under_zero3_one_tensor_is_whole_at_a_time_and_the_same_arrives(tiny_checkpoints, tmp_path):
    port = str(free_port())
    here = Path(__file__)
    program = str(here.with_name("weights_in_shares.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, program, tiny_checkpoints["vlm"], str(tmp_path)],
            env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "PYTHONPATH": str(here.parents[2]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    [line] = [json.loads(line) for line in said[0][0].splitlines() if line.startswith('{"diff')]
    assert line["different"] == []
    assert line["largest"] == line["tensor"] < line["policy"] / 2
