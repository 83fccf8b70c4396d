"""SPORT from settings to policy, its resume, its refusals; and the cold start beside it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import ConfigError
from configs.schema import load_config, resolve_model
from launch.cli import main
from train import sport
from train.cold_start import collect, run_cold_start, to_example, training_questions, write_episode
from train.cost import Cost
from train.policy import load_for_inference, load_policy
from train.sft import IGNORE
from train.sport import run_sport
from train.sport_tasks import make_tasks
from train.worlds import build_engine, load_train_questions

# the trio's text agent searches already, so that its steps differ in worth
SETTINGS = """
output: {output}
seed: 1
models: {{init: {init}}}
environment: {{kinds: [{kind}], train_size: 16, max_turns: 3}}
grpo: {{max_completion_length: 240, generation_kwargs: {{max_new_tokens: 40}}}}
sport: {{iterations: 2, tasks: 6, samples: 4, temperature: 1.5, dpo: {{learning_rate: 1.0e-4}}}}
sft: {{episodes: 12, steps: 3, batch_size: 4}}
"""


@pytest.fixture
def settings(tmp_path):
    def write(init="atlas://agent", kind="text", output="run"):
        path = tmp_path / f"{output}.yaml"
        path.write_text(SETTINGS.format(output=tmp_path / output, init=init, kind=kind))
        return path

    return write


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_keeps_a_journal_goes_on_after_a_stop_and_gives_a_policy(settings, tmp_path):
    path = settings()
    policy = run_sport(load_config(path))
    run = tmp_path / "run"
    assert policy == run / "policy"
    model, _ = load_policy(policy)
    assert not (run / "iterations" / "1" / "policy").exists()

    first = run / "iterations" / "1"
    journal, pairs = lines(first / "steps.jsonl"), lines(first / "pairs.jsonl")
    assert all(len(line["candidates"]) == 4 for line in journal)
    assert sum(line["n_pairs"] for line in journal) >= len(pairs) > 0
    for line in journal:
        scores = [c["score"] for c in line["candidates"]]
        assert scores[line["chosen"]] == max(scores)
    assert all(pair["margin"] >= 0.2 and pair["chosen"] != pair["rejected"] for pair in pairs)
    episodes = lines(first / "trajectories.jsonl")
    assert len(episodes) == 6
    # the path of an episode is its chosen candidates
    by_task = [line for line in journal if line["question_id"] == episodes[0]["question_id"]]
    chosen = [line["candidates"][line["chosen"]]["text"] for line in by_task]
    assert [turn["text"] for turn in episodes[0]["turns"]] == chosen
    other = {line["question_id"] for line in lines(run / "iterations" / "2" / "steps.jsonl")}
    assert other != {line["question_id"] for line in journal}

    cost = json.loads((run / "cost.json").read_text())
    assert set(cost["parts"]) == {"tasks", "sampling", "tuning"}
    assert cost["device_s"] == pytest.approx(sum(cost["parts"].values()), abs=0.01)
    assert cost["parts"]["sampling"] > 0 < cost["parts"]["tuning"]
    start = weights(Path(resolve_model("atlas://agent")))
    tuned = weights(policy)
    assert any(not torch.equal(start[name].float(), tuned[name]) for name in start)

    # broken off in the second iteration, then resumed: the same policy and costs of both
    again = load_config(path, [f"output={tmp_path / 'again'}"])
    run_sport(load_config(path, [f"output={tmp_path / 'again'}", "sport.iterations=1"]))
    (tmp_path / "again" / "iterations" / "2").mkdir()
    (tmp_path / "again" / "iterations" / "2" / "steps.jsonl").write_text('{"torn')
    run_sport(again, resume=True)
    resumed = weights(tmp_path / "again" / "policy")
    assert all(torch.equal(resumed[name], tuned[name]) for name in tuned)
    parts = json.loads((tmp_path / "again" / "cost.json").read_text())["parts"]
    done = [
        json.loads((tmp_path / "again" / "iterations" / n / "done.json").read_text())["parts"]
        for n in ("1", "2")
    ]
    assert parts["tuning"] == pytest.approx(done[0]["tuning"] + done[1]["tuning"], abs=0.01)
    del model


def test_a_policy_without_a_better_step_is_a_clear_error(settings, tiny_checkpoints, capsys):
    """An untrained policy writes no legal step at all: every candidate is worth the same."""
    path = settings(init=tiny_checkpoints["base"])
    assert main(["sport", "--config", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: sport: no pair to learn from: every candidate was scored 0.0")
    assert "sport.temperature" in error


class Failing:
    last_error = "the service is down"

    def score(self, steps):
        return [[None] * len(step.turns) for step in steps]


def test_a_verifier_that_always_fails_ends_the_run_and_says_how(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(sport, "make_verifier", lambda config: (None, Failing()))
    with pytest.raises(ConfigError, match=r"no verdict on (\d+) of \1 steps \(the service is down"):
        run_sport(load_config(settings(), ["sport.tasks=2"]))
    assert not (tmp_path / "run" / "policy").exists()
    assert not (tmp_path / "run" / "done.json").exists()


def test_with_all_unverified_steps_allowed_the_error_is_that_nothing_can_be_learnt(
    settings, monkeypatch
):
    monkeypatch.setattr(sport, "make_verifier", lambda config: (None, Failing()))
    with pytest.raises(ConfigError, match="every candidate was scored None"):
        run_sport(load_config(settings(), ["sport.tasks=2", "sport.max_unverified=1"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.init=", "models.init: missing"),
        ("sport.verifier=llm", "sport.llm_url: missing"),
        ("sport.wording=llm", "sport.llm_url: missing"),
        ("sport.dpo.beat=1", "did you mean 'beta'"),
        ("rollout.backend=vllm", "in process"),
        ("sport.samples=1", "sport.samples"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    settings, tmp_path, capsys, override, message
):
    assert main(["sport", "--config", str(settings()), override]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_be_sampled_and_writes_nothing(settings, tmp_path, capsys):
    assert main(["sport", "--config", str(settings()), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    # 6 tasks of at most 3 turns, 4 candidates each
    assert "4 a step, 72 an iteration at most" in shown
    assert "beta=0.1" in shown
    assert not (tmp_path / "run").exists()


def test_another_folder_is_neither_overwritten_nor_resumed_with_other_settings(settings, tmp_path):
    path = settings()
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run" / "config.yaml")
    with pytest.raises(ConfigError, match=r"--resume.*--overwrite"):
        run_sport(load_config(path))
    with pytest.raises(ConfigError, match=r"sport.tasks \(6 before, 7 now\)"):
        run_sport(load_config(path, ["sport.tasks=7"]), resume=True)


def test_a_cold_start_that_is_there_is_not_advised_to_go_on(settings, tmp_path):
    path = settings()
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run" / "config.yaml")
    with pytest.raises(ConfigError, match="run exists already; choose another name") as caught:
        run_cold_start(load_config(path))
    assert "--resume" not in str(caught.value)


def test_tasks_are_new_in_each_iteration_and_of_the_training_split(settings):
    config = load_config(settings(kind="two"))
    one, two, again = (make_tasks(config, n, None) for n in (1, 2, 1))
    assert [t["id"] for t in one] == [t["id"] for t in again]
    assert one[0]["image"].tobytes() == again[0]["image"].tobytes()
    assert [t["id"] for t in one] != [t["id"] for t in two]
    assert {t["split"] for t in one + two} == {"train"}


# ---------------------------------------------------------------- cold start


@pytest.fixture(scope="module")
def vlm():
    return load_policy(resolve_model("atlas://vlm"))


def test_the_solvers_episodes_are_the_students_own_tokens_and_only_they_are_learnt(settings, vlm):
    config = load_config(settings(init="atlas://vlm", kind="two"))
    engine = build_engine(config, *vlm)
    questions = training_questions(config)
    assert {q["split"] for q in questions} == {"train"}
    episodes = collect(config, engine, questions)
    assert 0 < len(episodes) <= 12
    by_id = {q["id"]: q for q in questions}
    for episode in episodes:
        assert episode.answer in by_id[episode.question_id]["answers"]
        example = to_example(episode)
        learnt = [label for label in example.labels if label != IGNORE]
        assert learnt == [i for turn in episode.turns for i in turn.token_ids]
        kept = [i == label for i, label in zip(example.input_ids, example.labels, strict=True)]
        assert sum(kept) == len(learnt)
    # a forced rollout of the same turns has the same tokens, observations and pictures
    texts = {e.question_id: [turn.text for turn in e.turns] for e in episodes}
    engine.script = lambda question, turn: texts[question["id"]][turn]
    played = engine.rollout([by_id[e.question_id] for e in episodes])
    for one, other in zip(episodes, played, strict=True):
        assert one.prompt_ids + one.completion_ids == other.prompt_ids + other.completion_ids
        assert one.completion_mask == other.completion_mask


def test_what_a_solver_gives_up_or_answers_wrongly_is_not_taught(settings, vlm):
    config = load_config(settings(init="atlas://vlm", kind="text"))
    engine = build_engine(config, *vlm)
    question = load_train_questions(config)[0]
    assert write_episode(engine, question, lambda episode: None) is None
    wrong = "<think> x </think> <answer> nowhere </answer>"
    episode = write_episode(engine, question, lambda running: wrong)
    assert episode.stop_reason == "answer"
    from train.cold_start import is_right

    assert not is_right(episode, question)


def test_an_empty_turn_is_the_token_that_ends_it(settings, vlm):
    config = load_config(settings(init="atlas://vlm", kind="text"))
    engine = build_engine(config, *vlm)
    episode = write_episode(engine, load_train_questions(config)[0], lambda running: "")
    assert episode.turns[0].token_ids == [engine.tokenizer.eos_token_id]


def test_only_a_teachers_right_episodes_search_again(settings, vlm, monkeypatch):
    config = load_config(settings(), ["sft.teacher=atlas://agent"])
    engine = build_engine(config, *vlm)
    questions = load_train_questions(config)[:2]
    answers = [questions[0]["answers"][0], "nowhere"]
    turns = [f"<think> x </think> <answer> {answer} </answer>" for answer in answers]
    played = [
        write_episode(engine, question, lambda running, turn=turn: turn)
        for question, turn in zip(questions, turns, strict=True)
    ]
    teacher = SimpleNamespace(
        rollout_rows=lambda asked, **settings: played, release_images=lambda: None
    )
    monkeypatch.setattr("train.policy.load_for_inference", lambda folder, **_: vlm)
    monkeypatch.setattr("train.worlds.build_engine", lambda *parts, **settings: teacher)
    started, start = [], engine.environment.start
    monkeypatch.setattr(
        engine.environment, "start", lambda question: started.append(question) or start(question)
    )
    [taught] = collect(config, engine, questions)
    assert taught.answer == answers[0]
    assert started == questions[:1]


@pytest.mark.slow
def test_a_cold_start_learns_the_episodes_and_gives_a_policy(settings, tmp_path):
    path = settings(init="atlas://vlm", kind="two", output="cold")
    assert main(["sft", "--config", str(path), "sft.steps=8"]) == 0
    run = tmp_path / "cold"
    done = json.loads((run / "done.json").read_text())
    cost = json.loads((run / "cost.json").read_text())
    assert set(cost["parts"]) == {"episodes", "training"}
    assert done["policy"] == "policy"
    assert len(lines(run / "trajectories.jsonl")) == done["episodes"]
    config = load_config(path)
    before, after = (mean_nll(config, name) for name in ("atlas://vlm", str(run / "policy")))
    # a mean over all steps, the first of which begin where the start stands
    assert after < done["loss"] < 1.2 * before
    assert after < 0.75 * before


def mean_nll(config, checkpoint):
    """Nats a learnt token of the solver's episodes."""
    from train.sft import SFTCollator

    model, processor = load_policy(resolve_model(checkpoint))
    engine = build_engine(config, model, processor)
    examples = [to_example(e) for e in collect(config, engine, training_questions(config))]
    with torch.no_grad():
        return model(**SFTCollator(processor)(examples)).loss.item()


