"""Floors: what starts do before any training, over seeds, as one table with paired differences.

The numbers of one seed belong together: every arm was asked the same questions about the same
photos. So arms are compared by the differences within a seed, and the interval is of their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare.curves import Estimate, interval
from compare.errors import CompareError
from compare.provenance import how_it_was_made, origin
from compare.report import interval_name
from compare.rows import csv_text, markdown_table
from compare.tuning import PARTS
from compare.verdict import ABOVE, BELOW, OPEN, UNKNOWN, side_of_difference
from configs.sections import Environment
from train.settings import asked_words

COLUMNS = {**PARTS, "recognition": "recognition"}
"""Column -> metric."""
COMPARED = ("searched", "entity", "passage", "accuracy")
"""Columns whose differences are shown."""
SUFFIXES = ("json", "csv", "md")


def summarise_floor(rows: Sequence[Mapping[str, Any]], reference: str) -> dict[str, Any]:
    """Means over seeds of every arm, and the differences of the reference to each other arm.

    Args:
        rows: one a seed and arm: arm, seed, recipe, metrics.
        reference: the arm that others are held against.

    Returns:
        {"reference", "seeds", "arms": {arm: {"recipe", "parts": {column: estimate}}},
        "differences": {arm: {column: estimate, reference minus arm}}} where an estimate is
        {"mean", "low", "high", "per_seed"}, 95 % limits (None for one seed).

    Raises:
        CompareError: an arm that lacks a seed, or no such reference.
    """
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    if reference not in arms:
        raise CompareError(f"there is no arm {reference!r} to compare with; add it")
    seeds = [row["seed"] for row in arms[reference]]
    for arm, members in arms.items():
        if [row["seed"] for row in members] != seeds:
            raise CompareError(f"{arm} has other seeds than {reference}; run the study to its end")
    values = {
        arm: {
            column: [row["metrics"][metric] for row in members]
            for column, metric in COLUMNS.items()
            if all(metric in row["metrics"] for row in members)
        }
        for arm, members in arms.items()
    }
    return {
        "reference": reference,
        "seeds": seeds,
        "arms": {
            arm: {
                "recipe": arms[arm][0]["recipe"],
                "parts": {column: estimate_of(v, (0.0, 1.0)) for column, v in columns.items()},
            }
            for arm, columns in values.items()
        },
        "differences": {
            arm: {
                column: estimate_of(
                    [
                        a - b
                        for a, b in zip(values[reference][column], columns[column], strict=True)
                    ],
                    (-1.0, 1.0),
                )
                for column in COMPARED
            }
            for arm, columns in values.items()
            if arm != reference
        },
    }


def write_floor(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    name: str,
    title: str,
    command: str,
    environment: Environment,
) -> dict[str, Any]:
    """Write `<name>.json`, `.csv` and `.md`.

    Args:
        summary: of `summarise_floor`.
        rows: what it was made from.
        folder: made where missing.
        name: of the files.
        title: heading.
        command: the command line that makes this.
        environment: what was asked; the seed's own part is not read.

    Returns:
        The content of the json file.
    """
    from train.files import write_json, write_text

    asked = {key: value for key, value in asdict(environment).items() if key != "data_seed"}
    record = {
        **origin(command),
        "environment": asked,
        **summary,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", record)
    write_text(folder / f"{name}.csv", rows_csv(rows))
    write_text(folder / f"{name}.md", _markdown(record, title, name))
    return record


def floor_text_table(summary: Mapping[str, Any]) -> list[str]:
    """The floors as lines of a Markdown table, best accuracy first."""
    arms = summary["arms"]
    columns = [c for c in COLUMNS if all(c in arm["parts"] for arm in arms.values())]
    body = [
        [name, *(cell(arms[name]["parts"][column]) for column in columns)]
        for name in sorted(arms, key=lambda name: -arms[name]["parts"]["accuracy"]["mean"])
    ]
    return markdown_table([["start", *columns], *body])


def separation_text(summary: Mapping[str, Any], column: str) -> str:
    """One sentence: above which arms the reference lies, below which, and the rest."""
    groups: dict[str, list[str]] = {ABOVE: [], BELOW: [], OPEN: []}
    for arm, parts in summary["differences"].items():
        side = side_of_difference(parts[column])
        groups[OPEN if side == UNKNOWN else side].append(arm)  # one seed separates nothing
    words = [f"{side} {', '.join(arms)}" for side, arms in groups.items() if arms]
    return f"{column}: {summary['reference']} is {'; '.join(words)}."


def estimate_of(values: Sequence[float], bounds: tuple[float, float]) -> dict[str, Any]:
    """{"mean", "low", "high", "per_seed"}: 95 % limits, None for one seed."""
    estimate: Estimate = interval(values, bounds=bounds)
    return {
        "mean": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "per_seed": list(values),
    }


def _markdown(record: Mapping[str, Any], title: str, name: str) -> str:
    reference, seeds = record["reference"], record["seeds"]
    differences = record["differences"]
    heads = [f"{reference} minus", *COMPARED]
    body = [
        [arm, *(signed_cell(parts[column]) for column in COMPARED)]
        for arm, parts in differences.items()
    ]
    recipes = [[arm, found["recipe"]] for arm, found in record["arms"].items()]
    by_accuracy = {arm: found["parts"]["accuracy"]["mean"] for arm, found in record["arms"].items()}
    highest = max(by_accuracy, key=lambda arm: by_accuracy[arm])
    return "\n".join([
        f"# {title}",
        "",
        "What every start does before any training: "
        f"{asked_words(record['environment'], ' a seed')}, greedy; mean over {len(seeds)} seeds "
        "[95 % interval]. Most right answers first.",
        "",
        *floor_text_table(record),
        "",
        "`searched` any search; `entity` the right entity in a text query; `passage` a gold "
        "passage retrieved; `accuracy` the answer right, also on places whose flag the VLM has "
        "seen or not; `recognition` names a seen place when asked which place it is, as the VLM "
        "was asked, without tools.",
        "",
        "## Differences within a seed",
        "",
        f"`{reference}` minus each other start, on the same questions and photos. Bold: the "
        "interval does not hold 0.",
        "",
        *markdown_table([heads, *body]),
        "",
        "## What this separates, and what it does not",
        "",
        *(f"* {separation_text(record, column)}" for column in COMPARED),
        f"* The highest mean accuracy is that of {highest} ({by_accuracy[highest]:.2f}).",
        f"* Of {len(differences) * len(COMPARED)} such intervals about one in twenty leaves out 0 "
        "by chance; nothing is corrected for that. Not separated does not mean equal: "
        f"with {len(seeds)} seeds the intervals are wide.",
        "* A seed changes the calibration sample, the random stream of the methods that draw, and "
        "the choice of questions and photos from one test split. The three checkpoints are the "
        "same in all, so nothing here says how another trio would come out.",
        "* Every recipe is the best of equally many settings on dev, so what was tuned there has "
        "lost nothing to its rivals by less search; a wider grid may still change the order.",
        "",
        "## Recipes",
        "",
        *markdown_table([["start", "recipe"], *recipes], align="---"),
        "",
        *how_it_was_made(
            record,
            f"seeds: {', '.join(map(str, seeds))}; interval: {interval_name(len(seeds))}",
            f"every evaluation: [{name}.csv]({name}.csv); numbers: [{name}.json]({name}.json)",
        ),
        "",
    ])  # fmt: skip


def rows_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every evaluation as a line: arm, seed, and every metric that any has."""
    names = sorted({metric for row in rows for metric in row["metrics"]})
    lines = [{"arm": row["arm"], "seed": row["seed"], **row["metrics"]} for row in rows]
    return csv_text(["arm", "seed", *names], lines)


def cell(estimate: Mapping[str, Any], form: str = ".2f") -> str:
    """`0.39 [0.33, 0.46]`; the mean alone where there is no interval, or none to see."""
    mean = format(estimate["mean"], form)
    if estimate["low"] is None:
        return mean
    low, high = format(estimate["low"], form), format(estimate["high"], form)
    return mean if low == high else f"{mean} [{low}, {high}]"


def signed_cell(estimate: Mapping[str, Any]) -> str:
    """A difference with its sign; bold where its interval does not hold 0."""
    text = cell(estimate, "+.2f")
    return f"**{text}**" if side_of_difference(estimate) in (ABOVE, BELOW) else text
