"""SPORT's preference tuning: TRL's DPOTrainer on pairs of steps.

    loss = -log sigmoid(beta ([log p(w|h) - log p_ref(w|h)] - [log p(l|h) - log p_ref(l|h)]))

with h everything before the step (prompt, turns, observations, pictures), w and l the chosen and
the rejected step. Only tokens of the step count, not those of earlier turns. TRL's own collators
would write the text into tokens again; ours hands over the tokens that were sampled, and the
pictures as the rollout read them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from configs.errors import ConfigError
from train.adapter import freeze_vision, make_lora
from train.cast import gate_trainer
from train.frozen import FrozenHeads
from train.policy import load_policy
from train.sport_sampling import StepPair
from train.vision import ImageStore

if TYPE_CHECKING:
    from configs.schema import Config

DPO_DEFAULTS: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
}
OURS = {
    "output_dir": "output",
    "seed": "the top-level seed",
    "data_seed": "the top-level seed",
    "deepspeed": "nothing: obm sport runs in one process",
    "max_length": "nothing: a step is never cut",
    "remove_unused_columns": "nothing",
    "precompute_ref_log_probs": "nothing: the reference is the policy that sampled",
    "save_strategy": "nothing: each iteration ends with a checkpoint",
    "use_cpu": "nothing",
}
"""Keys of DPOConfig that sport.dpo must not set, and what does."""


class PairCollator:
    """Pads pairs of steps, exact tokens and pictures, for DPOTrainer.

    Returns a dict of input_ids, attention_mask and completion_mask, int64 [2 B, L], the chosen rows
    first, then the rejected; with pictures mm_token_type_ids [2 B, L], pixel_values [patches,
    channels] of float32 and image_grid_thw [pictures, 3], both in the order of the rows.
    """

    def __init__(self, pairs: Sequence[StepPair], processor: Any) -> None:
        self.pairs = list(pairs)
        tokenizer = getattr(processor, "tokenizer", processor)
        self.pad_id = tokenizer.pad_token_id
        self.image_token_id = getattr(processor, "image_token_id", None)
        image_processor = getattr(processor, "image_processor", None)
        self.images = None if image_processor is None else ImageStore(image_processor)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [self.pairs[row["row"]] for row in rows]
        sides = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
        before = [pair.prompt_ids for pair in pairs] * 2
        width = max(len(b) + len(s) for b, s in zip(before, sides, strict=True))
        input_ids = torch.full((len(sides), width), self.pad_id)
        attention_mask, completion_mask = (torch.zeros_like(input_ids) for _ in range(2))
        for i, (prompt, step) in enumerate(zip(before, sides, strict=True)):
            end = len(prompt) + len(step)
            input_ids[i, :end] = torch.tensor([*prompt, *step])
            attention_mask[i, :end] = 1
            completion_mask[i, len(prompt) : end] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
        }
        if self.images is None:
            return batch
        batch["mm_token_type_ids"] = (input_ids == self.image_token_id).int()
        shown = [self.images.encode(image) for pair in pairs for image in pair.images] * 2
        if shown:
            batch["pixel_values"] = torch.cat([picture.pixel_values for picture in shown])
            batch["image_grid_thw"] = torch.tensor([picture.grid for picture in shown])
        return batch


class StepDPOTrainer(DPOTrainer):
    """DPOTrainer on pairs that are tokens already.

    Args:
        model: the policy.
        ref_model: the policy that sampled; None with an adapter.
        args: TRL's settings.
        pairs: what to learn from.
        processor: of the policy.
        peft_config: adapter to train.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any,
        args: DPOConfig,
        pairs: Sequence[StepPair],
        processor: Any,
        peft_config: Any = None,
    ) -> None:
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=PairCollator(pairs, processor),
            train_dataset=Dataset.from_dict({"row": list(range(len(pairs)))}),
            processing_class=processor,
            peft_config=peft_config,
        )

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """Nothing to write into tokens."""
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run folder says how the policy was made."""


def tune(
    config: Config,
    start: str | Path,
    pairs: Sequence[StepPair],
    output: Path,
    iteration: int,
    frozen: FrozenHeads | None = None,
) -> list[dict[str, float]]:
    """Trains the policy of `start` on pairs and writes it to `output`.

    Args:
        config: `sport.dpo`, `lora`, `models.freeze_vision` and the seed.
        start: checkpoint that sampled the pairs; also the reference.
        pairs: at least one.
        output: folder to write, complete or not at all.
        iteration: counted from 1; other orders of the pairs in each.
        frozen: attention heads that stay as they are.

    Returns:
        The lines that TRL logged.
    """
    from train.run import keep_only_ours

    model, processor = load_policy(start, max_pixels=config.models.max_pixels)
    has_adapter = config.lora.r > 0
    reference = None if has_adapter else load_policy(start)[0]
    if config.models.freeze_vision:
        freeze_vision(model)
    args = DPOConfig(**dpo_settings(config, output.parent / "scratch", iteration))
    trainer = StepDPOTrainer(
        model, reference, args, pairs, processor, make_lora(model, config.lora)
    )
    keep_only_ours(trainer)
    if frozen is not None:
        gate_trainer(trainer, frozen.heads, frozen.shared)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if has_adapter:
        trained = trained.merge_and_unload()
    save_policy(trained, processor, output)
    return [line for line in trainer.state.log_history if "loss" in line]


def save_policy(model: Any, processor: Any, output: Path) -> None:
    """Writes a checkpoint folder under another name first, so that it is there whole or not."""
    import shutil

    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(output, ignore_errors=True)
    temporary.replace(output)


def dpo_settings(config: Config, scratch: Path, iteration: int) -> dict[str, Any]:
    """Keyword arguments of DPOConfig: the defaults, then `sport.dpo`.

    Raises:
        ConfigError: a key that DPOConfig does not have, or that is set elsewhere.
    """
    known = {item.name for item in fields(DPOConfig)}
    for key in config.sport.dpo:
        if key in OURS:
            raise ConfigError(f"sport.dpo.{key}: decided by {OURS[key]}; remove it")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "remove it"
            raise ConfigError(f"sport.dpo.{key}: TRL's DPOConfig has no such setting; {hint}")
    return {
        **DPO_DEFAULTS,
        **config.sport.dpo,
        "output_dir": str(scratch),
        "seed": config.seed * 1000 + iteration,
        "max_length": None,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
