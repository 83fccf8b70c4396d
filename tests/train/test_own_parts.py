"""Dataset, reward function and dialect of one's own, through a training and an evaluation."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from compare.comparable import check_comparable
from compare.errors import CompareError
from compare.parts import contributions
from compare.runs import read_run
from configs.errors import ConfigError
from configs.schema import load_config
from environments.benchmarks.rows import BenchmarkError
from environments.errors import EnvironmentSetupError
from launch.cli import main
from rewards.errors import RewardError
from train.run import run_training

FLAGS = Path(__file__).parents[2] / "environments" / "atlas" / "data" / "flags"
REWARDS = """
def brevity(trajectories, answers, note=None, **columns):
    assert note == ["mine"] * len(trajectories) and "image" not in columns
    return [0.5 + len(gold) for gold in answers]
"""
DIALECT = """
like: search_r1
calls: {search: lookup}
agent_text: "Look up with <lookup> words </lookup>.\\nQuestion: {question}"
"""


@pytest.fixture
def folder(tiny_checkpoints, tmp_path, monkeypatch, caplog):
    """A user's folder: ten rows with pictures, a reward, a dialect, settings that name them."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", logger="train")
    Path("pictures").mkdir()
    lines = []
    for code in ("ad", "ae", "af", "ag", "ai", "al", "am", "ao", "ar", "as"):
        shutil.copy(FLAGS / f"{code}.png", "pictures")
        row = {"question": "Which place is this?", "answers": [code], "note": "mine"}
        lines.append(json.dumps({**row, "image": f"pictures/{code}.png"}) + "\n")
    Path("mine.jsonl").write_text("".join(lines))
    Path("my_rewards.py").write_text(REWARDS)
    Path("my_dialect.yaml").write_text(DIALECT)
    table = {"name": "table", "source": "mine.jsonl"}
    settings = {
        "output": "runs/mine",
        "models": {"init": tiny_checkpoints["vlm"]},
        "environment": {
            "dialect": "my_dialect.yaml",
            "train_benchmark": {**table, "split": "[:80%]"},
            "eval_benchmark": {**table, "split": "[80%:]"},
        },
        "reward_functions": [{"function": "my_rewards.py:brevity", "weight": 0.2}],
        "grpo": {
            "max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 4,
            "save_steps": 1, "max_completion_length": 40,
            "generation_kwargs": {"max_new_tokens": 8},
        },
        "tracking": {"wandb": "disabled"},
        "compare": {"eval_every": 1},
    }  # fmt: skip
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def lines_of(name):
    return [json.loads(line) for line in (Path("runs/mine") / name).read_text().splitlines()]


def test_a_training_asks_ones_own_rows_and_adds_and_logs_ones_own_reward(folder, caplog):
    run_training(load_config("mine.yaml"))
    train = [line for line in lines_of("metrics.jsonl") if line["phase"] == "train"]
    evaluated = [line for line in lines_of("metrics.jsonl") if line["phase"] == "eval"]
    assert [line["step"] for line in train] == [1, 2]
    assert {line["eval/n"] for line in evaluated} == {2.0}  # 20 % of ten rows
    for line in train:
        # one gold answer a row: 0.5 + 1; a random policy earns nothing else
        assert line["rewards/brevity/mean"] == pytest.approx(1.5)
        assert line["rewards/total/mean"] == pytest.approx(0.2 * 1.5)
        assert line["rewards/accuracy/mean"] == line["rewards/format/mean"] == 0.0
        parts = contributions(line, yaml.safe_load(Path("runs/mine/config.yaml").read_text()))
        assert parts["brevity"] == pytest.approx(0.3)
        assert parts["accuracy"] == pytest.approx(0.0, abs=1e-6)  # TRL's mean is fp32
    assert all(line["eval/rewards/brevity/mean"] == pytest.approx(1.5) for line in evaluated)
    [first, *_] = lines_of("trajectories.jsonl")
    assert first["rewards"]["brevity"] == 1.5
    assert "trained on" not in caplog.text
    # a run folder stands alone
    for name in ("my_rewards.py", "my_dialect.yaml"):
        assert (Path("runs/mine/own") / name).read_text() == Path(name).read_text()


