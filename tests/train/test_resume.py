"""Which checkpoint a run goes on from, and what is refused; the numbers are test_launch's."""

import json

import pytest

from configs.errors import ConfigError
from configs.schema import load_config
from train.checkpoint_files import check_pickles, measure_files
from train.resumable import remove_older
from train.resume import Saved, Start, convert, find_start, state_name, whole_checkpoints
from train.settings import name_enums_by_value


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


def test_copies_under_other_names_are_left_alone(tmp_path, config):
    for name in (9, "9-good", "10-2", "last"):
        save(tmp_path, name)
    assert [path.name for path, _ in whole_checkpoints(tmp_path)] == ["checkpoint-9"]
    assert find_start(tmp_path, config(), 2).step == 9


def test_the_oldest_of_our_own_checkpoints_go_and_copies_stay(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("3", "9", "20", "9-good", "30-best", "40"):
        (folder / f"checkpoint-{name}").mkdir(parents=True)
    # 40 is of another run: the one just written stays, whatever its number
    remove_older(folder / "checkpoint-20", 2)
    left = sorted(path.name.removeprefix("checkpoint-") for path in folder.iterdir())
    assert left == ["20", "30-best", "40", "9-good"]
    remove_older(folder / "checkpoint-20", None)
    remove_older(folder / "checkpoint-20", 1)
    left = sorted(path.name.removeprefix("checkpoint-") for path in folder.iterdir())
    assert left == ["20", "30-best", "9-good"]


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


def test_inside_a_buffer_its_micro_batches_must_stay(tmp_path, config):
    """Two of eight rows wait in the buffer, not four of four."""
    other = config(
        "grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=2",
        "grpo.steps_per_generation=4",
    )  # fmt: skip
    save(tmp_path, 3, is_boundary=False, per_batch=8)
    assert find_start(tmp_path, config(), 2).step == 3
    with pytest.raises(ConfigError, match=r"micro-batches of 8; .*per_device_train_batch_size=8"):
        find_start(tmp_path, other, 2)
    save(tmp_path, 2, per_batch=8)
    assert find_start(tmp_path, other, 2).step == 2
    save(tmp_path, 5, is_boundary=False)  # of an older version, which did not note them
    assert find_start(tmp_path, other, 2).step == 5


@pytest.mark.parametrize(
    ("overrides", "n_processes", "fix"),
    [
        ((), 1, "1 processes x 8 x 1 make 8 and 16; set it to 16"),
        ((), 4, "set it to 4"),
        (("grpo.gradient_accumulation_steps=2",), 2, "set it to 4"),
        ((), 3, "choose a number of processes that divides 16"),
        # as many a step as before, but a rollout of four micro-batches of eight
        (
            (
                "grpo.per_device_train_batch_size=4",
                "grpo.gradient_accumulation_steps=2",
                "grpo.steps_per_generation=2",
            ),
            2,
            "set grpo.steps_per_generation to 4",
        ),
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


# ---------------------------------------------------------------- files of a checkpoint


def damaged(path, name="trainer_state.json"):
    """A checkpoint whose file has lost its end since it was written."""
    (path / name).write_text("{}\n")
    record = json.loads((path / "rollout.json").read_text())
    record["files"] = {**measure_files(path), name: 100}
    (path / "rollout.json").write_text(json.dumps(record))
    return path


def test_a_truncated_checkpoint_is_passed_over_and_named(tmp_path, config, caplog):
    save(tmp_path, 1)
    damaged(save(tmp_path, 2))
    assert find_start(tmp_path, config(), 2).step == 1
    assert "checkpoint-2/trainer_state.json has 3 bytes, and was written with 100" in caplog.text


def test_a_run_whose_only_checkpoint_is_truncated_does_not_start_over_in_silence(tmp_path, config):
    path = damaged(save(tmp_path, 2))
    with pytest.raises(ConfigError, match=r"--resume: .*trainer_state\.json has 3 bytes.*copy the"):
        find_start(tmp_path, config(), 2)
    (path / "trainer_state.json").unlink()
    # as of a checkpoint that was never finished
    assert find_start(tmp_path, config(), 2) is None


def test_a_pickle_that_names_code_is_refused_unopened(tmp_path):
    import torch

    class Hostile:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    from torch import nn

    sound = {"weights": nn.Linear(2, 2).state_dict(), "step": 3}
    torch.save(sound, tmp_path / "rollout_state_0.pt")
    check_pickles(tmp_path)
    (tmp_path / "global_step2").mkdir()
    torch.save({"optimizer": Hostile()}, tmp_path / "global_step2" / "x_optim_states.pt")
    with pytest.raises(ConfigError, match=r"x_optim_states\.pt is not opened, because it names"):
        check_pickles(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["latest", "latest_universal"])
@pytest.mark.parametrize("tag", ["../other", "/other", "global_step2/../other", "", "\udcff"])
def test_a_folder_that_deepspeed_would_not_write_is_refused(tmp_path, name, tag):
    (tmp_path / name).write_text("global_step2_universal\n")
    check_pickles(tmp_path)
    (tmp_path / name).write_text(tag, errors="surrogateescape")
    with pytest.raises(ConfigError, match=f"{name} names .* no folder that DeepSpeed wrote; take"):
        check_pickles(tmp_path)


@pytest.mark.parametrize("name", ["global_step2", "rollout_state_0.pt"])
def test_a_link_within_a_checkpoint_is_refused(tmp_path, name):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / name).symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=f"{name} is a link, .*; copy the run again with"):
        check_pickles(tmp_path / "checkpoint")


def test_a_function_within_deepspeed_is_not_taken_for_a_class_of_its_own(tmp_path, monkeypatch):
    import torch

    path = tmp_path / "x.pt"
    torch.save({}, path)
    for name, is_allowed in {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler": True,
        "deepspeed.runtime.zero.config.ZeroStageEnum": True,
        "deepspeed.launcher.runner.os.system": False,
        "deepspeed.launcher.runner.main": False,
        "builtins.eval": False,
    }.items():
        monkeypatch.setattr(
            "torch.serialization.get_unsafe_globals_in_checkpoint", lambda path, name=name: [name]
        )
        if is_allowed:
            check_pickles(tmp_path)
            continue
        with pytest.raises(ConfigError, match=f"names {name}"):
            check_pickles(tmp_path)


def test_a_checkpoint_names_no_getattr_in_any_python(tmp_path, monkeypatch):
    """As Python 3.11.0 to 3.11.3 pickle an enum it would, and could not be gone on with."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = tmp_path / "zero_optim_states.pt"
    early = lambda self, protocol: (getattr, (type(self), self._name_))  # noqa: E731
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", early)
    torch.save({"zero_stage": ZeroStageEnum.weights}, path)
    with pytest.raises(ConfigError, match=r"because it names builtins\.getattr"):
        check_pickles(tmp_path)
    name_enums_by_value()
    torch.save({"zero_stage": ZeroStageEnum.weights}, path)
    check_pickles(tmp_path)
    assert torch.load(path, weights_only=False)["zero_stage"] is ZeroStageEnum.weights


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"cos\nsystem\n(S'true'\ntR."])
def test_a_pickle_that_cannot_be_read_is_one_error(tmp_path, content):
    (tmp_path / "optimizer.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"optimizer\.pt cannot be read .*; copy the run again"):
        check_pickles(tmp_path)
