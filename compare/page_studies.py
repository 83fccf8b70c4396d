"""Sections of the page for studies of starts: floors, ablations, transfer to other worlds.

The records are the content of a study's json file; an estimate in them is {"mean", "low", "high",
"per_seed"}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare import page
from compare.charts_rows import POINT, REFERENCE_POINT, Row, dot_chart
from compare.page import Arms, Cell, Detail, Section, TableRow, estimate_cell, paragraph
from compare.page_parts import dots_both, numbers_of

Estimate = Mapping[str, Any]

SHOWN = ("searched", "entity", "passage", "accuracy")
HEADS = {
    "searched": "searched", "entity": "right entity", "passage": "gold passage",
    "accuracy": "answer right", "seen accuracy": "seen", "unseen accuracy": "unseen",
    "recognition": "recognition", "by image": "by image",
}  # fmt: skip
STAGES = {"before": "before training", "after": "after training", "gain": "gained by training"}


def floor_sections(
    record: Mapping[str, Any], arms: Arms, detail: Detail, prefix: str = ""
) -> list[Section]:
    """The floor table, its picture, and the differences to the reference.

    Args:
        record: content of a floor study's json file.
        arms: of the page.
        detail: how much data goes in.
        prefix: of section and figure names.
    """
    found = record["arms"]
    names = sorted(found, key=lambda arm: -_mean(found[arm]["parts"].get("accuracy")))
    columns = [c for c in HEADS if any(c in found[arm]["parts"] for arm in names)]
    shown = [c for c in SHOWN if c in columns]
    rows = [_dots(arm, [found[arm]["parts"].get(c) for c in shown], arms, detail) for arm in names]
    chart = dots_both(rows, [HEADS[c] for c in shown], "Starts before any training")
    values = [
        [arm, column, *numbers_of(found[arm]["parts"].get(column)), _recipe(found[arm])]
        for arm in names
        for column in columns
    ]
    table = [
        TableRow(
            arms.label(arm),
            [_cell(found[arm]["parts"].get(c)) for c in columns],
            arms.number(arm),
        )
        for arm in names
    ]  # fmt: skip
    n_seeds = len(record["seeds"])
    note = (
        f"What every start does before any training, over {n_seeds} seed"
        f"{'s' if n_seeds > 1 else ''}. Most right answers first; click a head to sort otherwise."
    )
    sections = [
        Section(
            f"{prefix}starts", "Every start before any training",
            paragraph(note)
            + page.figure(f"{prefix}starts", "Starts in four parts", chart,
                          ["arm", "part", "mean", "low", "high", "recipe"], values,
                          note="Share of held-out questions. Whiskers: 95 % interval over seeds; "
                          "faint dots: seeds.")
            + page.table("Starts before any training",
                         ["start", *(HEADS[c] for c in columns)], table)
            + _recipes_table(found, names, arms),
        )
    ]  # fmt: skip
    differences = difference_section(record, arms, detail, prefix)
    return [*sections, differences] if differences is not None else sections


def _recipes_table(found: Mapping[str, Mapping[str, Any]], names: Sequence[str], arms: Arms) -> str:
    rows = [
        TableRow(arms.label(arm), [Cell(recipe, recipe, css_class="words")], arms.number(arm))
        for arm in names
        if (recipe := _recipe(found[arm]))
    ]
    return page.table("How every start was made", ["start", "recipe"], rows) if rows else ""


def difference_section(
    record: Mapping[str, Any], arms: Arms, detail: Detail, prefix: str = ""
) -> Section | None:
    """The reference minus every other start, within a seed."""
    found: Mapping[str, Mapping[str, Estimate]] = record.get("differences") or {}
    if not found:
        return None
    reference = arms.label(record["reference"])
    columns = [c for c in SHOWN if all(c in parts for parts in found.values())]
    names = sorted(found, key=lambda arm: -_mean(found[arm].get("accuracy")))
    rows = [_dots(arm, [found[arm][c] for c in columns], arms, detail) for arm in names]
    chart = dots_both(rows, [HEADS[c] for c in columns], f"{reference} minus every other start",
                  zero=True)  # fmt: skip
    values = [[arm, c, *numbers_of(found[arm][c])] for arm in names for c in columns]
    table = [
        TableRow(arms.label(arm), [_cell(found[arm][c], signed=True) for c in columns],
                 arms.number(arm))
        for arm in names
    ]  # fmt: skip
    note = (
        f"{reference} minus the other start on the same questions and photos. Right of the line "
        f"{reference} is ahead; a whisker that crosses it: not separated. About one in twenty "
        "such intervals leaves out 0 by chance."
    )
    return Section(
        f"{prefix}start-differences", f"{reference} against the others before training",
        page.figure(f"{prefix}start-differences", f"{reference} minus every other start", chart,
                    ["other", "part", "mean", "low", "high"], values, note=note)
        + page.table(f"{reference} minus the other start: difference and 95 % interval",
                     ["other start", *(HEADS[c] for c in columns)], table),
    )  # fmt: skip


def ablation_sections(
    record: Mapping[str, Any], arms: Arms, detail: Detail, prefix: str = ""
) -> list[Section]:
    """One small chart an axis: its points, the reference's accuracy as the line to compare with.

    Args:
        record: content of an ablation's json file.
        arms: of the page, of which an ablation's points are none.
        detail: how much data goes in.
        prefix: of section and figure names.
    """
    reference = record["reference"]
    parts = record["arms"][reference]["parts"]
    columns = [c for c in ("passage", "accuracy") if c in parts]
    charts, values, table = [], [], []
    highest = [
        value for axis in record["axes"] for point in axis["points"] for c in columns
        if (value := (point["parts"][c].get("high") or point["parts"][c]["mean"])) is not None
    ]  # fmt: skip
    limits = (0.0, min(1.0, max([0.1, *highest]) * 1.05))
    for axis in record["axes"]:
        rows = []
        for point in axis["points"]:
            is_reference = point.get("is_reference", point["arm"] == reference)
            label = f"{point['value']}{' ◂' if is_reference else ''}"
            rows.append(_dots_plain(REFERENCE_POINT if is_reference else POINT, label,
                                    [point["parts"].get(c) for c in columns], detail))  # fmt: skip
            values += [
                [axis["name"], str(point["value"]), c, *numbers_of(point["parts"].get(c))]
                for c in columns
            ]
            difference = (record.get("differences") or {}).get(point["arm"]) or {}
            table.append(TableRow(
                axis["name"],
                [Cell(str(point["value"]), str(point["value"])),
                 *(_cell(point["parts"].get(c)) for c in columns),
                 _cell(difference.get("accuracy"), signed=True)],
            ))  # fmt: skip
        chart = dot_chart(
            rows, [HEADS[c] for c in columns], title=f"Ablation of {axis['name']}",
            description=str(axis["setting"]), x_range=limits, panels_a_line=len(columns), width=460,
        )  # fmt: skip
        name, setting = page.escape(str(axis["name"])), page.escape(str(axis["setting"]))
        charts.append(
            f'<div class="small-chart plain" data-head="{name}"><h4>{name}</h4>'
            f"<small><code>{setting}</code></small>{chart}</div>"
        )
    note = (
        f"One setting changed at a time; ◂ marks the reference, {arms.label(reference)} "
        f"({record.get('recipe', '')}), over {len(record['seeds'])} seeds, before any training."
    )
    heads = ["axis", "value", *(HEADS[c] for c in columns), "reference minus this"]
    return [
        Section(
            f"{prefix}ablation", "Ablations",
            paragraph(note)
            + page.figure(f"{prefix}ablation", "One setting at a time",
                          f'<div class="grid-2">{"".join(charts)}</div>',
                          ["axis", "value", "part", "mean", "low", "high"], values)
            + page.table("Ablations: every point", heads, table),
        )
    ]  # fmt: skip


def transfer_sections(
    record: Mapping[str, Any], arms: Arms, detail: Detail, prefix: str = ""
) -> list[Section]:
    """Accuracy in every world, from before training to after it.

    Args:
        record: content of a transfer study's json file.
        arms: of the page.
        detail: how much data goes in.
        prefix: of section and figure names.
    """
    worlds, found = list(record["worlds"]), record["arms"]
    rows, values, table = [], [], []
    for arm, by_world in found.items():
        before = [_estimate(by_world[w].get("before", {}).get("accuracy"), detail) for w in worlds]
        after = [_estimate(by_world[w].get("after", {}).get("accuracy"), detail) for w in worlds]
        ends = [end or start for end, start in zip(after, before, strict=True)]
        starts = [start if end else None for end, start in zip(after, before, strict=True)]
        rows.append(Row(arms.number(arm), arms.label(arm), ends, starts))
        for world in worlds:
            for stage, name in STAGES.items():
                for column, estimate in by_world[world].get(stage, {}).items():
                    values.append([arm, world, stage, column, *numbers_of(estimate)])
                if stage in by_world[world]:
                    table.append(TableRow(
                        arms.label(arm),
                        [Cell(world, world), Cell(name, name),
                         *(_cell(by_world[world][stage].get(c), signed=stage == "gain")
                           for c in SHOWN)],
                        arms.number(arm),
                    ))  # fmt: skip
    note = (
        "Hollow: before training; filled: after training in the first world. Every world has its "
        "own questions; whiskers: 95 % interval over seeds."
    )
    return [
        Section(
            f"{prefix}transfer", "Transfer to other worlds",
            paragraph(f"{record.get('training', 'Trained')} in {worlds[0]}, measured in all.")
            + page.figure(f"{prefix}transfer", "Accuracy in every world",
                          dots_both(rows, worlds, "Accuracy in every world"),
                          ["arm", "world", "stage", "part", "mean", "low", "high"], values,
                          note=note)
            + page.table("Every start in every world",
                         ["start", "world", "stage", *(HEADS[c] for c in SHOWN)], table),
        )
    ]  # fmt: skip


def _dots(arm: str, estimates: Sequence[Estimate | None], arms: Arms, detail: Detail) -> Row:
    return _dots_plain(arms.number(arm), arms.label(arm), estimates, detail)


def _dots_plain(
    number: int, label: str, estimates: Sequence[Estimate | None], detail: Detail
) -> Row:
    return Row(number, label, [_estimate(estimate, detail) for estimate in estimates])


def _estimate(estimate: Estimate | None, detail: Detail) -> Estimate | None:
    if estimate is None or estimate.get("mean") is None:
        return None
    has_seeds = detail.seeds and len(estimate.get("per_seed") or ()) > 1
    return {**estimate, "per_seed": estimate["per_seed"] if has_seeds else []}


def _cell(estimate: Estimate | None, *, signed: bool = False) -> Cell:
    if estimate is None:
        return Cell("–")
    return estimate_cell(
        estimate["mean"], (estimate.get("low"), estimate.get("high")), signed=signed
    )


def _mean(estimate: Estimate | None) -> float:
    return -1.0 if estimate is None or estimate["mean"] is None else float(estimate["mean"])


def _recipe(arm: Mapping[str, Any]) -> str:
    return str(arm.get("recipe", ""))
