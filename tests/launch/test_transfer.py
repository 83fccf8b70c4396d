"""Transfer over another study's trainings: which are asked, which are refused."""

import json
from pathlib import Path

import pytest
import yaml

from compare.zero_shot import Evaluator
from launch.errors import LaunchError
from launch.studies import measure as measure_module
from launch.studies.file import Options, load_study
from launch.studies.run import describe_study
from launch.studies.transfer import run_transfer

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@pytest.fixture
def study(tmp_path):
    """A study of a merge and the plain VLM, with two finished trainings each."""
    for arm in ("obm", "vlm"):
        for seed in (0, 1):
            write_run(tmp_path / "done" / "runs" / f"{arm}-s{seed}", arm, seed)
    write_merge(tmp_path / "done" / "merged" / "obm", "x")
    (tmp_path / "done" / "merged" / "obm" / "config.json").write_text("{}")
    content = {
        "title": "Transfer", "kind": "transfer", "config": str(DEMO),
        "output": str(tmp_path / "out"), "seeds": [0, 1], "references": ["vlm"],
        "trained": str(tmp_path / "done" / "runs" / "{arm}-s{seed}"),
        "starts": str(tmp_path / "done" / "merged" / "{arm}"),
        "benchmarks": {"flags": {}, "maps": {"environment": {"eval_domain": "maps"}}},
        "arms": [
            {"name": "obm", "merge": {"method": "obm"}}, {"name": "vlm", "init": "atlas://vlm"}
        ],
    }  # fmt: skip
    (tmp_path / "transfer.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_study(tmp_path / "transfer.yaml")


def write_merge(folder, checksum):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.norm.weight": {"checksum": checksum}}
    (folder / "merge.json").write_text(json.dumps({"tensors": tensors}))


def write_run(run, arm, seed):
    policy = run / "checkpoints" / "checkpoint-60"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text(json.dumps({"arm": arm, "seed": seed}))
    (run / "done.json").write_text(json.dumps({"policy": "checkpoints/checkpoint-60", "step": 60}))
    config = {"seed": seed, "tracking": {"arm": arm}, "grpo": {},
              "models": {"init": "atlas://vlm" if arm == "vlm" else "merged"},
              "environment": {"kinds": ["two"]}}  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"commit": "abc"}))
    if arm != "vlm":
        write_merge(run, "x")


@pytest.fixture
def measured(monkeypatch):
    """Evaluations by stand-ins: trained policies are right where starts are not."""
    tasks = []

    def measure(self, task):
        tasks.append(task)
        parts = ("searched", "search_rate_image", "entity", "passage", "accuracy")
        value = 0.75 if "checkpoint-60" in task.checkpoint else 0.25
        return {"metrics": dict.fromkeys(parts, value), "answers": [], "has_labels": True}

    monkeypatch.setattr(Evaluator, "measure", measure)
    monkeypatch.setattr(measure_module, "check_merges", lambda tasks, scratch: list(tasks))
    return tasks


def test_every_start_and_policy_is_asked_in_every_world_with_its_seeds_questions(
    study, measured, tmp_path
):
    record = run_transfer(study, Options("obm study transfer", parallel=1))
    assert len(measured) == 2 * 2 * 2 * 2
    for task in measured:
        seed = int(task.name[-1])
        section = task.config.environment
        assert section.data_seed == seed
        assert (section.eval_domain == "maps") == ("maps" in task.name)
        if " after" in task.name:
            assert task.checkpoint.endswith(f"-s{seed}/checkpoints/checkpoint-60")
        elif task.name.startswith("obm"):
            assert task.checkpoint == str(tmp_path / "done" / "merged" / "obm")
    assert record["arms"]["obm"]["maps"]["gain"]["accuracy"]["mean"] == pytest.approx(0.5)
    assert record["worlds"]["maps"]["settings"] == "eval_domain maps"
    assert "60 steps of GRPO on questions of kind two, commit abc" in record["training"]
    page = (tmp_path / "out" / "report" / "compare.html").read_text()
    assert "Transfer to other worlds" in page
    assert len(run_transfer(study, Options("c", parallel=1))["arms"]) == 2
    assert len(measured) == 16


