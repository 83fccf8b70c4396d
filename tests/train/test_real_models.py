"""The shipped settings of real models: each dry-runs, fits, and stands in the documentation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.schema import load_config, shipped_config
from train.estimate import estimate, find_machine, plan_of
from train.plan import GB
from train.run import describe_run, train
from train.settings import describe_step

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "real-models.md"

SHIPPED = {
    "qwen2.5-vl-3b": ("h100x8", 0),
    "qwen2.5-vl-3b-1gpu": ("h100", 0),
    "qwen2.5-vl-7b": ("h100x8", 0),
    "qwen2.5-vl-7b-vllm": ("h100x4", 4),
    "mmsearch-r1": ("h100x8", 0),
}
"""settings -> machine of the trainer, accelerators of the server"""


def expected(name, prompt_tokens=None):
    machine, server_gpus = SHIPPED[name]
    accelerator, n_processes = find_machine(machine, 1)
    config = load_config(shipped_config(name))
    plan = plan_of(config, n_processes, prompt_tokens, server_gpus or 1)
    return estimate(plan, accelerator), config


def row(name, prompt_tokens):
    """A line of the table in docs/real-models.md."""
    found, config = expected(name, prompt_tokens)
    machine, server_gpus = SHIPPED[name]
    hours = found.step_s * config.grpo["max_steps"] / 3600
    longest = max(found.seconds, key=lambda stage: found.seconds[stage])
    server = f" + {server_gpus}" if server_gpus else ""
    return (
        f"| `{name}` | {machine}{server} | {found.plan.prompt_tokens} | "
        f"{found.memory.peak / GB:.1f} ({found.memory.peak_phase}) | {found.step_s:.0f} "
        f"({longest} {found.seconds[longest]:.0f}) | {hours:.1f} |"
    )


def test_the_settings_for_real_models_are_these():
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert files == {*SHIPPED, "demo", "maps"}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("prompt_tokens", [None, 1500])
def test_each_fits_with_the_embedded_worlds_prompts_and_with_real_photos(name, prompt_tokens):
    found, _ = expected(name, prompt_tokens)
    assert found.fits
    assert found.memory.peak > 10 * GB
    assert found.step_s > 1


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("prompt_tokens", [None, 1500])
def test_the_page_shows_what_the_model_says(name, prompt_tokens):
    assert row(name, prompt_tokens) in PAGE.read_text().splitlines()


@pytest.mark.parametrize("name", SHIPPED)
def test_each_dry_runs_through_the_launchers_door(name, monkeypatch, capsys):
    machine, server_gpus = SHIPPED[name]
    kind, _, n = machine.partition("x")
    monkeypatch.setenv("WORLD_SIZE", n or "1")
    monkeypatch.setenv("RANK", "0")
    path = str(shipped_config(name))
    arguments = ["--config", path, "--dry-run", "--machine", kind]
    assert train([*arguments, "--server-gpus", str(server_gpus or 1)]) == 0
    printed = capsys.readouterr().out
    assert f"expected on {n or 1} x h100" in printed
    assert "card of Qwen/Qwen2.5-VL" in printed
    assert "WARNING" not in printed


def test_three_processes_cannot_hold_whole_groups():
    """3 x 4 x 8 = 96 completions are twelve groups of 8; 3 x 4 x 1 = 12 are none."""
    config = load_config(shipped_config("qwen2.5-vl-7b"), ["grpo.gradient_accumulation_steps=1"])
    with pytest.raises(ConfigError, match=r"12 completions .* cannot be cut into groups of 8"):
        describe_step(config, 3)
    with pytest.raises(ConfigError, match="groups of 8"):
        describe_run(config, 1, machine="h100x3")


def test_the_3b_on_one_gpu_would_not_fit_without_its_offload():
    accelerator, _ = find_machine("h100", 1)
    for stage in ("none", "zero2", "zero3"):
        config = load_config(shipped_config("qwen2.5-vl-3b-1gpu"), [f"deepspeed={stage}"])
        assert not estimate(plan_of(config, 1), accelerator).fits


def test_an_adapter_on_one_gpu_fits_without_offload():
    overrides = ["deepspeed=zero2", "lora.r=32"]
    config = load_config(shipped_config("qwen2.5-vl-3b-1gpu"), overrides)
    accelerator, _ = find_machine("h100", 1)
    assert estimate(plan_of(config, 1), accelerator).fits
    assert "LoRA rank 32" in describe_run(config, 1)


def test_a_dry_run_loads_no_library_and_is_quick():
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "from configs.schema import load_config, shipped_config\n"
        "from train.run import describe_run\n"
        f"for name in {['demo', 'maps', *SHIPPED]}:\n"
        "    describe_run(load_config(shipped_config(name)), 8)\n"
        "print(time.process_time() - start)\n"
        "sys.exit(bool({'torch', 'transformers', 'trl'} & {*sys.modules}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 2.0
