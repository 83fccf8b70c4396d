"""Lists of guesses: an answer that names several candidates, so that one of them is right.

    offers_more("Paris or Rome", "Paris") and not offers_more("In St. Louis.", "St. Louis")

Words do not tell a list without separators (`Rome Paris Bonn`) from a long name (`Johann Sebastian
Bach`), so what bounds it is the number of its strange words: those that neither the gold answer nor
the question has, and that are more than grammar.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Set

from rewards.dates import MONTHS
from rewards.normalize import normalize_answer
from rewards.units import SCALES, UNITS

FUNCTION_WORDS = frozenset({
    "a", "an", "the", "it", "its", "is", "was", "are", "were", "be", "been", "has", "have", "had",
    "do", "does", "did", "can", "could", "may", "might", "must", "should", "will", "would", "of",
    "in", "on", "at", "to", "by", "for", "from", "with", "as", "and", "or", "this", "that", "these",
    "those", "there", "here", "which", "who", "what", "where", "when", "he", "she", "they", "his",
    "her", "their", "i", "we", "you", "my", "our", "your", "called", "named", "known", "name",
    "answer", "final", "think", "believe", "so", "then", "also", "probably", "likely", "mr", "mrs",
    "ms", "dr", "prof", "capt", "sir", "st",
})  # fmt: skip
"""Words that make a sentence or a title around an answer, and are no guess of their own."""
AROUND_NUMBERS = frozenset({
    "about", "approximately", "approx", "around", "roughly", "nearly", "almost", "circa", "ca", "c",
    "some", "exactly", "it", "its", "is", "was", "has", "had", "the", "a", "of", "in", "on", "at",
    "as", "since", "from", "to", "and", "between", "until", "by", "year", "date", "estimate", "est",
    "census", "born", "died", "founded", "established", "independent", "independence", "ad", "ce",
    "bc", "bce", "per", "square", "sq", "cubic", "million", "st", "nd", "rd", "th",
})  # fmt: skip
NUMBER_CONTEXT = AROUND_NUMBERS.union(UNITS, SCALES, MONTHS)
"""Words that stand beside a number or in a date."""
_SEPARATOR = re.compile(
    r"[,;|/\n\r•·、。]|\bor\b|\band\b|&"
    # the end of a sentence; the full stop of a short word may be an abbreviation's, as in St. Louis
    r"|[!?](?=\s)|(?<=\w{4})\.+(?=\s)"
    # dashes that set off; not Jean-Paul, and not 1914 - 1918
    r"|[—―]|(?<=\s)(?<!\d\s)[-‐–]+(?=\s)|(?<=\s)[-‐–]+(?=\s\D)"
)
_ASIDES = (re.compile(r"[(\[{【]"), re.compile(r":\s"))
"""What explains, once: `Paris (France)`, `The capital: Paris`. Used again and again it lists."""


def count_candidates(text: str, known: Set[str] = frozenset()) -> int:
    """Answers that a text offers, as separated by commas, slashes, line breaks, "or", "and", ends
    of sentences and dashes; what consists of known words alone is none."""
    return sum(
        any(word not in known for word in normalize_answer(piece).split())
        for piece in _SEPARATOR.split(_folded(text))
    )


def offers_more(prediction: str, gold: str, known: Set[str] = frozenset()) -> bool:
    """Whether the prediction offers more candidates than the gold answer has parts."""
    if count_candidates(prediction, known) > max(1, count_candidates(gold, known)):
        return True
    one, other = _folded(prediction), _folded(gold)
    return any(len(mark.findall(one)) > 1 + len(mark.findall(other)) for mark in _ASIDES)


def names_answer(asked: str, gold: str) -> bool:
    """Whether the question names the gold answer, and so, as in "A or B?", the others as well."""
    words = set(normalize_answer(gold).split()) - FUNCTION_WORDS
    return bool(words) and words <= set(normalize_answer(asked).split())


def known_words(gold: str, asked: str = "") -> Set[str]:
    """Words of an answer that are no guess: grammar, the question's, those around a number."""
    known = FUNCTION_WORDS
    if asked and not names_answer(asked, gold):
        known = known.union(normalize_answer(asked).split())
    return known | NUMBER_CONTEXT if _has_digit(gold) else known


def count_strange_words(prediction: str, gold: str, known: Set[str]) -> int:
    """Words of the prediction, each as often as it stands there, beyond gold's and the known.

    A number is a guess only where gold has one: "World War I (1914-1918)" has no strange word.
    """
    added = Counter(normalize_answer(prediction).split())
    added -= Counter(normalize_answer(gold).split())
    counts_numbers = _has_digit(gold)
    return sum(
        n for word, n in added.items()
        if word not in known and (counts_numbers or not _has_digit(word))
    )  # fmt: skip


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text))


def _folded(text: str) -> str:
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)  # full-width commas
    return text.casefold()
