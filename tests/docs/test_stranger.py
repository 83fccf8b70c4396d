"""A stranger's way with everything of one's own, and the proof that nothing leaves the machine.

Checkpoints, ten rows with pictures, a reward, a search server; calibration, merge, a training under
two processes that is killed and goes on, a comparison, a page of its episodes. The files are those
of docs/recipes.md.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.drill_tasks import newest_step
from tests.docs.blocks import ROOT, all_commands, blocks
from tests.docs.network import Network, is_local
from tests.docs.stranger import dtype_of, make_models
from train.run import train
from train.settings import free_port
from train.watchdog import read_heartbeats

RECIPES = "docs/recipes.md"
FILES = {block.file_name: block.text for block in blocks(RECIPES) if block.file_name}
SMALL = {
    "calibration": {"samples": 2, "batch_size": 2, "vlm_kinds": ["look"]},
    "grpo": {
        "max_steps": 1000, "num_generations": 4, "per_device_train_batch_size": 4, "save_steps": 1,
        "max_completion_length": 240, "temperature": 1.0,
        "generation_kwargs": {"max_new_tokens": 8},
    },
    "compare": {"eval_every": 1, "smoothing": 1, "bootstrap": 50},
}  # fmt: skip
"""Over all.yaml: what makes minutes seconds."""
STEPS_BEFORE_KILL = 4


@pytest.fixture
def network(tmp_path):
    with Network(tmp_path / "network") as network:
        yield network


@pytest.fixture
def home(tmp_path, monkeypatch, network):
    """The stranger's folder, and a search server of the stranger's that listens."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    make_models(folder / "checkpoints")
    for name in ("make_rows.py", "my_rewards.py", "my_server.py"):
        Path(name).write_text(FILES[name])
    port, environment = str(free_port()), network.environment(str(ROOT))
    subprocess.run([sys.executable, "make_rows.py"], env=environment, check=True, timeout=100)
    with Path("server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-u", "my_server.py", port], env=environment, stderr=log
        )
    assert main(["init", "demo", "--output", "my.yaml"]) == 0
    everything = yaml.safe_load(FILES["all.yaml"].replace("8003", port))
    for section, values in SMALL.items():
        everything[section] = {**everything.get(section, {}), **values}
    Path("all.yaml").write_text(yaml.safe_dump(everything))
    yield folder
    server.kill()
    server.wait()


