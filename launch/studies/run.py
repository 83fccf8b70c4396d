"""`obm study`: one way in for every kind of study, and one way out.

The folder is locked while a study runs. Whatever ends it, an error, Ctrl-C or a kill, leaves a
folder that the same command goes on with.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from launch.errors import LaunchError
from launch.jobs import terminate_as_interrupt
from launch.studies.file import Options, Study
from launch.studies.machine import duration_words
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


def check_folders(study: Study) -> None:
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
