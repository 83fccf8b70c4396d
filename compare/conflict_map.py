"""The conflict map as a picture and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compare.drawing import save_figure, start_drawing

PANELS = {
    "cosine": ("cosine of the gradients", "RdBu", (-1.0, 1.0)),
    "sensitivity": ("rise of the keep loss, head off", "viridis", None),
    "score": ("conflict score", "magma_r", None),
}
"""Key of a head -> title, colours, limits (None = those of the values)."""
MOST_LINES = 20
"""Heads in the table of a large model."""


def draw_map(record: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Three heat maps, layers by heads, written to every path; the suffix says the format.

    Args:
        record: content of conflict.json.
        paths: for example `conflict.svg` and `conflict.png`.
    """
    from matplotlib.ticker import MaxNLocator

    plt = start_drawing(9)
    n_layers, n_heads = record["layout"]["n_layers"], record["layout"]["n_heads"]
    figure, panels = plt.subplots(
        1, 3, figsize=(min(13.5, 9 + 0.2 * n_heads), 1.6 + max(1.4, 0.16 * n_layers)),
    )  # fmt: skip
    for axes, (key, (title, colours, limits)) in zip(panels, PANELS.items(), strict=True):
        values = np.full((n_layers, n_heads), np.nan)
        for row in record["heads"]:
            values[row["layer"], row["head"]] = row[key]
        low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
        image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axes.set_title(title)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        for places, axis in ((n_heads, axes.xaxis), (n_layers, axes.yaxis)):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axis.set_view_interval(-0.5, places - 0.5)
        if n_layers * n_heads <= 64:
            _write_numbers(axes, values, image)
        figure.colorbar(image, ax=axes, fraction=0.05)
    figure.tight_layout()
    save_figure(figure, paths)


def _write_numbers(axes: Any, values: np.ndarray, image: Any) -> None:
    for (layer, head), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            head, layer, f"{value:.2g}", ha="center", va="center", fontsize=7,
            color="white" if is_dark else "black",
        )  # fmt: skip


def map_table(record: Mapping[str, Any]) -> list[str]:
    """The heads as lines of a Markdown table, the most conflicting first."""
    rows = sorted(record["heads"], key=lambda row: row["place"])
    lines = [
        "| place | layer | head | cosine | of halves | opposition | sensitivity | score |",
        "| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows[:MOST_LINES]:
        halves = ", ".join(f"{cosine:+.2f}" for cosine in row["cosine_of_halves"])
        lines.append(
            f"| {row['place']} | {row['layer']} | {row['head']} | {row['cosine']:+.3f} | {halves} "
            f"| {row['opposition']:.3f} | {row['sensitivity']:+.4f} | {row['score']:.3f} |"
        )
    if len(rows) > MOST_LINES:
        lines.append(f"\nThe first {MOST_LINES} of {len(rows)} heads; all are in the json file.")
    return lines


def map_page(record: Mapping[str, Any], name: str) -> str:
    """`<name>.md`: the table, what it was made of, and how to make it again."""
    layout, settings = record["layout"], record["settings"]
    opposed = sum(row["opposition"] > 0 for row in record["heads"])
    return "\n".join([
        "# Conflict map of attention heads",
        "",
        f"Start: `{record['start']}` ({layout['model_type']}, {layout['n_layers']} layers of "
        f"{layout['n_heads']} query heads over {layout['n_kv_heads']} key-value heads). "
        f"{opposed} of {len(record['heads'])} heads are opposed: a step of search makes "
        "perception worse there.",
        "",
        f"![conflict map]({name}.svg)",
        "",
        *map_table(record),
        "",
        "`cosine` of the gradients of the search and the keep objective, in the whole and in the "
        "even and odd batches alone; `opposition` is its negative part; `sensitivity` is the rise "
        f"of the keep loss ({record['keep_loss']:.4f} nats a token) with the head off; `score` "
        f"joins the two by `{settings['join']}`. Formulas: docs/cast.md.",
        "",
        f"* search ({settings['search']}): {record['search']}",
        f"* keep ({', '.join(settings['keep_kinds'])}, words of {settings['keep_words']}): "
        f"{record['keep']}",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"Commit {record['commit']}. Hardware: {record['hardware']}. Seed {settings['seed']}.",
        "",
    ])  # fmt: skip
