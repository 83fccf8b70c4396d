"""Which checkpoint a run goes on from, and what is refused; the numbers are test_launch's."""

import json

import pytest

from configs.errors import ConfigError
from configs.schema import load_config
from train.resume import Saved, Start, convert, find_start, state_name, whole_checkpoints


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "output: x\n"
        "grpo: {per_device_train_batch_size: 8, num_generations: 4, steps_per_generation: 2}\n"
        "deepspeed: zero2\n"
    )
    return lambda *overrides: load_config(path, overrides)


def save(folder, step, n_processes=2, n_files=None, **changes):
    """A checkpoint as two processes with the settings above write it."""
    path = folder / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").touch()
    for rank in range(n_processes if n_files is None else n_files):
        (path / state_name(rank)).touch()
    values = {"is_boundary": True, "per_rollout": 32, "per_step": 16, "zero_stage": 2} | changes
    Saved(n_processes=n_processes, **values).write(path)
    return path


def test_an_unfinished_checkpoint_is_not_resumed_from(tmp_path, config):
    assert find_start(tmp_path, config(), 2) is None
    save(tmp_path, 9)
    save(tmp_path, 10)
    save(tmp_path, 11, n_files=1)
    (save(tmp_path, 12) / "rollout.json").unlink()
    (save(tmp_path, 13) / "trainer_state.json").unlink()
    assert [path.name for path, _ in whole_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
    ]
    start = find_start(tmp_path, config(), 2)
    assert (start.step, start.needs_conversion) == (10, False)


def test_another_number_of_processes_goes_on_at_a_boundary(tmp_path, config):
    save(tmp_path, 2)
    save(tmp_path, 3, is_boundary=False)
    assert find_start(tmp_path, config(), 2).step == 3
    start = find_start(tmp_path, config("grpo.per_device_train_batch_size=16"), 1)
    assert (start.step, start.needs_conversion) == (2, True)


def test_without_deepspeed_nothing_is_converted(tmp_path, config):
    save(tmp_path, 2, zero_stage=0)
    settings = config("grpo.per_device_train_batch_size=16", "deepspeed=none")
    assert not find_start(tmp_path, settings, 1).needs_conversion


def test_inside_a_buffer_the_number_must_stay(tmp_path, config):
    save(tmp_path, 1, is_boundary=False)
    with pytest.raises(ConfigError, match=r"inside a generation buffer that 2 processes share"):
        find_start(tmp_path, config("grpo.per_device_train_batch_size=16"), 1)


@pytest.mark.parametrize(
    ("overrides", "n_processes", "fix"),
    [
        ((), 1, "1 processes x 8 x 1 make 8 and 16; set it to 16"),
        ((), 4, "set it to 4"),
        (("grpo.gradient_accumulation_steps=2",), 2, "set it to 4"),
        ((), 3, "choose a number of processes that divides 16"),
    ],
)
def test_the_completions_of_a_step_must_stay_and_the_fix_is_said(
    tmp_path, config, overrides, n_processes, fix
):
    save(tmp_path, 2)
    with pytest.raises(ConfigError, match=rf"16 completions a step and 32 a rollout.*{fix}"):
        find_start(tmp_path, config(*overrides), n_processes)


def test_accumulation_may_take_the_place_of_processes(tmp_path, config):
    save(tmp_path, 2)
    settings = config("grpo.gradient_accumulation_steps=2", "grpo.steps_per_generation=4")
    assert find_start(tmp_path, settings, 1).needs_conversion


@pytest.mark.parametrize(("name", "shown"), [("zero3", "ZeRO-3"), ("none", "plain torch")])
def test_another_stage_is_refused(tmp_path, config, name, shown):
    save(tmp_path, 2)
    with pytest.raises(ConfigError, match=f"optimizer of ZeRO-2, which {shown} cannot load"):
        find_start(tmp_path, config(f"deepspeed={name}"), 2)


def test_a_conversion_that_fails_shows_why(tmp_path, config):
    path = save(tmp_path, 2)
    (path / "latest").write_text("global_step2")
    saved = dict(whole_checkpoints(tmp_path))[path]
    assert json.loads((path / "rollout.json").read_text())["n_processes"] == 2
    with pytest.raises(ConfigError, match=r"cannot convert .*checkpoint-2.*exit code 1.*; go on w"):
        convert(Start(path, saved, needs_conversion=True), rank=0)
    assert not (path / "latest_universal").exists()
