"""Answers of other kinds than a name: yes or no, a choice, a list, "cannot be answered"; and the
softer comparisons, containment and token F1. Pure functions, linear in their input.

None of them rewards a list of guesses: an answer that offers more candidates than the gold answer
has (`rewards.guesses`), or that negates, is wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set

from rewards.guesses import (
    FUNCTION_WORDS,
    NUMBER_CONTEXT,
    count_strange_words,
    known_words,
    names_answer,
    offers_more,
)
from rewards.normalize import contains_phrase, normalize_answer
from rewards.quantities import NUMBER_WORDS

STRANGE_WORDS = 1
"""An answer that contains gold may have so many strange words (`rewards.guesses`): France in
"Paris (France)". Each further one could be a further guess."""
STRANGE_WORDS_F1 = 4
"""The same for F1, which takes something off for each of them already; or as many as gold has
words, since a near miss of a long answer has others."""
_YES = {"yes", "true", "correct", "yeah", "yep"}
_NO = {"no", "false", "incorrect", "nope", "not"}
_SMALL_WORDS = FUNCTION_WORDS | _YES | _NO | {"am", "me"}
_SAYS = re.compile(
    r"\W*(?:yes|true|correct|yeah|yep|no|false|incorrect|nope)"
    r"(?:\s*$|\s*[,.;:!–—]|\s+(?:it|they|he|she|that|this|there|i|we|you)\b)"
)
_NEGATIONS = {
    "not", "no", "never", "neither", "nor", "without", "except", "isnt", "wasnt", "arent", "werent",
    "cannot", "cant", "dont", "doesnt", "didnt",
}  # fmt: skip
NO_ANSWER = frozenset(
    normalize_answer(phrase)
    for phrase in (
        "unanswerable", "cannot be answered", "can not be answered", "can't be answered",
        "the question cannot be answered", "this question cannot be answered", "not answerable",
        "unknown", "i don't know", "i do not know", "don't know", "no answer", "invalid question",
        "not enough information", "insufficient information", "cannot be determined",
        "unable to answer", "unable to answer due to lack of relevant information",
    )
)  # fmt: skip
_REASON = re.compile(r" (?:because|since|due to|as) ")
_LIST_SEPARATOR = re.compile(r"[,;|/\n\r•·]")
_LIST_AND = re.compile(r"\band\b|&")
_LIST_CUT = re.compile(f"{_LIST_SEPARATOR.pattern}|{_LIST_AND.pattern}")
_OPTION = re.compile(r"(?:option|choice|answer)?[\s:]*\(?([a-z])[).:]?(?=\s|$)", re.IGNORECASE)
_LONE_LETTER = re.compile(r"(?<![\w'’])[A-Z](?![\w'’])")


def telling(golds: Sequence[str]) -> list[str]:
    """The gold answers that a sentence does not have by chance; all, where none is left.

    "IT" beside "Italy", the code of a country, stands in "It is Paris".
    """
    found = [gold for gold in golds if set(normalize_answer(gold).split()) - _SMALL_WORDS]
    return found or list(golds)


def contains_answer(prediction: str, gold: str, asked: str = "") -> bool:
    """Whether gold stands in the prediction as whole tokens, alone and not negated.

        contains_answer("It is Paris.", "Paris") and not contains_answer("Paris or Rome", "Paris")

    Args:
        prediction, gold: the answers.
        asked: the question, whose words an answer may repeat.
    """
    if not contains_phrase(prediction, gold):
        return False
    known = known_words(gold, asked)
    if offers_more(prediction, gold, known) or _denies(prediction, gold):
        return False
    # of "A or B?" the other answer would be the one strange word
    most = 0 if names_answer(asked, gold) else STRANGE_WORDS
    return count_strange_words(prediction, gold, known) <= most


def token_f1(one: str, other: str) -> float:
    """Harmonic mean of precision and recall of normalised tokens, as multisets. Range [0, 1].

        F1 = 2 |one ∩ other| / (|one| + |other|)

    Symmetric. Two texts without any token have nothing in common: 0.
    """
    left, right = normalize_answer(one).split(), normalize_answer(other).split()
    shared = sum((Counter(left) & Counter(right)).values())
    return 2.0 * shared / (len(left) + len(right)) if shared else 0.0


def careful_f1(prediction: str, gold: str, asked: str = "") -> float:
    """Token F1 that a list of guesses or a negation does not earn. Range [0, 1].

    Args:
        prediction, gold: the answers.
        asked: the question, whose words an answer may repeat.
    """
    known = known_words(gold, asked)
    if offers_more(prediction, gold, known) or _denies(prediction, gold):
        return 0.0
    most = max(STRANGE_WORDS_F1, len(normalize_answer(gold).split()))
    is_list = count_strange_words(prediction, gold, known) > most
    return 0.0 if is_list else token_f1(prediction, gold)


def polarity(text: str) -> bool | None:
    """True for a yes, False for a no, None for neither or both.

    The text begins with the word, and what follows is set off: "No, it is not" is a no, and "no
    official symbol" is none.
    """
    words = set(normalize_answer(text).split())
    if _SAYS.match(text.casefold()) is None or not words & (_YES | _NO):
        return None
    says_yes, says_no = bool(_YES & words), bool(_NO & words)
    return None if says_yes and says_no else says_yes


def yes_no_matches(prediction: str, gold: str) -> bool:
    """Whether prediction and gold are the same of yes and no. Symmetric."""
    return polarity(prediction) is not None and polarity(prediction) == polarity(gold)


def choice_matches(
    prediction: str, gold: str, choices: Mapping[str, str] | Sequence[str] | None = None
) -> bool:
    """Whether the prediction picks the gold option, by its letter, its text, or both.

    Args:
        prediction: "B", "(b)", "B. Rome", "option B" or "Rome".
        gold: letter or text of the right option.
        choices: texts by letter, or in the order A, B, ...; without them letters alone count.
    """
    options = _options(choices)
    picked, wanted = _pick(prediction, options), _pick(gold, options)
    return picked is not None and picked == wanted


def list_matches(prediction: str, items: Sequence[str | Sequence[str]]) -> bool:
    """Whether the prediction lists exactly these items, in any order, each once.

    Args:
        prediction: items separated by commas, semicolons, slashes, line breaks or "and"; a name
            that holds one of these ("AC/DC") is taken whole.
        items: one entry an item: its name, or all its names.
    """
    names: dict[str, int] = {}
    joined: set[str] = set()
    for number, item in enumerate(items):
        for alias in [item] if isinstance(item, str) else item:
            normal = normalize_answer(alias)
            names.setdefault(normal, number)
            if _LIST_SEPARATOR.search(alias) or "and" in normal.split():
                joined.add(normal)
    names.pop("", None)
    wanted = set(names.values())
    if not wanted or len(wanted) < len(items):
        return False
    found = _read_items(prediction, names, joined)
    return len(found) == len(wanted) and set(found) == wanted


def says_no_answer(text: str) -> bool:
    """Whether the text says that there is no answer, a reason behind it allowed."""
    normal = normalize_answer(text)
    return normal in NO_ANSWER or _REASON.split(normal, maxsplit=1)[0] in NO_ANSWER


def is_mostly_number(text: str) -> bool:
    """Whether a text states a number or a date and little else: at most one strange word, after it.

    is_mostly_number("about 35 million people") and not is_mostly_number("Apollo 11")
    """
    known = NUMBER_CONTEXT | NUMBER_WORDS
    has_number, n_strange = False, 0
    for word in normalize_answer(text).split():
        if word in NUMBER_WORDS or any(ch.isdigit() for ch in word):
            has_number = True
        elif word not in known:
            n_strange += 1
            if not has_number or n_strange > 1:
                return False
    return has_number


# ---------------------------------------------------------------- helpers


def _denies(prediction: str, gold: str) -> bool:
    """Whether the prediction negates, and more than gold does."""
    added = Counter(normalize_answer(prediction).split())
    added -= Counter(normalize_answer(gold).split())
    return bool(_NEGATIONS & added.keys())


def _read_items(text: str, names: Mapping[str, int], joined: Set[str]) -> list[int | None]:
    """Numbers of the items that a text lists, in its order; None for what is none of them.

    Args:
        text: the list.
        names: number of the item by its name, in normal form.
        joined: the names that hold a separator: several pieces between separators may be one.
    """
    cuts = [match.span() for match in _LIST_CUT.finditer(text)]
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    longest = max([1, *(len(name.split()) for name in joined)])
    found: list[int | None] = []
    i = 0
    while i < len(starts):
        # the longest first: "Bosnia and Herzegovina" is no two items; `and C` of `A, B, and C` is C
        for n in range(min(longest, len(starts) - i), 0, -1):
            normal = normalize_answer(text[starts[i] : ends[i + n - 1]])
            known = [name for name in (normal, normal.removeprefix("and ")) if name in names]
            if n == 1 or (known and known[0] in joined):
                break
        if normal:  # nothing stands between ", and"
            found.append(names[known[0]] if known else None)
        i += n
    return found


def _options(choices: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    if choices is None:
        return {}
    if isinstance(choices, Mapping):
        return {letter.strip().lower(): normalize_answer(t) for letter, t in choices.items()}
    return {chr(ord("a") + i): normalize_answer(text) for i, text in enumerate(choices[:26])}


def _pick(text: str, options: Mapping[str, str]) -> str | None:
    """Letter of the one option that a text picks, or None."""
    text = text.strip()
    normal = normalize_answer(text)
    by_text = [letter for letter, option in options.items() if option and option == normal]
    if len(by_text) == 1:
        return by_text[0]
    match = _OPTION.match(text)
    if match is None:
        return None
    letter, rest = match[1].lower(), normalize_answer(text[match.end() :])
    if options and letter not in options:
        return None
    if not rest:
        return letter
    # "B. Rome" names the option twice; "B or C", "B. Paris" contradict themselves
    if options.get(letter) == rest and not _LONE_LETTER.search(text[match.end() :]):
        return letter
    return None
