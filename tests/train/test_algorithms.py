"""Switches on GRPO: each does what its formula says; every loss of TRL takes our log-probs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from configs.errors import ConfigError
from configs.schema import load_config, resolve_model
from configs.sections import Algorithm
from environments.episode import SearchEnvironment
from environments.tools import CUT_MARK, Hit
from merge.stats import save_stats
from train.anchor import SaliencyAnchor, anchor_statistics
from train.given import choose_reference
from train.policy import load_policy
from train.run import describe_run, run_training
from train.tiny import make_tiny_checkpoints

THINK = "<think> a </think>"
ASK_IMAGE = f"{THINK} <search> <img> </search>"
ASK_TEXT = f"{THINK} <search> capital of France </search>"
RIGHT, WRONG = f"{THINK} <answer> Paris </answer>", f"{THINK} <answer> Rome </answer>"


def batch_of(trainer, n=16):
    rows = [trainer.train_dataset[i // 4] for i in range(n)]
    trainer.model.train()
    return trainer._generate_and_score_completions(rows)


def by_parity(question, turn):
    """Odd questions: half of the answers right. Even ones: all wrong, so no signal."""
    if int(question["id"][1:]) % 2 == 0:
        return WRONG
    return RIGHT if next(by_parity.count) % 2 else WRONG


by_parity.count = itertools.count()


# ---------------------------------------------------------------- variants of TRL's loss

VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo with clip-higher": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "two-sided clip": {"loss_type": "grpo", "delta": 2.0},
    "off-policy mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.5},
    "batch scale": {"loss_type": "dapo", "scale_rewards": "batch"},
    "kl": {"loss_type": "dapo", "beta": 0.1},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.05},
    "high-entropy tokens": {"loss_type": "dapo", "top_entropy_quantile": 0.5},
}


def _plain_forward(trainer, batch):
    """TRL's own forward with all pictures, in the place of ours."""
    pictures = [picture for row in batch["pictures"] for picture in row]

    def forward(model, ids, mask, keep, batch_size=None, **kwargs):
        model.model.rope_deltas = None
        return GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, model, ids, mask, keep, compute_entropy=True,
            pixel_values=torch.cat([p.pixel_values for p in pictures]),
            image_grid_thw=torch.tensor([p.grid for p in pictures]),
            num_images=[len(row) for row in batch["pictures"]],
            mm_token_type_ids=(ids == trainer.engine.image_token_id).int(),
        )  # fmt: skip

    return forward


