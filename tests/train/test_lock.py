"""One process at a time on an output folder."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from train.lock import in_turn, locked

HOLDER = """
import sys, time
from pathlib import Path
from train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_told_who_is_there_and_a_kill_leaves_nothing_to_clean_up(holder, tmp_path):
    with (
        pytest.raises(ConfigError, match=rf"out is in use by process {holder.pid} on .*; wait"),
        locked(tmp_path / "out"),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / ".lock").exists()
    with locked(tmp_path / "out"):
        pass


def test_a_lock_leaves_no_trace(tmp_path):
    with locked(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").exists()
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "result").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]


def test_parts_of_an_output_have_locks_of_their_own(tmp_path):
    with (
        locked(tmp_path, ".lock-0-of-2"),
        locked(tmp_path, ".lock-1-of-2"),
        pytest.raises(ConfigError, match="in use"),
        locked(tmp_path, ".lock-0-of-2"),
    ):
        pass


def test_a_lock_file_that_was_replaced_meanwhile_is_not_taken_for_held(tmp_path, monkeypatch):
    import fcntl

    flock, seen = fcntl.flock, []

    def slow(descriptor, how):
        """The holder before removes its file between our opening and our locking it."""
        if not seen:
            (tmp_path / ".lock").unlink()
        seen.append(descriptor)
        return flock(descriptor, how)

    monkeypatch.setattr("merge.lock.fcntl.flock", slow)
    with locked(tmp_path):
        monkeypatch.undo()
        assert len(seen) == 2
        with pytest.raises(ConfigError, match="in use"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_worked_on_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("merge.lock.fcntl.flock", refuse)
    with locked(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").exists()
    with in_turn(tmp_path / ".lock"):
        pass
    assert caplog.text.count("no locks on this file system; start one process") == 2


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"file/out.*cannot be written \(Not a directory\)"),
        locked(tmp_path / "file" / "out"),
    ):
        pass
