"""Sections on how episodes search and end, and on the questions where a start helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from compare import page
from compare.charts import Frame, area_chart
from compare.charts_rows import Row
from compare.page import Cell, Section, paragraph
from compare.page_parts import Comparison, dots_both, numbers_of, table_row
from compare.palette import BEHAVIOURS
from compare.verdict import ABOVE, BELOW, OPEN, listed, side_of

WAYS = {
    "none": "no search",
    "text_only": "text only",
    "image_only": "image only",
    "both": "both",
}
SMALL = Frame(width=310, height=190, left=38, right=12, top=10, bottom=40)


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
        rows.append(table_row(data, arm, cells))
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
            values.append([arm, group, *numbers_of(start), *numbers_of(end)])
        rows.append(Row(data.arms.number(arm), data.arms.label(arm), ends, starts))
        table.append(table_row(data, arm, cells))
    chart = dots_both(
        rows, [_group_name(g) for g in groups], "Accuracy by group",
        "From the floor (hollow) to the ceiling (filled)",
    )  # fmt: skip
    name = data.arms.label(data.reference)
    sentences = group_sentences(data, groups)
    columns = ["arm", "group", "floor", "floor_low", "floor_high",
               "ceiling", "ceiling_low", "ceiling_high"]  # fmt: skip
    return Section(
        f"{data.prefix}groups", f"Where {name} helps, and where not",
        (paragraph(" ".join(sentences)) if sentences else "")
        + page.figure(f"{data.prefix}by-group", "Accuracy by group of questions", chart, columns,
                      values, note="Hollow: before training; filled: at the ceiling of accuracy. "
                      "seen and unseen: whether the VLM knew the pictured entity before.")
        + page.table("Accuracy by group: floor → ceiling",
                     ["start", *(_group_name(g) for g in groups)], table),
    )  # fmt: skip


def group_sentences(data: Comparison, groups: Sequence[str]) -> list[str]:
    """In which groups the reference lies above, below, or apart from nobody; of one seed, none."""
    others = [arm for arm in data.results if arm != data.reference]
    own = data.results[data.reference]["by_group"]
    leads, trails = [], []
    level: list[str] = []
    partly_level: list[str] = []
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
        elif OPEN in sides.values():
            is_whole = all(sides.get(arm) == OPEN for arm in others)
            (level if is_whole else partly_level).append(_group_name(group))
    name = data.arms.label(data.reference)
    sentences = []
    if leads:
        sentences.append(f"{name} leads in {'; '.join(leads)}.")
    if trails:
        sentences.append(f"{name} trails in {'; '.join(trails)}.")
    if level:
        sentences.append(f"Its interval overlaps with all others in {', '.join(level)}.")
    if partly_level:
        where = ", ".join(partly_level)
        sentences.append(f"Its interval overlaps with all that can be judged in {where}.")
    return sentences


def _group_name(group: str) -> str:
    return group.replace("kind/", "kind: ")


def _group_cell(found: Mapping[str, Any]) -> Cell:
    floor, end = found.get("floor"), found.get("ceiling")
    if floor is None:
        return Cell("–")
    return Cell(f"{floor:.2f}", floor) if end is None else Cell(f"{floor:.2f} → {end:.2f}", end)
