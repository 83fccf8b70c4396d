"""Pico trios of every family, made from the family's own config class: some 10^5 weights each.

models = make_models("gemma3")                      # base, vlm and agent in memory
folders = save_trio("gemma3", tmp_path, tied=True)  # the same as save_pretrained writes them
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 64
IMAGE_TOKEN = 60
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA_ROPE = {"sliding_attention": ROPE, "full_attention": ROPE | {"rope_theta": 1000000.0}}

# Config class of each text model, and what it needs beyond `_text_settings`.
TEXT_MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {"head_dim": 32, "sliding_window": None},
    ),
    "ministral3": (
        transformers.Ministral3Config,
        transformers.Ministral3ForCausalLM,
        {
            "head_dim": 32,
            "sliding_window": None,
            "rope_parameters": ROPE
            | {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32}),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"head_dim": 32, "query_pre_attn_scalar": 32, "bos_token_id": 2},
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": GEMMA_ROPE,
            "bos_token_id": 2,
        },
    ),
}

_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_SIGLIP = _CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
_QWEN_IMAGE_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 63,
    "vision_start_token_id": 61,
    "vision_end_token_id": 62,
}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "hidden_size": 32}
_MROPE = {"rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}}
_GRID = {"image_grid_pinpoints": [[28, 28], [28, 56]]}

# Config class, model class, text model inside, settings of the text config, and of the whole.
VLMS: dict[str, tuple[type, type, str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLForConditionalGeneration,
        "qwen2",
        _MROPE,
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "mlp_ratio": 2,
            },
            **_QWEN_IMAGE_TOKENS,
        },
    ),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen2",
        _MROPE,
        {
            "vision_config": _QWEN_VISION
            | {
                "intermediate_size": 48,
                "out_hidden_size": 64,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_IMAGE_TOKENS,
        },
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLForConditionalGeneration,
        "qwen3",
        _MROPE,
        {
            "vision_config": _QWEN_VISION
            | {
                "intermediate_size": 48,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            **_QWEN_IMAGE_TOKENS,
        },
    ),
    "llava": (
        transformers.LlavaConfig,
        transformers.LlavaForConditionalGeneration,
        "llama",
        {"model_type": "llama"},
        {
            "vision_config": _CLIP | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": 4,
        },
    ),
    "llava_next": (
        transformers.LlavaNextConfig,
        transformers.LlavaNextForConditionalGeneration,
        "mistral",
        {"model_type": "mistral"},
        {
            "vision_config": _CLIP | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": 4,
            **_GRID,
        },
    ),
    "llava_onevision": (
        transformers.LlavaOnevisionConfig,
        transformers.LlavaOnevisionForConditionalGeneration,
        "qwen2",
        {"model_type": "qwen2"},
        {
            "vision_config": _SIGLIP,
            "image_token_index": IMAGE_TOKEN,
            "video_token_index": 61,
            **_GRID,
        },
    ),
    "internvl": (
        transformers.InternVLConfig,
        transformers.InternVLForConditionalGeneration,
        "qwen2",
        {"model_type": "qwen2"},
        {
            "vision_config": _CLIP | {"use_qk_norm": True, "attention_bias": True},
            "image_token_id": IMAGE_TOKEN,
            "image_seq_length": 1,
        },
    ),
    "idefics3": (
        transformers.Idefics3Config,
        transformers.Idefics3ForConditionalGeneration,
        "llama",
        {"model_type": "llama"},
        {"vision_config": _CLIP, "image_token_id": IMAGE_TOKEN},
    ),
    "smolvlm": (
        transformers.SmolVLMConfig,
        transformers.SmolVLMForConditionalGeneration,
        "llama",
        {"model_type": "llama"},
        {"vision_config": _CLIP, "image_token_id": IMAGE_TOKEN},
    ),
    "gemma3": (
        transformers.Gemma3Config,
        transformers.Gemma3ForConditionalGeneration,
        "gemma3_text",
        {},
        {
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
    ),
    "mistral3": (
        transformers.Mistral3Config,
        transformers.Mistral3ForConditionalGeneration,
        "mistral",
        {"model_type": "mistral"},
        {
            "vision_config": _CLIP | {"model_type": "pixtral"},
            "image_token_index": IMAGE_TOKEN,
        },
    ),
}


def _text_settings(text_type: str, tied: bool, **changes: Any) -> dict[str, Any]:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "rope_parameters": ROPE,
    }
    return settings | TEXT_MODELS[text_type][2] | changes


def make_text_model(
    text_type: str, *, tied: bool = False, seed: int = 0, **changes: Any
) -> torch.nn.Module:
    """A text model with random weights, biases and norms included."""
    torch.manual_seed(seed)
    config_class, model_class, _ = TEXT_MODELS[text_type]
    model = model_class(config_class(**_text_settings(text_type, tied, **changes)))
    _jitter(model, 0.05)
    return model.eval()


def make_vlm(
    vlm_type: str,
    base: torch.nn.Module | None = None,
    *,
    tied: bool = False,
    seed: int = 1,
    **changes: Any,
) -> torch.nn.Module:
    """A VLM around the base's language module, with noise of its own."""
    torch.manual_seed(seed)
    config_class, model_class, text_type, text_changes, settings = VLMS[vlm_type]
    text = _text_settings(text_type, tied, **(text_changes | changes))
    vlm = model_class(config_class(text_config=text, tie_word_embeddings=tied, **settings))
    if base is not None:
        vlm.model.get_decoder().load_state_dict(base.model.state_dict())
        vlm.lm_head.load_state_dict(base.lm_head.state_dict())
    _jitter(vlm, 0.02)
    return vlm.eval()


def make_models(vlm_type: str, *, tied: bool = False, **changes: Any) -> dict[str, torch.nn.Module]:
    """Base, vlm and agent of a family; for a text family vlm is a second fine-tuned model."""
    text_type = VLMS[vlm_type][2] if vlm_type in VLMS else vlm_type
    base = make_text_model(text_type, tied=tied, **changes)
    if vlm_type in VLMS:
        vlm = make_vlm(vlm_type, base, tied=tied, **changes)
    else:
        vlm = _fine_tuned(base, seed=1)
    return {"base": base, "vlm": vlm, "agent": _fine_tuned(base, seed=2)}


def save_trio(
    models: Mapping[str, torch.nn.Module],
    folder: Path,
    dtype: torch.dtype = torch.float32,
    **save: Any,
) -> dict[str, str]:
    """Saves models as `save_pretrained` does; returns role -> folder."""
    folders = {role: str(folder / role) for role in models}
    for role, model in models.items():
        model.to(dtype).save_pretrained(folders[role], **save)
    return folders


def _fine_tuned(base: torch.nn.Module, seed: int) -> torch.nn.Module:
    model = type(base)(base.config)
    model.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    _jitter(model, 0.02)
    return model.eval()


def _jitter(model: torch.nn.Module, noise: float) -> None:
    """Moves weights as many small steps would; constants of a fresh model become numbers too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
            parameter.mul_(1 + torch.randn_like(parameter) * noise)
