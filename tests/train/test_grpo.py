"""The trainer: TRL's members that it relies on, and the numbers that go into the loss."""

import inspect
import itertools
import math

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from environments.episode import SearchEnvironment
from train import scoring, trim
from train.grpo import shuffled_groups
from train.policy import load_policy
from train.resume import state_name
from train.vision import EncodedImage

REWARDS = {"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1}
TOLERANCE = 1e-5


def right_half_the_time(question, turn):
    """Asks for the picture, then answers right or wrong by turns: every group has a signal."""
    if turn == 0 and question["image"] is not None:
        return "<think> a </think> <search> <img> </search>"
    word = "Paris" if next(_answers) % 2 else "Rome"
    return f"<think> b </think> <answer> {word} </answer>"


_answers = itertools.count()


def batch_of(trainer, n=16):
    rows = [trainer.train_dataset[i // 4] for i in range(n)]
    trainer.model.train()
    return trainer._generate_and_score_completions(rows)


# ---------------------------------------------------------------- contract with TRL


def test_trl_members_that_are_overridden_have_the_known_signatures():
    names = list(inspect.signature(GRPOTrainer._generate).parameters)
    assert names == ["self", "prompts"]
    names = set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert {
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "mm_token_type_ids",
    } <= names
    assert list(inspect.signature(GRPOTrainer.compute_loss).parameters)[1:] == [
        "model",
        "inputs",
        "return_outputs",
        "num_items_in_batch",
    ]
    names = list(inspect.signature(GRPOTrainer._calculate_rewards).parameters)
    assert names == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    for name in ("_save_checkpoint", "_load_optimizer_and_scheduler", "evaluate", "log"):
        assert callable(getattr(GRPOTrainer, name))
    # the steps are made by it, and it is left alone when there are none to make
    assert "self._run_epoch(" in inspect.getsource(GRPOTrainer._inner_training_loop)


def test_trl_still_unpacks_the_eight_values_in_our_order():
    source = "".join(inspect.getsource(GRPOTrainer._generate_and_score_completions).split())
    assert (
        "(prompt_ids_list,completion_ids_list,tool_mask_list,completions,"
        "sampling_per_token_logps_list,extra_fields,images,tool_images,)=self._generate(prompts)"
    ) in source
    # without tools TRL leaves pictures alone
    assert "ifself.toolsandany(imgsforimgsintool_images)andself._is_vlm:" in source


def test_trl_still_rolls_out_when_a_buffer_is_used_up():
    source = "".join(inspect.getsource(GRPOTrainer._prepare_inputs).split())
    assert "generate_every=self.args.steps_per_generation*self.num_iterations" in source
    assert "ifself._step%generate_every==0orself._buffered_inputsisNone:" in source
    assert "self._buffered_inputs[self._step%self.args.steps_per_generation]" in source


def test_trl_still_masks_observations_with_the_tool_mask():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert 'completion_mask * inputs["tool_mask"]' in source
    assert 'inputs.get("old_per_token_logps")' in source


def test_trl_carries_lists_beside_tensors_through_shuffle_and_split():
    batch = {"prompt_ids": torch.arange(4), "pictures": [[0], [1], [2], [3]]}
    shuffled = shuffle_sequence_dict(batch)
    assert [p[0] for p in shuffled["pictures"]] == shuffled["prompt_ids"].tolist()
    halves = split_tensor_dict(batch, 2)
    assert halves[1]["pictures"] == [[2], [3]]


# ---------------------------------------------------------------- numbers of the loss


def _trl_reference(trainer, batch):
    """TRL's own forward on the same batch: all pictures, mm_token_type_ids, padded rows."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    pictures = [picture for row in batch["pictures"] for picture in row]
    trainer.model.model.rope_deltas = None
    return GRPOTrainer._get_per_token_logps_and_entropies(
        trainer,
        trainer.model,
        ids,
        mask,
        batch["completion_ids"].shape[1],
        compute_entropy=True,
        pixel_values=torch.cat([p.pixel_values for p in pictures]),
        image_grid_thw=torch.tensor([p.grid for p in pictures]),
        num_images=[len(row) for row in batch["pictures"]],
        mm_token_type_ids=(ids == trainer.engine.image_token_id).int(),
    )


def _grads(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("max_logits", "checkpointing"),
    [(2**26, False), (0, False), (2**26, True)],
    ids=["whole logits", "chunked head", "activation checkpointing"],
)
def test_our_forward_equals_trls_in_logprobs_entropies_and_gradients(
    make_trainer, mixed_script, monkeypatch, max_logits, checkpointing
):
    monkeypatch.setattr(scoring, "MAX_LOGITS", max_logits)
    trainer = make_trainer(script=mixed_script, temperature=0.8)
    batch = batch_of(trainer)
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
        assert trim.recomputes(trainer.model.model)
    assert any(len(row) > 1 for row in batch["pictures"])
    policy_mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    expected, expected_entropy, _ = _trl_reference(trainer, batch)
    # weights that differ by row and token, and an entropy part, so that a mix-up would show
    weight = torch.linspace(-1, 1, policy_mask.numel()).view(policy_mask.shape) * policy_mask
    (expected * weight + 0.1 * expected_entropy * policy_mask).sum().backward()
    expected_grads = _grads(trainer.model)
    trainer.model.zero_grad()
    batch["advantages"] = torch.ones(16)
    trainer._loss_inputs = batch
    trainer._entropy_bonus_enabled = True
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True
    )
    (logps * weight + 0.1 * entropies).sum().backward()
    assert torch.allclose(logps[policy_mask], expected[policy_mask], atol=1e-5)
    assert torch.allclose(entropies[policy_mask], expected_entropy[policy_mask], atol=1e-5)
    assert (logps[~policy_mask] == 0).all()
    grads = _grads(trainer.model)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, expected_grads[name], rtol=1e-3, atol=1e-4), name


def test_sampling_logprobs_equal_training_logprobs(make_trainer, mixed_script):
    trainer = make_trainer(script=mixed_script, temperature=0.8)
    batch = batch_of(trainer)
    batch["advantages"] = torch.ones(16)
    trainer.compute_loss(trainer.model, batch)
    (largest,) = trainer._metrics["train"]["sampling/logp_difference_max"]
    assert 0 < largest < TOLERANCE


def test_only_tokens_of_the_policy_count(make_trainer, mixed_script):
    trainer = make_trainer(script=mixed_script)
    batch = batch_of(trainer)
    counted = (batch["completion_mask"] * batch["tool_mask"]).sum(dim=1)
    expected = [t.n_policy_tokens for t in trainer.last_trajectories]
    assert counted.tolist() == expected
    assert batch["num_items_in_batch"].item() == sum(expected)


def test_the_loss_does_not_depend_on_what_an_observation_token_is_predicted_to_be(
    make_trainer, mixed_script
):
    """Mutating the recorded mask must change the loss; otherwise the mask would do nothing."""
    trainer = make_trainer(script=mixed_script)
    batch = batch_of(trainer)
    batch["advantages"] = torch.linspace(-1, 1, 16)
    loss = trainer.compute_loss(trainer.model, batch)
    unmasked = {**batch, "tool_mask": torch.ones_like(batch["tool_mask"])}
    assert not torch.isclose(loss, trainer.compute_loss(trainer.model, unmasked))


def test_a_group_with_mixed_rewards_gets_advantages_and_moves_the_policy(make_trainer):
    trainer = make_trainer(script=right_half_the_time)
    before = trainer.model.model.language_model.layers[0].mlp.up_proj.weight.clone()
    trainer.train()
    (line,) = trainer.metric_lines
    assert line["frac_reward_zero_std"] < 1.0
    assert line["grad_norm"] > 0
    assert not torch.equal(before, trainer.model.model.language_model.layers[0].mlp.up_proj.weight)


def test_reward_parts_and_search_rates_are_logged_one_by_one(make_trainer):
    trainer = make_trainer(script=right_half_the_time)
    trainer.train()
    (line,) = trainer.metric_lines
    accuracy = line["rewards/accuracy/mean"]
    assert 0 < accuracy < 1
    # total = accuracy * (1 - penalty) + 0.1 * format; the penalty of a right answer is 0.1
    expected = accuracy - line["rewards/search_penalty/mean"] + 0.1 * line["rewards/format/mean"]
    assert line["reward"] == pytest.approx(expected, abs=1e-6)
    assert line["search/rate_text"] == 0.0
    assert 0 < line["search/rate_image"] <= 1.0
    assert line["search/calls_per_episode"] == line["search/rate_image"]
    assert line["stop/answer"] == 1.0
    assert {"stop/length", "time/rollout_s", "time/decode_s", "time/loss_s"} <= line.keys()


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_the_spread_of_rewards_is_that_of_all_groups_together(make_trainer, scale):
    """TRL's, as docs/metrics.md has it: over the episodes of the step, not within groups."""

    def by_question(question, turn):
        word = "Paris" if int(question["id"][1:]) % 2 else "Rome"
        return f"<think> b </think> <answer> {word} </answer>"

    trainer = make_trainer(script=by_question, scale_rewards=scale)
    batch_of(trainer, n=8)
    metrics = trainer._metrics["train"]
    totals = torch.tensor([t.rewards["total"] for t in trainer.last_trajectories])
    assert totals.view(2, 4).std(dim=1).max() < 1e-6
    assert metrics["reward_std"] == [pytest.approx(totals.std().item())]
    assert metrics["reward_std"][0] > 0.5  # 0.1 and 1.1
    assert metrics["frac_reward_zero_std"] == [1.0]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_move_nothing_whatever_rounding_makes_of_their_mean(
    make_trainer, scale, aggregation
):
    """In fp32 the mean of sixteen times 0.1 is not 0.1, and Adam makes a whole step of that."""

    def wrong(question, turn):
        return "<think> b </think> <answer> Rome </answer>"

    trainer = make_trainer(
        script=wrong, num_generations=16, per_device_train_batch_size=16, max_steps=1,
        gradient_accumulation_steps=1, learning_rate=1e-3, scale_rewards=scale,
        multi_objective_aggregation=aggregation,
    )  # fmt: skip
    assert torch.full((16,), 0.1).mean() != torch.tensor(0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    (line,) = trainer.metric_lines
    assert line["frac_reward_zero_std"] == 1.0
    assert line["grad_norm"] == 0.0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert {a for t in trainer.last_trajectories for a in t.advantages} == {0.0}


def test_an_episode_with_a_broken_tool_is_neither_rewarded_nor_punished(make_trainer):
    class Broken:
        in_memory = True

        def search(self, queries, k):
            raise RuntimeError("down")

    def script(question, turn):
        return "<think> a </think> <search> <img> </search>" if turn == 0 else None

    trainer = make_trainer(script=script, environment=SearchEnvironment(Broken(), Broken()))
    batch = batch_of(trainer, n=4)
    assert all(t.rewards["total"] is None for t in trainer.last_trajectories)
    assert batch["advantages"].tolist() == [0.0] * 4
    assert math.isnan(trainer._metrics["train"]["reward"][0])


class BrokenIndex:
    in_memory = True

    def search(self, queries, k):
        raise RuntimeError("down")


def search_until_it_is_over(question, turn):
    """One picture search that works, three text searches, then an answer, right or wrong by turns.

    Every fourth episode does not search at all and is wrong.
    """
    if turn == 0 and next(_answers) % 4 == 0:
        return "<think> a </think> <answer> Rome </answer>"
    if turn == 0:
        return "<think> a </think> <search> <img> </search>"
    if turn <= 3:
        return "<think> b </think> <search> capital of France </search>"
    word = "Paris" if next(_answers) % 2 else "Rome"
    return f"<think> c </think> <answer> {word} </answer>"


@pytest.mark.parametrize("fault", ["mask", "score"])
def test_after_three_failures_in_a_row_nothing_is_learnt_and_nothing_blamed(
    make_trainer, environment, fault
):
    world = SearchEnvironment(BrokenIndex(), environment.image_index, text_searches=5, max_turns=6)
    trainer = make_trainer(
        script=search_until_it_is_over,
        environment=world,
        rewards={**REWARDS, "infrastructure_fault": fault},
    )
    batch = batch_of(trainer)
    counted = (batch["completion_mask"] * batch["tool_mask"]).sum(dim=1).tolist()
    fatal = [t.fatal_turn is not None for t in trainer.last_trajectories]
    assert 0 < sum(fatal) < len(fatal)
    for trajectory, n_counted, is_fatal in zip(
        trainer.last_trajectories, counted, fatal, strict=True
    ):
        assert trajectory.rewards["total"] is not None
        is_cut = is_fatal and fault == "mask"
        first = len(trajectory.turns[0].token_ids)
        assert n_counted == (first if is_cut else trajectory.n_policy_tokens)
    blamed = [a < 0 for a, is_fatal in zip(batch["advantages"], fatal, strict=True) if is_fatal]
    assert any(blamed) == (fault == "score")
    # the others are judged beside them as ever
    assert any(
        a < 0 for a, is_fatal in zip(batch["advantages"], fatal, strict=True) if not is_fatal
    )
    assert trainer._metrics["train"]["search/fatal_rate"][0] == sum(fatal) / len(fatal)


def test_truncated_episodes_can_be_left_out_of_the_loss(make_trainer):
    trainer = make_trainer(mask_truncated_completions=True, max_completion_length=6)
    batch = batch_of(trainer, n=8)
    masks = (batch["completion_mask"] * batch["tool_mask"]).sum(dim=1)
    for trajectory, counted in zip(trainer.last_trajectories, masks, strict=True):
        assert (counted == 0) == (trajectory.stop_reason == "length")


def test_rows_without_a_gradient_are_not_read_and_change_nothing(make_trainer, monkeypatch):
    trainer = make_trainer(script=right_half_the_time)
    batch = batch_of(trainer)
    batch["advantages"] = torch.tensor([0.0, 0.0, 1.0, -0.5] * 4)
    batch["tool_mask"][2] = 0  # as of an episode that was cut
    read = []
    count = trainer._count_buckets
    monkeypatch.setattr(trainer, "_count_buckets", lambda n: read.append(n) or count(n))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    spared = _grads(trainer.model)
    trainer.model.zero_grad()
    monkeypatch.setattr(trainer, "_rows_to_score", lambda inputs: torch.arange(16))
    full = trainer.compute_loss(trainer.model, batch)
    full.backward()
    assert read == [7, 16]
    assert torch.isclose(loss, full, atol=1e-7)
    for name, grad in _grads(trainer.model).items():
        assert torch.allclose(grad, spared[name], atol=1e-6), name
    entropy, same_entropy = trainer._metrics["train"]["entropy"]
    assert entropy == pytest.approx(same_entropy, abs=1e-5)


def test_a_batch_without_any_gradient_still_touches_every_parameter(make_trainer):
    trainer = make_trainer(script=right_half_the_time)
    batch = batch_of(trainer)
    batch["advantages"] = torch.zeros(16)
    trainer.compute_loss(trainer.model, batch).backward()
    grads = _grads(trainer.model)
    assert grads.keys() == {name for name, _ in trainer.model.named_parameters()}
    assert all((grad == 0).all() for grad in grads.values())


def test_more_buckets_than_rows_do_not_count_a_row_twice(make_trainer, mixed_script):
    trainer = make_trainer(script=mixed_script)
    batch = batch_of(trainer)
    batch["advantages"] = torch.tensor([0.0] * 14 + [1.0, -1.0])
    losses, grads = [], []
    for n_buckets in (1, 5):
        trainer._count_buckets = lambda n, n_buckets=n_buckets: n_buckets
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        grads.append(_grads(trainer.model))
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_a_text_only_batch_still_runs_the_vision_tower(make_trainer, questions):
    """Under ZeRO a process that skips the tower would wait for the others for ever."""
    for question in questions:
        question["image"] = None
    trainer = make_trainer(script=right_half_the_time)
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, batch).backward()
    grads = [p.grad for p in trainer.model.model.visual.parameters()]
    assert all(grad is not None and (grad == 0).all() for grad in grads)


def first_update(trainer, answers):
    """Metrics of one optimizer step, and the weights after it."""
    answers.count = itertools.count()
    trainer.train()
    (line,) = trainer.metric_lines
    return line, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def answers(question, turn):
    """Asks for the picture, then answers right every third time."""
    if turn == 0 and question["image"] is not None:
        return "<think> a </think> <search> <img> </search>"
    word = "Rome" if next(answers.count) % 3 else "Paris"
    return f"<think> b </think> <answer> {word} </answer>"


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_one_pass_of_sixteen_rows_equals_eight_passes_of_two(
    make_trainer, tiny_checkpoints, loss_type
):
    steps = []
    for rows, n_passes in ((16, 1), (2, 8)):
        trainer = make_trainer(
            script=answers,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=n_passes,
            loss_type=loss_type,
            optim="sgd",  # Adam would make a sign of what is rounding
        )
        trainer.model.load_state_dict(load_policy(tiny_checkpoints["vlm"])[0].state_dict())
        steps.append(first_update(trainer, answers))
    (one, weights), (many, same_weights) = steps
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(many["grad_norm"], rel=1e-4)
    assert one["grad_norm"] > 0
    for name, weight in weights.items():
        assert torch.allclose(weight, same_weights[name], atol=1e-6), name


def test_the_micro_batches_of_a_rollout_hold_whole_groups(make_trainer):
    trainer = make_trainer(
        script=right_half_the_time, per_device_train_batch_size=2, steps_per_generation=8
    )
    trainer.model.train()
    rows = [trainer.train_dataset[i // 4] for i in range(16)]
    parts = []
    for step in range(8):
        trainer._step = step
        parts.append(trainer._prepare_inputs(rows))
    assert trainer.engine.n_rollouts == 1
    prompts = [{row[0].key for row in part["pictures"]} for part in parts]
    assert [len(one) for one in prompts] == [1] * 8
    assert prompts[::2] == prompts[1::2]  # a group of four is two parts
    assert len(set.union(*prompts)) == 4


def test_groups_are_shuffled_whole_and_may_be_cut_at_the_ends():
    questions = [7, 3, 3, 3, 5, 5]
    orders = {tuple(shuffled_groups(questions).tolist()) for _ in range(100)}
    assert orders == {
        tuple(i for group in order for i in group)
        for order in itertools.permutations([(0,), (1, 2, 3), (4, 5)])
    }


def test_the_shared_prefix_changes_neither_loss_nor_gradient_norm(
    make_trainer, tiny_checkpoints, monkeypatch
):
    steps, shared = [], []
    original = scoring._read_prompts
    monkeypatch.setattr(
        scoring, "_read_prompts", lambda *args: shared.append(True) or original(*args)
    )
    for is_shared in (True, False):
        if not is_shared:
            monkeypatch.setattr(scoring, "why_not_shared", lambda model: "a test says so")
        trainer = make_trainer(script=answers)
        trainer.model.load_state_dict(load_policy(tiny_checkpoints["vlm"])[0].state_dict())
        steps.append(first_update(trainer, answers)[0])
        assert shared == [True]
    one, other = steps
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_a_loss_that_is_no_number_leaves_the_next_ones_alone(make_trainer):
    trainer = make_trainer()
    trainer._tr_loss = torch.tensor(float("nan"))
    trainer.state.global_step = 1
    trainer.log({"loss": float("nan")})
    assert trainer._tr_loss.item() == 0.0


def test_a_prompt_that_cannot_be_shared_is_said_once_with_the_reason(make_trainer, caplog):
    trainer = make_trainer(script=right_half_the_time)
    batch = batch_of(trainer)
    batch["advantages"] = torch.ones(16)
    trainer.model.activation_checkpointing_enable()
    with caplog.at_level("INFO", logger="train.scoring"):
        trainer.compute_loss(trainer.model, batch)
        trainer.compute_loss(trainer.model, batch)
    assert [r.message for r in caplog.records if "prompt" in r.message] == [
        "every row reads its whole prompt: activation checkpointing throws keys and values away "
        "(grpo.activation_checkpointing: false shares the prompts of a group)"
    ]


# ---------------------------------------------------------------- variants


def test_several_passes_over_a_rollout_use_its_own_old_logprobs(make_trainer):
    trainer = make_trainer(
        script=right_half_the_time,
        num_iterations=2,
        steps_per_generation=2,
        per_device_train_batch_size=8,
        max_steps=4,
    )
    trainer.train()
    first, *later = trainer.metric_lines
    assert trainer.engine.n_rollouts == 1
    assert first["sampling/logp_difference_max"] < TOLERANCE
    assert later[-1]["sampling/logp_difference_max"] > TOLERANCE  # the policy has moved


def test_a_reference_policy_gives_a_kl_of_zero_at_the_start(make_trainer):
    trainer = make_trainer(script=right_half_the_time, beta=0.1, max_steps=2)
    trainer.train()
    first, second = trainer.metric_lines
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl"] > 0


def test_lora_trains_the_adapter_alone(make_trainer):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(script=right_half_the_time, peft_config=adapter, max_steps=2)
    trainer.train()
    assert trainer.metric_lines[0]["sampling/logp_difference_max"] < TOLERANCE
    assert trainer.metric_lines[1]["grad_norm"] > 0
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.2), ("generation_kwargs", {"a": 1})],
)
def test_sampling_settings_that_would_do_nothing_are_refused(make_trainer, setting, value):
    with pytest.raises(ValueError, match=setting):
        make_trainer(**{setting: value})


def test_a_buffer_that_was_saved_on_another_card_comes_to_this_ones_own(
    make_trainer, monkeypatch, tmp_path
):
    trainer = make_trainer()
    picture = EncodedImage("key", torch.ones(4, 2), (1, 2, 2), 1)
    buffer = [{"advantages": torch.arange(4.0), "pictures": [[picture]]}]
    state = {**trainer.rollout_state(), "buffer": buffer}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("torch.serialization.location_tag", lambda storage: "cuda:5")
        torch.save(state, tmp_path / state_name(0))
    trainer._load_optimizer_and_scheduler(str(tmp_path))
    [batch] = trainer._buffered_inputs
    assert batch["advantages"].device == trainer.args.device
    assert torch.equal(batch["advantages"], torch.arange(4.0))
    assert torch.equal(batch["pictures"][0][0].pixel_values, picture.pixel_values)
