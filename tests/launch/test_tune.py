"""Tuning: grids that are fair, recipes that studies read, statistics that merges need."""

import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from compare import zero_shot as zero_shot_module
from compare.tuning import lay_over
from compare.zero_shot import Evaluator
from configs.schema import load_config
from launch import tasks as tasks_module
from launch.commands import calibrate as calibrate_module
from launch.commands.tune import read_grid
from launch.errors import LaunchError
from launch.studies import machine as machine_module
from launch.studies.file import load_study
from launch.studies.machine import Machine
from launch.tasks import make_statistics, make_task, named_files, needed_kinds
from merge.methods import METHODS
from merge.stats import FILE_NAMES
from train import gpu
from train.files import with_ending

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


def demo(*overrides):
    return load_config(DEMO, overrides)


def merge_settings(*overrides):
    return demo(*(f"merge.{override}" for override in overrides)).merge


@pytest.mark.parametrize("name", ["grid", "grid-second"])
def test_the_shipped_grids_tune_every_method_alike(name):
    entries = read_grid(ROOT / "configs" / "studies" / f"{name}.yaml", demo())
    assert {len(entry.settings(())) for entry in entries} == {18}
    assert {entry.method for entry in entries} == set(METHODS)
    assert {entry.name for entry in entries} - set(METHODS) == {"obm_inverse"}


def test_the_second_round_goes_on_from_the_best_of_the_first():
    best = yaml.safe_load((ROOT / "configs" / "studies" / "recipes.yaml").read_text())
    for entry in read_grid(ROOT / "configs" / "studies" / "grid-second.yaml", demo()):
        tried = [
            asdict(lay_over(demo(f"merge.method={entry.method}"), setting, "").merge)
            for setting in entry.settings(())
        ]
        wanted = [
            f"merge.{key}={yaml.safe_dump(value, default_flow_style=True, width=1000)}"
            for key, value in best[entry.name].items()
        ]
        if entry.name != "sce":  # no setting of its first round answered anything
            assert asdict(demo(*wanted).merge) in tried, entry.name


