"""Supervised fine-tuning on token sequences, with or without pictures.

For cold starts and the embedded tiny checkpoints. Built on transformers' Trainer. Data come from a
function that draws one example from a random generator, so that a stage is a few numbers (steps,
batch size, learning rate, seed) and the same numbers give the same model.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from train.cast import gate_trainer
from train.gpu import computes_in_bf16, processor_computes_in_bf16
from train.heads import Head

IGNORE = -100


@dataclass
class SFTExample:
    """One sequence.

    `labels[t]` is `input_ids[t]` where the loss counts and IGNORE elsewhere; `images` stand in
    reading order.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[Image.Image] = field(default_factory=list)


@dataclass
class SFTStage:
    """One training stage; `trainable` decides by parameter name what moves."""

    name: str
    draw: Callable[[random.Random], SFTExample]
    steps: int
    batch_size: int = 32
    micro_batch_size: int | None = None
    """rows of a batch that go through the model at once; None = all"""
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0
    schedule: str = "constant_with_warmup"
    trainable: Callable[[str], bool] = lambda name: True
    seed: int = 0
    frozen_heads: Sequence[Head] = ()
    """attention heads that stay as they are, see `train.cast`"""
    shared: str = "most"
    """what they share with others stays with `most`, `all` or `any` of its heads"""


class _DrawnDataset(IterableDataset):
    """Endless examples in batches whose rows are about equally long, so that little is padding."""

    def __init__(self, stage: SFTStage, pool: int = 8):
        self.stage, self.pool = stage, pool

    def __iter__(self) -> Iterator[SFTExample]:
        rng, size = random.Random(self.stage.seed), self.stage.batch_size
        while True:
            drawn = sorted(
                (self.stage.draw(rng) for _ in range(self.pool * size)),
                key=lambda example: len(example.input_ids),
            )
            batches = [drawn[start : start + size] for start in range(0, len(drawn), size)]
            rng.shuffle(batches)
            for batch in batches:
                yield from batch


class SFTCollator:
    """Pads examples on the right and adds what a VLM's forward needs for pictures.

    Returns a dict of input_ids, attention_mask, labels, each [batch, length] of int64; for a VLM
    also mm_token_type_ids [batch, length] and, where the batch has pictures, pixel_values
    [patches, channels] of float32 and image_grid_thw [pictures, 3].
    """

    def __init__(self, processor: Any):
        self.image_processor = getattr(processor, "image_processor", None)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_token_id = getattr(processor, "image_token_id", None)

    def __call__(self, examples: list[SFTExample]) -> dict[str, torch.Tensor]:
        length = max(len(example.input_ids) for example in examples)
        input_ids = torch.full((len(examples), length), self.tokenizer.pad_token_id)
        labels = torch.full_like(input_ids, IGNORE)
        attention_mask = torch.zeros_like(input_ids)
        for row, example in enumerate(examples):
            n_tokens = len(example.input_ids)
            input_ids[row, :n_tokens] = torch.tensor(example.input_ids)
            labels[row, :n_tokens] = torch.tensor(example.labels)
            attention_mask[row, :n_tokens] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.image_processor is None:
            return batch
        batch["mm_token_type_ids"] = (input_ids == self.image_token_id).int()
        images = [image for example in examples for image in example.images]
        if images:
            features = self.image_processor(images, return_tensors="pt")
            batch["pixel_values"] = features["pixel_values"]
            batch["image_grid_thw"] = features["image_grid_thw"]
        return batch


class _SFTTrainer(Trainer):
    """A Trainer that asks the LM head for the learned positions only.

    The rest of the logits would be thrown away.
    """

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        unwrapped = self.accelerator.unwrap_model(model)
        is_learned = labels != IGNORE
        # accelerate wraps the outer forward only, which is not called here
        with self.accelerator.autocast():
            hidden = unwrapped.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
            logits = unwrapped.lm_head(hidden[is_learned]).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[is_learned])
        if self.args.gradient_accumulation_steps > 1:
            # a token weighs the same whichever micro-batch it is in
            loss = loss * is_learned.sum() / num_items_in_batch
        return (loss, {"logits": logits}) if return_outputs else loss


def run_stage(
    model: Any, processor: Any, stage: SFTStage, work_dir: str | Path, log_every: int = 100
) -> float:
    """Train `model` in place for one stage.

    Args:
        model: any transformers model with a language-modelling loss.
        processor: tokenizer, or processor of a VLM.
        stage: data and hyper-parameters.
        work_dir: the Trainer's scratch folder; nothing is saved there.
        log_every: steps between two log lines.

    Returns:
        Mean training loss over the last logged interval.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.trainable(name))
    rows = stage.micro_batch_size or stage.batch_size
    has_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=stage.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=stage.batch_size // rows,
        gradient_checkpointing=stage.gradient_checkpointing,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        adam_beta2=0.98,
        lr_scheduler_type=stage.schedule,
        seed=stage.seed,
        data_seed=stage.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=log_every,
        logging_strategy="steps",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        # a dispatched batch is cut to batch_size rows, pictures' patches included
        accelerator_config={"dispatch_batches": False},
        use_cpu=not has_gpu,
        bf16=computes_in_bf16() if has_gpu else processor_computes_in_bf16(),
    )
    attention = model.config._attn_implementation
    if not has_gpu:
        # short rows: plain attention is 1.5x faster than SDPA's CPU backward in bf16
        model.set_attn_implementation("eager")
    trainer = _SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=_DrawnDataset(stage),
        data_collator=SFTCollator(processor),
    )
    # so that Trainer counts the learned tokens of a step, which it asks the model's class about
    trainer.model_accepts_loss_kwargs = True
    logging.getLogger("transformers.trainer").setLevel(logging.WARNING)
    gate = None
    if stage.frozen_heads:
        gate = gate_trainer(trainer, stage.frozen_heads, stage.shared)
    trainer.train()
    if gate is not None:
        gate.remove()
    model.set_attn_implementation(attention)
    model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[-1] if losses else float("nan")
