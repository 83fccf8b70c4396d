"""The reward of one trajectory, part by part.

    accuracy       = 1 if the final answer matches, else 0
    search_penalty = p if accuracy = 1 and the episode searched, else 0
    format         = 1 if the episode is well-formed, else 0
    total          = w_accuracy * accuracy * (1 - search_penalty) + w_format * format

Range of the total: 0 to w_accuracy + w_format. None stands for "cannot be scored" (a tool failed,
or the question has no usable gold answer); such an episode must not enter a mean as 0.
Source: MMSearch-R1 (arXiv 2506.20670), there with (1 - w_format) for w_accuracy.
"""

from collections.abc import Sequence
from typing import Any

from rewards.answer import MAX_ANSWER_CHARS, exact_match, final_answer, usable_answers
from rewards.errors import RewardError
from rewards.format import FormatCheck, format_score
from rewards.search import search_penalty
from rewards.trajectory import get, has_infrastructure_fault

PARTS = ("accuracy", "format", "search_penalty", "total")


def score(
    trajectory: Any, question: Any, weights: Any, check_format: FormatCheck | None = None
) -> dict[str, float | None]:
    """Scores one trajectory.

    Args:
        trajectory: a dict or an object with `turns` (each with text, action, fault).
        question: a dict or an object with `answers`.
        weights: a dict or an object with `accuracy`, `format`, `search_penalty` and, optionally,
            `max_answer_chars` and `infrastructure_fault` ("skip", "score", or
            "mask", which scores as "score" does); the section `rewards` of the settings fits.
        check_format: a dialect's `check_format`; without it the rule all dialects share.

    Returns:
        The parts by name. `accuracy`, `search_penalty` and `total` are None when the episode
        cannot be scored; `format` always has a value.

    Raises:
        RewardError: a weight is missing.
    """
    formatted = format_score(trajectory, check_format)
    answers = get(question, "answers") or ()
    if not _can_be_scored(trajectory, answers, weights):
        return {"accuracy": None, "format": formatted, "search_penalty": None, "total": None}
    max_chars = get(weights, "max_answer_chars", MAX_ANSWER_CHARS)
    is_correct = exact_match(final_answer(trajectory), answers, max_chars)
    penalty = search_penalty(trajectory, is_correct, _weight(weights, "search_penalty"))
    total = _weight(weights, "accuracy") * is_correct * (1.0 - penalty)
    total += _weight(weights, "format") * formatted
    return {
        "accuracy": float(is_correct),
        "format": formatted,
        "search_penalty": penalty,
        "total": total,
    }


def score_all(
    trajectories: Sequence[Any],
    questions: Sequence[Any],
    weights: Any,
    check_format: FormatCheck | None = None,
) -> dict[str, list[float | None]]:
    """Scores a batch: part name -> one value per trajectory, in order."""
    rows = [
        score(trajectory, question, weights, check_format)
        for trajectory, question in zip(trajectories, questions, strict=True)
    ]
    return {part: [row[part] for row in rows] for part in PARTS}


def _can_be_scored(trajectory: Any, answers: Sequence[str], weights: Any) -> bool:
    if not usable_answers(answers):
        return False
    skips_faults = get(weights, "infrastructure_fault", "skip") == "skip"
    return not (skips_faults and has_infrastructure_fault(trajectory))


def _weight(weights: Any, name: str) -> float:
    value = get(weights, name)
    if value is None:
        raise RewardError(f"rewards.{name} is missing; give it a number")
    return float(value)
