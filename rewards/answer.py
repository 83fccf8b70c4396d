"""Is the final answer right? Range [0, 1]; docs/rewards.md has the rules in words.

`exact` is exact match over all aliases, after normalisation: {0, 1}. `typed` is that, and where it
fails the check of the gold answer's kind: a number, a date, a list: {0, 1}. `contains` and `f1` are
softer. Whatever the way, an over-long answer and a list of guesses are wrong.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rewards.checks import (
    careful_f1,
    choice_matches,
    contains_answer,
    is_mostly_number,
    list_matches,
    polarity,
    says_no_answer,
    telling,
    yes_no_matches,
)
from rewards.dates import date_matches, is_date, is_year
from rewards.errors import RewardError
from rewards.normalize import normalize_answer
from rewards.numeric import number_matches
from rewards.quantities import is_quantity
from rewards.trajectory import get, turn_texts

Match = Literal["exact", "typed", "contains", "f1"]
Kind = Literal["text", "number", "date", "year", "yes_no", "choice", "list", "no_answer"]
KINDS: tuple[str, ...] = get_args(Kind)

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


def correctness(
    prediction: str | None,
    question: Any,
    match: Match = "exact",
    max_chars: int = MAX_ANSWER_CHARS,
) -> float:
    """How right an answer is, the best over all gold answers. Range [0, 1]; total on any text.

    Args:
        prediction: the extracted answer, or None.
        question: a dict or an object with `answers`; for `typed` also, where it has them,
            `answer_kind` (of KINDS; else each gold answer shows its kind by itself), `range`
            ([low, high]), `unit`, `tolerance` (a share of gold, or years of a year), `choices` and
            `items` (the entries of a list, each a name or its aliases).
        match: way of comparing.
        max_chars: longer answers are wrong.

    Raises:
        RewardError: unknown way or kind, or a unit that is no text.
    """
    answers = get(question, "answers") or ()
    if match not in get_args(Match):
        raise RewardError(
            f"rewards.answer_match: no way '{match}'; choose one of {', '.join(get_args(Match))}"
        )
    if prediction is None or len(prediction) > max_chars or not normalize_answer(prediction):
        return 0.0
    if exact_match(prediction, answers, max_chars):
        return 1.0
    golds = [gold for gold in answers if normalize_answer(gold)]
    asked = get(question, "question") or ""
    if match in ("contains", "f1"):
        golds = telling(golds)
        if _copies(prediction, asked, golds):
            return 0.0
    if match == "contains":
        return float(any(contains_answer(prediction, gold, asked) for gold in golds))
    if match == "f1":
        return max((careful_f1(prediction, gold, asked) for gold in golds), default=0.0)
    return float(match == "typed" and _matches_kind(prediction, question, golds))


def kind_of(gold: str) -> Kind:
    """The kind that a gold answer shows by itself; what is not plainly another kind is text."""
    if is_year(gold):
        return "year"
    if is_date(gold):
        return "date"
    if is_quantity(gold):
        return "number"
    if gold.strip().lower() in ("yes", "no", "true", "false"):
        return "yes_no"
    return "no_answer" if says_no_answer(gold) else "text"


def _copies(prediction: str, asked: str, golds: Sequence[str]) -> bool:
    """Whether the prediction says nothing right that the question does not say itself.

    A gold answer whose words all stand in the question ("A or B?") is an answer all the same.
    """
    words = set(normalize_answer(asked).split())
    wanted = [set(normalize_answer(gold).split()) for gold in golds]
    said = set(normalize_answer(prediction).split())
    if words and words <= said:
        return True
    return not any(said & gold - words or gold <= words for gold in wanted)


def _matches_kind(prediction: str, question: Any, golds: Sequence[str]) -> bool:
    stated = get(question, "answer_kind")
    if stated is not None and stated not in KINDS:
        raise RewardError(
            f"answer_kind '{stated}' of question {get(question, 'id')} is unknown; "
            f"choose one of {', '.join(KINDS)}"
        )
    limits, items = get(question, "range"), get(question, "items")
    if limits is not None:
        return number_matches(prediction, limits, unit=_unit(question))
    if items:  # an empty cell of a table is none
        return list_matches(prediction, items)
    return any(
        _matches_one(prediction, gold, stated or _shown_kind(gold, prediction, question), question)
        for gold in golds
    )


def _shown_kind(gold: str, prediction: str, question: Any) -> Kind:
    """The kind that gold shows; text for a prediction in which a number is only mentioned.

    A gold answer "2" may be a code. Where the question does not say that it asks for a number,
    "two crossed swords" is another answer and not a number in a sentence. Nor is "NO" a no beside
    "Norway". A share of a year is none: with such a tolerance "1500" is a number.
    """
    kind = kind_of(gold)
    if kind in ("number", "date", "year") and not is_mostly_number(prediction):
        return "text"
    if kind == "year" and 0 < (get(question, "tolerance") or 0) < 1:
        return "number"
    if kind in ("yes_no", "no_answer"):
        others = filter(normalize_answer, get(question, "answers"))
        return kind if all(polarity(g) is not None or says_no_answer(g) for g in others) else "text"
    return kind


def _unit(question: Any) -> str | None:
    """The unit that the question states; an empty cell of a table is none.

    Raises:
        RewardError: it is no text.
    """
    unit = get(question, "unit")
    if unit is not None and not isinstance(unit, str):
        raise RewardError(
            f"unit {unit!r} of question {get(question, 'id')} is no text; write one, as 'km'"
        )
    return unit or None


def _matches_one(prediction: str, gold: str, kind: str, question: Any) -> bool:
    tolerance = get(question, "tolerance") or 0.0
    match kind:
        case "number":
            unit = _unit(question)
            wanted = gold if not unit or unit in gold else f"{gold} {unit}"
            return number_matches(prediction, wanted, tolerance=tolerance)
        case "date" | "year":
            return date_matches(prediction, gold, tolerance_years=int(tolerance))
        case "yes_no":
            return polarity(gold) is not None and yes_no_matches(prediction, gold)
        case "choice":
            return choice_matches(prediction, gold, get(question, "choices"))
        case "list":
            return list_matches(prediction, [part for part in _LIST.split(gold) if part.strip()])
        case "no_answer":
            return says_no_answer(gold) and says_no_answer(prediction)
    return False


_LIST = re.compile(r"[,;|\n]\s*(?:and\b)?|\band\b")
