"""Decoding with packed weights and prompts read once: the numbers of the model's own forward."""

import pytest
import torch

from train import batch
from train.cache import SlotCache, slot_attention
from train.decode import can_decode_fast
from train.shared_prompts import SharedPrompts

TOLERANCE = 1e-5


def core_and_head(engine):
    return engine.model.model, engine.model.get_output_embeddings()


@pytest.mark.parametrize("group_size", [1, 3])
def test_fast_decoding_gives_the_tokens_and_logprobs_of_the_plain_forward(
    make_engine, questions, monkeypatch, group_size
):
    engine = make_engine(temperature=0.8)
    assert can_decode_fast(*core_and_head(engine))
    fast = engine.rollout_rows([q for q in questions for _ in range(group_size)], number=3)
    monkeypatch.setattr(batch, "can_decode_fast", lambda *_: False)
    plain = engine.rollout_rows([q for q in questions for _ in range(group_size)], number=3)
    for one, other in zip(fast, plain, strict=True):
        assert one.completion_ids == other.completion_ids
        difference = torch.tensor(one.completion_logprobs) - torch.tensor(other.completion_logprobs)
        assert difference.abs().max() < TOLERANCE


def test_an_adapter_or_another_dtype_decodes_with_the_models_own_forward(fresh_policy):
    from peft import LoraConfig, get_peft_model

    model, _ = fresh_policy
    assert can_decode_fast(model.model, model.lm_head)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert not can_decode_fast(adapted.base_model.model.model, model.lm_head)
    assert not can_decode_fast(model.to(torch.bfloat16).model, model.lm_head)


def test_the_next_rollout_decodes_with_the_weights_of_then(make_engine, fresh_policy, questions):
    model, _ = fresh_policy
    engine = make_engine(script=None)
    engine.model = model
    before = engine.rollout(questions[:2], group_size=2)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(-3.0)
    after = engine.rollout_rows([q for q in questions[:2] for _ in range(2)], number=0)
    assert [t.completion_ids for t in before] != [t.completion_ids for t in after]


def fill_cache(cache, prompts, n_prompt, n_own):
    """Rows with equal prompts get equal first slots, all else is noise."""
    n_rows, heads, dim = len(prompts), 2, 8
    width = n_prompt + n_own
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn((n_rows, heads, width, dim), generator=generator) for _ in range(2))
    for row, prompt in enumerate(prompts):
        first = prompts.index(prompt)
        keys[row, :, :n_prompt] = keys[first, :, :n_prompt]
        values[row, :, :n_prompt] = values[first, :, :n_prompt]
    slots = torch.arange(width).expand(n_rows, width)
    cache.select(n_rows, slots, width)
    return cache.update(keys, values, 0)


@pytest.mark.parametrize("prompts", [[0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1, 1, 2]])
@pytest.mark.parametrize("has_masks", [True, False])
def test_attention_over_shared_prompts_is_attention_over_whole_rows(prompts, has_masks):
    n_rows, n_prompt, n_own = len(prompts), 7, 5
    cache = SlotCache(n_rows, n_prompt + n_own)
    keys, values = fill_cache(cache, prompts, n_prompt, n_own)
    query = torch.randn((n_rows, 4, 8), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(n_rows) % n_own + n_prompt
    masks = (torch.arange(n_prompt + n_own) <= lengths[:, None])[:, None, None]
    masks = masks if has_masks else None
    expected, _ = slot_attention(None, query[:, :, None], keys, values, masks, scaling=0.3)
    leaders = torch.tensor([prompts.index(number) for number in range(max(prompts) + 1)])
    shared = SharedPrompts(cache, leaders, n_prompt)
    shared.arrange(prompts, n_rows)
    found = shared.attend(query, keys.transpose(2, 3), values, masks, 0.3, 0)
    assert torch.allclose(found, expected.flatten(1), atol=1e-6)


def test_prompts_without_rows_are_forgotten_and_those_of_waiting_rows_kept():
    prompts = [0, 0, 1, 2, 3]
    cache = SlotCache(5, 12)
    keys, values = fill_cache(cache, prompts, 7, 5)
    shared = SharedPrompts(cache, torch.tensor([0, 2, 3, 4]), 7)
    query = torch.randn((5, 4, 8), generator=torch.Generator().manual_seed(1))
    for rows, n_active in (([1, 3, 4], 2), ([3, 4], 1), ([4], 1)):
        shared.arrange([prompts[row] for row in rows], n_active)
        active = torch.tensor(rows[:n_active])
        found = shared.attend(
            query[active], keys[active].transpose(2, 3).contiguous(), values[active], None, 0.3, 0
        )
        expected, _ = slot_attention(
            None, query[active][:, :, None],
            keys[active].transpose(2, 3).contiguous().transpose(2, 3), values[active], None, 0.3,
        )  # fmt: skip
        assert torch.allclose(found, expected.flatten(1), atol=1e-6)
    assert len(shared._keys[0]) == 1