@pytest.mark.parametrize(("study", "grid"), [("floor", "grid"), ("floor-second", "grid-second")])
def test_the_shipped_floor_studies_have_an_arm_for_every_entry_of_the_grid(study, grid):
    entries = read_grid(ROOT / "configs" / "studies" / f"{grid}.yaml", demo())
    study = load_study(study)
    assert study.kind == "floor"
    assert {arm.name for arm in study.arms} == {*(e.name for e in entries), "vlm", "agent"}


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"obn": {}}, "did you mean 'obm'"),
        ({"mine": {"density": [0.2]}}, "says `method: NAME`"),
        ({"mine": {"method": "tie"}}, "did you mean 'ties'"),
        ({"obm": {"densty": [1]}}, "obm.densty: .*did you mean 'density'"),
        ({"obm": {"density": 0.5}}, "expected a list"),
        ({"obm": {"density": []}}, "expected a list"),
        ({"obm": {"density": [0.2, 1.5]}}, r"obm:merge\.density: 1\.5 is out of range"),
        ({"obm": {"scope.norm_bias": ["regmean"]}}, "scope.norm_bias"),
        ({"obm": {"density": [0.2, 0.5]}, "ties": {"density": [0.2]}}, "obm 2, ties 1"),
        ({}, "nothing to tune"),
        *(({"obm": entry}, "grid.yaml:obm: expected keys with lists of values, got")
          for entry in (3, [1], "abc", True)),
        ({3: {"method": "obm"}}, "grid.yaml:3: the name of an entry must be text"),
        ({"mine": {"method": ["obm"]}}, r"grid.yaml:mine: \['obm'\] is no method"),
        *(({"obm": {key: [1]}}, f"grid.yaml:obm.{key}: a key must be text; put it in quotes")
          for key in (3, True, None)),
        ({"obm": {"scope.linear.x": ["vlm"]}}, r"obm\.scope\.linear\.x: .*'scope.linear'"),
        ({"obm": {"density.": [1]}}, r"obm\.density\.: no key of merge"),
        ({"obm": {"density": [0.2, 0.2]}}, "grid.yaml:obm: density: a value is listed twice"),
        ({"obm": {"agent": [1], "weights.agent": [2]}}, "obm: weights.agent is given twice"),
        ({"obm": {"scope": [{}], "scope.linear": ["vlm"]}}, "scope.linear and scope set the same"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused(tmp_path, grid, words):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    with pytest.raises(ValueError, match=words) as caught:
        read_grid(tmp_path / "grid.yaml", demo())
    assert caught.value.exit_code == 2


def test_unequal_numbers_are_allowed_on_request(tmp_path):
    (tmp_path / "grid.yaml").write_text("obm: {density: [0.1, 0.2]}\nties: {}\n")
    entries = read_grid(tmp_path / "grid.yaml", demo(), uneven=True)
    assert [entry.name for entry in entries] == ["obm", "ties"]


def test_weights_that_a_grid_does_not_name_are_one_whatever_the_settings_say(tmp_path):
    (tmp_path / "grid.yaml").write_text("mine: {method: ties, agent: [2]}\n")
    (entry,) = read_grid(tmp_path / "grid.yaml", demo("merge.weights.vlm=3"))
    assert entry.settings(("vlm", "agent")) == [
        {"weights.vlm": 1.0, "weights.agent": 2, "method": "ties"}
    ]


def test_the_best_settings_become_recipes_that_a_study_reads(obm, tmp_path, monkeypatch):
    asked, splits = [], set()

    def measure(self, task):
        merge = task.config.merge
        splits.add(task.config.environment.eval_split)
        asked.append((merge.method, merge.density))
        accuracy = merge.density / 2 if merge.method == "ties" else 0.75 - merge.density / 2
        parts = ("searched", "entity", "passage", "accuracy")
        return {"metrics": dict.fromkeys(parts, accuracy), "answers": ["x"], "has_labels": True}

    monkeypatch.setattr(Evaluator, "measure", measure)
    (tmp_path / "grid.yaml").write_text(
        "mine: {method: ties, density: [0.2, 0.5], agent: [1.5]}\ndare: {density: [0.5, 1]}\n"
    )
    arguments = (
        "tune", "--grid", tmp_path / "grid.yaml", "--output", tmp_path / "results",
        "--recipes", tmp_path / "recipes.yaml", "--parallel", "1", f"output={tmp_path / 'run'}",
        "environment.eval_split=test",
    )  # fmt: skip
    code, out, _ = obm(*arguments)
    assert code == 0
    assert "tune: settings are chosen on dev" in out
    assert splits == {"dev"}
    assert "best mine: vlm 1, agent 1.5, density 0.5; score 0.250" in out
    assert asked == [("ties", 0.2), ("ties", 0.5), ("dare", 0.5), ("dare", 1.0)]
    recipes = yaml.safe_load((tmp_path / "recipes.yaml").read_text())
    assert recipes == {
        "mine": {"method": "ties", "density": 0.5, "weights": {"vlm": 1.0, "agent": 1.5}},
        "dare": {"method": "dare", "density": 0.5, "weights": {"vlm": 1.0, "agent": 1.0}},
    }
    assert (
        "| mine | vlm 1, agent 1.5, density 0.5 | 0.2500 |" in (tmp_path / "results.md").read_text()
    )
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 5
    study = {
        "title": "t", "config": str(DEMO), "output": "x", "seeds": [0], "recipes": "recipes.yaml",
        "arms": [{"name": "a", "merge": "mine"}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert load_study(tmp_path / "study.yaml").arms[0].merge["density"] == 0.5

    code, _, err = obm(*arguments)
    assert code == 2
    assert "--overwrite" in err
    code, out, _ = obm(*arguments, "--overwrite")
    assert code == 0
    assert "4 settings, 4 of them finished before" in out
    assert len(asked) == 4


def test_a_tuning_takes_what_memory_allows_and_merges_beside_its_results(
    obm, tmp_path, monkeypatch
):
    found = {}

    def measure_all(tasks, results, merge, **how):
        found.update(how)
        raise LaunchError("enough")

    monkeypatch.setattr(zero_shot_module, "measure_all", measure_all)
    monkeypatch.setattr(machine_module, "this_machine", lambda: Machine(8, 5_000_000_000))
    monkeypatch.setattr(machine_module, "evaluation_bytes", lambda config: 2_000_000_000)
    (tmp_path / "grid.yaml").write_text("ties: {density: [0.5]}\n")
    code, out, _ = obm(
        "tune", "--grid", tmp_path / "grid.yaml", "--output", tmp_path / "results",
        f"output={tmp_path / 'run'}",
    )  # fmt: skip
    assert code == 2
    assert (found["parallel"], found["scratch"]) == (2, tmp_path / "tuning")  # 0.9 * 5 / 2 = 2.25
    assert "2 at a time: 8 cores, 5.0 GB free, 2.0 each" in out


def test_a_setting_that_cannot_be_merged_is_refused_before_any_is_measured(
    obm, tmp_path, monkeypatch
):
    monkeypatch.setattr(Evaluator, "measure", lambda self, task: pytest.fail("measured"))
    (tmp_path / "grid.yaml").write_text("della: {density: [0.5, 0.95]}\n")
    code, _, err = obm(
        "tune", "--grid", tmp_path / "grid.yaml", "--output", tmp_path / "results",
        "--parallel", "1", f"output={tmp_path / 'run'}",
    )  # fmt: skip
    assert code == 2
    assert "window" in err


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (["method=obm"], ["diagonal"]),
        (["method=obm", "saliency=inverse"], ["inverse"]),
        (["method=regmean_diagonal", "saliency=inverse"], ["diagonal"]),
        (["method=regmean", "scope.norm_bias=fisher"], ["fisher", "gram"]),
        (["method=ties"], []),
        (["method=obm", "scope.linear=vlm"], []),
        (["method=ties", "rules=[{match: mlp, method: obm}]"], ["diagonal"]),
    ],
)
def test_a_merge_needs_the_statistics_of_every_method_in_it(settings, kinds):
    assert needed_kinds(merge_settings(*settings)) == kinds


@pytest.fixture
def calibrated(monkeypatch):
    """Calibrations that write empty files, and a list of what was made."""
    made = []

    def calibrate(config, role):
        folder = calibrate_module.stats_path(config, role).parent
        folder.mkdir(parents=True, exist_ok=True)
        for kind in config.calibration.kinds:
            (folder / FILE_NAMES[kind]).touch()
        made.append((role, config.calibration.kinds))

    monkeypatch.setattr(calibrate_module, "calibrate_parent", calibrate)
    return made


def test_only_missing_statistics_are_made(tmp_path, calibrated):
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "inverse.safetensors").touch()
    config = demo(f"calibration.output={tmp_path}", "models.donors.coder=x")
    make_statistics(config, ["fisher", "inverse"])
    assert calibrated == [
        ("vlm", ["fisher"]), ("agent", ["fisher", "inverse"]), ("coder", ["fisher", "inverse"])
    ]  # fmt: skip


