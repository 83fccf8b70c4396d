"""Dates in answers, each as precise as it is written, from a day to a century.

A gold date is matched at its own precision: "5 May 1998" answers "1998", but "1998" does not answer
"5 May 1998". A text that states two different dates answers neither.

    date_matches("Born on May 5th, 1998", "1998-05-05")
"""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass

from rewards.units import plain_digits

PRECISIONS = ("century", "decade", "year", "month", "day")

MONTHS = {name.lower(): i for i, name in enumerate(calendar.month_name) if name}
MONTHS |= {name.lower(): i for i, name in enumerate(calendar.month_abbr) if name} | {"sept": 9}
_MONTH = "|".join(sorted(MONTHS, key=len, reverse=True))
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = re.compile(
    rf"""(?<![\w.-])(?:
      (?P<y1>\d{{4}})-(?P<m1>\d{{1,2}})(?:-(?P<d1>\d{{1,2}}))?(?![\d-])
    | (?P<y2>\d{{4}})[/.](?P<m2>\d{{1,2}})[/.](?P<d2>\d{{1,2}})(?!\d)
    | (?P<a3>\d{{1,2}})[/.](?P<b3>\d{{1,2}})[/.](?P<y3>\d{{4}})(?!\d)
    | (?P<d4>{_DAY})\s(?:of\s)?(?P<m4>{_MONTH})\b\.?,?\s(?P<y4>\d{{3,4}})(?!\w)
    | (?P<m5>{_MONTH})\b\.?\s(?:(?P<d5>{_DAY}),?\s)?(?:of\s)?(?P<y5>\d{{3,4}})(?!\w)
    | (?P<decade>\d{{3}})0\s?'?s\b
    | (?P<century>\d{{1,2}})(?:st|nd|rd|th)[\s-]century\b
    | (?P<y6>\d{{3,4}})(?!\w)
    | (?P<y7>\d{{1,2}})(?=\s(?:bce?|ad|ce)\b)
    )(?P<era>\s?(?:bce?|b\.c\.(?:e\.)?|ad|ce)(?!\w))?""",
    re.VERBOSE,
)
_AD_BEFORE = re.compile(r"\bad\s(?=\d)")
_HAS_DIGIT = re.compile(r"\d")


@dataclass(frozen=True)
class Date:
    """A date as precise as it is written.

    Attributes:
        year: negative before Christ; of a decade the round one, of a century the first.
        month, day: None where they are not stated.
        precision: one of PRECISIONS.
    """

    year: int
    month: int | None = None
    day: int | None = None
    precision: str = "year"

    def at(self, precision: str) -> Date | None:
        """The date made as coarse as `precision`; None if it is coarser already."""
        if PRECISIONS.index(self.precision) < PRECISIONS.index(precision):
            return None
        if self.precision == precision:
            return self
        match precision:
            case "century":
                return Date(_first_year(self.year, 100), precision=precision)
            case "decade":
                # towards zero: 495 BC is one of the 490s
                return Date(int(self.year / 10) * 10, precision=precision)
            case "year":
                return Date(self.year)
            case "month":
                return Date(self.year, self.month, precision=precision)
        return self


def read_dates(text: str) -> list[tuple[Date, ...]] | None:
    """The dates of a text, in order, each with all its readings (05/06/1998 has two).

    Returns:
        None if digits stand in the text that belong to no date. Linear in the text's length.
    """
    text = " ".join(_AD_BEFORE.sub("", plain_digits(text)).split())
    dates, rest, end = [], [], 0
    for match in _DATE.finditer(text):
        readings = _readings(match)
        if not readings:
            return None
        dates.append(readings)
        rest.append(text[end : match.start()])
        end = match.end()
    rest.append(text[end:])
    return None if any(map(_HAS_DIGIT.search, rest)) else dates


def is_date(text: str) -> bool:
    """Whether the whole text is one date of at least month precision."""
    plain = " ".join(_AD_BEFORE.sub("", plain_digits(text)).split())
    match = _DATE.fullmatch(plain)
    return match is not None and any(r.precision in ("month", "day") for r in _readings(match))


def is_year(text: str) -> bool:
    """Whether the whole text is a year of four digits, 1000 to 2100."""
    text = text.strip()
    return text.isascii() and text.isdigit() and len(text) == 4 and 1000 <= int(text) <= 2100


def date_matches(prediction: str, gold: str, *, tolerance_years: int = 0) -> bool:
    """Whether the text states the gold date, at the gold's precision, and no other.

    Args:
        prediction: an answer.
        gold: a date.
        tolerance_years: years by which the year may differ, where gold is no more precise.
    """
    wanted = read_dates(gold)
    stated = read_dates(prediction)
    if not wanted or not stated or len(wanted) != 1:
        return False
    return any(
        all(any(_same(reading, one, tolerance_years) for reading in date) for date in stated)
        for one in wanted[0]
    )


def _same(stated: Date, gold: Date, tolerance_years: int) -> bool:
    coarse = stated.at(gold.precision)
    if coarse is None:
        return False
    if gold.precision == "year":
        return abs(coarse.year - gold.year) <= tolerance_years
    return coarse == gold


def _first_year(year: int, span: int) -> int:
    """1801 for every year of the 19th century, -500 for 500 to 401 BC."""
    return (year - 1) // span * span + 1 if year > 0 else year // span * span


def _readings(match: re.Match[str]) -> tuple[Date, ...]:
    """What a match of _DATE can mean; nothing if there is no such day."""
    era = (match["era"] or "").replace(".", "").strip()
    sign = -1 if era.startswith("b") else 1
    if match["decade"]:
        return (Date(sign * int(match["decade"]) * 10, precision="decade"),)
    if match["century"]:
        first = (int(match["century"]) - 1) * 100 + 1
        return (Date(first if sign > 0 else -first - 99, precision="century"),)
    if match["y6"] or match["y7"]:
        return (Date(sign * int(match["y6"] or match["y7"])),)
    if match["y3"]:
        pairs = {(match["a3"], match["b3"]), (match["b3"], match["a3"])}
        found = (_date(sign, match["y3"], month, day) for day, month in sorted(pairs))
        return tuple(date for date in found if date is not None)
    group = next(i for i in "1245" if match[f"y{i}"])
    date = _date(sign, match[f"y{group}"], match[f"m{group}"], match[f"d{group}"])
    return () if date is None else (date,)


def _date(sign: int, year: str, month: str, day: str | None) -> Date | None:
    y = sign * int(year)
    m = int(month) if month.isdigit() else MONTHS[month]
    if not 1 <= m <= 12:
        return None
    if day is None:
        return Date(y, m, precision="month")
    d = int(day.rstrip("stndrh"))
    # every fourth year has a 29th of February, whatever the calendar says about centuries
    if not 1 <= d <= (29 if m == 2 else calendar.monthrange(2001, m)[1]):
        return None
    return Date(y, m, d, "day")