def test_a_training_that_is_not_there_is_named_with_what_to_run(study, tmp_path):
    (tmp_path / "done" / "runs" / "obm-s1" / "done.json").unlink()
    with pytest.raises(LaunchError, match=r"obm-s1 holds no finished training.*obm study ceiling"):
        run_transfer(study, Options("c"))
    with pytest.raises(LaunchError, match="obm-s1"):
        describe_study(study, Options("c"))


def test_a_training_of_another_seed_or_start_is_refused(study, tmp_path):
    run = tmp_path / "done" / "runs" / "obm-s1"
    write_merge(run, "y")
    with pytest.raises(LaunchError, match=r"obm-s1 was not trained from .*model\.norm\.weight"):
        run_transfer(study, Options("c"))
    write_merge(run, "x")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 7}))
    with pytest.raises(LaunchError, match="of arm obm with seed 7, not of obm with seed 1"):
        run_transfer(study, Options("c"))


def test_a_training_from_another_checkpoint_is_refused(study, tmp_path):
    path = tmp_path / "done" / "runs" / "vlm-s1" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for init in ("atlas://base", str(tmp_path / "nowhere")):
        path.write_text(yaml.safe_dump({**config, "models": {"init": init}}))
        with pytest.raises(LaunchError, match=rf"vlm-s1 was trained from {init}, not from atlas"):
            run_transfer(study, Options("c"))


def test_the_questions_that_were_trained_on_are_named(study, measured, tmp_path):
    path = tmp_path / "done" / "runs" / "obm-s0" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["environment"]["train_benchmark"] = {"name": "fvqa_train", "source": None}
    path.write_text(yaml.safe_dump(config))
    record = run_transfer(study, Options("c", parallel=1))
    assert record["training"].startswith("60 steps of GRPO on questions of fvqa_train, commit abc")


def test_references_must_be_arms(study, tmp_path):
    path = tmp_path / "transfer.yaml"
    content = yaml.safe_load(path.read_text())
    for references, words in (([], "none is named"), (["ties"], "no arm 'ties'")):
        path.write_text(yaml.safe_dump({**content, "references": references}))
        with pytest.raises(LaunchError, match=words):
            load_study(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({key: value}, rf"transfer\.yaml:{key}: (expected|cannot read) .*; ")
          for key in ("trained", "starts")
          for value in (3, [1], "", "{nosuch}", "{", "{}", "{0}", "{arm.x}", "{arm:zz}")),
        ({"starts": "{seed}"}, r"starts: cannot read '\{seed\}'; only \{arm\} may stand"),
        ({"references": "vlm"}, "references: expected a list of names, got str 'vlm'"),
        ({"references": [["vlm"]]}, r"references\[0\]: expected text"),
        ({"references": ["vlm", "vlm"]}, "references: 'vlm' is listed twice"),
        ({"trained": None, "arms": [{"name": "vlm", "init": "x", "train": False}]},
         "vlm: every arm is asked after its training; drop train: false"),
    ],
)  # fmt: skip
def test_a_wrong_transfer_file_is_refused(study, tmp_path, change, words):
    path = tmp_path / "transfer.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(LaunchError, match=words):
        load_study(path)


def test_the_shipped_transfer_study_has_the_arms_of_the_ceiling():
    transfer, ceiling = load_study("transfer"), load_study("ceiling")
    assert [(a.name, a.init, a.merge) for a in transfer.arms] == [
        (a.name, a.init, a.merge) for a in ceiling.arms
    ]
    assert transfer.seeds == ceiling.seeds
    assert transfer.trained == f"{ceiling.output}/runs/{{arm}}-s{{seed}}"
    assert next(iter(transfer.benchmarks.values())) == {}
