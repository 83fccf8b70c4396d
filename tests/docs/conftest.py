"""The tiny trio that stands for the shipped one, and `obm` in this process."""

import pytest
import torch

from launch.cli import main

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trio(tmp_path_factory):
    from train.tiny import make_tiny_checkpoints

    return make_tiny_checkpoints(tmp_path_factory.mktemp("trio"), seed=0)


@pytest.fixture
def obm(capsys):
    """Runs `obm ...` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
