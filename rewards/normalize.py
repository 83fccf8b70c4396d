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
# what Unicode says is drawn as nothing, though by its category a letter or a mark: Hangul fillers,
# joiners, variation selectors
_IGNORABLE = frozenset(
    map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, 0xFFA0,
              *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)  # fmt: skip
_BRAILLE_BLANK = "\u2800"
_MINUS = str.maketrans({"\u2212": "-"})
_DROPPED_SYMBOLS = set("$^`|~=<>´¨")
# the rules of `_without_punctuation` for ASCII, as one table; \x01 is a minus, \x02 a decimal point
_ASCII_VISIBLE = str.maketrans({chr(i): None for i in (*range(32), 127) if not chr(i).isspace()})
_ASCII_PLAIN = str.maketrans(
    dict.fromkeys("!\"#%'()*,.:;?@[]{}$^`|~=<>")
    | dict.fromkeys("-_/\\", " ")
    | {"\x01": " -", "\x02": "."}
)
_ASCII_MINUS = re.compile(r"(?<![A-Za-z0-9-])-(?=\d)")
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_BARE_DECIMAL = re.compile(r"(?<![\w.])\.(?=\d)")
_ARTICLE_BEFORE_WORD = re.compile(r"\b(?:a|an|the)\s+(?=\S)")


@functools.lru_cache(maxsize=65536)  # gold answers come back for every sample of a group
def normalize_answer(text: str) -> str:
    """Normal form of an answer; equal forms count as the same answer.

    Returns "" only for text that shows nothing (white space, invisible characters).

        normalize_answer("The “Café”–2") == "cafe 2"
    """
    bare, text = _plain_ascii(text) if text.isascii() else _plain(text)
    return " ".join(_ARTICLE_BEFORE_WORD.sub("", text).split()) or bare


def contains_phrase(text: str, phrase: str) -> bool:
    """Whether the normalised phrase stands in the normalised text as whole tokens.

    contains_phrase("capital of Niger", "Niger") and not contains_phrase("Nigeria", "Niger")
    """
    needle = normalize_answer(phrase)
    return bool(needle) and f" {needle} " in f" {normalize_answer(text)} "


def visible(text: str) -> str:
    """The text without the characters that nobody sees; it comes back itself if it has none."""
    if text.isascii() and text.replace("\n", " ").isprintable():
        return text
    return _visible(text)


def _plain(text: str) -> tuple[str, str]:
    """Visible text in lower case, and the same without accents and punctuation."""
    text = _visible(unicodedata.normalize("NFKC", text).translate(_MINUS)).casefold()
    plain = _without_punctuation(_without_accents(text).translate(_PLAIN_LETTERS))
    return " ".join(text.split()), " ".join(plain.split())


def _plain_ascii(text: str) -> tuple[str, str]:
    """`_plain` for ASCII, ten times faster: the common case of a million answers."""
    text = text.lower()
    if text.replace(" ", "").isalnum():
        text = " ".join(text.split())
        return text, text
    text = " ".join(text.translate(_ASCII_VISIBLE).split())
    plain = _BARE_DECIMAL.sub("0.", text).replace("&", " and ")
    plain = _DECIMAL_POINT.sub("\x02", _ASCII_MINUS.sub("\x01", plain)).translate(_ASCII_PLAIN)
    return text, " ".join(plain.split())


def _visible(text: str) -> str:
    """Without format and control characters, and what else is drawn as nothing."""
    kept = []
    for ch in text:
        category = unicodedata.category(ch)
        if ch.isspace() or ch == _BRAILLE_BLANK:
            kept.append(" ")
        elif category not in ("Cc", "Cf", "Cs") and ch not in _IGNORABLE:
            kept.append(ch)
    return "".join(kept)


def _without_accents(text: str) -> str:
    """Drops marks on Latin and Greek letters; in other scripts a mark can be a vowel."""
    decomposed = unicodedata.normalize("NFKD", text)
    if not any(map(unicodedata.combining, decomposed)):
        return unicodedata.normalize("NFKC", decomposed)
    kept: list[str] = []
    base_is_plain = False
    for ch in decomposed:
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
