"""The metrics of MMSearch (arXiv 2409.12959; repository at cbdaa67).

End to end and summarisation: token F1 of the answer, the best over the gold answer and its
alternatives, by SQuAD's normalisation. The final score weighs four tasks. Known flaws: a list of
guesses earns part of the F1; accents and Unicode punctuation count as spelling. The strict twin is
F1 by our normalisation, 0 for a list of guesses, a negation or an over-long answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.answer import correctness
from rewards.errors import RewardError
from rewards.squad import squad_f1
from rewards.trajectory import get

FINAL_WEIGHTS = {"end2end": 0.75, "requery": 0.05, "rerank": 0.1, "summarization": 0.1}


def official_score(prediction: str, question: Any) -> float:
    """Best token F1 over the gold answers. Range [0, 1]."""
    return max(
        (squad_f1(prediction, answer) for answer in get(question, "answers") or ()), default=0.0
    )


def strict_score(prediction: str, question: Any) -> float:
    """The same by our rules. Range [0, 1]."""
    asked = {"question": get(question, "question"), "answers": get(question, "answers")}
    return correctness(prediction, asked, "f1")


def final_score(means: Mapping[str, float]) -> float:
    """Weighted sum of the four tasks' mean scores, each in [0, 1]. Range [0, 1].

    Raises:
        RewardError: a task is missing; a sum without it would be another metric.
    """
    missing = FINAL_WEIGHTS.keys() - means.keys()
    if missing:
        raise RewardError(
            f"MMSearch's final score needs {', '.join(sorted(missing))} too; "
            "report end2end alone as F1"
        )
    return sum(weight * means[task] for task, weight in FINAL_WEIGHTS.items())
