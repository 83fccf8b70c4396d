"""Charts of rows as SVG text: dots with whiskers, stacked bars, heat maps. See `charts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from compare.charts import Frame, coordinate, mark, number, svg, ticks
from compare.palette import N_SHADES

ROW_HEIGHT = 24
MARK_SCALE = 1.35
MAX_CELL = 52
HEAT_WIDTH = 460
"""Of a heat map in SVG units, less where there are few columns."""
DIGITS = 2
"""Decimals of the numbers at the right of a panel."""
POINT, REFERENCE_POINT = -7, -4
"""Numbers for rows that are no arm: a disc and a diamond in colours of the page."""
SMALLEST_RANGE = 0.1
LABEL_WIDTH = 128
HEAD_HEIGHT = 28
FOOT_HEIGHT = 26


@dataclass(frozen=True)
class Row:
    """A line of a chart: an arm, or one group of it.

    Attributes:
        arm: number of the arm on the page.
        label: what stands at its left.
        estimates: one a panel: {"mean", "low", "high", "per_seed"}, or None.
        starts: the same for where a dumbbell begins, drawn hollow; or empty.
    """

    arm: int
    label: str
    estimates: Sequence[Mapping[str, Any] | None]
    starts: Sequence[Mapping[str, Any] | None] = ()


def dot_chart(
    rows: Sequence[Row],
    panels: Sequence[str],
    *,
    title: str,
    description: str,
    x_range: tuple[float, float],
    panels_a_line: int,
    width: int,
    zero: bool = False,
) -> str:
    """Means with whiskers and faint seeds, one row an arm, one panel a measure.

    Args:
        rows: from the top down.
        panels: names of the measures.
        title: for screen readers, as is `description`.
        description: what is to be seen.
        x_range: of all panels.
        panels_a_line: panels side by side; the rest goes below.
        width: of the chart in SVG units.
        zero: draw the line of no difference, and show numbers with their sign.
    """
    n_lines = math.ceil(len(panels) / panels_a_line)
    line_height = HEAD_HEIGHT + ROW_HEIGHT * len(rows) + FOOT_HEIGHT
    frame = Frame(width=width, height=n_lines * line_height, left=LABEL_WIDTH)
    panel_width = (width - LABEL_WIDTH) / panels_a_line
    value_width = 8 * (DIGITS + (4 if zero else 3))
    parts = []
    for index, name in enumerate(panels):
        top = index // panels_a_line * line_height
        left = LABEL_WIDTH + index % panels_a_line * panel_width + 8
        right = left + panel_width - 16 - value_width
        if index % panels_a_line == 0:
            parts += [_stripes(rows, top, width), _row_labels(rows, top)]
        parts.append(_panel(rows, index, name, top, left, right, x_range, zero))
    return svg(parts, frame, title, description, css_class="dots")


def range_of(rows: Sequence[Row]) -> tuple[float, float]:
    """From the lowest to the highest number of all rows, seeds and whiskers included, and zero."""
    values = [0.0]
    for row in rows:
        for estimate in (*row.estimates, *row.starts):
            if estimate is not None:
                shown = (estimate.get("mean"), estimate.get("low"), estimate.get("high"))
                values += [v for v in (*shown, *(estimate.get("per_seed") or ())) if v is not None]
    low, high = min(values), max(values)
    if high - low < SMALLEST_RANGE:
        high = low + SMALLEST_RANGE
    room = (high - low) * 0.04
    return low - (room if low < 0 else 0), min(high + room, 1.0) if high <= 1 else high + room


def _stripes(rows: Sequence[Row], top: float, width: int) -> str:
    """A faint ground under every second row, where there are many."""
    if len(rows) < 4:
        return ""
    return "".join(
        f'<rect class="stripe" x="0" y="{coordinate(_row_y(top, i) - ROW_HEIGHT / 2)}" '
        f'width="{width}" height="{ROW_HEIGHT}" rx="4"/>'
        for i in range(0, len(rows), 2)
    )


def _row_labels(rows: Sequence[Row], top: float) -> str:
    return "".join(
        f'<text class="row" data-arm="{row.arm}" x="{LABEL_WIDTH - 6}" '
        f'y="{coordinate(_row_y(top, i))}" dy=".35em" text-anchor="end">{escape(row.label)}</text>'
        for i, row in enumerate(rows)
    )


def _row_y(top: float, index: int) -> float:
    return top + HEAD_HEIGHT + ROW_HEIGHT * (index + 0.5)


def _panel(
    rows: Sequence[Row],
    index: int,
    name: str,
    top: float,
    left: float,
    right: float,
    x_range: tuple[float, float],
    zero: bool,
) -> str:
    low, high = x_range
    bottom = top + HEAD_HEIGHT + ROW_HEIGHT * len(rows)

    def x_of(value: float) -> float:
        return left + (min(max(value, low), high) - low) / ((high - low) or 1) * (right - left)

    grid = "".join(
        f'<path d="M{coordinate(x_of(value))} {top + HEAD_HEIGHT}V{bottom}"/>'
        f'<text x="{coordinate(x_of(value))}" y="{bottom + 15}" text-anchor="middle">'
        f"{number(value)}</text>"
        for value in ticks(low, high, max(2, round((right - left) / 55)))
    )
    parts = [
        f'<text class="head" x="{coordinate(left)}" y="{top + 17}">{escape(name)}</text>',
        f'<g class="grid">{grid}</g>',
    ]
    if zero:
        at = coordinate(x_of(0))
        parts.append(f'<path class="zero" d="M{at} {top + HEAD_HEIGHT - 3}V{bottom}"/>')
    for i, row in enumerate(rows):
        estimate = row.estimates[index]
        if estimate is None or estimate.get("mean") is None:
            continue
        start = row.starts[index] if row.starts else None
        parts.append(_dot(row, name, estimate, start, x_of, _row_y(top, i), right + 10, zero))
    return "".join(parts)


def _dot(  # type: ignore[no-untyped-def]
    row: Row,
    name: str,
    estimate: Mapping[str, Any],
    start: Mapping[str, Any] | None,
    x_of,
    y: float,
    value_x: float,
    zero: bool,
) -> str:
    sign = "+" if zero else ""
    text = signed(estimate["mean"]) if zero else f"{estimate['mean']:.{DIGITS}f}"
    tip = f"{row.label}, {name}: {text}"
    height, parts = coordinate(y), []
    low, high = estimate.get("low"), estimate.get("high")
    for value in estimate.get("per_seed") or ():
        if value is not None:
            parts.append(
                f'<circle class="seed-dot a{row.arm}" cx="{coordinate(x_of(value))}" '
                f'cy="{height}" r="2.6"/>'
            )
    if start is not None and start.get("mean") is not None:
        first = start["mean"]
        tip = f"{row.label}, {name}: from {first:.{DIGITS}f} to {text}"
        parts.append(
            f'<path class="bar a{row.arm}" d="M{coordinate(x_of(first))} {height}'
            f'H{coordinate(x_of(estimate["mean"]))}"/>'
            f"{mark(row.arm, x_of(first), y, css_class='mark hollow', scale=1.2)}"
        )
    if low is not None and high is not None:
        tip += f" [{low:{sign}.{DIGITS}f}, {high:{sign}.{DIGITS}f}]".replace("-", "−")
        parts.append(
            f'<path class="whisker a{row.arm}" d="M{coordinate(x_of(low))} {height}'
            f'H{coordinate(x_of(high))}"/>'
        )
    parts.append(mark(row.arm, x_of(estimate["mean"]), y, scale=MARK_SCALE))
    parts.append(
        f'<text class="value" x="{coordinate(value_x)}" y="{height}" dy=".35em">{text}</text>'
    )
    return f'<g data-arm="{row.arm}" data-tip="{escape(tip)}">{"".join(parts)}</g>'


def signed(value: float, digits: int = DIGITS) -> str:
    """A difference with its sign; what rounds to zero has both."""
    text = format(value, f"+.{digits}f")
    return f"±{text[1:]}" if float(text) == 0 else text.replace("-", "−")


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    description: str,
    unit: str,
    limits: tuple[float, float],
    form: str = ".2f",
) -> str:
    """A number a row and column as a shade, written into the cell where there is room.

    Args:
        values: one list a row; None where there is nothing.
        rows: names, from the top down.
        columns: names, from the left.
        title: for screen readers, as is `description`.
        description: what is to be seen.
        unit: what a number is, for the tips.
        limits: values of the lowest and highest shade.
        form: of the numbers in the cells.
    """
    label_width, cell_height = 62, 24
    cell = min(MAX_CELL, (HEAT_WIDTH - label_width - 4) / max(1, len(columns)))
    width = round(label_width + cell * len(columns) + 4)
    frame = Frame(width=width, height=HEAD_HEIGHT + cell_height * len(rows) + 4)
    every = max(1, math.ceil(26 / cell))
    parts = []
    for j, column in enumerate(columns):
        if j % every == 0:
            x = coordinate(label_width + (j + 0.5) * cell)
            parts.append(f'<text x="{x}" y="20" text-anchor="middle">{escape(column)}</text>')
    for i, (row, line) in enumerate(zip(rows, values, strict=True)):
        y = HEAD_HEIGHT + i * cell_height
        parts.append(
            f'<text x="{label_width - 7}" y="{y + 12}" dy=".35em" text-anchor="end">'
            f"{escape(row)}</text>"
        )
        for j, value in enumerate(line):
            if value is None:
                continue
            shade, begin = shade_of(value, limits), label_width + j * cell
            text = format(value, form).replace("-", "−")
            tip = escape(f"layer {columns[j]}, {row}: {value:.4g} {unit}")
            parts.append(
                f'<rect class="h{shade}" data-tip="{tip}" x="{coordinate(begin + 0.75)}" '
                f'y="{y + 0.75}" width="{coordinate(cell - 1.5)}" height="{cell_height - 1.5}" '
                'rx="2"/>'
            )
            if cell > 7.2 * len(text) + 2:
                parts.append(
                    f'<text class="t{shade}" x="{coordinate(begin + cell / 2)}" y="{y + 12}" '
                    f'dy=".35em" text-anchor="middle">{text}</text>'
                )
    size = f'width="{width}" height="{frame.height}"'
    return svg(parts, frame, title, description, css_class="heat", data=size)


def shade_of(value: float, limits: tuple[float, float]) -> int:
    """Number of a value's shade, 0 to N_SHADES - 1."""
    low, high = limits
    share = (value - low) / (high - low) if high > low else 0.0
    return min(N_SHADES - 1, max(0, int(share * N_SHADES)))


