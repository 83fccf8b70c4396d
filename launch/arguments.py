"""Arguments that several verbs share, and how they become settings."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

DEFAULT_CONFIG = "demo"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and any number of `key=value`."""
    parser.add_argument(
        "--config", metavar="FILE", default=DEFAULT_CONFIG,
        help="YAML file, or the name of a shipped one (default: demo)",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="settings laid over the file, e.g. merge.density=0.3 seed=1",
    )  # fmt: skip


def read_config(options: argparse.Namespace, *extra: str) -> Config:
    """The settings: file, then the command line's overrides, then `extra`.

    Raises:
        ConfigError: see `configs.schema.load_config`.
        LaunchError: an argument that is no `key=value`.
    """
    from configs.schema import load_config

    check_overrides(options.overrides)
    return load_config(config_path(options.config), [*options.overrides, *extra])


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse arguments that are no `key=value`.

    Raises:
        LaunchError: names the argument.
    """
    for override in overrides:
        if "=" not in override:
            raise LaunchError(
                f"argument {override!r} is neither an option nor key=value; "
                "settings are written like merge.density=0.3, a file comes after --config"
            )


def make_folder_of(path: Path, option: str) -> None:
    """Makes the folder that a file shall lie in, and tries it: before hours of work, not after.

    Args:
        path: the file.
        option: what names it, for the message.

    Raises:
        LaunchError: it cannot be made, or nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LaunchError(
            f"{option} {path}: cannot be written ({error.strerror}); choose another place"
        ) from error


def config_path(name: str) -> Path:
    """A file's path as it is; a shipped file's for a bare name such as `demo`.

    Raises:
        ConfigError: a bare name that no shipped file has.
    """
    from configs.schema import shipped_config

    path = Path(name)
    # a shipped name may hold a dot: qwen2.5-vl-3b
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    return shipped_config(name)


def show_progress() -> None:
    """What the training package says of its progress goes to the terminal, line by line."""
    import logging

    from transformers.utils.logging import disable_progress_bar

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("train").setLevel(logging.INFO)
    disable_progress_bar()


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    return shlex.join(["obm", *sys.argv[1:]])
