"""Charts as SVG text: curves with bands, stacked areas. `charts_rows` has dots and heat maps.

A chart takes its colours from CSS variables, so that a theme or a printer changes it, and its text
is text. What belongs to an arm carries `data-arm`, its number on the page, by which the page's
script shows and hides it. Curves say in `data-*` where their plot lies, so that the script can draw
them over another x axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

SHAPES = (
    "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "m-2.9-2.9h5.8v5.8h-5.8z",
    "m0-3.8l3.6 6.4h-7.2z",
    "m0-4l4 4l-4 4l-4-4z",
    "m0 3.8l3.6-6.4h-7.2z",
    "m-1.4-4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z",
    "m0-3.9l3.7 2.7l-1.4 4.3h-4.6l-1.4-4.3z",
)
"""Marks of arms, drawn around a point: disc, square, triangle, diamond, triangle down, plus,
pentagon."""
DASHES = ("", "7 3", "2 3", "9 3 2 3")
LABEL_WIDTH = 118
LINE_HEIGHT = 15
MAX_MARKS, FEW_MARKS = 30, 10
"""A curve of more points than the first has marks at as many as the second only."""


@dataclass(frozen=True)
class Curve:
    """One arm's values over x, with a band and its seeds.

    Attributes:
        arm: number of the arm on the page.
        label: its name.
        x, y: the mean; points without a value are None.
        low, high: the band, or empty.
        seeds: one list of values a seed, or empty.
    """

    arm: int
    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    seeds: Sequence[Sequence[float | None]] = field(default=())


@dataclass(frozen=True)
class Frame:
    """Size of a chart and of the margins around its plot, in SVG units."""

    width: int = 460
    height: int = 300
    left: int = 46
    right: int = 16
    top: int = 14
    bottom: int = 42

    @property
    def x1(self) -> int:
        """Right edge of the plot."""
        return self.width - self.right

    @property
    def y1(self) -> int:
        """Lower edge of the plot."""
        return self.height - self.bottom


NARROW = Frame()
WIDE = Frame(width=1000, height=400, right=LABEL_WIDTH + 16)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, some `about` of them and at least two: steps of 1, 2 or 5
    times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last <= first and about < 64:
        return ticks(low, high, 2 * about)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number for an axis: short, with thousands as k and millions as M."""
    size = abs(value)
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.4g}{unit}"
    return f"{value:.4g}".replace("-", "−")


def coordinate(value: float) -> str:
    """A length in SVG units, one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def value_range(values: Iterable[float | None]) -> tuple[float, float]:
    """Lowest and highest value and zero with some room, for an axis; (0, 1) without values."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = min(0.0, *known), max(0.0, *known)
    if high - low < 1e-9:
        return low, high + 0.05
    return low, high + (high - low) * 0.05


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    description: str,
    x_label: str,
    y_range: tuple[float, float],
    frame: Frame = NARROW,
    target: tuple[float, str] | None = None,
) -> str:
    """Curves with bands and faint seeds; names at their ends where the frame has room.

    Args:
        curves: one an arm, in the order of the legend.
        title: for screen readers, as is `description`.
        description: what is to be seen.
        x_label: of the x axis.
        y_range: lowest and highest value of the y axis.
        frame: size and margins.
        target: a value with its name, drawn as a dotted line.
    """
    x_values = [x for curve in curves for x in curve.x]
    x_range = (min(x_values, default=0.0), max(x_values, default=1.0))
    x_of, y_of = _scale(x_range, frame.left, frame.x1), _scale(y_range, frame.y1, frame.top)
    parts = [_y_axis(y_range, frame), _x_axis(x_range, x_label, frame)]
    if target is not None and y_range[0] <= target[0] <= y_range[1]:
        height = coordinate(y_of(target[0]))
        parts.append(
            f'<g class="target"><path d="M{frame.left} {height}H{frame.x1}"/>'
            f'<text x="{frame.x1}" y="{height}" dy="-4" text-anchor="end">'
            f"{escape(target[1])}</text></g>"
        )
    for curve in curves:
        parts.append(_curve(curve, x_of, y_of))
    if frame.right > LABEL_WIDTH:
        parts.append(_end_labels(curves, y_of, frame))
    parts.append(f'<path class="cross" d="M0 {frame.top}V{frame.y1}" visibility="hidden"/>')
    data = (
        f'data-plot="{frame.left} {frame.top} {frame.x1} {frame.y1}" '
        f'data-y="{y_range[0]:.6g} {y_range[1]:.6g}"'
    )
    return svg(parts, frame, title, description, css_class="lines", data=data)


