"""Style and types: what `make lint` says, said by the tests."""

import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT

pytestmark = pytest.mark.slow


def run_tool(*words):
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("words", [("check",), ("format", "--check")], ids=["lint", "format"])
def test_ruff_has_nothing_to_say(words):
    code, output = run_tool("ruff", *words, "--no-cache", ".")
    assert code == 0, output


@pytest.mark.timeout(900)
def test_types_agree():
    code, output = run_tool("mypy")  # twenty seconds, two with the cache of an earlier run
    assert code == 0, output
