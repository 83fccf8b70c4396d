"""Studies: what a file may say, and the order of the stages, with scripted stages."""

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

from compare.evaluate import run_evaluation
from compare.paper_table import CELLS, _finish_row, _new_row, _readings
from configs.errors import ConfigError
from launch.commands import calibrate as calibrate_module
from launch.commands import eval as eval_module
from launch.commands import merge as merge_module
from launch.errors import JobFailedError, LaunchError
from launch.stages import Stages, hash_inputs
from launch.studies import paper_table as table_module
from launch.studies import perception as perception_module
from launch.studies import preparations as preparations_module
from launch.studies import starts as starts_module
from launch.studies import trainings as trainings_module
from launch.studies.ceiling import run_ceiling
from launch.studies.file import NOT_STUDIES, Options, load_study
from launch.studies.paper_table import run_table
from launch.studies.plan import Plan, flatten
from launch.studies.run import describe_study, run_study
from launch.studies.starts import (
    Step,
    calibration_step,
    evaluate,
    evaluation_steps,
    make_starts,
    run_steps,
    start_steps,
)
from launch.studies.trainings import split_batch
from merge.errors import OtherDataError
from train.resume import Saved

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study_file(tmp_path):
    """A study of three arms over the demo's settings, with stand-ins for the checkpoints."""
    for name in ("base", "vlm", "agent"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    models = {name: str(tmp_path / name) for name in ("base", "vlm", "agent")}
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump({"output": "runs/x", "models": models, "grpo": {"max_steps": 15}})
    )
    content = {
        "title": "A test",
        "config": "train.yaml",
        "output": str(tmp_path / "out"),
        "seeds": [0, 1],
        "zero_shot": True,
        "recipes": "recipes.yaml",
        "arms": [
            {"name": "obm", "merge": "obm"},
            {"name": "ties", "merge": {"method": "ties", "density": 0.2}, "train": False},
            {"name": "vlm", "init": models["vlm"]},
        ],
    }
    (tmp_path / "recipes.yaml").write_text(
        yaml.safe_dump({"obm": {"method": "obm", "weights": {"vlm": 1.0, "agent": 2.0}}})
    )
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def failing():
    """Names of trainings that fail."""
    return set()


@pytest.fixture
def scripted_stages(monkeypatch, write_scripted_run, failing):
    """Stages that write what the real ones would, and a list of what was made."""
    made = []

    def calibrate(config, role):
        path = calibrate_module.stats_path(config, role)
        path.parent.mkdir(parents=True)
        path.touch()
        made.append(f"calibrate {role}")

    def merge(config, output):
        output.mkdir(parents=True)
        made.append(f"merge {output.name} {config.merge.weights['agent']}")

    def evaluate(config, checkpoint, output, *, arm, command, mode="agent"):
        from dataclasses import asdict

        output.mkdir(parents=True)
        parts = ("searched", "entity", "passage", "accuracy", "search_rate_text",
                 "search_rate_image", "kind/two/accuracy")  # fmt: skip
        record = {"arm": arm, "seed": 0, "config": asdict(config),
                  "metrics": {**dict.fromkeys(parts, 0.1), "n": 8}}  # fmt: skip
        accuracy = {"direct": 0.125, "rag": 0.75}.get(mode, 0.5)
        headlines = {"accuracy": accuracy, "sr_img": 0.25, "sr_txt": 0.5, "sr_any": 0.5,
                     "calls": 1.5, "cas": 10.0, "official/em": 0.5, "strict/em": 0.5}  # fmt: skip
        if mode != "agent" or config.output.endswith("paper"):
            record["metrics"] |= headlines
        record["intervals"] = {"accuracy": [accuracy - 0.1, accuracy + 0.1]}
        (output / "eval.json").write_text(json.dumps(record))
        kinds = ",".join(config.environment.eval_kinds)
        asked = f" {mode} {kinds}" if config.output.endswith("paper") else ""
        made.append(f"evaluate {arm} {Path(checkpoint).name}{asked}")

    def run_jobs(jobs, *, parallel, on_line, on_done, on_failed, devices):
        for job in jobs:
            if job.name in failing:
                on_failed(
                    job, JobFailedError(f"{job.name} ended with code 1; its log is {job.log}")
                )
                continue
            made.append(" ".join(["train", job.name, *job.arguments[2:]]))
            write_scripted_run(job.arguments[1])
            for line in (job.output / "metrics.jsonl").read_text().splitlines():
                on_line(job, json.loads(line))
            on_done(job, 1.0)

    monkeypatch.setattr(calibrate_module, "calibrate_parent", calibrate)
    monkeypatch.setattr(merge_module, "merge_checkpoints", merge)
    monkeypatch.setattr(eval_module, "evaluate_checkpoint", evaluate)
    monkeypatch.setattr(trainings_module, "run_jobs", run_jobs)
    return made


def test_a_study_runs_its_stages_in_order(study_file, scripted_stages, capsys):
    summary = run_ceiling(load_study(study_file), Options("obm study x"))
    assert scripted_stages == [
        "calibrate vlm", "calibrate agent",
        "merge obm 2.0", "merge ties 1.0",
        "evaluate obm obm", "evaluate ties ties", "evaluate vlm vlm",
        "train obm-s0", "train vlm-s0", "train obm-s1", "train vlm-s1",
    ]  # fmt: skip
    assert list(summary["arms"]) == ["obm", "ties", "vlm"]
    assert summary["arms"]["obm"]["seeds"] == [0, 1]
    assert summary["arms"]["ties"]["ceiling"] is None
    out = capsys.readouterr().out
    assert "compare.{json,csv,md,html,png,svg}" in out
    assert "steps to vlm's ceiling" in out


def test_the_trainings_differ_in_start_seed_and_place_only(study_file, scripted_stages, tmp_path):
    run_ceiling(load_study(study_file), Options("c"))
    configs = {
        name: yaml.safe_load((tmp_path / "out" / "configs" / f"{name}.yaml").read_text())
        for name in ("obm-s0", "vlm-s0", "obm-s1")
    }
    assert configs["obm-s0"]["models"]["init"] == str(tmp_path / "out" / "merged" / "obm")
    assert configs["vlm-s0"]["models"]["init"] == str(tmp_path / "vlm")
    assert configs["obm-s0"]["seed"] == configs["vlm-s0"]["seed"] == 0
    assert configs["obm-s1"]["seed"] == 1
    assert configs["obm-s0"]["tracking"]["arm"] == "obm"
    for name in ("environment", "rewards", "grpo", "compare", "deepspeed"):
        assert configs["obm-s0"][name] == configs["vlm-s0"][name] == configs["obm-s1"][name]


