"""DeepSpeed's settings: the shipped names are files, and a missing compiler is said in one line."""

import json

import pytest

from configs.errors import ConfigError
from configs.schema import SHIPPED_DEEPSPEED, load_config, shipped_config
from train.deepspeed_json import (
    FOLDER,
    compiled_optimizer,
    deepspeed_path,
    read_deepspeed,
    require_compiler,
)
from train.estimate import plan_of
from train.settings import describe_step, zero_stage


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b'{"a": ' * 100_000, "cannot be read as JSON"),
        (b"[1]", "no JSON object"),
        (b'{"zero_optimization": 3}', "zero_optimization is 3, not an object"),
        (b'{"zero_optimization": null}', "zero_optimization is null, not an object"),
        (b'{"zero_optimization": {"stage": "abc"}}', 'stage is "abc"; write 0, 1, 2 or 3'),
        (b'{"zero_optimization": {"stage": null}}', "stage is null; write"),
        (b'{"zero_optimization": {"stage": true}}', "stage is true; write"),
        (b'{"zero_optimization": {"stage": NaN}}', "stage is NaN; write"),
        (b'{"zero_optimization": {"stage": 9}}', "stage is 9; write"),
        (b'{"zero_optimization": {"stage": [2]}}', "stage is a list; write"),
        (b'{"zero_optimization": {"stage": 1' + b"0" * 400 + b"}}", r"0\.\.\.; write"),
        (b'{"zero_optimization": {"offload_optimizer": 5}}', "offload_optimizer is 5, not an obj"),
        (b'{"zero_optimization": {"offload_param": []}}', "offload_param is a list, not an obj"),
        (
            b'{"zero_optimization": {"offload_param": {"device": "gpu"}}}',
            'offload_param.device is "gpu"; write none, cpu or nvme',
        ),
        (b'{"optimizer": "AdamW"}', 'optimizer is "AdamW", not an object'),
        (b'{"optimizer": {"params": null}}', "optimizer.params is null, not an object"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else "",
)
def test_a_bad_file_is_refused_by_all_who_read_it(tmp_path, content, reason):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    config = load_config(shipped_config("demo"), [f"deepspeed={path}"])
    for read in (zero_stage, lambda config: describe_step(config, 1), lambda c: plan_of(c, 1)):
        with pytest.raises(ConfigError, match=rf"^deepspeed: \S*mine\.json.*{reason}"):
            read(config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": None},
        {"zero_optimization": {}},
        {"zero_optimization": {"stage": 2.0, "offload_optimizer": None}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        {**OFFLOAD, **ADAM},
    ],
)
def test_what_deepspeed_takes_is_read(tmp_path, settings):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(settings))
    config = load_config(shipped_config("demo"), [f"deepspeed={path}"])
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    assert read_deepspeed(path) == settings
    assert zero_stage(config) == plan_of(config, 1).zero == stage
