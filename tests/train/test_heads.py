"""Which numbers belong to a head, and which heads a training leaves alone."""

import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
)

from configs.errors import ConfigError
from configs.schema import load_config
from configs.sections import FreezeHeads
from train.frozen import check_same_heads, choose_heads, count_heads
from train.heads import Head, attention_modules, group_slices, head_layout, own_slices

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def gqa_model(model_type="qwen2"):
    torch.manual_seed(0)
    if model_type == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def test_slices_of_a_head_by_hand():
    """24 / 6 = 4 numbers a head; heads 0, 1, 2 read key-value head 0, heads 3, 4, 5 head 1."""
    layout = head_layout(gqa_model().config)
    assert (layout.n_layers, layout.n_heads, layout.n_kv_heads, layout.head_dim) == (2, 6, 2, 4)
    assert [layout.group_of(head) for head in range(6)] == [0, 0, 0, 1, 1, 1]
    assert list(layout.members(1)) == [3, 4, 5]
    cuts = {(c.projection, c.part, c.dim, c.start, c.stop) for c in own_slices(layout, 4)}
    assert cuts == {
        ("q_proj", "weight", 0, 16, 20), ("q_proj", "bias", 0, 16, 20),
        ("o_proj", "weight", 1, 16, 20),
    }  # fmt: skip
    cuts = {(c.projection, c.part, c.start, c.stop) for c in group_slices(layout, 1)}
    assert cuts == {(p, q, 4, 8) for p in ("k_proj", "v_proj") for q in ("weight", "bias")}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_head_without_its_slices_is_a_head_whose_output_is_off(model_type):
    """What reaches the residual stream from head h passes through its columns of o_proj alone."""
    from train.conflict import head_off

    model = gqa_model(model_type)
    layout = head_layout(model.config)
    ids = torch.arange(12)[None]
    for head in layout.heads():
        _, attention = attention_modules(model, layout)[head.layer]
        with head_off(attention, layout, head.head), torch.no_grad():
            masked = model(ids).logits
        kept = attention.o_proj.weight.detach().clone()
        [cut] = [c for c in own_slices(layout, head.head) if c.projection == "o_proj"]
        with torch.no_grad():
            attention.o_proj.weight[:, cut.start : cut.stop] = 0
            cut_off = model(ids).logits
            attention.o_proj.weight.copy_(kept)
            whole = model(ids).logits
        assert torch.allclose(masked, cut_off, atol=1e-6)
        assert (masked - whole).abs().max() > 1e-4


def test_queries_of_a_head_act_through_that_head_alone():
    """Other rows of q_proj change nothing once their heads are off."""
    from train.conflict import head_off

    model = gqa_model()
    layout = head_layout(model.config)
    _, attention = attention_modules(model, layout)[1]
    ids = torch.arange(12)[None]
    with head_off(attention, layout, 4), torch.no_grad():
        before = model(ids).logits
        attention.q_proj.weight[16:20] += 1.0
        assert torch.equal(model(ids).logits, before)
        attention.q_proj.weight[15] += 1.0
        assert not torch.equal(model(ids).logits, before)


def test_a_vlm_of_the_family_is_read_without_its_tower():
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32}
    config = Qwen3VLConfig(text_config={**SIZES, "head_dim": 8}, vision_config=vision)
    layout = head_layout(config)
    assert (layout.n_layers, layout.n_heads, layout.n_kv_heads, layout.head_dim) == (2, 6, 2, 8)


def test_the_tiny_vlm_has_its_language_heads_alone(policy):
    model, _ = policy
    layout = head_layout(model.config)
    names = [name for name, _ in attention_modules(model, layout)]
    assert names == [f"model.language_model.layers.{i}.self_attn" for i in range(layout.n_layers)]


