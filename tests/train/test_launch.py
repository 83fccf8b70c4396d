"""`deepspeed launch/train.sh`: two processes, ZeRO-2 and ZeRO-3, no compiler, and going on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import load_config
from train.run import run_training, train
from train.settings import free_port
from train.watchdog import HANG_EXIT_CODE, read_heartbeats

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "train.sh"

SETTINGS = """
output: {output}
seed: 1
models: {{init: {init}}}
environment: {{train_size: 32, eval_size: 5, kinds: [two, text], eval_kinds: [two, text]}}
grpo:
  per_device_train_batch_size: {rows}
  num_generations: 4
  max_completion_length: 60
  generation_kwargs: {{max_new_tokens: 12}}
  max_steps: 3
  save_steps: 1
  save_total_limit: null
  entropy_coef: 0.05
  learning_rate: 1.0e-3
algorithm: {{dynamic_sampling: 1, hop_credit: 0.5, efficiency_bonus: 0.1, overlong_penalty: 0.1}}
compare: {{eval_every: 1}}
tracking: {{wandb: disabled}}
"""


def write_config(folder: Path, init: str, rows: int) -> Path:
    path = folder / f"settings{rows}.yaml"
    path.write_text(SETTINGS.format(output=folder / "run", init=init, rows=rows))
    return path


def launch(*command: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a launcher without a compiler in reach, with this Python's programs first."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "OMP_NUM_THREADS": "1", "CXX": "/nonexistent"}
    return subprocess.run(
        command,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def deepspeed(*arguments: str, script: Path = SCRIPT, n: int = 2) -> subprocess.CompletedProcess:
    port = str(free_port())
    where = ("--num_gpus", str(n), "--master_port", port)
    return launch("deepspeed", *where, str(script), *arguments)


def one_after_another(*programs: list[str], n: int = 2) -> subprocess.CompletedProcess:
    """Programs of `train.sh`'s kind in the processes of one launch."""
    script = Path(__file__).with_name("one_after_another.py")
    result = deepspeed(
        json.dumps([list(map(str, words)) for words in programs]), script=script, n=n
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def lines_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time_s", "device_s", "eval/time_s", "step_time")
    return [
        {k: v for k, v in row.items() if k not in clocks and not k.startswith(("time/", "speed/"))}
        for row in rows
    ]


def assert_same_training(one: list[dict], two: list[dict]) -> None:
    """Other numbers of processes: the same episodes, the same loss but for what TRL makes of it."""
    assert [(r["step"], r["phase"]) for r in one] == [(r["step"], r["phase"]) for r in two]
    for single, double in zip(one, two, strict=True):
        assert single["tokens"] == double["tokens"]
        if single["phase"] == "train":
            # TRL's entropy bonus (our only gradient here) is a mean over each process' tokens, so
            # processes with fewer tokens weigh a little more
            assert single["reward"] == double["reward"]
            assert single["loss"] == pytest.approx(double["loss"], abs=1e-4)
            assert single["grad_norm"] == pytest.approx(double["grad_norm"], rel=2e-2)
        else:
            assert single == double


def keep_checkpoint(folder: Path, step: int) -> None:
    """A run as it looks when it was stopped some time after the checkpoint of `step`."""
    for path in (folder / "checkpoints").iterdir():
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def zero2_run(tiny_checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero2")
    path = write_config(folder, tiny_checkpoints["vlm"], rows=8)
    result = deepspeed("--config", str(path), "deepspeed=zero2")
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "said").write_text(result.stdout + result.stderr)
    return path, folder / "run"


@pytest.fixture(scope="module")
def more_runs(zero2_run, tiny_checkpoints, tmp_path_factory):
    """What else two processes do, in one launch; a folder of their outputs, and what they said."""
    path, folder = zero2_run
    outputs = tmp_path_factory.mktemp("more")
    keep_checkpoint(shutil.copytree(folder, outputs / "resumed"), 1)
    train = [SCRIPT, "--config", path]
    stages = [
        [*train, f"deepspeed={stage}", f"output={outputs / stage}"]
        for stage in ("zero3", "zero1", "zero2_offload", "zero3_offload")
    ]
    resumed = [*train, "deepspeed=zero2", f"output={outputs / 'resumed'}", "--resume"]
    uneven = [Path(__file__).with_name("uneven_processes.py"), tiny_checkpoints["vlm"],
              ROOT / "configs" / "deepspeed" / "zero3.json", outputs / "uneven"]  # fmt: skip
    return outputs, one_after_another(resumed, *stages, uneven)


@pytest.fixture(scope="module")
def one_process(zero2_run, more_runs, tmp_path_factory):
    """One process goes on with runs of two, in one launch; their folder, and what was said."""
    path, folder = zero2_run
    outputs = tmp_path_factory.mktemp("one")
    keep_checkpoint(shutil.copytree(folder, outputs / "zero2"), 1)
    keep_checkpoint(shutil.copytree(more_runs[0] / "zero3", outputs / "zero3"), 2)
    common = [SCRIPT, "--config", path, "--resume", "grpo.per_device_train_batch_size=16"]
    return outputs, one_after_another(
        [*common, "deepspeed=zero2", f"output={outputs / 'zero2'}", "grpo.max_steps=2"],
        [*common, "deepspeed=zero3", f"output={outputs / 'zero3'}"],
        n=1,
    )


@pytest.mark.timeout(1000)
def test_two_processes_train_as_one_would(zero2_run, tiny_checkpoints, tmp_path):
    _, folder = zero2_run
    path = write_config(tmp_path, tiny_checkpoints["vlm"], rows=16)
    alone = run_training(load_config(path))
    assert any(line.get("dynamic_sampling/replaced", 0) > 0 for line in lines_of(folder))
    assert_same_training(lines_of(alone), lines_of(folder))


def test_without_a_terminal_a_training_prints_a_line_a_step(zero2_run):
    said = (zero2_run[1].parent / "said").read_text()
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == [f"step {n}/3" for n in (1, 2, 3)]
    assert "\x1b" not in said


@pytest.mark.timeout(1000)
def test_under_deepspeed_the_update_and_the_gather_have_timers(zero2_run, more_runs):
    """DeepSpeed steps inside its own backward; that part is no part of the loss' time."""
    zero2, zero3 = zero2_run[1], more_runs[0] / "zero3"
    for folder, stages in ((zero2, ["optimizer"]), (zero3, ["optimizer", "gather"])):
        text = (folder / "metrics.jsonl").read_text()
        train = [row for row in map(json.loads, text.splitlines()) if row["phase"] == "train"]
        assert train
        for row in train:
            assert all(row[f"time/{stage}_s"] > 0 for stage in [*stages, "loss", "sync"])
            assert row["time/loss_s"] + row["time/optimizer_s"] < row["step_time"] + 0.1
            assert row["speed/tokens_per_s"] > 0


def assert_equal_arithmetic(one: list[dict], two: list[dict]) -> None:
    """Other stages of ZeRO with as many processes: the same sums, in another order at most."""
    for first, second in zip(one, two, strict=True):
        assert first["tokens"] == second["tokens"]
        if first["phase"] == "train":
            assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
            assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stage", ["zero1", "zero2_offload", "zero3", "zero3_offload"])
def test_every_stage_trains_to_the_numbers_of_zero2(zero2_run, more_runs, stage):
    """No compiler is in reach: offload, too, keeps torch's AdamW."""
    assert_equal_arithmetic(lines_of(zero2_run[1]), lines_of(more_runs[0] / stage))


def test_zero3_saves_whole_weights(more_runs):
    folder = more_runs[0] / "zero3"
    done = json.loads((folder / "done.json").read_text())
    from train.policy import load_policy

    model, _ = load_policy(folder / done["policy"])
    assert all(parameter.numel() for parameter in model.parameters())


def test_two_processes_resume_to_the_same_numbers(zero2_run, more_runs):
    outputs, result = more_runs
    assert f"resuming at step 1 of {outputs / 'resumed'}" in result.stderr
    assert lines_of(outputs / "resumed") == lines_of(zero2_run[1])


@pytest.mark.timeout(1000)
def test_another_number_of_processes_goes_on_to_the_same_numbers(zero2_run, one_process, capsys):
    """Two processes, then one, then two again."""
    path, folder = zero2_run
    outputs, result = one_process
    part = outputs / "zero2"
    assert "converting checkpoint-1 from 2 processes" in result.stderr
    common = ("--config", str(path), "deepspeed=zero2", f"output={part}", "--resume")
    assert train([*common]) == 2  # one process whose steps would be half as large
    assert "set it to 16" in capsys.readouterr().err
    result = deepspeed(*common)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "converting checkpoint-2 from 1 processes" in result.stderr
    assert_same_training(lines_of(folder), lines_of(part))


def test_another_number_of_processes_goes_on_under_zero3(more_runs, one_process):
    outputs, result = one_process
    assert f"resuming at step 2 of {outputs / 'zero3'}" in result.stderr
    assert_same_training(lines_of(more_runs[0] / "zero3"), lines_of(outputs / "zero3"))


def test_processes_with_unlike_episodes_do_not_wait_for_each_other(more_runs):
    """ZeRO-3: other numbers of turns; pictures, rows to train, many logits on one side only."""
    for rank in (0, 1):
        assert f"process {rank} trained 2 steps" in more_runs[1].stdout


@pytest.mark.timeout(1000)
def test_a_hang_ends_the_run_and_names_process_and_stage(tiny_checkpoints, tmp_path):
    program = Path(__file__).with_name("broken_process.py")
    path = write_config(tmp_path, tiny_checkpoints["vlm"], rows=8)
    result = deepspeed(
        "sleep", "--config", str(path), "deepspeed=zero3", "hang_timeout_s=240", script=program
    )
    assert result.returncode == HANG_EXIT_CODE, result.stderr[-3000:]
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "no progress for 3 s: rank 1 has been in 'reward' for" in error
    assert "rank 0 waits in 'sync' for" in error
    assert "(step 0)" in error
    stacks = (tmp_path / "run" / "heartbeat" / "rank_1.stacks").read_text()
    assert "in break_down" in stacks


@pytest.mark.timeout(1000)
def test_a_process_that_dies_takes_the_others_along(tiny_checkpoints, tmp_path):
    program = Path(__file__).with_name("broken_process.py")
    path = write_config(tmp_path, tiny_checkpoints["vlm"], rows=8)
    result = deepspeed("die", "--config", str(path), "deepspeed=zero2", script=program)
    assert result.returncode == 256 - signal.SIGKILL, result.stderr[-3000:]
    beats = read_heartbeats(tmp_path / "run" / "heartbeat")
    assert [beat.rank for beat in beats] == [0, 1]
    for beat in beats:
        assert not Path(f"/proc/{beat.pid}").exists()


def test_the_shell_starts_the_same_program(tiny_checkpoints, tmp_path):
    path = write_config(tmp_path, tiny_checkpoints["vlm"], rows=8)
    result = launch("bash", str(SCRIPT), "--config", str(path), "--dry-run", "seed=7")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "seed: 7" in result.stdout
    assert "completions per step" in result.stdout


def test_a_mistake_reaches_the_shell_as_exit_code_2(tmp_path):
    result = launch(sys.executable, str(SCRIPT), "--config", str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_the_script_is_python_as_well_as_shell():
    compile(SCRIPT.read_text(), str(SCRIPT), "exec")
