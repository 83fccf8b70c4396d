"""The verbs on real, tiny, untrained checkpoints: calibrate, merge, evaluate, train, compare."""

import json

import pytest
import yaml

SETTINGS = {
    "calibration": {"samples": 4, "batch_size": 3, "vlm_kinds": ["look", "image"]},
    "environment": {"eval_size": 4, "train_size": 4, "text_searches": 1, "max_turns": 2},
    "grpo": {
        "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4, "save_steps": 1,
        "max_completion_length": 64, "generation_kwargs": {"max_new_tokens": 8},
    },
    "tracking": {"wandb": "disabled"},
    "compare": {"eval_every": 1, "smoothing": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A folder with a settings file that names an untrained trio."""
    from train.tiny import make_tiny_checkpoints

    folder = tmp_path_factory.mktemp("story")
    trio = make_tiny_checkpoints(folder / "trio", seed=0)
    models = {**trio, "init": trio["vlm"]}
    settings = {"output": str(folder / "run"), "models": models, **SETTINGS}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_both_parents_are_calibrated_once(story, obm):
    from merge.stats import open_stats

    config = story / "tiny.yaml"
    code, out, _ = obm("calibrate", "--config", config, f"calibration.output={story / 'stats'}")
    assert code == 0
    for role in ("vlm", "agent"):
        assert f"{role}: " in out
        stats = open_stats(story / "stats" / role, "diagonal")
        assert "model.layers.0.self_attn.q_proj.weight" in stats.names
        assert set(stats.weights) == set(stats.names)
    code, _, err = obm("calibrate", "--config", config, f"calibration.output={story / 'stats'}")
    assert code == 2
    assert "--overwrite" in err


@pytest.mark.parametrize("role", ["vlm", "agent"])
def test_statistics_do_not_depend_on_the_batch_size(story, role):
    import numpy as np

    from configs.schema import load_config
    from launch.commands.calibrate import calibrate_parent
    from merge.stats import open_stats

    stats = []
    for size in (1, 4):
        where = f"calibration.output={story / f'batch-{size}'}"
        config = load_config(story / "tiny.yaml", [where, f"calibration.batch_size={size}"])
        stats.append(open_stats(calibrate_parent(config, role), "diagonal"))
    assert stats[0].metadata["tokens"] == stats[1].metadata["tokens"]
    for name in stats[0].names:
        # Padding shifts sums within a batch: fp32 rounding, no more.
        np.testing.assert_allclose(
            stats[0].vector(name), stats[1].vector(name), rtol=1e-3, atol=1e-6
        )


def test_a_merge_is_planned_then_written_and_evaluated(story, obm):
    config = ("--config", story / "tiny.yaml")
    output = story / "ties"
    method = ("merge.method=ties", "merge.density=0.3")
    code, out, _ = obm("merge", *config, *method, "--output", output, "--dry-run")
    assert code == 0
    assert "merge" in out
    assert not output.exists()
    assert obm("merge", *config, *method, "--output", output)[0] == 0
    record = json.loads((output / "merge.json").read_text())
    assert record["settings"]["density"] == 0.3

    code, out, _ = obm("eval", output, *config, "--arm", "ties", "--output", story / "eval")
    assert code == 0
    assert "searched" in out
    evaluation = json.loads((story / "eval" / "eval.json").read_text())
    assert evaluation["arm"] == "ties"
    assert evaluation["metrics"]["n"] == 4
    lines = (story / "eval" / "trajectories.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["phase"] == "eval"
    assert obm("eval", output, *config, "--arm", "ties", "--output", story / "eval")[0] == 2


def test_obm_without_statistics_is_refused(story, obm):
    code, _, err = obm("merge", "--config", story / "tiny.yaml", "--output", story / "no-stats")
    assert code == 2
    assert "stats.safetensors" in err
    assert not (story / "no-stats").exists()


def test_a_checkpoint_with_a_missing_shard_is_refused(story, obm):
    import shutil

    broken = story / "broken"
    shutil.copytree(story / "trio" / "agent", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = obm(
        "merge", "--config", story / "tiny.yaml", "merge.method=ties",
        f"models.agent={broken}", "--output", story / "from-broken",
    )  # fmt: skip
    assert code == 2
    assert "model.safetensors" in err
    assert not (story / "from-broken").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_goes_from_checkpoints_to_a_report_and_is_reused(story, obm):
    study = {
        "title": "Tiny", "config": "tiny.yaml", "output": str(story / "study"), "seeds": [0],
        "zero_shot": True,
        "arms": [
            {"name": "obm", "merge": {"method": "obm"}},
            {"name": "ties", "merge": {"method": "ties"}, "train": False},
            {"name": "vlm", "init": str(story / "trio" / "vlm")},
        ],
    }  # fmt: skip
    (story / "tiny_study.yaml").write_text(yaml.safe_dump(study))
    code, out, _ = obm("study", story / "tiny_study.yaml", "--parallel", "1")
    assert code == 0
    for words in ("calibrate  vlm", "merge      ties", "evaluate   obm", "train      vlm-s0"):
        assert words in out
    report = story / "study" / "report"
    arms = json.loads((report / "compare.json").read_text())["arms"]
    assert set(arms) == {"obm", "ties", "vlm"}
    assert arms["obm"]["last_step"] == 1
    assert arms["ties"]["ceiling"] is None
    assert (report / "compare.png").stat().st_size > 10_000
    trained = (story / "study" / "runs" / "obm-s0" / "metrics.jsonl").stat().st_mtime_ns

    code, out, _ = obm("study", story / "tiny_study.yaml", "--parallel", "1")
    assert code == 0
    assert out.count("(there already)") == 2 + 2 + 3 + 2
    again = (story / "study" / "runs" / "obm-s0" / "metrics.jsonl").stat().st_mtime_ns
    assert again == trained


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_policies_of_that_study_are_asked_in_another_world(story, obm):
    study = {
        "title": "Elsewhere", "kind": "transfer", "config": "tiny.yaml",
        "output": str(story / "transfer"), "seeds": [0], "references": ["vlm"],
        "trained": str(story / "study" / "runs" / "{arm}-s{seed}"),
        "starts": str(story / "study" / "merged" / "{arm}"),
        "benchmarks": {"flags": {}, "changed facts": {"environment": {"counterfactual": 0}}},
        "arms": [
            {"name": "obm", "merge": {"method": "obm"}},
            {"name": "vlm", "init": str(story / "trio" / "vlm")},
        ],
    }  # fmt: skip
    (story / "transfer.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    code, out, err = obm("study", story / "transfer.yaml", "--parallel", "1")
    assert code == 0, err
    assert "evaluate   vlm after, changed facts, s0" in out
    record = json.loads((story / "transfer" / "report" / "compare.json").read_text())
    assert set(record["arms"]["obm"]["changed facts"]) == {"before", "after", "gain"}
    assert record["training"].startswith("1 steps of GRPO")
    code, out, _ = obm("study", story / "transfer.yaml", "--parallel", "1")
    assert "evaluate   8 times, 8 of them there already" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_ablation_goes_from_checkpoints_to_a_page(story, obm):
    noise = {"source": "noise.json", "prompt": "{text}", "answer": ""}
    (story / "noise.json").write_text(json.dumps([{"text": "pel ora"}, {"text": "un eni dla"}]))
    study = {
        "title": "Settings", "kind": "ablation", "config": "tiny.yaml", "seeds": [0],
        "output": str(story / "ablation"), "reference": {"method": "obm", "density": 0.5},
        "axes": {
            "density": {"setting": "merge.density", "values": [0.1, 0.5]},
            "saliency": {"points": {"diagonal": {}, "magnitude": {"statistics": "ones"}}},
            "data": {
                "points": {
                    "own": {}, "noise": {"calibration": {"vlm_data": noise, "agent_data": noise}}
                }
            },
        },
    }  # fmt: skip
    (story / "ablation.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    code, out, err = obm("study", story / "ablation.yaml", "--parallel", "1")
    assert code == 0, err
    assert out.count("evaluate   ") == 1 + 4
    report = story / "ablation" / "report"
    record = json.loads((report / "compare.json").read_text())
    assert list(record["arms"]) == [
        "reference", "density 0.1", "saliency magnitude", "data noise"
    ]  # fmt: skip
    assert (report / "compare.png").stat().st_size > 10_000
    assert "One setting at a time" in (report / "compare.html").read_text()
