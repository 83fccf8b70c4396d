"""The tiny family and its fine-tuning.

Heads that look back, exact labels, stages that repeat, a folder that loads anywhere.
"""

import itertools
import json
import random

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, Qwen2ForCausalLM

from environments.atlas.entities import load_entities
from environments.dialects import get_dialect
from train import trio, trio_data
from train.policy import PolicyLoadError, load_policy, load_processor
from train.sft import IGNORE, SFTCollator, SFTExample, SFTStage, run_stage
from train.tiny import make_tiny_checkpoints, point_heads_backwards, text_config, train_tokenizer
from train.trio_data import VLMMix, Writer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_tiny_checkpoints(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(trio_data.tokenizer_corpus())


@pytest.mark.parametrize("offset", [1, 2])
@torch.no_grad()
def test_a_pointed_head_attends_that_many_tokens_back(tokenizer, offset):
    n_tokens, n_frequencies, scale, head_dim = 40, 8, 4.0, 64
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(text_config(tokenizer, hidden=128, layers=1, intermediate=64)).eval()
    model.set_attn_implementation("eager")
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):  # only the biases speak
        projection.weight.zero_()
    point_heads_backwards(model, offsets=(offset,), n_frequencies=n_frequencies, scale=scale)
    token_ids = torch.randint(300, 2000, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    weights = model(input_ids=token_ids, output_attentions=True).attentions[0][0, 0]

    # score(n, m) = scale^2 / sqrt(head_dim) * sum_i cos(theta_i (n - m - offset))
    position = torch.arange(n_tokens)
    miss = (position[:, None] - position[None] - offset).float()
    theta = 10000.0 ** (-2.0 * torch.arange(n_frequencies) / head_dim)
    score = scale**2 / head_dim**0.5 * torch.cos(miss[..., None] * theta).sum(-1)
    is_future = position[None] > position[:, None]
    expected = score.masked_fill(is_future, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)

    back = position[offset:] - offset
    assert torch.equal(weights.argmax(-1)[offset:], back)
    assert weights[position[offset:], back].mean() > 0.5  # more than all other tokens together


def test_copies_are_learned_where_they_repeat_and_nowhere_else(tokenizer):
    example = trio_data.base_copy(Writer(tokenizer))(random.Random(3))
    learned = [t for t, label in enumerate(example.labels) if label != IGNORE]
    assert learned
    assert all(example.labels[t] == example.input_ids[t] for t in learned)
    for t in learned:  # the pair (previous, current) stood before
        pairs = zip(example.input_ids[: t - 1], example.input_ids[1:t], strict=True)
        assert (example.input_ids[t - 1], example.input_ids[t]) in set(pairs)


def test_agent_trajectories_hide_observations_from_the_loss(tokenizer):
    draw = trio_data.agent_search(Writer(tokenizer), ["France", "Spain"], get_dialect("search_r1"))
    for seed in range(20):
        example = draw(random.Random(seed))
        learned = tokenizer.decode([t for t in example.labels if t != IGNORE])
        assert "<information>" not in learned
        assert "<search>" in learned
        assert learned.endswith("</answer><|im_end|>")


def test_answers_stand_in_the_results_that_are_shown(tokenizer):
    draw = trio_data.agent_search(Writer(tokenizer), ["France", "Spain"], get_dialect("search_r1"))
    for seed in range(20):
        text = tokenizer.decode(draw(random.Random(seed)).input_ids)
        answer = text.split("<answer>")[-1].split("</answer>")[0].strip()
        assert answer in text.rsplit("<information>", 1)[1].split("</information>")[0]


def test_invented_facts_are_not_the_atlas_own(tokenizer):
    draw = trio_data.agent_search(Writer(tokenizer), ["France"], get_dialect("search_r1"))
    texts = [tokenizer.decode(draw(random.Random(seed)).input_ids) for seed in range(200)]
    asked = [t for t in texts if "capital of France </search>" in t]
    assert asked
    assert sum("<think> capital Paris </think>" in t for t in asked) <= 0.1 * len(asked)


def vlm_texts(tokenizer, n=400, **mix):
    names = [entity.name for entity in load_entities().values()]
    draw = trio_data.vlm_instructions(
        Writer(tokenizer), names, get_dialect("search_r1"), VLMMix(**mix)
    )
    return [
        tokenizer.decode([t for t in draw(random.Random(seed)).labels if t != IGNORE])
        for seed in range(n)
    ]


def test_format_samples_show_a_call_and_never_what_follows(tokenizer):
    calls = [t for t in vlm_texts(tokenizer, tool=0.5, tool_use="format") if "<search>" in t]
    assert 150 < len(calls) < 250
    for text in calls:
        thought, _, call = text.removeprefix("<think> ").partition(" </think> ")
        assert call in ("<search> <img> </search>", f"<search> {thought} </search>")


def test_tool_use_none_shows_no_call_and_whole_trajectories_end_in_an_answer(tokenizer):
    assert not any("<search>" in t for t in vlm_texts(tokenizer, tool_use="none"))
    whole = [t for t in vlm_texts(tokenizer, n=1000, tool_use="5") if "<search>" in t]
    assert 20 < len(whole) < 90
    assert all("<answer>" in t and " of " in t for t in whole)


def test_unseen_flags_are_never_shown_to_the_vlm(tokenizer):
    unseen = {e.name for e in load_entities().values() if not e.seen}
    thoughts = {
        t.split("<think>")[1].split("</think>")[0].strip()
        for t in vlm_texts(tokenizer, look=0, read=0, tool_use="none")
    }
    assert len(thoughts) > 100
    assert not thoughts & unseen


def test_an_unknown_level_of_tool_use_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"tool_use 'often'.*none, format"):
        trio_data.vlm_instructions(
            Writer(tokenizer), ["France"], get_dialect("search_r1"), VLMMix(tool_use="often")
        )


