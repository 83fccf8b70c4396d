"""Tune merges on held-out questions: every setting of a grid is merged, evaluated and ranked.

The grid file maps a name to the values of any keys of `merge:`, and of weights by the name of the
model. A name that is no method says `method: NAME`. Each entry must have the same number of
settings, so that none is tuned harder than another. Missing statistics are made first; a tuning
that was broken off goes on where it stopped. Writes PATH.json, PATH.csv and PATH.md, and with
--recipes the best setting of each entry as a file that studies read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import (
    add_config_arguments,
    command_line,
    config_path,
    make_folder_of,
    read_config,
)
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm tune --grid configs/studies/grid.yaml --dry-run",
    "obm tune --grid my_grid.yaml --output runs/tuning --recipes runs/recipes.yaml",
)
MAX_NAME_BYTES = 240
"""The file system's limit less what a temporary name adds."""


@dataclass(frozen=True)
class Entry:
    """One entry of a grid file."""

    name: str
    """of the recipe"""
    method: str
    grid: dict[str, list[Any]]
    """full key of `merge:` -> values"""

    def settings(self, tasks: Sequence[str]) -> list[dict[str, Any]]:
        """Every setting; models whose weight the grid does not name get 1."""
        from compare.tuning import expand_grid

        weights = {f"weights.{task}": 1.0 for task in tasks}
        return [{**weights, **setting, "method": self.method} for setting in expand_grid(self.grid)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid and where results go."""
    add_config_arguments(parser)
    parser.add_argument("--grid", metavar="FILE", required=True, help="name -> key -> values")
    parser.add_argument(
        "--output", metavar="PATH", default="runs/tuning",
        help="file name without suffix (default: runs/tuning)",
    )  # fmt: skip
    parser.add_argument("--recipes", metavar="FILE", help="write each entry's best setting here")
    parser.add_argument(
        "--uneven", action="store_true", help="allow entries with unequal numbers of settings"
    )
    parser.add_argument(
        "--parallel", type=int, metavar="N",
        help="settings at a time (default: what cores and memory take)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--dry-run", action="store_true", help="check and count, merge nothing")


def run(options: argparse.Namespace) -> int:
    """Check the grid, tune, rank, write."""
    from launch.tasks import away_from_test

    config = away_from_test(read_config(options), "tune")
    if options.parallel is not None and options.parallel < 1:
        raise LaunchError(f"--parallel {options.parallel}: give a number of 1 or more")
    entries = read_grid(Path(options.grid), config, uneven=options.uneven)
    output, written = Path(options.output), _written(options)
    for option, path in written:
        _check_written(option, path, options)
    if options.dry_run:
        for entry in entries:
            n_settings = len(entry.settings(()))
            print(f"{entry.name}: {n_settings} settings of {', '.join(entry.grid) or entry.method}")
        return 0

    from compare.tuning import best_settings
    from compare.tuning_report import recipes_text, tuning_csv, tuning_markdown
    from train.files import with_ending, write_json, write_text

    finished = Path(config.output).parent / "tuning" / f"{output.name}.jsonl"
    # before hours of measuring: what cannot be written says so now
    for option, path in [*written, ("output", finished)]:
        make_folder_of(path, option)
    rows = tune(config, entries, finished, options.grid, parallel=options.parallel)
    best = best_settings(rows)
    record = _record(config, rows, best)
    write_json(with_ending(output, ".json"), record)
    write_text(with_ending(output, ".csv"), tuning_csv(rows))
    write_text(with_ending(output, ".md"), tuning_markdown(record))
    if options.recipes:
        write_text(Path(options.recipes), recipes_text(best, record["command"]))
    print("\n".join(_best_lines(best)))
    return 0


def _written(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """The option that names it, and the file, of all that a tuning writes; no two are the same."""
    from train.files import with_ending

    output = Path(options.output)
    if output.name in ("", ".."):
        raise LaunchError(f"--output {options.output!r}: names no file; write --output runs/tuning")
    written = [("--output", with_ending(output, suffix)) for suffix in (".json", ".csv", ".md")]
    if options.recipes is not None:
        recipes = Path(options.recipes)
        if not recipes.name:
            raise LaunchError(f"--recipes {options.recipes!r}: names no file; write --recipes FILE")
        if _same(recipes, *(path for _, path in written)):
            raise LaunchError(f"--recipes {recipes}: --output writes this file; choose another one")
        written.append(("--recipes", recipes))
    return written


def _check_written(option: str, path: Path, options: argparse.Namespace) -> None:
    """Refuse what is there, and what cannot be written.

    Raises:
        LaunchError: the grid or the settings themselves, an earlier result without --overwrite, a
            folder, a place below a file, a name that is too long.
    """
    if any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts):
        raise LaunchError(f"{option} {path}: the name is too long; choose a shorter one")
    if _same(path, Path(options.grid), config_path(options.config)):
        raise LaunchError(f"{option} {path}: this file is read; choose another one to write")
    present = next(one for one in path.absolute().parents if one.exists())
    if path.is_dir() or not present.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"{present} is no folder"
        raise LaunchError(f"{option} {path}: cannot be written ({what}); choose another place")
    if path.exists() and not options.overwrite:
        raise LaunchError(f"{path} exists; pass --overwrite or another {option}")


def _same(path: Path, *others: Path) -> bool:
    return path.resolve() in [other.resolve() for other in others]


def read_grid(path: Path, config: Config, *, uneven: bool = False) -> list[Entry]:
    """Read and check a grid file.

    Args:
        path: YAML: name -> key -> list of values, and `method` where the name is none.
        config: what the settings are laid over.
        uneven: allow unequal numbers of settings.

    Raises:
        ConfigError: the file cannot be read, or a value that its key cannot have.
        CompareError: an unknown key, a key or value given twice.
        LaunchError: an entry of another shape, an unknown method, no values, or entries tuned
            unequally hard.
    """
    from compare.tuning import lay_over
    from configs.reader import read_yaml
    from launch.tasks import merged_roles

    entries = [
        _read_entry(name, content, path, config) for name, content in read_yaml(path).items()
    ]
    if not entries:
        raise LaunchError(f"{path}: names nothing to tune; add `obm: {{density: [0.2, 0.5]}}`")
    for entry in entries:
        for setting in entry.settings(merged_roles(config)):
            lay_over(config, setting, f"{path}:{entry.name}")
    counts = {entry.name: len(entry.settings(())) for entry in entries}
    if len(set(counts.values())) > 1 and not uneven:
        words = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise LaunchError(
            f"{path}: unequal numbers of settings ({words}); give each as many, or pass --uneven"
        )
    return entries


def _read_entry(name: Any, content: Any, path: Path, config: Config) -> Entry:
    from compare.errors import CompareError
    from compare.tuning import check_new, merge_key
    from configs.checks import nearest
    from merge.methods import METHODS

    if not isinstance(name, str):
        raise LaunchError(f"{path}:{name}: the name of an entry must be text; put it in quotes")
    if content is not None and not isinstance(content, dict):
        raise LaunchError(
            f"{path}:{name}: expected keys with lists of values, got {content!r}; write "
            "density: [0.2, 0.5] below it"
        )
    content = dict(content or {})
    method = content.pop("method", name)
    if not isinstance(method, str) or method not in METHODS:
        raise LaunchError(
            f"{path}:{name}: {method!r} is no method; {nearest(str(method), METHODS)} "
            "An entry of another name says `method: NAME`"
        )
    grid: dict[str, list[Any]] = {}
    for key, values in content.items():
        try:
            full = merge_key(key, config)
        except CompareError as error:
            raise CompareError(f"{path}:{name}.{error}") from error
        if not isinstance(values, list) or not values:
            raise LaunchError(f"{path}:{name}.{key}: expected a list of values; write [0.2, 0.5]")
        try:
            check_new(full, values, grid)
        except CompareError as error:
            raise CompareError(f"{path}:{name}: {error}") from error
        grid[full] = values
    return Entry(name, method, grid)


def tune(
    config: Config,
    entries: Sequence[Entry],
    finished: Path,
    where: str,
    *,
    parallel: int | None = None,
) -> list[dict[str, Any]]:
    """Merge and evaluate every setting of every entry on `config.environment.eval_split`.

    Args:
        config: models, merge and the evaluation's questions.
        entries: of the grid.
        finished: JSON lines of finished settings; merges are made beside it.
        where: the grid's name, for messages.
        parallel: settings at a time; None: what cores and memory take.

    Returns:
        One row a setting, in the grid's order: name, method, setting, then score, four parts, and
        the accuracy on seen and on unseen places.
    """
    from compare.tuning import lay_over, setting_text, table_parts
    from compare.zero_shot import Results, measure_all
    from launch.commands.merge import merge_checkpoints
    from launch.studies.machine import share_evaluations
    from launch.tasks import check_merges, make_statistics, make_task, merged_roles, needed_kinds

    named = [(entry, s) for entry in entries for s in entry.settings(merged_roles(config))]
    configs = [lay_over(config, setting, where) for _, setting in named]
    make_statistics(config, sorted({kind for c in configs for kind in needed_kinds(c.merge)}))
    tasks = [
        make_task(f"{entry.name}: {setting_text(_without_method(setting))}", own)
        for (entry, setting), own in zip(named, configs, strict=True)
    ]
    results = Results(finished)
    missing = [task for task in tasks if task.key not in results]
    check_merges(missing, finished.parent)
    share = share_evaluations(config, parallel)
    print(f"{len(tasks)} settings, {len(tasks) - len(missing)} of them finished before")
    print(f"{share.parallel} at a time: {share.words}")
    count = 0

    def report(name: str, result: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        parts = "  ".join(f"{k}={v}" for k, v in table_parts(result["metrics"]).items())
        print(f"[{count}/{len(missing)}] {name}  {parts}", flush=True)

    measured = measure_all(
        tasks,
        results,
        merge_checkpoints,
        parallel=share.parallel,
        scratch=finished.parent,
        report=report,
    )
    return [
        {
            "name": entry.name,
            "method": entry.method,
            "setting": _without_method(setting),
            **table_parts(result["metrics"]),
        }
        for (entry, setting), result in zip(named, measured, strict=True)
    ]


def _without_method(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in setting.items() if key != "method"}


def _record(config: Config, rows: list[dict[str, Any]], best: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from compare.provenance import origin

    return {
        **origin(command_line()),
        "environment": asdict(config.environment),
        "best": best,
        "rows": rows,
    }


def _best_lines(best: Mapping[str, Mapping[str, Any]]) -> list[str]:
    from compare.tuning import setting_text

    return [
        f"best {name}: {setting_text(row['setting'])}; score {row['score']:.3f}"
        for name, row in best.items()
    ]
