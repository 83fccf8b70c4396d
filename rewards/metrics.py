"""Every benchmark's own metric beside a strict twin; both are reported, so that numbers compare.

    report("infoseek", predictions, questions)
    # {"official": 24.65, "strict": 24.1, "n": 2000.0}

An official metric follows the source's script, flaws included; its module lists them. A strict twin
measures the same thing by the rules of `rewards.answer`. docs/rewards.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rewards import infoseek, livevqa, mmsearch, mmsearch_r1, search_r1
from rewards.answer import correctness, final_answer
from rewards.errors import RewardError
from rewards.squad import squad_em, squad_subem
from rewards.trajectory import get

Score = Callable[[Any, Any], float | None]
"""(prediction or trajectory, question) -> score, None where there is none."""


@dataclass(frozen=True)
class Metric:
    """A metric and its twin.

    Attributes:
        source: paper and repository.
        official: scores one answer, or one trajectory, as the source does.
        strict: the same by our rules.
        reads: what both score: an extracted answer, or a whole trajectory.
        flaw: what the official one is known to get wrong.
        percent: the report is in percent, as the source's is; otherwise in [0, 1].
        missing: official score where there is no answer at all; None leaves it out of the mean.
    """

    source: str
    official: Score
    strict: Score
    reads: str
    flaw: str
    percent: bool = False
    missing: float | None = 0.0


def _answers(question: Any) -> list[str]:
    return list(get(question, "answers") or ())


def _strict_em(prediction: str, question: Any) -> float:
    return correctness(prediction, {"answers": _answers(question)}, "exact")


def _strict_subem(prediction: str, question: Any) -> float:
    # the question's own words are no guesses
    asked = {"question": get(question, "question"), "answers": _answers(question)}
    return correctness(prediction, asked, "contains")


_LIVE: dict[str, float | None] = {"CORRECT": 1.0, "INCORRECT": 0.0, "NOT_ATTEMPTED": None}

METRICS: dict[str, Metric] = {
    "em": Metric(
        "SQuAD's EM as in Search-R1 (NQ, HotpotQA) and MMSearch-R1 (FVQA)",
        lambda prediction, question: float(squad_em(prediction, _answers(question))),
        _strict_em,
        "answer",
        "3.5 is 35; accents and Unicode quotes count; an empty gold equals `the`",
    ),
    "subem": Metric(
        "SubEM of MMSearch-R1 and Search-R1",
        lambda prediction, question: float(squad_subem(prediction, _answers(question))),
        _strict_subem,
        "answer",
        "Niger is in Nigeria; an empty gold is in everything; every list of guesses wins",
    ),
    "infoseek": Metric(
        "InfoSeek, arXiv 2302.11713, infoseek_eval at c8ef023",
        infoseek.official_score,
        infoseek.strict_score,
        "answer",
        "two numbers are a range; no number is 0; units are not read",
        percent=True,
    ),
    "mmsearch": Metric(
        "MMSearch, arXiv 2409.12959, repository at cbdaa67",
        mmsearch.official_score,
        mmsearch.strict_score,
        "answer",
        "a list of guesses earns part of the F1",
    ),
    "livevqa": Metric(
        "LiveVQA, arXiv 2504.05288, repository at f62cbf5",
        lambda prediction, question: _LIVE[livevqa.grade(prediction, question)],
        lambda prediction, question: float(livevqa.grade(prediction, question) == "CORRECT"),
        "answer",
        "answers that are not attempted leave the denominator",
        missing=None,
    ),
    "search_r1_format": Metric(
        "Search-R1 v0.3, repository at a14dc3a",
        lambda trajectory, question: search_r1.format_reward(
            search_r1.scored_text(trajectory), _answers(question)
        ),
        lambda trajectory, question: search_r1.strict_format_reward(trajectory, _answers(question)),
        "trajectory",
        "tags without content earn 0.2; an answer in a search result counts",
    ),
    "search_r1_em": Metric(
        "Search-R1, arXiv 2503.09516, repository at a14dc3a",
        lambda trajectory, question: search_r1.em_reward(
            search_r1.scored_text(trajectory), _answers(question)
        ),
        lambda trajectory, question: search_r1.strict_em_reward(trajectory, _answers(question)),
        "trajectory",
        "an answer in a search result counts where the policy gives none",
    ),
    "mmsearch_r1": Metric(
        "MMSearch-R1, arXiv 2506.20670, repository at 583c6b4",
        lambda trajectory, question: mmsearch_r1.official_of_trajectory(
            trajectory, _answers(question)
        ),
        lambda trajectory, question: mmsearch_r1.strict_reward(trajectory, _answers(question)),
        "trajectory",
        "two text searches lose the format part; empty reasoning does not",
    ),
}


def report(
    name: str, predictions: Sequence[Any], questions: Sequence[Any]
) -> dict[str, float | None]:
    """A benchmark's number, official and strict.

    Args:
        name: of METRICS.
        predictions: extracted answers (None = none) or trajectories, one per question; of a
            trajectory where an answer is wanted the final answer is taken.
        questions: in the same order. `infoseek` also reads `split`, whose name ends in
            `unseen_question` or not; with both present the number is the harmonic mean of the two.

    Returns:
        `official` and `strict` (None where nothing could be scored), and `n`.

    Raises:
        RewardError: no such metric.
    """
    if name not in METRICS:
        raise RewardError(f"there is no metric '{name}'; choose one of {', '.join(METRICS)}")
    metric = METRICS[name]
    rows = [
        (_read(prediction, metric.reads), question)
        for prediction, question in zip(predictions, questions, strict=True)
    ]
    numbers: dict[str, float | None] = {}
    kinds = (("official", metric.official, metric.missing), ("strict", metric.strict, 0.0))
    for kind, scorer, missing in kinds:
        scores = [missing if made is None else scorer(made, question) for made, question in rows]
        numbers[kind] = _summary(name, kind, scores, questions, metric.percent)
    return {**numbers, "n": float(len(rows))}


def _read(prediction: Any, reads: str) -> Any:
    is_answer = prediction is None or isinstance(prediction, str)
    return final_answer(prediction) if reads == "answer" and not is_answer else prediction


def _summary(
    name: str, kind: str, scores: list[float | None], questions: Sequence[Any], percent: bool
) -> float | None:
    splits = [str(get(question, "split") or "") for question in questions]
    if name == "infoseek" and len({split.endswith("unseen_question") for split in splits}) == 2:
        groups: tuple[list[float], list[float]] = ([], [])
        for value, split in zip(scores, splits, strict=True):
            groups[not split.endswith("unseen_question")].append(value or 0.0)
        final = infoseek.official_final if kind == "official" else infoseek.strict_final
        return final(*groups)
    known = [value for value in scores if value is not None]
    if not known:
        return None
    return (100.0 if percent else 1.0) * sum(known) / len(known)
