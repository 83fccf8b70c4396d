"""Samples of calibration data, and the batches that a model takes.

A sample is a prompt, its pictures, and what follows: the parent's own words (which count as its
answer) and what others said in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """One conversation."""

    prompt: str | list[int]
    """rendered text up to where the parent speaks first, or its tokens"""
    images: list[Any] = field(default_factory=list)
    """PIL images of the prompt"""
    answer_ids: list[int] = field(default_factory=list)
    """tokens after the prompt"""
    answer_mask: list[int] = field(default_factory=list)
    """1 for the parent's own tokens, 0 for tokens of users and observations"""

    def say(self, token_ids: Sequence[int], is_own: bool) -> None:
        """Appends tokens."""
        self.answer_ids += token_ids
        self.answer_mask += [int(is_own)] * len(token_ids)


def render(messages: list[dict[str, Any]], processor: Any, is_answered: bool = False) -> str:
    """Messages as the parent's chat template writes them."""
    from train.episodes import messages_for

    tokenizer = getattr(processor, "tokenizer", processor)
    owner = processor if getattr(processor, "chat_template", None) else tokenizer
    if getattr(owner, "chat_template", None):
        return owner.apply_chat_template(
            messages_for(processor, messages),
            tokenize=False,
            add_generation_prompt=not is_answered,
        )
    texts = [
        message["content"]
        if isinstance(message["content"], str)
        else "".join(part.get("text", "") for part in message["content"])
        for message in messages
    ]
    return "\n".join(texts)


def answer_tokens(text: str, processor: Any) -> list[int]:
    """Tokens of an answer, with the token that ends it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]


def generate_answers(
    samples: Sequence[Sample],
    model: Any,
    processor: Any,
    *,
    size: int,
    max_new_tokens: int,
    max_tokens: int = 2048,
) -> None:
    """Lets a parent answer greedily where a sample has no answer yet.

    Args:
        samples: get their answers here.
        model: the whole parent.
        processor: its processor or tokenizer.
        size: samples a batch.
        max_new_tokens: longest answer.
        max_tokens: longest sample; what is answered is what will be measured.
    """
    import torch

    tokenizer = getattr(processor, "tokenizer", processor)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    open_samples = [sample for sample in samples if not sample.answer_ids]
    found = model.generation_config.eos_token_id  # what `generate` stops at
    ends = set(found if isinstance(found, list) else [] if found is None else [found])
    for chunk in chunks(open_samples, size):
        inputs = {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in collate(chunk, processor, max_tokens=max_tokens).items()
        }
        with torch.inference_mode():
            # published checkpoints ask for a penalty, and generate would take theirs
            tokens = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=pad,
            )
        for sample, row in zip(chunk, tokens[:, inputs["input_ids"].shape[1] :], strict=True):
            sample.say(_up_to_end(row.tolist(), ends), True)


def _up_to_end(token_ids: list[int], ends: set[int]) -> list[int]:
    """What a parent said, its end token included; `generate` pads rows that ended early.

    The padding is not told by its number: it may be the end token itself, or, where a tokenizer has
    no padding, a word.
    """
    length = next((i + 1 for i, token in enumerate(token_ids) if token in ends), len(token_ids))
    return token_ids[:length]


class Batches:
    """Samples as inputs of the model, made anew each time they are iterated.

    Args:
        samples: of all shards.
        size: samples a batch.
        processor: of the parent, or its tokenizer.
        tokens: `all` or `answer`: which tokens `calibration_mask` leaves.
        max_tokens: longest sample; what is beyond is cut off, but never a picture.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        processor: Any,
        *,
        tokens: str = "all",
        max_tokens: int = 2048,
    ) -> None:
        self._chunks = list(chunks(samples, size))
        self._processor = processor
        self._tokens, self._max_tokens = tokens, max_tokens

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for chunk in self._chunks:
            yield collate(chunk, self._processor, self._tokens, self._max_tokens)


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Neighbouring items, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def collate(
    samples: Sequence[Sample], processor: Any, tokens: str = "all", max_tokens: int = 2048
) -> dict[str, Any]:
    """One batch: prompts padded on the left, what follows on the right.

    Returns:
        input_ids and attention_mask [B, T], calibration_mask [B, T] for `answer`, and what the
        processor makes of pictures.
    """
    import torch

    tokenizer = getattr(processor, "tokenizer", processor)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if any(sample.images for sample in samples):
        inputs = dict(
            processor(
                text=[sample.prompt for sample in samples],
                images=[sample.images for sample in samples],
                padding=True,
                return_tensors="pt",
            )
        )
        room = max(0, max_tokens - inputs["input_ids"].shape[1])
        tails = [sample.answer_ids[:room] for sample in samples]
    else:
        prompts = [_prompt_tokens(sample, tokenizer)[:max_tokens] for sample in samples]
        tails = [
            sample.answer_ids[: max_tokens - len(prompt)]
            for sample, prompt in zip(samples, prompts, strict=True)
        ]
        inputs = _padded(prompts, pad, on_left=True)
    after = _padded(tails, pad, on_left=False)
    own = _padded(
        [sample.answer_mask[: len(tail)] for sample, tail in zip(samples, tails, strict=True)],
        0,
        on_left=False,
    )
    prompt_ids = inputs["input_ids"]
    batch = {
        # what marks the places of pictures has nothing to mark behind the prompt
        key: torch.cat([value, torch.zeros_like(after["input_ids"])], dim=1)
        if isinstance(value, torch.Tensor) and value.shape == prompt_ids.shape
        else value
        for key, value in inputs.items()
    }
    batch["input_ids"] = torch.cat([prompt_ids, after["input_ids"]], dim=1)
    batch["attention_mask"] = torch.cat([inputs["attention_mask"], after["attention_mask"]], dim=1)
    if tokens == "answer":
        batch["calibration_mask"] = torch.cat(
            [torch.zeros_like(prompt_ids), own["input_ids"]], dim=1
        )
    return batch


def _prompt_tokens(sample: Sample, tokenizer: Any) -> list[int]:
    if isinstance(sample.prompt, list):
        return sample.prompt
    # a chat template writes the special tokens itself
    is_plain = not getattr(tokenizer, "chat_template", None)
    return tokenizer(sample.prompt, add_special_tokens=is_plain)["input_ids"]


def _padded(rows: Sequence[list[int]], pad: int, *, on_left: bool) -> dict[str, Any]:
    import torch

    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap, own = length - len(row), [1] * len(row)
        ids.append([pad] * gap + row if on_left else row + [pad] * gap)
        mask.append([0] * gap + own if on_left else own + [0] * gap)
    # the type is said, for rows without tokens would be floats
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "attention_mask": torch.tensor(mask, dtype=torch.long),
    }
