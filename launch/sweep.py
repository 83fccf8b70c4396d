"""`obm merge --sweep`: try a grid of merge settings on held-out questions, merge with the best.

    obm merge --sweep density=0.2,0.35,0.5 weights.agent=0.7,1 --output runs/merged/swept

Every combination is merged into a scratch folder beside the output and answers the evaluation's
questions greedily; test questions are never used to choose. OUTPUT.sweep.json and OUTPUT.sweep.md
keep the table, OUTPUT.sweep.jsonl what is finished, so that the same sweep run again goes on.

With --agreement no label is looked at: the setting wins whose answers its neighbours in the grid
share most (AdaMMS, arXiv 2503.23733). That finds where the merge is stable, not where it is good: a
merge that is wrong in the same way over a range of settings wins too. Scores stand beside it in the
table where the questions have labels, so that one can see what the choice would have cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from launch.arguments import command_line, make_folder_of
from launch.errors import LaunchError

if TYPE_CHECKING:
    from compare.zero_shot import Task
    from configs.schema import Config

WHERE = "--sweep"


def sweep(
    config: Config,
    pairs: Sequence[str],
    output: Path,
    *,
    by_agreement: bool = False,
    dry_run: bool = False,
) -> Config:
    """Measure a grid of merge settings and choose one.

    Args:
        config: the experiment that settings are laid over.
        pairs: `key=value,value,...`; see `read_pairs`.
        output: where the merge will lie; the sweep's files lie beside it.
        by_agreement: choose by agreement with neighbours instead of by score.
        dry_run: check and list only.

    Returns:
        The experiment with the chosen setting (of equals the first); as given for a dry run.

    Raises:
        CompareError, ConfigError, LaunchError, MergeError: a key, a value, or a combination that
            cannot be merged; before anything is measured.
    """
    from compare.tuning import expand_grid, lay_over
    from launch.tasks import away_from_test, check_merges, make_task
    from train.settings import asked_words

    grid = read_pairs(pairs, config)
    settings = expand_grid(grid)
    if by_agreement and len(settings) < 2:
        raise LaunchError("--agreement compares settings; give --sweep at least two")
    config_used = away_from_test(config, "sweep")
    configs = [lay_over(config_used, setting, WHERE) for setting in settings]
    tasks = [
        make_task(_words(setting), own) for setting, own in zip(settings, configs, strict=True)
    ]
    check_merges(tasks, output.parent)
    asked = asked_words(asdict(config_used.environment))
    print(f"sweep: {len(tasks)} settings, each merged and asked {asked}")
    if dry_run:
        print("\n".join(f"  {task.name}" for task in tasks))
        return config
    make_folder_of(output, "--output")
    rows = _measure(grid, settings, tasks, output)
    by = "agreement" if by_agreement else "score"
    if by not in rows[0]:
        raise LaunchError("the questions have no labels to score by; pass --agreement")
    values = [row[by] for row in rows]
    best = values.index(max(values))
    _write(output, config_used, rows, best, by)
    print(f"best by {by}: {tasks[best].name} ({values[best]:.4f})")
    if max(values) == 0:
        print(f"every setting has {by} 0, so the first is taken; try other values")
    return replace(config, merge=configs[best].merge)


def read_pairs(pairs: Sequence[str], config: Config) -> dict[str, list[Any]]:
    """Read `density=0.1,0.2 weights.agent=0.7,1` as a grid.

    Args:
        pairs: one a key; values are separated by commas, or a YAML list in brackets.
        config: says which models have weights.

    Returns:
        Full key of `merge:` -> values, as given.

    Raises:
        CompareError: an unknown key, a key or value given twice.
        LaunchError: no values.
    """
    from compare.errors import CompareError
    from compare.tuning import check_new, merge_key

    grid: dict[str, list[Any]] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not text.strip():
            raise LaunchError(f"{WHERE} {pair}: write key=value,value such as density=0.2,0.5")
        try:
            full = merge_key(key, config)
        except CompareError as error:
            raise CompareError(f"{WHERE} {error}") from error
        values = _read_values(full, text)
        try:
            check_new(full, values, grid)
        except CompareError as error:
            raise CompareError(f"{WHERE} {pair}: {error}") from error
        grid[full] = values
    return grid


def _read_values(key: str, text: str) -> list[Any]:
    from configs.reader import parse_yaml
    from configs.sections import Merge

    where = f"{WHERE} {key}"
    if text.strip().startswith("["):
        values = parse_yaml(text, where)
        if not isinstance(values, list) or not values:
            raise LaunchError(f"{where}={text}: expected a list of values")
        return values
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise LaunchError(f"{where}={text}: a value is missing beside a comma")
    # layers=0,1 tries layer 0 and layer 1, which are text like 4-7
    is_text = get_type_hints(Merge).get(key) is str
    return parts if is_text else [parse_yaml(part, where) for part in parts]


def _measure(
    grid: Mapping[str, Sequence[Any]],
    settings: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    output: Path,
) -> list[dict[str, Any]]:
    """One row a setting: setting, agreement, and score and parts where there are labels."""
    from compare.tuning import agreement, find_neighbours, table_parts
    from compare.zero_shot import Results, measure_all
    from launch.commands.merge import merge_checkpoints

    results = Results(_beside(output, "jsonl"))

    def report(name: str, result: dict[str, Any]) -> None:
        parts = table_parts(result["metrics"]) if result["has_labels"] else {}
        print("  ".join([name, *(f"{k}={v}" for k, v in parts.items())]), flush=True)

    measured = measure_all(tasks, results, merge_checkpoints, scratch=output.parent, report=report)
    agreements = agreement([result["answers"] for result in measured], find_neighbours(grid))
    return [
        {
            "setting": dict(setting),
            "agreement": round(agrees, 4),
            **(table_parts(result["metrics"]) if result["has_labels"] else {}),
        }
        for setting, agrees, result in zip(settings, agreements, measured, strict=True)
    ]


def _write(
    output: Path, config: Config, rows: Sequence[Mapping[str, Any]], best: int, by: str
) -> None:
    from compare.provenance import origin
    from compare.tuning_report import settings_table
    from train.files import write_json, write_text
    from train.settings import asked_words

    environment = asdict(config.environment)
    record = {
        **origin(command_line()),
        "chosen_by": by,
        "best": rows[best],
        "environment": environment,
        "rows": list(rows),
    }
    write_json(_beside(output, "json"), record)
    how = {
        "score": "score (mean of accuracy and gold passage retrieved)",
        "agreement": "agreement with the neighbours in the grid, without labels. That is where "
        "answers change least, which need not be where they are right",
    }
    lines = [
        f"# Sweep of {output.name}",
        "",
        f"{asked_words(environment)}, greedy, no training. Chosen: "
        f"**{_words(rows[best]['setting'])}**, by {how[by]}.",
        "",
        *settings_table(rows),
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}.",
        "",
    ]
    write_text(_beside(output, "md"), "\n".join(lines))
    print("\n".join(settings_table(rows)))


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(f"{output.name}.sweep.{suffix}")


def _words(setting: Mapping[str, Any]) -> str:
    from compare.tuning import setting_text

    return setting_text(setting)
