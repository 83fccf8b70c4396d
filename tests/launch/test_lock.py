"""One study at a time on a folder."""

import subprocess
import sys

import pytest

from launch.errors import LaunchError
from launch.studies.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from launch.studies.lock import locked
with locked(Path(sys.argv[1]), "obm study mine"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_study_is_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        words = rf"out is in use by process {process.pid} on .* since .* \(obm study mine\); wait"
        with pytest.raises(LaunchError, match=words), locked(folder, "obm study other"):
            pass
    finally:
        process.kill()
        process.communicate()
    # a killed study leaves nothing to clean up
    with locked(folder, "obm study other"):
        pass


def test_a_folder_is_free_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path, "a"):
        raise RuntimeError
    with (
        locked(tmp_path, "b"),
        pytest.raises(LaunchError, match=r"\(b\)"),
        locked(tmp_path, "c"),
    ):
        pass
