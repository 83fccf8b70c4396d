"""Tune merges on held-out questions: every setting of a grid is merged, evaluated and ranked.

The grid file maps a method to the values of density, vlm, agent (the weights), normalization and
combine. Each method must have the same number of settings, so that none is tuned harder than
another. Missing second moments are made first. Writes PATH.json, PATH.csv and PATH.md, and with
--recipes the best setting of each method as a file that studies read.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import add_config_arguments, command_line, read_config
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm tune --grid configs/studies/grid.yaml --dry-run",
    "obm tune --grid my_grid.yaml --output runs/tuning --recipes runs/recipes.yaml",
)
GRID_KEYS = ("density", "vlm", "agent", "normalization", "combine")
METHODS = ("obm", "task_arithmetic", "ties", "dare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid and where results go."""
    add_config_arguments(parser)
    parser.add_argument("--grid", metavar="FILE", required=True, help="method -> key -> values")
    parser.add_argument(
        "--output", metavar="PATH", default="runs/tuning",
        help="file name without suffix (default: runs/tuning)",
    )  # fmt: skip
    parser.add_argument("--recipes", metavar="FILE", help="write each method's best setting here")
    parser.add_argument(
        "--uneven", action="store_true", help="allow methods with unequal numbers of settings"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--dry-run", action="store_true", help="check and count, merge nothing")


def run(options: argparse.Namespace) -> int:
    """Check the grid, tune, rank, write."""
    config = read_config(options)
    grids = read_grid(Path(options.grid), uneven=options.uneven)
    output = Path(options.output)
    written = [output.with_suffix(suffix) for suffix in (".json", ".csv", ".md")]
    written += [Path(options.recipes)] if options.recipes else []
    present = [path for path in written if path.exists()]
    if present and not options.overwrite:
        raise LaunchError(f"{present[0]} exists; pass --overwrite or another --output")
    if options.dry_run:
        for method, grid in grids.items():
            print(f"{method}: {count_settings(grid)} settings of {', '.join(grid)}")
        return 0

    from compare.tuning import best_settings, tune
    from train.run import write_json, write_text

    rows = tune(config, _stats(config), grids)
    best = best_settings(rows)
    record = _record(config, rows, best)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_suffix(".json"), record)
    write_text(output.with_suffix(".csv"), _csv(rows))
    write_text(output.with_suffix(".md"), _markdown(record))
    if options.recipes:
        write_text(Path(options.recipes), recipes_text(best, record["command"]))
    print("\n".join(_best_lines(best)))
    return 0


def read_grid(path: Path, *, uneven: bool = False) -> dict[str, dict[str, list[Any]]]:
    """Read and check a grid file.

    Args:
        path: YAML: method -> key -> list of values.
        uneven: allow unequal numbers of settings.

    Raises:
        ConfigError: the file cannot be read.
        LaunchError: an unknown method or key, no values, or methods tuned unequally hard.
    """
    from configs.checks import nearest
    from configs.reader import read_yaml

    grids = read_yaml(path)
    for method, grid in grids.items():
        if method not in METHODS:
            raise LaunchError(f"{path}:{method}: unknown method; {nearest(method, METHODS)}")
        for key, values in (grid or {}).items():
            if key not in GRID_KEYS:
                hint = nearest(key, GRID_KEYS)
                raise LaunchError(f"{path}:{method}.{key}: cannot be tuned; {hint}")
            if not isinstance(values, list) or not values:
                raise LaunchError(f"{path}:{method}.{key}: expected a list of values")
    counts = {method: count_settings(grid or {}) for method, grid in grids.items()}
    if len(set(counts.values())) > 1 and not uneven:
        words = ", ".join(f"{method} {count}" for method, count in counts.items())
        raise LaunchError(
            f"{path}: methods have unequal numbers of settings ({words}); give each as many, or "
            "pass --uneven"
        )
    return {method: dict(grid or {}) for method, grid in grids.items()}


def count_settings(grid: Mapping[str, Sequence[Any]]) -> int:
    """Combinations of a grid; 1 for an empty one."""
    count = 1
    for values in grid.values():
        count *= len(values)
    return count


def recipes_text(best: Mapping[str, Mapping[str, Any]], command: str) -> str:
    """The best settings as a file of recipes for `obm study`."""
    from configs.reader import write_yaml

    recipes = {}
    for method, row in best.items():
        weights = {role: float(row.get(role, 1.0)) for role in ("vlm", "agent")}
        others = {key: row[key] for key in ("density", "normalization", "combine") if key in row}
        recipes[method] = {"method": method, **others, "weights": weights}
    return (
        "# Merge recipes, one a method: the best of as many settings each on dev. A study's arm\n"
        f"# names one: `merge: obm`. Made by:\n#   {command}\n\n{write_yaml(recipes)}"
    )


def _stats(config: Config) -> dict[str, str]:
    from launch.commands.calibrate import ROLES, calibrate_parent, stats_path

    for role in ROLES:
        if not stats_path(config, role).exists():
            calibrate_parent(config, role)
    return {role: str(stats_path(config, role)) for role in ROLES}


def _record(config: Config, rows: list[dict[str, Any]], best: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from compare.provenance import code_commit, hardware

    return {
        "command": command_line(),
        "commit": code_commit(),
        "hardware": hardware(),
        "environment": asdict(config.environment),
        "best": best,
        "rows": rows,
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _markdown(record: Mapping[str, Any]) -> str:
    rows = record["rows"]
    names = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    for row in sorted(rows, key=lambda row: (row["method"], -row["score"])):
        lines.append("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")
    settings = record["environment"]
    return "\n".join([
        "# Tuning of the merges",
        "",
        f"{settings['eval_size']} {settings['eval_split']} questions (kinds: "
        f"{', '.join(settings['eval_kinds'])}), greedy, no training. Score: mean of accuracy and "
        "gold passage retrieved. Best first within a method.",
        "",
        *lines,
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}.",
        "",
    ])  # fmt: skip


def _best_lines(best: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for method, row in best.items():
        settings = ", ".join(f"{key} {row[key]}" for key in GRID_KEYS if key in row)
        lines.append(f"best {method}: {settings or 'defaults'}; score {row['score']:.3f}")
    return lines
