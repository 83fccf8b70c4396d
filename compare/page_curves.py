"""The section of learning curves: accuracy large, what lies behind it small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare import page
from compare.charts import NARROW, WIDE, Curve, line_chart, value_range
from compare.page import Section, paragraph
from compare.page_parts import LIMITS, Comparison
from compare.series import NO_SHARES

CURVES = {
    "accuracy": ("Held-out accuracy", "share of held-out questions answered right"),
    "reward": ("Training reward", "mean reward of the training episodes"),
    "searched": ("Searched at all", "share of held-out episodes"),
    "entity": ("Right entity in the query", "share of held-out episodes"),
    "passage": ("Gold passage retrieved", "share of held-out episodes"),
    "search_rate_text": ("Text searches", "share of held-out episodes with one"),
    "search_rate_image": ("Image searches", "share of held-out episodes with one"),
    "calls_per_episode": ("Calls an episode", "mean number of tool calls"),
    "tokens_per_episode": ("Tokens an episode", "mean number of sampled tokens"),
}
AXES = {"step": "steps", "tokens": "tokens", "device_s": "device_s"}
"""Column of a figure's data -> list in a curve."""
SMALLEST_RANGE = 0.1
"""An axis of shares does not end below: noise would look like a curve."""


def curves_section(data: Comparison) -> Section | None:
    """Accuracy large, what lies behind it small, over an x axis that the reader chooses."""
    available = [name for name in CURVES if any(name in c for c in data.curves.values())]
    if "accuracy" not in available:
        return None
    target = data.summary["target"]
    line = None
    if target["value"] is not None:
        words = f"ceiling of {data.arms.label(target['arm'])}"
        line = (target["value"], "steps are counted to here" if "ceiling" in target else words)
    large = curve_figure(data, "accuracy", is_large=True, target=line)
    small = "".join(curve_figure(data, name) for name in available if name != "accuracy")
    note = (
        f"Means over seeds of the last {data.summary['smoothing']} evaluations. Bands: "
        f"{data.summary['interval']}. Faint: single seeds, not smoothed. Click an arm above to "
        "hide it, twice to see it alone."
    )
    return Section(
        f"{data.prefix}curves", "Learning curves",
        f"{paragraph(note)}{_axis_switch(data)}{large}<div class=\"grid-2\">{small}</div>",
    )  # fmt: skip


def curve_figure(
    data: Comparison,
    metric: str,
    *,
    is_large: bool = False,
    target: tuple[float, str] | None = None,
) -> str:
    """One metric of all arms as curves."""
    title, note = CURVES.get(metric, (metric, ""))
    made = [
        _curve_and_rows(data, arm, metrics[metric])
        for arm, metrics in data.curves.items()
        if metric in metrics
    ]
    curves = [curve for curve, _ in made]
    n_columns = max(len(row) for _, rows in made for row in rows)
    rows = [row + [None] * (n_columns - len(row)) for _, lines in made for row in lines]
    values = [v for c in curves for line in (c.y, c.low, c.high, *c.seeds) for v in line]
    low, high = value_range(values)
    if metric not in NO_SHARES:
        high = min(max(high, SMALLEST_RANGE), 1.02)
    wide, narrow = (
        line_chart(
            curves, title=title, description=_describe(curves), x_label="optimizer steps",
            y_range=(low, high), frame=frame, target=target,
        )
        for frame in (WIDE, NARROW)
    )  # fmt: skip
    charts = page.both_widths(wide, narrow) if is_large else narrow
    columns = ["arm", *AXES, *LIMITS]
    columns += [f"seed_{i}" for i in range(n_columns - len(columns))]
    name = f"{data.prefix}{metric}".replace("/", "-")
    return page.figure(name, title, charts, columns, rows, note=note, css_class="curves")


def _curve_and_rows(
    data: Comparison, arm: str, found: Mapping[str, Any]
) -> tuple[Curve, list[list[Any]]]:
    """An arm's curve, and its points as the rows of the figure's data."""
    keep = page.thinned(len(found["mean"]), data.detail.max_points)
    kept = {
        key: [found[key][i] for i in keep] for key in (*AXES.values(), *LIMITS) if found.get(key)
    }
    per_seed = found.get("per_seed") or []
    seeds = [[seed[i] for i in keep] for seed in per_seed] if data.detail.seeds else []
    has_band = len(per_seed) != 1
    curve = Curve(
        arm=data.arms.number(arm),
        label=data.arms.label(arm),
        x=kept["steps"],
        y=kept["mean"],
        low=kept["low"] if has_band else (),
        high=kept["high"] if has_band else (),
        seeds=seeds if len(seeds) > 1 else (),
    )
    columns = [kept.get(key) or [None] * len(keep) for key in (*AXES.values(), *LIMITS)]
    return curve, [[arm, *values] for values in zip(*columns, *seeds, strict=True)]


def _describe(curves: Sequence[Curve]) -> str:
    parts = []
    for curve in curves:
        known = [value for value in curve.y if value is not None]
        if known:
            parts.append(f"{curve.label} from {known[0]:.2f} to {known[-1]:.2f}")
    return "; ".join(parts)


def _axis_switch(data: Comparison) -> str:
    names = {"step": "steps", "tokens": "tokens", "device_s": "device time"}
    accuracy = [metrics["accuracy"] for metrics in data.curves.values() if "accuracy" in metrics]
    shown = [
        column
        for column, list_name in AXES.items()
        if all(c.get(list_name) and None not in c[list_name] for c in accuracy)
    ]
    if len(shown) < 2 or data.prefix:
        return ""
    options = "".join(
        f'<label><input type="radio" name="axis" value="{column}"'
        f"{' checked' if column == 'step' else ''}>{names[column]}</label>"
        for column in shown
    )
    return f'<fieldset class="switch control"><legend>x axis</legend>{options}</fieldset>'