def test_an_arm_may_have_a_parent_of_its_own(study_file, scripted_stages, tmp_path):
    content = yaml.safe_load(study_file.read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{ }")
    models = {"vlm": str(tmp_path / "other")}
    content["arms"] = [{"name": "own", "merge": "obm", "models": models}, *content["arms"]]
    study_file.write_text(yaml.safe_dump(content))
    run_ceiling(load_study(study_file), Options("c"))
    assert scripted_stages[:5] == [
        "calibrate vlm", "calibrate agent", "calibrate vlm", "calibrate agent", "merge own 2.0"
    ]  # fmt: skip
    config = yaml.safe_load((tmp_path / "out" / "configs" / "own-s0.yaml").read_text())
    assert config["models"]["vlm"] == models["vlm"]
    assert config["models"]["init"] == str(tmp_path / "out" / "merged" / "own")
    assert config["calibration"]["output"] == str(tmp_path / "out" / "calibration" / "own")


def test_all_kinds_of_statistics_that_any_arm_needs_are_made_at_once(study_file):
    content = yaml.safe_load(study_file.read_text())
    inverse = {"method": "obm", "saliency": "inverse"}
    own = {"method": "fisher"}
    content["arms"] += [
        {"name": "inverse", "merge": inverse, "train": False},
        {"name": "own", "merge": own, "models": {"vlm": "atlas://vlm"}, "train": False},
    ]
    study_file.write_text(yaml.safe_dump(content))
    study = load_study(study_file)
    plan = Plan(study, [])
    kinds = {arm.name: plan.config(arm).calibration.kinds for arm in study.arms}
    assert kinds["obm"] == kinds["ties"] == kinds["inverse"] == ["diagonal", "inverse"]
    assert kinds["own"] == ["fisher"]


def test_a_study_below_home_is_there(study_file, monkeypatch, tmp_path):
    content = yaml.safe_load(study_file.read_text()) | {"output": "~/s", "report": "~/r"}
    study_file.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("HOME", str(tmp_path))
    study = load_study(study_file)
    assert (study.output, study.report) == (tmp_path / "s", tmp_path / "r")


def test_a_second_run_reuses_everything(study_file, scripted_stages):
    run_ceiling(load_study(study_file), Options("c"))
    n_made = len(scripted_stages)
    summary = run_ceiling(load_study(study_file), Options("again"))
    assert len(scripted_stages) == n_made
    assert summary["command"] == "again"


def test_changed_settings_are_refused_or_made_again(study_file, scripted_stages):
    run_ceiling(load_study(study_file), Options("c"))
    scripted_stages.clear()
    changed = ["grpo.max_steps=99"]
    with pytest.raises(LaunchError, match=r"grpo\.max_steps was 15, is 99"):
        run_ceiling(load_study(study_file), Options("c", overrides=changed))
    run_ceiling(load_study(study_file), Options("c", overrides=changed, redo=True))
    assert "merge obm 2.0" not in scripted_stages
    assert "train obm-s0" in scripted_stages


@pytest.mark.parametrize("value", ["abc", "null", "0", ".nan"])
def test_a_dry_run_refuses_what_the_study_would_refuse(study_file, scripted_stages, value):
    wrong = Options("c", overrides=[f"grpo.max_steps={value}"])
    for tell in (describe_study, run_study):
        with pytest.raises(ConfigError, match=r"grpo\.max_steps: "):
            tell(load_study(study_file), wrong)
    assert not scripted_stages


def test_a_changed_recipe_makes_what_follows_from_it_again(study_file, scripted_stages, tmp_path):
    run_ceiling(load_study(study_file), Options("c"))
    scripted_stages.clear()
    (tmp_path / "recipes.yaml").write_text(yaml.safe_dump({"obm": {"method": "obm"}}))
    run_ceiling(load_study(study_file), Options("c", redo=True))
    assert scripted_stages == [
        "merge obm 1.0", "evaluate obm obm", "train obm-s0", "train obm-s1"
    ]  # fmt: skip


def test_a_broken_training_goes_on_from_its_checkpoint(study_file, scripted_stages, tmp_path):
    run_ceiling(load_study(study_file), Options("c"))
    scripted_stages.clear()
    marker = tmp_path / "out" / "stages" / "train-obm-s0.json"
    record = json.loads(marker.read_text())
    Stages(tmp_path / "out", redo=False).start("train-obm-s0", record["inputs"])
    checkpoint = tmp_path / "out" / "runs" / "obm-s0" / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()
    (checkpoint / "rollout_state_0.pt").touch()
    Saved(n_processes=1, is_boundary=True, per_rollout=8, per_step=8, zero_stage=0).write(
        checkpoint
    )
    run_ceiling(load_study(study_file), Options("c"))
    assert scripted_stages == ["train obm-s0 --resume"]


def test_a_broken_calibration_whose_cost_counts_starts_afresh(
    study_file, scripted_stages, tmp_path
):
    run_ceiling(load_study(study_file), Options("c"))
    stages = tmp_path / "out" / "stages"
    record = json.loads((stages / "calibrate-vlm.json").read_text())
    Stages(tmp_path / "out", redo=False).start("calibrate-vlm", record["inputs"])
    unfinished = tmp_path / "out" / "calibration" / "vlm" / ".unfinished-x.safetensors"
    unfinished.touch()
    scripted_stages.clear()
    run_ceiling(load_study(study_file), Options("c"))
    assert scripted_stages == ["calibrate vlm"]
    assert not unfinished.exists()


def test_a_broken_merge_starts_afresh(study_file, scripted_stages, tmp_path):
    run_ceiling(load_study(study_file), Options("c"))
    out = tmp_path / "out"
    record = json.loads((out / "stages" / "merge-obm.json").read_text())
    Stages(out, redo=False).start("merge-obm", record["inputs"])
    part = out / "merged" / ".obm.part"  # with a journal, from which `obm merge` would go on
    part.mkdir()
    scripted_stages.clear()
    run_ceiling(load_study(study_file), Options("c"))
    assert scripted_stages == ["merge obm 2.0"]
    assert not part.exists()


def test_a_broken_calibration_of_other_data_is_begun_anew(study_file, monkeypatch):
    config = Plan(load_study(study_file), []).config(load_study(study_file).arms[0])
    folder = calibrate_module.stats_path(config, "agent").parent
    folder.mkdir(parents=True)
    (folder / f".unfinished-{'0' * 16}.safetensors").touch()
    found = []

    def go_on(config, role):
        found.append(sorted(path.name for path in folder.iterdir()))
        if found[-1]:
            raise OtherDataError("was begun with other data")

    monkeypatch.setattr(calibrate_module, "calibrate_parent", go_on)
    calibration_step(config, "agent", "calibrate-agent").make()
    assert found == [[f".unfinished-{'0' * 16}.safetensors"], []]


def test_a_broken_evaluation_goes_on_with_what_it_had_kept(
    study_file, scripted_stages, monkeypatch, tmp_path
):
    run_ceiling(load_study(study_file), Options("c"))
    folder, found = tmp_path / "out" / "zero-shot" / "obm", []
    result = (folder / "eval.json").read_text()
    (folder / "episodes").mkdir()
    record = json.loads((tmp_path / "out" / "stages" / "evaluate-obm.json").read_text())
    Stages(tmp_path / "out", redo=False).start("evaluate-obm", record["inputs"])

    def go_on(config, checkpoint, output, **how):
        found.extend(path.name for path in output.iterdir())
        (output / "eval.json").write_text(result)

    monkeypatch.setattr(eval_module, "evaluate_checkpoint", go_on)
    run_ceiling(load_study(study_file), Options("c"))
    assert found == ["episodes"]


def test_a_broken_evaluation_of_a_checkpoint_that_was_made_again_starts_afresh(
    monkeypatch, tmp_path
):
    (tmp_path / "episodes").mkdir()
    (tmp_path / "episodes" / "plan.json").write_text('{"checkpoint": "before", "batch": 1}')
    started = []

    def go_on(config, checkpoint, output, overwrite=False):
        if not overwrite:
            run_evaluation([{}], None, output, plan={"checkpoint": checkpoint}, header={}, batch=1)
        started.append(overwrite)

    monkeypatch.setattr(eval_module, "evaluate_checkpoint", go_on)
    evaluate(None, "after", tmp_path)
    assert started == [True]


def test_what_was_made_of_a_file_is_not_reused_once_its_content_has_changed(study_file, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("{}\n")
    table = f"{{name: table, source: {questions}}}"
    named = [f"environment.{part}_benchmark={table}" for part in ("train", "eval")]

    def keys(overrides):
        plan, stages = Plan(load_study(study_file), overrides), Stages(tmp_path / "out", redo=False)
        found = {}
        for steps in (start_steps(plan, stages), evaluation_steps(plan, stages, "c")):
            for step in steps:
                stages.look(step.name, step.inputs, step.target)
                found[step.name] = hash_inputs(step.inputs)
        for training in trainings_module.list_trainings(plan, stages):
            found[training.name] = hash_inputs(training.inputs)
        return found

    before, without = keys(named), keys([])
    assert keys(named) == before
    questions.write_text("{}\n{}\n")
    after = keys(named)
    assert len(before) == 11  # two calibrations, two merges, three evaluations, four trainings
    # ties reads no statistics
    assert [name for name in before if before[name] == after[name]] == ["merge-ties"]
    assert keys([]) == without


def look_at_starts(study, overrides):
    """Name -> (what is there, inputs) of the stages before the evaluations."""
    stages, found = Stages(study.output, redo=False), {}
    for step in start_steps(Plan(study, overrides), stages):
        found[step.name] = stages.look(step.name, step.inputs, step.target), step.inputs
    return found


def test_the_agents_calibration_is_of_the_lengths_of_its_episodes(
    study_file, scripted_stages, monkeypatch
):
    study, longer = load_study(study_file), ["grpo.generation_kwargs={max_new_tokens: 99}"]
    with monkeypatch.context() as before:
        before.setattr(starts_module, "length_inputs", lambda config, role: {})
        make_starts(Plan(study, []), Stages(study.output, redo=False))
    # made before its lengths were noted: it is kept, and what was made from it
    found = look_at_starts(study, longer)
    assert {state for state, _ in found.values()} == {"done"}
    assert "episode_lengths" not in found["calibrate-vlm"][1]
    rows = look_at_starts(study, [f"calibration.agent_data.source={study_file}"])
    assert "episode_lengths" not in rows["calibrate-agent"][1]
    seed = ["calibration.seed=1"]
    make_starts(Plan(study, seed), Stages(study.output, redo=True))
    for overrides, changed in ((seed, []), ([*seed, *longer], ["calibrate-agent", "merge-obm"])):
        found = look_at_starts(study, overrides)
        assert [name for name, (state, _) in found.items() if state == "changed"] == changed


def test_gpu_memory_is_given_back_before_the_next_step_needs_it(tmp_path, monkeypatch):
    import torch

    made, freed = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(list(made)))
    steps = [
        Step(name, {}, tmp_path / name, partial(made.append, name), partial(str, name))
        for name in "ab"
    ]
    run_steps(steps, Stages(tmp_path, redo=False))
    assert freed == [["a"], ["a", "b"]]


def test_a_failed_training_stops_nothing_and_is_named_at_the_end(
    study_file, scripted_stages, failing, tmp_path
):
    failing.add("obm-s0")
    words = r"1 of 4 trainings failed, the others are done. obm-s0: .*obm-s0\.log.*--partial"
    with pytest.raises(JobFailedError, match=words):
        run_ceiling(load_study(study_file), Options("c"))
    trained = [line for line in scripted_stages if line.startswith("train")]
    assert trained == ["train vlm-s0", "train obm-s1", "train vlm-s1"]
    assert not (tmp_path / "out" / "report").exists()
    failing.clear()
    scripted_stages.clear()
    summary = run_ceiling(load_study(study_file), Options("c"))
    assert scripted_stages == ["train obm-s0"]
    assert summary["arms"]["obm"]["seeds"] == [0, 1]


def test_a_partial_report_says_what_it_lacks_and_the_study_still_fails(
    study_file, scripted_stages, failing, tmp_path
):
    failing.add("obm-s0")
    with pytest.raises(JobFailedError, match="1 of 4 trainings failed") as caught:
        run_ceiling(load_study(study_file), Options("c", partial=True))
    assert "--partial" not in str(caught.value)
    report = tmp_path / "out" / "report"
    arms = json.loads((report / "compare.json").read_text())["arms"]
    assert (arms["obm"]["seeds"], arms["vlm"]["seeds"]) == ([1], [0, 1])
    assert (report / "compare.md").read_text().startswith("# A test (without obm-s0, which failed)")


@pytest.mark.parametrize("perception", [False, True])
def test_where_every_training_failed_there_is_nothing_to_report(
    study_file, scripted_stages, failing, tmp_path, perception
):
    failing |= {f"{arm}-s{seed}" for arm in ("obm", "vlm") for seed in (0, 1)}
    content = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump({**content, "perception": perception}))
    with pytest.raises(JobFailedError, match="4 of 4 trainings failed") as caught:
        run_ceiling(load_study(study_file), Options("c", partial=True))
    assert "--partial" not in str(caught.value)
    assert "the others are done" not in str(caught.value)
    assert not (tmp_path / "out" / "report").exists()


