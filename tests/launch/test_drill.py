"""The drill's own functions: what counts as equal, how it kills, what it calls a clear refusal."""

import json
import os
import random
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.drill import main
from launch.drill_cases import CASES, Case
from launch.drill_compare import CLOCKS, compare_folders
from launch.drill_damage import Place
from launch.drill_disk import PAGE, TMPFS, kind_of_disk, make_room, small_disk
from launch.drill_files import check_case, check_shown, run_case
from launch.drill_kills import drill_kills
from launch.drill_network import judge_training
from launch.drill_process import Ended, Moment, Row, Running, Span, kill_at, run
from launch.drill_report import render
from launch.drill_rivals import judge_pair
from launch.drill_tasks import Task, Whole

# ---------------------------------------------------------------- comparison


@pytest.fixture
def write_result(tmp_path):
    """Writes what a run leaves; keywords change one thing."""

    def write(place, *, weight=1.0, reward=0.5, time_s=1.0, rows="obm,0.5,{}\n", more=()):
        folder = tmp_path / place / "run"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "heartbeat").mkdir()
        save_file({"w": np.array([weight, 2.0], np.float32)}, folder / "model.safetensors")
        line = {"step": 1, "reward": reward, "time_s": time_s, "time/loss_s": time_s, "x": [None]}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        record = {"config": {"output": str(folder)}, "commit": place, "metrics": {"n": 3}}
        (folder / "eval.json").write_text(json.dumps(record))
        (folder / "curves.csv").write_text("arm,accuracy,time_s\n" + rows.format(time_s))
        (folder / "heartbeat" / "rank_0.json").write_text(str(time_s))
        (folder / "environment.json").write_text(json.dumps({"python": place}))
        for name in more:
            (folder / name).touch()
        return folder

    return write


def test_clocks_provenance_and_paths_may_differ(write_result):
    assert compare_folders(write_result("whole"), write_result("other", time_s=7.5)) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        # the last bit of a float32 at 1: 2^-23
        ({"weight": 1.0 + 2.0**-23}, "model.safetensors: tensor w differs"),
        ({"reward": 0.5000001}, "metrics.jsonl: [0].reward: '0.5' and '0.5000001'"),
        ({"rows": "obm,0.6,{}\n"}, "curves.csv: [0].accuracy: '0.5' and '0.6'"),
        ({"more": ["half.tmp"]}, "half.tmp is left over"),
    ],
)
def test_any_other_difference_is_named(write_result, change, found):
    assert compare_folders(write_result("whole"), write_result("other", **change)) == [found]


def test_what_is_missing_is_named(write_result):
    other = write_result("other")
    (other / "model.safetensors").unlink()
    (other / "metrics.jsonl").write_text("")
    assert compare_folders(write_result("whole"), other) == [
        "model.safetensors is missing",
        "metrics.jsonl: lines: 1 and 0 entries",
    ]


# ---------------------------------------------------------------- kills


def test_moments_come_from_the_seed_and_lie_within_the_run():
    span = Span(begin_s=2.0, end_s=10.0)
    draws = [span.draw(dice) for dice in [random.Random(1)] for _ in range(500)]
    assert draws == [span.draw(dice) for dice in [random.Random(1)] for _ in range(500)]
    starting = [moment.delay_s for moment in draws if not moment.after_first_write]
    working = [moment.delay_s for moment in draws if moment.after_first_write]
    assert 60 < len(starting) < 140  # a fifth of 500, give or take four deviations of nine
    assert 0.4 <= min(starting) <= max(starting) <= 2.0
    # two thirds of the eight seconds in which it writes
    assert max(working) <= 0.67 * 8
    assert max(working) > 5.0


