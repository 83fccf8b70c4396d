"""Puts answers into one form, so that spelling alone never decides a reward.

Starts from the SQuAD rules (lower case, no punctuation, no articles) and repairs their traps:
Unicode quotes and dashes count as punctuation, accents of Latin and Greek letters do not matter,
`3.5` stays apart from `35` and `-5` from `5`, `Vitamin A` keeps its A, hyphen equals space, `&`
equals `and`, and an answer made of nothing but punctuation or articles does not vanish.
"""

import functools
import re
import unicodedata

# letters that no Unicode decomposition relates to their plain forms
_PLAIN_LETTERS = str.maketrans(
    {
        "ø": "o",
        "ł": "l",
        "đ": "d",
        "ħ": "h",
        "ı": "i",
        "ŧ": "t",
        "æ": "ae",
        "œ": "oe",
        "ð": "d",
        "þ": "th",
        "ə": "e",
    }
)
_MINUS = str.maketrans({"\u2212": "-"})
_DROPPED_SYMBOLS = set("$^`|~=<>´¨")
_BARE_DECIMAL = re.compile(r"(?<![\w.])\.(?=\d)")
_ARTICLE_BEFORE_WORD = re.compile(r"\b(?:a|an|the)\s+(?=\S)")


@functools.lru_cache(maxsize=65536)  # gold answers come back for every sample of a group
def normalize_answer(text: str) -> str:
    """Normal form of an answer; equal forms count as the same answer.

    Returns "" only for text that shows nothing (white space, invisible characters).

        normalize_answer("The “Café”–2") == "cafe 2"
    """
    text = _visible(unicodedata.normalize("NFKC", text).translate(_MINUS)).casefold()
    bare = " ".join(text.split())
    text = _without_punctuation(_without_accents(text).translate(_PLAIN_LETTERS))
    text = " ".join(text.split())
    return " ".join(_ARTICLE_BEFORE_WORD.sub("", text).split()) or bare


def contains_phrase(text: str, phrase: str) -> bool:
    """Whether the normalised phrase stands in the normalised text as whole tokens.

    contains_phrase("capital of Niger", "Niger") and not contains_phrase("Nigeria", "Niger")
    """
    needle = normalize_answer(phrase)
    return bool(needle) and f" {needle} " in f" {normalize_answer(text)} "


def _visible(text: str) -> str:
    """Without format characters, variation selectors and control characters."""
    kept = []
    for ch in text:
        category = unicodedata.category(ch)
        if ch.isspace():
            kept.append(" ")
        elif category not in ("Cc", "Cf", "Cs") and not "\ufe00" <= ch <= "\ufe0f":
            kept.append(ch)
    return "".join(kept)


def _without_accents(text: str) -> str:
    """Drops marks on Latin and Greek letters; in other scripts a mark can be a vowel."""
    kept: list[str] = []
    base_is_plain = False
    for ch in unicodedata.normalize("NFKD", text):
        if not unicodedata.combining(ch):
            base_is_plain = unicodedata.name(ch, "").startswith(("LATIN", "GREEK"))
        elif base_is_plain:
            continue
        kept.append(ch)
    return unicodedata.normalize("NFKC", "".join(kept))


def _without_punctuation(text: str) -> str:
    """Removes punctuation; what joins words becomes a space, what belongs to a number stays."""
    text = _BARE_DECIMAL.sub("0.", text)  # .5 must not become 5
    kept: list[str] = []
    for i, ch in enumerate(text):
        before = text[i - 1] if i else " "
        after = text[i + 1] if i + 1 < len(text) else " "
        category = unicodedata.category(ch)
        if ch == "&":
            kept.append(" and ")
        elif ch == "." and before.isdigit() and after.isdigit():
            kept.append(ch)
        elif ch == "-" and after.isdigit() and not _joins(before):
            kept.append(" -")  # a minus sign
        elif category in ("Pd", "Pc") or ch in "/\\":
            kept.append(" ")
        elif not category.startswith("P") and ch not in _DROPPED_SYMBOLS:
            kept.append(ch)
    return "".join(kept)


def _joins(before: str) -> bool:
    """Whether a hyphen after this character joins words or numbers instead of negating one."""
    return before.isalnum() or unicodedata.category(before) == "Pd"