def test_several_processes_share_the_completions_of_a_step(study_file, scripted_stages, tmp_path):
    rows = ["grpo.per_device_train_batch_size=12", "grpo.num_generations=4"]
    run_ceiling(load_study(study_file), Options("c", overrides=rows, n_processes=3))
    config = yaml.safe_load((tmp_path / "out" / "configs" / "obm-s0.yaml").read_text())
    assert config["grpo"]["per_device_train_batch_size"] == 4
    scripted_stages.clear()
    run_ceiling(load_study(study_file), Options("c", overrides=rows))
    assert not scripted_stages  # what was asked for is the same
    record = tmp_path / "out" / "runs" / "obm-s0" / "environment.json"
    record.write_text(json.dumps({"world_size": 3}))
    with pytest.raises(LaunchError, match="obm-s0 was trained with 3 processes; go on with --proc"):
        run_ceiling(load_study(study_file), Options("c", overrides=rows))
    with pytest.raises(LaunchError, match=r"--processes 5: .*is 12"):
        split_batch(Plan(load_study(study_file), rows).config(load_study(study_file).arms[0]), 5)


def test_a_dry_run_says_what_is_there_and_how_long_the_rest_may_take(
    study_file, scripted_stages, failing, tmp_path
):
    how = Options("c", parallel=1)
    text = describe_study(load_study(study_file), how)
    assert "7 calibrations, merges and evaluations: 7 to make" in text
    assert "0 there already, 4 to run" in text
    assert not (tmp_path / "out").exists()
    failing.add("vlm-s1")
    with pytest.raises(JobFailedError):
        run_ceiling(load_study(study_file), how)
    for marker in (tmp_path / "out" / "stages").glob("train-*.json"):
        record = json.loads(marker.read_text())
        marker.write_text(json.dumps({**record, "seconds": 600.0}))
    text = describe_study(load_study(study_file), how)
    assert "7 calibrations, merges and evaluations: 7 there already" in text
    assert "3 there already, 1 to run" in text
    assert "about 10 min left, by the 3 that are done" in text
    text = describe_study(load_study(study_file), Options("c", overrides=["grpo.max_steps=99"]))
    assert "refused without --redo: obm-s0, vlm-s0" in text


