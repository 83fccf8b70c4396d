"""The vLLM back end against a real server on the CPU: `make test-vllm`.

One server with the tiny policy serves all tests; it takes half a minute to start. Log-probs are
compared with a plain forward of transformers over the whole episode.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig

from configs.schema import load_config
from configs.sections import Rollout
from environments.dialects import get_dialect
from environments.episode import SearchEnvironment
from tests.train.conftest import (
    ANSWER,
    ASK_IMAGE,
    ASK_TEXT,
    FakeImageIndex,
    FakeTextIndex,
    make_question,
    noise_image,
)
from tests.train.test_launch import deepspeed
from train.evaluation import evaluate
from train.grpo import SearchGRPOTrainer
from train.policy import load_policy
from train.rollout import RolloutEngine
from train.run import run_training
from train.settings import free_port
from train.tiny import make_tiny_checkpoints
from train.vllm_client import Sampling, VLLMClient, VLLMError
from train.vllm_rollout import VLLMRolloutEngine
from train.worlds import build_engine

ENVIRONMENT = os.environ.get("OBM_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ENVIRONMENT, reason="needs a vLLM server's environment; run `make test-vllm`"
    ),
]

EXACT = 1e-5
"""fp32 on both sides, two orders of summation"""
MISMATCH = 1e-3
"""what stale weights or misplaced pictures exceed"""

OPTIONS = """
    --dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs 8
    --max-num-batched-tokens 1024 --kv-cache-memory-bytes 67108864 --block-size 32
    --enable-prefix-caching --enable-scale-out --logprobs-mode processed_logprobs
    --enable-prompt-tokens-details --max-logprobs -1
    --worker-extension-cls train.vllm_worker.PolicyWorker
"""
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny VLM with heads of a size that vLLM's attention on the CPU takes."""
    folder = tmp_path_factory.mktemp("served")
    served = make_tiny_checkpoints(folder, hidden=128, head_dim=64)["vlm"]
    # pictures of any size from 4 to 16 tokens; the tiny processor makes all of them 4
    path = Path(served) / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 3136, "longest_edge": 12544}
    path.write_text(json.dumps(settings))
    return served


@pytest.fixture(scope="module")
def url(checkpoint, tmp_path_factory):
    """A server on the loopback device; its whole process group is stopped at the end."""
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "server.log"
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy"]
    limits = ["--limit-mm-per-prompt", '{"image": 8, "video": 0}']
    command = [f"{ENVIRONMENT}/bin/vllm", "serve", checkpoint, *where, *limits, *OPTIONS.split()]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            env={**os.environ, **VARIABLES},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        client, deadline = VLLMClient(address, retries=0), time.monotonic() + 240
        while True:
            try:
                client.check()
                break
            except VLLMError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture
def policy(checkpoint):
    """A fresh policy for every test here: some change it."""
    return load_policy(checkpoint)


@pytest.fixture
def questions():
    """Text alone, pictures of three sizes (two of them are resized), prompts of three lengths."""
    rows = [make_question(number, has_image=number % 5 != 4) for number in range(8)]
    rows[2]["image"] = noise_image(2, width=123, height=77)
    rows[6]["image"] = noise_image(6, width=60, height=50)
    return rows


def three_turns(question, turn):
    """Scripted searches, then the policy's own tokens behind what came back; or its own at once."""
    turns = [[ASK_IMAGE, ASK_TEXT], [ASK_TEXT, ANSWER], [ASK_IMAGE], []]
    chosen = turns[int(question["id"][1:]) % 4]
    return chosen[turn] if turn < len(chosen) else None


@pytest.fixture
def make_engines(policy, url, environment):
    """(engine on the server, engine in process) with equal settings and the same policy."""

    def make(environment=environment, **settings):
        model, processor = policy
        options = {
            "max_new_tokens_per_turn": 40,
            "max_completion_tokens": 300,
            "script": three_turns,
            **settings,
        }
        client = VLLMClient(url, timeout_s=120)
        return (
            VLLMRolloutEngine(model, processor, environment, client=client, **options),
            RolloutEngine(model, processor, environment, **options),
        )

    return make


