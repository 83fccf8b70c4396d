"""Pico trios made from configs: base, VLM and agent of one family, some 10^5 weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.merge.folders import write_stats

VOCABULARY = 64
IMAGE_TOKEN, VISION_START, VISION_END = 60, 61, 62
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _text_settings(**changes: Any) -> dict[str, Any]:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return settings | changes


def make_text_model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**_text_settings(**changes), rope_parameters=dict(ROPE)))
    _jitter(model, 0.05)  # biases and norms start as constants
    return model.eval()


def make_vlm(
    base: Qwen2ForCausalLM, seed: int = 1, **changes: Any
) -> Qwen2_5_VLForConditionalGeneration:
    """A VLM around the base's language module, with noise of its own."""
    torch.manual_seed(seed)
    tied = base.config.tie_word_embeddings
    text = _text_settings(tie_word_embeddings=tied, **changes)
    text["rope_parameters"] = ROPE | {"mrope_section": [4, 6, 6]}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [0],
        "initializer_range": 0.1,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=IMAGE_TOKEN,
        video_token_id=63,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    vlm = Qwen2_5_VLForConditionalGeneration(config)
    if not changes:
        vlm.model.language_model.load_state_dict(base.model.state_dict())
        vlm.lm_head.load_state_dict(base.lm_head.state_dict())
    _jitter(vlm, 0.02)
    return vlm.eval()


def make_agent(base: Qwen2ForCausalLM, seed: int = 2, noise: float = 0.02) -> Qwen2ForCausalLM:
    agent = Qwen2ForCausalLM(base.config)
    agent.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    _jitter(agent, noise)
    return agent.eval()


def _jitter(model: torch.nn.Module, noise: float) -> None:
    """Moves weights as many small steps would: low bits unlike the start's, some signs flipped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
            parameter.mul_(1 + torch.randn_like(parameter) * noise)


def make_image_batch(seed: int = 0, pixel_scale: float = 1.0) -> dict[str, torch.Tensor]:
    """One question with a 56-pixel image: 16 patches, 4 image tokens, 6 words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 59, (6,), generator=generator).tolist()
    ids = torch.tensor([[VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, *words]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator) * pixel_scale,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


class Trio:
    """Folders and models of base, vlm and agent."""

    def __init__(self, folder: Path, dtype: torch.dtype, tied: bool, **save: Any) -> None:
        base = make_text_model(tie_word_embeddings=tied)
        models = {"base": base, "vlm": make_vlm(base), "agent": make_agent(base)}
        self.models = {role: model.to(dtype) for role, model in models.items()}
        self.paths = {role: str(folder / role) for role in models}
        for role, model in self.models.items():
            model.save_pretrained(self.paths[role], **save)


@pytest.fixture(scope="session")
def make_trio(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trio]:
    """Builds a trio once for each dtype and tying; tests must not change it."""
    made: dict[tuple[Any, ...], Trio] = {}

    def make(dtype: torch.dtype = torch.float32, tied: bool = True) -> Trio:
        key = (dtype, tied)
        if key not in made:
            made[key] = Trio(tmp_path_factory.mktemp("trio"), dtype, tied)
        return made[key]

    return make


@pytest.fixture
def fresh_trio(tmp_path: Path) -> Trio:
    """A trio in several shards that a test may damage."""
    return Trio(tmp_path / "parents", torch.float32, tied=False, max_shard_size="60KB")


@pytest.fixture(scope="session")
def stats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Task -> folder of statistics of all kinds, which fit any trio of these shapes."""
    shapes = {name: value.shape for name, value in make_text_model().state_dict().items()}
    folders = {task: tmp_path_factory.mktemp("stats") / task for task in ("vlm", "agent", "donor")}
    for seed, folder in enumerate(folders.values()):
        write_stats(folder, seed, shapes)
    return {task: str(folder) for task, folder in folders.items()}


@pytest.fixture(scope="session")
def builders() -> dict[str, Callable[..., Any]]:
    """The functions above, for tests that need a model of their own."""
    return {
        "text_model": make_text_model,
        "vlm": make_vlm,
        "agent": make_agent,
        "image_batch": make_image_batch,
    }
