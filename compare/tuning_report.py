"""What a tuning leaves: a page, a csv of all settings, and the recipes that studies read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compare.rows import csv_text
from compare.tuning import at_ends, setting_text
from configs.reader import write_yaml
from train.settings import asked_words


def recipes_text(best: Mapping[str, Mapping[str, Any]], command: str) -> str:
    """The best settings as a file of recipes for `obm study`."""
    recipes: dict[str, dict[str, Any]] = {}
    for name, row in best.items():
        recipe: dict[str, Any] = {"method": row["method"]}
        for key, value in row["setting"].items():
            *parents, last = key.split(".")
            target = recipe
            for parent in parents:
                target = target.setdefault(parent, {})
            target[last] = float(value) if parents == ["weights"] else value
        # an empty list is what is there without it
        recipes[name] = {key: value for key, value in recipe.items() if value != []}
    return (
        "# Merge recipes, one a name: the best of as many settings each on dev. A study's arm\n"
        f"# names one: `merge: obm`. Made by:\n#   {command}\n\n{write_yaml(recipes)}"
    )


def tuning_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a setting; each key of a setting is a column, lists as JSON."""

    def plain(value: Any) -> Any:
        return json.dumps(value) if isinstance(value, list | dict) else value

    lines = []
    for row in rows:
        setting = {key: plain(value) for key, value in row["setting"].items()}
        parts = {key: value for key, value in row.items() if key != "setting"}
        lines.append({"name": parts.pop("name"), "method": parts.pop("method"), **setting, **parts})
    # scores last, whatever keys the settings have
    last = [key for key in rows[0] if key not in ("name", "method", "setting")]
    names = dict.fromkeys(key for line in lines for key in line if key not in last)
    return csv_text([*names, *last], lines)


def tuning_markdown(record: Mapping[str, Any]) -> str:
    """The page of a tuning: the best of each, then every setting, then how it was made.

    Args:
        record: rows, best, environment, command, commit, hardware; `added`, where methods were
            tuned later with the same questions: name -> commit, hardware.
    """
    ranked = sorted(record["rows"], key=lambda row: -row["score"])
    in_order = {name: i for i, name in enumerate(record["best"])}
    ranked.sort(key=lambda row: in_order[row["name"]])
    best = sorted(record["best"].values(), key=lambda row: -row["score"])
    return "\n".join([
        "# Tuning of the merges",
        "",
        f"{asked_words(record['environment'])}, greedy, no training. Score: mean of accuracy and "
        "gold passage retrieved.",
        "",
        "## The best setting of each",
        "",
        *settings_table(best),
        "",
        *_caveats(best, record["rows"]),
        "## Every setting, best first within a name",
        "",
        *settings_table(ranked),
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}.",
        *(
            f"Added later, same questions and as many settings: {name} at commit {own['commit']} "
            f"on {own['hardware']}."
            for name, own in record.get("added", {}).items()
        ),
        "",
    ])  # fmt: skip


def _caveats(best: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which of the best may not be the method's best, and which are none; empty where all are."""
    ends = {row["name"]: ", ".join(at_ends(row, rows)) for row in best if row["score"] > 0}
    at_an_end = [f"{name} ({words})" for name, words in ends.items() if words]
    without = [row["name"] for row in best if row["score"] <= 0]
    lines = []
    if at_an_end:
        lines += [
            "Best at an end of what was tried, so that a value beyond it may be better, where "
            f"there can be one: {', '.join(at_an_end)}.",
            "",
        ]
    if without:
        lines += [f"No setting scored, so the first one stands there: {', '.join(without)}.", ""]
    return lines


def settings_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: name where rows have one, setting, every number of the rows."""
    columns = [key for key in rows[0] if key not in ("name", "method", "setting")]
    heads = [*(["name"] if "name" in rows[0] else []), "setting"]
    aligned = [*("---" for _ in heads), *("---:" for _ in columns)]
    lines = [_line([*heads, *columns]), _line(aligned)]
    for row in rows:
        names = [row["name"]] if "name" in row else []
        numbers = [f"{row[column]:.4f}" for column in columns]
        lines.append(_line([*names, setting_text(row["setting"]), *numbers]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
