"""The reward of one trajectory, part by part.

    accuracy       = how right the final answer is, by `answer_match` (1 or 0, except for f1)
    search_penalty = p if accuracy > 0 and the episode searched, else 0 (or per search)
    format         = 1 if the episode is well-formed, else 0
    evidence       = 1 if a gold passage was retrieved, else 0
    economy        = closeness of a right answer's calls to the best known number
    redundancy     = share of calls that repeat an earlier one
    total          = w_accuracy * accuracy * (1 - search_penalty) + w_format * format
                     + w_evidence * evidence + w_economy * economy - w_redundancy * redundancy

Range of the total: -w_redundancy to w_accuracy + w_format + w_evidence + w_economy. Every part lies
in [0, 1]. The last three are computed where their weight is above 0; one that a question says
nothing about (no gold passages, no best cost) is None and adds nothing.

None stands for "cannot be scored" (a tool failed, the question has no usable gold answer, or the
judge failed); such an episode must not enter a mean as 0.
Source: MMSearch-R1 (arXiv 2506.20670), there with (1 - w_format) for w_accuracy.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from rewards.answer import MAX_ANSWER_CHARS, correctness, final_answer, usable_answers
from rewards.errors import RewardError
from rewards.format import FormatCheck, format_score
from rewards.search import economy, evidence_hit, redundancy, search_penalty
from rewards.trajectory import get, has_infrastructure_fault

PARTS = ("accuracy", "format", "search_penalty", "total")
SIGNS = {"evidence": 1.0, "economy": 1.0, "redundancy": -1.0}
"""Parts that are there when their weight is above 0, and how they enter the total."""


class Judge(Protocol):
    """A second opinion; `rewards.judge.Judge` is one."""

    def __call__(self, question: Any, answer: str) -> float | None:
        """1.0, 0.0, or None where it failed; asked where the rules say wrong."""

    def audit(self, question: Any, answer: str) -> bool | None:
        """Whether it agrees that a right answer is right; it may pass."""


def part_names(weights: Any) -> tuple[str, ...]:
    """The parts that `score` returns under these settings, the total first."""
    added = (part for part in SIGNS if get(weights, part, 0.0))
    return ("total", *(part for part in PARTS if part != "total"), *added)


def score(
    trajectory: Any,
    question: Any,
    weights: Any,
    check_format: FormatCheck | None = None,
    judge: Judge | None = None,
) -> dict[str, float | None]:
    """Scores one trajectory.

    Args:
        trajectory: a dict or an object with `turns` (each with text, action, fault, hits).
        question: a dict or an object with `answers`; see `rewards.answer.correctness` and
            `rewards.search` for what else is read.
        weights: a dict or an object with `accuracy`, `format`, `search_penalty` and, optionally,
            what else the section `rewards` of the settings holds; the section fits.
        check_format: a dialect's `check_format`; without it the rule all dialects share.
        judge: second opinion on an answer that the rules find wrong.

    Returns:
        The parts by name, those of `part_names`. All but `format` are None when the episode cannot
        be scored; `format` always has a value.

    Raises:
        RewardError: a weight is missing, or a setting is unknown.
    """
    formatted = format_score(trajectory, check_format)
    unscored = dict.fromkeys(part_names(weights)) | {"format": formatted}
    if not _can_be_scored(trajectory, get(question, "answers") or (), weights):
        return unscored
    accuracy = _accuracy(final_answer(trajectory), question, weights, judge)
    if accuracy is None:
        return unscored
    is_correct = accuracy > 0.0
    penalty = search_penalty(
        trajectory,
        is_correct,
        _weight(weights, "search_penalty"),
        get(weights, "search_penalty_per", "episode"),
    )
    total = _weight(weights, "accuracy") * accuracy * (1.0 - penalty)
    total += _weight(weights, "format") * formatted
    parts: dict[str, float | None] = {
        "accuracy": accuracy,
        "format": formatted,
        "search_penalty": penalty,
    }
    measures: dict[str, Callable[[], float | None]] = {
        "evidence": lambda: evidence_hit(trajectory, question),
        "economy": lambda: economy(trajectory, question, accuracy),
        "redundancy": lambda: redundancy(trajectory),
    }
    for part, sign in SIGNS.items():
        if get(weights, part, 0.0):
            value = parts[part] = measures[part]()
            total += 0.0 if value is None else sign * _weight(weights, part) * value
    return {**parts, "total": total}


def score_each(
    trajectories: Sequence[Any],
    questions: Sequence[Any],
    weights: Any,
    check_format: FormatCheck | None = None,
    judge: Judge | None = None,
) -> list[dict[str, float | None]]:
    """Scores a batch, in order; with a judge `judge_workers` trajectories at a time."""
    rows = list(zip(trajectories, questions, strict=True))
    if judge is None:
        return [score(trajectory, question, weights, check_format) for trajectory, question in rows]
    with ThreadPoolExecutor(get(weights, "judge_workers", 8)) as pool:
        return list(pool.map(lambda row: score(row[0], row[1], weights, check_format, judge), rows))


def _accuracy(answer: str | None, question: Any, weights: Any, judge: Judge | None) -> float | None:
    max_chars = get(weights, "max_answer_chars", MAX_ANSWER_CHARS)
    match = get(weights, "answer_match", "exact")
    accuracy = correctness(answer, question, match, max_chars)
    if judge is None or answer is None or len(answer) > max_chars:
        return accuracy
    if accuracy == 1.0:
        judge.audit(question, answer)
        return accuracy
    verdict = judge(question, answer)
    return None if verdict is None else max(accuracy, verdict)


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
