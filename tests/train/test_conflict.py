"""The conflict map: against slow references, a planted conflict, and the objectives behind it."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from configs.errors import ConfigError
from configs.schema import load_config
from train.conflict import (
    ConflictMap,
    conflict_score,
    diagnose,
    head_cosines,
    head_products,
    head_sensitivity,
    only_attention,
    ranks,
    sum_gradients,
    total_loss,
)
from train.heads import Head, attention_modules, head_layout
from train.objectives import episode_losses, group_advantages, keep_objective, search_objective

HEADS, GROUPS, DIM = 4, 2, 6


def gqa_model(seed=0, groups=GROUPS):
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=HEADS * DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        vocab_size=32,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # biases start at 0, where they would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_losses(model, seed, n=4):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(32, (2, 9), generator=generator) for _ in range(n)]
    return [lambda ids=ids: model(input_ids=ids, labels=ids).loss for ids in rows]


def slow_vector(gradients, layer, head):
    """A head's numbers one by one, from the whole gradient by name."""
    prefix, group = f"model.layers.{layer}.self_attn.", head // (HEADS // GROUPS)
    rows, shared = range(head * DIM, (head + 1) * DIM), range(group * DIM, (group + 1) * DIM)
    numbers = []
    for row in rows:
        numbers += gradients[f"{prefix}q_proj.weight"][row].tolist()
        numbers.append(gradients[f"{prefix}q_proj.bias"][row].item())
        numbers += [line[row].item() for line in gradients[f"{prefix}o_proj.weight"]]
    for row in shared:
        for name in ("k_proj", "v_proj"):
            numbers += gradients[f"{prefix}{name}.weight"][row].tolist()
            numbers.append(gradients[f"{prefix}{name}.bias"][row].item())
    return torch.tensor(numbers, dtype=torch.float64)


def test_head_gradients_equal_a_slow_autograd_reference():
    model = gqa_model()
    layout = head_layout(model.config)
    search, keep = token_losses(model, 1), token_losses(model, 2)
    found = diagnose(model, layout, search, keep)

    names = dict(model.named_parameters())
    slow = []
    for losses in (search, keep):
        total = sum(loss() for loss in losses)
        values = torch.autograd.grad(total, list(names.values()))
        slow.append(dict(zip(names, values, strict=True)))
    for layer, head in layout.heads():
        g, k = (slow_vector(gradients, layer, head) for gradients in slow)
        # 24 + 1 + 24 numbers a query row, 2 x 25 a row of its key-value head
        assert len(g) == DIM * 49 + DIM * 50
        cosine = torch.nn.functional.cosine_similarity(g, k, dim=0)
        assert found.cosine[layer, head] == pytest.approx(cosine.item(), abs=1e-5)
        assert found.search_norm[layer, head] == pytest.approx(g.norm().item(), rel=1e-5)
        assert found.keep_norm[layer, head] == pytest.approx(k.norm().item(), rel=1e-5)


def test_halves_are_the_cosines_of_even_and_odd_batches():
    model = gqa_model()
    layout = head_layout(model.config)
    search, keep = token_losses(model, 1), token_losses(model, 2)
    found = diagnose(model, layout, search, keep)
    even = diagnose(model, layout, search[::2], keep[::2])
    odd = diagnose(model, layout, search[1::2], keep[1::2])
    assert torch.allclose(found.halves[0], even.cosine, atol=1e-6)
    assert torch.allclose(found.halves[1], odd.cosine, atol=1e-6)
    assert not torch.allclose(found.halves[0], found.halves[1], atol=1e-3)


def test_the_model_is_as_before():
    model = gqa_model().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    diagnose(model, head_layout(model.config), token_losses(model, 1), token_losses(model, 2))
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "lm_head.weight")


