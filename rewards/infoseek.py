"""The metric of InfoSeek (arXiv 2302.11713; infoseek_eval at c8ef023).

Time and string questions: exact match over the answers. Numerical ones: the first two numbers of
the prediction against the gold range; one number is right within it, two that ascend are a range
and right within it or from an overlap of a half. The final score is the harmonic mean of the splits
of unseen questions and unseen entities, each in percent and rounded to two places.

Known flaws: two numbers are a range whatever they say, so "1.05 km (3445 ft)" is wrong; no number
is [0, 0], so "no idea" is right where the range holds 0; digits inside words count ("A6" is 6);
units and scale words are not read. The comment on time (a year more or less is right) is not in the
code: the tolerance lies in the answers. The strict twin reads numbers by `rewards.numeric`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.answer import correctness
from rewards.squad import squad_em
from rewards.trajectory import get

MIN_IOU = 0.5
_EPSILON = 1e-12
_NUMBER = re.compile(r"[-+]?[.]?[\d]+(?:,\d\d\d)*[\.]?\d*(?:[eE][-+]?\d+)?")


def official_score(prediction: str, question: Any) -> float:
    """1.0 or 0.0 by the source's rules.

    Args:
        prediction: the answer.
        question: `answers`; `question_type` (time, numerical, string); `range` of a numerical one.
    """
    if _is_numerical(question):
        return float(_in_range(read_prediction(prediction), get(question, "range")))
    return float(squad_em(prediction, get(question, "answers") or ()))


def strict_score(prediction: str, question: Any) -> float:
    """1.0 or 0.0 by ours: one number in the range, or the answer by its kind."""
    if _is_numerical(question):
        limits = list(get(question, "range"))
        as_range = {"answers": [], "range": limits, "unit": get(question, "unit")}
        return correctness(prediction, as_range, "typed")
    return correctness(prediction, {"answers": get(question, "answers")}, "typed")


def read_prediction(text: str) -> tuple[float, float]:
    """The first two numbers of a text as a range, one number twice; (0, 0) if there is none."""
    spaced = "".join(
        " - " if ch == "-" and i and text[i - 1].isdigit() else ch for i, ch in enumerate(text)
    )
    numbers = []
    for found in _NUMBER.findall(spaced)[:2]:
        plain = found.replace(",", "").strip(".")
        plain = plain.split(".")[0] if plain.count(".") > 1 else plain
        # "-.5.5" stops the source's script; here it is no number
        numbers += [float(plain)] if plain not in ("-", "+") else []
    if not numbers:
        return 0.0, 0.0
    if len(numbers) == 1 or numbers[0] > numbers[1]:
        return numbers[0], numbers[0]
    return numbers[0], numbers[1]


def official_final(unseen_question: Sequence[float], unseen_entity: Sequence[float]) -> float:
    """Harmonic mean of the two splits in percent, rounded as the source rounds.

    Args:
        unseen_question: scores of the questions of that split.
        unseen_entity: scores of the others.
    """
    percents = [
        round(sum(split) / len(split) * 100, 2) if split else 0.0
        for split in (unseen_question, unseen_entity)
    ]
    return round(2.0 / sum(1.0 / (percent or _EPSILON) for percent in percents), 2)


def strict_final(unseen_question: Sequence[float], unseen_entity: Sequence[float]) -> float | None:
    """Harmonic mean in percent, not rounded; None where a split is empty, 0 where one is 0."""
    if not unseen_question or not unseen_entity:
        return None
    means = [sum(split) / len(split) for split in (unseen_question, unseen_entity)]
    return 200.0 * means[0] * means[1] / sum(means) if sum(means) else 0.0


def _is_numerical(question: Any) -> bool:
    return str(get(question, "question_type", "")).lower() == "numerical"


def _in_range(predicted: tuple[float, float], limits: Sequence[float]) -> bool:
    low, high = (float(limit) for limit in limits)
    if low <= predicted[0] <= high and low <= predicted[1] <= high:
        return True
    if predicted[0] == predicted[1]:
        return False
    shared = max(0.0, min(predicted[1], high) - max(predicted[0], low))
    union = (predicted[1] - predicted[0] + _EPSILON) + (high - low + _EPSILON) - shared
    return (shared / union if union else 0.0) >= MIN_IOU - _EPSILON
