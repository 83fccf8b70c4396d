"""The merge's own picture, from merge.json: layers and modules, what was kept, who won.

    python -m launch.cli compare runs/* --with runs/merged/obm/merge.json

A tensor's place is read from its name: the layer's number and the module (`q_proj`, `down_proj`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compare import page
from compare.charts_rows import heat_map
from compare.page import Cell, Section, TableRow, facts, paragraph
from compare.palette import N_SHADES

MODULES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate",
    "up_proj": "up", "down_proj": "down", "qkv_proj": "qkv", "gate_up_proj": "gate+up",
}  # fmt: skip
"""Last part of a linear's name -> its row in the maps; other linears keep their own name."""
_PLACE = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\..*?([^.]+)\.weight$")
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Map:
    """One heat map: a number of every merged linear.

    Attributes:
        key: of its figure.
        title: heading, with {task} where it is of one task.
        note: how to read it.
        unit: what a number is.
        of: the number from a tensor's figures and a task, None where there is none.
        is_share: whether the scale runs from 0 to 1.
        per_task: one map a task.
        more: further maps beside those of the tasks.
    """

    key: str
    title: str
    note: str
    unit: str
    of: Callable[[Figures, str], float | None]
    is_share: bool = False
    per_task: bool = True
    more: Sequence[str] = ()


MAPS = (
    Map("saliency", "Saliency an entry", "Cost of dropping what the task changed, summed over a "
        "tensor and divided by its entries; log10.", "log10",
        lambda f, t: _log(f.get("saliency", {}).get(t), f["entries"])),
    Map("saliency-kept", "Saliency kept", "Share of the task's saliency that the kept entries "
        "hold.", "of the saliency", lambda f, t: f.get("saliency_kept", {}).get(t), True),
    Map("density", "Realised density", "Share of entries that are kept of the task vector.",
        "of the entries", lambda f, t: f["density"].get(t), True),
    Map("won", "Conflicts won", "Share of the conflicts that the task’s sign wins.",
        "of the conflicts",
        lambda f, t: f["conflicts_won"].get(t) if f["conflicts"] else None, True),
    Map("norms", "Norms", "Root mean square of an entry of what a task changed, and of what the "
        "merge adds to the base; log10.", "log10",
        lambda f, t: _log(f["delta_norm"].get(t, f["update_norm"]), math.sqrt(f["entries"])),
        more=("update",)),
    Map("conflicts", "Conflicts", "Share of entries where kept changes have opposite signs.",
        "of the entries", lambda f, t: f["conflicts"] / max(1, f["entries"]), False, False),
)  # fmt: skip


def merge_sections(record: Figures, name: str, prefix: str = "") -> list[Section]:
    """The maps of one merge, its totals and its recipe.

    Args:
        record: content of merge.json.
        name: what the merge is called on the page.
        prefix: of section and figure names.
    """
    tasks = [role for role in record["parents"] if role != "base"]
    places = linears(record["tensors"])
    title = f"The merge: {name}" if name else "The merge"
    body = paragraph(
        f"What {record['method']} did to every linear layer: {len(places)} of "
        f"{record['totals'].get('tensors_merged', 0)} merged tensors, "
        f"{record['totals'].get('tensors_copied', 0)} copied. Columns are layers."
    )
    if not any("saliency" in figures for figures in places.values()):
        body += paragraph(
            "No saliency is shown: merge.json has none, since the method does not weigh entries by "
            "what dropping them costs, or the file is of an earlier version.", "notice",
        )  # fmt: skip
    maps = "".join(_map_figure(m, places, tasks, prefix) for m in MAPS) if places else ""
    if not places:
        body += paragraph("No linear layer was merged entry by entry.", "notice")
    body += f'<div class="grid-2 loose">{maps}</div>' if maps else ""
    body += _groups_table(record, tasks) + _recipe(record)
    return [Section(f"{prefix}merge", title, body)]


def linears(tensors: Mapping[str, Figures]) -> dict[tuple[int, str], Figures]:
    """Merged linears with figures, by layer and module."""
    found: dict[tuple[int, str], Figures] = {}
    for name, figures in tensors.items():
        place = _PLACE.search(name)
        if place is not None and figures.get("entries") and figures.get("group") == "linear":
            found[int(place[1]), MODULES.get(place[2], place[2])] = figures
    return found


