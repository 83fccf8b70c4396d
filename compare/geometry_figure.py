"""The picture of `obm diagnose`: heat maps of layer by module, bars of what averaging leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from compare.drawing import save_figure, start_drawing

MAX_PAIRS = 3
"""Pairs of models that get maps; the tables have all."""
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"


def draw_geometry(record: Mapping[str, Any], paths: Sequence[Path], caption: str) -> None:
    """Draw the picture and write it to every path; the suffix says the format.

    Args:
        record: What `merge.diagnosis.diagnose` returned.
        paths: for example `geometry.png` and `geometry.svg`.
        caption: printed under the panels.
    """
    plt = start_drawing(8)
    names = list(record["models"])
    maps = _maps(names)
    columns = min(4, len(maps) + 1)
    rows = -(-(len(maps) + 1) // columns)
    layers = _layers(record)
    height = max(2.6, 1.2 + 0.16 * len(layers))
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.4 * columns, height * rows + 0.5), squeeze=False
    )
    panels = list(grid.reshape(-1))
    for panel, (title, key, name, limits, colours) in zip(panels, maps, strict=False):
        _draw_map(figure, panel, record, layers, (title, key, name), limits, colours)
    _draw_bars(panels[len(maps)], record, names)
    for panel in panels[len(maps) + 1 :]:
        panel.axis("off")
    figure.text(0.01, 0.01, caption, fontsize=6, color="#444444", va="bottom")
    figure.tight_layout(rect=(0, 0.3 / (height * rows), 1, 1))
    save_figure(figure, paths)


def _maps(names: Sequence[str]) -> list[tuple[Any, ...]]:
    """(title, key, model or pair, limits of the colours, colour map) of each heat map."""
    maps: list[tuple[Any, ...]] = []
    for name in names:
        maps.append((f"{name}: share of entries\nwith 90 % of the energy", "effective", name,
                     (0, 0.6), "viridis"))  # fmt: skip
    for name in names:
        maps.append((f"{name}: energy in the principal\nsubspace, over chance", "principal", name,
                     (0, None), "magma"))  # fmt: skip
    for a, b in list(combinations(names, 2))[:MAX_PAIRS]:
        maps.append((f"{a} and {b}:\ncosine", "cosine", f"{a}/{b}", (-1, 1), "RdBu"))
        maps.append((f"{a} and {b}: sign conflicts\nin the common support", "conflict",
                     f"{a}/{b}", (0, 0.5), "cividis"))  # fmt: skip
    return maps


def _layers(record: Mapping[str, Any]) -> list[int]:
    found = {row["layer"] for row in record["tensors"] if row["group"] == "linear"}
    return sorted(layer for layer in found if layer is not None)


def _draw_map(
    figure: Any,
    panel: Any,
    record: Mapping[str, Any],
    layers: Sequence[int],
    what: tuple[str, str, str],
    limits: tuple[float, float | None],
    colours: str,
) -> None:
    title, key, name = what
    rows = [row for row in record["tensors"] if row["group"] == "linear"]
    modules = list(dict.fromkeys(row["module"] for row in rows))
    values = np.full((max(len(layers), 1), max(len(modules), 1)), np.nan)
    for row in rows:
        own = {**row["models"], **row["pairs"]}[name]
        value = own.get(key)
        if key == "principal" and value is not None:
            value = value / own["principal_chance"]
        if value is not None:
            values[layers.index(row["layer"]), modules.index(row["module"])] = value
    image = panel.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    figure.colorbar(image, ax=panel, fraction=0.05, pad=0.03)
    short = [module.rpartition(".")[2].removesuffix("_proj") for module in modules]
    panel.set_xticks(range(len(modules)), short, rotation=60)
    step = max(1, len(layers) // 14)
    panel.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    panel.set_ylabel("layer")
    panel.set_title(title, fontsize=8)


def _draw_bars(panel: Any, record: Mapping[str, Any], names: Sequence[str]) -> None:
    """What the average leaves of every update, and how much of the model each moved."""
    group = record["groups"].get("linear", record["total"])
    figures = [group["models"][name] for name in names]
    places = np.arange(len(names))
    left = [own.get("left_by_average", 0.0) for own in figures]
    panel.bar(places - 0.2, left, 0.38, color=BLUE, label="left by average")
    support = [own["support"] for own in figures]
    panel.bar(places + 0.2, support, 0.38, color=ORANGE, label="support")
    panel.axhline(1 / len(names), color=GREY, linewidth=0.8, linestyle="--", label="1 / K")
    panel.set_xticks(places, names)
    panel.set_xlim(-0.6, len(names) - 0.4)
    panel.set_ylim(0, 1.35 * max(1.0, *left))
    panel.set_title("The sparsity curse: what averaging\nleaves along each update", fontsize=8)
    panel.legend(frameon=False, fontsize=7, loc="upper center", ncols=3, columnspacing=1.0)
