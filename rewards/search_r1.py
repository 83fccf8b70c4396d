"""The rewards of Search-R1 (arXiv 2503.09516, 2505.15117; repository at a14dc3a).

Exact match, and the variant with a format part (v0.3). The source scores one text: the prompt, the
policy's turns and the search results together. What follows from that:

* the answer is the last `<answer>` pair of at least two, the first being the example in the
  source's prompt; where the policy gives none, one in a search result counts;
* tags without content are a valid format, worth `structure`.

The strict twins read the policy's own turns, and its last turn's answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.answer import exact_match, final_answer, usable_answers
from rewards.format import FormatCheck, format_score
from rewards.normalize import contains_phrase
from rewards.squad import between, squad_em, squad_normalize
from rewards.trajectory import get, turns_of

STRUCTURE, FINAL, RETRIEVAL = 0.2, 0.1, 0.0
"""Scores of a valid format, of an answer in an invalid one, and of retrieved evidence."""
PROMPT_EXAMPLE = "For example, <answer> Beijing </answer>."
"""What the source's prompt holds and its extraction relies on."""

_TAGS = ("think", "search", "information", "answer")
_SPLIT = re.compile(r"(</?(?:think|search|information|answer)>)")
_ASSISTANT = re.compile(r"<\|im_start\|>assistant\s*")
# (state, tag) -> next state
_STEPS = {
    ("start", "<think>"): "think",
    ("found", "<think>"): "think",
    ("think", "</think>"): "thought",
    ("thought", "<search>"): "search",
    ("search", "</search>"): "asked",
    ("asked", "<information>"): "information",
    ("information", "</information>"): "found",
    ("thought", "<answer>"): "answer",
    ("answer", "</answer>"): "end",
}
_INSIDE = {"think", "search", "information", "answer"}


def extract_last_of_two(text: str) -> str | None:
    """The last answer of a text with at least two, as the source has it."""
    found = between(text, "<answer>", "</answer>")
    return found[-1].strip() if len(found) > 1 else None


def is_valid_sequence(text: str) -> bool:
    """The source's state machine on what follows the first assistant mark; False without one."""
    mark = _ASSISTANT.search(text)
    if mark is None:
        return False
    content = text[mark.end() :]
    if any(content.count(f"<{tag}>") != content.count(f"</{tag}>") for tag in _TAGS):
        return False
    state = "start"
    for part in _SPLIT.split(content):
        if not part.strip():
            continue
        if _SPLIT.fullmatch(part):
            if (state, part) not in _STEPS:
                return False
            state = _STEPS[state, part]
        elif state not in _INSIDE:
            return False
    return state == "end"


def em_reward(text: str, answers: Sequence[str]) -> float:
    """1.0 if the extracted answer matches, else 0.0."""
    answer = extract_last_of_two(text)
    return float(answer is not None and squad_em(answer, answers))


def format_reward(
    text: str,
    answers: Sequence[str],
    structure: float = STRUCTURE,
    final: float = FINAL,
    retrieval: float = RETRIEVAL,
) -> float:
    """The format variant. Range [0, 1] with the default scores.

    =============  =====================  =============
    answer         valid format           else
    =============  =====================  =============
    right          1                      1 - structure
    wrong          structure (+retrieval) final
    none           structure (+retrieval) 0
    =============  =====================  =============
    """
    is_valid = is_valid_sequence(text)
    answer = extract_last_of_two(text)
    if answer is not None and squad_em(answer, answers):
        return 1.0 if is_valid else 1.0 - structure
    if is_valid:
        blocks = (
            squad_normalize(block) for block in between(text, "<information>", "</information>")
        )
        golds = [squad_normalize(gold) for gold in answers]
        has_evidence = any(gold in block for block in blocks for gold in golds)
        return structure + retrieval if has_evidence else structure
    return 0.0 if answer is None else final


def scored_text(trajectory: Any) -> str:
    """An episode as the text that the source would score."""
    turns = "".join(
        (get(turn, "text") or "") + (get(turn, "observation") or "")
        for turn in turns_of(trajectory)
    )
    return f"{PROMPT_EXAMPLE}<|im_start|>assistant\n{turns}"


def strict_em_reward(trajectory: Any, answers: Sequence[str]) -> float:
    """1.0 if the answer in the policy's last turn matches, else 0.0."""
    return float(exact_match(final_answer(trajectory), answers))


def strict_format_reward(
    trajectory: Any,
    answers: Sequence[str],
    check_format: FormatCheck | None = None,
    structure: float = STRUCTURE,
    final: float = FINAL,
    retrieval: float = RETRIEVAL,
) -> float:
    """The table of `format_reward` on the policy's own turns; gold counts as a whole phrase."""
    is_valid = format_score(trajectory, check_format) == 1.0
    answer = final_answer(trajectory)
    if exact_match(answer, answers):
        return 1.0 if is_valid else 1.0 - structure
    if is_valid:
        seen = [get(turn, "observation") or "" for turn in turns_of(trajectory)]
        golds = usable_answers(answers)
        has_evidence = retrieval and any(
            contains_phrase(text, gold) for text in seen for gold in golds
        )
        return structure + retrieval if has_evidence else structure
    return 0.0 if answer is None else final