def test_a_planted_conflict_is_found():
    """Two losses of the heads' own outputs in the last layer, with opposite signs in two heads.

    The output z_h of a head of the last layer depends on its own q, k and v alone, so L_keep =
    -sum_h <u_h, z_h> there is -L_search: cosine -1 in the planted heads and +1 in the others.
    """
    model = gqa_model(groups=HEADS)
    layout = head_layout(model.config)
    planted = {1, 2}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32, (2, 9), generator=generator)
    directions = torch.randn(HEADS, DIM, generator=generator)
    signs = torch.tensor([-1.0 if head in planted else 1.0 for head in range(HEADS)])
    seen = []
    _, last = attention_modules(model, layout)[1]
    last.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def loss(weights):
        seen.clear()
        model(ids)
        outputs = seen[0].unflatten(-1, (HEADS, DIM)).mean(dim=(0, 1))
        return (weights[:, None] * directions * outputs).sum()

    ones = torch.ones(HEADS)
    found = diagnose(model, layout, [lambda: loss(ones)], [lambda: loss(signs)])
    for head in range(HEADS):
        expected = -1.0 if head in planted else 1.0
        assert found.cosine[1, head] == pytest.approx(expected, abs=1e-4)
        assert found.opposition[1, head] == pytest.approx(float(head in planted), abs=1e-4)
    # every head is as sensitive as the next, so that opposition decides
    found.sensitivity = torch.ones(2, HEADS)
    found.cosine[0] = 1.0
    score = conflict_score(found, "ranks").flatten()
    assert sorted(score.topk(2).indices.tolist()) == [HEADS + 1, HEADS + 2]


def test_sensitivity_is_the_rise_of_the_loss_without_the_heads_columns():
    model = gqa_model().eval()
    layout = head_layout(model.config)
    losses = token_losses(model, 3, n=2)
    attentions = [attention for _, attention in attention_modules(model, layout)]
    found = head_sensitivity(attentions, layout, losses)
    before = total_loss(losses)
    for layer, head in layout.heads():
        weight = attentions[layer].o_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[:, head * DIM : (head + 1) * DIM] = 0
            after = total_loss(losses)
            weight.copy_(kept)
        assert found[layer, head] == pytest.approx(after - before, abs=1e-5)
    assert found.abs().max() > 1e-3


def test_a_head_without_a_gradient_has_no_opposition():
    model = gqa_model()
    layout = head_layout(model.config)
    attentions = [attention for _, attention in attention_modules(model, layout)]
    with only_attention(model, attentions):
        some = sum_gradients(attentions, token_losses(model, 1))
        none = sum_gradients(attentions, [])
        assert torch.equal(head_cosines(attentions, layout, some, none), torch.zeros(2, HEADS))
        assert (head_products(attentions, layout, none, none) == 0).all()
        own = head_cosines(attentions, layout, some, some)
    assert torch.allclose(own, torch.ones(2, HEADS, dtype=torch.float64), atol=1e-9)


def test_ranks_by_hand():
    # 1 and 1 share places 1 and 2
    values = torch.tensor([[3.0, 1.0], [1.0, 5.0]])
    assert ranks(values).tolist() == [[0.75, 0.375], [0.375, 1.0]]


def test_scores_by_hand():
    zeros = torch.zeros(1, 3)
    found = ConflictMap(
        cosine=torch.tensor([[-0.5, 0.3, -0.1]], dtype=torch.float64),
        halves=torch.zeros(2, 1, 3),
        search_norm=zeros,
        keep_norm=zeros,
        sensitivity=torch.tensor([[-0.2, 2.0, 1.0]], dtype=torch.float64),
        keep_loss=1.0,
    )
    assert found.opposition.tolist() == [[0.5, 0.0, 0.1]]
    # ranks of opposition 3, 1, 2 and of sensitivity 1, 3, 2, of three
    assert conflict_score(found, "ranks").flatten().tolist() == pytest.approx([3 / 9, 3 / 9, 4 / 9])
    # a head that perception is better off without is no conflict
    assert conflict_score(found, "product").flatten().tolist() == pytest.approx([0.0, 0.0, 0.1])
    assert conflict_score(found, "opposition").flatten().tolist() == [0.5, 0.0, 0.1]
    assert conflict_score(found, "sensitivity").flatten().tolist() == [-0.2, 2.0, 1.0]


