"""The normalisation and matching that the field's scripts share, as they are.

Lower case, ASCII punctuation deleted, English articles to spaces, spaces squeezed: the rules of
SQuAD's script, taken over by Search-R1, MMSearch-R1, InfoSeek and MMSearch. They are here to
reproduce published numbers; `rewards.normalize` is what we trust. Known flaws: Unicode quotes and
dashes and accents stay; "3.5" becomes "35"; "the" becomes nothing, and what is nothing equals an
empty gold answer and is contained in every text.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def between(text: str, opening: str, closing: str) -> list[str]:
    """What stands between the two, shortest first from the left, in linear time.

    The scripts' pattern `opening(.*?)closing` finds the same, but takes quadratic time where
    nothing is closed.
    """
    found, end = [], 0
    while (start := text.find(opening, end)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        found.append(text[start + len(opening) : end])
        end += len(closing)
    return found


def squad_normalize(text: str) -> str:
    """Normal form: squad_normalize("The Café-Bar, 3.5") == "cafébar 35"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_em(prediction: str, answers: Iterable[str]) -> bool:
    """Whether the prediction equals one of the answers in their normal form."""
    normal = squad_normalize(prediction)
    return any(squad_normalize(answer) == normal for answer in answers)


def squad_subem(prediction: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers is a substring of the prediction in their normal form."""
    normal = squad_normalize(prediction)
    return any(squad_normalize(answer) in normal for answer in answers)


def squad_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of tokens, as multisets. Range [0, 1]."""
    predicted, wanted = squad_normalize(prediction).split(), squad_normalize(answer).split()
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2.0 * shared / (len(predicted) + len(wanted)) if shared else 0.0
