"""The page of a report: the records of one or several studies put together, and written.

    write_report_page("report/compare.html", [Record("comparison", "compare", summary, csv)], ...)

A record is known by its content: a comparison has `target`, a floor has `differences` of a
`reference`, an ablation also `axes`, a transfer has `worlds`, a merge.json has `tensors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.merges import merge_sections
from compare.page import DETAILS, MAX_BYTES, Arms, Detail, Page, Section, facts, render, write_page
from compare.page_comparison import comparison_sections
from compare.page_data import curves_of
from compare.page_parts import Comparison
from compare.page_studies import ablation_sections, floor_sections, transfer_sections
from compare.verdict import Verdict, comparison_verdict, floor_verdict, reference_of, seeds_text
from train.settings import asked_words

_UNSHOWABLE = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What making a page of wrong values ends in."""
_TYPES: Mapping[str, Mapping[str, type]] = {
    "comparison": {"target": dict, "target.arm": str, "arms": dict},
    "floor": {"reference": str, "arms": dict, "seeds": list},
    "ablation": {"reference": str, "arms": dict, "seeds": list, "axes": list},
    "transfer": {"worlds": dict, "arms": dict, "seeds": list},
    "merge": {"parents": dict, "groups": dict, "totals": dict, "tensors": dict},
}
"""What the parts are of which a page is made."""


@dataclass(frozen=True)
class Record:
    """One file's content on a page.

    Attributes:
        kind: comparison, floor, ablation, transfer or merge.
        name: of the file without suffix; of a merge the folder.
        data: content of the json file.
        csv: content of the csv file beside it, where it is read.
    """

    kind: str
    name: str
    data: Mapping[str, Any]
    csv: str | None = None


def kind_of(data: Any) -> str | None:
    """What a json file's content is, or None."""
    if not isinstance(data, dict):
        return None
    keys = set(data)
    if {"schema_version", "method", "tensors", "parents", "groups", "totals"} <= keys:
        return "merge"
    if {"target", "arms"} <= keys:
        return "comparison"
    if {"axes", "arms", "reference", "seeds"} <= keys:
        return "ablation"
    if {"worlds", "arms", "seeds"} <= keys:
        return "transfer"
    if {"reference", "arms", "seeds", "differences"} <= keys:
        return "floor"
    return None


