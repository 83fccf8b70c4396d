"""Is a number right? Compares the quantities of an answer with a gold number or range.

A text makes claims: "1.05 km (3445 ft)" makes one claim twice, "5 or 7" makes two that exclude each
other. A number is right if the text makes one claim and that is right; so no list of guesses wins.

    number_matches("1.05 km (3445 ft)", "1050 m")
    not number_matches("5 or 7", "5")
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rewards.quantities import Quantity, read_quantities
from rewards.units import plain_digits, read_unit

SAME_CLAIM = 0.02
"""Relative difference up to which two numbers say the same in different units: both are rounded."""
CONVERSION = 0.005
"""Relative error that a change of unit may add."""
MIN_IOU = 0.5
"""Overlap from which a range of numbers counts as the gold range (InfoSeek)."""


def number_matches(
    prediction: str,
    gold: str | float | Sequence[float],
    *,
    unit: str | None = None,
    tolerance: float = 0.0,
) -> bool:
    """Whether the text claims the gold number, and nothing that contradicts it.

    Args:
        prediction: an answer.
        gold: a number as text (with a unit, if it has one) or as a number, or [low, high].
        unit: of a gold given as a number.
        tolerance: relative; beside it an answer may differ by half of gold's last written digit.

    Returns:
        True if the one number that the text states lies in the gold interval, or its range lies
        within it, or overlaps with it by MIN_IOU.
    """
    wanted = _gold(gold, unit)
    if wanted is None:
        return False
    claims = _claims(read_quantities(prediction), wanted)
    if not claims or not all(_agree(claims[0], other) for other in claims[1:]):
        return False
    return any(_matches(claim, wanted, tolerance) for claim in claims)


def overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union of two intervals, 0 to 1; equal points overlap by 1."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    union = max(one[1], other[1]) - min(one[0], other[0])
    if union == 0.0:
        return 1.0
    return max(0.0, shared) / union if math.isfinite(union) else 0.0


def _gold(gold: str | float | Sequence[float], unit: str | None) -> Quantity | None:
    if isinstance(gold, str):
        read = read_quantities(gold)
        return read[0] if len(read) == 1 else None
    named = read_unit(plain_digits(unit))[0] if unit else None
    if isinstance(gold, int | float):
        step = 1.0 if float(gold).is_integer() else 0.0
        return Quantity(float(gold), float(gold), named, step)
    low, high = (float(value) for value in gold)
    return Quantity(min(low, high), max(low, high), named, 0.0)


def _claims(quantities: list[Quantity], gold: Quantity) -> list[Quantity]:
    """The quantities that answer the question: not years beside a number, nor other dimensions."""
    claims = [q for q in quantities if not q.is_year] or quantities
    if gold.unit is None:
        return claims
    alike = [q for q in claims if q.unit is not None and q.unit[0] == gold.unit[0]]
    return alike or [q for q in claims if q.unit is None]


def _agree(one: Quantity, other: Quantity) -> bool:
    """Whether two quantities say the same, each in its own unit."""
    if one.unit and other.unit and one.unit[0] != other.unit[0]:
        return False
    pairs = [(one.base, other.base)]
    if one.unit is None or other.unit is None:
        pairs.append(((one.low, one.high), (other.low, other.high)))
    exact = one.unit == other.unit
    return any(
        all(_near(a, b, 0.0 if exact else SAME_CLAIM) for a, b in zip(*pair, strict=True))
        for pair in pairs
    )


def _near(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def _matches(claim: Quantity, gold: Quantity, tolerance: float) -> bool:
    """Whether one claim lies in the gold interval, widened by rounding and tolerance."""
    readings = [(claim.low, claim.high)]
    slack = 0.0
    if gold.unit is not None and claim.unit is not None:
        readings = [(claim.base[0] / gold.unit[1], claim.base[1] / gold.unit[1])]
        if claim.unit != gold.unit:
            slack = CONVERSION
    elif gold.unit is None and claim.unit is not None:
        readings.append(claim.base)  # `1.05 km` where metres were asked for
    room_low = max(gold.step / 2, (tolerance + slack) * abs(gold.low))
    room_high = max(gold.step / 2, (tolerance + slack) * abs(gold.high))
    if gold.step == 1.0 and gold.unit is None and tolerance == 0.0:
        room_low = room_high = 0.0  # a count is exact
    wide = (gold.low - room_low * (1 + 1e-9), gold.high + room_high * (1 + 1e-9))
    for low, high in readings:
        if wide[0] <= low and high <= wide[1]:
            return True
        if low < high and gold.low < gold.high and overlap((low, high), wide) >= MIN_IOU:
            return True
    return False
