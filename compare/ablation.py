"""An ablation: one recipe with its settings changed one at a time, as tables and small pictures.

The numbers of one seed belong together, as in `compare.floor`: every point answered the same
questions about the same photos, so points are held against the reference within a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare.drawing import save_figure, start_drawing
from compare.floor import COLUMNS, COMPARED, rows_csv, signed_cell, summarise_floor
from compare.floor import cell as estimate_cell
from compare.provenance import how_it_was_made, origin
from compare.report import interval_name
from compare.rows import markdown_table
from compare.verdict import ABOVE, BELOW, side_of_difference
from configs.sections import Environment
from train.settings import asked_words

SUFFIXES = ("json", "csv", "md", "png", "svg")
DRAWN = {"passage": "#7F7F7F", "accuracy": "#0072B2"}
"""Column -> colour in the picture."""
N_PANELS_A_ROW = 4


def summarise_ablation(
    rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Mapping[str, Any]], reference: str
) -> dict[str, Any]:
    """Means over seeds of every point, by axis, and the differences to the reference.

    Args:
        rows: one a seed and arm: arm, seed, recipe, metrics.
        axes: name -> setting (words) and points: value, arm, is_reference.
        reference: the arm that others are held against.

    Returns:
        {"reference", "seeds", "axes": [{"name", "setting", "points": [{"value", "arm",
        "is_reference", "parts": {column: estimate}}]}], "arms", "differences"}; arms, differences
        (reference minus arm) and estimates as in `compare.floor.summarise_floor`.
    """
    summary = summarise_floor(rows, reference)
    arms = summary["arms"]
    listed = [
        {
            "name": name,
            "setting": axis["setting"],
            "points": [{**point, "parts": arms[point["arm"]]["parts"]} for point in axis["points"]],
        }
        for name, axis in axes.items()
    ]
    head = {key: summary[key] for key in ("reference", "seeds")}
    return {**head, "axes": listed, "arms": arms, "differences": summary["differences"]}


def write_ablation(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    name: str,
    title: str,
    command: str,
    environment: Environment,
    recipe: str,
) -> dict[str, Any]:
    """Write `<name>.json .csv .md .png .svg`.

    Args:
        summary: of `summarise_ablation`.
        rows: what it was made from.
        folder: made where missing.
        name: of the files.
        title: heading.
        command: the command line that makes this.
        environment: what was asked; the seed's own part is not read.
        recipe: the reference in words.

    Returns:
        The content of the json file.
    """
    from train.files import write_json, write_text

    asked = {key: value for key, value in asdict(environment).items() if key != "data_seed"}
    record = {
        **origin(command),
        "environment": asked,
        "recipe": recipe,
        **summary,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", record)
    write_text(folder / f"{name}.csv", rows_csv(rows))
    write_text(folder / f"{name}.md", _markdown(record, title, name))
    draw_axes(record, [folder / f"{name}.{suffix}" for suffix in ("png", "svg")])
    return record


def draw_axes(record: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """One panel an axis: mean and interval of each point, the reference ringed and as a line.

    Args:
        record: of `write_ablation`.
        paths: for example `ablation.png`; the suffix says the format.
    """
    plt = start_drawing(8)
    axes = record["axes"]
    n_columns = min(N_PANELS_A_ROW, len(axes))
    n_rows = -(-len(axes) // n_columns)
    figure, panels = plt.subplots(
        n_rows, n_columns, figsize=(3.3 * n_columns, 2.6 * n_rows), sharey=True, squeeze=False
    )
    flat = list(panels.flat)
    for panel, axis in zip(flat, axes, strict=False):
        _draw_axis(panel, axis, record["arms"][record["reference"]]["parts"])
    for panel in flat[len(axes) :]:
        panel.axis("off")
    flat[0].legend(frameon=False, fontsize=7, loc="best")
    figure.text(0.01, 0.008, _caption(record), fontsize=7, color="#444444", va="bottom")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save_figure(figure, paths)


def _draw_axis(panel: Any, axis: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    points = axis["points"]
    places = range(len(points))
    is_ordered = all(isinstance(point["value"], int | float) for point in points)
    for column, colour in DRAWN.items():
        panel.axhline(reference[column]["mean"], color=colour, linewidth=0.6, linestyle=":")
        means = [point["parts"][column]["mean"] for point in points]
        panel.plot(places, means, "o-" if is_ordered else "o", color=colour, markersize=3.5,
                   linewidth=1.0, label=column)  # fmt: skip
        for place, point in zip(places, points, strict=True):
            estimate = point["parts"][column]
            if estimate["low"] is not None:
                panel.vlines(place, estimate["low"], estimate["high"], color=colour, linewidth=0.8)
            if point["is_reference"]:
                panel.plot(place, estimate["mean"], "o", color=colour, markersize=8,
                           markerfacecolor="none")  # fmt: skip
    labels = [str(point["value"]).replace("_", "\n") for point in points]
    panel.set_xticks(list(places), labels, rotation=0 if is_ordered else 30, fontsize=6.5)
    panel.set_title(axis["name"])
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _caption(record: Mapping[str, Any]) -> str:
    asked = asked_words(record["environment"], " a seed", has_kinds=False)
    return (
        f"{asked}, greedy, before training. "
        f"Ring and dotted line: the reference. Whiskers: {interval_name(len(record['seeds']))}."
    )


def _markdown(record: Mapping[str, Any], title: str, name: str) -> str:
    reference = record["reference"]
    lines = [
        f"# {title}",
        "",
        f"![one panel a setting]({name}.png)",
        "",
        f"`{reference}` ({record['recipe']}) with one setting changed at a time, before any "
        f"training: {asked_words(record['environment'], ' a seed')}, greedy; mean over "
        f"{len(record['seeds'])} seeds [95 % interval]. The reference was tuned on dev; its "
        "neighbours are shown on other questions as evidence, and nothing is chosen by them.",
        "",
    ]
    for axis in record["axes"]:
        lines += [*_axis_lines(axis, record), ""]
    n = len(record["differences"])
    return "\n".join([
        *lines,
        "`searched` any search; `entity` the right entity in a text query; `passage` a gold "
        "passage retrieved; `accuracy` the answer right; `recognition` names a seen place when "
        "asked which place it is, as the VLM was asked, without tools. The last two columns are "
        f"`{reference}` minus the row, within a seed; bold: the interval does not hold 0.",
        "",
        "## What this separates, and what it does not",
        "",
        *(_reading(axis, record) for axis in record["axes"]),
        f"* Of {2 * n} such intervals about one in twenty leaves out 0 by chance; nothing is "
        f"corrected for that. With {len(record['seeds'])} seeds the intervals are wide: not "
        "separated does not mean equal.",
        "* One setting at a time around one recipe says nothing of how settings work together.",
        "",
        *how_it_was_made(
            record,
            f"seeds: {', '.join(map(str, record['seeds']))} (calibration sample, questions, "
            f"photos); interval: {interval_name(len(record['seeds']))}",
            f"every evaluation: [{name}.csv]({name}.csv); numbers: [{name}.json]({name}.json)",
        ),
        "",
    ])  # fmt: skip


def _axis_lines(axis: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    reference, differences = record["reference"], record["differences"]
    columns = [c for c in COLUMNS if all(c in point["parts"] for point in axis["points"])]
    shown = [c for c in columns if c in (*COMPARED, "recognition")]
    body = []
    for point in axis["points"]:
        cells = [estimate_cell(point["parts"][column]) for column in shown]
        against = ["", ""]
        if not point["is_reference"]:
            parts = differences[point["arm"]]
            against = [signed_cell(parts[column]) for column in ("passage", "accuracy")]
        value = f"{point['value']} (reference)" if point["is_reference"] else str(point["value"])
        body.append([value, *cells, *against])
    heads = [axis["name"], *shown, f"{reference} minus: passage", "accuracy"]
    return [f"## {axis['name']}", "", f"`{axis['setting']}`", "", *markdown_table([heads, *body])]


def _reading(axis: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """One sentence an axis: which values lie below the reference, which above, by accuracy."""
    sides: dict[str, list[str]] = {"below": [], "above": [], "not separated": []}
    for point in axis["points"]:
        if not point["is_reference"]:
            side = side_of_difference(record["differences"][point["arm"]]["accuracy"])
            # a reference that lies above has the point below it
            key = {ABOVE: "below", BELOW: "above"}.get(side, "not separated")
            sides[key].append(str(point["value"]))
    words = [f"{side}: {', '.join(values)}" for side, values in sides.items() if values]
    return f"* {axis['name']}, accuracy against the reference: {'; '.join(words)}."
