"""Units of measure: what they measure, and their size in the dimension's own unit (SI, mostly)."""

from __future__ import annotations

import re
import unicodedata

Unit = tuple[str, float]
"""Dimension, and how many of the dimension's own unit one of it is."""

_SIZES: dict[str, dict[str, float]] = {
    "length": {
        "m metre metres meter meters": 1.0,
        "mm millimetre millimetres millimeter millimeters": 1e-3,
        "cm centimetre centimetres centimeter centimeters": 1e-2,
        "km kilometre kilometres kilometer kilometers": 1e3,
        "in inch inches": 0.0254,
        "ft foot feet": 0.3048,
        "yd yard yards": 0.9144,
        "mi mile miles": 1609.344,
        "nmi": 1852.0,
    },
    "area": {
        "m2 sqm": 1.0,
        "cm2": 1e-4,
        "km2": 1e6,
        "ha hectare hectares": 1e4,
        "acre acres": 4046.8564224,
        "mi2": 2589988.110336,
        "ft2": 0.09290304,
    },
    "volume": {
        "m3": 1.0,
        "cm3": 1e-6,
        "km3": 1e9,
        "l litre litres liter liters": 1e-3,
        "ml millilitre millilitres milliliter milliliters": 1e-6,
        "gal gallon gallons": 3.785411784e-3,
    },
    "mass": {
        "kg kilogram kilograms": 1.0,
        "g gram grams": 1e-3,
        "mg milligram milligrams": 1e-6,
        "t tonne tonnes": 1e3,
        "lb lbs pound pounds": 0.45359237,
        "oz ounce ounces": 0.028349523125,
    },
    "time": {
        "s sec second seconds": 1.0,
        "ms millisecond milliseconds": 1e-3,
        "min minute minutes": 60.0,
        "h hr hrs hour hours": 3600.0,
        "day days": 86400.0,
        "week weeks": 604800.0,
        "month months": 2629800.0,
        "yr year years": 31557600.0,
    },
    "speed": {
        "m/s": 1.0,
        "km/h kmh kph": 1 / 3.6,
        "mph": 0.44704,
        "kn knot knots": 1852 / 3600,
    },
    "power": {
        "w watt watts": 1.0,
        "kw kilowatt kilowatts": 1e3,
        "mw megawatt megawatts": 1e6,
        "gw gigawatt gigawatts": 1e9,
        "hp horsepower": 745.6998715822702,
    },
    "share": {"% percent pct": 0.01},
    "dollar": {"$ usd dollar dollars": 1.0},
    "euro": {"€ eur euro euros": 1.0},
    "sterling": {"£ gbp": 1.0},
    "yen": {"¥ jpy yen": 1.0},
    "celsius": {"°c celsius": 1.0},
    "fahrenheit": {"°f fahrenheit": 1.0},
    "kelvin": {"kelvin": 1.0},
}
UNITS: dict[str, Unit] = {
    name: (dimension, size)
    for dimension, sizes in _SIZES.items()
    for names, size in sizes.items()
    for name in names.split()
}

SCALES = {
    "hundred": 1e2, "thousand": 1e3, "k": 1e3, "million": 1e6, "millions": 1e6, "mn": 1e6,
    "mio": 1e6, "billion": 1e9, "billions": 1e9, "bn": 1e9, "trillion": 1e12, "tn": 1e12,
}  # fmt: skip

_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3", "squared": "2", "cubed": "3"}
_SHORT = {
    name: names.split()[0] for sizes in _SIZES.values() for names in sizes for name in names.split()
}
_SPEEDS = {("km", "h"): "km/h", ("m", "s"): "m/s", ("mi", "h"): "mph"}
_WORD = re.compile(r"[^\W\d_]+|[%$€£¥]|°[cf]|[/^]|[23](?!\d)")


def read_unit(text: str) -> tuple[Unit | None, int]:
    """The unit that a text in lower case begins with, and how many characters name it.

    read_unit("square kilometres in all") == (("area", 1e6), 17)
    """
    words: list[tuple[str, int]] = []
    end = 0
    for match in _WORD.finditer(text[:40]):
        gap = text[end : match.start()]
        if gap.strip(" .-") or len(gap) > 2 or len(words) == 5:
            break
        words.append((match.group(), match.end()))
        end = match.end()
    for n in range(len(words), 0, -1):
        unit = _unit([word for word, _ in words[:n]])
        if unit is not None:
            return unit, words[n - 1][1]
    return None, 0


def _unit(words: list[str]) -> Unit | None:
    power = next((_POWERS[word] for word in words if word in _POWERS), "")
    words = [word for word in words if word not in _POWERS and word != "^"]
    if len(words) == 2 and words[1] in ("2", "3"):
        words, power = words[:1], words[1]
    if len(words) == 3 and words[1] in ("/", "per", "an"):
        pair = (_SHORT.get(words[0], ""), _SHORT.get(words[2], ""))
        return UNITS.get(_SPEEDS.get(pair, ""))
    if len(words) != 1:
        return None
    return UNITS.get(_SHORT.get(words[0], "") + power if power else words[0])


def plain_digits(text: str) -> str:
    """NFKC in lower case; a superscript becomes `^2`, which NFKC alone would make a digit."""
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda match: "^" + match.group(), text)
        text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    return text.lower()


_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
