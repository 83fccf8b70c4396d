"""`obm merge --sweep`: what a grid on the command line may say, and what is chosen."""

import json

import pytest

from compare.errors import CompareError
from compare.zero_shot import Evaluator
from configs.errors import ConfigError
from configs.schema import load_config, shipped_config
from launch.errors import LaunchError
from launch.sweep import read_pairs, sweep
from merge.errors import MergeError


def ties(*overrides):
    return load_config(shipped_config("demo"), ["merge.method=ties", *overrides])


@pytest.fixture
def measured(monkeypatch):
    """Tasks that were measured. The score is best at density 0.5, answers change least at 0.2."""
    tasks = []
    answers = {0.1: ["a", "b", "d"], 0.2: ["a", "b", "c"], 0.4: ["a", "b", "x"], 0.5: ["y", None]}

    def measure(self, task):
        tasks.append(task)
        density = task.config.merge.density
        parts = ("searched", "entity", "passage", "accuracy")
        return {
            "metrics": dict.fromkeys(parts, density),
            "answers": [*answers[density], None][:3],
            "has_labels": True,
        }

    monkeypatch.setattr(Evaluator, "measure", measure)
    return tasks


def test_pairs_become_a_grid_with_full_keys():
    pairs = ["density=0.1,0.2", "weight.agent=0.7,1", "normalization=none,rank", "layers=0,0-1"]
    assert read_pairs(pairs, ties()) == {
        "density": [0.1, 0.2],
        "weights.agent": [0.7, 1],
        "normalization": ["none", "rank"],
        "layers": ["0", "0-1"],
    }
    assert read_pairs(["rules=[[], [{match: mlp, method: vlm}]]"], ties()) == {
        "rules": [[], [{"match": "mlp", "method": "vlm"}]]
    }


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["densty=0.1"], "did you mean 'density'"),
        (["weights.agnt=0.1"], "did you mean 'agent'"),
        (["density"], "write key=value"),
        (["density="], "write key=value"),
        (["density=0.1,,0.2"], "missing beside a comma"),
        (["density=0.1,0.1"], "listed twice"),
        (["agent=1", "weights.agent=2"], "given twice"),
        (["scope.a.b=1"], "--sweep scope.a.b: no key of merge"),
        (["density.=1"], "--sweep density.: no key of merge"),
        (["weights=[{}]", "agent=1"], "weights.agent and weights set the same"),
    ],
)
def test_wrong_pairs_are_refused(pairs, words):
    with pytest.raises((CompareError, LaunchError), match=words):
        read_pairs(pairs, ties())


@pytest.mark.parametrize(
    ("pair", "error", "words"),
    [
        ("density=0.2,1.5", ConfigError, "--sweep:merge.density: 1.5 is out of range"),
        ("method=ties,layer_swap", MergeError, "names no layers"),
        ("method=ties,obm", MergeError, "stats.safetensors"),
    ],
)
def test_no_setting_is_measured_when_one_cannot_be_merged(pair, error, words, measured, tmp_path):
    with pytest.raises(error, match=words):
        sweep(ties(f"calibration.output={tmp_path / 'none'}"), [pair], tmp_path / "out")
    assert not measured


def test_the_best_score_wins_and_the_table_lies_beside_the_output(measured, tmp_path, capsys):
    config = sweep(ties(), ["density=0.1,0.2,0.4,0.5"], tmp_path / "merged" / "out")
    assert (config.merge.density, config.merge.method) == (0.5, "ties")
    record = json.loads((tmp_path / "merged" / "out.sweep.json").read_text())
    assert record["chosen_by"] == "score"
    assert record["best"]["setting"] == {"density": 0.5}
    assert [row["score"] for row in record["rows"]] == [0.1, 0.2, 0.4, 0.5]
    page = (tmp_path / "merged" / "out.sweep.md").read_text()
    assert "| density 0.4 |" in page
    assert record["commit"] in page
    assert "best by score: density 0.5 (0.5000)" in capsys.readouterr().out
    assert not (tmp_path / "merged" / "out").exists()


