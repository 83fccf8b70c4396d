"""Sections of the page for a comparison of runs: curves, floor, ceiling, search behaviour, where a
start helps, cost, stability, rewards. `page_studies` has those of other studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from compare import page
from compare.charts import NARROW, WIDE, Curve, Frame, area_chart, line_chart, value_range
from compare.charts_rows import Row, bar_chart, dot_chart, range_of
from compare.page import Arms, Cell, Detail, Section, TableRow, estimate_cell, paragraph
from compare.page_data import BEHAVIOURS, NO_SHARES
from compare.verdict import ABOVE, BELOW, duration, listed, side_of

PARTS = {
    "searched": "searched", "entity": "right entity", "passage": "gold passage",
    "accuracy": "answer right",
}  # fmt: skip
WAYS = {
    "none": "no search",
    "text_only": "text only",
    "image_only": "image only",
    "both": "both",
}
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
MEASURES = {
    "floor": "floor", "ceiling": "ceiling", "final": "end", "auc": "area",
    "at_equal_budget": "equal budget", "recognition.change": "recognition",
}  # fmt: skip
AXES = {"step": "steps", "tokens": "tokens", "device_s": "device_s"}
"""Column of a figure's data -> list in a curve."""
LIMITS = ("mean", "low", "high")
SMALLEST_RANGE = 0.1
"""An axis of shares does not end below: noise would look like a curve."""
SMALL = Frame(width=310, height=190, left=38, right=12, top=10, bottom=40)


@dataclass(frozen=True)
class Comparison:
    """What the sections are made from.

    Attributes:
        summary: content of the report's json file.
        curves: of `page_data.curves_of`.
        arms: of the page.
        detail: how much data goes in.
        reference: the arm that others are held against.
        prefix: of section and figure names, for a second comparison on one page.
    """

    summary: Mapping[str, Any]
    curves: Mapping[str, Mapping[str, Any]]
    arms: Arms
    detail: Detail
    reference: str
    prefix: str = ""

    @property
    def results(self) -> Mapping[str, Any]:
        """The arms of this comparison, in the order of the page."""
        found = self.summary["arms"]
        return {arm: found[arm] for arm in self.arms.names if arm in found}

    @property
    def trained(self) -> list[str]:
        """Arms that were trained."""
        return [arm for arm, result in self.results.items() if result.get("is_trained", True)]

    def interval(self, arm: str, name: str) -> Sequence[float] | None:
        """An arm's limits by name, None for one seed."""
        found: Sequence[float] | None = self.results[arm].get("intervals", {}).get(name)
        return found

    def estimate(self, arm: str, name: str, mean: float | None) -> dict[str, Any] | None:
        """A number with its limits and seeds, as the charts take it."""
        if mean is None:
            return None
        low, high = self.interval(arm, name) or (None, None)
        seeds = self.results[arm].get("per_seed", {}).get(name) or []
        return {
            "mean": mean, "low": low, "high": high,
            "per_seed": seeds if self.detail.seeds and len(seeds) > 1 else [],
        }  # fmt: skip


def comparison_sections(data: Comparison) -> list[Section]:
    """All sections that the summary has something for, in the order of the page."""
    makers = (
        curves_section, numbers_section, floor_section, pairs_section, behaviour_section,
        groups_section, recognition_section, cost_section, stability_section, rewards_section,
    )  # fmt: skip
    return [section for make in makers if (section := make(data)) is not None]


# ---- curves


def curves_section(data: Comparison) -> Section | None:
    """Accuracy large, what lies behind it small, over an x axis that the reader chooses."""
    available = [name for name in CURVES if any(name in c for c in data.curves.values())]
    if "accuracy" not in available:
        return None
    target = data.summary["target"]
    line = None
    if target["value"] is not None:
        line = (target["value"], f"ceiling of {data.arms.label(target['arm'])}")
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


# ---- numbers