def test_a_reward_that_was_rewritten_is_another_run(folder):
    config = load_config("mine.yaml")
    run_training(config)
    shutil.copytree("runs/mine", "runs/first")
    Path("my_rewards.py").write_text(REWARDS.replace("0.5", "0.7"))
    with pytest.raises(ConfigError, match=r"my_rewards.py has changed since runs/mine was started"):
        run_training(config, resume=True)
    run_training(config, overwrite=True)
    with pytest.raises(CompareError, match="own_files is"):
        check_comparable([read_run("runs/first"), read_run("runs/mine")])


def test_nothing_is_written_where_the_reward_cannot_be_used(folder):
    Path("my_rewards.py").write_text("def brevity(trajectories, answr): return []")
    with pytest.raises(
        RewardError, match="no question has a column 'answr'; did you mean 'answers"
    ):
        run_training(load_config("mine.yaml"))
    with pytest.raises(RewardError, match="no function 'brevty' in it; did you mean 'brevity'"):
        run_training(
            load_config(
                "mine.yaml",
                ["reward_functions=[{function: my_rewards.py:brevty}]", "output=runs/other"],
            )
        )
    Path("pictures/ar.png").unlink()
    with pytest.raises(BenchmarkError, match="row 9, column 'image': no picture"):
        run_training(load_config("mine.yaml", ["reward_functions=[]"]))
    Path("my_dialect.yaml").write_text("like: search")
    with pytest.raises(EnvironmentSetupError, match=r"my_dialect.yaml:like: there is no dialect"):
        run_training(load_config("mine.yaml", ["reward_functions=[]"]))
    assert not Path("runs").exists()


def test_questions_that_are_trained_on_and_evaluated_are_warned_of(folder, caplog):
    whole = [f"environment.{part}_benchmark.split=null" for part in ("train", "eval")]
    run_training(load_config("mine.yaml", [*whole, "grpo.max_steps=1"]))
    assert "10 of 10 evaluation questions are trained on" in caplog.text


def test_fewer_questions_than_a_rollout_asks_are_trained_on_nevertheless(folder, caplog):
    # 40 completions in groups of 2: 20 questions a rollout, and there are 8
    more = ["grpo.per_device_train_batch_size=40", "grpo.max_steps=1"]
    run_training(load_config("mine.yaml", more))
    assert "8 questions for rollouts of 20: each is asked 3 times an epoch" in caplog.text
    [train] = [line for line in lines_of("metrics.jsonl") if line["phase"] == "train"]
    assert train["step"] == 1
    done = json.loads(Path("runs/mine/done.json").read_text())
    assert done["step"] == 1


def test_obm_eval_asks_ones_own_rows(folder, tiny_checkpoints, capsys):
    vlm = tiny_checkpoints["vlm"]
    assert main(["eval", vlm, "--config", "mine.yaml", "--arm", "vlm"]) == 0
    assert "official/em" in capsys.readouterr().out
    record = json.loads(Path("runs/eval/vlm/eval.json").read_text())
    assert record["metrics"]["n"] == 2
    assert record["benchmark"] == {"name": "table", "metrics": ["em"]}
    prompt = json.loads(Path("runs/eval/vlm/trajectories.jsonl").read_text().splitlines()[0])
    assert prompt["question_id"] == "9"
    assert prompt["question"]["answers"] == ["ar"]


def test_dry_runs_say_what_is_ones_own_and_find_bad_rows(folder, tiny_checkpoints, capsys):
    assert main(["train", "--config", "mine.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "my_rewards.py:brevity, weight 0.2" in shown
    assert "every 1 steps, table questions (source: mine.jsonl; split: [80%:])" in shown
    Path("pictures/ar.png").unlink()
    command = ["eval", tiny_checkpoints["vlm"], "--config", "mine.yaml", "--dry-run"]
    assert main(command) == 2
    assert "mine.jsonl, row 9, column 'image': no picture 'pictures/ar.png'" in (
        capsys.readouterr().err
    )
