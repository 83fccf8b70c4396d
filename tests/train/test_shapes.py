"""Parameters counted from a config alone, against models made from it on the meta device."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from configs.errors import ConfigError
from train.shapes import find_shape, shape_cards, shape_of

ATLAS = Path(__file__).parents[2] / "environments" / "atlas" / "checkpoints"


def count(model):
    """Parameters by part; a tied head is counted once."""
    model.tie_weights()
    parts = {"vision": 0, "embedding": 0, "language": 0}
    for name, parameter in model.named_parameters():
        is_embedding = "embed_tokens" in name or "lm_head" in name
        part = "vision" if "visual" in name else "embedding" if is_embedding else "language"
        parts[part] += parameter.numel()
    return parts


def parts_of(shape):
    return {
        "vision": shape.n_vision,
        "embedding": shape.n_embedding,
        "language": shape.n_language,
    }


@pytest.mark.parametrize("name", sorted(shape_cards()))
def test_a_card_counts_as_the_model_made_from_it(name):
    card = {k: v for k, v in shape_cards()[name].items() if k not in ("names", "source")}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**card))
    shape, origin = find_shape(name)
    assert parts_of(shape) == count(model)
    assert origin == f"card of {name}"


def test_the_cards_have_the_published_sizes():
    sizes = {name: find_shape(name)[0].n_parameters for name in shape_cards()}
    assert sizes == {
        "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
        "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
        # the hub shows 73.4 billion
        "Qwen/Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    }


@pytest.mark.parametrize("name", ["vlm", "agent"])
def test_a_local_folder_counts_as_its_model(name):
    config = json.loads((ATLAS / name / "config.json").read_text())
    classes = {
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }
    config_class, model_class = classes[config["model_type"]]
    with torch.device("meta"):
        model = model_class(config_class.from_pretrained(ATLAS / name))
    shape, origin = find_shape(str(ATLAS / name))
    assert parts_of(shape) == count(model)
    assert origin.endswith("config.json")


def test_a_folder_that_is_still_to_be_merged_has_the_vlms_shape():
    name = "Qwen/Qwen2.5-VL-7B-Instruct"
    assert find_shape("runs/not-there-yet", None, f"{name}@main") == find_shape(name)


def test_an_adapter_counts_as_pefts():
    from peft import LoraConfig, get_peft_model

    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=3, target_modules="all-linear"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = shape_of(config.to_dict(), "test")
    assert shape.n_lora(3) == trained
    # two layers, rank 3: q is 64 x 64, k 32 x 64
    assert shape.n_lora(3, ["q_proj", "k_proj"]) == 2 * 3 * (64 + 64 + 64 + 32)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"model_type": "llama"}, "'llama'"), ({"model_type": "qwen2"}, "num_attention_heads")],
)
def test_a_config_that_says_too_little_is_refused_by_name(config, words):
    with pytest.raises(ConfigError, match=words) as caught:
        shape_of(config, "some/config.json")
    assert "some/config.json" in str(caught.value)


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(ConfigError, match="owner/model"):
        find_shape("owner/model")