def read_record(path: str | Path) -> Record:
    """Read a json file that a page can show.

    Raises:
        CompareError: no such file, no JSON, or content that no page knows or can show.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(
            f"--with {path}: cannot be read ({error.strerror}); name a report's json"
        ) from error
    except RecursionError as error:
        raise CompareError(f"--with {path}: is nested too deep; name a report's json") from error
    except ValueError as error:
        raise CompareError(f"--with {path}: not JSON ({error}); name a report's json") from error
    kind = kind_of(data)
    if kind is None:
        raise CompareError(
            f"--with {path}: not a file that a page shows; name the json of a comparison, of "
            "`obm study` floor, ablation or transfer, or a merge.json"
        )
    for key, wanted in _TYPES[kind].items():
        value = data
        for part in key.split("."):
            value = value.get(part)
        if not isinstance(value, wanted) or (key == "arms" and not value):
            found = "empty" if value == {} else type(value).__name__
            raise CompareError(
                f"--with {path}: {key} is {found}, which no {kind} has; restore the file, or leave "
                "it out"
            )
    beside = path.with_suffix(".csv")
    csv = _read_csv(beside) if kind == "comparison" and beside.is_file() else None
    record = Record(kind, path.parent.name if kind == "merge" else path.stem, data, csv)
    _check_shown(record, path)
    return record


def _read_csv(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise CompareError(
            f"{path}: cannot be read ({reason}); restore it, or take it away"
        ) from error


def _check_shown(record: Record, path: Path) -> None:
    """Refuse a record that no page can be made of, before anything is written.

    What a page uses lies many levels deep, so it is made once to find out.
    """
    try:
        render(build_page([record], title=""))
    except _UNSHOWABLE as error:
        raise CompareError(
            f"--with {path}: cannot be shown as a {record.kind} ({type(error).__name__}: {error}); "
            "restore the file, or leave it out"
        ) from error


def write_report_page(
    path: str | Path,
    records: Sequence[Record],
    *,
    title: str,
    files: Sequence[str] = (),
) -> Detail:
    """Write the page of some records; where it would grow too large, with less detail.

    Args:
        path: of the html file.
        records: the first says what the verdict is about.
        title: heading.
        files: names of files beside the page, to link to.

    Returns:
        How much detail is in it.

    Raises:
        CompareError: it is larger than 5 MB with the least detail.
    """
    for detail in DETAILS:
        page = build_page(records, title=title, files=files, detail=detail)
        if detail is DETAILS[-1] or len(render(page).encode()) <= MAX_BYTES:
            break
    write_page(path, page)
    return detail


def build_page(
    records: Sequence[Record],
    *,
    title: str,
    files: Sequence[str] = (),
    detail: Detail = DETAILS[0],
) -> Page:
    """The page before it is text; arguments as for `write_report_page`."""
    arms = Arms(name for record in records for name in _arms_of(record))
    first = records[0]
    sections: list[Section] = []
    seen: dict[str, int] = {}
    for record in records:
        seen[record.kind] = seen.get(record.kind, 0) + 1
        prefix = "" if seen[record.kind] == 1 else f"{record.kind}{seen[record.kind]}-"
        made = _sections(record, arms, detail, prefix)
        if prefix and record.kind != "merge":
            made = [Section(s.ident, f"{s.title} ({record.name})", s.body) for s in made]
        sections += made
    sections.append(_provenance(records, files, detail))
    return Page(
        title=title,
        eyebrow={"comparison": "warm starts, trained and compared"}.get(
            first.kind, "warm starts, measured"
        ),
        lead=_lead(first),
        arms=arms,
        verdict=_verdict(first, arms),
        sections=sections,
        foot=f"Made at commit {first.data.get('commit', 'unknown')}. This page loads nothing and "
        "sends nothing.",
    )


def _arms_of(record: Record) -> Iterable[str]:
    # points of an ablation and tasks of a merge have no colour of their own
    if record.kind == "ablation":
        return [record.data["reference"]]
    if record.kind == "comparison":
        # who is judged, and what it has to reach, come first
        first = (reference_of(record.data), record.data["target"]["arm"])
        return [*(arm for arm in first if arm in record.data["arms"]), *record.data["arms"]]
    return [] if record.kind == "merge" else list(record.data["arms"])


def _sections(record: Record, arms: Arms, detail: Detail, prefix: str) -> list[Section]:
    if record.kind == "comparison":
        found = curves_of(record.data, record.csv)
        curves = {arm: found[arm] for arm in arms.names if arm in found}
        reference = reference_of(record.data)
        return comparison_sections(Comparison(record.data, curves, arms, detail, reference, prefix))
    if record.kind == "floor":
        return floor_sections(record.data, arms, detail, prefix)
    if record.kind == "ablation":
        return ablation_sections(record.data, arms, detail, prefix)
    if record.kind == "transfer":
        return transfer_sections(record.data, arms, detail, prefix)
    return merge_sections(record.data, record.name, prefix)


def _verdict(record: Record, arms: Arms) -> Verdict | None:
    if record.kind == "comparison":
        return comparison_verdict(record.data, arms.label, reference_of(record.data))
    return floor_verdict(record.data, arms.label) if record.kind == "floor" else None


def _lead(record: Record) -> str:
    asked = record.data.get("evaluation") or record.data.get("environment") or {}
    if not asked.get("eval_size"):
        return ""
    if record.kind == "comparison":
        counts = [len(result["seeds"]) for result in record.data["arms"].values()]
    else:
        counts = [len(record.data["seeds"])]
    return f"{asked_words(asked)} a seed, greedy; {seeds_text(counts)} a start."


def _provenance(records: Sequence[Record], files: Sequence[str], detail: Detail) -> Section:
    body = f'<p class="notice">{escape(detail.note)}; the csv has all.</p>' if detail.note else ""
    for record in records:
        if record.kind == "merge":
            continue
        data = record.data
        pairs = [("commit", escape(str(data.get("commit", "not recorded"))))]
        if data.get("run_commits"):
            pairs.append(("commits of the runs", escape(", ".join(data["run_commits"]))))
        if data.get("hardware"):
            pairs.append(("hardware", escape(str(data["hardware"]))))
        if data.get("interval"):
            pairs.append(("interval", escape(str(data["interval"]))))
        if data.get("seeds"):
            pairs.append(("seeds", escape(", ".join(map(str, data["seeds"])))))
        if data.get("versions"):
            pairs.append(("versions", escape(_versions(data["versions"]))))
        pairs += _comparable(data.get("comparable") or {})
        heading = f"<h3>{escape(record.name)}</h3>" if len(records) > 1 else ""
        command = escape(str(data.get("command", "not recorded")))
        body += f'<div class="made">{heading}<pre>{command}</pre>{facts(pairs)}</div>'
    if files:
        links = ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in files)
        body += facts([("files beside this page", links)])
    return Section("how", "How it was made", body)


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {' or '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in versions.items()
    )


def _comparable(comparable: Mapping[str, Any]) -> list[tuple[str, str]]:
    differences = comparable.get("differences") or []
    if not differences:
        return []
    text = "; ".join(f"{entry['setting']}: {' or '.join(entry['values'])}" for entry in differences)
    return [("settings that differ", escape(text))]
