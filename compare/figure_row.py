"""The second row of the picture: accuracy over device time, training reward, differences.

Everything is drawn from the summary's curves and pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNITS = ((3600.0, "device hours"), (60.0, "device minutes"), (1.0, "device seconds"))
"""The axis takes the first whose whole is reached at least twice."""
DIFFERENCES = (("floor", "floor"), ("ceiling", "ceiling"), ("auc", "area"))


def draw_device_time(axes: Any, summary: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Held-out accuracy over device time, calibration and merge included."""
    curves = {
        arm: curve
        for arm, own in summary["curves"].items()
        if (curve := own.get("accuracy")) and curve["device_s"] and len(curve["steps"]) > 1
    }
    longest = max((curve["device_s"][-1] for curve in curves.values()), default=0.0)
    unit, label = next((one for one in UNITS if longest >= 2 * one[0]), UNITS[-1])
    for arm, curve in curves.items():
        _draw(axes, [seconds / unit for seconds in curve["device_s"]], curve, colours[arm])
    if summary["equal_budget"]:
        axes.axvline(
            summary["equal_budget"]["device_s"] / unit, color="#555555", linewidth=0.8,
            linestyle=":",
        )  # fmt: skip
    axes.set_title("Held-out accuracy over device time")
    axes.set_xlabel(f"{label}, calibration and merge included")
    axes.set_ylabel("answers right")
    axes.set_xlim(left=0)
    if not curves:
        _say(axes, "cost of the starts not recorded")
    finish(axes)


def draw_reward(axes: Any, summary: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Mean training reward over steps, smoothed."""
    for arm, own in summary["curves"].items():
        if curve := own.get("reward"):
            _draw(axes, curve["steps"], curve, colours[arm])
    axes.set_title("Training reward")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("mean reward")
    finish(axes)


def draw_differences(axes: Any, summary: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Each arm minus the reference in floor, ceiling and area, with intervals."""
    reference = summary["reference"]
    pairs = {
        (pair["metric"], pair["arm"]): pair
        for pair in summary["pairs"]
        if pair["other"] == reference
    }
    arms = [arm for arm in summary["arms"] if arm != reference]
    height = 0.8 / max(1, len(arms))
    for row, (metric, _) in enumerate(DIFFERENCES):
        for index, arm in enumerate(arms):
            pair = pairs.get((metric, arm))
            if pair is None:
                continue
            position = row + (index - (len(arms) - 1) / 2) * height
            axes.plot(pair["mean"], position, "o", color=colours[arm], markersize=4)
            if pair["low"] is not None:
                axes.hlines(position, pair["low"], pair["high"], color=colours[arm], linewidth=1.2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(DIFFERENCES)), [label for _, label in DIFFERENCES])
    axes.set_ylim(len(DIFFERENCES) - 0.5, -0.5)
    axes.set_title(f"Difference to {reference}")
    axes.set_xlabel("accuracy, mean over seeds and 95 % interval")
    if not pairs:
        _say(axes, "one arm only")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def finish(axes: Any) -> None:
    """The look that all panels with a share on the y axis have."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_ylim()[0] > -0.02:
        axes.set_ylim(bottom=0)


def _draw(axes: Any, x: list[float], curve: Mapping[str, Any], colour: str) -> None:
    axes.plot(x, curve["mean"], color=colour, linewidth=1.8)
    if len(curve["per_seed"]) > 1:
        axes.fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)


def _say(axes: Any, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="#555555")