def numbers_section(data: Comparison) -> Section:
    """The main table."""
    target = data.summary["target"]
    name = data.arms.label(target["arm"])
    heads = ["start", "seeds", "floor", "ceiling", "end", "area", f"steps to {name}’s ceiling",
             "text search", "image search"]  # fmt: skip
    has_final = any(result.get("final") is not None for result in data.results.values())
    rows = []
    for arm, result in data.results.items():
        cells = [
            Cell(str(len(result["seeds"])), len(result["seeds"])),
            estimate_cell(result["floor"].get("accuracy"), data.interval(arm, "floor.accuracy")),
            estimate_cell(result.get("ceiling"), data.interval(arm, "ceiling")),
            estimate_cell(result.get("final"), data.interval(arm, "final")),
            estimate_cell(result.get("auc"), data.interval(arm, "auc")),
            _steps_cell(data, arm),
            estimate_cell(result.get("search_rate_text"), data.interval(arm, "search_rate_text")),
            estimate_cell(result.get("search_rate_image"), data.interval(arm, "search_rate_image")),
        ]
        if not has_final:
            del cells[3]
        rows.append(_row(data, arm, cells))
    if not has_final:
        heads.remove("end")
    note = (
        "Floor: accuracy before any update. Ceiling: the best smoothed accuracy; the search rates "
        "are taken there. Area: mean height of the accuracy curve. Small: 95 % interval over seeds."
    )
    return Section(
        f"{data.prefix}numbers", "The starts in numbers",
        paragraph(note) + page.table("Accuracy, cost and search rates of every start", heads, rows),
    )  # fmt: skip


def _row(data: Comparison, arm: str, cells: Sequence[Cell]) -> TableRow:
    return TableRow(data.arms.label(arm), cells, data.arms.number(arm))


def _steps_cell(data: Comparison, arm: str) -> Cell:
    result = data.results[arm]
    values = result.get("per_seed", {}).get("steps_to_target")
    if values is None or data.summary["target"]["value"] is None:
        return Cell("–")
    reached = sum(value is not None for value in values)
    if reached == 0:
        return Cell(f"not in {result['last_step']}")
    if reached < len(values):
        return Cell(f"{reached} of {len(values)} seeds")
    return estimate_cell(result["steps_to_target"], data.interval(arm, "steps_to_target"), digits=0)


# ---- floor


def floor_section(data: Comparison) -> Section | None:
    """What every start does before training, in four parts."""
    parts = [p for p in PARTS if any(r["floor"].get(p) is not None for r in data.results.values())]
    if not parts:
        return None
    rows, table = [], []
    for arm, result in data.results.items():
        estimates = [data.estimate(arm, f"floor.{p}", result["floor"].get(p)) for p in parts]
        rows.append(Row(data.arms.number(arm), data.arms.label(arm), estimates))
        table.append([arm, *(v for e in estimates for v in _numbers(e))])
    chart = _dots_both(
        rows, [PARTS[p] for p in parts], "Before any training",
        "Shares of held-out questions, with 95 % intervals",
    )  # fmt: skip
    columns = ["arm", *(f"{p}{end}" for p in parts for end in ("", "_low", "_high"))]
    return Section(
        f"{data.prefix}floor", "Before any training",
        paragraph(
            "Four parts, each needing the one before it: they tell a habit of searching from the "
            "skill of finding and reading the answer."
        ) + page.figure(f"{data.prefix}floor-parts", "The floor in four parts", chart, columns,
                        table, note="Share of held-out questions at step 0. Whiskers: 95 % "
                        "interval over seeds; faint dots: seeds."),
    )  # fmt: skip


def _numbers(estimate: Mapping[str, Any] | None) -> list[Any]:
    return [None] * 3 if estimate is None else [estimate[key] for key in ("mean", "low", "high")]


def _dots_both(
    rows: Sequence[Row],
    panels: Sequence[str],
    title: str,
    description: str,
    zero: bool = False,
) -> str:
    """Dots in two layouts: panels beside each other, or below each other."""
    x_range = range_of(rows)
    wide = dot_chart(
        rows, panels, title=title, description=description, x_range=x_range, zero=zero,
        panels_a_line=page.panels_a_line(len(panels)), width=1000,
    )  # fmt: skip
    narrow = dot_chart(
        rows, panels, title=title, description=description, x_range=x_range, zero=zero,
        panels_a_line=1, width=460,
    )  # fmt: skip
    return page.both_widths(wide, narrow)


# ---- pairs