@pytest.fixture
def largest_difference(full_forward):
    """Of recorded log-probs from those of one plain forward, over the policy's tokens."""

    def compute(engine, trajectories):
        differences = []
        for trajectory in trajectories:
            expected, is_policy = full_forward(engine, trajectory)
            recorded = torch.tensor(trajectory.completion_logprobs)
            differences.append((recorded - expected).abs()[is_policy].max().item())
        return max(differences)

    return compute


def shake(model, scale=0.02):
    """Moves every weight, the tied embedding and the vision tower too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def tokens(trajectories):
    return [trajectory.completion_ids for trajectory in trajectories]


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.4])
def test_logprobs_equal_a_plain_forward(make_engines, questions, largest_difference, temperature):
    engine, _ = make_engines(temperature=temperature)
    trajectories = engine.rollout(questions, group_size=2)
    assert max(len(t.turns) for t in trajectories) == 3
    assert max(len(t.all_images) for t in trajectories) == 3
    assert largest_difference(engine, trajectories) < EXACT


def test_greedy_episodes_equal_those_in_process(make_engines, questions):
    served, local = (engine.rollout(questions, greedy=True) for engine in make_engines())
    assert tokens(served) == tokens(local)
    for one, other in zip(served, local, strict=True):
        assert one.stop_reason == other.stop_reason
        assert [t.action for t in one.turns] == [t.action for t in other.turns]
        assert one.completion_mask == other.completion_mask
        assert one.completion_logprobs == pytest.approx(other.completion_logprobs, abs=EXACT)


@pytest.mark.parametrize("budget", [10, 37, 90, 200])
def test_turns_and_episodes_are_cut_where_they_are_in_process(make_engines, questions, budget):
    engines = make_engines(max_completion_tokens=budget, max_new_tokens_per_turn=25)
    served, local = (engine.rollout(questions, greedy=True) for engine in engines)
    assert tokens(served) == tokens(local)
    assert [t.stop_reason for t in served] == [t.stop_reason for t in local]
    assert max(map(len, tokens(served))) <= budget


def test_sampled_turns_end_by_the_rule_in_process(make_engines, questions):
    """Short stops that an untrained policy does say: the server's idea of a stop and ours."""
    dialect = replace(get_dialect("search_r1"), stop_sequences=("e", "a>"))
    environment = SearchEnvironment(FakeTextIndex(), FakeImageIndex(), dialect=dialect)
    engine, _ = make_engines(environment=environment, script=None)
    trajectories = engine.rollout(questions, group_size=4)
    ended = 0
    for turn in (turn for t in trajectories for turn in t.turns):
        starts = [turn.token_ids[: i + 1] for i in range(len(turn.token_ids))]
        complete = [engine._is_complete(start) for start in starts]
        assert not any(complete[:-1])
        assert complete[-1] or len(turn.token_ids) == 40
        ended += complete[-1]
    assert ended > 5


def test_vision_tokens_are_never_drawn(make_engines, questions, largest_difference):
    engine, _ = make_engines(script=None, temperature=2.0)  # almost uniform over the vocabulary
    trajectories = engine.rollout(questions, group_size=4)
    drawn = {i for t in trajectories for turn in t.turns for i in turn.token_ids}
    assert len(drawn) > 200
    assert not drawn & set(engine._suppressed)
    assert largest_difference(engine, trajectories) < EXACT


def test_a_rollout_can_be_repeated_and_split_over_processes(make_engines, questions):
    engine, _ = make_engines(script=None)
    whole = tokens(engine.rollout_rows(questions, number=3))
    parts = [
        tokens(engine.rollout_rows(questions[i : i + 4], number=3, first_row=i)) for i in (0, 4)
    ]
    assert parts[0] + parts[1] == whole
    assert tokens(engine.rollout_rows(questions, number=4)) != whole


