"""Grids of merge settings: what a row of a grid says, which row wins, which rows agree.

A grid maps keys of `merge:` to values; its rows are all combinations, laid over an experiment's
settings. The score is the mean of accuracy and retrieved gold passage: what the trials of this
world showed is that the habit of searching merges easily and the skill does not, so the search rate
is not what is tuned. `compare.zero_shot` measures the rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, get_type_hints

from compare.errors import CompareError
from configs.checks import build, nearest
from configs.schema import Config
from configs.sections import Merge, Scope

PARTS = {
    "searched": "searched",
    "entity": "entity",
    "passage": "passage",
    "accuracy": "accuracy",
    "seen accuracy": "seen/accuracy",
    "unseen accuracy": "unseen/accuracy",
}
"""Column of a table -> metric of `train.evaluation.summarize`."""


def merge_key(key: Any, config: Config) -> str:
    """The full name of a key of `merge:`.

    Args:
        key: as a file or an option has it: a key of `merge:` such as `density` or
            `scope.norm_bias`, the name of a model that is merged (its weight), or `weight.NAME`.
        config: says which donors there are.

    Returns:
        The key with its section: `density`, `scope.norm_bias`, `weights.agent`.

    Raises:
        CompareError: there is no such key; names the nearest one.
    """
    if not isinstance(key, str):
        raise CompareError(f"{key}: a key must be text; put it in quotes")
    key = key.removeprefix("merge.")
    tasks = ("vlm", "agent", *config.models.donors)
    name = key.removeprefix("weights.").removeprefix("weight.")
    if name in tasks:
        return f"weights.{name}"
    if key.startswith(("weights.", "weight.")):
        raise CompareError(f"{key}: there is no such model in the merge; {nearest(name, tasks)}")
    known = [item.name for item in fields(Merge)]
    groups = [f"scope.{group}" for group in get_type_hints(Scope)]
    if key not in (*known, *groups):
        raise CompareError(f"{key}: no key of merge:; {nearest(key, [*known, *groups, *tasks])}")
    return key


def check_new(key: str, values: Sequence[Any], grid: Mapping[str, Sequence[Any]]) -> None:
    """Hold a key against those before it: the same setting twice would be measured twice.

    Args:
        key: full name.
        values: of it.
        grid: what was read before.

    Raises:
        CompareError: the key is there already, its section or a key of it is, or a value is listed
            twice; without the place.
    """
    if key in grid:
        raise CompareError(f"{key} is given twice; list its values once")
    for other in grid:
        if f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}."):
            raise CompareError(f"{key} and {other} set the same; give one of them")
    if any(value in values[:index] for index, value in enumerate(values)):
        raise CompareError(f"{key}: a value is listed twice; list each once")


def expand_grid(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of a grid {key: [values]}, keys in order; {} gives one empty setting."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def lay_over(config: Config, setting: Mapping[str, Any], where: str) -> Config:
    """The experiment with a setting laid over its `merge:` section.

    Args:
        config: the experiment; it stays as it is.
        setting: full key -> value.
        where: file or option that the setting is from, for messages.

    Raises:
        ConfigError: a value that the key cannot have.
    """
    section = asdict(config.merge)
    for key, value in setting.items():
        *parents, name = key.split(".")
        target = section
        for parent in parents:
            target = target[parent]
        target[name] = value
    # no rules is the default; the check refuses an empty list where a file writes one
    section = {key: value for key, value in section.items() if value != []}
    return replace(config, merge=build(section, Merge, "merge", lambda key: where))


def setting_text(setting: Mapping[str, Any]) -> str:
    """A setting in words for a table: `density 0.35, agent 0.7`."""
    words = [f"{key.removeprefix('weights.')} {_value_text(v)}" for key, v in setting.items()]
    return ", ".join(words) or "defaults"


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return json.dumps(value).replace('"', "") if value else "none"
    return str(value)


def score(metrics: Mapping[str, float]) -> float:
    """What a setting is ranked by: the mean of accuracy and gold passage retrieved, 0 to 1."""
    return (metrics["accuracy"] + metrics["passage"]) / 2


def table_parts(metrics: Mapping[str, float]) -> dict[str, float]:
    """The columns of a table from the metrics of an evaluation, score first, rounded."""
    parts = {name: metrics[metric] for name, metric in PARTS.items() if metric in metrics}
    return {name: round(value, 4) for name, value in {"score": score(metrics), **parts}.items()}


def best_settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The best row of each name by score; of equal ones the first in the grid's order."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["name"] not in best or row["score"] > best[row["name"]]["score"]:
            best[row["name"]] = dict(row)
    return best


def at_ends(best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the best setting of a name has the least or the most of what was tried.

    Args:
        best: row of the setting.
        rows: of all settings.

    Returns:
        Words such as `largest agent`, for keys with three numbers or more; of two one is always at
        an end.
    """
    settings = [row["setting"] for row in rows if row["name"] == best["name"]]
    words = []
    for key, value in best["setting"].items():
        tried = [setting[key] for setting in settings]
        if not _are_numbers(tried) or len(set(tried)) < 3:
            continue
        name = key.removeprefix("weights.")
        words += [f"smallest {name}"] if value == min(tried) else []
        words += [f"largest {name}"] if value == max(tried) else []
    return words


def find_neighbours(grid: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """For every row of the expanded grid, the rows that differ in one key by one step.

    Numbers step in their order, other values in the order in which the grid lists them.
    """
    orders = {key: _order(values) for key, values in grid.items()}
    rows = [[orders[key].index(row[key]) for key in grid] for row in expand_grid(grid)]

    def steps(a: Sequence[int], b: Sequence[int]) -> int:
        return sum(abs(x - y) for x, y in zip(a, b, strict=True))

    return [[j for j, other in enumerate(rows) if steps(row, other) == 1] for row in rows]


def _order(values: Sequence[Any]) -> list[Any]:
    return sorted(values) if _are_numbers(values) else list(values)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def agreement(
    answers: Sequence[Sequence[str | None]], neighbours: Sequence[Sequence[int]]
) -> list[float]:
    """How far each setting answers as its neighbours in the grid do: mean share of equal answers.

    The idea of AdaMMS (arXiv 2503.23733): where the answers hardly change from one setting to the
    next, the merge is stable there. No label is used. A question that a setting leaves without an
    answer agrees with nothing, since merges that are broken all alike would agree best of all.

    Args:
        answers: of every setting, one a question, normalised; None where there was none.
        neighbours: of every setting, as `find_neighbours` gives them.

    Returns:
        One number a setting, 0 to 1; 0 for a setting without neighbours.
    """

    def share(a: Sequence[str | None], b: Sequence[str | None]) -> float:
        return sum(x is not None and x == y for x, y in zip(a, b, strict=True)) / len(a)

    return [
        sum(share(answers[i], answers[j]) for j in near) / len(near) if near else 0.0
        for i, near in enumerate(neighbours)
    ]