def test_a_study_locks_its_folder_and_says_how_to_go_on(
    study_file, scripted_stages, monkeypatch, tmp_path, capsys
):
    def interrupted(*_, **__):
        with pytest.raises(ConfigError, match="out is in use by process"):
            run_study(load_study(study_file), Options("second"))
        raise KeyboardInterrupt

    monkeypatch.setattr(trainings_module, "run_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(load_study(study_file), Options("first"))
    assert "run the same command again to go on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"armes": []}, r"unknown key 'armes'; did you mean 'arms'"),
        ({"seeds": []}, r"seeds"),
        ({"seeds": [0, 0]}, r"seeds"),
        ({"arms": [{"name": "a"}]}, r"arms\[0\]: give either init .* or merge"),
        ({"arms": [{"name": "a", "init": "x", "merge": "obm"}]}, r"give either init"),
        ({"arms": [{"name": "a", "merge": "nope"}]}, r"no recipe 'nope'; there are obm"),
        ({"arms": [{"name": "a", "init": "x"}] * 2}, r"'a' appears twice"),
        ({"arms": ["a"]}, r"arms\[0\]: expected name"),
        ({"arms": None}, r"arms: expected a list"),
        ({"arms": [{"name": "a", "init": "x", "models": {"vlm": "y"}}]}, r"only a merge"),
        ({"zero_shot": False}, r"only seen with zero_shot"),
        ({"kind": "roof"}, r"kind: 'roof'; choose one of ceiling, floor"),
        ({"kind": "floor"}, r"unknown key 'zero_shot'"),
        ({"kind": "ablation"}, r"unknown key"),
        ({"arms": [{"name": "a", "init": "x", "prepare": "dpo"}]}, r"'dpo'; choose one of sport"),
        (
            {"arms": [{"name": "a", "init": "x", "prepare": "sft", "train": False}]},
            r"trained afterwards; drop train: false",
        ),
    ],
)
def test_a_wrong_study_file_is_refused(study_file, change, words):
    content = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(LaunchError, match=words):
        load_study(study_file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({"seeds": seeds}, rf"study\.yaml:seeds{words}") for seeds, words in [
            ([1.5, 1], r"\[0\]: expected a whole number, got float 1\.5"),
            (["1", 1], r"\[0\]: expected a whole number, got str '1'"),
            ([0, 0], r"\[1\]: seed 0 is listed twice"),
            ([-1], r"\[0\]: out of range; use a whole number from 0"),
            ([10**26], r"\[0\]: out of range"),
            ([True], r"\[0\]: expected a whole number, got bool"),
            ([None], r"\[0\]: expected a whole number, got nothing"),
            ([[0]], r"\[0\]: expected a whole number, got list"),
            ([float("nan")], r"\[0\]: expected a whole number, got float"),
            (3, ": expected a list of seeds, got int 3; write"),
        ]),
        *(({key: value}, rf"study\.yaml:{key}: expected .*; ")
          for key in ("config", "output", "recipes", "report")
          for value in (3, ["x"], {}, "", "x" * 300, "a\0b")),
        *(({key: None}, rf"study\.yaml:{key}: expected .* got nothing; ")
          for key in ("config", "output", "recipes", "title", "report_name", "zero_shot")),
        *(({"report_name": name}, r"study\.yaml:report_name: expected .*; ")
          for name in ("../x", "", "..", ["a"], "a" * 300)),
        ({"zero_shot": "no"}, "zero_shot: expected true or false, got str 'no'"),
        ({"overrides": 3}, "study.yaml:overrides: expected settings, got int 3"),
        ({"overrides": {"grpo": {3: 1}}}, r"overrides\.grpo\.3: expected text as the key"),
        ({"overrides": {"a=b": 1}}, "overrides: 'a=b' names no setting"),
        ({"overrides": {"grpo": [{1: 2}]}}, r"overrides\.grpo\[0\]\.1: expected text as the key"),
        ({3: 1}, r"study\.yaml: unknown key 3; choose one of"),
    ],
)  # fmt: skip
def test_a_value_of_another_shape_is_refused_by_file_and_key(study_file, obm, change, words):
    content = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump({**content, **change}))
    before = sorted(study_file.parent.rglob("*"))
    with pytest.raises(LaunchError, match=words):
        load_study(study_file)
    code, out, err = obm("study", study_file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sorted(study_file.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({"name": name}, r"arms\[0\]\.name: expected .*; ")
          for name in ("../a", "", "..", ["a"], None, "a/b", "a\nb", "a" * 300)),
        *(({key: value}, rf"arms\[0\] \(a\)\.{key}: expected .*; ")
          for key in ("models", "settings", "merge") for value in (3, [1])),
        *(({key: {3: 1}}, rf"arms\[0\] \(a\)\.{key}\.3: expected text as the key")
          for key in ("models", "settings", "merge")),
        ({"merge": {}}, r"arms\[0\] \(a\)\.merge: expected settings of a merge"),
        ({"init": 3, "merge": None}, r"arms\[0\] \(a\)\.init: expected text, got int 3"),
        ({"train": "no"}, r"arms\[0\] \(a\)\.train: expected true or false, got str 'no'"),
        ({"train": None}, r"arms\[0\] \(a\)\.train: expected true or false, got nothing"),
        ({"trained": 3}, r"arms\[0\] \(a\)\.trained: expected text"),
        ({"modes": ["nosuch"]}, r"arms\[0\]\.modes: arm a: no mode 'nosuch'; choose among direct"),
        ({"modes": "agent"}, r"arms\[0\] \(a\)\.modes: expected a list of names"),
        ({"modes": [["agent"]]}, r"arms\[0\] \(a\)\.modes\[0\]: expected text"),
        ({"modes": ["rag", "rag"]}, r"arms\[0\]\.modes: arm a: 'rag' is listed twice"),
        ({"prepare": [1]}, r"arms\[0\]\.prepare: \[1\]; choose one of sport"),
        ({3: 1}, r"arms\[0\]: unknown key 3"),
    ],
)  # fmt: skip
def test_a_wrong_arm_is_refused_by_its_name(study_file, change, words):
    content = yaml.safe_load(study_file.read_text())
    content["arms"] = [{"name": "a", "merge": "obm"} | change]
    study_file.write_text(yaml.safe_dump(content))
    with pytest.raises(LaunchError, match=rf"study\.yaml:{words}"):
        load_study(study_file)