def test_equal_scores_leave_the_first(measured, tmp_path):
    config = sweep(ties(), ["density=0.2", "agent=1,0.7"], tmp_path / "out")
    assert config.merge.weights["agent"] == 1.0


def test_by_agreement_the_setting_wins_that_its_neighbours_answer_like(measured, tmp_path):
    # equal answers of neighbours: 0.1 and 0.2 two of three, 0.2 and 0.4 two, 0.4 and 0.5 none;
    # so 0.1 has 2/3, 0.2 (2/3 + 2/3) / 2, 0.4 (2/3 + 0) / 2, 0.5 none: the first of equals
    pair = ["density=0.5,0.4,0.2,0.1"]
    config = sweep(ties(), pair, tmp_path / "out", by_agreement=True)
    assert config.merge.density == 0.2
    record = json.loads((tmp_path / "out.sweep.json").read_text())
    assert record["chosen_by"] == "agreement"
    assert [row["agreement"] for row in record["rows"]] == [0.0, 0.3333, 0.6667, 0.6667]
    assert "need not be where they are right" in (tmp_path / "out.sweep.md").read_text()


def test_agreement_needs_no_labels_and_a_score_does(measured, monkeypatch, tmp_path):
    labelled = Evaluator.measure
    monkeypatch.setattr(
        Evaluator, "measure", lambda self, task: {**labelled(self, task), "has_labels": False}
    )
    pair = ["density=0.1,0.2"]
    assert sweep(ties(), pair, tmp_path / "a", by_agreement=True).merge.density == 0.1
    assert "accuracy" not in (tmp_path / "a.sweep.md").read_text()
    with pytest.raises(LaunchError, match="--agreement"):
        sweep(ties(), pair, tmp_path / "b")
    with pytest.raises(LaunchError, match="at least two"):
        sweep(ties(), ["density=0.1"], tmp_path / "c", by_agreement=True)


def test_test_questions_choose_nothing(measured, tmp_path, capsys):
    config = sweep(ties("environment.eval_split=test"), ["density=0.1,0.2"], tmp_path / "out")
    assert {task.config.environment.eval_split for task in measured} == {"dev"}
    assert config.environment.eval_split == "test"
    assert "chosen on dev" in capsys.readouterr().out


def test_questions_of_ones_own_are_asked_as_they_are_and_named(measured, tmp_path, capsys):
    own = "environment.eval_benchmark={name: table, source: mine.jsonl}"
    sweep(ties("environment.eval_split=test", own), ["density=0.1,0.2"], tmp_path / "out")
    assert {task.config.environment.eval_split for task in measured} == {"test"}
    said = capsys.readouterr().out
    assert "asked table questions (source: mine.jsonl)" in said
    assert "dev" not in said


def test_the_same_sweep_again_measures_nothing_and_a_wider_one_the_rest(measured, tmp_path):
    sweep(ties(), ["density=0.1,0.2"], tmp_path / "out")
    sweep(ties(), ["density=0.1,0.2"], tmp_path / "out")
    assert len(measured) == 2
    sweep(ties(), ["density=0.1,0.2,0.4"], tmp_path / "out")
    assert len(measured) == 3


def test_a_dry_run_lists_the_settings(obm, measured, tmp_path):
    code, out, _ = obm(
        "merge", "merge.method=ties", "--sweep", "density=0.1,0.2", "agent=1,2",
        "--output", tmp_path / "new" / "out", "--dry-run",
    )  # fmt: skip
    assert code == 0
    assert "4 settings" in out
    assert "density 0.1, agent 2" in out
    assert not measured
    assert not list(tmp_path.iterdir())


def test_the_best_setting_is_what_is_merged(obm, measured, tmp_path):
    code, out, _ = obm(
        "merge", "merge.method=ties", "--sweep", "density=0.4,0.1", "--output", tmp_path / "out"
    )
    assert code == 0, out
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["settings"]["density"] == 0.4
