"""A whole training from a settings file: what lies in the run folder, and going on after a stop."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trl import GRPOConfig

from configs.errors import ConfigError
from configs.schema import load_config
from merge.engine import merge
from tests.house.metric_names import undescribed
from train.followed import follow
from train.given import check_start
from train.run import _share_cores, run_training, train
from train.settings import GRPO_DEFAULTS, KNOWN_NAMES, describe_step, resolved_grpo

# an untrained policy earns nothing; the entropy bonus makes every step move it all the same
SETTINGS = """
output: {output}
seed: 1
models: {{init: {init}}}
environment: {{train_size: 16, eval_size: 6, kinds: [two, text], eval_kinds: [two, text]}}
grpo:
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 60
  generation_kwargs: {{max_new_tokens: 12}}
  max_steps: 4
  save_steps: 2
  save_total_limit: null
  entropy_coef: 0.05
  learning_rate: 1.0e-3
compare: {{eval_every: 2}}
tracking: {{wandb: disabled}}
"""


@pytest.fixture
def write_config(tiny_checkpoints, tmp_path):
    def write(**values):
        path = tmp_path / "settings.yaml"
        output = values.pop("output", tmp_path / "run")
        path.write_text(SETTINGS.format(output=output, init=tiny_checkpoints["vlm"]))
        return path

    return write


def run_with(path: Path, *overrides: str, **flags: bool) -> Path:
    return run_training(load_config(path, overrides), **flags)


def lines_of(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time_s", "device_s", "eval/time_s", "step_time")
    return [
        {k: v for k, v in row.items() if k not in clocks and not k.startswith(("time/", "speed/"))}
        for row in rows
    ]


def stop_after(folder: Path, step: int, copy: Path) -> Path:
    """A run as it looks when it was killed some time after the checkpoint of `step`."""
    shutil.copytree(folder, copy)
    (copy / "done.json").unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.split("-")[-1]) > step:
            shutil.rmtree(path)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "pha')  # a line that the kill cut short
    return copy


def test_the_run_folder_stands_alone(write_config):
    folder = run_with(write_config())
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "trajectories.jsonl"}
    assert names >= {"checkpoints", "done.json"}
    lines = lines_of(folder)
    assert [(line["step"], line["phase"]) for line in lines] == [
        (0, "eval"),
        (1, "train"),
        (2, "train"),
        (2, "eval"),
        (3, "train"),
        (4, "train"),
        (4, "eval"),
    ]
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not undescribed(name for line in every for name in line)
    assert lines[0]["tokens"] == 0
    assert lines[0]["eval/n"] == 6
    assert "eval/unseen/accuracy" in lines[0] or "eval/seen/accuracy" in lines[0]
    assert lines[1]["sampling/logp_difference_max"] < 1e-4
    assert lines[1]["tokens"] < lines[2]["tokens"]
    done = json.loads((folder / "done.json").read_text())
    assert done["step"] == 4
    assert load_config(folder / "config.yaml").seed == 1
    machine = json.loads((folder / "environment.json").read_text())
    assert {"commit", "hardware", "versions", "world_size"} <= machine.keys()
    trajectory = json.loads((folder / "trajectories.jsonl").read_text().splitlines()[0])
    assert trajectory["schema_version"] == 2
    assert trajectory["phase"] == "eval"
    rows = [json.loads(line) for line in (folder / "trajectories.jsonl").open()]
    in_training = [row for row in rows if row["phase"] == "train"]
    for row in rows:
        pictures = [*row["images"], *(key for turn in row["turns"] for key in turn["images"])]
        assert all((folder / "pictures" / f"{key}.webp").is_file() for key in pictures)
        assert row["gold"]["answers"]
        assert all(len(turn["tokens"]) == len(turn["logprobs"]) for turn in row["turns"])
        assert ("advantages" in row) == (row["phase"] == "train")
    # of a step's group the advantages are those that TRL trained on: they rise with the reward
    assert all(len(row["advantages"]) == len(row["turns"]) for row in in_training)
    from train.policy import load_policy

    model, processor = load_policy(folder / done["policy"])
    assert processor.tokenizer.chat_template
    assert model.config.model_type == "qwen2_5_vl"


ROLLOUT_STAGES = ("prepare", "prefill", "sample", "tools", "decode")  # `observe` needs a result
STAGES = (*ROLLOUT_STAGES, "generate", "rollout", "vision", "reward", "sync", "loss", "optimizer")


def test_every_stage_of_a_step_is_timed(write_config):
    folder = run_with(write_config(), "grpo.max_steps=2")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in [row for row in rows if row["phase"] == "train"]:
        time_s = {stage: line[f"time/{stage}_s"] for stage in STAGES}
        assert all(seconds >= 0 for seconds in time_s.values())
        assert all(time_s[stage] > 0 for stage in ("rollout", "vision", "loss", "optimizer"))
        inside = sum(time_s[stage] for stage in ROLLOUT_STAGES)
        assert inside <= time_s["rollout"] <= time_s["generate"]
        whole = time_s["generate"] + time_s["loss"] + time_s["optimizer"]
        assert time_s["vision"] < whole
        assert 0 < line["speed/tokens_per_s"] < line["speed/rollout_tokens_per_s"]


def test_what_is_wrong_with_a_run_lies_in_its_folder(write_config):
    """An untrained policy never answers: after three steps the run says so."""
    folder = run_with(write_config())
    found = [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]
    assert {row["code"] for row in found} >= {"no_signal", "no_search"}
    assert all(row["step"] >= 3 and row["message"] and row["fix"] for row in found)


def test_the_same_questions_are_followed_at_every_evaluation(write_config):
    folder = run_with(write_config(), "grpo.max_steps=2", "tracking.follow=2")
    rows = [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
    followed = [row for row in rows if row.get("followed")]
    assert [row["step"] for row in followed] == [0, 0, 2, 2]
    assert all(row["phase"] == "eval" and "total" in row["rewards"] for row in followed)
    assert followed[0]["question_id"] == followed[2]["question_id"]
    assert followed[0]["question_id"] != followed[1]["question_id"]
    visits = follow(rows)[followed[0]["question_id"]]
    assert [visit.step for visit in visits] == [0, 2]


def test_two_runs_of_one_seed_are_equal(write_config, tmp_path):
    path = write_config()
    one = run_with(path, f"output={tmp_path}/a", "grpo.max_steps=2")
    two = run_with(path, f"output={tmp_path}/b", "grpo.max_steps=2")
    assert lines_of(one) == lines_of(two)


@pytest.mark.parametrize(
    ("step", "overrides"),
    [
        (2, ()),
        # step 1 lies inside a rollout's buffer: two steps, twice over
        (1, ("grpo.num_iterations=2", "grpo.steps_per_generation=2", "grpo.save_steps=1")),
        # two steps an epoch: one of the second is done
        (3, ("environment.train_size=4", "grpo.save_steps=1")),
    ],
    ids=["between rollouts", "inside a buffer", "in the second epoch"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(write_config, tmp_path, step, overrides):
    path = write_config()
    whole = run_with(path, *overrides)
    part = stop_after(whole, step, tmp_path / "part")
    run_with(path, *overrides, f"output={part}", resume=True)
    assert lines_of(part) == lines_of(whole)
    last = "checkpoints/checkpoint-4/model.safetensors"
    one, two = load_file(whole / last), load_file(part / last)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_episodes_that_several_steps_train_on_are_recorded_once(write_config):
    steps = ("grpo.num_iterations=2", "grpo.steps_per_generation=2", "grpo.max_steps=3")
    folder = run_with(write_config(), *steps, "tracking.log_trajectories=2")
    rows = [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "train"] == [1, 1]


def test_a_run_that_goes_on_saves_as_often_as_it_is_told_now(write_config, tmp_path):
    path = write_config()
    part = stop_after(run_with(path), 2, tmp_path / "part")
    run_with(path, f"output={part}", "grpo.save_steps=1", resume=True)
    assert (part / "checkpoints" / "checkpoint-3").is_dir()


def test_a_run_that_was_killed_behind_its_last_checkpoint_only_ends(write_config, tmp_path):
    path = write_config()
    whole = run_with(path)
    part = stop_after(whole, 4, tmp_path / "part")
    run_with(path, f"output={part}", resume=True)
    assert lines_of(part) == lines_of(whole)
    assert json.loads((part / "done.json").read_text())["step"] == 4
    weights = "checkpoints/checkpoint-4/model.safetensors"
    assert [found.name for found in (part / "checkpoints").glob("*-5")] == []
    assert (part / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_run_that_is_shortened_to_its_checkpoint_is_evaluated_there(write_config, tmp_path):
    path = write_config()
    part = stop_after(run_with(path, "compare.eval_every=4"), 2, tmp_path / "part")
    run_with(path, "compare.eval_every=4", "grpo.max_steps=2", f"output={part}", resume=True)
    lines = [(line["step"], line["phase"]) for line in lines_of(part)]
    assert lines == [(0, "eval"), (1, "train"), (2, "train"), (2, "eval")]


def test_going_on_with_a_run_that_is_done_touches_nothing(write_config, tmp_path, caplog):
    path = write_config()
    folder = run_with(path, "grpo.max_steps=2")
    before = {found: found.stat().st_mtime_ns for found in folder.rglob("*") if found.is_file()}
    with caplog.at_level("INFO"):
        run_with(path, "grpo.max_steps=2", resume=True)
    assert "is done, there is nothing to go on with" in caplog.text
    after = {found: found.stat().st_mtime_ns for found in folder.rglob("*") if found.is_file()}
    assert {k for k in after if not k.name.startswith(".")} == set(before)
    assert all(after[found] == before[found] for found in before)
    with pytest.raises(ConfigError, match=r"grpo\.learning_rate"):
        run_with(path, "grpo.max_steps=2", "grpo.learning_rate=0.01", resume=True)
    run_with(path, "grpo.max_steps=3", resume=True)  # more of it
    assert json.loads((folder / "done.json").read_text())["step"] == 3


def test_an_existing_run_is_refused_and_the_three_ways_on_are_named(write_config, tmp_path):
    path = write_config()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("output: x\n")
    with pytest.raises(ConfigError, match=r"--resume.*output=.*--overwrite"):
        run_with(path)


def test_a_folder_that_is_no_run_is_never_deleted(write_config, tmp_path):
    path = write_config()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not a run folder"):
        run_with(path, overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_run_is_not_resumed_with_other_settings(write_config, tmp_path):
    path = write_config()
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run" / "config.yaml")
    with pytest.raises(ConfigError, match=r"grpo.learning_rate \(0.001 before, 0.01 now\)"):
        run_with(path, "grpo.learning_rate=0.01", resume=True)


# ---------------------------------------------------------------- settings and command line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.learning_rat=1", "did you mean 'learning_rate'"),
        ("grpo.seed=3", "top-level `seed`"),
        ("grpo.eval_steps=3", "compare.eval_every"),
        ("grpo.loss_type=cispo", "epsilon_high"),
        ("grpo.num_generations=3", "groups of 3"),
        ("deepspeed=zero9", "zero2, zero3"),
        ("models.init=/nowhere/at/all", "/nowhere/at/all"),
        ("models.init=/nowhere/\u202eat\u200ball", r"/nowhere/\u202eat\u200ball"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(write_config, capsys, tmp_path, override, message):
    path = write_config()
    assert train(["--config", str(path), override]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_settings_and_arithmetic_and_writes_nothing(
    write_config, capsys, tmp_path
):
    path = write_config()
    assert train(["--config", str(path), "--dry-run", "--local_rank=0", "seed=5"]) == 0
    shown = capsys.readouterr().out
    assert "seed: 5" in shown
    assert "2 x 4 completions" in shown
    assert not (tmp_path / "run").exists()


def test_the_file_overrides_the_defaults(write_config):
    settings = resolved_grpo(load_config(write_config()))
    assert settings["num_generations"] == 4
    assert settings["loss_type"] == GRPO_DEFAULTS["loss_type"]


def test_the_names_that_are_known_without_trl_are_trls():
    assert {item.name for item in fields(GRPOConfig) if item.init} >= KNOWN_NAMES


def test_completions_are_counted_over_processes(write_config):
    rows = dict(describe_step(load_config(write_config()), n_processes=2))
    assert rows["completions per step"].startswith("16 ")


def test_a_damaged_warm_start_is_refused_before_anything_is_written(
    write_config, tiny_checkpoints, tmp_path, capsys
):
    start = tmp_path / "start"
    shutil.copytree(tiny_checkpoints["vlm"], start)
    merged = tmp_path / "merged"
    merge(
        tiny_checkpoints["base"], start, tiny_checkpoints["agent"], merged,
        method="task_arithmetic",
    )  # fmt: skip
    check_start(str(merged))
    check_start(str(start))  # no merge, nothing to check
    [file] = merged.glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("model.language_model.norm.weight", None) or tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    path = write_config()
    assert train(["--config", str(path), f"models.init={merged}"]) == 2
    assert "norm.weight is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_benchmark_takes_the_place_of_the_atlas_questions(write_config):
    copies = Path(__file__).parents[1] / "compare" / "benchmarks"
    folder = run_with(
        write_config(),
        "environment.train_benchmark.name=fvqa_train",
        f"environment.train_benchmark.source={copies / 'fvqa_train.parquet'}",
        "environment.eval_benchmark.name=mmsearch",
        f"environment.eval_benchmark.source={copies / 'mmsearch.parquet'}",
        "grpo.max_steps=1",
    )
    episodes = [json.loads(line) for line in (folder / "trajectories.jsonl").open()]
    trained = {e["question_id"] for e in episodes if e["phase"] == "train"}
    assert trained <= {"fvqa_train_0", "fvqa_train_1", "fvqa_train_2"}
    assert len(trained) == 2  # 8 completions, 4 a question
    evaluated = {e["question_id"] for e in episodes if e["phase"] == "eval"}
    assert evaluated == {"knowledge_geo_0", "news_1"}
    last = lines_of(folder)[-1]
    assert {"eval/kind/news/accuracy", "eval/kind/knowledge/accuracy"} <= last.keys()
    # nothing says whether the VLM has seen these
    assert not any(name.startswith(("eval/seen", "eval/unseen")) for name in last)


@pytest.mark.parametrize(
    ("variables", "n_threads"),
    [({}, 2), ({"LOCAL_WORLD_SIZE": "2"}, 4), ({"LOCAL_SIZE": "2"}, 4)],
    ids=["one machine", "torchrun", "deepspeed"],
)
def test_the_processes_of_a_machine_share_its_cores(monkeypatch, variables, n_threads):
    """Of four processes two are on this one, of eight cores."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")  # what the function sets is taken back at the end
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    asked = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    _share_cores(4)
    assert asked == [n_threads]