def test_statistics_that_were_made_with_other_settings_are_not_taken(tmp_path, calibrated):
    def make(*overrides, kinds=("diagonal",)):
        make_statistics(demo(f"calibration.output={tmp_path}", *overrides), kinds)

    make()
    calibrated.clear()
    make("calibration.batch_size=1", "calibration.damping=0.1", "environment.eval_size=3")
    words = r"vlm/stats\.safetensors: .*calibration\.samples was 64, is 512\); remove it, or give"
    with pytest.raises(LaunchError, match=words):
        make("calibration.samples=512")
    longer = "grpo.max_completion_length=99"
    with pytest.raises(LaunchError, match=r"agent/stats\.safetensors: .*was 320, is 99"):
        make(longer, kinds=("diagonal", "fisher"))
    assert calibrated == []  # nothing is made before all is found to fit
    # what lies there by another way is the user's own
    for role in ("vlm", "agent"):
        os.utime(tmp_path / role / "stats.safetensors", (1, 1))
    make("calibration.samples=512", longer)
    assert calibrated == []


def test_gpu_memory_is_given_back_after_each_parent(tmp_path, monkeypatch, calibrated):
    monkeypatch.setattr(gpu, "give_back", lambda: calibrated.append("free"))
    make_statistics(demo(f"calibration.output={tmp_path}"), ["diagonal"])
    assert calibrated == [("vlm", ["diagonal"]), "free", ("agent", ["diagonal"]), "free"]


def test_a_result_is_kept_until_something_that_decides_it_changes(tmp_path, monkeypatch):
    def key(*overrides):
        config = demo(f"calibration.output={tmp_path}", *overrides)
        return make_task("x", config).key

    same = key()
    assert key("merge.threads=1", "output=elsewhere", "calibration.samples=3") == same
    assert key("live.retries=5", "live.text_url=http://elsewhere:1") == same
    changed = {
        key("merge.density=0.1"),
        key("environment.data_seed=1"),
        key("grpo.max_completion_length=8"),
        key("models.agent=atlas://base"),
        key("live.country=de"),
    }
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "stats.safetensors").touch()
    changed.add(key())
    monkeypatch.setattr(tasks_module, "_code_digest", lambda: "other code")
    changed.add(key())
    assert len(changed - {same}) == 7