def test_tools_in_threads_change_no_episode(make_engines, questions):
    in_line = tokens(make_engines()[0].rollout(questions, greedy=True))
    assert tokens(make_engines(tool_workers=3)[0].rollout(questions, greedy=True)) == in_line


def test_a_later_turn_computes_only_what_is_new(make_engines, questions):
    """The server's prefix cache, by whole blocks of 32 tokens, and over a picture."""
    engine, _ = make_engines()
    (trajectory,) = engine.rollout(questions[:1], greedy=True)
    images = [engine._encode(engine.encode_image(image)) for image in trajectory.all_images]
    context = trajectory.prompt_ids + trajectory.completion_ids
    sampling = Sampling(max_tokens=1, temperature=0.0)
    reply = engine.client.generate(context, images, sampling, engine.image_token_id)
    assert len(images) == 3
    assert reply.n_cached >= len(context) - 32 - 1
    engine.send_policy(engine.model, 1)
    reply = engine.client.generate(context, images, sampling, engine.image_token_id)
    assert reply.n_cached == 0  # the old weights' keys and values are gone


def test_a_picture_counts_where_its_placeholders_are(make_engines, questions):
    """Features carry the offsets of the prompt they were rendered in; ours are others."""
    engine, local = make_engines()
    question = {**questions[0], "question": "A long question before any picture is looked at. " * 3}
    (right,) = engine.rollout([question], greedy=True)
    assert tokens([right]) == tokens(local.rollout([question], greedy=True))
    prompt = engine.prepare(question)
    image = engine._encode(prompt.pictures[0])
    sampling = Sampling(max_tokens=1, temperature=0.0, barred=tuple(engine._suppressed))
    at_home = engine.client.generate(prompt.token_ids, [image], sampling, engine.image_token_id)
    shifted = [prompt.token_ids[-1], *prompt.token_ids[:-1]]
    moved = engine.client.generate(shifted, [image], sampling, engine.image_token_id)
    assert moved.token_ids + moved.logprobs != at_home.token_ids + at_home.logprobs


# ---------------------------------------------------------------- weights


def test_new_weights_count_in_every_part(make_engines, policy, questions, largest_difference):
    """The tied head among them, and pictures that the server has seen with the old weights."""
    engine, _ = make_engines()
    engine.rollout(questions)
    shake(policy[0])
    engine.n_rollouts = 0  # the same random numbers, so that only the weights differ
    assert largest_difference(engine, engine.rollout(questions)) > MISMATCH
    engine.send_policy(policy[0], 1)
    assert largest_difference(engine, engine.rollout(questions)) < EXACT
    assert engine.client.policy_version().endswith("-1")


def test_the_picture_of_an_old_policy_is_not_served_again(make_engines, policy, questions):
    engine, local = make_engines(script=None)
    for step in range(3):
        engine.send_policy(policy[0], step)
        served = engine.rollout(questions[:2], greedy=True)
        assert tokens(served) == tokens(local.rollout(questions[:2], greedy=True))
        shake(policy[0])


def test_a_server_that_another_run_uses_is_noticed(make_engines, questions):
    engine, _ = make_engines()
    engine.rollout(questions[:1])
    make_engines()[0].rollout(questions[:1])
    with pytest.raises(VLLMError, match="Give every run a server of its own"):
        engine.rollout(questions[:1])


def test_weights_that_are_not_there_are_an_error_and_the_server_lives(url, tmp_path):
    client = VLLMClient(url, retries=1, wait_s=0.01)
    with pytest.raises(VLLMError, match="/collective_rpc: HTTP 500"):
        client.update_policy(str(tmp_path), "none")
    client.check()


# ---------------------------------------------------------------- training


