"""Coverage by package, from coverage's JSON into docs/results/coverage.{json,md}.

    python tests/house/coverage_table.py .cache/coverage.json

Lines of the packages that a run of all tests went through, child processes included. Lines that
need a GPU, a network or a server of one's own do not run here; compiled functions are not seen.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from compare.provenance import origin  # noqa: E402
from train.files import write_json, write_text  # noqa: E402

LEAST_SHOWN = 80.0
"""A file with less of its lines run is named."""


def by_package(files: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Lines and lines run of every package, and of all: name -> lines, run, percent.

    Args:
        files: path -> coverage's entry, with `summary`.
    """
    lines: Counter[str] = Counter()
    run: Counter[str] = Counter()
    for path, entry in files.items():
        for name in (path.partition("/")[0], "all"):
            lines[name] += entry["summary"]["num_statements"]
            run[name] += entry["summary"]["covered_lines"]
    return {
        name: {"lines": n, "run": run[name], "percent": round(100 * run[name] / max(1, n), 1)}
        for name, n in sorted(lines.items(), key=lambda pair: (pair[0] == "all", pair[0]))
    }


def page(record: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    rows = [f"| {name} | {entry['lines']} | {entry['run']} | {entry['percent']:.1f} |"
            for name, entry in record["packages"].items()]  # fmt: skip
    least = [f"* `{name}`: {percent:.1f} %" for name, percent in record["least"].items()]
    commit = record["commit"][:12]
    return "\n".join([
        "# Coverage", "",
        f"Lines that the tests run, launches included: `make coverage`, commit {commit}.",
        "What needs a GPU, a network or a server of one's own does not run here, and what numba",
        "compiles is not seen (`merge/kernels*.py`, `environments/sparse.py`).", "",
        "| package | lines | run | % |", "| --- | ---: | ---: | ---: |", *rows, "",
        f"Files with less than {LEAST_SHOWN:.0f} %:", "", *least, "",
    ])  # fmt: skip


def main() -> None:
    """Reads the file that is named, writes both results."""
    files = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["files"]
    percents = {path: entry["summary"]["percent_covered"] for path, entry in files.items()
                if entry["summary"]["num_statements"]}  # fmt: skip
    ordered = sorted(percents.items(), key=lambda pair: pair[1])
    least = {path: round(percent, 1) for path, percent in ordered if percent < LEAST_SHOWN}
    record = {**origin("make coverage"), "packages": by_package(files), "least": least}
    write_json(ROOT / "docs/results/coverage.json", record)
    write_text(ROOT / "docs/results/coverage.md", page(record))
    print(page(record))


if __name__ == "__main__":
    main()