def test_a_result_does_not_outlive_its_donor(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "math").mkdir()
    donor = ("models.donors.math=~/math", "merge.method=ties")
    config = demo(f"calibration.output={tmp_path}", *donor)
    before = make_task("x", config).key
    (tmp_path / "math" / "model.safetensors").touch()
    assert make_task("x", config).key != before


def test_a_result_does_not_outlive_the_questions_it_was_asked(tmp_path):
    questions = tmp_path / "questions.jsonl"
    benchmark = f"environment.eval_benchmark={{name: table, source: {questions}}}"
    keys = []
    for rows in ("{}\n", "{}\n{}\n"):
        questions.write_text(rows)
        keys += [make_task("x", demo(benchmark), checkpoint="atlas://vlm").key for _ in range(2)]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    # what ships with the package counts by its version alone
    shipped = f"calibration.agent_data.source={ROOT / 'configs/studies/random_text.json'}"
    assert named_files(demo(shipped), "agent_data") == {}


def test_of_a_folder_that_settings_name_only_the_files_of_rows_count(tmp_path):
    folder = tmp_path / "rows"
    (folder / "train").mkdir(parents=True)
    config = demo(f"calibration.vlm_data.source={folder}")

    def names_after(name):
        (folder / name).touch()
        return [name for name, *_ in named_files(config, "vlm_data")["files"][str(folder)]]

    assert names_after("dataset_dict.json") == ["dataset_dict.json"]
    assert names_after("train/data-0.arrow") == ["dataset_dict.json", "data-0.arrow"]
    # a picture that rows name, and what reading a data set leaves behind
    for name in ("photo.png", "train/cache-1.arrow"):
        assert names_after(name) == ["dataset_dict.json", "data-0.arrow"]


@pytest.mark.parametrize(("given", "name"), [("qwen2.5", "qwen2.5"), ("a.json", "a")])
def test_results_keep_what_stands_behind_a_dot_in_their_name(tmp_path, given, name):
    for ending in (".json", ".csv", ".md"):
        assert with_ending(tmp_path / given, ending) == tmp_path / f"{name}{ending}"


def test_a_dry_run_counts_the_settings(obm, tmp_path):
    (tmp_path / "grid.yaml").write_text("obm_inverse: {method: obm, density: [0.2, 0.5]}\n")
    code, out, _ = obm("tune", "--grid", tmp_path / "grid.yaml", "--dry-run")
    assert code == 0
    assert out == "obm_inverse: 2 settings of density\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", ""], "--output ''.*: names no file"),
        (["--output", "."], "names no file"),
        (["--output", ".."], "names no file"),
        (["--output", "x" * 300], "--output x+.json: the name is too long"),
        (["--output", "{tmp}/grid.yaml/x"], "--output .*grid.yaml is no folder"),
        (["--output", "/proc/x"], "--output /proc/x.json: cannot be written"),
        (["--recipes", ""], "--recipes ''.*: names no file"),
        (["--recipes", "{tmp}"], "--recipes .* is a folder"),
        (["--recipes", "{tmp}/grid.yaml"], "--recipes .*grid.yaml: this file is read"),
        (["--recipes", "{tmp}/mine.yaml"], "--recipes .*mine.yaml: this file is read"),
        (["--recipes", "{tmp}/out.json"], "--recipes .*: --output writes this file"),
        (["--parallel", "-3"], "--parallel -3: give a number of 1 or more"),
        (["--parallel", "0"], "--parallel 0: give a number of 1 or more"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    obm, tmp_path, monkeypatch, options, words
):
    monkeypatch.setattr(Evaluator, "measure", lambda self, task: pytest.fail("measured"))
    (tmp_path / "grid.yaml").write_text("ties: {density: [0.5]}\n")
    (tmp_path / "mine.yaml").write_text(f"inherits: {DEMO}\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = obm(
        "tune", "--config", tmp_path / "mine.yaml", "--grid", tmp_path / "grid.yaml",
        "--output", tmp_path / "out", "--overwrite", f"output={tmp_path / 'run'}",
        *(option.replace("{tmp}", str(tmp_path)) for option in options),
    )  # fmt: skip
    assert (code, err.count("\n")) == (2, 1)
    assert re.match(f"error: .*{words}", err)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