@pytest.fixture
def make_trainer(policy, url, environment, questions, tmp_path):
    def make(peft_config=None, script=None, rollout=None, **settings):
        model, processor = policy
        options = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 200,
            "generation_kwargs": {"max_new_tokens": 30},
            "max_steps": 3,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "entropy_coef": 0.05,  # moves an untrained policy, which earns nothing
            **settings,
        }
        return SearchGRPOTrainer(
            model,
            args=GRPOConfig(**options),
            questions=questions,
            environment=environment,
            rewards={"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1},
            processing_class=processor,
            script=script,
            peft_config=peft_config,
            rollout=Rollout(backend="vllm", url=url, **(rollout or {})),
        )

    return make


def lines_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
def test_a_training_samples_with_the_weights_of_every_step(make_trainer, policy, adapter):
    lora = LoraConfig(r=4, target_modules=r"model\.language_model.*\.(q_proj|v_proj|up_proj)")
    trainer = make_trainer(peft_config=lora if adapter else None, script=three_turns)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))
    lines = lines_of(trainer)
    assert len(lines) == 3
    for line in lines:
        assert 0 < line["sampling/logp_difference_max"] < 1e-4
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        for kind in ("min", "mean", "max"):
            assert line[f"sampling/importance_sampling_ratio/{kind}"] == pytest.approx(1, abs=1e-4)
        assert line["time/sync_s"] > 0
    assert trainer.engine.policy_version == 2


def test_without_the_weights_the_correction_shows_it(make_trainer):
    trainer = make_trainer(max_steps=2, learning_rate=3e-3)
    trainer.engine.send_policy(trainer.model, 0)
    trainer.engine.send_policy = lambda model, version: None  # the second step's never arrive
    trainer.train()
    first, second = lines_of(trainer)
    assert first["sampling/logp_difference_max"] < 1e-4
    assert second["sampling/logp_difference_max"] > MISMATCH
    assert second["sampling/importance_sampling_ratio/max"] > 1 + MISMATCH
    assert second["sampling/importance_sampling_ratio/max"] <= 2.0  # the cap


def test_without_a_correction_no_ratio_is_computed(make_trainer):
    trainer = make_trainer(max_steps=1, rollout={"importance_correction": "none"})
    trainer.train()
    (line,) = lines_of(trainer)
    assert line["sampling/logp_difference_max"] < 1e-4
    assert "sampling/importance_sampling_ratio/mean" not in line


@pytest.fixture
def settings_file(checkpoint, url, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"""
output: {tmp_path / "run"}
models: {{init: {checkpoint}}}
environment: {{train_size: 16, eval_size: 6, kinds: [two, text], eval_kinds: [two, text]}}
rollout: {{backend: vllm, url: "{url}", sync_dir: {tmp_path / "weights"}, sleep: true}}
grpo:
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 60
  generation_kwargs: {{max_new_tokens: 12}}
  max_steps: 2
  entropy_coef: 0.05
compare: {{eval_every: 2}}
tracking: {{wandb: disabled}}
"""
    )
    return path


def check_run(folder):
    """Evaluations at both ends, and in between two steps with the weights that they should have."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    order = [(0, "eval"), (1, "train"), (2, "train"), (2, "eval")]
    assert [(line["step"], line["phase"]) for line in lines] == order
    for line in lines[1:3]:
        assert 0 < line["sampling/logp_difference_max"] < 1e-4
        assert line["grad_norm"] > 0


def test_a_run_from_a_settings_file_evaluates_and_trains_on_the_server(settings_file, tmp_path):
    folder = run_training(load_config(settings_file, []))
    check_run(folder)
    assert list((tmp_path / "weights").iterdir()) == []  # nothing is left of the handovers


def test_two_processes_under_zero3_send_whole_weights_once(settings_file, tmp_path):
    result = deepspeed("--config", str(settings_file), "deepspeed=zero3")
    assert result.returncode == 0, result.stderr[-3000:]
    check_run(tmp_path / "run")


def test_a_policy_can_be_evaluated_on_the_server(settings_file, policy, environment, questions):
    config = load_config(settings_file, [])
    engine = build_engine(config, *policy, environment=environment)
    assert isinstance(engine, VLLMRolloutEngine)
    metrics, trajectories = evaluate(engine, questions)
    local = build_engine(config, *policy, environment=environment, rollout=None)
    assert isinstance(local, RolloutEngine)
    assert metrics == evaluate(local, questions)[0]
    assert len(trajectories) == len(questions)