def pairs_section(data: Comparison) -> Section | None:
    """The reference minus every other arm."""
    pairs = [
        p for p in data.summary.get("pairs") or ()
        if p["arm"] == data.reference and p["other"] in data.results
    ]  # fmt: skip
    if not pairs:
        return None
    name = data.arms.label(data.reference)
    measures = [m for m in MEASURES if any(p["metric"] == m for p in pairs)]
    by_key = {(p["other"], p["metric"]): p for p in pairs}
    others = list(dict.fromkeys(p["other"] for p in pairs))
    rows = [
        Row(data.arms.number(other), data.arms.label(other),
            [by_key.get((other, m)) for m in measures])
        for other in others
    ]  # fmt: skip
    chart = _dots_both(
        rows, [MEASURES[m] for m in measures], f"{name} minus every other start",
        "Differences with 95 % intervals", zero=True,
    )  # fmt: skip
    columns = ["other", "metric", "mean", "low", "high", "probability", "p_value", "n_pairs"]
    values = [[pair.get(column) for column in columns] for pair in pairs]
    note = (
        f"{name} minus the other start, seed by seed on the same questions. Right of the line: "
        f"{name} is ahead; a whisker that crosses it: not separated."
    )
    return Section(
        f"{data.prefix}differences",
        f"{name} against the others",
        page.figure(
            f"{data.prefix}pairs",
            f"{name} minus every other start",
            chart,
            columns,
            values,
            note=note,
        )
        + page.table(
            f"{name} minus the other start, 95 % interval in brackets",
            ["other start", "pairs", *(MEASURES[m] for m in measures)],
            _pair_rows(data, others, measures, by_key),
        )
        + page.table(
            f"Probability that {name} is ahead, with the p value of no difference",
            ["other start", *(MEASURES[m] for m in measures)],
            _probability_rows(data, others, measures, by_key),
        ),
    )


Pairs = Mapping[tuple[str, str], Mapping[str, Any]]
"""(other arm, measure) -> paired difference."""


def _pair_rows(
    data: Comparison, others: Sequence[str], measures: Sequence[str], pairs: Pairs
) -> list[TableRow]:
    rows = []
    for other in others:
        found = [pairs.get((other, measure)) for measure in measures]
        first = next(pair for pair in found if pair is not None)
        text = f"{first['n_pairs']}{'' if first.get('paired', True) else ' (not paired)'}"
        cells = [
            Cell("–") if pair is None
            else estimate_cell(pair["mean"], (pair["low"], pair["high"]), digits=3, signed=True)
            for pair in found
        ]  # fmt: skip
        rows.append(_row(data, other, [Cell(text, first["n_pairs"]), *cells]))
    return rows


def _probability_rows(
    data: Comparison, others: Sequence[str], measures: Sequence[str], pairs: Pairs
) -> list[TableRow]:
    rows = []
    for other in others:
        cells = []
        for measure in measures:
            pair = pairs.get((other, measure)) or {}
            probability, p_value = pair.get("probability"), pair.get("p_value")
            if probability is None:
                cells.append(Cell("–"))
                continue
            small = "" if p_value is None else f"p {p_value:.3f}"
            cells.append(Cell(f"{probability:.2f}", probability, small))
        rows.append(_row(data, other, cells))
    return rows


# ---- search behaviour


def behaviour_section(data: Comparison) -> Section | None:
    """How episodes search, over training, one small chart an arm; and how they end."""
    key = [f"behaviour/{way}" for way in BEHAVIOURS]
    known = {a: c for a, c in data.curves.items() if all(k in c for k in key)}
    charts, rows = [], []
    for arm, metrics in known.items():
        steps = metrics[key[0]]["steps"]
        keep = page.thinned(len(steps), data.detail.max_points)
        x = [steps[i] for i in keep]
        shares = {way: [metrics[k]["mean"][i] for i in keep]
                  for way, k in zip(BEHAVIOURS, key, strict=True)}  # fmt: skip
        rows += [[arm, step, *(shares[way][i] for way in BEHAVIOURS)] for i, step in enumerate(x)]
        if len(x) < 2:
            continue
        chart = area_chart(
            x, [(f"way-{way}", WAYS[way], shares[way]) for way in reversed(BEHAVIOURS)],
            title=f"Searches of {data.arms.label(arm)}",
            description="; ".join(
                f"{WAYS[way]} {share[0]:.2f} to {share[-1]:.2f}" for way, share in shares.items()
            ),
            x_label="optimizer steps", frame=SMALL,
        )  # fmt: skip
        charts.append(_small_chart(data, arm, chart))
    body = ""
    if charts:
        legend = "".join(f'<li><i class="way-{way}"></i>{WAYS[way]}</li>' for way in WAYS)
        body += page.figure(
            f"{data.prefix}behaviour", "What episodes search with",
            f'<ul class="key">{legend}</ul><div class="grid-3">{"".join(charts)}</div>',
            ["arm", "step", *BEHAVIOURS], rows,
            note="Shares of held-out episodes, smoothed, over training.",
        )  # fmt: skip
    body += _endings(data)
    if not body:
        return None
    return Section(f"{data.prefix}behaviour", "Search behaviour", paragraph(
        "Whether an episode searches at all, and with what: by text, by image, or by both."
    ) + body)  # fmt: skip