PARENT = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         start_new_session=len(sys.argv) > 2)
time.sleep(0.3)
Path(sys.argv[1], "pid").write_text(str(child.pid))
time.sleep(60)
"""


def has_ended(pid):
    """Whether a process is gone, or a zombie, within ten seconds."""
    import psutil

    try:
        process = psutil.Process(pid)
        end = time.monotonic() + 10
        while time.monotonic() < end and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_kill_takes_the_group_along_after_the_first_write(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    running = Running([sys.executable, "-c", PARENT, str(folder)], tmp_path / "log")
    assert kill_at(running, Moment(0.05, True), folder)
    pid = int((folder / "pid").read_text())
    ended = running.wait()
    assert (ended.code, ended.was_killed) == (-9, True)
    assert has_ended(pid)


def test_a_child_that_outlives_its_parent_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.drill_process.ORPHANS_S", 0.3)
    folder = tmp_path / "out"
    folder.mkdir()
    running = Running([sys.executable, "-c", PARENT, str(folder), "own"], tmp_path / "log")
    with pytest.raises(TimeoutError, match="1 processes live on"):
        kill_at(running, Moment(0.05, True), folder)
    assert has_ended(int((folder / "pid").read_text()))  # and it was tidied up


def test_a_command_that_no_kill_hits_is_a_problem_of_the_drill(tmp_path):
    whole = Whole(tmp_path / "whole", Span(begin_s=50.0, end_s=50.0), problem="")
    (whole.folder / "run").mkdir(parents=True)
    task = Task("quick", "run", lambda folder: ["mkdir", str(folder / "run")], marks=())
    row = drill_kills(task, whole, tmp_path / "kills", random.Random(0), n_kills=2)
    assert row.n == 0
    assert row.problems == ["no kill came before its end: the drill shows nothing of it"]
    assert "equal the undisturbed run's" in row.happened


def test_moments_come_sooner_where_the_undisturbed_run_was_slow():
    moment = Moment(8.0, True)
    # after two misses a quarter of the delay
    assert moment.sooner(0.5**2) == Moment(2.0, True)


@pytest.mark.parametrize(
    ("key", "is_clock"),
    [
        ("[3].time/loss_s", True), ("[0].evaluation_s", True),
        ("arms.obm.device_s_to_target", True),
        ("arms.obm.per_seed.device_s_to_target[0]", True), ("[1].turns[0].seconds", True),
        ("[2].speed/tokens_per_s", True), ("commit", True), ("files.trainer_state.json", True),
        ("arms.obm.tokens_to_target", False), ("[0].loss", False), ("metrics.accuracy", False),
        ("[0].turns[1].retries", False), ("output.files.model.safetensors", False),
    ],
)  # fmt: skip
def test_clocks_are_known_by_their_names(key, is_clock):
    assert bool(CLOCKS.search(key)) == is_clock


def test_a_command_that_has_ended_is_not_killed(tmp_path):
    running = Running([sys.executable, "-c", "print('done')"], tmp_path / "log")
    assert not kill_at(running, Moment(60.0, False), tmp_path)
    assert running.wait().output == "done\n"


def test_a_command_that_takes_too_long_is_ended(tmp_path):
    running = Running([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    ended = running.wait(limit_s=0.3)
    assert ended.was_killed
    assert ended.seconds < 30


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("code", "output", "complaint"),
    [
        (2, "error: a.json: broken; copy it\n", None),
        # what a launcher prints around it, and the same line of two processes, are no matter
        (2, "INFO start\nerror: a.json: broken\nerror: a.json: broken\n", None),
        (1, "error: a.json: broken\n", "exit code 1, not 2"),
        (2, "usage: obm\n", "0 error lines, not one"),
        (2, "error: a.json: x\nerror: b.json: y\n", "2 error lines, not one"),
        (2, "error: something is wrong\n", "does not say 'a.json'"),
        (2, "Traceback (most recent call last):\n  x\nerror: a.json: b\n", "a traceback"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_file(code, output, complaint):
    found = Ended(code, 1.0, output).complaints("a.json")
    assert (found == []) if complaint is None else (complaint in found[0])


def test_code_that_ran_and_control_characters_are_found(tmp_path):
    place = Place(tmp_path, tmp_path, random.Random(0))
    refused, taken = Case("x", lambda place: []), Case("y", lambda place: [], is_data=True)
    sound = Ended(2, 1.0, "error: x: y; z\n")
    assert check_case(refused, place, sound) == []
    assert check_case(taken, place, Ended(0, 1.0, "fine\n")) == []
    assert check_case(taken, place, Ended(0, 1.0, "\x1b[2J\n")) == [
        "its control characters reach the terminal"
    ]
    assert check_case(taken, place, sound) == ["refused with 2: error: x: y; z"]
    import pickle

    pickle.loads(place.pickle())  # as a careless reader would
    assert check_case(refused, place, sound) == ["code from the file was run"]


@pytest.mark.slow
def test_hostile_questions_are_asked_recorded_and_shown(tmp_path):
    [case] = [case for case in CASES if case.is_data]
    row = run_case(case, tmp_path, tmp_path, "0")
    assert (row.happened, row.problems) == ("taken as data", [])
    [output] = tmp_path.glob("*/output")
    place = Place(output.parent, tmp_path, random.Random(0))
    lines = (output / "trajectories.jsonl").read_text().splitlines()
    assert all(f"$(touch {place.canary})" in json.loads(line)["prompt"] for line in lines)
    # as a careless evaluation would record them, and a careless page show them
    spoiled = "".join(line.replace("\\u2039answer\\u203a", "<answer>") + "\n" for line in lines)
    (output / "trajectories.jsonl").write_text(spoiled)
    with (output / "view.html").open("a") as page:
        page.write("<script>alert(1)</script>")
    found = ["its tags reach the prompt", "its words are code on the page"]
    assert check_shown(place) == found
    (output / "trajectories.jsonl").write_text("")
    assert check_shown(place) == ["the record does not have its words", found[1]]


def test_of_two_rivals_one_wins_and_the_other_says_why():
    won = Ended(0, 1.0, "")
    told = Ended(2, 1.0, "error: run is in use by process 7; wait\n")
    assert judge_pair([won, told]) == []
    assert judge_pair([won, won]) == []
    assert judge_pair([told, told]) == ["none wins: exit codes 2, 2"]
    torn = judge_pair([Ended(1, 1.0, "Traceback (most recent call last):\nKeyError\n"), won])
    assert "the first: exit code 1, not 2" in torn
    assert "the first hangs" in judge_pair([Ended(-9, 1.0, "", was_killed=True), won])


# ---------------------------------------------------------------- disk


def fill(n_bytes, path):
    """A command that writes so many bytes."""
    program = "import sys; open(sys.argv[1], 'wb', 0).write(bytes(int(sys.argv[2])))"
    return [sys.executable, "-c", program, str(path), str(n_bytes)]


def test_a_small_disk_takes_no_more_until_room_is_made(tmp_path):
    if kind_of_disk(tmp_path / "probe") != TMPFS:
        pytest.skip("this process may not mount a tmpfs")
    with small_disk(tmp_path / "disk", 4 * PAGE) as disk:
        run(fill(20 * PAGE, disk / "one"), tmp_path / "log")
        assert (disk / "one").stat().st_size == 4 * PAGE  # what fits, and no more
        assert run(fill(PAGE, disk / "two"), tmp_path / "log").code
        make_room(disk)
        assert run(fill(20 * PAGE, disk / "one"), tmp_path / "log").code == 0
        assert (disk / "one").stat().st_size == 20 * PAGE
    assert list((tmp_path / "disk").iterdir()) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_without_a_mount_files_may_not_grow(tmp_path):
    setter = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (PAGE, PAGE))
    run(fill(3 * PAGE, tmp_path / "one"), tmp_path / "log", preload=setter)
    assert (tmp_path / "one").stat().st_size == PAGE
    assert run(fill(3 * PAGE, tmp_path / "one"), tmp_path / "log").code == 0
    assert (tmp_path / "one").stat().st_size == 3 * PAGE


# ---------------------------------------------------------------- network's records


def write_training(folder, rates, episodes):
    lines = [{"phase": "train", "search/service_failure_rate": rate} for rate in rates]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"phase": "train", "turns": [{"fault": fault}], "rewards": {"total": total}}
        for fault, total in episodes
    ]
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("rates", "episodes", "problem"),
    [
        ([0.5, 0.0], [("infrastructure", None), (None, 1.0)], None),
        ([0.5, 0.0], [("infrastructure", 0.1), (None, 1.0)], "1 episodes with a failed search"),
        ([0.0, 0.0], [(None, 1.0)], "no failed search was counted"),
        ([0.5, 0.2], [("infrastructure", None), (None, 1.0)], "after the network was healed"),
        ([0.5, 0.0], [("infrastructure", None)], "no episode was rewarded at all"),
    ],
)
def test_a_training_behind_the_proxy_is_judged_by_its_records(tmp_path, rates, episodes, problem):
    _, problems = judge_training(write_training(tmp_path, rates, episodes))
    assert (problems == []) if problem is None else (problem in problems[0])


# ---------------------------------------------------------------- the table


def make_rows():
    return [
        Row("kills", "obm merge", "SIGKILL", 4, "equal", 12.4),
        Row("files", "shard", "damage", 1, "error: a|b <script> `x`", 0.6, ["a traceback"]),
    ]


def test_the_table_has_a_section_a_part_and_escapes_what_commands_print():
    rows = [vars(row) for row in make_rows()]
    record = {
        "command": "python -m launch.drill", "commit": "abc", "seed": 3, "hardware": "h",
        "seconds": 61.2, "processor_s": 30.0, "notes": {"kills": "How."}, "rows": rows,
    }  # fmt: skip
    page = render(record)
    assert "## Killed at random moments\n\nHow.\n" in page
    assert "| obm merge | SIGKILL | 4 | equal | 12 |" in page
    assert "| shard | damage | 1 | error: a\\|b &lt;script> 'x' | 1 |" in page
    assert "2 disturbances, PROBLEMS in 1, listed below" in page
    assert "## Problems\n\n* shard: a traceback" in page
    assert "## A full disk" not in page


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "docs/results"),
        (["--quick"], "runs/drill"),
        (["--only", "kills"], "runs/drill"),
        (["--only", "kills", "--output", "docs/results"], "docs/results"),
    ],
)
def test_the_whole_drill_alone_replaces_the_committed_report(
    tmp_path, monkeypatch, arguments, folder
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.drill.Drill", lambda *shared: None)
    monkeypatch.setattr("launch.drill.PARTS", {"kills": lambda drill: (make_rows()[:1], "How.")})
    assert main(arguments) == 0
    assert [str(path.parent) for path in Path().rglob("reliability.md")] == [folder]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_drill_runs_to_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.drill.QUICK_CASES", 3)
    arguments = ["--quick", "--only", "files", "--work", str(tmp_path / "work")]
    code = main([*arguments, "--output", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "reliability.json").read_text())
    assert record["problems"] == 0, record["rows"]
    assert code == 0
    assert [row["part"] for row in record["rows"]] == ["files", "files", "files"]
    assert "model.safetensors" in record["rows"][0]["happened"]
    assert (tmp_path / "out" / "reliability.md").read_text().count("\n| ") >= 3
    assert time.time() - os.path.getmtime(tmp_path / "out" / "reliability.json") < 600
