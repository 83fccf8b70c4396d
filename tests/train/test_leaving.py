"""A process that is done leaves torch.distributed in good order, whatever gloo still holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import Config
from train import run

ROOT = Path(__file__).parents[2]

# The first process hands over a tensor that takes seconds to let go of, and comes to its end while
# the thread of gloo that held it last is at it.
PROGRAM = """
import os, sys, threading, time
import torch
import torch.distributed as dist
from train.settings import leave_group_at_exit

begun = threading.Event()

class Slow(torch.Tensor):
    def __del__(self):
        begun.set()
        time.sleep(0.1 if sys.argv[2] == "is held" else 3)
        print("gone", flush=True)

rank = int(os.fork() == 0)
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
tensor = torch.ones(8)
if rank == 0:
    tensor = tensor.as_subclass(Slow)
    dist.all_reduce(tensor, async_op=True)
    del tensor  # from here on gloo alone has it
    assert begun.wait(60)
else:
    time.sleep(0.2)
    dist.all_reduce(tensor)
if sys.argv[2] == "is held":  # as DeepSpeed's parameters hold it
    group = dist.group.WORLD
if sys.argv[2] != "just ends":
    leave_group_at_exit()
    leave_group_at_exit()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["leaves", "is held", "just ends"])
def test_a_finished_process_waits_for_the_threads_of_gloo(tmp_path, how):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "store", how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if how != "just ends":
        assert (result.returncode, result.stdout) == (0, "gone\n"), result.stderr
    else:  # the day torch waits by itself, leave_group_at_exit can go
        assert (result.returncode < 0, result.stdout) == (True, ""), result.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_asks_for_it_when_all_went_well(tmp_path, monkeypatch, fails):
    def train(*_):
        if fails:
            raise RuntimeError("diverged")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else it decides on this process' threads
    asked = []
    monkeypatch.setattr(run, "build_grpo_config", lambda *_, **__: None)
    monkeypatch.setattr(run, "_train", train)
    monkeypatch.setattr(run, "leave_group_at_exit", lambda: asked.append(True))
    arguments = (Config(output=str(tmp_path)), tmp_path, "init", False, None, None)
    if fails:
        with pytest.raises(RuntimeError, match="diverged"):
            run._train_in(*arguments)
    else:
        assert run._train_in(*arguments) == tmp_path
    assert asked == [True] * (not fails)
