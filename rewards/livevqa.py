"""The metric of LiveVQA (arXiv 2504.05288; repository at f62cbf5).

A judge grades each answer CORRECT, INCORRECT or NOT_ATTEMPTED; accuracy is correct / (correct +
incorrect). Known flaw: what is not attempted leaves the denominator, so that a model which answers
its one sure question and passes on the rest has accuracy 1. The strict twin divides by all graded
answers. Without a judge the rules grade: an answer that says there is none is not attempted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rewards.answer import correctness
from rewards.checks import says_no_answer
from rewards.normalize import normalize_answer

Grade = Literal["CORRECT", "INCORRECT", "NOT_ATTEMPTED"]


def grade(prediction: str | None, question: Any) -> Grade:
    """The grade of an answer by rules, for want of a judge."""
    if correctness(prediction, question, "typed") == 1.0:
        return "CORRECT"
    if prediction is None or not normalize_answer(prediction) or says_no_answer(prediction):
        return "NOT_ATTEMPTED"
    return "INCORRECT"


def official_accuracy(grades: Sequence[Grade | None]) -> float:
    """correct / (correct + incorrect), 0 where there is neither; None is a failed judge."""
    n_right, n_wrong = grades.count("CORRECT"), grades.count("INCORRECT")
    return n_right / (n_right + n_wrong) if n_right + n_wrong else 0.0


def strict_accuracy(grades: Sequence[Grade | None]) -> float | None:
    """correct / graded; None where nothing was graded."""
    graded = [g for g in grades if g is not None]
    return graded.count("CORRECT") / len(graded) if graded else None
