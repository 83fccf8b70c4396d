"""How libraries are loaded, the garbage collector waits for them and no longer; what they need."""

import gc

import pytest

from configs.errors import ConfigError
from train.libraries import (
    USUAL_THRESHOLD,
    CompilerMissingError,
    load_quickly,
    require_c_compiler,
)
from train.policy import load_policy


def test_the_collector_looks_less_often_until_the_model_is_there(tiny_checkpoints):
    load_quickly()
    assert gc.get_threshold()[0] > USUAL_THRESHOLD[0]
    load_policy(tiny_checkpoints["agent"])
    assert gc.get_threshold() == USUAL_THRESHOLD


def test_a_gpu_without_a_c_compiler_is_said_in_one_line(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(CompilerMissingError, match=r"Triton.*\(CC, gcc, clang\); install gcc") as e:
        require_c_compiler()
    # of wrong settings only the first process speaks (train.run), but a machine's lack is its own
    assert e.value.exit_code == 2
    assert not isinstance(e.value, ConfigError)
    monkeypatch.setattr("shutil.which", {"clang": "/usr/bin/clang"}.get)
    require_c_compiler()