def _small_chart(data: Comparison, arm: str, chart: str) -> str:
    label = escape(data.arms.label(arm))
    number = data.arms.number(arm)
    return (
        f'<div class="small-chart" data-arm="{number}" data-head="{label}">'
        f"<h4>{page.swatch(number)}{label}</h4>{chart}</div>"
    )


def _endings(data: Comparison) -> str:
    """A table of why episodes end, at the start and at the end of training."""
    reasons = sorted({m.removeprefix("stop/") for c in data.curves.values()
                      for m in c if m.startswith("stop/")})  # fmt: skip
    if not reasons:
        return ""
    rows = []
    for arm, metrics in data.curves.items():
        cells = []
        for reason in reasons:
            found = metrics.get(f"stop/{reason}")
            if found is None:
                cells.append(Cell("–"))
                continue
            first, last = found["mean"][0], found["mean"][-1]
            text = f"{first:.2f}" if len(found["mean"]) == 1 else f"{first:.2f} → {last:.2f}"
            cells.append(Cell(text, last))
        rows.append(_row(data, arm, cells))
    return page.table(
        "Why held-out episodes end: share at the first and at the last evaluation",
        ["start", *(reason.replace("_", " ") for reason in reasons)], rows,
    )  # fmt: skip


# ---- where it helps


def groups_section(data: Comparison) -> Section | None:
    """Accuracy by group of questions: from the floor to the ceiling, and in which the reference
    leads."""
    results = data.results
    groups = sorted({group for result in results.values() for group in result["by_group"]})
    groups = [g for g in groups if any(r["by_group"].get(g) for r in results.values())]
    if not groups:
        return None
    rows, table, values = [], [], []
    for arm, result in results.items():
        ends, starts, cells = [], [], []
        for group in groups:
            found = result["by_group"].get(group) or {"floor": None, "ceiling": None}
            has_end = found.get("ceiling") is not None
            start = data.estimate(arm, f"{group}.floor", found["floor"])
            end = data.estimate(arm, f"{group}.ceiling", found.get("ceiling"))
            ends.append(end if has_end else start)
            starts.append(start if has_end else None)
            cells.append(_group_cell(found))
            values.append([arm, group, *_numbers(start), *_numbers(end)])
        rows.append(Row(data.arms.number(arm), data.arms.label(arm), ends, starts))
        table.append(_row(data, arm, cells))
    chart = _dots_both(
        rows, [_group_name(g) for g in groups], "Accuracy by group",
        "From the floor (hollow) to the ceiling (filled)",
    )  # fmt: skip
    name = data.arms.label(data.reference)
    sentences = paragraph(" ".join(group_sentences(data, groups)))
    columns = ["arm", "group", "floor", "floor_low", "floor_high",
               "ceiling", "ceiling_low", "ceiling_high"]  # fmt: skip
    return Section(
        f"{data.prefix}groups", f"Where {name} helps, and where not",
        sentences
        + page.figure(f"{data.prefix}by-group", "Accuracy by group of questions", chart, columns,
                      values, note="Hollow: before training; filled: at the ceiling of accuracy. "
                      "seen and unseen: whether the VLM knew the pictured entity before.")
        + page.table("Accuracy by group: floor → ceiling",
                     ["start", *(_group_name(g) for g in groups)], table),
    )  # fmt: skip


def group_sentences(data: Comparison, groups: Sequence[str]) -> list[str]:
    """In which groups the reference lies above, below, or apart from nobody."""
    others = [arm for arm in data.results if arm != data.reference]
    own = data.results[data.reference]["by_group"]
    leads, trails, level = [], [], []
    for group in groups:
        if group not in own:
            continue
        end = "ceiling" if own[group].get("ceiling") is not None else "floor"
        sides = {
            arm: side_of(data.summary, data.reference, arm, f"{group}.{end}")
            for arm in others
            if (data.results[arm]["by_group"].get(group) or {}).get(end) is not None
        }
        ahead = [arm for arm, side in sides.items() if side == ABOVE]
        behind = [arm for arm, side in sides.items() if side == BELOW]
        if behind:
            trails.append(f"{_group_name(group)} (below {listed(behind, data.arms.label)})")
        elif ahead:
            leads.append(f"{_group_name(group)} (above {listed(ahead, data.arms.label)})")
        elif sides:
            level.append(_group_name(group))
    name = data.arms.label(data.reference)
    sentences = []
    if leads:
        sentences.append(f"{name} leads in {'; '.join(leads)}.")
    if trails:
        sentences.append(f"{name} trails in {'; '.join(trails)}.")
    if level:
        sentences.append(f"Its interval overlaps with all others in {', '.join(level)}.")
    return sentences