@pytest.mark.parametrize("recipe", [None, 3, [1], {}, {3: 1}])
def test_a_wrong_recipe_is_refused_by_its_file(study_file, recipe):
    (study_file.parent / "recipes.yaml").write_text(yaml.safe_dump({"obm": recipe}))
    with pytest.raises(LaunchError, match=r"recipes\.yaml:obm(\.3)?: expected .*; "):
        load_study(study_file)


@pytest.mark.parametrize(
    ("arm", "overrides", "words"),
    [
        ({}, {"merge": {"window": 2}}, r"study\.yaml:overrides\.merge\.window: 2\.0 is out of"),
        ({}, {"nosuch": 1}, r"study\.yaml:overrides\.nosuch: unknown key"),
        ({"merge": {"density": 2}}, {}, r"study\.yaml:arms\[0\] \(a\)\.merge\.density: 2\.0 is"),
        ({"models": {"nosuch": "x"}}, {}, r"arms\[0\] \(a\)\.models\.nosuch: unknown key"),
        ({"settings": {"seed": "x"}}, {"seed": 1}, r"arms\[0\] \(a\)\.settings\.seed: expected"),
        ({"settings": {"seed.x": 1}}, {}, r"arms\[0\] \(a\)\.settings\.seed: expected"),
        (
            {"settings": {"grpo": {"num_generations": 7}}}, {},
            r"arms\[0\] \(a\): grpo\.num_generations: .* cannot be cut",
        ),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_who_says_it(study_file, arm, overrides, words):
    content = yaml.safe_load(study_file.read_text())
    content |= {"arms": [{"name": "a", "merge": "obm"} | arm], "overrides": overrides}
    study_file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=words):
        describe_study(load_study(study_file), Options("c"))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"merge": {"weights": {"agent": 3.0}}}, r"merge\.weights\.agent: would change nothing"),
        ({"seed": 3}, r"seed: would change nothing"),
        ({"calibration": {"samples": 7}}, r"calibration: differs from that of obm, whose stat"),
        ({"merge": {"density": 0.5}}, None),  # the recipe leaves it open
    ],
)
def test_a_setting_of_an_arm_that_nothing_would_follow_is_refused(study_file, own, words):
    content = yaml.safe_load(study_file.read_text())
    content["arms"].insert(1, {"name": "other", "merge": "obm", "settings": own})
    study_file.write_text(yaml.safe_dump(content))
    study = load_study(study_file)
    if words is None:
        assert Plan(study, []).config(study.arms[1]).merge.density == 0.5
        return
    with pytest.raises(ConfigError, match=rf"yaml:arms\[1\] \(other\)\.settings\.{words}"):
        describe_study(study, Options("c"))


def test_a_start_that_is_not_there_is_named_by_its_arm(study_file, table_file):
    content = yaml.safe_load(table_file.read_text())
    arm = {"name": "a", "init": "runs/nowhere"}
    study_file.write_text(yaml.safe_dump({**content, "arms": [arm]}))
    with pytest.raises(ConfigError, match=r"yaml:arms\[0\] \(a\)\.init: no checkpoint folder"):
        describe_study(load_study(study_file), Options("c"))
    trained = {"name": "a", "init": "atlas://vlm", "trained": "runs/nowhere"}
    study_file.write_text(yaml.safe_dump({**content, "arms": [trained]}))
    with pytest.raises(ConfigError, match=r"yaml:arms\[0\] \(a\)\.trained: no checkpoint"):
        describe_study(load_study(study_file), Options("c"))


def test_what_the_command_line_says_is_still_its_own(study_file):
    with pytest.raises(ConfigError, match=r"^command line:merge\.window: 2\.0 is out of range"):
        describe_study(load_study(study_file), Options("c", overrides=["merge.window=2"]))


def test_what_no_arm_would_heed_is_refused(study_file):
    for override in (
        "merge.method=ties", "output=ties", "models.init=ties", "seed=7",
        "merge={method: ties}",
    ):  # fmt: skip
        key = override.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"^command line:{key}: would change nothing"):
            describe_study(load_study(study_file), Options("c", overrides=[override]))
    # one arm's recipe says it, another's does not
    study = load_study(study_file)
    plan = Plan(study, ["merge.weights.agent=3"])
    weights = [plan.config(arm).merge.weights.get("agent") for arm in study.arms[:2]]
    assert weights == [2.0, 3.0]
    Plan(study, ["merge={method: ties, window: 0.1}", "calibration.seed=1"])


def test_an_option_that_names_no_folder_is_refused(study_file, obm, tmp_path):
    for name in ("output", "report"):
        for folder in ("", "x" * 300, study_file, study_file / "x"):
            code, out, err = obm("study", study_file, f"--{name}", folder, "--dry-run")
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert err.startswith("error: ")
            assert f"--{name}" in err


def test_a_number_below_one_is_refused_by_study_and_demo(study_file, obm):
    for verb in (("study", study_file), ("demo",)):
        code, out, err = obm(*verb, "--parallel", "0", "--dry-run")
        assert (code, out, err) == (2, "", "error: --parallel 0: give a number of 1 or more\n")


# ---------------------------------------------------------------- preparations, perception


@pytest.fixture
def neighbours_file(study_file):
    """The study with an arm that is prepared, and one with settings of its own."""
    content = yaml.safe_load(study_file.read_text())
    content |= {"zero_shot": False, "perception": True}
    content["arms"] = [
        {"name": "obm", "merge": "obm"},
        {"name": "cast", "merge": "obm", "settings": {"freeze_heads": "cast(top=25%)"}},
        {"name": "sport", "merge": "obm", "prepare": "sport"},
    ]
    content["overrides"] = {"compare": {"budget_arm": "obm"}, "sport": {"tasks": 7}}
    study_file.write_text(yaml.safe_dump(content))
    return study_file


@pytest.fixture
def scripted_preparations(monkeypatch, scripted_stages, failing):
    """Maps, preparations and measurements that write what the real ones would."""
    made = scripted_stages

    def make_map(config, start, target):
        target.mkdir(parents=True)
        (target / "conflict.json").write_text("{}")
        made.append(f"diagnose {target.name} {Path(start).name}")

    def run_jobs(jobs, *, parallel, on_done, on_failed, devices):
        for job in jobs:
            if job.name in failing:
                on_failed(job, JobFailedError("ended with code 1"))
                continue
            (job.output / "policy").mkdir(parents=True, exist_ok=True)
            made.append(" ".join([job.verb, job.name, *job.arguments[2:]]))
            on_done(job, 1.0)

    def measure(study, tasks, options, words):
        made.append(f"measure {len(tasks)}")
        made.append(tasks[-2].config.environment.data_seed)
        made.append(Path(tasks[-2].checkpoint))
        return [{"metrics": {"recognition": 0.9 - 0.1 * (i % 2)}} for i in range(len(tasks))]

    def policy(run):
        (run / "final").mkdir(exist_ok=True)
        return run / "final"

    monkeypatch.setattr(preparations_module, "_make_map", make_map)
    monkeypatch.setattr(preparations_module, "run_jobs", run_jobs)
    monkeypatch.setattr(perception_module, "measure_tasks", measure)
    monkeypatch.setattr(perception_module, "whole_policy", policy)
    return made


