"""Is the final answer right? Exact match over all aliases, after normalisation. Range {0, 1}."""

import re
from collections.abc import Sequence
from typing import Any

from rewards.normalize import normalize_answer
from rewards.trajectory import turn_texts

MAX_ANSWER_CHARS = 200
"""Longer answers count as wrong: they only win by flooding the normalisation."""

TAGS = (
    "think", "reason", "search", "text_search", "image_search", "visit", "tool_call", "answer",
    "information", "tool_response", "img",
)  # fmt: skip
TAG = re.compile(rf"</?(?:{'|'.join(TAGS)})>")
"""Any tag of the dialects; none may stand inside an answer."""

_OPENING, _CLOSING = "<answer>", "</answer>"
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def extract_answer(turn: str) -> str | None:
    """The well-formed `<answer> ... </answer>` at the end of a turn, or None.

    The last pair counts; text or a call after it means that the turn was no answer. An empty pair
    is none either.
    """
    turn = turn.rstrip()
    while turn.endswith(_END_TOKENS):
        turn = turn[: turn.rindex("<|")].rstrip()
    start = turn.rfind(_OPENING)
    if not turn.endswith(_CLOSING) or start < 0:
        return None
    content = turn[start + len(_OPENING) : -len(_CLOSING)].strip()
    return None if not content or TAG.search(content) else content


def final_answer(trajectory: Any) -> str | None:
    """The answer in the policy's own last turn; answers in observations or before do not count."""
    texts = turn_texts(trajectory)
    return extract_answer(texts[-1]) if texts else None


def exact_match(
    prediction: str | None, answers: Sequence[str], max_chars: int = MAX_ANSWER_CHARS
) -> bool:
    """Whether the prediction equals one of the answers after normalisation.

    Empty gold answers are dropped, so that an empty prediction never wins.
    """
    if prediction is None or len(prediction) > max_chars:
        return False
    normal = normalize_answer(prediction)
    return bool(normal) and normal in usable_answers(answers)


def usable_answers(answers: Sequence[str]) -> set[str]:
    """Normalised gold answers without empty ones; an empty set means: cannot be scored."""
    return {normalize_answer(answer) for answer in answers} - {""}