def _group_name(group: str) -> str:
    return group.replace("kind/", "kind: ")


def _group_cell(found: Mapping[str, Any]) -> Cell:
    floor, end = found.get("floor"), found.get("ceiling")
    if floor is None:
        return Cell("–")
    return Cell(f"{floor:.2f}", floor) if end is None else Cell(f"{floor:.2f} → {end:.2f}", end)


# ---- perception


def recognition_section(data: Comparison) -> Section | None:
    """What training does to the recognition of seen places, where it was measured."""
    measured = {arm: one for arm, one in data.results.items() if "recognition" in one}
    if not measured:
        return None
    rows = [
        _row(data, arm, [
            estimate_cell(value, data.interval(arm, f"recognition.{when}"))
            for when, value in result["recognition"].items()
        ])
        for arm, result in measured.items()
    ]  # fmt: skip
    return Section(
        f"{data.prefix}recognition", "Perception kept",
        paragraph("Share of photos of seen places that are named right when the VLM's own question "
                  "is asked, without tools: other photos for every seed, the same before and after "
                  "training.")
        + page.table("Recognition before and after training, 95 % interval in brackets",
                     ["start", "before", "after", "change"], rows),
    )  # fmt: skip


# ---- cost


def cost_section(data: Comparison) -> Section | None:
    """Steps, tokens and device time to the target, and accuracy at equal device time."""
    names = ("tokens_to_target", "device_s_to_target", "preparation_device_s")
    if not any(r.get(n) is not None for r in data.results.values() for n in names):
        return None
    target = data.summary["target"]
    rows = []
    for arm, result in data.results.items():
        preparation = result.get("preparation_device_s")
        parts = preparation if isinstance(preparation, Mapping) else {"": preparation}
        known = [value for value in parts.values() if value is not None]
        rows.append(_row(data, arm, [
            _steps_cell(data, arm),
            estimate_cell(result.get("tokens_to_target"), data.interval(arm, "tokens_to_target"),
                          digits=0),
            _time_cell(result.get("device_s_to_target"), data.interval(arm, "device_s_to_target")),
            _time_cell(sum(known) if known else None, None),
            _time_cell(result.get("training_device_s"), data.interval(arm, "training_device_s")),
            estimate_cell(result.get("at_equal_budget"), data.interval(arm, "at_equal_budget")),
        ]))  # fmt: skip
    budget = data.summary.get("equal_budget") or {}
    text = "Device time to the target includes calibration and merging."
    if budget.get("device_s") is not None:
        text += (
            f" Equal budget: the smoothed accuracy once {duration(budget['device_s'])} are spent, "
            f"preparation included, which is what {data.arms.label(budget['arm'])} took in all."
        )
    if cheaper := [arm for arm in budget.get("cheaper") or () if arm in data.results]:
        text += f" The last value holds for {listed(cheaper, data.arms.label)}, which cost less."
    notes = [text, *_cost_notes(data)]
    goal = data.arms.label(target["arm"])
    return Section(
        f"{data.prefix}cost", f"Cost to the ceiling of {goal}",
        "".join(paragraph(note) for note in notes) + page.table(
            f"Cost to reach the ceiling of {goal}, and accuracy at equal device time",
            ["start", "steps", "tokens", "device time", "preparation", "whole training",
             "accuracy at equal budget"], rows,
        ),
    )  # fmt: skip


def _cost_notes(data: Comparison) -> list[str]:
    """The notes on costs, equal ones of several arms as one."""
    arms_of: dict[str, list[str]] = {}
    for note in (data.summary.get("cost") or {}).get("notes", []):
        arm, colon, text = note.partition(": ")
        if colon and arm in data.results:
            arms_of.setdefault(text, []).append(arm)
        else:
            arms_of.setdefault(note, [])
    return [
        f"{listed(arms, data.arms.label)}: {text}." if arms else f"{text.rstrip('.')}."
        for text, arms in arms_of.items()
    ]