def test_advantages_of_groups_by_hand():
    # group 1: mean 0.5, std sqrt(0.5) of two; group 2 is all equal; in group 3 one has no score,
    # which leaves 0 and 1
    found = group_advantages([1.0, 0.0, 0.1, 0.1, 1.0, None], 2)
    high = 0.5 / (0.5**0.5 + 1e-4)
    assert found == pytest.approx([high, -high, 0.0, 0.0, 0.0, 0.0], abs=1e-6)
    found = group_advantages([1.0, 0.0, None], 3)
    assert found == pytest.approx([high, -high, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("scale", "divisor"),
    [
        ("group", 2**0.5 + 1e-4),  # of 2 and 0
        (True, 2**0.5 + 1e-4),
        ("batch", 1.0 + 1e-4),  # of 2, 0, 0, 0: mean 1/2, squares 9/4 and three of 1/4, over 3
        ("none", 1.0),
        (False, 1.0),
    ],
)
def test_advantages_are_scaled_as_training_scales_them(scale, divisor):
    found = group_advantages([2.0, 0.0, 0.0, 0.0], 2, scale)
    assert found == pytest.approx([1 / divisor, -1 / divisor, 0.0, 0.0], abs=1e-6)


# ---------------------------------------------------------------- objectives


def test_the_losses_of_episodes_are_their_log_probs(make_engine, questions, full_forward):
    """Sum over batches of -w log pi / n, against one plain forward an episode."""
    engine = make_engine()
    episodes = engine.rollout(questions[:4])
    weights = torch.tensor([1.0, -0.5, 2.0, 0.25])
    losses, n_tokens = episode_losses(
        engine.model, engine, episodes, weights, temperature=1.0, batch_size=64
    )
    assert len(losses) == 2  # halves, although one batch would hold all
    expected = 0.0
    for episode, weight in zip(episodes, weights, strict=True):
        logps, is_policy = full_forward(engine, episode)
        expected -= float(weight * logps[is_policy].sum())
    assert n_tokens == sum(episode.n_policy_tokens for episode in episodes)
    engine.model.eval()
    assert total_loss(losses) == pytest.approx(expected / n_tokens, abs=1e-4)


def settings(tmp_path, init, *overrides):
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"output: {tmp_path}\nmodels: {{init: {init}, vlm: {init}}}\n"
        "environment: {train_size: 8, kinds: [two]}\n"
        "conflict: {search_questions: 4, group_size: 2, keep_questions: 4}\n"
        "grpo: {max_completion_length: 60, generation_kwargs: {max_new_tokens: 12}}\n"
    )
    return load_config(path, overrides)


def test_objectives_without_a_gradient_are_refused(policy, tiny_checkpoints, tmp_path):
    """A random policy gets one reward everywhere and answers nothing right."""
    config = settings(tmp_path, tiny_checkpoints["vlm"])
    with pytest.raises(ConfigError, match=r"conflict\.search: .*no policy gradient"):
        search_objective(config, *policy)
    with pytest.raises(ConfigError, match=r"answers none of 4 questions right"):
        keep_objective(config, *policy)
    with pytest.raises(ConfigError, match=r"models\.agent: missing"):
        search_objective(
            settings(tmp_path, tiny_checkpoints["vlm"], "conflict.search=agent"), *policy
        )


def test_the_search_objective_has_the_rewards_and_masks_of_training(
    policy, tiny_checkpoints, tmp_path
):
    path = tmp_path / "mine.py"
    path.write_text("def place(trajectories):\n    return list(range(len(trajectories)))\n")
    config = settings(
        tmp_path, tiny_checkpoints["vlm"],
        f"reward_functions=[{{function: '{path}:place', weight: 1}}]",
    )  # fmt: skip
    found = search_objective(config, *policy)
    assert (found.n_episodes, found.n_asked) == (8, 8)
    config.grpo["mask_truncated_completions"] = True
    with pytest.raises(ConfigError, match=r"or are masked"):  # a random policy never ends
        search_objective(config, *policy)


def test_the_trios_objectives_are_the_vlms_answers_and_the_agents_searches(tmp_path):
    from train.policy import load_policy

    config = settings(
        tmp_path, "atlas://vlm", "models.agent=atlas://agent", "conflict.search=agent",
        "grpo.max_completion_length=320", "grpo.generation_kwargs.max_new_tokens=40",
        "conflict.search_questions=6", "conflict.keep_questions=12",
    )  # fmt: skip
    from configs.schema import resolve_model

    model, processor = load_policy(resolve_model("atlas://vlm"))
    search, keep = (make(config, model, processor) for make in (search_objective, keep_objective))
    assert 0 < search.n_episodes <= 6
    assert search.n_asked == 6
    assert 0 < keep.n_episodes <= 12
    # the VLM's own words are likely to itself; it has never searched
    assert total_loss(keep.losses) < 0.5 < total_loss(search.losses)
    found = diagnose(model, head_layout(model.config), search.losses, keep.losses)
    assert found.keep_loss == pytest.approx(total_loss(keep.losses), abs=1e-6)
    assert (found.search_norm > 0).all()
    assert found.sensitivity[Head(0, 1)] > 0.1
