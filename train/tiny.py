"""Tiny models of the Qwen2.5 family from their configs, for the embedded trio and for tests.

A base LLM and a text agent are `Qwen2ForCausalLM`, the VLM is `Qwen2_5_VLForConditionalGeneration`
around the same language module; 56-pixel photos become 16 patches and, after the 2x2 merger, 4
picture tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from train.policy import ImageOnlyProcessor

PHOTO_SIZE = 56
PATCH_SIZE = 14

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The family splits text before BPE.
_PRETOKEN_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # words with one leading mark
        r"\p{N}",  # single digits
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
        r"\s*[\r\n]+|\s+(?!\S)|\s+",  # white space
    ]
)

# The family's chat format: one block a message, pictures as vision placeholders.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'text' %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def train_tokenizer(corpus: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the family's pre-tokenisation, special tokens and chat template.

    Args:
        corpus: texts to learn merges from; their order does not matter, their counts do.
        vocab_size: entries, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> ImageOnlyProcessor:
    """The VLM's processor: 56-pixel photos, the tokenizer's chat template."""
    n_pixels = PHOTO_SIZE * PHOTO_SIZE
    image_processor = Qwen2VLImageProcessorPil(
        min_pixels=n_pixels, max_pixels=n_pixels, patch_size=PATCH_SIZE
    )
    return ImageOnlyProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def _text_settings(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, intermediate: int, head_dim: int
) -> dict[str, Any]:
    heads = hidden // head_dim
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "bos_token_id": None,
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def text_config(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 256,
    layers: int = 2,
    intermediate: int = 512,
    head_dim: int = 64,
) -> Qwen2Config:
    """Config of the base LLM and of the text agent."""
    settings = _text_settings(tokenizer, hidden, layers, intermediate, head_dim)
    return Qwen2Config(**settings, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def vlm_config(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 256,
    layers: int = 2,
    intermediate: int = 512,
    head_dim: int = 64,
    vision_hidden: int = 128,
    vision_depth: int = 4,
) -> Qwen2_5_VLConfig:
    """Config of the VLM: the same language module with M-RoPE, a small ViT and the 2x2 merger."""
    text = _text_settings(tokenizer, hidden, layers, intermediate, head_dim)
    # M-RoPE gives the half-dimension's frequencies to time, height and width as 2 : 3 : 3, the
    # family's ratio.
    spatial = head_dim // 2 * 3 // 8
    mrope_section = [head_dim // 2 - 2 * spatial, spatial, spatial]
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": mrope_section,
    }
    vision = {
        "depth": vision_depth,
        "hidden_size": vision_hidden,
        "intermediate_size": 2 * vision_hidden,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": list(range(vision_depth)),
        "window_size": 112,
        "initializer_range": 0.05,
    }
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )


@torch.no_grad()
def point_heads_backwards(
    model: Qwen2ForCausalLM,
    offsets: tuple[int, ...] = (1, 2),
    n_frequencies: int = 8,
    scale: float = 4.0,
) -> None:
    """Initialise one head of the first layer per offset to attend that many tokens back, in place.

    A small transformer spends most of its training on a plateau until some head attends to the
    previous token, the first half of an induction head (arXiv 2209.11895). Query and key biases
    alone can say so: with the key bias b and the query bias R(-offset) b on the fastest rotary
    frequencies, the score q.R(m - n)k peaks at m = n - offset for every content.

    Args:
        model: fresh model with q and k biases, as the family has.
        offsets: distance back of heads 0, 1, ...
        n_frequencies: fastest rotary pairs that carry the bias.
        scale: bias magnitude; the peak stands out by about scale^2 / sqrt(head_dim).
    """
    attention = model.model.layers[0].self_attn
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    theta = model.config.rope_parameters["rope_theta"]
    frequency = theta ** (-torch.arange(head_dim // 2) * 2.0 / head_dim)
    for head, offset in enumerate(offsets):
        # rotary pairs are (i, i + head_dim / 2)
        first = torch.arange(n_frequencies) + head * head_dim
        angle = offset * frequency[:n_frequencies]
        attention.k_proj.bias[first] = scale
        attention.q_proj.bias[first] = scale * torch.cos(angle)
        attention.q_proj.bias[first + head_dim // 2] = -scale * torch.sin(angle)


def graft_language_module(vlm: Qwen2_5_VLForConditionalGeneration, base: Qwen2ForCausalLM) -> None:
    """Put the base LLM's weights into the VLM's language module, in place.

    That is how every VLM of this family began.
    """
    vlm.model.language_model.load_state_dict(base.model.state_dict())
    vlm.tie_weights()


def make_tiny_checkpoints(
    folder: str | Path, seed: int = 0, hidden: int = 64, layers: int = 2, head_dim: int = 32
) -> dict[str, str]:
    """A random, untrained trio on disk for tests.

    Base, vlm and agent share shapes and tokenizer, not the noise on their weights.

    Args:
        folder: where the three checkpoint folders go.
        seed: of the base's weights; the parents add noise of std 0.01 to the language module.
        hidden: width of the language module; its MLP is twice as wide.
        layers: decoder layers.
        head_dim: width of an attention head.

    Returns:
        {"base": path, "vlm": path, "agent": path}
    """
    corpus = [
        "<think> France </think> <search> capital of France </search> "
        "<information> Doc 1(Title: France) </information> <answer> Paris </answer>",
        "Think, then search with <search> query </search> or <search> <img> </search> if you need, "
        "then <answer>.\nQuestion: What?",
    ]
    tokenizer = train_tokenizer(corpus * 4, vocab_size=420)
    torch.manual_seed(seed)
    base = Qwen2ForCausalLM(text_config(tokenizer, hidden, layers, 2 * hidden, head_dim))
    settings = vlm_config(
        tokenizer, hidden, layers, 2 * hidden, head_dim, vision_hidden=64, vision_depth=2
    )
    vlm = Qwen2_5_VLForConditionalGeneration(settings)
    graft_language_module(vlm, base)
    agent = Qwen2ForCausalLM(base.config)
    agent.load_state_dict(base.state_dict())
    with torch.no_grad():
        for stack in (vlm.model.language_model.layers, agent.model.layers):
            for parameter in stack.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    paths = {name: str(Path(folder) / name) for name in ("base", "vlm", "agent")}
    for name, model in (("base", base), ("vlm", vlm), ("agent", agent)):
        model.save_pretrained(paths[name])
        (make_processor(tokenizer) if name == "vlm" else tokenizer).save_pretrained(paths[name])
    return paths
