"""Curves of a comparison as the page draws them: from the summary, or, for reports that were made
before it had them, from the csv beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from compare.curves import band, smooth
from compare.palette import BEHAVIOURS
from compare.series import NO_SHARES

_HEAD = {"arm", "seed", "step", "time_s", "device_s", "tokens"}


def curves_of(summary: Mapping[str, Any], csv_text: str | None) -> dict[str, dict[str, Any]]:
    """Curves by arm and metric, in the form of `summary["curves"]`; {} where there are none.

    Args:
        summary: content of the report's json file.
        csv_text: content of its csv file, read where the summary has no curves.
    """
    found: dict[str, dict[str, Any]] | None = summary.get("curves")
    if found:
        return found
    if csv_text is None:
        return {}
    settings = {"smoothing": summary.get("smoothing", 1), "bootstrap": summary.get("bootstrap")}
    return curves_from_csv(csv_text, settings["smoothing"], settings["bootstrap"] or 2000)


def curves_from_csv(text: str, smoothing: int, bootstrap: int) -> dict[str, dict[str, Any]]:
    """Smoothed means and intervals over seeds at every evaluation.

    Args:
        text: a report's csv: one line an arm, seed and evaluation.
        smoothing: window in evaluations.
        bootstrap: resamples of the intervals.
    """
    seeds: dict[str, dict[str, list[dict[str, str]]]] = {}
    for line in csv.DictReader(io.StringIO(text)):
        seeds.setdefault(line["arm"], {}).setdefault(line["seed"], []).append(line)
    return {
        arm: _arm_curves(list(members.values()), smoothing, bootstrap)
        for arm, members in seeds.items()
    }


def _arm_curves(
    members: Sequence[Sequence[Mapping[str, str]]], smoothing: int, bootstrap: int
) -> dict[str, Any]:
    lines = [line for member in members for line in member]
    metrics = [m for m in lines[0] if m not in _HEAD and all(line[m] != "" for line in lines)]
    values = {m: [[float(line[m]) for line in member] for member in members] for m in metrics}
    values |= behaviour_of(values)
    x = {
        name: _mean_column(members, column)
        for name, column in (("steps", "step"), ("tokens", "tokens"), ("device_s", "device_s"))
    }
    curves = {}
    for metric, per_seed in values.items():
        bounds = (0.0, float("inf")) if metric in NO_SHARES else (0.0, 1.0)
        smoothed = [smooth(curve, smoothing) for curve in per_seed]
        mean, low, high = band(smoothed, bootstrap=bootstrap, bounds=bounds)
        curves[metric] = {**x, "mean": mean, "low": low, "high": high, "per_seed": per_seed}
    return curves


def behaviour_of(values: Mapping[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Shares of episodes by the kinds of their searches, from the three rates that overlap.

    With t, i and s the shares that searched by text, by image and at all, both kinds were used in
    t + i - s, text alone in s - i, images alone in s - t.
    """
    names = ("searched", "search_rate_text", "search_rate_image")
    if not all(name in values for name in names) or "behaviour/none" in values:
        return {}
    found: dict[str, list[list[float]]] = {f"behaviour/{way}": [] for way in BEHAVIOURS}
    for any_search, by_text, by_image in zip(*(values[name] for name in names), strict=True):
        triples = list(zip(any_search, by_text, by_image, strict=True))
        found["behaviour/none"].append([_share(1 - s) for s, _, _ in triples])
        found["behaviour/text_only"].append([_share(s - i) for s, _, i in triples])
        found["behaviour/image_only"].append([_share(s - t) for s, t, _ in triples])
        found["behaviour/both"].append([_share(t + i - s) for s, t, i in triples])
    return found


def _share(value: float) -> float:
    # rounding leaves 1e-17 where nothing is
    return 0.0 if value < 1e-9 else value


def _mean_column(members: Sequence[Sequence[Mapping[str, str]]], column: str) -> list[float | None]:
    means: list[float | None] = []
    for lines in zip(*members, strict=True):
        texts = [line.get(column) or "" for line in lines]
        known = all(texts)
        means.append(sum(map(float, texts)) / len(texts) if known else None)
    return means
