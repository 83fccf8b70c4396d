"""Tuning: grids that are fair, results and recipes that studies read."""

from pathlib import Path

import pytest
import yaml

from compare import tuning
from launch.commands import tune as tune_module
from launch.commands.tune import count_settings, read_grid, recipes_text
from launch.errors import LaunchError
from launch.study import load_study

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_grid_tunes_every_method_alike():
    grids = read_grid(ROOT / "configs" / "studies" / "grid.yaml")
    assert len({count_settings(grid) for grid in grids.values()}) == 1
    assert set(grids) == {"obm", "task_arithmetic", "ties", "dare"}


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"obn": {}}, "did you mean 'obm'"),
        ({"obm": {"densty": [1]}}, "did you mean 'density'"),
        ({"obm": {"density": 0.5}}, "expected a list"),
        ({"obm": {"density": []}}, "expected a list"),
        ({"obm": {"density": [0.2, 0.5]}, "ties": {"density": [0.2]}}, "obm 2, ties 1"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path, grid, words):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    with pytest.raises(LaunchError, match=words):
        read_grid(tmp_path / "grid.yaml")


def test_unequal_numbers_are_allowed_on_request(tmp_path):
    (tmp_path / "grid.yaml").write_text("obm: {density: [0.1, 0.2]}\nties: {}\n")
    grids = read_grid(tmp_path / "grid.yaml", uneven=True)
    assert grids == {"obm": {"density": [0.1, 0.2]}, "ties": {}}


def test_the_best_settings_become_recipes_that_a_study_reads(obm, tmp_path, monkeypatch):
    rows = [
        {"method": "obm", "density": 0.2, "agent": 1.5, "score": 0.4, "accuracy": 0.3},
        {"method": "obm", "density": 0.5, "agent": 1.5, "score": 0.6, "accuracy": 0.5},
        {"method": "ties", "density": 0.2, "vlm": 0.7, "score": 0.1, "accuracy": 0.1},
    ]
    monkeypatch.setattr(tuning, "tune", lambda config, stats, grids: rows)
    monkeypatch.setattr(tune_module, "_stats", lambda config: {})
    (tmp_path / "grid.yaml").write_text("obm: {density: [0.2, 0.5]}\nties: {density: [1, 0.2]}\n")
    arguments = (
        "tune", "--grid", tmp_path / "grid.yaml", "--output", tmp_path / "results",
        "--recipes", tmp_path / "recipes.yaml",
    )  # fmt: skip
    code, out, _ = obm(*arguments)
    assert code == 0
    assert "best obm: density 0.5, agent 1.5; score 0.600" in out
    recipes = yaml.safe_load((tmp_path / "recipes.yaml").read_text())
    assert recipes == {
        "obm": {"method": "obm", "density": 0.5, "weights": {"vlm": 1.0, "agent": 1.5}},
        "ties": {"method": "ties", "density": 0.2, "weights": {"vlm": 0.7, "agent": 1.0}},
    }
    table = (tmp_path / "results.md").read_text()
    assert table.index("| obm | 0.5 |") < table.index("| obm | 0.2 |")
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4
    study = {
        "title": "t", "config": str(ROOT / "configs" / "demo.yaml"), "output": "x", "seeds": [0],
        "recipes": "recipes.yaml", "arms": [{"name": "a", "merge": "obm"}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert load_study(tmp_path / "study.yaml").arms[0].merge["density"] == 0.5

    code, _, err = obm(*arguments)
    assert code == 2
    assert "--overwrite" in err


def test_numbers_stay_numbers_in_a_recipe():
    text = recipes_text({"obm": {"method": "obm", "density": 1, "agent": 2}}, "obm tune")
    assert yaml.safe_load(text)["obm"]["weights"] == {"vlm": 1.0, "agent": 2.0}
