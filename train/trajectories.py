"""Trajectories: one search episode as the policy lived it, and the JSON line that keeps it.

A trajectory is the single record that rollout, reward, trainer, evaluation, W&B table and viewer
share. Token ids are those the policy sampled and those the environment appended; nothing is ever
tokenised a second time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.disk import writing

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 2 adds what version 1 lacks: tokens, logprobs, advantages, masked_from, gold."""
CALL_TYPES = ("search", "image_search", "visit")
FATAL_FAULTS = 3
"""Failures of a service in a row after which an episode cannot be the policy's fault any more."""


@dataclass
class Turn:
    """One turn of the policy and what the environment answered."""

    text: str
    """the policy's text, special tokens removed"""
    token_ids: list[int]
    """tokens sampled by the policy, an end-of-turn token included if it was sampled"""
    logprobs: list[float]
    """log-probability of each sampled token under softmax(logits / temperature), full vocabulary"""
    action: dict[str, Any]
    """{"type": "search", "query"} | {"type": "image_search", "region"} | {"type": "answer", "text"}
    | {"type": "visit", "url", "question"} | {"type": "invalid", "reason"}
    | {"type": "parallel", "calls": [several of the calls above]}"""
    entropies: list[float] = field(default_factory=list)
    """entropy of the distribution each token was drawn from, in nats"""
    observation: str | None = None
    """what the environment wrote after the turn; None after the last one"""
    observation_ids: list[int] = field(default_factory=list)
    """its tokens, image placeholders expanded; empty if it no longer fitted the budget"""
    images: list[Any] = field(default_factory=list)
    """returned PIL images, in the order of their placeholders"""
    hits: list[str] = field(default_factory=list)
    """ids of retrieved passages or entities"""
    is_error: bool = False
    """the tool call failed; of several, any"""
    fault: str | None = None
    """"model" for a bad call, "infrastructure" for a failed service (of several calls, any)"""
    call_faults: list[str | None] = field(default_factory=list)
    """of several calls, the fault of each; empty for one; not recorded"""
    seconds: float = 0.0
    """time the tool took"""
    retries: int = 0
    """further attempts that the tool took"""
    tokens: list[str] = field(default_factory=list)
    """text of each sampled token (`train.token_texts`); empty where the record shall not have it"""

    @property
    def actions(self) -> list[dict[str, Any]]:
        """The turn's actions: its one action, or every call of a turn with several."""
        return self.action["calls"] if self.action["type"] == "parallel" else [self.action]


@dataclass(repr=False)
class Trajectory:
    """One episode: prompt, turns, why it ended, and its reward parts."""

    question_id: str
    kind: str
    seen: bool
    prompt: str
    """the question as shown to the policy, before the chat template"""
    prompt_ids: list[int]
    """prompt tokens with expanded image placeholders"""
    images: list[Any]
    """images of the prompt"""
    turns: list[Turn] = field(default_factory=list)
    stop_reason: str = ""
    answer: str | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    advantages: list[float] = field(default_factory=list)
    """of training: the advantage of each turn's tokens; they are equal without hop credit"""
    masked_from: int | None = None
    """of training: first turn whose tokens carry no loss; None if all of them do"""

    def __repr__(self) -> str:
        # TRL prints an episode that cannot be scored; thousands of numbers would fill the log
        return f"Trajectory({self.question_id!r}, {len(self.turns)} turns, {self.stop_reason!r})"

    @property
    def completion_ids(self) -> list[int]:
        """Everything after the prompt: turn, observation, turn, ... as token ids."""
        return [i for turn in self.turns for i in (*turn.token_ids, *turn.observation_ids)]

    @property
    def completion_mask(self) -> list[int]:
        """1 for tokens of the policy, 0 for tokens of observations; as long as completion_ids."""
        return [
            m
            for turn in self.turns
            for m in ([1] * len(turn.token_ids) + [0] * len(turn.observation_ids))
        ]

    @property
    def completion_logprobs(self) -> list[float]:
        """Sampling log-probs, 0.0 at observation tokens; as long as completion_ids."""
        return [
            p for turn in self.turns for p in (*turn.logprobs, *([0.0] * len(turn.observation_ids)))
        ]

    @property
    def completion_entropies(self) -> list[float]:
        """Entropies at sampling, 0.0 at observation tokens; as long as completion_ids."""
        return [
            h
            for turn in self.turns
            for h in (*turn.entropies, *([0.0] * len(turn.observation_ids)))
        ]

    @property
    def all_images(self) -> list[Any]:
        """Prompt images, then returned images whose tokens are in the context, in order."""
        shown = [image for turn in self.turns if turn.observation_ids for image in turn.images]
        return [*self.images, *shown]

    @property
    def text(self) -> str:
        """Turns and observations as one text."""
        return "".join(turn.text + (turn.observation or "") for turn in self.turns)

    @property
    def fatal_turn(self) -> int | None:
        """Index of the first of three turns in a row in which a service failed, or None.

        Source: fatal-aware GRPO of OpenSearch-VL.
        """
        n_in_row = 0
        for index, turn in enumerate(self.turns):
            n_in_row = n_in_row + 1 if turn.fault == "infrastructure" else 0
            if n_in_row == FATAL_FAULTS:
                return index - FATAL_FAULTS + 1
        return None

    @property
    def mask_before_fatal(self) -> list[int]:
        """`completion_mask` with zeros from the fatal turn on."""
        if self.fatal_turn is None:
            return self.completion_mask
        before = self.turns[: self.fatal_turn]
        n_sound = sum(len(turn.token_ids) + len(turn.observation_ids) for turn in before)
        mask = self.completion_mask
        return mask[:n_sound] + [0] * (len(mask) - n_sound)

    @property
    def has_unread_result(self) -> bool:
        """A tool's result came back but did not fit the token budget any more."""
        return any(turn.observation is not None and not turn.observation_ids for turn in self.turns)

    @property
    def n_policy_tokens(self) -> int:
        """Tokens the policy sampled."""
        return sum(len(turn.token_ids) for turn in self.turns)

    def count(self, action_type: str) -> int:
        """Number of actions of this type; calls side by side in one turn count one by one."""
        return sum(a["type"] == action_type for turn in self.turns for a in turn.actions)

    @property
    def n_calls(self) -> int:
        """Number of tool calls: searches and visits, refused and failed ones included."""
        return sum(map(self.count, CALL_TYPES))

    def to_dict(self, step: int, arm: str = "", seed: int = 0, phase: str = "train") -> dict:
        """Plain data for one JSON line; images become the SHA-256 of their pixels."""
        row = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "phase": phase,
            "arm": arm,
            "seed": seed,
            "question_id": self.question_id,
            "kind": self.kind,
            "seen": self.seen,
            "prompt": self.prompt,
            "n_prompt_tokens": len(self.prompt_ids),
            "images": [image_hash(image) for image in self.images],
            "turns": [
                {
                    "text": turn.text,
                    "n_tokens": len(turn.token_ids),
                    "logprob": round(sum(turn.logprobs), 4),
                    "entropy": round(sum(turn.entropies) / max(1, len(turn.entropies)), 4),
                    "action": turn.action,
                    "observation": turn.observation,
                    "n_observation_tokens": len(turn.observation_ids),
                    "images": [image_hash(image) for image in turn.images],
                    "hits": turn.hits,
                    "is_error": turn.is_error,
                    "fault": turn.fault,
                    "seconds": round(turn.seconds, 4),
                    "retries": turn.retries,
                    **_token_record(turn),
                }
                for turn in self.turns
            ],
            "stop_reason": self.stop_reason,
            "answer": self.answer,
            "rewards": self.rewards,
        }
        if self.advantages:
            row["advantages"] = [round(advantage, 4) for advantage in self.advantages]
        if self.masked_from is not None:
            row["masked_from"] = self.masked_from
        return row


