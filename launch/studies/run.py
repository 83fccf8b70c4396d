"""`obm study`: one way in for every kind of study, and one way out.

The folder is locked while a study runs. Whatever ends it, an error, Ctrl-C or a kill, leaves a
folder that the same command goes on with.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.arguments import check_overrides
from launch.errors import LaunchError
from launch.jobs import terminate_as_interrupt
from launch.studies.file import Options, Study, load_study
from launch.studies.machine import duration_words
from launch.studies.shapes import check_path
from launch.studies.starts import say
from train.lock import locked

FUNCTIONS = {
    "ceiling": ("ceiling", "run_ceiling", "describe_ceiling"),
    "floor": ("floor", "run_floor", "describe_floor"),
    "ablation": ("ablation", "run_ablation", "describe_ablation"),
    "transfer": ("transfer", "run_transfer", "describe_transfer"),
    "table": ("paper_table", "run_table", "describe_table"),
}
"""Kind -> module, what runs it, what describes it; imported when needed, since each brings its own
libraries."""


def read_study(name: str, options: argparse.Namespace) -> Study:
    """A study with what the command line says of it, all checked before anything runs.

    Args:
        name: YAML file, or the name of a shipped study.
        options: overrides, parallel and output, and processes and report where a verb has them.

    Raises:
        ConfigError, LaunchError: a wrong file, override, number or folder.
    """
    said = vars(options)
    check_overrides(options.overrides)
    for option in ("parallel", "processes"):
        value = said.get(option)
        if value is not None and value < 1:
            raise LaunchError(f"--{option} {value}: give a number of 1 or more")
    folders = {key: said[key] for key in ("output", "report") if said.get(key) is not None}
    for option, folder in folders.items():
        check_path(folder, f"--{option}")
    study = load_study(name)
    if "output" in folders:
        study.output = Path(folders["output"])
    if "report" in folders:
        study.report = Path(folders["report"])
    _check_folders(study)
    return study


def _check_folders(study: Study) -> None:
    """Refuse folders below a file before hours of work go into what cannot be written.

    Raises:
        LaunchError: names option and key.
    """
    for name, folder in (("output", study.output), ("report", study.report_folder)):
        present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not present.is_dir():
            raise LaunchError(
                f"{name} {folder}: {present} is a file; name another folder as {name} in "
                f"{study.file}, or by --{name}"
            )


def run_study(study: Study, options: Options) -> dict[str, Any]:
    """Run what is missing of a study and write its report.

    Returns:
        The content of the report's json.

    Raises:
        ConfigError: another study holds the folder.
        LaunchError: a setting is wrong.
        JobFailedError: trainings failed; the others are done.
    """
    started = time.monotonic()
    with locked(study.output), terminate_as_interrupt():
        try:
            record: dict[str, Any] = _function(study.kind, 1)(study, options)
        except KeyboardInterrupt:
            say("stopped; run the same command again to go on, what is finished is kept")
            raise
    say(f"finished in {duration_words(time.monotonic() - started)}")
    return record


def describe_study(study: Study, options: Options) -> str:
    """What a study would run, without running it; every setting is checked on the way."""
    lines = [f"study {study.name}: {study.title}", f"output {study.output}"]
    return "\n".join([*lines, *_function(study.kind, 2)(study, options)])


def _function(kind: str, which: int) -> Callable[[Study, Options], Any]:
    names = FUNCTIONS[kind]
    function: Callable[[Study, Options], Any] = getattr(
        importlib.import_module(f"launch.studies.{names[0]}"), names[which]
    )
    return function
