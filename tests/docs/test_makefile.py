"""Longer targets of the Makefile, with programs in place of the real ones that only take notes."""

import math
import re
import shutil
import subprocess

import pytest

from launch.bench_merge import bytes_needed
from tests.docs.blocks import ROOT

PROGRAM = """#!/bin/sh
echo "$(basename $0) $*" >> {log}
case "$*" in {failing}) exit 1;; esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs a target in a folder of its own; the calls that match `failing` exit with 1."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "environments/atlas/checkpoints/base").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "stamp"):  # the stamp last
        (tmp_path / name).touch()
    log = tmp_path / "calls"

    def run(target, failing="nothing"):
        for name in ("obm", "python"):
            program = tmp_path / name
            program.write_text(PROGRAM.format(log=log, failing=failing))
            program.chmod(0o755)
        command = ["make", "--silent", target, f"BIN={tmp_path}", "STAMP=stamp"]
        code = subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
        return code, log.read_text().splitlines()

    return run


def test_all_results_are_made_and_the_figures_mended_at_the_end(make):
    code, calls = make("results-all")
    assert code == 0
    assert calls[-1] == "python -m launch.results_check --write"
    benches = [call.split()[2:] for call in calls if call.startswith("obm bench")]
    assert all(words[-1] == "--allow-missed" for words in benches)
    names = {" ".join(words[:-1]) for words in benches}
    assert names == {"", "merge", "rollout", "serve", "rewards", "calibration"}


def test_after_the_studies_a_failure_stops_nothing_and_is_not_forgotten(make):
    _, calls = make("results-all")
    code, again = make("results-all", failing='"bench serve"*|tests/train/soak.py*')
    assert code != 0
    assert again[len(calls) :] == calls


def test_a_study_that_fails_ends_all_results(make):
    code, calls = make("results-all", failing='"study floor"*')
    assert code != 0
    assert calls[-1].split() == ["obm", "study", "floor"]


@pytest.mark.parametrize(("calibrated", "n_calls"), [((), 1), (("vlm",), 1), (("vlm", "agent"), 0)])
def test_half_a_calibration_of_the_worlds_is_finished(make, tmp_path, calibrated, n_calls):
    for role in calibrated:
        folder = tmp_path / "runs/worlds/calibration" / role
        folder.mkdir(parents=True)
        (folder / "stats.safetensors").touch()
    _, calls = make("study-worlds")
    assert sum(call.startswith("obm calibrate") for call in calls) == n_calls


def test_the_disk_that_the_bench_of_the_merge_takes_is_what_it_asks_for():
    [said] = re.findall(r"^bench-merge: .* (\d+) GB of disk", (ROOT / "Makefile").read_text(), re.M)
    assert int(said) == math.ceil(bytes_needed(["0.5b", "1.5b", "7b"], keep=False) / 1e9)
