"""Several nodes: the Slurm script starts `deepspeed --hostfile` on two nodes of one process each.

Both nodes are this machine and Slurm's programs are stand-ins; everything else is as on a cluster:
every node starts its own launcher, and the processes find each other by the master's address.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.settings import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "train.sh"
SETTINGS = """
output: {output}
models: {{init: {init}}}
environment: {{train_size: 8, eval_size: 2, kinds: [two], eval_kinds: [two]}}
grpo: {{per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 40,
  generation_kwargs: {{max_new_tokens: 8}}, max_steps: 1, save_steps: 1}}
deepspeed: zero2
tracking: {{wandb: disabled}}
"""

FAKE_SRUN = """#!/bin/bash
# takes srun's options, and runs the command once for every node of the allocation
while [[ $1 == --* ]]; do echo "$1" >> "$SRUN_LOG"; shift; done
pids=()
for node in 0 1; do
  SLURM_NODEID=$node SLURM_PROCID=$node "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
FAKE_SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames cluster[1-2]" ] && printf 'localhost\\n127.0.0.1\\n'
"""


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    programs = os.pathsep.join(map(str, (*folders, Path(sys.executable).parent)))
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}


@pytest.fixture
def settings(tiny_checkpoints, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS.format(output=tmp_path / "run", init=tiny_checkpoints["vlm"]))
    return path


def assert_two_processes_trained(folder: Path) -> None:
    assert json.loads((folder / "done.json").read_text())["step"] == 1
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    saved = json.loads((folder / "checkpoints" / "checkpoint-1" / "rollout.json").read_text())
    assert saved["n_processes"] == 2


def test_deepspeed_reads_the_hostfile_that_is_shown():
    from deepspeed.launcher.runner import fetch_hostfile

    path = ROOT / "launch" / "hostfile.example"
    assert fetch_hostfile(str(path)) == {"node1": 8, "node2": 8}


@pytest.mark.timeout(1000)
def test_the_slurm_script_starts_every_node_and_resumes_after_preemption(settings, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    variables = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "cluster[1-2]", "SLURM_SUBMIT_DIR": str(ROOT),
        "MASTER_PORT": str(free_port()), "SRUN_LOG": str(tmp_path / "srun.log"),
        # the run folder is there, so without --resume this would be refused
        "SLURM_RESTART_COUNT": "1",
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    written = settings.read_text()
    (tmp_path / "run" / "config.yaml").write_text(written)
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sh"), "--config", str(settings)],
        env=environment(programs, **variables),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "--kill-on-bad-exit=1" in (tmp_path / "srun.log").read_text()
    assert "nnodes=2, num_local_procs=1" in done.stdout + done.stderr
    assert_two_processes_trained(tmp_path / "run")
    assert not list(ROOT.glob(".hostfile-*"))


def test_the_slurm_script_says_where_it_has_to_be_submitted(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sh")],
        env=environment(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7"),
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "submit from the checkout, or set OBM_ROOT" in done.stderr
