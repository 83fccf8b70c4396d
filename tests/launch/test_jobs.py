"""Trainings as child processes, here small scripts in their place."""

import json
import os
import sys
import time

import pytest

from launch import jobs
from launch.errors import JobFailedError, LaunchError
from launch.jobs import (
    Job,
    physical_devices,
    run_jobs,
    training_command,
    training_environment,
)

WRITE_LINES = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[1]); run.mkdir(exist_ok=True)
for step in range(3):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "phase": "train"}) + "\\n")
    time.sleep(0.05)
print("hello from", run.name)
"""


@pytest.fixture
def scripted(monkeypatch):
    """Jobs whose first argument is Python code instead of train.sh's options."""

    def command(arguments, *, n_processes=1, devices=()):
        return [sys.executable, "-c", *arguments, *(str(device) for device in devices)]

    monkeypatch.setattr(jobs, "training_command", command)
    monkeypatch.setattr(jobs, "POLL_S", 0.02)


def make_job(tmp_path, name, code=WRITE_LINES):
    run = tmp_path / name
    return Job(name, [code, str(run)], run, tmp_path / "logs" / f"{name}.log")


def test_every_line_of_every_job_is_seen_once(scripted, tmp_path):
    seen, done = [], []
    work = [make_job(tmp_path, name) for name in ("a", "b", "c")]
    run_jobs(
        work,
        parallel=2,
        on_line=lambda job, line: seen.append((job.name, line["step"])),
        on_done=lambda job, seconds: done.append(job.name),
    )
    assert sorted(seen) == [(name, step) for name in "abc" for step in range(3)]
    assert sorted(done) == ["a", "b", "c"]
    assert "hello from a" in (tmp_path / "logs" / "a.log").read_text()


def test_lines_of_an_earlier_attempt_are_not_shown_again(scripted, tmp_path):
    job = make_job(tmp_path, "a")
    job.output.mkdir()
    (job.output / "metrics.jsonl").write_text('{"step": 99}\n')
    seen = []
    run_jobs([job], on_line=lambda job, line: seen.append(line["step"]))
    assert seen == [0, 1, 2]


def test_a_file_that_was_cut_back_is_read_from_its_start(tmp_path):
    job = make_job(tmp_path, "a")
    job.output.mkdir()
    path = job.output / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    follower = jobs.Follower(job.output / "metrics.jsonl")
    path.write_text('{"step": 1}\n')
    assert follower.new_lines() == [{"step": 1}]
    with path.open("a") as file:
        file.write('{"step": 2}\n{"step"')
    assert follower.new_lines() == [{"step": 2}]
    with path.open("a") as file:
        file.write(": 3}\n")
    assert follower.new_lines() == [{"step": 3}]