def test_preparations_come_between_the_merges_and_the_trainings(
    neighbours_file, scripted_preparations, tmp_path
):
    summary = run_ceiling(load_study(neighbours_file), Options("c"))
    out = tmp_path / "out"
    assert scripted_preparations == [
        "calibrate vlm", "calibrate agent", "merge obm 2.0", "merge cast 2.0", "merge sport 2.0",
        "diagnose cast cast", "sport sport-sport-s0", "sport sport-sport-s1",
        "train obm-s0", "train cast-s0", "train sport-s0",
        "train obm-s1", "train cast-s1", "train sport-s1",
        "measure 12", 1, out / "prepared/sport-s1/policy",
    ]  # fmt: skip

    def config(name):
        return yaml.safe_load((out / "configs" / f"{name}.yaml").read_text())

    prepared, trained = config("sport-sport-s1"), config("sport-s1")
    assert prepared["models"]["init"] == str(out / "merged/sport")
    assert (prepared["seed"], prepared["output"]) == (1, str(out / "prepared/sport-s1"))
    assert prepared["sport"]["tasks"] == 7
    assert trained["models"]["init"] == str(out / "prepared/sport-s1/policy")
    assert trained["freeze_heads"]["source"] == "none"
    frozen = config("cast-s0")["freeze_heads"]
    assert (frozen["source"], frozen["top"]) == ("cast", 0.25)
    assert frozen["map"] == str(out / "conflict/cast/conflict.json")
    # what the study file lets differ is said; the rest agrees
    differing = {found["setting"] for found in summary["comparable"]["differences"]}
    assert differing == {"freeze_heads.source", "freeze_heads.top"}
    assert summary["arms"]["cast"]["recognition"] == pytest.approx(
        {"before": 0.9, "after": 0.8, "change": -0.1}
    )


def test_preparations_are_kept_and_made_again_with_other_settings(
    neighbours_file, scripted_preparations, failing, tmp_path
):
    failing.add("sport-sport-s1")
    with pytest.raises(JobFailedError, match="1 of 2 preparations failed, the others are done"):
        run_ceiling(load_study(neighbours_file), Options("c"))
    assert not any(str(entry).startswith("train") for entry in scripted_preparations)
    failing.clear()
    scripted_preparations.clear()
    (tmp_path / "out/prepared/sport-s1/iterations").mkdir(parents=True)
    run_ceiling(load_study(neighbours_file), Options("c"))
    assert scripted_preparations[0] == "sport sport-sport-s1 --resume"
    scripted_preparations.clear()
    run_ceiling(load_study(neighbours_file), Options("c"))
    assert [entry for entry in scripted_preparations if str(entry).startswith("sport")] == []
    study = load_study(neighbours_file)
    with pytest.raises(LaunchError, match=r"other settings .*sport\.tasks"):
        run_ceiling(study, Options("c", overrides=["sport.tasks=8"]))
    scripted_preparations.clear()
    run_ceiling(study, Options("c", overrides=["sport.tasks=8"], redo=True))
    ran = [str(entry) for entry in scripted_preparations]
    # the start of these trainings is another one; those of other arms stay
    assert [e.split()[1] for e in ran if e.startswith("sport")] == [
        "sport-sport-s0", "sport-sport-s1"
    ]  # fmt: skip
    assert [e.split()[1] for e in ran if e.startswith("train")] == ["sport-s0", "sport-s1"]


def test_a_preparation_sees_what_else_of_the_settings_decides_it(neighbours_file, tmp_path):
    def inputs(*overrides):
        plan = Plan(load_study(neighbours_file), list(overrides))
        stages = Stages(tmp_path, redo=False)
        for step in start_steps(plan, stages):
            stages.look(step.name, step.inputs, step.target)
        return next(preparations_module.preparation_steps(plan, stages)).inputs

    assert not {"lora", "models", "files"} & set(inputs())
    changed = inputs("lora.r=4", "models.freeze_vision=true")
    assert (changed["lora"]["r"], changed["models"]) == (4, {"freeze_vision": True})


def list_inputs(path, *overrides):
    """Inputs by stage of all that a study makes."""
    plan, found = Plan(load_study(path), list(overrides)), {}
    stages = Stages(plan.study.output, redo=False)
    parts = (start_steps, preparations_module.map_steps, preparations_module.preparation_steps)
    for step in (step for part in parts for step in part(plan, stages)):
        stages.look(step.name, step.inputs, step.target)
        found[step.name] = step.inputs
    for training in trainings_module.list_trainings(plan, stages):
        found[training.stage] = training.inputs
    return found


def changed_by(write, path, *overrides):
    """Stages whose inputs are others after `write()`."""
    before = list_inputs(path, *overrides)
    assert list_inputs(path, *overrides) == before
    write()
    return {
        name for name, inputs in list_inputs(path, *overrides).items() if inputs != before[name]
    }


def test_a_conflict_map_does_not_outlive_its_questions_and_teachers(neighbours_file, tmp_path):
    content = yaml.safe_load(neighbours_file.read_text())
    settings = {"freeze_heads": "cast(top=25%)"}
    content["arms"].append({"name": "given", "init": str(tmp_path / "base"), "settings": settings})
    neighbours_file.write_text(yaml.safe_dump(content))
    rows, agent = tmp_path / "rows.jsonl", tmp_path / "agent" / "config.json"
    keep = f"conflict.keep_benchmark={{name: table, source: {rows}}}"
    maps = {"diagnose-cast", "diagnose-given"}
    trained = {f"train-{arm}-s{seed}" for arm in ("cast", "given") for seed in (0, 1)}
    rows.write_text("{}\n")
    found = changed_by(lambda: rows.write_text("{}\n{}\n"), neighbours_file, keep)
    assert found == maps | trained
    # an arm of a checkpoint is not merged from its teachers
    assert set(list_inputs(neighbours_file)["diagnose-given"]["checkpoints"]) == {"models.vlm"}
    assert "checkpoints" not in list_inputs(neighbours_file)["diagnose-cast"]
    of_agent = "conflict.search=agent", "conflict.keep_words=init"
    found = changed_by(lambda: agent.write_text("{ }"), neighbours_file, *of_agent)
    assert {"diagnose-given", "train-given-s0"} < found
    found = changed_by(lambda: agent.write_text("{  }"), neighbours_file)
    assert "diagnose-given" not in found


