"""Where a number comes from: the commit of the code and the machine it ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

from train.machine import code_commit, processor_name


def origin(command: str) -> dict[str, str]:
    """How a record begins: the `command` that made it, `commit` of the code, `hardware`."""
    return {"command": command, "commit": code_commit(), "hardware": hardware()}


def how_it_was_made(record: Mapping[str, Any], *items: str) -> list[str]:
    """The last part of a report in Markdown, line by line.

    Args:
        record: begins as `origin` says.
        items: what else is to be said, each in a line of its own.
    """
    return [
        "## How it was made",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"* commit: {record['commit']}",
        f"* hardware: {record['hardware']}",
        *(f"* {item}" for item in items),
    ]


def hardware() -> str:
    """One line on the machine: processor, cores, memory, system."""
    cores = len(os.sched_getaffinity(0))
    return f"{processor_name()}, {cores} cores, {_memory_gb():.0f} GB, {platform.system()}"


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return 0.0