def area_chart(
    x: Sequence[float],
    layers: Sequence[tuple[str, str, Sequence[float]]],
    *,
    title: str,
    description: str,
    x_label: str,
    frame: Frame,
) -> str:
    """Shares that add up to one, stacked over x.

    Args:
        x: points.
        layers: (css class, name, share at each point), the lowest first.
        title: for screen readers, as is `description`.
        description: what is to be seen.
        x_label: of the x axis.
        frame: size and margins.
    """
    x_range = (x[0], x[-1] if len(x) > 1 else x[0] + 1)
    x_of, y_of = _scale(x_range, frame.left, frame.x1), _scale((0.0, 1.0), frame.y1, frame.top)
    below = [0.0] * len(x)
    parts = [_x_axis(x_range, x_label, frame)]
    for css_class, name, shares in layers:
        above = [low + max(0.0, share) for low, share in zip(below, shares, strict=True)]
        upper, lower = (
            [
                f"{coordinate(x_of(a))} {coordinate(y_of(min(b, 1)))}"
                for a, b in zip(x, line, strict=True)
            ]
            for line in (above, below)
        )
        tip = f"{name}: {shares[0]:.2f} at the start, {shares[-1]:.2f} at the end"
        outline = "M" + "L".join([*upper, *reversed(lower)]) + "Z"
        parts.append(f'<path class="layer {css_class}" data-tip="{escape(tip)}" d="{outline}"/>')
        below = above
    parts.append(_y_axis((0.0, 1.0), frame, about=2))
    return svg(parts, frame, title, description, css_class="areas")


def svg(
    parts: Iterable[str],
    frame: Frame,
    title: str,
    description: str,
    *,
    css_class: str,
    data: str = "",
) -> str:
    """The element around a chart's parts, with what a screen reader says."""
    focus = 'tabindex="0" ' if "lines" in css_class else ""
    return (
        f'<svg class="chart {css_class}" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'{focus}aria-label="{escape(title)}. {escape(description)}" {data}>'
        f"{''.join(parts)}</svg>"
    )


def mark(arm: int, x: float, y: float, *, css_class: str = "mark", scale: float = 1.0) -> str:
    """The arm's shape at a point."""
    shape = SHAPES[arm % len(SHAPES)]
    if scale == 1:
        return f'<path class="{css_class} a{arm}" d="M{coordinate(x)} {coordinate(y)}{shape}"/>'
    place = f"translate({coordinate(x)} {coordinate(y)}) scale({scale:g})"
    return f'<path class="{css_class} a{arm}" transform="{place}" d="M0 0{shape}"/>'


def swatch(arm: int) -> str:
    """A small picture of the arm's line and shape, for legends and tables."""
    return (
        '<svg class="swatch" viewBox="0 0 26 12" aria-hidden="true">'
        f'<path class="mean a{arm}"{_dash(arm)} d="M1 6H25"/>{mark(arm, 13, 6)}</svg>'
    )


def _scale(ends: tuple[float, float], first: float, last: float):  # type: ignore[no-untyped-def]
    width = (ends[1] - ends[0]) or 1.0
    return lambda value: first + (value - ends[0]) / width * (last - first)


def _y_axis(y_range: tuple[float, float], frame: Frame, about: int = 5) -> str:
    y_of = _scale(y_range, frame.y1, frame.top)
    parts = []
    for value in ticks(*y_range, about):
        height = coordinate(y_of(value))
        parts.append(
            f'<path d="M{frame.left} {height}H{frame.x1}"/>'
            f'<text x="{frame.left - 7}" y="{height}" dy=".35em" text-anchor="end">'
            f"{number(value)}</text>"
        )
    return f'<g class="grid">{"".join(parts)}</g>'


