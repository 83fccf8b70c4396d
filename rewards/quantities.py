"""Reads numbers in answers: thousands, decimals, scale words, units, percent, ranges.

read_quantities("1.05 km (3445 ft)")   # two quantities, a length each
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rewards.units import SCALES, UNITS, Unit, plain_digits, read_unit

_NUMBER = re.compile(
    r"""(?P<sign>(?<![\w.)-])[-+])?(?P<currency>[$€£¥]\s?)?
    (?:(?<![\w.^])|(?<=\d-))
    (?P<digits>
        \d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?      # 1,234,567.8
      | \d{1,3}(?:\.\d{3}){2,}(?!\d)(?:,\d+)?   # 1.234.567,8
      | \d{1,3}(?:[ '’]\d{3})+(?!\d)(?:[.,]\d+)?  # 1 234 567.8
      | \d+(?:[.,]\d+)? | \.\d+
    )
    (?P<exponent>e[-+]?\d{1,3}(?!\w)|\s?[x×*]\s?10\s?\^?\s?[-+]?\d{1,3}(?!\w))?""",
    re.VERBOSE,
)
_SCALE = re.compile(
    r"\s?(hundred|thousand|millions?|billions?|trillion|mn|mio|bn|tn|k)(?![^\W\d_])"
)
_BETWEEN = re.compile(r"\s*(?:-|–|—|to|and|until|\.{2,3}|…)\s*")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
_YEAR_WORDS = re.compile(r"(?:\(|\b(?:in|since|of|by|from|year|census|est\.?|estimate))\s*$")
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: i for i, word in enumerate(_ONES)}
_WORDS |= {word: 10 * i for i, word in enumerate(_TENS, 2)}
NUMBER_WORDS = frozenset(_WORDS)
_CURRENCIES = [UNITS[sign] for sign in "$€£¥"]
_HAS_DIGIT = re.compile(r"\d")
_LETTERS = re.compile(r"[^\W\d_]+|[^\s\w]")


@dataclass(frozen=True)
class Quantity:
    """A number or a range as it stands in a text.

    Attributes:
        low, high: value without its unit, scale words applied; equal for a single number.
        unit: dimension and size, or None.
        step: value of one in the last written digit: how exactly it is meant.
        is_year: a whole number that can be a year, written as the year of something else.
        scale: product of the scale words and the power of ten that stand behind the digits.
    """

    low: float
    high: float
    unit: Unit | None = None
    step: float = 1.0
    is_year: bool = False
    scale: float = 1.0

    @property
    def base(self) -> tuple[float, float]:
        """Low and high in the dimension's own unit."""
        size = self.unit[1] if self.unit else 1.0
        return self.low * size, self.high * size


def read_quantities(text: str) -> list[Quantity]:
    """All numbers and ranges of a text, in order; linear in its length."""
    text = plain_digits(text)
    if not _HAS_DIGIT.search(text):
        text = _words_to_digits(text)
    found: list[tuple[Quantity, int, int]] = []
    position = 0
    while (match := _NUMBER.search(text, position)) is not None:
        position = match.end()
        quantity, end = _read_number(text, match)
        if quantity is None:
            continue
        position = max(position, end)
        if found and (joined := _join(found[-1], quantity, text, match.start())) is not None:
            found[-1] = (joined, found[-1][1], end)
        else:
            found.append((quantity, match.start(), end))
    return [quantity for quantity, _, _ in found]


def is_quantity(text: str) -> bool:
    """Whether the whole text is one number or range, with or without a unit.

    A letter that touches the digits makes it a code: "5A" and "9H" are none.
    """
    plain = plain_digits(text).strip()
    if len(plain) > 60 or re.search(r"\d[^\W\d_](?![^\W\d_])", plain) or len(plain.split()) > 6:
        return False
    rest = re.sub(r"[\d.,+^-]+", " ", plain)
    words = re.findall(r"[^\W\d_]+", rest)
    known = UNITS.keys() | SCALES.keys() | {"square", "sq", "cubic", "per", "to", "between", "and"}
    return len(read_quantities(plain)) == 1 and all(word in known for word in words)


# ---------------------------------------------------------------- reading


def _read_number(text: str, match: re.Match[str]) -> tuple[Quantity | None, int]:
    digits, end = match["digits"], match.end()
    value, step = _value(digits)
    scale = _power(match["exponent"]) if match["exponent"] else 1.0
    while (word := _SCALE.match(text, end)) is not None:
        scale, end = scale * SCALES[word[1]], word.end()
    value, step = value * scale, step * scale
    if match["sign"] == "-":
        value = -value
    if not math.isfinite(value):
        return None, end
    currency = (match["currency"] or "").strip()
    if currency:
        return Quantity(value, value, UNITS[currency], step, scale=scale), end
    room = re.match(r"[\s-]?", text[end : end + 1])
    start = end + (room.end() if room else 0)
    unit, length = read_unit(text[start : start + 41])
    if unit is not None:
        return Quantity(value, value, unit, step, scale=scale), start + length
    following = text[end : end + 1]
    if following.isalpha() and not _ORDINAL.match(text, end):
        return None, end  # 5A, 3D: a code, no number
    return Quantity(value, value, None, step, _is_year_of(text, match), scale), end


def _is_year_of(text: str, match: re.Match[str]) -> bool:
    """(2019 estimate), as of 2019: says when, not how much."""
    digits = match["digits"]
    if len(digits) != 4 or not digits.isdigit() or not 1000 <= int(digits) <= 2100:
        return False
    return _YEAR_WORDS.search(text[max(0, match.start() - 12) : match.start()]) is not None


def _value(digits: str) -> tuple[float, float]:
    """Value of the digits, and of one in the last of them."""
    plain = re.sub(r"[ '’]", "", digits)
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", plain):
        plain = plain.replace(",", "")
    elif re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?", plain):
        plain = plain.replace(".", "")
    plain = plain.replace(",", ".")
    return float(plain), 10.0 ** -min(300, len(plain.partition(".")[2]))


def _power(exponent: str) -> float:
    number = re.search(r"[-+]?\d+$", exponent.replace(" ", ""))
    assert number is not None
    text = number.group()
    if exponent.lstrip()[0] != "e" and "^" not in exponent and text.startswith("10"):
        text = text[2:] or "1"  # `x 105`, once a superscript
    try:
        return 10.0 ** int(text)
    except OverflowError:
        return math.inf


def _join(
    before: tuple[Quantity, int, int], quantity: Quantity, text: str, start: int
) -> Quantity | None:
    """`9-10 km`, `between 9 and 10`: one range, if only a word or a dash stands between."""
    first, first_start, first_end = before
    between = _BETWEEN.fullmatch(text, first_end, start)
    if between is None or first.low != first.high or first.low > quantity.low:
        return None
    word = between.group().strip()
    if word == "and" and not text[max(0, first_start - 8) : first_start].endswith("between "):
        return None
    unit = first.unit or quantity.unit
    if first.unit and quantity.unit and first.unit[0] != quantity.unit[0]:
        return None
    low = first.low
    # the scale word of `2-3 million`, and of `$2-3 million`, stands once and means both
    is_open = first.unit is None or (first.unit in _CURRENCIES and quantity.unit in (None, unit))
    if is_open and first.scale == 1.0 < quantity.scale and low * quantity.scale <= quantity.low:
        low *= quantity.scale
    if first.unit and quantity.unit:
        low *= first.unit[1] / quantity.unit[1]
        unit = quantity.unit
    return Quantity(min(low, quantity.low), quantity.low, unit, quantity.step, scale=quantity.scale)


def _words_to_digits(text: str) -> str:
    """`twenty-five thousand` -> `25 thousand`; other words stay."""
    pieces: list[str] = []
    value: int | None = None
    for match in _LETTERS.finditer(text):
        word = match.group()
        if word in _WORDS:
            number = _WORDS[word]
            if value is not None and value >= 20 and value % 10 == 0 and 0 < number < 10:
                value += number
                continue
            if value is not None:
                pieces.append(str(value))
            value = number
            continue
        if word == "-" and value is not None and value >= 20:
            continue
        if value is not None:
            pieces.append(str(value))
            value = None
        pieces.append(word)
    if value is not None:
        pieces.append(str(value))
    return " ".join(pieces)
