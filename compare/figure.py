"""The picture of a comparison: floor in four parts, accuracy and search rates over steps.

A second row has accuracy over device time, the training reward, and the differences to the
reference (`compare.figure_row`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare.curves import band, smooth
from compare.drawing import save_figure, start_drawing
from compare.figure_row import draw_device_time, draw_differences, draw_reward, finish
from compare.runs import Run

# Okabe and Ito's palette, readable with any colour vision; an arm keeps its colour in every
# picture.
_ARM_COLOURS = {
    "obm": "#0072B2",
    "vlm": "#D55E00",
    "task_arithmetic": "#009E73",
    "ties": "#CC79A7",
    "dare": "#E69F00",
    "agent": "#000000",
}
_SPARE_COLOURS = ("#56B4E9", "#8C6D00", "#7F7F7F", "#A05195", "#004D40", "#B22222")
_FLOOR_PARTS = (
    ("searched", "searched"),
    ("entity", "right entity\nin the query"),
    ("passage", "gold passage\nretrieved"),
    ("accuracy", "answer\nright"),
)


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for each arm: the fixed one of a known arm, else the spare ones by name order."""
    unknown = sorted(arm for arm in arms if arm not in _ARM_COLOURS)
    spare = {arm: _SPARE_COLOURS[i % len(_SPARE_COLOURS)] for i, arm in enumerate(unknown)}
    return {arm: _ARM_COLOURS.get(arm) or spare[arm] for arm in arms}


def draw(
    arms: dict[str, list[Run]],
    summary: dict[str, Any],
    paths: Sequence[Path],
    *,
    smoothing: int,
    bootstrap: int,
    caption: str,
) -> None:
    """Draw the picture and write it to every path; the suffix says the format.

    Args:
        arms: runs by arm, each arm's runs with equal steps.
        summary: what `compare.report.summarise` returned for them.
        paths: for example `compare.png` and `compare.svg`.
        smoothing: window of the bold curves; the raw points stay faint behind.
        bootstrap: resamples of the bands.
        caption: printed under the panels: seeds, smoothing, band, hardware.
    """
    plt = start_drawing(9)
    has_second_row = any(runs[0].is_trained for runs in arms.values())
    n_rows = 2 if has_second_row else 1
    figure, axes = plt.subplots(n_rows, 3, figsize=(13.5, 4.4 * n_rows), squeeze=False)
    floor, accuracy, rates = axes[0]
    colours = arm_colours(list(arms))
    _draw_floor(floor, summary, colours)
    _draw_accuracy(accuracy, arms, summary, colours, smoothing, bootstrap)
    _draw_rates(rates, arms, colours, smoothing, bootstrap)
    if has_second_row:
        draw_device_time(axes[1][0], summary, colours)
        draw_reward(axes[1][1], summary, colours)
        draw_differences(axes[1][2], summary, colours)
    figure.text(0.01, 0.012 / n_rows, caption, fontsize=7, color="#444444", wrap=True, va="bottom")
    figure.tight_layout(rect=(0, 0.07 / n_rows, 1, 1))
    save_figure(figure, paths)


def _draw_floor(axes: Any, summary: dict[str, Any], colours: dict[str, str]) -> None:
    names = list(summary["arms"])
    width = 0.84 / max(1, len(names))
    for index, arm in enumerate(names):
        result = summary["arms"][arm]
        for part, (key, _) in enumerate(_FLOOR_PARTS):
            value = result["floor"].get(key)
            if value is None:
                continue
            position = part + (index - (len(names) - 1) / 2) * width
            label = arm if part == 0 else None
            axes.bar(position, value, width * 0.92, color=colours[arm], label=label)
            limits = result["intervals"].get(f"floor.{key}")
            if limits and limits[1] > limits[0]:
                axes.vlines(position, limits[0], limits[1], color="black", linewidth=0.8)
    axes.set_xticks(range(len(_FLOOR_PARTS)), [label for _, label in _FLOOR_PARTS])
    axes.set_title("Floor: before any training")
    axes.set_ylabel("share of held-out questions")
    axes.legend(frameon=False, fontsize=8)
    finish(axes)


def _draw_accuracy(
    axes: Any,
    arms: dict[str, list[Run]],
    summary: dict[str, Any],
    colours: dict[str, str],
    smoothing: int,
    bootstrap: int,
) -> None:
    for arm, runs in arms.items():
        _draw_curve(axes, runs, "accuracy", colours[arm], arm, smoothing, bootstrap, "-")
        if runs[0].is_trained:
            for run in runs:
                axes.plot(run.steps, run.curve("accuracy"), ".", color=colours[arm], alpha=0.25)
    target = summary["target"]["value"]
    if target is not None:
        axes.axhline(target, color="#555555", linewidth=0.8, linestyle=":")
        words = f"ceiling of {summary['target']['arm']}: {target:.2f}"
        axes.annotate(
            "steps are counted to here" if "ceiling" in summary["target"] else words,
            (1.0, target), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", fontsize=7, color="#555555",
        )  # fmt: skip
    axes.set_title("Held-out accuracy")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("answers right")
    finish(axes)


def _draw_rates(
    axes: Any, arms: dict[str, list[Run]], colours: dict[str, str], smoothing: int, bootstrap: int
) -> None:
    for arm, runs in arms.items():
        _draw_curve(axes, runs, "search_rate_text", colours[arm], arm, smoothing, bootstrap, "-")
        if all("search_rate_image" in run.metrics() for run in runs):
            _draw_curve(axes, runs, "search_rate_image", colours[arm], None, smoothing, 0, "--")
    axes.set_title("Search rates: text solid, image dashed")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("share of episodes")
    axes.set_ylim(-0.02, 1.05)
    finish(axes)


def _draw_curve(
    axes: Any,
    runs: list[Run],
    metric: str,
    colour: str,
    label: str | None,
    smoothing: int,
    bootstrap: int,
    style: str,
) -> None:
    if not all(metric in run.metrics() for run in runs):
        return
    if not runs[0].is_trained:
        if style == "-":
            axes.plot(
                [0], [runs[0].curve(metric)[0]], "D", color=colour, markersize=5, clip_on=False
            )
        return
    steps = runs[0].steps
    mean, low, high = band(
        [smooth(run.curve(metric), smoothing) for run in runs], bootstrap=bootstrap
    )
    axes.plot(steps, mean, style, color=colour, label=label, linewidth=1.8)
    if style == "-" and len(runs) > 1:
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
