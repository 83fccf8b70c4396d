"""The work that both sides of `obm bench rollout` do, token for token.

A random Qwen2.5-VL made from its config, a question with a picture, and a group of episodes with
scripted turns: text search, image search that returns two pictures, text search, ..., answer. The
two formats differ (TRL: JSON calls and a list of tools in the prompt; ours: the tags of Search-R1),
so words are added until prompts, turns and observations are equally long. Every episode says
something else, and every second one is rewarded: no row can be spared because it equals another or
has no advantage.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl.chat_template_utils import qwen3_vl_chat_template

from environments.dialects import SEARCH_R1
from train.policy import ImageOnlyProcessor
from train.tiny import PATCH_SIZE, train_tokenizer, vlm_config
from train.vision import ImageStore

TITLE = "stone"
"""Name of every search result, and the right answer."""
WORDS = [
    "amber", "birch", "cedar", "delta", "ember", "field", "grove", "heron", "islet", "jetty",
    "knoll", "larch", "maple", "north", "ocean", "pearl", "quill", "river", "stone", "tower",
    "urban", "valley", "willow", "yacht", "zebra", "arch", "bridge", "canal", "dune", "estate",
]  # fmt: skip
"""One token each."""
PICTURES_PER_RESULT = 2
PICTURE_SIZE = (320, 240)
TEXT_RESULT_TOKENS = 50
PICTURE_RESULT_TOKENS = 48
"""Around the placeholders of the pictures."""
LONGEST = 16384

POLICIES: dict[str, dict[str, int]] = {
    # the shape of the embedded world's policies
    "tiny": {},
    "20m": {
        "hidden": 384, "layers": 8, "intermediate": 1536, "vision_hidden": 192, "vision_depth": 4,
    },
    "80m": {
        "hidden": 640, "layers": 12, "intermediate": 2560, "vision_hidden": 320, "vision_depth": 6,
    },
}  # fmt: skip
"""Sizes over those of `train.tiny.vlm_config`."""
SCHEMA = (
    '{"type": "function", "function": {"name": "search", "description": "Search the passages.", '
    '"parameters": {"type": "object", "properties": {"query": {"type": "string", "description": '
    '"What to search for."}}, "required": ["query"]}, "return": {"type": "array", "items": '
    '{"type": "object", "additionalProperties": {}}, "description": "The best matches."}}}'
)
"""How a tool looks in TRL's prompt; for the tokenizer, which full-size ones know as well."""
KEY_VALUE_HEADS = 2
"""Of the larger policies: fewer than query heads, as in Qwen2.5."""
VOCABULARY = 8192
"""Of the larger policies; the tokenizer uses the first entries alone."""


@dataclass(frozen=True)
class Workload:
    """One group of episodes."""

    policy: str = "tiny"
    """a name in `POLICIES`"""
    group: int = 8
    turns: int = 3
    """tool turns: text, pictures, text, ...; the answer follows"""
    prompt_tokens: int = 583
    turn_tokens: int = 40
    """tokens of the policy in every turn, the answer's included"""
    results: str = "distinct"
    """distinct: every call returns something else; shared: all calls of a turn return the same"""
    seed: int = 0

    @property
    def completion_tokens(self) -> int:
        """Upper bound of an episode's tokens behind the prompt."""
        result = PICTURE_RESULT_TOKENS + TEXT_RESULT_TOKENS + PICTURES_PER_RESULT * 128
        return (self.turns + 1) * self.turn_tokens + self.turns * result


def asks_for_pictures(turn: int) -> bool:
    """Whether tool turn number `turn` is an image search."""
    return turn % 2 == 1


def make_policy(name: str, seed: int = 0) -> tuple[Any, ImageOnlyProcessor]:
    """A random policy in float32 and its processor; nothing is downloaded.

    Args:
        name: in `POLICIES`.
        seed: of the weights.
    """
    frames = [frame("") for sides in (OURS, PEER) for frame in sides.values()]
    words = [f" {word}" for word in WORDS]
    corpus = [*words, *frames, SEARCH_R1.agent_text, qwen3_vl_chat_template, SCHEMA]
    tokenizer = train_tokenizer(corpus * 4, vocab_size=2048)
    tokenizer.model_max_length = LONGEST
    config = vlm_config(tokenizer, **POLICIES[name])
    config.text_config.max_position_embeddings = LONGEST
    if POLICIES[name]:
        config.text_config.num_key_value_heads = KEY_VALUE_HEADS
        config.text_config.vocab_size = VOCABULARY
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    image_processor = Qwen2VLImageProcessorPil(patch_size=PATCH_SIZE)
    template = tokenizer.chat_template
    return model, ImageOnlyProcessor(image_processor, tokenizer, chat_template=template)


# ---------------------------------------------------------------- texts of exact length

Frame = Callable[[str], str]
"""Words -> the text that the policy reads or writes."""

_MARK = "<|vision_start|><|vision_end|>"
_DOCUMENT = f"Doc {{}}(Title: {TITLE}{{}}) "