def bar_chart(
    rows: Sequence[tuple[int, str, Sequence[tuple[str, str, float]]]],
    *,
    title: str,
    description: str,
    total: float,
    width: int = 460,
) -> str:
    """Stacked bars, one a row.

    Args:
        rows: (number of the arm, label, [(css class, name, length)]).
        title: for screen readers, as is `description`.
        description: what is to be seen.
        total: length that fills the width.
        width: of the chart in SVG units.
    """
    frame = Frame(width=width, height=ROW_HEIGHT * len(rows) + FOOT_HEIGHT)
    label_width = LABEL_WIDTH + 40
    room = width - label_width - 24
    bottom = ROW_HEIGHT * len(rows)
    grid = "".join(
        f'<path d="M{coordinate(label_width + v / total * room)} 0V{bottom}"/>'
        f'<text x="{coordinate(label_width + v / total * room)}" y="{bottom + 16}" '
        f'text-anchor="middle">{number(v)}</text>'
        for v in ticks(0, total, 4)
    )
    parts = [f'<g class="grid">{grid}</g>']
    for i, (arm, label, pieces) in enumerate(rows):
        y, at = i * ROW_HEIGHT, float(label_width)
        bars = []
        for css_class, name, length in pieces:
            wide = max(0.0, length) / total * room
            tip = escape(f"{label}, {name}: {length:.3g}")
            bars.append(
                f'<rect class="{css_class}" data-tip="{tip}" x="{coordinate(at)}" y="{y + 4}" '
                f'width="{coordinate(wide)}" height="{ROW_HEIGHT - 8}"/>'
            )
            at += wide
        parts.append(
            f'<g data-arm="{arm}"><text class="row" x="{label_width - 6}" '
            f'y="{y + ROW_HEIGHT / 2}" dy=".35em" text-anchor="end">{escape(label)}</text>'
            f"{''.join(bars)}</g>"
        )
    return svg(parts, frame, title, description, css_class="bars")