def _map_figure(
    made: Map, places: Mapping[tuple[int, str], Figures], tasks: Sequence[str], prefix: str
) -> str:
    layers = sorted({layer for layer, _ in places})
    order = list(MODULES.values())
    modules = sorted(
        {module for _, module in places},
        key=lambda m: (order.index(m) if m in order else len(order), m),
    )
    shown = [*tasks, *made.more] if made.per_task else [""]
    grids = {
        task: [[_value(made, places.get((layer, m)), task) for layer in layers] for m in modules]
        for task in shown
    }
    known = [v for grid in grids.values() for line in grid for v in line if v is not None]
    if not known:
        return ""
    limits = (0.0, 1.0) if made.is_share else (min(known), max(known))
    if not made.is_share and made.key == "conflicts":
        limits = (0.0, max(known) or 1.0)
    charts = "".join(
        f'<div class="small-chart" data-head="{page.escape(task)}">'
        f"{f'<h4>{page.escape(task)}</h4>' if task else ''}"
        + heat_map(
            grid, modules, [str(layer) for layer in layers], title=f"{made.title} {task}".strip(),
            description=made.note, unit=made.unit, limits=limits,
            form=".3f" if made.key == "conflicts" else ".2f",
        )
        + "</div>"
        for task, grid in grids.items()
    )  # fmt: skip
    rows = [
        [task or "all", layer, module, grid[i][j]]
        for task, grid in grids.items()
        for i, module in enumerate(modules)
        for j, layer in enumerate(layers)
        if grid[i][j] is not None
    ]
    scale = "".join(f'<i class="h{i}"></i>' for i in range(N_SHADES))
    low, high = (page.minus(f"{limit:.3g}") for limit in limits)
    return page.figure(
        f"{prefix}merge-{made.key}", made.title,
        f'<div class="maps">{charts}</div><div class="scale">{low}<span>{scale}</span>{high}</div>',
        ["task", "layer", "module", made.key.replace("-", "_")], rows, note=made.note,
    )  # fmt: skip


def _value(made: Map, figures: Figures | None, task: str) -> float | None:
    return None if figures is None else made.of(figures, task)


def _log(total: float | None, by: float) -> float | None:
    """log10 of a total an entry; None for zero, of which there is no logarithm."""
    return math.log10(total / by) if total else None


def _groups_table(record: Figures, tasks: Sequence[str]) -> str:
    rows = []
    for group, figures in [*record["groups"].items(), ("all merged", record["totals"])]:
        if not figures.get("entries"):
            continue
        for task in tasks:
            kept = (figures.get("saliency_kept") or {}).get(task)
            rows.append(TableRow(group.replace("_", " "), [
                Cell(task, task),
                Cell(f"{figures['entries']:,}", figures["entries"]),
                _share(figures["density"].get(task)),
                _share(figures["conflicts"] / figures["entries"]),
                _share(figures["conflicts_won"].get(task)),
                _share(kept),
                Cell(f"{figures['delta_norm'][task]:.4g}", figures["delta_norm"][task]),
                Cell(f"{figures['update_norm']:.4g}", figures["update_norm"]),
            ]))  # fmt: skip
    heads = ["tensors", "task", "entries", "density", "conflicts", "conflicts won",
             "saliency kept", "norm of the task vector", "norm of the update"]  # fmt: skip
    return page.table("The merge by groups of tensors", heads, rows)


def _share(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:.3f}", value)


def _model_name(source: str) -> str:
    """A hub id as it is; of a path the last part."""
    return (
        source
        if source.count("/") == 1 and not source.startswith(("/", "."))
        else (source.rstrip("/").rpartition("/")[2])
    )


def _recipe(record: Figures) -> str:
    settings = record["settings"]
    parents = ", ".join(
        f"{role}: {_model_name(parent['source'])}" for role, parent in record["parents"].items()
    )
    statistics = ", ".join(f"{key}: {s.get('tokens', '?')} tokens"
                           for key, s in record["stats"].items())  # fmt: skip
    pairs = [
        ("method", record["method"]),
        ("weights", ", ".join(f"{k} {v:g}" for k, v in settings.get("weights", {}).items())),
        ("density", str(settings.get("density", "–"))),
        ("scope", ", ".join(f"{k}: {v}" for k, v in settings.get("scope", {}).items())),
        ("statistics", statistics or "none"),
        ("parents", parents),
    ]
    return facts((term, page.escape(text)) for term, text in pairs)
