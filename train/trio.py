"""Build the embedded trio: a base LLM, a VLM and a text search agent of one family.

    obm atlas build --output runs/trio [--tool-use none|format|1|2|5] [--only base,agent,vlm]

Each comes from seeds in minutes on a CPU.

base:  copying with varying offsets (induction heads), facts restated, reading comprehension.
agent: the base, lightly tuned on text search trajectories; embeddings stay the base's.
vlm:   a vision tower that learns to say a flag's name in the base's own token embeddings, then a
       light visual instruction tuning of tower and language module; embeddings stay the base's.
Both fine-tunes are light on purpose: a long task vector drowns the other one in every merge.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from environments.atlas.entities import load_entities, load_flag
from environments.atlas.photos import render_photo, render_unfamiliar_flag
from environments.dialects import get_dialect
from train import trio_data
from train.policy import load_policy
from train.sft import SFTStage, run_stage
from train.tiny import (
    graft_language_module,
    make_processor,
    point_heads_backwards,
    text_config,
    train_tokenizer,
    vlm_config,
)
from train.trio_data import UNKNOWN, VLMMix, Writer

logger = logging.getLogger(__name__)

CHECKPOINT_DTYPE = torch.bfloat16


@dataclass
class TrioSettings:
    """Sizes, steps and learning rates of the trainings; the defaults made the committed trio."""

    hidden: int = 256
    """Width of the language module."""
    layers: int = 2
    """Layers of the language module."""
    intermediate: int = 512
    """Inner width of its MLPs."""
    head_dim: int = 64
    """Width of an attention head."""
    vision_hidden: int = 128
    """Width of the vision tower."""
    vision_depth: int = 3
    """Blocks of the vision tower."""
    base_steps: tuple[int, int, int] = (300, 150, 900)
    """Optimizer steps of the base's stages: copy, restate facts, read."""
    base_lr: float = 2e-3
    """Peak learning rate of all three."""
    agent_steps: int = 120
    """Optimizer steps on search trajectories; few, so that the task vector stays short."""
    agent_lr: float = 5e-4
    """Peak learning rate of the agent."""
    vision_steps: int = 400
    """Optimizer steps of the tower alone, the language module frozen."""
    vision_lr: float = 1e-3
    """Peak learning rate of the tower alone."""
    vlm_steps: int = 450
    """Optimizer steps on visual instructions, tower and language module together."""
    vlm_lr: float = 3e-4
    """Peak learning rate of visual instructions."""
    mix: VLMMix = field(default_factory=VLMMix)
    """Shares of the visual instruction data."""
    strength: float = 0.5
    """How far photos are from flat flags, as environment.strength: 0 to 1."""
    seed: int = 0
    """Of weights, order and data."""


def build_trio(
    output: str | Path, settings: TrioSettings, only: Sequence[str] = ("base", "agent", "vlm")
) -> dict[str, Path]:
    """Train and save the checkpoints named in `only`.

    Args:
        output: folder for the checkpoints; agent and vlm start from the `base` there.
        settings: of all three trainings.
        only: what to build, in the order base, agent, vlm; another name is passed over.

    Returns:
        name -> folder, each written by save_pretrained in the layout of a hub checkpoint.
    """
    output = Path(output)
    builders = {"base": build_base, "agent": build_agent, "vlm": build_vlm}
    for name in ("base", "agent", "vlm"):
        if name in only:
            started = time.monotonic()
            builders[name](output, settings)
            logger.info("%s built in %.0f s", name, time.monotonic() - started)
    return {name: output / name for name in builders if (output / name).is_dir()}


def build_base(output: Path, settings: TrioSettings) -> None:
    """The base LLM, from nothing: copy, restate facts, read."""
    torch.manual_seed(settings.seed)
    tokenizer = train_tokenizer(trio_data.tokenizer_corpus())
    model = Qwen2ForCausalLM(
        text_config(
            tokenizer, settings.hidden, settings.layers, settings.intermediate, settings.head_dim
        )
    )
    writer, names = Writer(tokenizer), _all_names()
    point_heads_backwards(model)
    copying = trio_data.base_copy(writer)
    restate, read = trio_data.base_restate(writer, names), trio_data.base_read(writer, names)
    naming = trio_data.base_name(writer, names)
    draws = (
        ("copy", copying),
        ("restate facts", trio_data.mixture([(0.3, copying), (0.7, restate)])),
        ("read", trio_data.mixture([(0.1, copying), (0.2, restate), (0.55, read), (0.15, naming)])),
    )
    for i, ((name, draw), steps) in enumerate(zip(draws, settings.base_steps, strict=True)):
        schedule = "cosine" if i == len(draws) - 1 else "constant_with_warmup"
        stage = SFTStage(
            name,
            draw,
            steps,
            learning_rate=settings.base_lr,
            schedule=schedule,
            seed=settings.seed + i,
        )
        _run(model, tokenizer, stage, output)
    _save(model, tokenizer, output / "base", settings)


def build_agent(output: Path, settings: TrioSettings) -> None:
    """The text search agent: the base on search trajectories about the train split's places."""
    model, tokenizer = load_policy(output / "base")
    names = [entity.name for entity in load_entities().values() if entity.split == "train"]
    draw = trio_data.agent_search(Writer(tokenizer), names, get_dialect("search_r1"))
    stage = SFTStage(
        "search",
        draw,
        settings.agent_steps,
        learning_rate=settings.agent_lr,
        schedule="cosine",
        seed=settings.seed,
        trainable=_is_not_embedding,
    )
    _run(model, tokenizer, stage, output)
    _save(model, tokenizer, output / "agent", settings)


