"""A training that is broken off at the worst moments, and two on one folder."""

import json

import pytest

from configs.errors import ConfigError
from configs.schema import load_config
from tests.train.test_run import run_with, write_config  # noqa: F401
from train.lock import locked
from train.resume import whole_checkpoints
from train.run_folder import prepare_folder


def test_an_older_checkpoint_stays_until_the_new_one_is_whole(
    write_config,  # noqa: F811
    monkeypatch,
):
    from train.resume import Saved

    write = Saved.write

    def broken(self, checkpoint):
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt  # a kill between the last file and the record
        write(self, checkpoint)

    monkeypatch.setattr(Saved, "write", broken)
    settings = ("grpo.save_steps=1", "grpo.save_total_limit=1", "grpo.max_steps=2")
    path = write_config()
    with pytest.raises(KeyboardInterrupt):
        run_with(path, *settings)
    folder = path.parent / "run"
    assert [found.name for found, _ in whole_checkpoints(folder)] == ["checkpoint-1"]
    monkeypatch.undo()
    run_with(path, *settings, resume=True)
    assert [found.name for found in (folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    record = json.loads((folder / "checkpoints" / "checkpoint-2" / "rollout.json").read_text())
    assert record["files"]["trainer_state.json"] > 0
    assert "rollout.json" not in record["files"]
    assert record["per_batch"] == load_config(path).grpo["per_device_train_batch_size"]


def test_a_folder_in_which_only_a_torn_file_lies_can_be_begun(write_config):  # noqa: F811
    config = load_config(write_config())
    folder = write_config().parent / "run"
    for flags in ((True, False), (False, False), (False, True)):
        folder.mkdir()
        (folder / ".config.yaml.tmp").write_text("outp")
        prepare_folder(folder, config, config.models.init, *flags)
        assert load_config(folder / "config.yaml") == config
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_a_run_under_way_is_neither_joined_nor_deleted(write_config, flags):  # noqa: F811
    path = write_config()
    folder = path.parent / "run"
    with locked(folder):
        (folder / "config.yaml").write_text("output: x\n")
        with pytest.raises(ConfigError, match=r"run is in use by process \d+ .*another output"):
            run_with(path, **flags)
        assert (folder / "config.yaml").read_text() == "output: x\n"


def test_an_overwrite_that_is_killed_leaves_a_folder_that_can_be_overwritten(
    write_config,  # noqa: F811
    monkeypatch,
):
    config = load_config(write_config())
    folder = write_config().parent / "run"
    for name in ("a", "z"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text("output: x\n")
    monkeypatch.setattr("train.run_folder.shutil.rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(folder, config, config.models.init, False, True)
    assert (folder / "config.yaml").exists()
    monkeypatch.undo()
    prepare_folder(folder, config, config.models.init, False, True)
    assert not (folder / "z").exists()


def test_a_run_does_not_go_on_from_a_start_that_was_merged_anew(write_config, tmp_path):  # noqa: F811
    config = load_config(write_config())
    folder, start = tmp_path / "run", tmp_path / "start"
    start.mkdir()

    def record(checksum):
        entry = {"checksum": checksum, "inputs": {}, "group": "linear", "dtype": "F32", "shape": []}
        vlm = {"source": "vlm"}
        content = {"method": checksum, "parents": {"vlm": vlm}, "tensors": {"up": entry}}
        (start / "merge.json").write_text(json.dumps(content))
        return (start / "merge.json").read_bytes()

    first = record("1")
    prepare_folder(folder, config, str(start), False, False)
    prepare_folder(folder, config, str(start), True, False)
    record("2")
    with pytest.raises(
        ConfigError, match=r"models\.init: .*start was merged otherwise .* up is the"
    ):
        prepare_folder(folder, config, str(start), True, False)
    assert (folder / "merge.json").read_bytes() == first
    second = record("2")
    prepare_folder(folder, config, str(start), False, True)
    assert (folder / "merge.json").read_bytes() == second


def interrupt(path, *arguments, **options):
    raise KeyboardInterrupt