def _x_axis(x_range: tuple[float, float], label: str, frame: Frame) -> str:
    x_of = _scale(x_range, frame.left, frame.x1)
    marks = "".join(
        f'<text x="{coordinate(x_of(value))}" y="{frame.y1 + 17}" text-anchor="middle">'
        f"{number(value)}</text>"
        for value in ticks(*x_range, max(2, (frame.x1 - frame.left) // 75))
    )
    middle = coordinate((frame.left + frame.x1) / 2)
    return (
        f'<path class="base" d="M{frame.left} {frame.y1}H{frame.x1}"/><g class="x">{marks}</g>'
        f'<text class="name" x="{middle}" y="{frame.y1 + 36}" text-anchor="middle">'
        f"{escape(label)}</text>"
    )


def _curve(curve: Curve, x_of, y_of) -> str:  # type: ignore[no-untyped-def]
    arm, parts = curve.arm, []
    if curve.low and curve.high:
        pairs = [
            (x, low, high)
            for x, low, high in zip(curve.x, curve.low, curve.high, strict=True)
            if low is not None and high is not None
        ]
        upper = [f"{coordinate(x_of(x))} {coordinate(y_of(high))}" for x, _, high in pairs]
        lower = [f"{coordinate(x_of(x))} {coordinate(y_of(low))}" for x, low, _ in pairs]
        if len(pairs) > 1:
            outline = "L".join([*upper, *reversed(lower)])
            parts.append(f'<path class="band a{arm}" d="M{outline}Z"/>')
    for index, seed in enumerate(curve.seeds):
        line = _polyline(curve.x, seed, x_of, y_of)
        parts.append(f'<path class="seed a{arm}" data-seed="{index}" d="{line}"/>')
    line = _polyline(curve.x, curve.y, x_of, y_of)
    parts.append(f'<path class="mean a{arm}"{_dash(arm)} d="{line}"/>')
    n_points = len(curve.x)
    every = 1 if n_points <= MAX_MARKS else math.ceil(n_points / FEW_MARKS)
    shape = SHAPES[arm % len(SHAPES)]
    marks = "".join(
        f"M{coordinate(x_of(x))} {coordinate(y_of(y))}{shape}"
        for x, y in list(zip(curve.x, curve.y, strict=True))[::every]
        if y is not None
    )
    parts.append(
        f'<path class="mark a{arm}" data-shape="{shape}" data-every="{every}" d="{marks}"/>'
    )
    return f'<g data-arm="{arm}">{"".join(parts)}</g>'


def _polyline(x: Sequence[float], y: Sequence[float | None], x_of, y_of) -> str:  # type: ignore[no-untyped-def]
    points = [
        f"{coordinate(x_of(a))} {coordinate(y_of(b))}"
        for a, b in zip(x, y, strict=True)
        if b is not None
    ]
    return "M" + "L".join(points) if points else ""


def _end_labels(curves: Sequence[Curve], y_of, frame: Frame) -> str:  # type: ignore[no-untyped-def]
    ends = [(curve, [y for y in curve.y if y is not None][-1:]) for curve in curves]
    wanted = [(y_of(last[0]), curve) for curve, last in ends if last]
    wanted.sort(key=lambda item: item[0])
    heights = spread([height for height, _ in wanted], LINE_HEIGHT, frame.top, frame.y1)
    x = frame.x1 + 10
    return "".join(
        f'<g class="end" data-arm="{curve.arm}">'
        f'<path class="lead a{curve.arm}" d="M{x - 8} {coordinate(own)}L{x} {coordinate(height)}"/>'
        f"{mark(curve.arm, x + 6, height)}"
        f'<text x="{x + 15}" y="{coordinate(height)}" dy=".35em">{escape(curve.label)}</text></g>'
        for height, (own, curve) in zip(heights, wanted, strict=True)
    )


def spread(heights: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Moves sorted heights apart until none is nearer to the next than the gap, inside the bounds.

    Where they do not all fit, the gap is made smaller.
    """
    if not heights:
        return []
    gap = min(gap, (bottom - top) / max(1, len(heights) - 1))
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap if placed else top))
    limit = bottom
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _dash(arm: int) -> str:
    dash = DASHES[(arm // len(SHAPES)) % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""