BAD_LINES = [
    b"{torn", b'"a', b"\xff\xfe{}", b"\x00", b"[1]", b"null", b"[" * 5000, b'{"step": "1"}',
    b'{"step": null}', b'{"step": true}', b'{"step": 1.0}', b'{"step": 1, "phase": 3}',
    b'{"step": 1, "eval/accuracy": "x"}', b'{"step": 1, "loss": [1]}', b'{"step": 1, "loss": {}}',
    b'{"step": 1' + b"0" * 400 + b"}", b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 1' + b"0" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: repr(bad[:30]))
def test_a_bad_line_is_passed_over_and_those_around_it_are_read(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": null}\n' + bad + b'\n{"step": 2, "phase": "eval"}\n')
    follower = jobs.Follower(path, from_start=True)
    assert follower.new_lines() == [{"step": 1, "loss": None}, {"step": 2, "phase": "eval"}]
    assert follower.new_lines() == []


def test_a_bad_line_of_a_job_ends_nothing(scripted, tmp_path):
    code = WRITE_LINES.replace('json.dumps({"step"', '"[1]\\n\\xff\\n" + json.dumps({"step"')
    seen, done = [], []
    run_jobs(
        [make_job(tmp_path, "a", code)],
        on_line=lambda job, line: seen.append(line["step"]),
        on_done=lambda job, seconds: done.append(job.name),
    )
    assert seen == [0, 1, 2]
    assert done == ["a"]


def test_at_most_so_many_run_at_once(scripted, tmp_path):
    code = (
        "import pathlib, sys, time, os\n"
        "here = pathlib.Path(sys.argv[1]).parent\n"
        "(here / f'run-{os.getpid()}').touch()\n"
        "n = len(list(here.glob('run-*')))\n"
        "(here / f'seen-{n}').touch()\n"
        "time.sleep(0.2)\n"
        "(here / f'run-{os.getpid()}').unlink()\n"
    )
    run_jobs([make_job(tmp_path, name, code) for name in "abcd"], parallel=2)
    assert not (tmp_path / "seen-3").exists()


def test_each_gpu_has_one_training_at_a_time(scripted, tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "mine = pathlib.Path(sys.argv[1]).parent / f'gpu-{sys.argv[2]}'\n"
        "mine.mkdir()\n"  # fails if another holds it
        "time.sleep(0.1)\n"
        "mine.rmdir()\n"
    )
    run_jobs([make_job(tmp_path, name, code) for name in "abcd"], parallel=4, devices=[(0,), (1,)])


def test_a_failed_job_is_named_with_its_log_and_the_others_finish(scripted, tmp_path, capsys):
    done = []
    work = [make_job(tmp_path, "bad", "print('what went wrong'); raise SystemExit(3)")]
    work.append(make_job(tmp_path, "good"))
    with pytest.raises(JobFailedError, match=r"bad ended with code 3.*bad\.log"):
        run_jobs(work, parallel=1, on_done=lambda job, seconds: done.append(job.name))
    assert done == ["good"]
    assert "what went wrong" in capsys.readouterr().err


def test_failures_may_be_taken_instead_of_raised(scripted, tmp_path):
    failed, done = {}, []
    mistake = "import sys; print('error: no such folder', file=sys.stderr); sys.exit(2)"
    work = [make_job(tmp_path, "bad", "raise SystemExit(3)"), make_job(tmp_path, "wrong", mistake)]
    run_jobs(
        [*work, make_job(tmp_path, "good")],
        on_done=lambda job, seconds: done.append(job.name),
        on_failed=lambda job, error: failed.update({job.name: error}),
    )
    assert done == ["good"]
    assert isinstance(failed["bad"], JobFailedError)
    assert str(failed["wrong"]) == "wrong: no such folder"


def test_a_mistake_of_an_earlier_attempt_is_not_shown_for_this_one(scripted, tmp_path):
    job = make_job(tmp_path, "a", "raise SystemExit(3)")
    job.log.parent.mkdir()
    job.log.write_text("$ earlier\nerror: long ago\n")
    with pytest.raises(JobFailedError, match="ended with code 3"):
        run_jobs([job])


def test_a_users_mistake_in_a_job_is_handed_on(scripted, tmp_path):
    code = "import sys; print('error: models.init: no such folder', file=sys.stderr); sys.exit(2)"
    with pytest.raises(LaunchError, match=r"^a: models\.init: no such folder$"):
        run_jobs([make_job(tmp_path, "a", code)])


def test_an_interrupt_ends_the_processes_that_were_started(scripted, tmp_path):
    code = (
        "import os, pathlib, sys, time\n"
        "run = pathlib.Path(sys.argv[1]); run.mkdir()\n"
        "(run / 'pid').write_text(str(os.getpid()))\n"
        "(run / 'metrics.jsonl').write_text('{\"step\": 0}\\n')\n"
        "time.sleep(60)\n"
    )

    def interrupt(job, line):
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([make_job(tmp_path, "a", code)], on_line=interrupt)
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "a" / "pid").read_text()), 0)


def test_a_termination_ends_the_processes_too(scripted, tmp_path):
    import signal

    code = (
        "import os, pathlib, sys, time\n"
        "run = pathlib.Path(sys.argv[1]); run.mkdir()\n"
        "(run / 'pid').write_text(str(os.getpid()))\n"
        "(run / 'metrics.jsonl').write_text('{\"step\": 0}\\n')\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(
            [make_job(tmp_path, "a", code)],
            on_line=lambda job, line: os.kill(os.getpid(), signal.SIGTERM),
        )
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "a" / "pid").read_text()), 0)


def test_the_training_command_has_a_port_of_its_own():
    one, other = (training_command(["--config", "x.yaml"], n_processes=2) for _ in range(2))
    assert one[0].endswith("deepspeed")
    assert one[1:3] == ["--num_gpus", "2"]
    assert one[-3].endswith("launch/train.sh")
    assert one[-2:] == ["--config", "x.yaml"]
    assert one[4] != other[4]


def test_devices_take_the_place_of_a_count(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert training_command([], devices=[1])[1:3] == ["--include", "localhost:1"]
    assert training_command([], devices=[2, 3])[1:3] == ["--include", "localhost:2,3"]


def test_trainings_keep_to_the_gpus_that_were_given(monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training_command([], devices=[1])[1:3] == ["--include", "localhost:6"]
    assert training_command([], n_processes=2)[1:3] == ["--include", "localhost:4,6"]
    assert physical_devices([1]) == ["6"]
    with pytest.raises(LaunchError, match="names 2 GPUs, one a process, and 3 are asked for"):
        training_command([], n_processes=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b")
    with pytest.raises(LaunchError, match=r"CUDA_VISIBLE_DEVICES=GPU-1a2b: .* numbers only"):
        training_command([])
    # on the processor the variable says nothing
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert training_command([], n_processes=3)[1:3] == ["--num_gpus", "3"]


def test_children_share_the_cores_and_find_our_packages(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = training_environment(parallel=10_000)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    assert json.dumps(environment)
