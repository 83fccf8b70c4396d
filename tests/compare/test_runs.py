"""Reading run folders, and refusing what must not be compared."""

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


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("environment.strength", 1.0, r"data: environment\.strength is 0\.5 .* and 1\.0"),
        ("environment.train_size", 32, r"data: environment\.train_size"),
        ("environment.eval_size", 40, r"evaluation: environment\.eval_size"),
        ("grpo.max_steps", 40, r"budget: grpo\.max_steps is 20 .* and 40"),
        ("grpo.num_generations", 8, r"budget: grpo\.num_generations"),
        ("rewards.format", 0.0, r"rewards: rewards\.format"),
        ("compare.eval_every", 1, r"evaluation: compare\.eval_every"),
    ],
)
def test_runs_that_differ_in_more_than_their_start_are_refused(make_run, key, value, words):
    runs = [
        read_run(make_run("obm", 0, [0.1, 0.5])),
        read_run(make_run("vlm", 0, [0.1, 0.5], changes={key: value})),
    ]
    with pytest.raises(CompareError, match=words):
        check_comparable(runs)


@pytest.mark.parametrize(
    "changes", [{"environment.timeout_s": 1.0}, {"grpo.output_dir": "x"}, {"models.init": "y"}]
)
def test_what_does_not_change_the_comparison_may_differ(make_run, changes):
    runs = [
        read_run(make_run("obm", 0, [0.1, 0.5])),
        read_run(make_run("vlm", 1, [0.1, 0.5], changes=changes)),
    ]
    check_comparable(runs)


def test_runs_of_unequal_length_are_refused_and_can_be_cut(make_run):
    runs = [
        read_run(make_run("obm", 0, [0.1, 0.5, 0.6])),
        read_run(make_run("vlm", 0, [0.1, 0.5], done=False), partial=True),
    ]
    with pytest.raises(CompareError, match="was evaluated at"):
        check_comparable(runs)
    cut_to_common_steps(runs)
    check_comparable(runs)
    assert runs[0].steps == [0, 5]


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


def test_an_evaluation_on_other_questions_is_refused(make_run, tmp_path):
    trained = read_run(make_run("obm", 0, [0.1, 0.5]))
    config = json.loads(json.dumps(trained.config))
    config["environment"]["eval_split"] = "test"
    record = {"arm": "ties", "config": config, "metrics": {"accuracy": 0.2}}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    with pytest.raises(CompareError, match=r"evaluation: environment\.eval_split"):
        check_comparable([trained, read_run(tmp_path)])
