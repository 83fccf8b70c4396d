"""A hang ends with a message that names the process and the stage; a slow process is no hang."""

import subprocess
import sys
import threading
import time

import pytest

from train.watchdog import (
    HANG_EXIT_CODE,
    Heartbeat,
    Progress,
    Watchdog,
    clear_heartbeats,
    describe_hang,
    find_suspects,
    memory_gb,
    progress,
    read_heartbeats,
)


def beat(rank, stage, step=12, idle=1800.0, unseen=1.0, now=10_000.0):
    return Heartbeat(rank, stage, step, now - idle, now - unseen, f"node{rank}", 100 + rank)


def describe(*beats, n=None):
    return describe_hang(
        list(beats), n or len(beats), now=10_000.0, silent_s=60.0, timeout_s=1800.0
    )


def test_who_does_not_wait_is_named_first_though_the_others_stand_longer():
    text = describe(beat(0, "sync", idle=1900), beat(1, "tools"), beat(2, "sync", idle=1950))
    assert text == (
        "no progress for 1800 s: rank 1 has been in 'tools' for 1800 s (step 12); "
        "ranks 0, 2 wait in 'sync' for 1950 s (step 12)"
    )


def test_who_is_a_step_behind_holds_up_the_rest():
    beats = [beat(0, "loss", step=13), beat(1, "save", step=12)]
    assert [b.rank for b in find_suspects(beats, 10_000.0, 60.0)] == [1]


def test_a_process_that_shows_no_sign_of_life_is_named_with_its_place():
    text = describe(beat(0, "loss"), beat(1, "loss", unseen=1790))
    assert "rank 1 gives no sign of life (node1 pid 101), last in 'loss'" in text
    assert text.endswith("rank 0 waits in 'loss' for 1800 s (step 12)")


def test_a_process_that_never_showed_itself_is_named():
    assert describe(beat(0, "start", step=0), n=3).endswith("of rank 1, 2 nothing was ever seen")


def test_stages_nest():
    own = Progress()
    with own.stage("generate"), own.stage("tools"):
        assert own.stages == ["start", "generate", "tools"]
    assert own.stages == ["start"]
    own.begin("load")
    assert own.stages == ["load"]


def test_heartbeats_say_the_stage_and_the_step(tmp_path):
    with progress.stage("reward"), Watchdog(tmp_path, 1, 2, timeout_s=None, step=lambda: 7) as dog:
        assert dog.poll_s == 15.0
        deadline = time.monotonic() + 10  # it shows itself before the first pause is over
        while not (beats := read_heartbeats(tmp_path / "heartbeat")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        [shown] = beats
    assert (shown.rank, shown.stage, shown.step) == (1, "reward", 7)
    [last] = read_heartbeats(tmp_path / "heartbeat")
    assert last.stage == "done"
    clear_heartbeats(tmp_path)
    assert read_heartbeats(tmp_path / "heartbeat") == []


def test_the_memory_shown_is_that_of_this_processs_own_card(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=0: (device + 1) * 1e9)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert memory_gb() == 4.0
    monkeypatch.delenv("LOCAL_RANK")
    assert memory_gb() == 1.0


def test_waiting_for_a_process_that_makes_progress_is_no_hang(tmp_path):
    watchdog = Watchdog(tmp_path, 0, 2, timeout_s=5)
    watchdog.folder.mkdir()
    progress.since = time.time() - 10
    watchdog._write("sync")
    assert watchdog._is_hanging()
    other = Watchdog(tmp_path, 1, 2, timeout_s=5)
    progress.since = time.time()
    other._write("tools")
    progress.since = time.time() - 10
    assert not watchdog._is_hanging()


STUCK = """
import sys, threading
from pathlib import Path
from train.watchdog import Watchdog, progress
with Watchdog(Path(sys.argv[1]), 0, 1, timeout_s=0.5, step=lambda: 3):
    with progress.stage("loss"):
        lock = threading.Lock()
        for _ in range(int(sys.argv[2])):
            lock.acquire()
"""


def test_a_thread_blocked_in_c_is_ended_and_its_stack_kept(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), "2"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == HANG_EXIT_CODE, done.stderr
    assert "error: no progress for 0.5 s: rank 0 has been in 'loss'" in done.stderr
    assert "(step 3)" in done.stderr
    assert "most recent call first" in (tmp_path / "heartbeat" / "rank_0.stacks").read_text()


def test_a_run_that_ends_is_left_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), "1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def restore_progress():
    yield
    progress.since = time.time()
