"""Fisher information from the optimizer of real DeepSpeed checkpoints of two processes."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merge.adam import adam_fisher, open_adam
from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.stats import open_stats
from tests.merge import deepspeed_checkpoints as trained
from train.settings import free_port

ROOT = Path(__file__).parents[2]
# two processes that import torch and DeepSpeed
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with zero1, zero2 and zero3, each written by two processes."""
    folder = tmp_path_factory.mktemp("deepspeed")
    port = str(free_port())
    command = [sys.executable, trained.__file__, str(folder), "1", "2", "3"]
    logs = [(folder / f"log{rank}").open("w") for rank in range(2)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    codes = [process.wait(timeout=900) for process in processes]
    assert codes == [0, 0], (folder / "log0").read_text()[-2000:]
    return folder


@pytest.fixture(scope="module")
def expected():
    """Adam's second moments of the same steps in one process, bias removed."""
    correction = 1 - 0.999**trained.STEPS
    return {name: moment / correction for name, moment in trained.train_plainly(2).items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_moments_are_those_of_the_same_steps_without_deepspeed(checkpoints, expected, stage):
    adam = open_adam(checkpoints / f"zero{stage}")
    assert (adam.stage, adam.step, len(adam.ranks)) == (stage, trained.STEPS, 2)
    found = dict(adam.moments())
    assert found.keys() == expected.keys()
    for name, moment in expected.items():
        # gradients of two processes are averaged in another order: a few roundings of fp32
        torch.testing.assert_close(found[name], moment, rtol=1e-3, atol=1e-7 * moment.max().item())
        assert moment.max() > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_files_of_a_training_in_bf16_are_found_under_their_names(checkpoints, tmp_path, stage):
    copied = tmp_path / "zero"
    shutil.copytree(checkpoints / f"zero{stage}", copied)
    for path in copied.rglob("*_optim_states.pt"):
        path.rename(path.with_name(f"bf16_{path.name}"))
    expected = dict(open_adam(checkpoints / f"zero{stage}").moments())
    found = dict(open_adam(copied).moments())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], moment) for name, moment in expected.items())


def test_they_become_statistics_that_merges_read(checkpoints, expected, tmp_path):
    checkpoint = Checkpoint(checkpoints / "zero2", "agent")
    path = adam_fisher(checkpoints / "zero2", checkpoint, tmp_path)
    stats = open_stats(path, "fisher")
    assert set(stats.names) == {name for name in expected if "embed" not in name}
    assert (stats.metadata["origin"], stats.metadata["steps"]) == (
        "exp_avg_sq of Adam, ZeRO-2",
        "3",
    )
    name = "model.layers.1.mlp.down_proj.weight"
    read = torch.tensor(stats.entries(name, 0, expected[name].numel())).reshape(24, 40)
    torch.testing.assert_close(read, expected[name], rtol=1e-3, atol=1e-12)
    assert stats.weights[name] == checkpoint.checksum(name)


def test_the_optimizer_of_other_weights_is_refused(checkpoints, make_trio, tmp_path):
    copied = tmp_path / "zero2"
    shutil.copytree(checkpoints / "zero2", copied)
    other = tmp_path / "other"
    other.mkdir()
    model, _ = trained.make_model()
    model.save_pretrained(other)
    with pytest.raises(MergeError, match="is the optimizer of other weights"):
        adam_fisher(copied, Checkpoint(other, "agent"), tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


def test_a_file_that_is_missing_is_named(checkpoints, tmp_path):
    copied = tmp_path / "zero2"
    shutil.copytree(checkpoints / "zero2", copied)
    states = copied / f"global_step{trained.STEPS}"
    (states / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(MergeError, match=r"was written by 2 processes, there are files of \[0\]"):
        open_adam(copied)
    for file in states.glob("*.pt"):
        file.unlink()
    with pytest.raises(MergeError, match="holds no optimizer of DeepSpeed"):
        open_adam(copied)
    (copied / "optimizer.pt").write_bytes(b"")
    with pytest.raises(MergeError, match="was trained without DeepSpeed"):
        open_adam(copied)


def test_the_home_of_nobody_holds_no_optimizer():
    with pytest.raises(MergeError, match="x: holds no optimizer of DeepSpeed"):
        open_adam("~nobody-of-this-name/x")


class NamedByGetattr:
    """A member of an enum, as Python 3.11.0 to 3.11.3 pickle it."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return getattr, (ZeroStageEnum, self.name)


def test_a_checkpoint_of_an_early_python_3_11_is_read(checkpoints, tmp_path):
    copied = tmp_path / "zero3"
    shutil.copytree(checkpoints / "zero3", copied)
    expected = dict(open_adam(checkpoints / "zero3").moments())
    name_stage(copied, "weights")
    adam = open_adam(copied)
    assert adam.stage == 3
    assert all(torch.equal(moment, expected[name]) for name, moment in adam.moments())


def test_what_a_file_asks_of_getattr_is_not_looked_up(checkpoints, tmp_path):
    copied = tmp_path / "zero3"
    shutil.copytree(checkpoints / "zero3", copied)
    name_stage(copied, "__subclasses__")
    with pytest.raises(
        MergeError, match=r"rank_0\S*\.pt: its zero_stage is none of \[0, 1, 2, 3\]"
    ):
        open_adam(copied)


def name_stage(folder, name):
    for path in folder.rglob("*_optim_states.pt"):
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["zero_stage"] = NamedByGetattr(name)
        torch.save(content, path)


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['HOSTILE_MARK']}",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    checkpoints, tmp_path, monkeypatch
):
    copied = tmp_path / "zero2"
    shutil.copytree(checkpoints / "zero2", copied)
    mark = tmp_path / "ran"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    path = copied / f"global_step{trained.STEPS}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Hostile()}, path)
    with pytest.raises(MergeError, match=r"rank_0_mp_rank_00_optim_states\.pt: is not read"):
        open_adam(copied)
    assert not mark.exists()
    # the file is as dangerous as it says: an ordinary unpickler would have run it
    pickle.loads(pickle.dumps(Hostile()))
    assert mark.exists()
