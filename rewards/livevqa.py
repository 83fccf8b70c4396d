"""The metric of LiveVQA (arXiv 2504.05288; repository at f62cbf5).

A judge grades each answer CORRECT, INCORRECT or NOT_ATTEMPTED; accuracy is correct / (correct +
incorrect). Known flaw: what is not attempted leaves the denominator, so that a model which answers
its one sure question and passes on the rest has accuracy 1. The strict twin divides by all graded
answers. Without a judge the rules grade: an answer that says there is none is not attempted.
"""

from __future__ import annotations

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