def test_what_is_trained_does_not_outlive_the_files_it_was_made_with(neighbours_file, tmp_path):
    content = yaml.safe_load(neighbours_file.read_text())
    content["arms"][2]["prepare"] = "sft"
    neighbours_file.write_text(yaml.safe_dump(content))
    other = tmp_path / "other"
    other.mkdir()
    weights = [other / name for name in ("model.safetensors", "stats.safetensors", "map.json")]
    for path in weights:
        path.write_text("1")
    model, moments, own_map = weights

    def changed(path, *overrides):
        return changed_by(lambda: path.write_text("12"), neighbours_file, *overrides)

    sport = {f"{verb}-sport-s{seed}" for verb in ("sft", "train") for seed in (0, 1)}
    trained = {f"train-{arm}-s{seed}" for arm in ("obm", "cast", "sport") for seed in (0, 1)}
    assert changed(model, f"sft.teacher={other}") == sport
    model.write_text("1")
    assert changed(model, f"models.reference={other}") == trained
    for name in (other, moments):
        moments.write_text("1")
        assert changed(moments, f"algorithm.anchor_stats=[{name}]") == trained
    own_map.write_text("1")
    assert changed(own_map, f"deepspeed={own_map}") == trained
    own_map.write_text("1")
    content["arms"][1]["settings"]["freeze_heads"] = {"source": "cast", "map": str(own_map)}
    neighbours_file.write_text(yaml.safe_dump(content))
    assert changed(own_map) == {"train-cast-s0", "train-cast-s1"}
    with pytest.raises(
        ConfigError, match=r"models\.reference: no checkpoint folder 'runs/nowhere'"
    ):
        list_inputs(neighbours_file, "models.reference=runs/nowhere")


def test_a_preparation_made_before_its_teachers_weights_counted_stays_valid(
    neighbours_file, tmp_path
):
    content = yaml.safe_load(neighbours_file.read_text())
    content["arms"][2]["prepare"] = "sft"
    neighbours_file.write_text(yaml.safe_dump(content))
    inputs = list_inputs(neighbours_file, f"sft.teacher={tmp_path / 'base'}")["sft-sport-s0"]
    before = {key: value for key, value in inputs.items() if key != "checkpoints"}
    (tmp_path / "made").mkdir()
    stages = Stages(tmp_path, redo=False)
    stages.finish("sft", before, 1.0)
    assert stages.look("sft", inputs, tmp_path / "made") == "done"


def test_a_conflict_map_is_of_one_reward(neighbours_file, tmp_path):
    function = tmp_path / "own.py"
    function.write_text("def short(completions, **columns):\n    return [0.0] * len(completions)\n")
    content = yaml.safe_load(neighbours_file.read_text())
    cast = content["arms"][1]
    for name, own in (
        ("own", {"reward_functions": [{"function": f"{function}:short"}]}),
        ("thrifty", {"algorithm": {"efficiency_bonus": 0.5}}),
        ("again", {}),
    ):
        content["arms"].append({**cast, "name": name, "settings": {**cast["settings"], **own}})
    neighbours_file.write_text(yaml.safe_dump(content))

    def steps():
        plan = Plan(load_study(neighbours_file), [])
        stages = Stages(tmp_path, redo=False)
        for step in start_steps(plan, stages):
            stages.look(step.name, step.inputs, step.target)
        return {step.name: step.inputs for step in preparations_module.map_steps(plan, stages)}

    before = steps()
    assert list(before) == ["diagnose-cast", "diagnose-own", "diagnose-thrifty"]
    assert not {"reward_functions", "own_files", "algorithm"} & set(before["diagnose-cast"])
    assert before["diagnose-thrifty"]["algorithm"]["efficiency_bonus"] == 0.5
    function.write_text("def short(completions, **columns):\n    return [1.0] * len(completions)\n")
    changed = {name for name, inputs in steps().items() if inputs != before[name]}
    assert changed == {"diagnose-own"}


def test_of_the_live_services_only_what_decides_an_answer_counts(neighbours_file, tmp_path):
    def keys(*overrides):
        plan = Plan(load_study(neighbours_file), list(overrides))
        stages, found = Stages(tmp_path / "out", redo=False), {}
        parts = (start_steps, preparations_module.map_steps, preparations_module.preparation_steps)
        for list_steps in parts:
            for step in list_steps(plan, stages):
                stages.look(step.name, step.inputs, step.target)
                found[step.name] = step.inputs.get("live")
        for training in trainings_module.list_trainings(plan, stages):
            found[training.name] = training.inputs.get("live")
        return [found[name] for name in ("calibrate-agent", "sport-sport-s0", "sport-s0")]

    free = ["live.requests_per_second=1", "live.retries=5", "live.text_url=http://elsewhere:1"]
    assert keys() == keys(*free) == [None] * 3
    german = keys("live.country=de")
    assert keys("live.country=de", *free) == german
    assert [live["country"] for live in german] == ["de"] * 3


def test_arms_of_one_start_share_a_conflict_map_and_drawn_heads_differ_by_seed():
    study = load_study("cast")
    plan = Plan(study, [])
    arms = {arm.name: arm for arm in study.arms}
    owners = {name: plan.map_owner(arm) for name, arm in arms.items()}
    assert owners == {
        "obm": None, "cast10": "cast10", "random10": None, "cast25": "cast10", "random25": None,
        "anti25": "cast10", "all_heads": "cast10",
    }  # fmt: skip
    drawn = [plan.config(arms["random25"], seed).freeze_heads for seed in (0, 1, 2)]
    assert [section.seed for section in drawn] == [0, 1, 2]
    assert plan.config(arms["cast25"], 1).freeze_heads.map.endswith("conflict/cast10/conflict.json")
    other = Plan(study, ["conflict.seed=1"])
    assert other.map_owner(arms["cast25"]) == "cast10"


def test_the_neighbours_are_prepared_as_documented():
    study = load_study("neighbours")
    plan = Plan(study, [])
    assert [arm.name for arm in study.arms if arm.prepare] == ["obm_sport", "cold_start"]
    assert study.perception
    assert plan.config(study.arms[0]).compare.budget_arm == "obm"
    assert len(study.seeds) == 5


def test_settings_of_an_arm_are_for_studies_that_train(study_file):
    content = yaml.safe_load(study_file.read_text())
    content["arms"][0]["settings"] = {"freeze_heads": "cast(top=25%)"}
    del content["zero_shot"]
    study_file.write_text(yaml.safe_dump({**content, "kind": "floor"}))
    with pytest.raises(LaunchError, match="obm: prepare and settings are for kind: ceiling"):
        load_study(study_file)


@pytest.mark.parametrize("name", ["demo", "ceiling", "floor", "transfer", "paper"])
def test_shipped_studies_load_and_describe_themselves(name):
    study = load_study(name)
    assert study.config.is_file()
    assert {arm.name for arm in study.arms} >= {"obm", "task_arithmetic", "ties", "dare", "vlm"}


def test_every_study_file_is_a_study():
    for path in (ROOT / "configs" / "studies").glob("*.yaml"):
        if path.stem not in NOT_STUDIES:
            assert load_study(path).arms


# ---------------------------------------------------------------- the paper's table


@pytest.fixture
def table_file(study_file):
    """The study as a table of two columns; its vlm is asked in two modes, one policy is given."""
    content = yaml.safe_load(study_file.read_text())
    trained = study_file.parent / "trained"
    trained.mkdir()
    obm, ties, vlm = content["arms"]
    del content["zero_shot"]
    content |= {
        "output": str(study_file.parent / "paper"),
        "kind": "table",
        "report_name": "paper-table",
        "seeds": [0],
        "arms": [
            {**vlm, "modes": ["direct", "rag"], "trained": str(trained)},
            {**obm, "train": True},
            ties,
        ],
        "benchmarks": {
            "two hops": {"environment": {"eval_kinds": ["two"]}},
            "image": {"environment": {"eval_kinds": ["image"]}},
        },
    }
    study_file.write_text(yaml.safe_dump(content, sort_keys=False))
    return study_file


