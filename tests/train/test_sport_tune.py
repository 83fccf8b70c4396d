"""DPO on pairs of steps: TRL sees the sampled tokens, and what is preferred becomes likelier."""

import dataclasses

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import load_config
from train.policy import load_policy
from train.rollout import RolloutEngine
from train.sport_sampling import StepPair
from train.sport_tune import DPOConfig, PairCollator, StepDPOTrainer, dpo_settings, tune
from train.trajectories import Trajectory, Turn

LIMITS = {"max_new_tokens_per_turn": 40, "max_completion_tokens": 300}


@pytest.fixture
def engine(policy, environment, mixed_script):
    return RolloutEngine(*policy, environment, script=mixed_script, **LIMITS)


@pytest.fixture
def pairs(engine, questions):
    """Planted: after a picture search with two thumbnails the second step counts as chosen, and a
    text that the tokenizer would split otherwise as rejected."""
    tokenizer = engine.tokenizer
    odd = [
        i for char in "answer this" for i in tokenizer(char, add_special_tokens=False)["input_ids"]
    ]
    whole = tokenizer("answer this", add_special_tokens=False)["input_ids"]
    assert odd != whole  # the same text in other tokens than the tokenizer makes of it
    made = []
    for episode in engine.rollout(questions):
        for n, turn in enumerate(episode.turns):
            past = dataclasses.replace(episode, turns=episode.turns[:n])
            made.append(
                StepPair(
                    episode.question_id, n, [*past.prompt_ids, *past.completion_ids],
                    past.all_images, list(turn.token_ids), odd, turn.text, "answer this", 0.5,
                )
            )  # fmt: skip
    assert {len(pair.images) for pair in made} >= {0, 1, 3}
    return made


@pytest.fixture
def config(tiny_checkpoints, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\nmodels: {{init: {tiny_checkpoints['vlm']}}}\n"
        "sport: {dpo: {learning_rate: 1.0e-3, num_train_epochs: 4}}\n"
    )
    return load_config(path)


def test_the_batch_is_the_sampled_tokens_chosen_first(pairs, policy):
    collate = PairCollator(pairs, policy[1])
    chosen = [3, 0]
    batch = collate([{"row": row} for row in chosen])
    sides = [pairs[i].chosen_ids for i in chosen] + [pairs[i].rejected_ids for i in chosen]
    for row, (pair, side) in enumerate(zip([pairs[i] for i in chosen] * 2, sides, strict=True)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        assert ids == pair.prompt_ids + side
        # the loss is on the step alone, not on the policy's earlier turns
        assert batch["input_ids"][row][batch["completion_mask"][row].bool()].tolist() == side
    for mask in ("attention_mask", "completion_mask"):
        assert batch[mask].unique().tolist() == [0, 1]
    n_patches = sum(int(t) * int(h) * int(w) for t, h, w in batch["image_grid_thw"])
    assert len(batch["pixel_values"]) == n_patches
    assert len(batch["image_grid_thw"]) == 2 * sum(len(pairs[i].images) for i in chosen)


def trainer_on(pairs, checkpoint, tmp_path, **settings):
    model, processor = load_policy(checkpoint)
    reference, _ = load_policy(checkpoint)
    options = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": len(pairs), "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "max_length": None,
        "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True, **settings,
    }  # fmt: skip
    return StepDPOTrainer(model, reference, DPOConfig(**options), pairs, processor)


def test_trl_scores_the_tokens_that_were_sampled(
    pairs, engine, tiny_checkpoints, tmp_path, full_forward
):
    """Contract with TRL: its log-prob of a step is that of a plain forward of the same tokens."""
    trainer = trainer_on(pairs, tiny_checkpoints["vlm"], tmp_path)
    # in order: questions of equal tokens differ in their pictures
    batch = trainer.data_collator([{"row": row} for row in range(len(pairs))])
    found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    engine.temperature = 1.0
    for name, log_probs in zip(("chosen_ids", "rejected_ids"), found, strict=True):
        for pair, log_prob in zip(pairs, log_probs, strict=True):
            step = Trajectory("q", "two", True, "", pair.prompt_ids, pair.images)
            step.turns = [Turn("", getattr(pair, name), [], {})]
            expected = full_forward(engine, step)[0].sum()
            torch.testing.assert_close(log_prob, expected, atol=2e-3, rtol=0)
    [own] = list(trainer.get_train_dataloader())
    assert sorted(own["input_ids"].tolist()) == sorted(batch["input_ids"].tolist())


