"""What the sections of a comparison's page share: their data, a row, dots in two layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compare import page
from compare.charts_rows import Row, dot_chart, range_of
from compare.page import Arms, Cell, Detail, TableRow, estimate_cell

LIMITS = ("mean", "low", "high")


@dataclass(frozen=True)
class Comparison:
    """What the sections are made from.

    Attributes:
        summary: content of the report's json file.
        curves: of `page_data.curves_of`.
        arms: of the page.
        detail: how much data goes in.
        reference: the arm that others are held against.
        prefix: of section and figure names, for a second comparison on one page.
    """

    summary: Mapping[str, Any]
    curves: Mapping[str, Mapping[str, Any]]
    arms: Arms
    detail: Detail
    reference: str
    prefix: str = ""

    @property
    def results(self) -> Mapping[str, Any]:
        """The arms of this comparison, in the order of the page."""
        found = self.summary["arms"]
        return {arm: found[arm] for arm in self.arms.names if arm in found}

    @property
    def trained(self) -> list[str]:
        """Arms that were trained."""
        return [arm for arm, result in self.results.items() if result.get("is_trained", True)]

    def interval(self, arm: str, name: str) -> Sequence[float] | None:
        """An arm's limits by name, None for one seed."""
        found: Sequence[float] | None = self.results[arm].get("intervals", {}).get(name)
        return found

    def estimate(self, arm: str, name: str, mean: float | None) -> dict[str, Any] | None:
        """A number with its limits and seeds, as the charts take it."""
        if mean is None:
            return None
        low, high = self.interval(arm, name) or (None, None)
        seeds = self.results[arm].get("per_seed", {}).get(name) or []
        return {
            "mean": mean, "low": low, "high": high,
            "per_seed": seeds if self.detail.seeds and len(seeds) > 1 else [],
        }  # fmt: skip


def table_row(data: Comparison, arm: str, cells: Sequence[Cell]) -> TableRow:
    """An arm's line of a table."""
    return TableRow(data.arms.label(arm), cells, data.arms.number(arm))


def steps_cell(data: Comparison, arm: str, name: str = "steps_to_target") -> Cell:
    """Steps to the target or a height; how many seeds reached it, where some did not."""
    result = data.results[arm]
    values = result.get("per_seed", {}).get(name)
    if values is None or (name == "steps_to_target" and data.summary["target"]["value"] is None):
        return Cell("–")
    reached = sum(value is not None for value in values)
    if reached == 0:
        return Cell(f"not in {result['last_step']}")
    if reached < len(values):
        return Cell(f"{reached} of {len(values)} seeds")
    return estimate_cell(result[name], data.interval(arm, name), digits=0)


def numbers_of(estimate: Mapping[str, Any] | None) -> list[Any]:
    """Mean and limits, as the data of a figure has them; None three times for no estimate."""
    return [None] * 3 if estimate is None else [estimate.get(key) for key in LIMITS]


def dots_both(
    rows: Sequence[Row],
    panels: Sequence[str],
    title: str,
    description: str = "Means with 95 % intervals",
    zero: bool = False,
) -> str:
    """Dots in two layouts: panels beside each other, or below each other."""
    x_range = range_of(rows)
    wide, narrow = (
        dot_chart(rows, panels, title=title, description=description, x_range=x_range,
                  panels_a_line=n, width=width, zero=zero)
        for n, width in ((page.panels_a_line(len(panels)), 1000), (1, 460))
    )  # fmt: skip
    return page.both_widths(wide, narrow)
