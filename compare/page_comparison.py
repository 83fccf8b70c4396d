"""Sections of the page for a comparison of runs, in their order; numbers, floor and differences.

`page_curves`, `page_behaviour` and `page_training` have the others, `page_studies` those of other
studies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare import page
from compare.charts_rows import Row
from compare.page import Cell, Section, TableRow, estimate_cell, paragraph
from compare.page_behaviour import behaviour_section, groups_section
from compare.page_curves import curves_section
from compare.page_parts import Comparison, dots_both, numbers_of, steps_cell, table_row
from compare.page_training import (
    cost_section,
    recognition_section,
    rewards_section,
    speed_section,
    stability_section,
)
from compare.verdict import target_name

PARTS = {
    "searched": "searched", "entity": "right entity", "passage": "gold passage",
    "accuracy": "answer right",
}  # fmt: skip
MEASURES = {
    "floor": "floor", "ceiling": "ceiling", "final": "end", "auc": "area",
    "at_equal_budget": "equal budget", "recognition.change": "recognition",
}  # fmt: skip


def comparison_sections(data: Comparison) -> list[Section]:
    """All sections that the summary has something for, in the order of the page."""
    makers = (
        curves_section, numbers_section, floor_section, pairs_section, behaviour_section,
        groups_section, recognition_section, cost_section, speed_section, stability_section,
        rewards_section,
    )  # fmt: skip
    return [section for make in makers if (section := make(data)) is not None]


# ---- numbers


def numbers_section(data: Comparison) -> Section:
    """The main table."""
    goal = target_name(data.summary, data.arms.label)
    heads = ["start", "seeds", "floor", "ceiling", "end", "area", f"steps to {goal}",
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
            steps_cell(data, arm),
            estimate_cell(result.get("search_rate_text"), data.interval(arm, "search_rate_text")),
            estimate_cell(result.get("search_rate_image"), data.interval(arm, "search_rate_image")),
        ]
        if not has_final:
            del cells[3]
        rows.append(table_row(data, arm, cells))
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
        table.append([arm, *(v for e in estimates for v in numbers_of(e))])
    chart = dots_both(
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
    chart = dots_both(
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
            f"Share of resamples in which {name} is ahead, with the p value of no difference",
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
        rows.append(table_row(data, other, [Cell(text, first["n_pairs"]), *cells]))
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
        rows.append(table_row(data, other, cells))
    return rows
