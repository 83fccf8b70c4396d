"""Training against a search server that is killed and comes back."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from environments.episode import SearchEnvironment
from environments.remote import COOL_DOWN_S, connect

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

ROOT = Path(__file__).parents[2]
KILLED_AFTER, BACK_AFTER, N_STEPS = 2, 4, 6


class Server:
    """`obm serve` as a process of its own, on the same port each time."""

    def __init__(self):
        self.port, self.process = 0, None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "serve", "--port", str(self.port)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        for line in self.process.stdout:
            if found := re.search(r"serving on (http://127\.0\.0\.1:(\d+))", line):
                self.port = int(found[2])
                return found[1]
        raise AssertionError(f"no server: exit code {self.process.wait()}")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Outage(TrainerCallback):
    """Kills the server after one step and starts it again after another."""

    def __init__(self, server):
        self.server = server

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AFTER:
            self.server.kill()
        if state.global_step == BACK_AFTER:
            self.server.start()
            # the two steps left can be shorter than the client's pause after a failure
            time.sleep(COOL_DOWN_S)


@pytest.mark.slow
def test_training_goes_on_while_the_server_is_down_and_after(make_trainer, mixed_script):
    server = Server()
    url = server.start()
    try:
        text, images = connect(url, timeout_s=5.0)
        trainer = make_trainer(
            mixed_script, environment=SearchEnvironment(text, images), max_steps=N_STEPS
        )
        trainer.add_callback(Outage(server))
        found = []

        class Remember(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                turns = [turn for t in trainer.last_trajectories for turn in t.turns]
                found.append(sum(bool(turn.hits) for turn in turns))

        trainer.add_callback(Remember())
        trainer.train()
    finally:
        server.kill()
    assert trainer.state.global_step == N_STEPS
    failing = [line["search/service_failure_rate"] for line in trainer.metric_lines[:N_STEPS]]
    assert [rate > 0 for rate in failing] == [False, False, True, True, False, False]
    assert [n > 0 for n in found] == [True, True, False, False, True, True]
