"""Files of a run that hold what no training writes: one clear error with the file and the key."""

import json
import math

import pytest
import yaml

from compare.errors import CompareError
from compare.runs import read_run
from launch.cli import main

NESTED = b"[" * 100_000
HUGE = 10**400
CONFIGS = [
    ({"seed": "abc"}, "seed is 'abc', and must be a whole number"),
    ({"seed": [1]}, r"seed is \[1\]"),
    *[({name: 3}, f"{name} is 3, and must be keys and values") for name in (
        "models", "tracking", "compare", "environment", "grpo", "rewards", "algorithm", "lora",
        "freeze_heads", "rollout",
    )],
    ({"compare": {"smoothing": "x"}}, r"compare\.smoothing is 'x'"),
    ({"compare": {"smoothing": 0}}, "must be a whole number from 1 on"),
    ({"compare": {"bootstrap": -5}}, r"compare\.bootstrap is -5"),
    ({"compare": {"target_arm": ["vlm"]}}, r"compare\.target_arm is \['vlm'\]"),
    ({"environment": {"eval_kinds": 3}}, r"environment\.eval_kinds is 3"),
    ({"rewards": {"format": "much"}}, r"rewards\.format is 'much'"),
    ({"reward_functions": [3]}, "reward_functions is"),
    ({"reward_functions": [{"function": "mine.py:f"}]}, "a function and its weight"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), CONFIGS)
def test_settings_of_another_shape_are_refused(make_run, changes, words):
    folder = make_run("obm", 0, [0.1, 0.5])
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    with pytest.raises(CompareError, match=rf"config\.yaml: .*{words}"):
        read_run(folder)


@pytest.mark.parametrize(
    "text",
    [b"seed: \xff", NESTED, b"{", b"- 1", b"", b"grpo: {a: !!timestamp 2020-01-01}",
     b"grpo: {a: !!binary aGk=}"],
)  # fmt: skip
def test_settings_that_cannot_be_read_are_refused(make_run, text):
    folder = make_run("obm", 0, [0.1])
    (folder / "config.yaml").write_bytes(text)
    with pytest.raises(CompareError, match=r"config\.yaml: .*; "):
        read_run(folder)


LINES = [
    *[("eval", "step", value, "step is ") for value in ("x", [1], math.nan, 1.5, -1, True, HUGE)],
    *[
        (phase, name, value, f"{name} is .* must be a finite number")
        for phase, name in (
            ("eval", "eval/accuracy"), ("eval", "time_s"), ("eval", "tokens"), ("train", "reward"),
            ("train", "device_s"), ("train", "rewards/format/mean"),
        )
        for value in ("x", [1], {}, HUGE, math.nan, math.inf)
    ],
    ("train", "step", "x", "step is 'x'"),
    ("eval", "eval/n", 0, "eval/n is 0, and must be above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "name", "value", "words"), LINES)
def test_a_line_of_another_shape_is_refused_with_its_number(make_run, phase, name, value, words):
    folder = make_run("obm", 0, [0.1, 0.5])
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(i for i, line in enumerate(lines) if line["phase"] == phase)
    lines[number][name] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CompareError, match=rf"metrics\.jsonl:{number + 1}: {words}"):
        read_run(folder)


def test_a_line_without_its_step_is_refused(make_run):
    folder = make_run("obm", 0, [0.1])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "eval", "eval/accuracy": 0.5}\n')
    with pytest.raises(CompareError, match=r"metrics\.jsonl:3: step is missing"):
        read_run(folder)


def test_a_last_line_torn_within_a_character_is_passed_over(make_run):
    folder = make_run("obm", 0, [0.1, 0.5])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 10, "phase": "eval", "eval/kind/é'.encode()[:-1])
    assert read_run(folder).steps == [0, 5]


@pytest.mark.parametrize("line", [b'{"step": "\xff"}', NESTED, b"[1]"])
def test_a_broken_line_before_the_last_is_refused(make_run, line):
    folder = make_run("obm", 0, [0.1, 0.5])
    path = folder / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(CompareError, match=r"metrics\.jsonl.*(not|too)"):
        read_run(folder)


BESIDE = [
    *[(name, text, name) for name in ("environment.json", "merge.json", "start_cost.json")
      for text in (b"\xff", NESTED, b"{", b"[1]")],
    ("environment.json", b'{"world_size": "two"}', "world_size is 'two'"),
    ("environment.json", b'{"versions": 3}', "versions is 3"),
    ("merge.json", b'{"stats": 3}', "stats is 3"),
    ("start_cost.json", b'{"merge": "long"}', "merge is 'long'"),
    ("start_cost.json", b'{"merge": {"time_s": "x", "processor_s": 1}}', r"merge\.time_s is 'x'"),
    ("start_cost.json", b'{"merge": {"time_s": 1}}', r"merge\.processor_s is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "words"), BESIDE)
def test_a_damaged_file_beside_the_metrics_is_refused(make_run, name, text, words):
    folder = make_run("obm", 0, [0.1, 0.5])
    (folder / name).write_bytes(text)
    with pytest.raises(CompareError, match=words) as caught:
        read_run(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("cost", [None, {}, {"device_s": 3}, {"time_s": 1, "processor_s": 2.5}])
def test_every_cost_that_is_written_is_read(make_run, cost):
    folder = make_run("obm", 0, [0.1, 0.5])
    (folder / "start_cost.json").write_text(json.dumps({"merge": cost}))
    assert read_run(folder).start["cost"] == {"merge": cost}


EVALUATIONS = [
    ({"config": 3}, "the settings is 3"),
    ({"config": None}, "the settings is missing"),
    ({"config": {"grpo": 3}}, "grpo is 3"),
    ({"metrics": 3}, "metrics is 3"),
    ({"metrics": [1]}, "metrics is"),
    ({"metrics": {}}, "must be what was measured"),
    ({"metrics": {"accuracy": math.nan}}, "accuracy is nan"),
    ({"metrics": {"accuracy": "x"}}, "accuracy is 'x'"),
    ({"metrics": {"accuracy": 0.5, "n": 0}}, "n is 0, and must be above 0"),
    ({"seed": "x"}, "seed is 'x'"),
    ({"arm": ["a"]}, "arm is"),
    ({"arm": None}, "arm is missing"),
]


@pytest.mark.parametrize(("changes", "words"), EVALUATIONS)
def test_an_evaluation_of_another_shape_is_refused(tmp_path, changes, words):
    record = {"arm": "ties", "config": {}, "metrics": {"accuracy": 0.5}, **changes}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    with pytest.raises(CompareError, match=rf"eval\.json: .*{words}"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", [b"\xff", NESTED, b"[1]"])
def test_an_evaluation_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "eval.json").write_bytes(text)
    with pytest.raises(CompareError, match=r"eval\.json: "):
        read_run(tmp_path)


def test_the_command_says_it_in_one_line_and_writes_nothing(make_run, tmp_path, capsys):
    folder = make_run("obm", 0, [0.1, 0.5])
    (folder / "environment.json").write_text("[1]")
    assert main(["compare", str(folder), "--output", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}/environment.json: not a JSON obj")
    assert not (tmp_path / "report").exists()
