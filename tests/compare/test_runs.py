"""Reading run folders and grouping them."""

import json

import pytest

from compare.comparable import check_comparable
from compare.errors import CompareError
from compare.runs import cut_to_common_steps, group_runs, read_run


def test_a_run_folder_is_read_with_its_curve(make_run):
    run = read_run(make_run("obm", 2, [0.1, 0.5, 0.4]))
    assert (run.arm, run.seed, run.is_trained) == ("obm", 2, True)
    assert run.steps == [0, 5, 10]
    assert run.curve("accuracy") == [0.1, 0.5, 0.4]
    assert run.curve("kind/two/accuracy") == [0.1, 0.5, 0.4]
    assert len(run.training) == 3
    assert "time_s" not in run.metrics()
    assert "searched" in run.metrics()


def test_the_arm_is_named_after_the_start_unless_it_has_a_name(make_run):
    run = read_run(make_run(None, 0, [0.1]))
    assert run.arm == "vlm"


def test_a_missing_metric_is_an_error(make_run):
    with pytest.raises(CompareError, match="eval/nothing"):
        read_run(make_run("obm", 0, [0.1])).curve("nothing")


def test_a_torn_last_line_is_dropped(make_run):
    folder = make_run("obm", 0, [0.1, 0.5])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "phase": "ev')
    assert read_run(folder).steps == [0, 5]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(make_run):
    folder = make_run("obm", 0, [0.1, 0.5])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1] = "{"
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(CompareError, match=r"metrics\.jsonl:2: not JSON"):
        read_run(folder)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(CompareError, match=r"neither metrics\.jsonl"):
        read_run(tmp_path / "nowhere")


def test_an_unfinished_run_is_refused_unless_asked_for(make_run):
    folder = make_run("obm", 0, [0.1, 0.5], done=False)
    with pytest.raises(CompareError, match="last evaluation at step 5"):
        read_run(folder)
    assert read_run(folder, partial=True).steps == [0, 5]


def test_runs_are_grouped_by_arm_and_ordered_by_seed(make_run):
    runs = [read_run(make_run(arm, seed, [0.1])) for arm, seed in (("b", 1), ("a", 0), ("b", 0))]
    arms = group_runs(runs)
    assert list(arms) == ["b", "a"]
    assert [run.seed for run in arms["b"]] == [0, 1]


def test_the_same_arm_and_seed_twice_is_an_error(make_run, tmp_path):
    one = read_run(make_run("obm", 0, [0.1]))
    other = read_run(make_run("obm", 0, [0.1], folder=tmp_path / "again"))
    with pytest.raises(CompareError, match="both arm 'obm' with seed 0"):
        group_runs([one, other])


def test_of_an_evaluation_that_stands_there_twice_the_last_counts(make_run):
    """As a run resumed before its first checkpoint once wrote it."""
    folder = make_run("obm", 0, [0.1, 0.5])
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**first, "eval/accuracy": 0.2}) + "\n")
    run = read_run(folder)
    assert run.steps == [0, 5]
    assert run.curve("accuracy") == [0.2, 0.5]


def test_cutting_to_common_steps_cuts_the_training_too(make_run):
    runs = [read_run(make_run("obm", 0, [0.1, 0.5, 0.6])), read_run(make_run("vlm", 0, [0.1, 0.5]))]
    cut_to_common_steps(runs)
    assert runs[0].steps == [0, 5]
    assert [line["step"] for line in runs[0].training] == [1]


def test_a_zero_shot_evaluation_is_an_arm_with_a_floor_only(make_run, tmp_path):
    trained = read_run(make_run("obm", 0, [0.1, 0.5]))
    record = {"arm": "ties", "config": trained.config, "metrics": {"accuracy": 0.2}}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    run = read_run(tmp_path)
    assert (run.arm, run.is_trained, run.steps) == ("ties", False, [0])
    assert run.curve("accuracy") == [0.2]
    check_comparable([trained, run])


def test_a_training_run_takes_the_place_of_the_same_arms_evaluation(make_run, tmp_path):
    trained = read_run(make_run("obm", 0, [0.1, 0.5]))
    record = {"arm": "obm", "config": trained.config, "metrics": {"accuracy": 0.1}}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    arms = group_runs([read_run(tmp_path), trained])
    assert arms["obm"] == [trained]