def test_a_checkpoint_runs_on_the_gpu_of_its_process(monkeypatch):
    moved, model = [], SimpleNamespace(eval=lambda: "ready")
    model.to = lambda device: moved.append(device) or model
    dtypes = []

    def load_policy(folder, dtype, max_pixels):
        dtypes.append(dtype)
        return model, "processor"

    monkeypatch.setattr("train.policy.load_policy", load_policy)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for has_gpu in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        assert load_for_inference("folder", bf16=True) == ("ready", "processor")
    load_for_inference("folder", "cpu")
    load_for_inference("folder", "cuda:0")
    assert moved == ["cuda:1", "cpu", "cpu", "cuda:0"]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


@pytest.mark.slow
def test_another_checkpoint_can_teach(settings, tmp_path):
    path = settings(init="atlas://base", output="taught")
    config = load_config(path, ["sft.teacher=atlas://agent", "sft.steps=1"])
    run_cold_start(config)
    episodes = lines(tmp_path / "taught" / "trajectories.jsonl")
    assert episodes
    assert all(e["turns"][0]["action"]["type"] == "search" for e in episodes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.init=", "models.init: missing"),
        ("lora.r=4", "set lora.r to 0"),
        ("sft.teacher=atlas://nobody", "no shipped checkpoint"),
        ("sft.micro_batch_size=3", "3 does not divide sft.batch_size, which is 4"),
        ("environment.train_benchmark.name=fvqa_train", "the solver knows the atlas's questions"),
    ],
)
def test_a_mistake_of_a_cold_start_is_one_line(settings, capsys, tmp_path, override, message):
    path = settings(init="atlas://vlm", kind="two")
    assert main(["sft", "--config", str(path), override, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["sport", "sft"])
def test_several_gpus_are_refused_before_anything_is_written(
    settings, monkeypatch, capsys, tmp_path, verb
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert main([verb, "--config", str(settings(init="atlas://vlm"))]) == 2
    said = capsys.readouterr().err
    assert f"CUDA_VISIBLE_DEVICES: 2 GPUs are visible, and obm {verb} runs on one" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


# ---------------------------------------------------------------- cost


def test_costs_add_up_by_part_and_a_part_that_fails_costs_nothing(tmp_path, monkeypatch):
    now = [10.0]
    monkeypatch.setattr("train.callbacks.time.process_time", lambda: now[0])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    cost = Cost()
    with cost.part("sampling"):
        now[0] += 3.0
    with pytest.raises(ZeroDivisionError), cost.part("tuning"):
        now[0] += 100.0 / 0
    cost.add({"sampling": 1.5, "tuning": 2.0})
    cost.write(tmp_path)
    assert json.loads((tmp_path / "cost.json").read_text()) == {
        "device_s": 6.5, "parts": {"sampling": 4.5, "tuning": 2.0}
    }  # fmt: skip
