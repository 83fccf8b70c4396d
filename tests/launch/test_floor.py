"""The study of floors: what a seed changes, what is made once, what is written."""

import json
from pathlib import Path

import pytest
import yaml

from compare.zero_shot import Evaluator
from configs.errors import ConfigError
from launch.commands import calibrate as calibrate_module
from launch.studies import measure as measure_module
from launch.studies.file import Options, load_study
from launch.studies.floor import run_floor
from launch.studies.run import describe_study

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@pytest.fixture
def study(tmp_path):
    """A study of two merges and the plain VLM with two seeds."""
    content = {
        "title": "Floors", "config": str(DEMO), "output": str(tmp_path / "out"), "seeds": [3, 5],
        "kind": "floor", "overrides": {"environment": {"eval_split": "test"}},
        "arms": [
            {"name": "obm", "merge": {"method": "obm", "density": 0.3}},
            {"name": "dare", "merge": {"method": "dare", "weights": {"agent": 0.5}}},
            {"name": "vlm", "init": "atlas://vlm"},
        ],
    }  # fmt: skip
    (tmp_path / "floors.yaml").write_text(yaml.safe_dump(content))
    return load_study(tmp_path / "floors.yaml")


@pytest.fixture
def made(monkeypatch):
    """What was calibrated and measured, by stand-ins."""
    calibrated, measured = [], []

    def calibrate(config, role):
        folder = calibrate_module.stats_path(config, role).parent
        folder.mkdir(parents=True)
        (folder / "stats.safetensors").write_text(str(config.calibration.seed))
        calibrated.append((role, config.calibration.seed, config.calibration.kinds))

    def measure(self, task):
        measured.append(task)
        value = {"obm-s3": 0.5, "obm-s5": 0.6, "dare-s3": 0.25, "dare-s5": 0.25}.get(task.name, 0)
        parts = ("searched", "entity", "passage", "accuracy", "recognition")
        return {"metrics": dict.fromkeys(parts, value), "answers": [], "has_labels": True}

    monkeypatch.setattr(calibrate_module, "calibrate_parent", calibrate)
    monkeypatch.setattr(Evaluator, "measure", measure)
    monkeypatch.setattr(measure_module, "check_merges", lambda tasks, scratch: list(tasks))
    return calibrated, measured


def test_a_seed_changes_calibration_random_stream_and_questions(study, made, tmp_path):
    calibrated, measured = made
    run_floor(study, Options("c", parallel=1))
    assert calibrated == [
        ("vlm", 3, ["diagonal"]), ("agent", 3, ["diagonal"]),
        ("vlm", 5, ["diagonal"]), ("agent", 5, ["diagonal"]),
    ]  # fmt: skip
    assert [task.name for task in measured] == [
        "obm-s3", "dare-s3", "vlm-s3", "obm-s5", "dare-s5", "vlm-s5"
    ]  # fmt: skip
    for task in measured:
        seed = int(task.name[-1])
        section = task.config.environment
        assert (section.data_seed, section.eval_split) == (seed, "test")
        assert task.config.merge.seed == seed
        assert task.config.calibration.output == str(tmp_path / "out" / "calibration" / f"s{seed}")
        assert task.recognition
        assert (task.checkpoint is not None) == task.name.startswith("vlm")


def test_the_first_arm_is_held_against_the_others(study, made, tmp_path, capsys):
    summary = run_floor(study, Options("obm study floor", parallel=1))
    assert summary["reference"] == "obm"
    assert summary["differences"]["dare"]["accuracy"]["per_seed"] == pytest.approx([0.25, 0.35])
    record = json.loads((tmp_path / "out" / "report" / "compare.json").read_text())
    assert "Every start before any training" in (tmp_path / "out/report/compare.html").read_text()
    assert record["command"] == "obm study floor"
    assert record["arms"]["obm"]["recipe"] == "obm: density 0.3"
    assert record["arms"]["dare"]["recipe"] == "dare: agent 0.5"
    assert record["arms"]["vlm"]["recipe"] == "as it is"
    assert "| obm | 0.55" in capsys.readouterr().out


def test_a_second_run_makes_nothing_and_a_further_seed_only_itself(study, made):
    calibrated, measured = made
    run_floor(study, Options("c", parallel=1))
    run_floor(study, Options("c", parallel=1))
    assert (len(calibrated), len(measured)) == (4, 6)
    study.seeds.append(7)
    run_floor(study, Options("c", parallel=1))
    assert (len(calibrated), len(measured)) == (6, 9)


def test_a_changed_recipe_is_measured_again(study, made):
    _, measured = made
    run_floor(study, Options("c", parallel=1))
    study.arms[1].merge["density"] = 0.9
    run_floor(study, Options("c", parallel=1))
    assert [task.name for task in measured[6:]] == ["dare-s3", "dare-s5"]


def test_what_every_seed_decides_is_refused(study):
    for key in ("calibration.seed", "merge.seed", "environment.data_seed"):
        with pytest.raises(ConfigError, match=f"{key}: would change nothing"):
            describe_study(study, Options("c", overrides=[f"{key}=1"]))


def test_the_description_counts_evaluations_and_no_training(study):
    lines = describe_study(study, Options("c", parallel=1)).splitlines()
    assert lines[-2].startswith("6 evaluations, no training; 1 at a time")
    assert lines[-1] == "  0 there already, 6 to run"
