"""DeepSpeed's settings: the shipped names are files, and a missing compiler is said in one line."""

import json

import pytest

from configs.errors import ConfigError
from configs.schema import SHIPPED_DEEPSPEED
from train.deepspeed_json import (
    FOLDER,
    compiled_optimizer,
    deepspeed_path,
    read_deepspeed,
    require_compiler,
)


def test_the_names_are_the_files():
    assert sorted(SHIPPED_DEEPSPEED) == sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED_DEEPSPEED)
def test_no_shipped_file_needs_a_compiler(name, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    path = deepspeed_path(name)
    settings = read_deepspeed(path)
    assert settings["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in settings["zero_optimization"]) == name.endswith("_offload")
    require_compiler(path)


OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-6}}}


@pytest.mark.parametrize(
    ("settings", "operator"),
    [
        ({"zero_optimization": {"stage": 2}}, None),
        (OFFLOAD, "cpu_adam"),
        ({**OFFLOAD, "zero_force_ds_cpu_optimizer": False}, None),
        ({**OFFLOAD, **ADAM, "zero_force_ds_cpu_optimizer": False}, "cpu_adam"),
        (ADAM, "fused_adam"),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, None),
    ],
)
def test_deepspeeds_own_optimizers_are_the_ones_that_are_compiled(settings, operator):
    assert compiled_optimizer(settings) == operator


def test_a_file_that_needs_a_compiler_where_none_is_says_the_fix(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(OFFLOAD))
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(ConfigError, match=r"cpu_adam.*install g\+\+.*zero_force_ds_cpu_optimizer"):
        require_compiler(path)
    monkeypatch.setenv("CXX", "sh")
    require_compiler(path)


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"mine\.json cannot be read as JSON"):
        read_deepspeed(path)
    with pytest.raises(ConfigError, match=r"no file .*zero1, zero2"):
        deepspeed_path(str(tmp_path / "other.json"))
