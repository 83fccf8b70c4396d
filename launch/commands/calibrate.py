"""Second moments of every linear input of both parents' language modules.

The VLM answers questions with pictures, through its vision tower; the agent searches for text
questions of the training split. Padding does not count. Writes vlm/stats.safetensors and
agent/stats.safetensors, which `obm merge` finds by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import add_config_arguments, read_config
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm calibrate --config configs/demo.yaml",
    "obm calibrate --parent vlm calibration.samples=128 calibration.output=runs/stats",
)
ROLES = ("vlm", "agent")
MAX_ANSWER_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which parents; everything else is configuration."""
    add_config_arguments(parser)
    parser.add_argument("--parent", choices=(*ROLES, "both"), default="both")
    parser.add_argument("--overwrite", action="store_true", help="replace statistics")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")


def run(options: argparse.Namespace) -> int:
    """Calibrate the chosen parents."""
    config = read_config(options)
    roles = ROLES if options.parent == "both" else (options.parent,)
    for role in roles:
        path = stats_path(config, role)
        if path.exists() and not options.overwrite:
            raise LaunchError(
                f"{path} exists; pass --overwrite, or another calibration.output=FOLDER"
            )
        if options.dry_run:
            kinds = config.calibration.vlm_kinds if role == "vlm" else ["text"]
            print(
                f"{role}: {config.calibration.samples} questions ({', '.join(kinds)}) through "
                f"{parent_folder(config, role)} into {path}"
            )
    if not options.dry_run:
        for role in roles:
            print(f"{role}: {calibrate_parent(config, role)}")
    return 0


def stats_path(config: Config, role: str) -> Path:
    """Where a parent's statistics lie."""
    folder = Path(config.calibration.output or Path(config.output) / "calibration")
    return folder / role / "stats.safetensors"


def parent_folder(config: Config, role: str) -> str:
    """Folder or hub id of base, vlm or agent.

    Raises:
        LaunchError: the settings name none.
    """
    from configs.schema import resolve_model

    name = getattr(config.models, role)
    if not name:
        raise LaunchError(f"models.{role} is not set; give a folder, a hub id or atlas://{role}")
    return resolve_model(name)


def calibrate_parent(config: Config, role: str) -> Path:
    """Run one parent's calibration data through it and save the statistics.

    Args:
        config: models, calibration and environment are used.
        role: vlm or agent.

    Returns:
        The statistics file.
    """
    from launch.models import load_for_inference
    from merge.calibration import collect_second_moments, save_stats
    from merge.checkpoint import hash_checkpoint

    folder = parent_folder(config, role)
    model, processor = load_for_inference(folder)
    make_batches = _vlm_batches if role == "vlm" else _agent_batches
    # All data first: what the model generates on the way must not count as calibration tokens.
    batches = list(make_batches(config, model, processor))
    stats = collect_second_moments(model, batches)
    path = stats_path(config, role)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_stats(stats, path, model_sha256=hash_checkpoint(folder))
    return path


def _vlm_batches(config: Config, model: Any, processor: Any) -> Iterator[dict[str, Any]]:
    """Questions with photos and the VLM's own greedy answers, a batch at a time."""
    import torch

    from environments.dialects import get_dialect
    from train.worlds import load_questions

    dialect = get_dialect(config.environment.dialect)
    questions = load_questions(
        config, "train", config.calibration.vlm_kinds, config.calibration.samples,
        seed=config.calibration.seed,
    )  # fmt: skip
    pad_id = processor.tokenizer.pad_token_id
    for chunk in _chunks(questions, config.calibration.batch_size):
        texts = [
            processor.apply_chat_template(
                dialect.direct_prompt(question["question"], True),
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in chunk
        ]
        images = [[question["image"]] for question in chunk]
        inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, pad_token_id=pad_id
            )
        # generate pads rows that ended early; what follows the first end token is no data.
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        mask = torch.cat([inputs["attention_mask"], (answers != pad_id).long()], dim=1)
        batch = {**inputs, "input_ids": tokens, "attention_mask": mask}
        if "mm_token_type_ids" in inputs:
            kinds = torch.zeros_like(tokens)
            kinds[:, : inputs["input_ids"].shape[1]] = inputs["mm_token_type_ids"]
            batch["mm_token_type_ids"] = kinds
        yield batch


def _agent_batches(config: Config, model: Any, processor: Any) -> Iterator[dict[str, Any]]:
    """The agent's own search trajectories on text questions: prompt, turns and observations."""
    import torch

    from train.worlds import build_engine, load_questions

    questions = load_questions(
        config, "train", ["text"], config.calibration.samples, seed=config.calibration.seed
    )
    engine = build_engine(config, model, processor)
    trajectories = engine.rollout(questions, 1, greedy=True)
    pad_id = getattr(processor, "tokenizer", processor).pad_token_id
    for chunk in _chunks(trajectories, config.calibration.batch_size):
        rows = [[*item.prompt_ids, *item.completion_ids] for item in chunk]
        length = max(map(len, rows))
        yield {
            "input_ids": torch.tensor([[pad_id] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor(
                [[0] * (length - len(row)) + [1] * len(row) for row in rows]
            ),
        }


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
