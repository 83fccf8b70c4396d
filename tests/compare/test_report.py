"""The report: its numbers, its files and what it refuses."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

from compare.comparable import check_allowed
from compare.errors import CompareError
from compare.figure import arm_colours
from compare.report import interval_name, text_table, write_report
from compare.runs import group_runs, read_run
from compare.summary import summarise
from launch.cli import main

# Smoothed over three: 0, .15, .2, .3, .4 and .3, .35, .4, .5, .6
SLOW = [0.0, 0.3, 0.3, 0.3, 0.6]
FAST = [0.3, 0.4, 0.5, 0.6, 0.7]


@pytest.fixture
def runs(make_run):
    return [
        read_run(make_run(arm, seed, [value + 0.05 * seed for value in curve]))
        for arm, curve in (("obm", FAST), ("vlm", SLOW))
        for seed in (0, 1, 2)
    ]


def test_the_summary_has_the_numbers_worked_out_by_hand(runs):
    summary = summarise(group_runs(runs), target_arm="vlm", smoothing=3)
    # The seeds lie .05 apart, so each mean is the curve's number + .05.
    assert summary["target"] == {"arm": "vlm", "value": pytest.approx(0.45)}
    obm, vlm = summary["arms"]["obm"], summary["arms"]["vlm"]
    assert obm["floor"]["searched"] == obm["floor"]["accuracy"] == pytest.approx(0.35)
    assert obm["floor"]["entity"] == pytest.approx(0.175)
    assert obm["floor"]["passage"] == pytest.approx(0.0875)
    assert obm["ceiling"] == pytest.approx(0.65)
    assert vlm["ceiling"] == pytest.approx(0.45)
    # (.3+.4)/2 + (.4+.5)/2 + (.5+.6)/2 + (.6+.7)/2 = 2.0 over four intervals, + .05
    assert obm["auc"] == pytest.approx(0.55)
    # smoothed obm: seed 0 reaches .45 at step 15 (.5), seed 1 at 10 (.45), seed 2 at 5 (.45)
    assert obm["per_seed"]["steps_to_target"] == [15, 10, 5]
    assert obm["steps_to_target"] == pytest.approx(10)
    # smoothed vlm ends at .4, .45, .5: seed 0 never gets there, so there is no mean
    assert vlm["per_seed"]["steps_to_target"] == [None, 20, 20]
    assert vlm["steps_to_target"] is None
    assert obm["search_rate_text"] == pytest.approx(0.65)
    assert obm["search_rate_image"] == pytest.approx(0.25)
    assert obm["seeds"] == [0, 1, 2]
    assert obm["by_group"]["unseen"] == {
        "floor": pytest.approx(0.175),
        "ceiling": pytest.approx(0.325),
        "n": None,
    }
    # sd .05 over three seeds: half width 4.303*.05/sqrt(3) = .12422
    assert obm["intervals"]["ceiling"] == pytest.approx([0.65 - 0.12422, 0.65 + 0.12422], abs=1e-4)


def test_the_report_has_every_file_and_key(runs, tmp_path):
    output = tmp_path / "report"
    command = "obm compare a b --output report"
    write_report(runs, output, command=command, smoothing=3)
    names = sorted(path.name for path in output.iterdir())
    assert names == [f"compare.{suffix}" for suffix in ("csv", "html", "json", "md", "png", "svg")]
    report = json.loads((output / "compare.json").read_text())
    assert {"arms", "command", "commit", "hardware"} <= report.keys()
    assert report["hardware"] == "test machine, 2 cores"
    for arm in ("obm", "vlm"):
        assert {
            "floor", "ceiling", "auc", "steps_to_target",
            "search_rate_text", "search_rate_image", "seeds",
        } <= report["arms"][arm].keys()  # fmt: skip
        assert {"searched", "entity", "passage", "accuracy"} <= report["arms"][arm]["floor"].keys()
    text = (output / "compare.md").read_text()
    assert command in text
    assert "2 of 3 seeds" in text
    assert "![" in text
    with (output / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 5
    assert rows[0]["arm"] == "obm"
    assert float(rows[0]["accuracy"]) == pytest.approx(0.3)
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "compare.svg").read_text()


def test_a_report_names_the_benchmark_that_was_asked(make_run, tmp_path):
    benchmark = {"name": "infoseek", "split": "val", "kinds": ["time"], "pictured": False}
    changes = {"environment.eval_benchmark": benchmark}
    runs = [read_run(make_run(arm, 0, FAST, changes=changes)) for arm in ("obm", "vlm")]
    summary = write_report(runs, tmp_path / "report", command="c")
    assert summary["evaluation"]["eval_benchmark"] == benchmark
    for suffix in ("md", "html"):
        text = (tmp_path / "report" / f"compare.{suffix}").read_text()
        assert "infoseek questions (split: val; kinds: time)" in text
        assert "dev questions" not in text


def test_every_kind_of_interval_is_named():
    assert interval_name(1, 1) == "none: one seed"
    assert interval_name(5, 1, 5) == "95 %, Student's t over 5 seeds"
    assert interval_name(3, 12, 5) == "95 %, bootstrap over 12 seeds, Student's t over 3 to 5 seeds"


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    for name in ("one", "two"):
        write_report(runs, tmp_path / name, command="c")
    for suffix in ("csv", "json", "md", "svg"):
        one, two = (tmp_path / name / f"compare.{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), suffix


def test_a_report_is_not_overwritten_without_a_flag(runs, tmp_path):
    write_report(runs, tmp_path, command="c")
    with pytest.raises(CompareError, match="--overwrite"):
        write_report(runs, tmp_path, command="c")
    write_report(runs, tmp_path, command="other", overwrite=True)
    assert json.loads((tmp_path / "compare.json").read_text())["command"] == "other"


def test_a_refused_comparison_leaves_nothing_behind(runs, make_run, tmp_path):
    odd = read_run(make_run("ties", 0, FAST, changes={"grpo.max_steps": 99}))
    with pytest.raises(CompareError, match=r"grpo\.max_steps"):
        write_report([*runs, odd], tmp_path / "report", command="c")
    assert not (tmp_path / "report").exists()


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(CompareError, match="nothing to compare"):
        write_report([], tmp_path, command="c")


def test_without_the_target_arm_there_are_no_steps(make_run, tmp_path):
    summary = write_report([read_run(make_run("obm", 0, FAST))], tmp_path / "r", command="c")
    assert summary["arms"]["obm"]["steps_to_target"] is None
    table = text_table(summary)
    assert "not in" not in table
    assert "none: one seed" in summary["interval"]


def test_an_arm_that_never_reaches_the_target_says_in_how_many_steps(make_run):
    runs = [read_run(make_run("vlm", 0, FAST)), read_run(make_run("ties", 0, [0.0] * 5))]
    assert "not in 20" in text_table(summarise(group_runs(runs)))


def test_a_zero_shot_arm_is_in_the_table_and_the_picture(runs, tmp_path):
    metrics = {"accuracy": 0.2, "searched": 0.5, "entity": 0.4, "passage": 0.3,
               "search_rate_text": 0.5, "search_rate_image": 0.0}  # fmt: skip
    record = {"arm": "dare", "config": runs[0].config, "metrics": metrics}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    summary = write_report([*runs, read_run(tmp_path)], tmp_path / "r", command="c")
    dare = summary["arms"]["dare"]
    assert dare["floor"]["passage"] == pytest.approx(0.3)
    assert dare["ceiling"] is None
    assert dare["search_rate_text"] == pytest.approx(0.5)


def test_an_arm_keeps_its_colour_whatever_it_is_drawn_with():
    assert arm_colours(["obm", "vlm"])["obm"] == arm_colours(["new", "obm"])["obm"]
    colours = arm_colours(["obm", "vlm", "task_arithmetic", "ties", "dare", "vlm-none", "vlm-2%"])
    assert len(set(colours.values())) == 7


REFUSED = [
    *[(["--smoothing", n], f"--smoothing {n}: must be at least 1") for n in ("0", "-1")],
    *[(["--bootstrap", n], f"--bootstrap {n}: must be at least 1") for n in ("0", "-5")],
    (["--target-arm", "nosuch"], "--target-arm nosuch: no such arm; there are obm"),
    (["--target-arm", ""], "--target-arm : no such arm"),
    (["--budget-arm", "nosuch"], "--budget-arm nosuch: no such arm; there are obm"),
    *[(["--allow", key], f"--allow {key}: no such setting") for key in (
        "nosuch", "", "rewards.nosuch", "seed.nosuch", "output.a", "environment.nosuch.kinds",
    )],
    *[(["--name", name], f"--name {name!r}: not the name of a file")
      for name in ("", ".", "..", "a/b", "../x")],
    (["--name", "x" * 300], "--name xxxxxxxxxxxxxxxxxxxx...: has more than 200 bytes"),
    *[(["--output", place], f"--output {place}: cannot be written (") for place in (
        "/etc/passwd", "/etc/passwd/x", "/proc/x", "x" * 300,
    )],
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_an_option_without_sense_is_one_line_and_writes_nothing(
    make_run, tmp_path, monkeypatch, capsys, options, words
):
    run = make_run("obm", 3, [0.1, 0.5])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", str(run), "--output", "report", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}")
    assert said.count("\n") == 1
    assert "; " in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "key",
    ["grpo", "grpo.learning_rate", "grpo.beta", "algorithm", "algorithm.", "rewards.format",
     "compare.steps", "reward_functions", "own_files", "world_size", "merge.density", "seed",
     "environment.timeout_s", "mode"],
)  # fmt: skip
def test_every_setting_may_be_allowed_to_differ(make_run, key):
    check_allowed([key], [read_run(make_run("obm", 0, [0.1]))])


def test_a_budget_arm_of_the_settings_that_is_not_compared_is_no_mistake(make_run, tmp_path):
    runs = [read_run(make_run(arm, 0, [0.1, 0.5])) for arm in ("sar", "vlm")]
    summary = write_report(runs, tmp_path / "report", command="c", budget_arm="obm")
    assert summary["equal_budget"] is None


def test_a_folder_in_the_place_of_a_file_is_not_written_over(runs, tmp_path):
    (tmp_path / "compare.md").mkdir()
    with pytest.raises(CompareError, match=r"compare\.md is a folder; pass another --output"):
        write_report(runs, tmp_path, command="c", overwrite=True)
    assert [path.name for path in tmp_path.glob("compare.*")] == ["compare.md"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "no folder of runs; usage: "), (["nosuch"], "nosuch: no such folder; "),
     (["empty"], "empty: holds no runs; "), (["file"], "file: no such folder; ")],
)  # fmt: skip
def test_the_script_says_what_folder_it_needs(tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    script = Path(__file__).parents[2] / "launch/compare.sh"
    done = subprocess.run(
        ["bash", str(script), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words}")
    assert done.stderr.count("\n") == 1
