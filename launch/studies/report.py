"""Where every study ends: its files are named, and its page is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.studies.file import Study
from launch.studies.starts import say


def publish(study: Study, record: Mapping[str, Any], suffixes: Sequence[str]) -> None:
    """Say where the report lies.

    The one place for all kinds of studies: whoever draws a page of a study draws it here, from the
    record that its json file holds.

    Args:
        study: says where the report goes.
        record: content of the json file.
        suffixes: of the files that were written.
    """
    base = study.report_folder / study.report_name
    say(f"report     {base}.{{{','.join(suffixes)}}}, commit {record['commit']}")