def test_planted_preferences_raise_the_chosen_steps_log_prob(pairs, tiny_checkpoints, tmp_path):
    trainer = trainer_on(
        pairs, tiny_checkpoints["vlm"], tmp_path, learning_rate=1e-3, max_steps=6, logging_steps=1,
        lr_scheduler_type="constant",
    )  # fmt: skip

    def log_probs():
        [batch] = list(trainer.get_train_dataloader())
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        return chosen.sum().item(), (chosen - rejected).mean().item()

    before = log_probs()
    trainer.train()
    after = log_probs()
    assert after[0] > before[0] + 1.0
    assert after[1] > before[1] + 1.0
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are equal
    assert losses[-1] < losses[0]


def test_reversed_preferences_lower_it(pairs, tiny_checkpoints, tmp_path):
    """The sign of the loss: what was chosen above is now rejected."""
    reversed_pairs = [
        dataclasses.replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs
    ]
    trainer = trainer_on(
        reversed_pairs, tiny_checkpoints["vlm"], tmp_path, learning_rate=1e-3, max_steps=6,
        lr_scheduler_type="constant",
    )  # fmt: skip
    [batch] = list(trainer.get_train_dataloader())
    _, before = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.train()
    _, after = trainer.compute_ref_log_probs(trainer.model, batch)
    assert after.sum() < before.sum() - 1.0


@pytest.mark.parametrize("rank", [0, 4], ids=["whole weights", "adapter"])
def test_the_tuned_policy_is_a_checkpoint_that_loads(config, pairs, tmp_path, rank):
    config.lora.r = rank
    start = config.models.init
    lines = tune(config, start, pairs, tmp_path / "it" / "policy", 1)
    assert lines[-1]["loss"] < lines[0]["loss"]
    model, processor = load_policy(tmp_path / "it" / "policy")
    assert processor.tokenizer.chat_template
    before = load_policy(start)[0].state_dict()
    after = model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj.weight" in name for name in changed)
    # an adapter leaves the tower alone
    assert any("visual" in name for name in changed) == (rank == 0)


def test_two_tunings_of_one_seed_are_equal(config, pairs, tmp_path):
    config.sport.dpo["num_train_epochs"] = 1
    for name in ("a", "b"):
        tune(config, config.models.init, pairs, tmp_path / name / "policy", 2)
    one, two = (load_policy(tmp_path / n / "policy")[0].state_dict() for n in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("key", "message"),
    [("bta", "did you mean 'beta'"), ("seed", "top-level seed"), ("max_length", "never cut")],
)
def test_a_key_that_dpo_does_not_take_is_named(config, tmp_path, key, message):
    config.sport.dpo = {key: 1}
    with pytest.raises(ConfigError, match=rf"sport\.dpo\.{key}: .*{message}"):
        dpo_settings(config, tmp_path, 1)


@pytest.mark.parametrize("rank", [0, 3])
def test_frozen_heads_keep_every_bit(config, pairs, tiny_checkpoints, tmp_path, rank):
    """Head 1 of layer 0; with an adapter, whose product is zero there, after it is merged, too."""
    from train.frozen import FrozenHeads
    from train.heads import Head

    config.lora.r = rank
    frozen = FrozenHeads("random", 0.25, 0, "most", None, None, 4, (Head(0, 1),))
    tune(config, tiny_checkpoints["vlm"], pairs[:8], tmp_path / "policy", 1, frozen)
    start, tuned = (load_policy(f)[0] for f in (tiny_checkpoints["vlm"], tmp_path / "policy"))
    attentions = [model.model.language_model.layers[0].self_attn for model in (start, tuned)]
    size = attentions[0].head_dim
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        parts = [getattr(attention, name).weight for attention in attentions]
        before, after = (p.T if name == "o_proj" else p for p in parts)
        assert torch.equal(before[size:], after[size:])
        assert not torch.equal(before[:size], after[:size])
