"""`obm atlas worlds`: every mode is measured with its own settings, and the tables say it."""

import json

import pytest

from compare.zero_shot import Evaluator
from launch import worlds
from launch.worlds import MODES


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Evaluations by stand-ins; returns their tasks."""
    tasks = []

    def measure(self, task):
        tasks.append(task)
        parts = ("searched", "search_rate_image", "entity", "passage", "accuracy")
        metrics = dict.fromkeys(parts, 0.25)
        return {"metrics": metrics, "answers": [], "has_labels": True}

    monkeypatch.setattr(worlds, "make_statistics", lambda config, kinds: None)
    monkeypatch.setattr(Evaluator, "measure", measure)
    monkeypatch.chdir(tmp_path)
    return tasks


def test_every_mode_is_measured_and_written(obm, measured, tmp_path):
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "config.json").write_text("{}")
    code, out, _ = obm(
        "atlas", "worlds", "--size", 2, "--output", tmp_path / "w", "--start", f"grpo={trained}"
    )
    assert code == 0
    assert "maps, two: ceiling" in out
    rows = json.loads((tmp_path / "w.json").read_text())["rows"]
    assert [(row["mode"], row["kind"]) for row in rows] == [mode[:2] for mode in MODES]
    for (_, kind, settings), row in zip(MODES, rows, strict=True):
        names = ["base", "agent"] if kind == "text" else ["vlm", "obm", "grpo"]
        assert list(row["policies"]) == names
        assert row["n"] == 2
        asked = [
            t.config.environment for t in measured if t.name.startswith(f"{row['mode']}, {kind}")
        ]
        for environment in asked:
            assert environment.eval_kinds == [kind]
            assert all(getattr(environment, key) == value for key, value in settings.items())
    text = (tmp_path / "w.md").read_text()
    assert text.count("| counterfactual | text | agent | 0.25 | 0.25 |") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--start", "trained"), "write NAME=DIR"), (("--size", 0), "at least one question")],
)
def test_a_bad_argument_is_named(obm, arguments, message):
    code, _, err = obm("atlas", "worlds", *arguments)
    assert code == 2
    assert message in err