OURS: dict[str, Frame] = {
    "text search": lambda words: f"<think>{words} </think> <search> {TITLE} </search>",
    "image search": lambda words: f"<think>{words} </think> <search> <img> </search>",
    "right": lambda words: f"<think>{words} </think> <answer> {TITLE} </answer>",
    "wrong": lambda words: f"<think>{words} </think> <answer> river </answer>",
    "text result": lambda words: (
        f"\n\n<information> {_DOCUMENT.format(1, '')}{words.lstrip()} </information>\n\n"
    ),
    "image result": lambda words: (
        f"\n\n<information> {_DOCUMENT.format(1, words)}{_MARK} {_DOCUMENT.format(2, '')}{_MARK}"
        " </information>\n\n"
    ),
}


def _call(name: str, argument: str, value: str) -> str:
    call = f'{{"name": "{name}", "arguments": {{"{argument}": "{value}"}}}}'
    return f"<tool_call>\n{call}\n</tool_call><|im_end|>"


def _tool_answer(content: str) -> str:
    return (
        f"\n<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


PEER: dict[str, Frame] = {
    "text search": lambda words: words + _call("search", "query", TITLE),
    "image search": lambda words: words + _call("image_search", "region", "full"),
    "right": lambda words: f"{words}<|im_end|>",
    "wrong": lambda words: f"{words}<|im_end|>",
    "text result": lambda words: _tool_answer(TITLE + words),
    "image result": lambda words: _tool_answer(_MARK * PICTURES_PER_RESULT + TITLE + words),
}


class Writer:
    """Words for frames; equal seeds give equal words.

    Args:
        tokenizer: counts tokens.
        seed: of the words.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)

    def fill(self, frame: Frame, n_tokens: int) -> str:
        """Words with which `frame` has exactly `n_tokens` tokens.

        Raises:
            ValueError: The frame alone is longer.
        """
        missing = n_tokens - self.count(frame(" stone")) + 1
        if missing < 1:
            raise ValueError(f"{frame('')!r} does not fit {n_tokens} tokens")
        words = "".join(f" {word}" for word in self._random.choices(WORDS, k=missing))
        if self.count(frame(words)) != n_tokens:
            raise ValueError(f"{frame(words)!r} has {self.count(frame(words))} tokens")
        return words

    def count(self, text: str) -> int:
        """Tokens of a text as it stands."""
        return len(self.token_ids(text))

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text, none added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


class Script:
    """The question, what the policy says and what the tools answer, step after step.

    Args:
        work: the group.
        frames: of one side.
        processor: of the policy.
    """

    def __init__(
        self, work: Workload, frames: dict[str, Frame], processor: ImageOnlyProcessor
    ) -> None:
        self.work = work
        self.frames = frames
        self.writer = Writer(processor.tokenizer, work.seed)
        self._processor = processor
        self._pixels = np.random.default_rng(work.seed)
        self._calls: Counter[str] = Counter()
        self._results: dict[tuple[str, int], Any] = {}

    def question(self, render: Frame, picture: Image.Image) -> str:
        """A question that makes the prompt as long as the workload says.

        Args:
            render: question -> the prompt's text, with one placeholder for the picture.
            picture: the question's.
        """
        n_placeholders = ImageStore(self._processor.image_processor).encode(picture).n_tokens
        words = self.writer.fill(
            lambda words: render(f"What is this?{words}"),
            self.work.prompt_tokens - n_placeholders + 1,
        )
        return f"What is this?{words}"

    def turn(self, row: int, turn: int) -> str:
        """A text that no other episode has."""
        kind = "image search" if asks_for_pictures(turn) else "text search"
        if turn == self.work.turns:
            kind = "right" if row % 2 == 0 else "wrong"
        frame = self.frames[kind]
        return frame(self.writer.fill(frame, self.work.turn_tokens))

    def text_result(self) -> str:
        """Words of the next text result."""
        frame = self.frames["text result"]
        return self._result("text", lambda: self.writer.fill(frame, TEXT_RESULT_TOKENS))

    def image_result(self) -> tuple[str, list[Image.Image]]:
        """Words and pictures of the next image result."""
        frame = self.frames["image result"]
        return self._result(
            "image",
            lambda: (
                self.writer.fill(frame, PICTURE_RESULT_TOKENS),
                [self.picture() for _ in range(PICTURES_PER_RESULT)],
            ),
        )

    def picture(self) -> Image.Image:
        """Noise."""
        width, height = PICTURE_SIZE
        return Image.fromarray(self._pixels.integers(0, 255, (height, width, 3), dtype=np.uint8))

    def _result(self, tool: str, make: Callable[[], Any]) -> Any:
        number = self._calls[tool]
        self._calls[tool] += 1
        if self.work.results == "distinct":
            return make()
        # the group's calls of one turn come one after the other
        key = (tool, number // self.work.group)
        if key not in self._results:
            self._results[key] = make()
        return self._results[key]
