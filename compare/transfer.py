"""Starts and trained policies where they were not trained: worlds side by side, paired by seed.

One seed has its own questions and photos in every world, and its own trained policy, so arms are
compared by the differences within a seed, and what training gained is after minus before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.floor import cell, estimate_of, signed_cell
from compare.provenance import how_it_was_made, origin
from compare.report import interval_name
from compare.rows import csv_text, markdown_table
from compare.tuning import PARTS
from train.settings import asked_words

COLUMNS = {"searched": "searched", "by image": "search_rate_image", **PARTS}
"""Column -> metric."""
STAGES = ("before", "after")
"""Of training."""
SUFFIXES = ("json", "csv", "md")
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


def summarise_transfer(
    rows: Sequence[Mapping[str, Any]], references: Sequence[str]
) -> dict[str, Any]:
    """Means over seeds of every arm in every world, before and after training, and differences.

    Args:
        rows: one an evaluation: arm, world, stage (one of `STAGES`), seed, metrics. The first
            world is the one that was trained in.
        references: arms that the others are held against.

    Returns:
        {"seeds", "references", "worlds": names,
        "arms": {arm: {world: {"before" and "after" and "gain" (after minus before): parts}}},
        "shift": {arm: {world: {"before", "after": accuracy there minus in the first world}}},
        "differences": {reference: {arm: {world: {"before", "after": parts, arm minus reference}}}}}
        where parts are {column: estimate} and an estimate is {"mean", "low", "high", "per_seed"},
        95 % limits (None for one seed).

    Raises:
        CompareError: an evaluation is missing, or there twice.
    """
    found = {(r["arm"], r["world"], r["stage"], r["seed"]): r["metrics"] for r in rows}
    arms, worlds, seeds = (
        list(dict.fromkeys(r[k] for r in rows)) for k in ("arm", "world", "seed")
    )
    if len(found) != len(rows) or len(rows) != len(arms) * len(worlds) * len(seeds) * len(STAGES):
        raise CompareError("an evaluation is missing or there twice; run the study to its end")

    def values(arm: str, world: str, stage: str, column: str) -> list[float] | None:
        metric = COLUMNS[column]
        every = [found[arm, world, stage, seed] for seed in seeds]
        return [m[metric] for m in every] if all(metric in m for m in every) else None

    def parts(arm: str, world: str, stage: str) -> dict[str, Any]:
        known = {column: values(arm, world, stage, column) for column in COLUMNS}
        return {column: estimate_of(v, SHARE) for column, v in known.items() if v is not None}

    def differ(one: tuple[str, str, str], other: tuple[str, str, str]) -> dict[str, Any]:
        pairs = {column: (values(*one, column), values(*other, column)) for column in COLUMNS}
        return {c: _minus(a, b) for c, (a, b) in pairs.items() if a is not None and b is not None}

    def stages(arm: str, world: str) -> dict[str, Any]:
        both = {stage: parts(arm, world, stage) for stage in STAGES}
        return {**both, "gain": differ((arm, world, "after"), (arm, world, "before"))}

    return {
        "seeds": seeds,
        "references": list(references),
        "worlds": worlds,
        "arms": {arm: {world: stages(arm, world) for world in worlds} for arm in arms},
        "shift": {
            arm: {
                world: {
                    stage: differ((arm, world, stage), (arm, worlds[0], stage))["accuracy"]
                    for stage in STAGES
                }
                for world in worlds[1:]
            }
            for arm in arms
        },
        "differences": {
            reference: {
                arm: {
                    world: {
                        stage: differ((arm, world, stage), (reference, world, stage))
                        for stage in STAGES
                    }
                    for world in worlds
                }
                for arm in arms
                if arm != reference
            }
            for reference in references
        },
    }


def write_transfer(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    name: str,
    title: str,
    command: str,
    worlds: Mapping[str, Mapping[str, Any]],
    training: str,
) -> dict[str, Any]:
    """Write `<name>.json`, `.csv` and `.md`.

    Args:
        summary: of `summarise_transfer`.
        rows: what it was made from.
        folder: made where missing.
        name: of the files.
        title: heading.
        command: the command line that makes this.
        worlds: name -> `settings` (what differs, in words) and `environment`, as plain data.
        training: the trainings in words.

    Returns:
        The content of the json file: the summary with `worlds` as given, and how it was made.
    """
    from train.files import write_json, write_text

    record = {
        **origin(command),
        "training": training,
        **summary,
        "worlds": {world: dict(worlds[world]) for world in summary["worlds"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", record)
    write_text(folder / f"{name}.csv", _csv(rows))
    write_text(folder / f"{name}.md", _markdown(record, title, name))
    return record


def accuracy_table(record: Mapping[str, Any]) -> list[str]:
    """Accuracy before and after training in every world, as lines of a Markdown table."""
    worlds = list(record["worlds"])
    body = [
        [
            arm,
            *(
                f"{found[world]['before']['accuracy']['mean']:.2f} → "
                f"{cell(found[world]['after']['accuracy'])}"
                for world in worlds
            ),
        ]
        for arm, found in record["arms"].items()
    ]
    return markdown_table([["start", *worlds], *body])


def _minus(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    return estimate_of([a - b for a, b in zip(one, other, strict=True)], DIFFERENCE)


def _markdown(record: Mapping[str, Any], title: str, name: str) -> str:
    seeds, trained_in = record["seeds"], next(iter(record["worlds"]))
    environment = record["worlds"][trained_in]["environment"]
    asked = asked_words(environment, " a seed and world", has_kinds=False)
    lines = [
        f"# {title}",
        "",
        "Starts, and the policies that were trained from them, asked where they were not trained. "
        f"{asked}, greedy; mean over "
        f"{len(seeds)} seeds [95 % interval]. Trained in `{trained_in}`: {record['training']}.",
        "",
        "Accuracy before → after training:",
        "",
        *accuracy_table(record),
        "",
        *markdown_table(
            [
                ["world", "what is different"],
                *([world, about["settings"]] for world, about in record["worlds"].items()),
            ],
            align="---",
        ),
        "",
    ]
    for world in record["worlds"]:
        lines += [f"## {world}", "", *_world_table(record, world), ""]
    references = " and ".join(f"`{reference}`" for reference in record["references"])
    return "\n".join([
        *lines,
        "`by image` any image search; `entity` the right entity in a text query; `passage` a gold "
        "passage retrieved; `unseen` accuracy on places whose flag the VLM has not seen; `gain` "
        "accuracy after minus before. The last columns are the row minus "
        f"{references} in accuracy after training, within a seed. Bold: the interval does not hold "
        "0.",
        "",
        "## What is lost on the way",
        "",
        f"Accuracy in a world minus that in `{trained_in}`, before and after training, within a "
        "seed.",
        "",
        *_shift_table(record),
        "",
        "A seed chooses the questions and photos of every world and names the training; the "
        "checkpoints before training are the same in all seeds. Nothing is corrected for the "
        "number of intervals, of which about one in twenty leaves out 0 by chance.",
        "",
        *how_it_was_made(
            record,
            f"seeds: {', '.join(map(str, seeds))}; interval: {interval_name(len(seeds))}",
            f"every evaluation: [{name}.csv]({name}.csv); numbers: [{name}.json]({name}.json)",
        ),
        "",
    ])  # fmt: skip


def _world_table(record: Mapping[str, Any], world: str) -> list[str]:
    shown = ("searched", "by image", "entity", "passage")
    heads = ["start", *shown, "accuracy", "unseen", "gain",
             *(f"minus {reference}" for reference in record["references"])]  # fmt: skip
    body = []
    for arm, found in record["arms"].items():
        before, after, gain = (found[world][key] for key in ("before", "after", "gain"))
        row = [arm, *(_arrow(before, after, column) for column in shown)]
        row.append(f"{before['accuracy']['mean']:.2f} → {cell(after['accuracy'])}")
        row += [_arrow(before, after, "unseen accuracy"), signed_cell(gain["accuracy"])]
        for reference in record["references"]:
            parts = record["differences"][reference].get(arm)
            row.append("" if parts is None else signed_cell(parts[world]["after"]["accuracy"]))
        body.append(row)
    return markdown_table([heads, *body])


def _shift_table(record: Mapping[str, Any]) -> list[str]:
    worlds = list(record["worlds"])[1:]
    body = [
        [arm, *(f"{signed_cell(s[w]['before'])} → {signed_cell(s[w]['after'])}" for w in worlds)]
        for arm, s in record["shift"].items()
    ]
    return markdown_table([["start", *worlds], *body])


def _arrow(before: Mapping[str, Any], after: Mapping[str, Any], column: str) -> str:
    if column not in before or column not in after:
        return "-"
    return f"{before[column]['mean']:.2f} → {after[column]['mean']:.2f}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["arm", "world", "stage", "seed"]
    names = sorted({metric for row in rows for metric in row["metrics"]})
    lines = [{**{key: row[key] for key in head}, **row["metrics"]} for row in rows]
    return csv_text([*head, *names], lines)