@pytest.mark.parametrize("name", VARIANTS)
def test_every_loss_of_trl_has_the_value_and_gradient_of_its_own_forward(
    make_trainer, mixed_script, monkeypatch, name
):
    trainer = make_trainer(script=mixed_script, **VARIANTS[name])
    batch = batch_of(trainer)
    batch["advantages"] = torch.linspace(-1, 1, 16)
    # log-probs of an older policy, so that ratios differ from 1 and clipping counts
    noise = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(0))
    batch["old_per_token_logps"] = batch["sampling_per_token_logps"] + 0.3 * noise
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", _plain_forward(trainer, batch)
    )
    expected = GRPOTrainer.compute_loss(trainer, trainer.model, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert any(grad.abs().max() > 0 for grad in ours.values())
    for parameter_name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            largest = parameter.grad.abs().max().item()
            torch.testing.assert_close(
                ours[parameter_name], parameter.grad, rtol=1e-3, atol=1e-4 * max(1.0, largest)
            )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(make_trainer, name):
    settings = {"num_iterations": 2, "max_steps": 2, **VARIANTS[name]}
    trainer = make_trainer(script=by_parity, **settings)
    trainer.train()
    assert len(trainer.metric_lines) == 2
    for line in trainer.metric_lines:
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0


# ---------------------------------------------------------------- dynamic sampling


def test_groups_without_signal_are_replaced_by_other_questions(make_trainer):
    trainer = make_trainer(script=by_parity, algorithm=Algorithm(dynamic_sampling=6))
    batch = batch_of(trainer, n=8)
    groups = [trainer.last_trajectories[i : i + 4] for i in (0, 4)]
    for group in groups:
        assert len({t.question_id for t in group}) == 1
        assert len({t.rewards["total"] for t in group}) == 2
    assert (batch["advantages"] != 0).all()
    metrics = trainer._metrics["train"]
    assert metrics["dynamic_sampling/replaced"][0] > 0
    assert metrics["dynamic_sampling/without_signal"] == [0.0]
    assert metrics["dynamic_sampling/reward_of_all"][0] < metrics["reward"][0]
    # what was thrown away was sampled all the same
    kept = sum(t.n_policy_tokens for t in trainer.last_trajectories)
    assert trainer.n_policy_tokens > kept


def test_replacing_ends_when_the_questions_run_out(make_trainer, questions):
    trainer = make_trainer(
        script=lambda question, turn: WRONG,
        questions=questions[:3],
        algorithm=Algorithm(dynamic_sampling=50),
    )
    batch_of(trainer, n=8)
    metrics = trainer._metrics["train"]
    assert metrics["dynamic_sampling/replaced"] == [0.5]
    assert metrics["dynamic_sampling/without_signal"] == [1.0]


def test_without_the_switch_nothing_is_replaced(make_trainer):
    trainer = make_trainer(script=by_parity)
    batch_of(trainer)
    assert trainer.engine.n_rollouts == 1
    assert "dynamic_sampling/replaced" not in trainer._metrics["train"]


# ---------------------------------------------------------------- parts of the reward


def test_an_efficient_right_answer_gets_more_and_the_parts_add_up(make_trainer):
    trainer = make_trainer(algorithm=Algorithm(efficiency_bonus=0.2))
    calls, right = [1, 2, 1, 0], [1.0, 1.0, 0.0, 1.0]

    class Episode:
        def __init__(self, n_calls, accuracy):
            self.n_calls = n_calls
            self.rewards = {"total": accuracy, "accuracy": accuracy}

    episodes = [Episode(n, a) for n, a in zip(calls, right, strict=True)]
    trainer._groups.add_bonuses(episodes, episodes)
    assert [e.rewards["efficiency"] for e in episodes] == pytest.approx([0.1, -0.1, 0.0, 0.0])
    assert [e.rewards["total"] for e in episodes] == pytest.approx([1.1, 0.9, 0.0, 1.0])
    # a second look does not pay twice
    trainer._groups.add_bonuses(episodes, [])
    assert episodes[0].rewards["total"] == pytest.approx(1.1)


def test_an_episode_cut_by_its_budget_is_punished(make_trainer):
    trainer = make_trainer(
        max_completion_length=30, algorithm=Algorithm(overlong_penalty=0.5, overlong_buffer=10)
    )
    batch_of(trainer)
    cut = [t for t in trainer.last_trajectories if t.stop_reason == "length"]
    assert cut
    for trajectory in cut:
        assert trajectory.rewards["overlong"] == -0.5
        parts = 0.1 * trajectory.rewards["format"] + trajectory.rewards["accuracy"] - 0.5
        assert trajectory.rewards["total"] == pytest.approx(parts)
    shares = [t.rewards["overlong"] for t in trainer.last_trajectories]
    logged = trainer._metrics["train"]["rewards/overlong/mean"][0]
    assert logged == pytest.approx(np.mean(shares))


# ---------------------------------------------------------------- hop credit


def lost_on_the_way(question, turn):
    """All find the page in their first turn; half of them answer wrong after it."""
    if turn == 0:
        return ASK_TEXT
    return RIGHT if next(lost_on_the_way.count) % 2 else WRONG


lost_on_the_way.count = itertools.count()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_hop_credit_mixes_the_advantages_turn_by_turn(make_trainer, share):
    trainer = make_trainer(script=lost_on_the_way, algorithm=Algorithm(hop_credit=share))
    batch = batch_of(trainer)
    assert batch["advantages"].shape == batch["completion_ids"].shape
    for row, trajectory in enumerate(trainer.last_trajectories):
        advantages = batch["advantages"][row, : len(trajectory.completion_ids)]
        # every finder is compared with the whole group: here both advantages agree
        assert advantages.std() < 1e-6
        assert advantages[0].sign() == (1 if trajectory.answer == "Paris" else -1)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert math.isfinite(loss.item())


def test_hop_credit_leaves_rows_that_found_nothing_alone(make_trainer, environment):
    class NoIndex:
        in_memory = True

        def search(self, queries, k):
            return [[Hit("other/page", "Other", "nothing")] for _ in queries]

    world = SearchEnvironment(NoIndex(), environment.image_index)
    trainer = make_trainer(
        script=lost_on_the_way, environment=world, algorithm=Algorithm(hop_credit=1.0)
    )
    batch = batch_of(trainer)
    rewards = torch.tensor([t.rewards["total"] for t in trainer.last_trajectories]).view(-1, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"][:, 0], expected.flatten(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- long results


class LongIndex:
    in_memory = True

    def search(self, queries, k):
        words = " ".join(["word"] * 40)
        return [[Hit("france/capital", "France", f"Paris {words}")] * k for _ in queries]


def rollout_with(make_engine, long_results, budget):
    world = SearchEnvironment(LongIndex(), None, long_results=long_results)
    engine = make_engine(
        environment=world,
        max_completion_tokens=budget,
        script=lambda question, turn: [ASK_TEXT, RIGHT][turn],
    )
    question = {"id": "q1", "kind": "text", "question": "Capital?", "answers": ["Paris"]}
    (trajectory,) = engine.rollout([question])
    return trajectory


def test_a_result_that_does_not_fit_ends_the_episode_and_is_kept_in_the_record(make_engine):
    trajectory = rollout_with(make_engine, "end", budget=150)
    assert trajectory.stop_reason == "length"
    assert trajectory.has_unread_result
    assert "word" in trajectory.turns[0].observation


def test_a_result_that_does_not_fit_is_shortened_and_says_so(make_engine):
    trajectory = rollout_with(make_engine, "shorten", budget=150)
    assert trajectory.stop_reason == "answer"
    assert trajectory.answer == "Paris"
    assert CUT_MARK in trajectory.turns[0].observation
    assert "Paris" in trajectory.turns[0].observation
    assert not trajectory.has_unread_result
    assert len(trajectory.completion_ids) <= 150
    whole = rollout_with(make_engine, "shorten", budget=1000)
    assert CUT_MARK not in whole.turns[0].observation


def test_a_budget_too_small_for_any_result_still_ends(make_engine):
    trajectory = rollout_with(make_engine, "shorten", budget=40)
    assert trajectory.stop_reason == "length"
    assert trajectory.has_unread_result


# ---------------------------------------------------------------- the warm start


def test_the_reference_may_be_another_checkpoint_than_the_start(make_trainer, tmp_path):
    other = make_tiny_checkpoints(tmp_path / "other", seed=5)["vlm"]
    trainer = make_trainer(script=by_parity, beta=0.1, reference=other)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    expected = load_policy(other)[0].get_parameter(name)
    assert torch.equal(trainer.ref_model.get_parameter(name), expected)
    assert not torch.equal(trainer.model.get_parameter(name), expected)
    trainer.train()
    assert trainer.metric_lines[0]["kl"] > 1e-3


def test_the_reference_is_of_the_revision_that_is_named(tmp_path, monkeypatch):
    """TRL is given a folder: it would read the newest commit of a name on the hub."""
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, revision, **_: asked.append((name, revision)) or "/cache/snapshot",
    )
    path = tmp_path / "settings.yaml"
    path.write_text(f"output: {tmp_path}/run\nmodels: {{init: owner/name@v1}}\n")

    def reference(*overrides):
        config = load_config(path, list(overrides))
        return choose_reference(config, resolve_model(config.models.init))

    assert reference("grpo.beta=0.1") == "/cache/snapshot"
    assert reference("grpo.beta=0.1", "models.reference=owner/other@v2") == "/cache/snapshot"
    assert asked == [("owner/name", "v1"), ("owner/other", "v2")]
    assert reference("grpo.beta=0.1", "models.init=owner/name") == "owner/name"
    assert reference() is reference("grpo.beta=0.1", "lora.r=4") is None


@pytest.fixture
def statistics(tiny_checkpoints, tmp_path):
    """Second moments of two parents, for the linears of layer 0 alone."""
    paths = []
    model, _ = load_policy(tiny_checkpoints["agent"])
    for number in (1, 2):
        values = {
            name.removesuffix(".weight"): np.linspace(0, number, p.shape[1], dtype=np.float32)
            for name, p in model.named_parameters()
            if ".layers.0." in name and p.dim() == 2
        }
        paths.append(str(tmp_path / str(number) / "stats.safetensors"))
        save_stats(paths[-1], "diagonal", values, {})
    return paths


def test_the_anchor_adds_the_gradient_of_its_loss(fresh_policy, statistics):
    model, _ = fresh_policy
    anchor = SaliencyAnchor(model, anchor_statistics("", statistics), strength=0.3)
    weight = model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight")
    untouched = model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")
    assert anchor.loss() == 0.0
    with torch.no_grad():
        weight += 0.1
        untouched += 0.1
    (weight.sum() * 0 + untouched.sum() * 0).backward()
    # by the definition: h rises from 0 over the channels, mean 1, three times over
    h = torch.linspace(0, 1, weight.shape[1])
    expected = 0.3 * 0.1 * h / h.mean()
    torch.testing.assert_close(weight.grad, expected.expand_as(weight))
    assert (untouched.grad == 0).all()
    value = 0.5 * 0.3 * 0.1**2 * (h / h.mean()).sum().item() * len(weight)
    assert anchor.loss() == pytest.approx(value, rel=1e-4)


def test_the_anchor_follows_a_policy_that_is_cast_after_it_was_made(fresh_policy, statistics):
    """As DeepSpeed casts it: bf16 weights, whose gradients are bf16."""
    model, _ = fresh_policy
    anchor = SaliencyAnchor(model, anchor_statistics("", statistics), strength=0.3)
    weight = model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight")
    model.bfloat16()
    (weight.sum() * 0).backward()
    assert (weight.grad == 0).all()
    assert anchor.loss() == 0.0
    with torch.no_grad():
        weight += 0.1
    (weight.sum() * 0).backward()
    h = torch.linspace(0, 1, weight.shape[1])
    expected = 0.3 * 0.1 * h / h.mean()
    # weights of about 0.1 in bf16 are 2^-11 apart, half a percent of the way
    torch.testing.assert_close(weight.grad.float(), expected.expand_as(weight), rtol=0.03, atol=0)


def test_a_strong_anchor_keeps_the_policy_nearer_to_its_start(
    make_trainer, tiny_checkpoints, statistics
):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    moved = []
    for strength in (0.0, 100.0):
        model, _ = load_policy(tiny_checkpoints["vlm"])
        trainer = make_trainer(script=by_parity, max_steps=6)
        trainer.model.load_state_dict(model.state_dict())
        by_parity.count = itertools.count()
        if strength:
            stats = anchor_statistics("", statistics)
            trainer.anchor = SaliencyAnchor(trainer.model, stats, strength)
        start = trainer.model.get_parameter(name).detach().clone()
        trainer.train()
        moved.append((trainer.model.get_parameter(name) - start).norm().item())
    assert moved[1] < 0.7 * moved[0]
    assert trainer.metric_lines[-1]["anchor/loss"] > 0


def test_an_anchor_without_statistics_is_one_clear_error(tiny_checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="not merged with second moments"):
        anchor_statistics(tiny_checkpoints["vlm"], [])
    with pytest.raises(ConfigError, match="no diagonal statistics"):
        anchor_statistics("", [str(tmp_path / "none.safetensors")])


def test_statistics_of_another_architecture_are_refused(fresh_policy, tmp_path):
    path = tmp_path / "stats.safetensors"
    values = {"model.layers.0.mlp.up_proj": np.ones(3, dtype=np.float32)}
    save_stats(path, "diagonal", values, {})
    with pytest.raises(ConfigError, match=r"model.layers.0.mlp.up_proj.weight has \(3,\)"):
        SaliencyAnchor(fresh_policy[0], anchor_statistics("", [str(path)]), 1.0)


# ---------------------------------------------------------------- a whole run


def test_a_run_takes_the_switches_from_its_settings(tiny_checkpoints, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        json.dumps(
            {
                "output": str(tmp_path / "run"),
                "models": {"init": tiny_checkpoints["vlm"], "reference": tiny_checkpoints["vlm"]},
                "environment": {"train_size": 24, "eval_size": 4, "long_results": "shorten"},
                "grpo": {
                    "per_device_train_batch_size": 8,
                    "num_generations": 4,
                    "max_completion_length": 60,
                    "generation_kwargs": {"max_new_tokens": 12},
                    "max_steps": 2,
                    "beta": 0.01,
                },
                "algorithm": {"dynamic_sampling": 2, "hop_credit": 0.5, "overlong_penalty": 0.1},
                "compare": {"eval_every": 2},
                "tracking": {"wandb": "disabled"},
            }
        )
    )
    folder = run_training(load_config(path))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["phase"] == "train"]
    assert len(trained) == 2
    for line in trained:
        assert {"dynamic_sampling/replaced", "rewards/overlong/mean", "kl"} <= line.keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.anchor=1.0", "deepspeed=zero3"], "algorithm.anchor: needs whole parameters"),
        (["algorithm.anchor=1.0", "lora.r=4"], "algorithm.anchor: an adapter leaves"),
        (["algorithm.anchor=1.0", "grpo.fp16=true"], "algorithm.anchor: fp16 scales the gradients"),
        (["models.reference=atlas://vlm"], "models.reference: without a KL term"),
        (
            ["models.reference=atlas://vlm", "grpo.beta=0.1", "lora.r=4"],
            "models.reference: with an adapter",
        ),
    ],
)
def test_a_pull_that_would_do_nothing_is_refused(tiny_checkpoints, tmp_path, overrides, message):
    path = tmp_path / "settings.yaml"
    path.write_text(f"output: {tmp_path}/run\nmodels: {{init: {tiny_checkpoints['vlm']}}}\n")
    with pytest.raises(ConfigError, match=message):
        run_training(load_config(path, overrides))
    with pytest.raises(ConfigError, match=message):
        describe_run(load_config(path, overrides), 1)
    assert not (tmp_path / "run").exists()