def test_models_without_known_heads_are_refused():
    with pytest.raises(ConfigError, match=r"model_type 'llama' are not known; known are qwen2"):
        head_layout(LlamaConfig())
    with pytest.raises(ConfigError, match="6 query heads cannot share 4"):
        head_layout(Qwen2Config(**{**SIZES, "num_key_value_heads": 4}))
    model = gqa_model()
    layout = head_layout(Qwen2Config(**{**SIZES, "num_key_value_heads": 3}))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj: has \(8, 24\)"):
        attention_modules(model, layout)
    deeper = head_layout(Qwen2Config(**{**SIZES, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"layers \[0, 1\], expected 3 layers"):
        attention_modules(model, deeper)


# ---------------------------------------------------------------- the choice


LAYOUT = head_layout(Qwen2Config(**SIZES))


def write_map(path, scores, **changes):
    """Scores of the 12 heads in their order."""
    rows = [
        {"layer": head.layer, "head": head.head, "score": score, "cosine": 0.0}
        for head, score in zip(LAYOUT.heads(), scores, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema_version": 1, "heads": rows, **changes}))
    return path


def test_shares_become_whole_heads():
    # 0.1 * 12 = 1.2 -> 2; 0.25 * 8 = 2; 0.01 * 12 = 0.12 -> 1; 0.1 * 30 = 3.0000000000000004 -> 3
    pairs = [(0.1, 12), (0.25, 8), (0.01, 12), (0.1, 30), (1.0, 12)]
    assert [count_heads(*pair) for pair in pairs] == [2, 2, 1, 3, 12]


def test_cast_takes_the_highest_scores_and_anti_the_lowest(tmp_path):
    scores = [0.1, 0.9, 0.2, 0.3, 0.3, 0.3, 0.0, 0.8, 0.5, 0.5, 0.5, 0.05]
    path = write_map(tmp_path / "map.json", scores)
    cast = choose_heads(FreezeHeads("cast", 0.1, str(path)), LAYOUT, "unused")
    assert cast.heads == (Head(0, 1), Head(1, 1))
    assert cast.n_heads == 12
    anti = choose_heads(FreezeHeads("anti", 0.25, str(path)), LAYOUT, "unused")
    assert anti.heads == (Head(0, 0), Head(1, 0), Head(1, 5))
    assert choose_heads(FreezeHeads(), LAYOUT, "unused") is None


def test_equal_scores_go_to_the_more_opposed_head(tmp_path):
    path = write_map(tmp_path / "map.json", [0.5] * 12)
    record = json.loads(path.read_text())
    record["heads"][7]["cosine"] = -0.4
    path.write_text(json.dumps(record))
    chosen = choose_heads(FreezeHeads("cast", 0.1, str(path)), LAYOUT, "unused")
    assert chosen.heads == (Head(0, 0), Head(1, 1))


def test_the_start_has_its_own_map(tmp_path):
    write_map(tmp_path / "start" / "conflict" / "conflict.json", range(12))
    chosen = choose_heads(FreezeHeads("cast", 0.01), LAYOUT, str(tmp_path / "start"))
    assert chosen.heads == (Head(1, 5),)


def test_random_heads_have_the_same_budget_and_a_seed(tmp_path):
    drawn = [
        choose_heads(FreezeHeads("random", 0.25, seed=seed), LAYOUT, "unused").heads
        for seed in (0, 0, 1, 2, 3)
    ]
    assert all(len(set(heads)) == 3 for heads in drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no conflict map at .*obm diagnose heads"),
        ("{", "is no conflict map"),
        ('{"schema_version": 1, "heads": [{"layer": 0}]}', "is no conflict map"),
        ('{"schema_version": 9, "heads": []}', "has version 9"),
        ('{"schema_version": 1, "heads": []}', "0 heads that are not the policy's 2 layers of 6"),
        (
            '{"schema_version": 1, "heads": [{"layer": 0, "head": 0, "score": NaN, "cosine": 0}]}',
            "numbers that are not finite",
        ),
    ],
)
def test_a_map_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        choose_heads(FreezeHeads("cast", 0.1, str(path)), LAYOUT, "unused")


def test_a_map_in_the_home_of_nobody_is_not_there():
    with pytest.raises(ConfigError, match="no conflict map at ~nobody-of-this-name/map"):
        choose_heads(FreezeHeads("cast", 0.1, "~nobody-of-this-name/map.json"), LAYOUT, "unused")


def test_a_changed_map_is_refused_when_a_run_goes_on(tmp_path):
    path = write_map(tmp_path / "map.json", range(12))
    chosen = choose_heads(FreezeHeads("cast", 0.1, str(path)), LAYOUT, "unused")
    check_same_heads(tmp_path, None)
    (tmp_path / "frozen_heads.json").write_text(json.dumps(chosen.to_dict()))
    check_same_heads(tmp_path, chosen)
    write_map(path, range(12), note="the same heads, another map")
    changed = choose_heads(FreezeHeads("cast", 0.1, str(path)), LAYOUT, "unused")
    assert changed.heads == chosen.heads
    with pytest.raises(ConfigError, match="map_sha256"):
        check_same_heads(tmp_path, changed)
    with pytest.raises(ConfigError, match=r"says heads \[\[1, 4\], \[1, 5\]\], now it is None"):
        check_same_heads(tmp_path, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cast(top=10%)", FreezeHeads("cast", 0.1)),
        ("cast", FreezeHeads("cast")),
        ("none", FreezeHeads()),
        ("random(top=0.25, seed=3)", FreezeHeads("random", 0.25, seed=3)),
        (
            "anti( top = 12.5 % ,map=runs/a b/c.json )",
            FreezeHeads("anti", 0.125, "runs/a b/c.json"),
        ),
    ],
)
def test_the_short_form_is_the_section(tmp_path, text, expected):
    path = tmp_path / "settings.yaml"
    path.write_text(f"output: x\nfreeze_heads: {text}\n")
    assert load_config(path).freeze_heads == expected
    path.write_text("output: x\n")
    assert load_config(path, [f"freeze_heads={text}"]).freeze_heads == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cast(10%)", "'10%' has no value"),
        ("cast(top=10%", "cannot read"),
        ("cast(tops=10%)", r"freeze_heads\.tops: unknown key; did you mean 'top'"),
        ("cst(top=10%)", r"freeze_heads\.source: 'cst' is not one of"),
        ("cast(top=0%)", r"freeze_heads\.top: 0.0 is out of range"),
    ],
)
def test_mistakes_in_the_short_form_name_key_and_fix(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text("output: x\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path, [f"freeze_heads={text}"])


def test_a_later_override_goes_on_top_of_the_short_form(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("output: x\nfreeze_heads: cast(top=10%)\n")
    settings = load_config(path, ["freeze_heads.map=a.json", "freeze_heads.shared=all"])
    assert settings.freeze_heads == FreezeHeads("cast", 0.1, "a.json", "all")
