"""Axes around a reference, statistics of ones, and what an ablation writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from compare.zero_shot import Evaluator
from configs.errors import ConfigError
from launch.commands import calibrate as calibrate_module
from launch.errors import LaunchError
from launch.studies import measure as measure_module
from launch.studies.ablation import run_ablation, write_ones
from launch.studies.axes import all_points, read_axes, reference_point
from launch.studies.file import Options, load_study
from launch.studies.run import describe_study
from merge.stats import open_stats, save_stats

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
AXES = {
    "density": {"setting": "merge.density", "values": [0.1, 0.25, 0.5]},
    "samples": {"setting": "calibration.samples", "values": [4]},
    "saliency": {
        "points": {
            "diagonal": {},
            "inverse": {"merge": {"saliency": "inverse"}},
            "magnitude": {"statistics": "ones"},
        }
    },
}


@pytest.fixture
def write_study(tmp_path):
    """Writes a study of two seeds around OBM at density 0.25, and reads it."""

    def write(axes=AXES, **changes):
        content = {
            "title": "Ablation", "kind": "ablation", "config": str(DEMO),
            "output": str(tmp_path / "out"), "seeds": [3, 5], "reference": "obm",
            "recipes": "recipes.yaml", "axes": axes, **changes,
        }  # fmt: skip
        recipe = {"method": "obm", "density": 0.25, "weights": {"vlm": 1.0, "agent": 1.0}}
        (tmp_path / "recipes.yaml").write_text(yaml.safe_dump({"obm": recipe}))
        (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return load_study(tmp_path / "ablation.yaml")

    return write


@pytest.fixture
def made(monkeypatch):
    """What was calibrated and measured, by stand-ins; accuracy is the density."""
    calibrated, measured = [], []

    def calibrate(config, role):
        path = calibrate_module.stats_path(config, role)
        save_stats(path, "diagonal", {"a": np.full(4, 7.0, np.float32)}, {"tokens": "1"})
        calibrated.append((path.parent.parent.name, role, config.calibration.kinds))

    def measure(self, task):
        measured.append(task)
        parts = ("searched", "entity", "passage", "accuracy", "recognition")
        value = task.config.merge.density + task.config.calibration.seed / 100
        return {"metrics": dict.fromkeys(parts, value), "answers": [], "has_labels": True}

    monkeypatch.setattr(calibrate_module, "calibrate_parent", calibrate)
    monkeypatch.setattr(Evaluator, "measure", measure)
    monkeypatch.setattr(measure_module, "check_merges", lambda tasks, scratch: list(tasks))
    return calibrated, measured


def test_one_setting_is_changed_at_a_time_and_each_point_is_there_once(write_study):
    axes = read_axes(write_study(), [])
    points = {point.arm: point for point in all_points(axes)}
    assert list(points) == [
        "obm", "density 0.1", "density 0.5", "samples 4", "saliency inverse", "saliency magnitude"
    ]  # fmt: skip
    reference = points.pop("obm")
    assert reference_point(axes).config == reference.config
    for point in points.values():
        changed = {
            key
            for key in ("density", "saliency", "weights", "normalization", "scope")
            if getattr(point.config.merge, key) != getattr(reference.config.merge, key)
        }
        if point.config.calibration != reference.config.calibration:
            changed.add("calibration")
        if point.statistics != "measured":
            changed.add("statistics")
        assert len(changed) == 1, point.arm


def test_an_axis_that_does_not_list_the_reference_gets_it_in_its_place(write_study):
    axis = read_axes(write_study(), [])["samples"]
    # the demo's 64 samples stand behind the 4 that are listed
    assert [(point.value, point.arm) for point in axis] == [(4, "samples 4"), (64, "obm")]
    points = {"inverse": {"merge": {"saliency": "inverse"}}}
    named = read_axes(write_study({"saliency": {"points": points}}), [])
    assert [point.value for point in named["saliency"]] == ["inverse", "reference"]


@pytest.mark.parametrize(
    ("axes", "error", "words"),
    [
        ({}, LaunchError, "no axis is named"),
        ({"d": [1]}, LaunchError, r"axes\.d: write \{setting"),
        ({"d": {"setting": "merge.density"}}, LaunchError, "write"),
        ({"d": {"setting": "merge.density", "values": [2]}}, ConfigError, "2.0 is out of range"),
        ({"d": {"setting": "merge.densty", "values": [1]}}, ConfigError, "densty.*density"),
        ({"d": {"setting": "seed", "values": [1]}}, LaunchError, "'seed' is not varied here"),
        ({"d": {"setting": "merge.density", "values": [0.5, 0.5]}}, LaunchError, "0.5 appears"),
        ({"s": {"points": {"a": {"statistics": "zeros"}}}}, LaunchError, "'zeros'; choose"),
        ({"s": {"points": {"a": {}, "b": {}}}}, LaunchError, "the reference appears twice"),
        ([1], LaunchError, r"ablation\.yaml:axes: expected axes by name, got list"),
        ({3: {}}, LaunchError, r"axes\.3: expected text as the key"),
        ({"d": {"setting": 3, "values": [1]}}, LaunchError, r"axes\.d\.setting: expected the key"),
        ({"d": {"setting": "merge.density", "values": []}}, LaunchError, "the list is empty"),
        ({"s": {"points": {"a": 3}}}, LaunchError, r"axes\.s\.points\.a: expected settings"),
        ({"s": {"points": {"a": {3: 1}}}}, LaunchError, r"points\.a\.3: expected text as the key"),
        ({"s": {"points": {"a": {"merge": 3}}}}, ConfigError, r"yaml:axes\.s\.points\.a\.merge: "),
    ],
)  # fmt: skip
def test_a_wrong_axis_is_refused(write_study, axes, error, words):
    with pytest.raises(error, match=words):
        read_axes(write_study(axes), [])


@pytest.mark.parametrize(
    "override", ["merge.density=0.5", "merge.weights={vlm: 0.5}", "calibration.seed=1", "seed=1"]
)
def test_what_the_reference_or_a_seed_says_itself_is_refused(write_study, override):
    with pytest.raises(ConfigError, match="would change nothing"):
        read_axes(write_study(), [override])


def test_a_data_file_may_lie_beside_the_study(write_study, tmp_path):
    (tmp_path / "noise.json").write_text('[{"text": "x y"}]')
    data = {"source": "noise.json", "prompt": "{text}", "answer": ""}
    study = write_study({"data": {"points": {"noise": {"calibration": {"vlm_data": data}}}}})
    point = read_axes(study, [])["data"][0]
    assert point.config.calibration.vlm_data["source"] == str(tmp_path / "noise.json")


def test_points_that_are_calibrated_alike_share_statistics(write_study, made, tmp_path):
    calibrated, measured = made
    run_ablation(write_study(), Options("c", parallel=1))
    both = ["diagonal", "inverse"]
    assert calibrated == [
        (sample, role, kinds)
        for _ in (3, 5)
        for sample, kinds in (("reference", both), ("samples-4", ["diagonal"]))
        for role in ("vlm", "agent")
    ]
    assert len(measured) == 6 * 2
    for task in measured:
        seed = task.config.calibration.seed
        assert (task.config.merge.seed, task.config.environment.data_seed) == (seed, seed)
    magnitude = next(task for task in measured if task.name == "saliency magnitude s3")
    folder = Path(magnitude.config.calibration.output)
    assert folder == tmp_path / "out" / "calibration" / "s3" / "reference-ones"
    assert open_stats(folder / "agent", "diagonal").vector("a.weight").tolist() == [1.0] * 4


def test_samples_whose_names_make_one_folder_name_have_folders_of_their_own(write_study, made):
    points = {
        name: {"calibration": {"samples": n}} for name, n in (("Two kinds", 3), ("two kinds", 5))
    }
    run_ablation(write_study({"data": {"points": points}}), Options("c", parallel=1))
    calibrated, _ = made
    samples = {sample for sample, _, _ in calibrated}
    assert samples == {"reference", "data-two-kinds", "data-two-kinds-2"}


def test_a_second_run_makes_nothing(write_study, made):
    calibrated, measured = made
    study = write_study()
    run_ablation(study, Options("c", parallel=1))
    run_ablation(study, Options("c", parallel=1))
    assert (len(calibrated), len(measured)) == (8, 12)


def test_the_record_has_every_axis_with_the_reference_on_it(write_study, made, tmp_path):
    record = run_ablation(write_study(), Options("obm study ablation", parallel=1))
    assert json.loads((tmp_path / "out" / "report" / "compare.json").read_text()) == record
    assert [axis["name"] for axis in record["axes"]] == ["density", "samples", "saliency"]
    for axis in record["axes"]:
        marked = [point for point in axis["points"] if point["is_reference"]]
        assert [point["arm"] for point in marked] == ["obm"]
    density = record["axes"][0]
    assert density["setting"] == "merge.density"
    assert [point["value"] for point in density["points"]] == [0.1, 0.25, 0.5]
    # the density and a hundredth of the seed: (0.53 + 0.55) / 2
    assert density["points"][2]["parts"]["accuracy"]["mean"] == pytest.approx(0.54)
    # reference minus arm, in both seeds: 0.25 - 0.5
    half = record["differences"]["density 0.5"]["accuracy"]
    assert half["per_seed"] == pytest.approx([-0.25, -0.25])
    for suffix in ("md", "csv", "png", "svg", "html"):
        assert (tmp_path / "out" / "report" / f"compare.{suffix}").stat().st_size > 100


def test_ones_keep_names_shapes_and_what_the_weights_were(tmp_path):
    vectors = {"a": np.array([1, 4], np.float32), "b": np.array([2, 0, 5], np.float32)}
    source = save_stats(
        tmp_path / "s" / "stats.safetensors", "diagonal", vectors,
        {"weights": '{"a.weight": "x"}', "tokens": "9"}, {"alias": "a"},
    )  # fmt: skip
    write_ones(source, tmp_path / "ones" / "stats.safetensors")
    ones = open_stats(tmp_path / "ones", "diagonal")
    assert {name: ones.vector(name).tolist() for name in ones.names} == {
        "a.weight": [1.0, 1.0], "alias.weight": [1.0, 1.0], "b.weight": [1.0, 1.0, 1.0]
    }  # fmt: skip
    assert ones.weights == {"a.weight": "x"}


def test_the_shipped_ablation_describes_its_axes():
    study = load_study("ablation")
    text = describe_study(study, Options("c", parallel=1))
    assert "density: 0.05, 0.1, 0.25 (reference), 0.5, 0.75, 1.0" in text
    assert "saliency: diagonal (reference), inverse, magnitude" in text
    # a reference and 5 + 3 + 2 + 4 + 5 + 2 + 2 + 1 + 2 + 4 + 2 neighbours, with five seeds
    assert "165 evaluations, no training; 1 at a time" in text


@pytest.mark.parametrize("reference", [3, None, {}, [1], {3: 1}, "nosuch"])
def test_a_wrong_reference_is_refused(write_study, reference):
    with pytest.raises(LaunchError, match=r"ablation\.yaml:reference.*; "):
        write_study(reference=reference)