def _token_record(turn: Turn) -> dict[str, Any]:
    if not turn.tokens:
        return {}
    # + 0.0: no minus before a nought
    return {"tokens": turn.tokens, "logprobs": [round(p, 3) + 0.0 for p in turn.logprobs]}


def turn_advantages(episode: Trajectory, advantages: float | Sequence[float]) -> list[float]:
    """The advantage of each turn: the episode's, or with hop credit that of the turn's tokens.

    Args:
        episode: has the turns.
        advantages: one for the episode, or one a token in the order of `completion_ids`.
    """
    if not isinstance(advantages, Sequence):
        return [advantages] * len(episode.turns)
    return [advantages[begin] for begin in _turn_begins(episode)]


def loss_mask(episode: Trajectory, masks_fatal: bool, masks_truncated: bool) -> list[int]:
    """1 for tokens that training learns from, in the order of `completion_ids`.

    Args:
        episode: has the turns.
        masks_fatal: nothing from a fatal turn on.
        masks_truncated: nothing of an episode that its budget has cut.
    """
    if masks_truncated and episode.stop_reason == "length":
        return [0] * len(episode.completion_ids)
    return episode.mask_before_fatal if masks_fatal else episode.completion_mask


def first_masked_turn(episode: Trajectory, mask: Sequence[int]) -> int | None:
    """Index of the first turn whose tokens carry no loss, or None.

    Args:
        episode: has the turns.
        mask: 1 for tokens that carry loss, in the order of `completion_ids`.
    """
    begins = zip(_turn_begins(episode), episode.turns, strict=True)
    return next((i for i, (at, t) in enumerate(begins) if t.token_ids and not mask[at]), None)


def _turn_begins(episode: Trajectory) -> Iterator[int]:
    begin = 0
    for turn in episode.turns:
        yield begin
        begin += len(turn.token_ids) + len(turn.observation_ids)


def gold_of(question: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a question's line says about its solution: right answers, and hits that lead there."""
    documents = [*(question.get("gold_passages") or ()), question.get("entity")]
    return {
        "answers": [str(answer) for answer in question.get("answers") or ()],
        "hits": [document for document in documents if document],
    }


def image_hash(image: Any) -> str:
    """SHA-256 of mode, size and pixels of a PIL image: equal pictures have equal hashes."""
    header = f"{image.mode} {image.size[0]}x{image.size[1]} ".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends one JSON object a line; a crash can cut the last line, never an earlier one.

    Raises:
        DiskError: the disk takes no more.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def truncate_jsonl(
    path: Path, last_step: int, is_wanted: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Drops lines of steps after `last_step`, and a line that a crash cut short.

    Goes from line to line and copies their bytes: the trajectories of a long run fill no memory.

    Args:
        path: the file.
        last_step: that the run goes on from.
        is_wanted: which of the lines that stay the caller needs.

    Returns:
        The lines that stay and are wanted, in order.

    Raises:
        DiskError: the disk takes no more.
    """
    if not path.exists():
        return []
    found = []
    temporary = path.with_name(path.name + ".tmp")
    with writing(temporary), path.open("rb") as file, temporary.open("wb") as kept:
        # bytes end at line feeds alone: U+2028 and U+0085, which a policy may write, stay as they
        # are, and a line may be cut within a character
        for line in file:
            if line == b"\n":
                continue
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] > last_step:
                continue
            kept.write(line.removesuffix(b"\n") + b"\n")
            if is_wanted(row):
                found.append(row)
    temporary.replace(path)
    return found
