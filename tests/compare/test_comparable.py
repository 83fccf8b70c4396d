"""Refusing what must not be compared, saying in what, and letting differ what is asked for."""

import json

import pytest

from compare.comparable import check_comparable, find_differences
from compare.errors import CompareError
from compare.report import write_report
from compare.runs import cut_to_common_steps, read_run


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("environment.strength", 1.0, r"data: environment\.strength is 0\.5 .* and 1 in"),
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


def test_every_differing_setting_is_named_with_its_values_and_runs(make_run):
    changes = {"environment.strength": 1.0, "rewards.format": 0.0, "grpo.max_steps": 40}
    runs = [
        read_run(make_run("obm", 0, [0.1, 0.5])),
        read_run(make_run("obm", 1, [0.1, 0.5])),
        read_run(make_run("vlm", 0, [0.1, 0.5], changes=changes)),
    ]
    with pytest.raises(CompareError) as error:
        check_comparable(runs)
    text = str(error.value)
    assert "the runs differ in 3 settings:" in text
    assert f"data: environment.strength is 0.5 in {runs[0].folder} (and 1 more) and 1 in" in text
    assert f"rewards: rewards.format is 0.1 in {runs[0].folder} (and 1 more) and 0 in" in text
    assert "budget: grpo.max_steps is 20" in text
    assert "--allow environment.strength --allow rewards.format --allow grpo.max_steps" in text


@pytest.mark.parametrize(
    ("key", "value", "other"), [("world_size", 1, 2), ("hardware", "Xeon", "NVIDIA H100")]
)
def test_another_machine_or_number_of_processes_is_another_budget(make_run, key, value, other):
    runs = [read_run(make_run(arm, 0, [0.1, 0.5])) for arm in ("obm", "vlm")]
    runs[0].provenance[key], runs[1].provenance[key] = value, other
    with pytest.raises(CompareError, match=f"budget: {key} is"):
        check_comparable(runs)
    # a run that did not record it says nothing
    del runs[1].provenance[key]
    check_comparable(runs)


def test_another_algorithm_is_refused_and_can_be_allowed_by_its_section(make_run):
    runs = [read_run(make_run(arm, 0, [0.1, 0.5])) for arm in ("obm", "vlm")]
    runs[1].config["algorithm"] = {"hop_credit": 0.5, "dynamic_sampling": 2}
    with pytest.raises(CompareError, match=r"training: algorithm\.hop_credit is 0 in"):
        check_comparable(runs)
    found = check_comparable(runs, ["algorithm", "lora"])
    assert found["allowed"] == ["algorithm"]
    assert {one["setting"] for one in found["differences"]} == {
        "algorithm.hop_credit", "algorithm.dynamic_sampling"
    }  # fmt: skip
    with pytest.raises(CompareError, match=r"algorithm\.hop_credit"):
        check_comparable(runs, ["algorithm.dynamic_sampling"])


def test_a_key_covers_itself_and_its_section_but_no_namesake(make_run):
    runs = [
        read_run(make_run("obm", 0, [0.1, 0.5])),
        read_run(make_run("vlm", 0, [0.1, 0.5], changes={"environment.eval_size": 40})),
    ]
    with pytest.raises(CompareError):
        check_comparable(runs, ["environment.eval"])
    check_comparable(runs, ["environment.eval_size"])


def test_what_an_older_version_did_not_write_has_its_default(make_run):
    runs = [read_run(make_run(arm, 0, [0.1, 0.5])) for arm in ("obm", "vlm")]
    del runs[0].config["environment"]["train_size"]
    runs[1].config["environment"]["train_size"] = 512  # the default
    runs[1].config["algorithm"] = {"hop_credit": 0.0}
    assert find_differences(runs) == []


def test_whole_numbers_are_equal_however_they_are_written(make_run):
    runs = [read_run(make_run(arm, 0, [0.1, 0.5])) for arm in ("obm", "vlm")]
    runs[0].config["rewards"]["accuracy"], runs[1].config["rewards"]["accuracy"] = 1, 1.0
    assert find_differences(runs) == []


def test_runs_of_one_seed_must_see_their_data_in_one_order(make_run):
    runs = [read_run(make_run("obm", seed, [0.1, 0.5])) for seed in (0, 1)]
    runs += [read_run(make_run("vlm", 0, [0.1, 0.5], changes={"grpo.seed": 7}))]
    with pytest.raises(CompareError, match=r"data: grpo\.seed is 0 in .*obm-s0 and 7 in"):
        check_comparable(runs)


def test_runs_of_allowed_unequal_length_are_cut(make_run):
    runs = [
        read_run(make_run("obm", 0, [0.1, 0.5, 0.6], changes={"grpo.max_steps": 30})),
        read_run(make_run("vlm", 0, [0.1, 0.5])),
    ]
    with pytest.raises(CompareError, match=r"grpo\.max_steps"):
        check_comparable(runs)
    check_comparable(runs, ["grpo.max_steps"])
    assert runs[0].steps == [0, 5]


def test_the_report_says_what_was_allowed_to_differ(make_run, tmp_path):
    runs = [
        read_run(make_run("obm", 0, [0.1, 0.5])),
        read_run(make_run("vlm", 0, [0.1, 0.5], changes={"rewards.format": 0.0})),
    ]
    summary = write_report(runs, tmp_path / "r", command="c", allow=["rewards.format"])
    assert summary["comparable"]["allowed"] == ["rewards.format"]
    assert summary["comparable"]["differences"] == [{
        "kind": "rewards", "setting": "rewards.format",
        "values": {"0.1": [str(runs[0].folder)], "0": [str(runs[1].folder)]},
    }]  # fmt: skip
    text = (tmp_path / "r" / "compare.md").read_text()
    assert "**differs between the runs** (`--allow`): `rewards.format`: 0.1 (1 run)" in text
    equal = write_report(runs[:1], tmp_path / "e", command="c")
    assert equal["comparable"] == {"allowed": [], "differences": []}
    assert "differs between" not in (tmp_path / "e" / "compare.md").read_text()


def test_what_decides_on_a_live_tools_answers_must_agree(make_run):
    runs = [read_run(make_run(arm, 0, [0.1, 0.5])) for arm in ("obm", "vlm")]
    runs[1].config["live"] = {"page_url": "http://elsewhere:1", "retries": 5}
    check_comparable(runs)
    runs[1].config["live"] |= {"read_results": True}
    with pytest.raises(CompareError, match=r"data: live\.read_results is false in .* and true in"):
        check_comparable(runs)


def test_an_evaluation_that_asked_in_another_mode_is_refused(make_run, tmp_path):
    trained = read_run(make_run("obm", 0, [0.1, 0.5]))
    record = {"arm": "ties", "config": trained.config, "metrics": {"accuracy": 0.2}}
    record |= {"mode": "rag", "query": "policy"}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    runs = [trained, read_run(tmp_path)]
    with pytest.raises(CompareError) as error:
        check_comparable(runs)
    assert 'evaluation: mode is "agent" in' in str(error.value)
    assert "evaluation: query is null in" in str(error.value)
    check_comparable(runs, ["mode", "query"])


def test_an_evaluation_on_other_questions_is_refused(make_run, tmp_path):
    trained = read_run(make_run("obm", 0, [0.1, 0.5]))
    config = json.loads(json.dumps(trained.config))
    config["environment"]["eval_split"] = "test"
    record = {"arm": "ties", "config": config, "metrics": {"accuracy": 0.2}}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    with pytest.raises(CompareError, match=r"evaluation: environment\.eval_split"):
        check_comparable([trained, read_run(tmp_path)])
