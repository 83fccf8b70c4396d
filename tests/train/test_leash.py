"""A training ends with the command that started it."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.leash import EXIT_CODE, VARIABLE, end_with_starter, is_alive, name_myself

ROOT = Path(__file__).parents[2]
STARTER = """
import time
from train.leash import name_myself
print(name_myself(), flush=True)
time.sleep(60)
"""


def test_a_process_is_known_by_its_number_and_its_birth():
    name = name_myself()
    pid, _, born = name.partition(":")
    assert is_alive(name)
    assert not is_alive(f"{pid}:{float(born) - 1}")  # the number was given out again
    assert not is_alive(f"999999999:{born}")


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="the system counts no ticks")
def test_a_clock_that_is_set_changes_no_name(monkeypatch):
    name = name_myself()
    monkeypatch.setattr("psutil.Process.create_time", lambda process: 1.0)
    assert is_alive(name)


def test_a_system_that_counts_no_ticks_is_asked_for_the_time(monkeypatch):
    monkeypatch.setattr("train.leash.Path.is_file", lambda path: False)
    name = name_myself()
    assert "." in name
    assert is_alive(name)
    assert not is_alive(f"999999999:{name.partition(':')[2]}")


def test_without_a_starter_nothing_is_watched(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert end_with_starter() is None


def test_when_the_starter_has_gone_the_process_ends(monkeypatch, capsys):
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    codes = []
    monkeypatch.setenv(VARIABLE, starter.stdout.readline().strip())
    monkeypatch.setattr("train.leash.POLL_S", 0.02)
    thread = end_with_starter(codes.append)
    thread.join(0.3)
    assert thread.is_alive()
    starter.kill()
    # not yet waited for: a zombie runs no more
    thread.join(10)
    assert codes == [EXIT_CODE]
    assert "has ended; run it again to go on" in capsys.readouterr().err
    starter.wait()
    starter.stdout.close()
