"""What a stranger brings: three checkpoints of one family as others have saved them.

Base, vision-language model and text agent with random weights, made from configs by transformers
alone: several shards, bfloat16 (the base in float32), an LM head of their own, tokenizer and image
processor as files beside them. Two words of the vocabulary are planted: a whole search and a whole
answer. The models say them about half and half, so that episodes search, answer, and differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from train.tiny import text_config, train_tokenizer, vlm_config

SEARCH = "<think> a </think> <search> capital of Austria </search>"
ANSWER = "<think> b </think> <answer> Vienna </answer>"
SIZES = {"hidden": 64, "layers": 2, "intermediate": 128, "head_dim": 32}
PLANTED = 12.0
"""Logit of the planted words; the others' lie around 0."""


def make_models(folder: Path) -> None:
    """Writes base/, vlm/ and agent/."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    settings = text_config(tokenizer, **SIZES)
    settings.tie_word_embeddings = False
    base = Qwen2ForCausalLM(settings)
    _plant(base, tokenizer)
    with_eyes = vlm_config(tokenizer, **SIZES, vision_hidden=64, vision_depth=2)
    with_eyes.tie_word_embeddings = with_eyes.text_config.tie_word_embeddings = False
    vlm = Qwen2_5_VLForConditionalGeneration(with_eyes)
    vlm.model.language_model.load_state_dict(base.model.state_dict())
    vlm.lm_head.load_state_dict(base.lm_head.state_dict())
    agent = Qwen2ForCausalLM(settings)
    agent.load_state_dict(base.state_dict())
    for layers in (vlm.model.language_model.layers, agent.model.layers):
        _train(layers)
    parents = (("base", base, "float32"), ("vlm", vlm, "bfloat16"), ("agent", agent, "bfloat16"))
    for name, model, dtype in parents:
        model.to(getattr(torch, dtype)).save_pretrained(folder / name, max_shard_size="150KB")
        tokenizer.save_pretrained(folder / name)
        assert len(list((folder / name).glob("*.safetensors"))) > 1
    # as older folders have it: preprocessor_config.json, and no processor_config.json
    pictures = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    pictures.save_pretrained(folder / "vlm")


def dtype_of(folder: Path) -> str:
    """What config.json says of the weights."""
    return str(json.loads((folder / "config.json").read_text())["dtype"])


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer([f"{SEARCH} What is the capital of this place? {ANSWER}"] * 4, 420)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (SEARCH, ANSWER)])
    return tokenizer


@torch.no_grad()
def _plant(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A value bias adds one and the same vector everywhere; two rows of the head answer to it."""
    attention = model.model.layers[-1].self_attn
    attention.v_proj.bias.fill_(20.0)
    always = attention.o_proj(attention.v_proj.bias)
    always = always / always.norm()
    for word in (SEARCH, ANSWER):
        row = tokenizer.convert_tokens_to_ids(word)
        # a normalised state of d entries that is mostly `always` has sqrt(d) along it
        model.lm_head.weight[row] = PLANTED / model.config.hidden_size**0.5 * always


@torch.no_grad()
def _train(layers: torch.nn.Module) -> None:
    for parameter in layers.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.01)