def _time_cell(seconds: float | None, limits: Sequence[float] | None) -> Cell:
    if seconds is None:
        return Cell("–")
    unit, by = ("h", 3600) if seconds >= 3600 else ("min", 60) if seconds >= 120 else ("s", 1)
    small = ""
    if limits and limits[0] != limits[1]:
        small = f"[{limits[0] / by:.1f}, {limits[1] / by:.1f}]"
    return Cell(f"{seconds / by:.1f} {unit}", seconds, small)


# ---- stability

STABILITY = {
    "collapses": ("collapses", 1), "final_minus_best": ("end minus best", 3),
    "largest_drop": ("largest drop", 3), "ceiling_sd": ("spread of ceilings", 3),
    "curve_sd": ("spread of curves", 3), "zero_signal": ("steps without signal", 3),
    "not_a_number": ("steps not a number", 3),
}  # fmt: skip


def stability_section(data: Comparison) -> Section | None:
    """How steady the trainings were."""
    known = {arm: r["stability"] for arm, r in data.results.items() if r.get("stability")}
    if not known:
        return None
    names = [n for n in STABILITY if any(found.get(n) is not None for found in known.values())]
    rows = [
        _row(data, arm, [
            estimate_cell(found.get(n), data.interval(arm, f"stability.{n}"),
                          digits=STABILITY[n][1])
            for n in names
        ])
        for arm, found in known.items()
    ]  # fmt: skip
    return Section(
        f"{data.prefix}stability", "Stability",
        paragraph(
            "How steady the trainings were: drops along a curve, spread between seeds, and steps "
            "that taught nothing because every group got one reward."
        ) + page.table("Stability of the trainings", ["start", *(STABILITY[n][0] for n in names)],
                       rows),
    )  # fmt: skip


# ---- rewards

_REWARD_CLASSES = ("way-text_only", "way-both", "way-image_only", "way-none")


def rewards_section(data: Comparison) -> Section | None:
    """What each part added to the reward, early and late."""
    known = {arm: r["reward_parts"] for arm, r in data.results.items() if r.get("reward_parts")}
    if not known:
        return None
    names = list(dict.fromkeys(n for m in known.values() for p in m["phases"] for n in p["parts"]))
    bars, values, rows = [], [], []
    for arm, made in known.items():
        for phase in made["phases"]:
            first, last = phase["steps"]
            pieces = [
                (_REWARD_CLASSES[i % len(_REWARD_CLASSES)], name, phase["parts"].get(name, 0.0))
                for i, name in enumerate(names)
            ]
            label = f"{data.arms.label(arm)}, {first}–{last}"
            bars.append((data.arms.number(arm), label, pieces))
            values.append([arm, first, last, phase["reward"],
                           *(phase["parts"].get(n) for n in names)])  # fmt: skip
            rows.append(TableRow(
                data.arms.label(arm),
                [Cell(f"{first}–{last}", first), Cell(f"{phase['reward']:.3f}", phase["reward"]),
                 *(estimate_cell(phase["parts"].get(n), digits=3) for n in names)],
                data.arms.number(arm),
            ))  # fmt: skip
    total = max(0.01, *(sum(max(0.0, piece[2]) for piece in bar[2]) for bar in bars))
    wide, narrow = (
        bar_chart(bars, title="Where the reward came from", total=total, width=width,
                  description="What each part added to the mean training reward, by thirds")
        for width in (900, 460)
    )  # fmt: skip
    chart = page.both_widths(wide, narrow)
    legend = "".join(
        f'<li><i class="{_REWARD_CLASSES[i % len(_REWARD_CLASSES)]}"></i>'
        f"{escape(name.replace('accuracy', 'right answers'))}</li>"
        for i, name in enumerate(names)
    )
    hacked = [arm for arm, made in known.items() if made.get("rises_without_answers")]
    warning = ""
    if hacked:
        warning = paragraph(
            f"{listed(hacked, data.arms.label)}: the reward rose mostly by other parts than right "
            "answers. Read episodes before trusting it.", "notice",
        )  # fmt: skip
    return Section(
        f"{data.prefix}rewards", "Where the reward came from",
        warning + page.figure(
            f"{data.prefix}reward-parts", "Parts of the mean training reward",
            f'<ul class="key">{legend}</ul>{chart}',
            ["arm", "first_step", "last_step", "reward", *names], values,
            note="By thirds of the training; right answers with the search penalty taken off.",
        ) + page.table("Parts of the reward by thirds of the training",
                       ["start", "steps", "reward", *names], rows),
    )  # fmt: skip