@pytest.fixture
def start(network):
    """Starts the launcher as a shell does, the leader of its own group; ends all that is left."""
    started = []

    def launch(*arguments):
        started.append(start_launcher(network, *arguments))
        return started[-1]

    yield launch
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def start_launcher(network, *arguments):
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()),
         str(ROOT / "launch/train.sh"), "--config", "all.yaml", *arguments],
        env={**network.environment(str(ROOT)), "PATH": programs, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def run_verbs(*verbs):
    """The page's commands of these verbs on `all.yaml` and what came of it, in this process."""
    commands = [
        c.words[1:] for c in all_commands([RECIPES]) if "all" in c.text and c.words[0] == "obm"
    ]
    own = [words for words in commands if any("all.yaml" in w or "runs/all" in w for w in words)]
    assert {words[0] for words in own} == {"calibrate", "merge", "eval", "train", "compare", "view"}
    for words in own:
        if words[0] in verbs:
            assert main(list(words)) == 0, words


def rows_of(name):
    return [json.loads(line) for line in Path("runs/all", name).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_with_everything_of_ones_own_a_killed_training_goes_on_and_nothing_leaves(
    home, network, start, capsys
):
    assert [dtype_of(home / "checkpoints" / name) for name in ("base", "vlm", "agent")] == [
        "float32", "bfloat16", "bfloat16",
    ]  # fmt: skip
    run_verbs("calibrate", "merge", "eval")
    assert dtype_of(home / "runs/all-merged") == "bfloat16"  # the VLM's

    run = Path("runs/all")
    killed = start()
    try:
        # some steps, so that there are searches and answers to look at
        wait_for(lambda: newest_step(run) >= STEPS_BEFORE_KILL, killed)
        wait_for(lambda: len(read_heartbeats(run / "heartbeat")) == 2, killed)
    finally:
        os.kill(killed.pid, signal.SIGKILL)  # the launcher alone: its processes know nothing of it
    killed.stdout.close()
    killed.wait()
    beats = read_heartbeats(run / "heartbeat")
    assert [beat.rank for beat in beats] == [0, 1]
    capsys.readouterr()
    assert train(["--config", "all.yaml", "--resume"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    # the first process holds the folder for both
    assert said.startswith(f"error: runs/all is in use by process {beats[0].pid} ")

    for beat in beats:
        os.kill(beat.pid, signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{beat.pid}/exe").exists() for beat in beats))
    n_done = newest_step(run)
    code, output = finish(start("--resume", f"grpo.max_steps={n_done + 1}"))
    assert code == 0, output
    check_run(n_done + 1)

    run_verbs("compare", "view")
    assert "What is the capital of this place?" in texts_of(Path("runs/all-view.html"))
    assert Path("runs/all-report/compare.html").is_file()
    assert network.sent() == []
    assert list(run.glob("wandb/offline-run-*")), "W&B was to write, and to write here"


def check_run(n_steps):
    """Every step once; own rows, own passages, own reward."""
    done = json.loads(Path("runs/all/done.json").read_text())
    assert done["step"] == n_steps
    lines = [line for line in rows_of("metrics.jsonl") if line["phase"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, n_steps + 1))
    assert all(0.0 <= line["rewards/brevity/mean"] <= 1.0 for line in lines)
    episodes = [row for row in rows_of("trajectories.jsonl") if row["phase"] == "train"]
    # the first 80 % of ten rows, which are counted from one
    assert {row["question_id"] for row in episodes} <= {str(i) for i in range(1, 9)}
    hits = {hit for row in episodes for turn in row["turns"] for hit in turn["hits"]}
    assert hits == {"at", "it"}  # of the stranger's server
    brief = [row["rewards"]["brevity"] for row in episodes if row["answer"] == "Vienna"]
    assert set(brief) == {1.0}
    assert Path("server.log").read_text().count("POST /retrieve") >= n_steps


def texts_of(page):
    """The index of a viewer page, which lies in it as deflated JSON."""
    block = re.search(r'<script type="text/plain" id="index">([^<]+)</script>', page.read_text())
    return zlib.decompress(base64.b64decode(block[1]), -zlib.MAX_WBITS).decode()


def wait_for(is_there, process=None, limit_s=240):
    deadline = time.monotonic() + limit_s
    while not is_there():
        assert process is None or process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---------------------------------------------------------------- the nets themselves


def test_the_nets_see_python_and_what_is_not_python(network):
    ask = (
        "import socket, urllib.request\n"
        "for host in ('example.invalid', '192.0.2.1'):\n"
        "    try: socket.create_connection((host, 80), timeout=5)\n"
        "    except OSError: pass\n"
        "try: urllib.request.urlopen('https://api.example.invalid/x', timeout=5)\n"
        "except OSError: pass\n"
        "socket.create_connection(('127.0.0.1', {port})).close()\n"
    )
    port = network._proxy.getsockname()[1]
    code = ask.replace("{port}", str(port))
    environment = network.environment(str(ROOT))
    assert "WANDB_MODE" not in environment
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    wait_for(lambda: any(line.startswith("proxy CONNECT") for line in network.sent()), limit_s=10)
    lines = network.sent()
    assert any("getaddrinfo 'example.invalid'" in line for line in lines)
    assert any("connect '192.0.2.1'" in line or "getaddrinfo '192.0.2.1'" in line for line in lines)
    assert any("proxy CONNECT api.example.invalid:443" in line for line in lines)
    with pytest.raises(PermissionError):
        __import__("socket").create_connection(("192.0.2.2", 80), timeout=5)  # this process, too


def test_this_machine_is_known_by_its_names():
    assert all(map(is_local, (None, "", "localhost", "127.0.0.1", "127.8.8.8", b"::1", "::1%lo")))
    assert not any(
        map(is_local, ("huggingface.co", "10.0.0.1", "api.wandb.ai", "127.0.0.1.nip.io"))
    )
