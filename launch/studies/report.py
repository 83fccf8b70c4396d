"""Where every study ends: its page is written, and its files are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.studies.file import Study
from launch.studies.starts import say


def publish(study: Study, record: Mapping[str, Any], suffixes: Sequence[str]) -> None:
    """Write the page of a study from its record, and say where the report lies.

    The one place for all kinds; the page of a ceiling is written with its other files, and the
    paper's table has none.

    Args:
        study: says where the report goes.
        record: content of the json file.
        suffixes: of the files that were written.
    """
    base = study.report_folder / study.report_name
    written = list(suffixes)
    if study.kind in ("floor", "ablation", "transfer"):
        from compare.report_page import Record, write_report_page

        names = [f"{study.report_name}.{suffix}" for suffix in suffixes]
        page = Record(study.kind, study.report_name, record)
        write_report_page(
            base.with_name(f"{base.name}.html"), [page], title=study.title, files=names
        )
        written.append("html")
    say(f"report     {base}.{{{','.join(written)}}}, commit {record['commit']}")