@pytest.fixture
def trained_policy(monkeypatch):
    """Finished runs name a checkpoint that is there."""

    def policy(run):
        (run / "policy").mkdir(exist_ok=True)
        return run / "policy"

    monkeypatch.setattr(table_module, "whole_policy", policy)


def test_the_table_has_a_row_for_each_mode_merge_and_policy(
    table_file, scripted_stages, trained_policy
):
    study = load_study(table_file)
    table = run_table(study, Options("obm study x"))
    evaluations = [line for line in scripted_stages if line.startswith("evaluate")]
    assert evaluations == [
        "evaluate vlm vlm direct two", "evaluate vlm vlm direct image",
        "evaluate vlm vlm rag two", "evaluate vlm vlm rag image",
        "evaluate obm obm agent two", "evaluate obm obm agent image",
        "evaluate ties ties agent two", "evaluate ties ties agent image",
        "evaluate vlm trained agent two", "evaluate vlm trained agent image",
        "evaluate obm policy agent two", "evaluate obm policy agent image",
    ]  # fmt: skip
    assert [line for line in scripted_stages if line.startswith("train")] == ["train obm-s0"]
    assert [(row["label"], row["group"]) for row in table["rows"]] == [
        ("vlm, direct answer", "baseline"), ("vlm, RAG workflow", "baseline"),
        ("obm", "merge"), ("ties", "merge"), ("RL from vlm", "rl"), ("RL from obm", "rl"),
    ]  # fmt: skip
    assert table["benchmarks"]["image"]["questions"] == "atlas, split dev, kinds image"
    report = study.output / "report"
    page = (report / "paper-table.md").read_text()
    cells = "0.12 [0.02, 0.23] | - | -"  # no search rate without tools
    assert f"| vlm, direct answer | {cells} | {cells} | 0.12 | - | - | 10.0 |" in page
    cells = "0.75 [0.65, 0.85] | 0.25 | 0.50"
    assert f"| vlm, RAG workflow | {cells} | {cells} | 0.75 | 0.50 | 1.50 | 10.0 |" in page
    assert "**RL from each start**" in page
    assert json.loads((report / "paper-table.json").read_text()) == table
    n_made = len(scripted_stages)
    assert run_table(study, Options("obm study x"))["rows"] == table["rows"]
    assert len(scripted_stages) == n_made


def test_a_table_of_trainings_with_frozen_heads_makes_their_map(
    table_file, scripted_stages, trained_policy, monkeypatch
):
    made = []
    monkeypatch.setattr(
        preparations_module, "_make_map",
        lambda config, start, target: (target.mkdir(parents=True), made.append(target.name)),
    )  # fmt: skip
    content = yaml.safe_load(table_file.read_text())
    content["overrides"] = {"freeze_heads": "cast(top=25%)"}
    table_file.write_text(yaml.safe_dump(content))
    assert run_table(load_study(table_file), Options("c"))["rows"]
    assert made == ["vlm", "obm", "ties"]


def test_the_policy_of_an_adapter_is_written_once_as_a_whole(tmp_path, monkeypatch):
    from launch.studies.trainings import trained_policy, whole_policy

    made = []

    def merge_adapter(run, output):
        output.mkdir()
        (output / "merge.json").touch()
        made.append(run)

    monkeypatch.setattr("merge.adapter.merge_adapter", merge_adapter)
    policy = tmp_path / "checkpoints" / "checkpoint-3"
    policy.mkdir(parents=True)
    (tmp_path / "done.json").write_text('{"policy": "checkpoints/checkpoint-3"}')
    assert trained_policy(tmp_path) == whole_policy(tmp_path) == policy
    (policy / "adapter_config.json").touch()
    assert trained_policy(tmp_path) == tmp_path / "whole"
    assert not (tmp_path / "whole").exists()
    assert whole_policy(tmp_path) == whole_policy(tmp_path) == tmp_path / "whole"
    assert made == [tmp_path]


def test_several_seeds_share_a_row_with_their_mean_and_an_interval():
    from compare.curves import interval

    def result(seed, accuracy):
        metrics = {**dict.fromkeys(CELLS, 0.5), "accuracy": accuracy, "official/em": accuracy}
        return {
            "row": "obm/rl", "arm": "obm", "mode": "agent", "seed": seed, "benchmark": "x",
            "metrics": metrics, "intervals": {},
        }  # fmt: skip

    row = _new_row(result(0, 0.4))
    row["benchmarks"] = {"x": [result(0, 0.4), result(1, 0.5), result(2, 0.6)]}
    cell = _finish_row(row)["benchmarks"]["x"]
    assert cell["seeds"] == [0, 1, 2]
    assert cell["accuracy"]["value"] == pytest.approx(0.5)
    estimate = interval([0.4, 0.5, 0.6])
    assert cell["accuracy"]["interval"] == [estimate.low, estimate.high]
    assert cell["official/em"]["by_seed"] == [0.4, 0.5, 0.6]
    one = {**row, "benchmarks": {"x": [result(0, 0.4)]}}
    for members, words in (
        ([one], "how another choice of questions would come out, not how another training would."),
        ([one, row], "Those over seeds say how another training would come out"),
    ):
        table = {"benchmarks": {"x": {}}, "rows": [_finish_row(member) for member in members]}
        assert words in _readings(table)[-1]


def test_an_unknown_mode_of_an_arm_is_refused(table_file):
    content = yaml.safe_load(table_file.read_text())
    content["arms"][0]["modes"] = ["guess"]
    table_file.write_text(yaml.safe_dump(content))
    with pytest.raises(LaunchError, match="arm vlm: no mode 'guess'"):
        run_table(load_study(table_file), Options("x"))


@pytest.mark.parametrize(
    ("benchmarks", "words"),
    [
        ({"a": 3}, r"study\.yaml:benchmarks\.a: expected settings, got int 3"),
        ({"a": None}, r"study\.yaml:benchmarks\.a: expected settings, got nothing"),
        ({3: {}}, r"study\.yaml:benchmarks\.3: expected text as the key"),
        ({"../a": {}}, "study.yaml:benchmarks.../a: expected a name"),
        ({"a": {"nosuch": 1}}, r"study\.yaml:benchmarks\.a\.nosuch: unknown key"),
        (3, "study.yaml:benchmarks: expected benchmarks"),
        ({}, "study.yaml:benchmarks: expected benchmarks"),
    ],
)
def test_a_wrong_benchmark_is_refused_in_a_dry_run(table_file, benchmarks, words):
    content = yaml.safe_load(table_file.read_text())
    table_file.write_text(yaml.safe_dump({**content, "benchmarks": benchmarks}))
    with pytest.raises((ConfigError, LaunchError), match=words):
        describe_study(load_study(table_file), Options("c"))


def test_nested_settings_become_overrides():
    assert flatten({"a": {"b": 1, "c": {"d": [1, "x"]}}, "e": None}) == [
        "a.b=1", 'a.c.d=[1, "x"]', "e=null"
    ]  # fmt: skip