def build_vlm(output: Path, settings: TrioSettings) -> None:
    """The VLM: the base with a vision tower, tower first, then both on instructions."""
    torch.manual_seed(settings.seed)
    base, tokenizer = load_policy(output / "base")
    model = Qwen2_5_VLForConditionalGeneration(
        vlm_config(
            tokenizer,
            settings.hidden,
            settings.layers,
            settings.intermediate,
            settings.head_dim,
            settings.vision_hidden,
            settings.vision_depth,
        )
    )
    graft_language_module(model, base)
    processor = make_processor(tokenizer)
    pretrain_vision(model, processor, settings)
    draw = trio_data.vlm_instructions(
        Writer(tokenizer), _all_names(), get_dialect("search_r1"), settings.mix, settings.strength
    )
    stage = SFTStage(
        "instructions",
        draw,
        settings.vlm_steps,
        learning_rate=settings.vlm_lr,
        schedule="cosine",
        seed=settings.seed,
        trainable=_is_not_embedding,
    )
    _run(model, processor, stage, output)
    _save(model, processor, output / "vlm", settings)


def pretrain_vision(
    model: Any,
    processor: Any,
    settings: TrioSettings,
    batch_size: int = 64,
    photos_per_flag: int = 48,
) -> None:
    """Teach tower and merger to say a flag's name in the language module's embeddings, in place.

    The i-th picture token is scored against every row of the (frozen) embedding matrix, and the
    loss is the cross entropy of the name's i-th token; names longer than the picture's tokens are
    cut, shorter ones end in full stops.
    """
    rng = random.Random(settings.seed)
    flags, names = [], []
    for entity in load_entities().values():
        if entity.seen:
            flags += [load_flag(entity.iso)] * photos_per_flag
            names += [entity.name] * photos_per_flag
    n_unfamiliar = len(flags) // 5
    flags += [render_unfamiliar_flag(rng.randrange(1 << 30)) for _ in range(n_unfamiliar)]
    names += [UNKNOWN] * n_unfamiliar
    photos = [render_photo(flag, rng.randrange(1 << 30), settings.strength) for flag in flags]
    features = processor.image_processor(photos, return_tensors="pt")
    pixels = features["pixel_values"].unflatten(0, (len(photos), -1)).half()
    grid = features["image_grid_thw"][:1]
    targets = _name_tokens(processor.tokenizer, names)
    embeddings = model.get_input_embeddings().weight.detach()
    directions, token_length = F.normalize(embeddings, dim=-1), embeddings.norm(dim=-1).mean()
    tower = model.model.visual
    optimizer = torch.optim.AdamW(tower.parameters(), lr=settings.vision_lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.vision_lr, total_steps=settings.vision_steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.vision_steps):
        rows = torch.randint(len(photos), (batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = tower(
                pixels[rows].flatten(0, 1).float(), grid.expand(batch_size, 3)
            ).pooler_output
        # cosine scores, and the length of a text token: a longer picture token would drown what
        # attention adds to it
        logits = 20 * F.normalize(tokens.float(), dim=-1) @ directions.T
        length = tokens.float().norm(dim=-1) / token_length
        loss = F.cross_entropy(logits, targets[rows].flatten()) + 0.1 * (length - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 249:
            right = (logits.argmax(-1) == targets[rows].flatten()).float().mean()
            logger.info(
                "vision step %d: loss %.3f, name tokens right %.2f",
                step + 1,
                loss.item(),
                right.item(),
            )


def _name_tokens(tokenizer: Any, names: Sequence[str], n_tokens: int = 4) -> torch.Tensor:
    """First tokens of each name after a space, [names, n_tokens], filled up with full stops."""
    stop = tokenizer(".", add_special_tokens=False)["input_ids"]
    of_name = {
        name: (tokenizer(f" {name}", add_special_tokens=False)["input_ids"] + stop * n_tokens)[
            :n_tokens
        ]
        for name in set(names)
    }
    return torch.tensor([of_name[name] for name in names])


def _all_names() -> list[str]:
    return [entity.name for entity in load_entities().values()]


def _is_not_embedding(name: str) -> bool:
    """Fine-tunes leave embeddings (and the tied head) where the base has them."""
    return "embed_tokens" not in name and "lm_head" not in name


def _run(model: Any, processor: Any, stage: SFTStage, output: Path) -> None:
    loss = run_stage(model, processor, stage, output / "scratch")
    shutil.rmtree(output / "scratch", ignore_errors=True)
    logger.info("%s: %d steps, loss %.3f", stage.name, stage.steps, loss)


def _save(model: Any, processor: Any, folder: Path, settings: TrioSettings) -> None:
    """Write a bf16 copy, as hub checkpoints are, and in training.json how it was made.

    The model in memory keeps its precision; the folder's name is the stage.
    """
    if folder.exists():
        shutil.rmtree(folder)
    copy.deepcopy(model).to(CHECKPOINT_DTYPE).save_pretrained(folder)
    processor.save_pretrained(folder)
    record = {"stage": folder.name, "settings": asdict(settings)}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