def test_the_collator_pads_labels_with_ignore_and_marks_pictures(folders):
    processor = load_processor(folders["vlm"])
    image_id = processor.image_token_id
    picture = Image.new("RGB", (56, 56))
    with_picture = SFTExample([5, *[image_id] * 4, 6], [IGNORE] * 5 + [6], [picture])
    batch = SFTCollator(processor)([with_picture, SFTExample([7, 8], [IGNORE, 8])])
    assert batch["labels"][1].tolist() == [IGNORE, 8] + [IGNORE] * 4
    assert batch["attention_mask"].sum(1).tolist() == [6, 2]
    assert batch["mm_token_type_ids"].sum().item() == 4
    assert batch["pixel_values"].shape == (16, 1176)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_the_same_stage_gives_the_same_weights_and_learns(folders, tmp_path):
    results = []
    for _ in range(2):
        model, tokenizer = load_policy(folders["base"])
        stage = SFTStage(
            "repeat",
            lambda rng: SFTExample([9, 10, 11, 12], [IGNORE, 10, 11, 12]),
            steps=30,
            batch_size=4,
            learning_rate=1e-2,
        )
        loss = run_stage(model, tokenizer, stage, tmp_path, log_every=10)
        results.append((loss, model.model.layers[0].mlp.up_proj.weight.detach().clone()))
    assert results[0][0] < 0.5
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("memory", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_what_saves_memory_learns_the_same(folders, tmp_path, monkeypatch, memory):
    """A token weighs the same in micro-batches of one row, whose rows learn five or one."""
    processor = load_processor(folders["vlm"])
    pad, picture = processor.image_token_id, Image.new("RGB", (56, 56), "red")
    learned = [6, 7, 8, 9, 10]
    long = SFTExample([5, *[pad] * 4, *learned], [IGNORE] * 5 + learned, [picture])
    short = SFTExample([11, 12], [IGNORE, 12])
    gradients = []

    def keep(trainer, model):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    monkeypatch.setattr("train.sft._SFTTrainer._clip_grad_norm", keep)
    losses = []
    for settings in ({}, memory):
        drawn = itertools.cycle([long, short])
        stage = SFTStage("rows", lambda _, rows=drawn: next(rows), 1, 4, **settings)
        model, _ = load_policy(folders["vlm"])
        losses.append(run_stage(model, processor, stage, tmp_path, log_every=1))
        assert not model.is_gradient_checkpointing
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is asked, not the processor")
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        (None, torch.float32),
    ],
)
def test_the_processor_computes_in_bf16_only_where_it_multiplies_in_it(
    folders, tmp_path, monkeypatch, flags, dtype
):
    """Emulated, a step takes longer than in fp32. None: a torch that does not say."""
    if flags is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    seen = set()
    model, tokenizer = load_policy(folders["base"])
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype)
    )
    stage = SFTStage("short", lambda rng: SFTExample([9, 10], [IGNORE, 10]), steps=1, batch_size=2)
    run_stage(model, tokenizer, stage, tmp_path, log_every=1)
    assert seen == {dtype}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_frozen_parameters_do_not_move(folders, tmp_path):
    model, tokenizer = load_policy(folders["base"])
    before = model.get_input_embeddings().weight.detach().clone()
    stage = SFTStage(
        "frozen",
        lambda rng: SFTExample([9, 10, 11], [IGNORE, 10, 11]),
        steps=3,
        batch_size=2,
        trainable=lambda name: "embed_tokens" not in name,
    )
    run_stage(model, tokenizer, stage, tmp_path)
    assert torch.equal(before, model.get_input_embeddings().weight)


def test_saved_folders_load_with_the_stock_classes(folders):
    model = AutoModelForImageTextToText.from_pretrained(folders["vlm"])
    assert AutoConfig.from_pretrained(folders["vlm"]).model_type == "qwen2_5_vl"
    tokenizer = AutoTokenizer.from_pretrained(folders["vlm"])
    ours = load_processor(folders["vlm"]).tokenizer
    text = "<|im_start|>user\nWhat is the capital of Côte d'Ivoire, 1960?<|im_end|>"
    assert tokenizer(text)["input_ids"] == ours(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_a_built_checkpoint_says_how_it_was_made(folders, tmp_path):
    settings = trio.TrioSettings(agent_steps=7, mix=VLMMix(tool_use="2"))
    trio._save(*load_policy(folders["base"]), tmp_path / "agent", settings)
    record = json.loads((tmp_path / "agent" / "training.json").read_text())
    assert record["stage"] == "agent"
    assert record["settings"]["agent_steps"] == 7
    assert record["settings"]["mix"]["tool_use"] == "2"


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(PolicyLoadError, match=r"no config\.json"):
        load_policy(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(PolicyLoadError, match=r"is a run folder; name .*checkpoint-STEP"):
        load_policy(tmp_path / "run")
