"""The report of a comparison: one summary, written as json, csv, md, html, png and svg.

    obm compare runs/demo/runs/* --output runs/demo/report

The summary's numbers are means over seeds; `intervals` holds their 95 % limits and `per_seed` what
they were made from. docs/metrics.md defines each.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from compare.behaviour import add_behaviour
from compare.comparable import check_comparable
from compare.errors import CompareError
from compare.intervals import BOOTSTRAP_MIN_SEEDS
from compare.measures import Recognition
from compare.parts import parts_section, parts_summary
from compare.provenance import hardware
from compare.rows import csv_text, markdown_table
from compare.runs import SINCE_START, Run, cut_to_common_steps, group_runs
from compare.summary import summarise
from compare.tables import code, overview_rows, sections
from compare.verdict import seeds_text, target_words
from train.machine import code_commit
from train.settings import asked_words

SUFFIXES = ("json", "csv", "md", "html", "png", "svg")
MAX_NAME_BYTES = 200
"""A file name holds 255, of which suffixes take some."""


def write_report(
    runs: Sequence[Run],
    output: str | Path,
    *,
    command: str,
    name: str = "compare",
    title: str = "Comparison",
    target_arm: str = "vlm",
    smoothing: int = 3,
    bootstrap: int = 2000,
    reference: str | None = None,
    budget_arm: str | None = None,
    recognition: Recognition | None = None,
    allow: Sequence[str] = (),
    partial: bool = False,
    overwrite: bool = False,
    beside: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Check the runs, summarise them, and write `<name>.json .csv .md .html .png .svg`.

    Args:
        runs: training runs and zero-shot evaluations.
        output: folder, made where missing.
        command: the command line that makes this report; printed in it.
        name: file name without suffix.
        title: heading of the md file.
        target_arm: see `summarise`.
        smoothing: see `summarise`.
        bootstrap: see `summarise`.
        reference: see `summarise`.
        budget_arm: see `summarise`.
        recognition: see `summarise`.
        allow: settings that may differ; see `compare.comparable.check_comparable`.
        partial: cut the runs to the evaluations they share.
        overwrite: replace a report of that name.
        beside: json files of other studies and merges that the html page shows too; see
            `compare.report_page.read_record`.

    Returns:
        The summary as written to the json file.

    Raises:
        CompareError: nothing to compare, runs that differ in more than their start, or a report is
            there already, or a file beside it that no page shows.
    """
    from compare.figure import draw
    from compare.report_page import Record, read_record, write_report_page

    if not runs:
        raise CompareError("nothing to compare; name at least one run folder")
    output = Path(output)
    paths = _free_paths(output, name, overwrite=overwrite)
    shown = [read_record(file) for file in beside]
    arms = group_runs(runs)
    if reference is not None:
        check_arm("--reference", reference, arms)
    kept = [run for members in arms.values() for run in members]
    if partial:
        cut_to_common_steps(kept)
    comparable = check_comparable(kept, allow)
    for run in kept:
        add_behaviour(run)

    summary = summarise(
        arms, target_arm=target_arm, smoothing=smoothing, bootstrap=bootstrap,
        reference=reference, budget_arm=budget_arm, recognition=recognition,
    )  # fmt: skip
    for arm, members in arms.items():
        summary["arms"][arm]["reward_parts"] = parts_summary(members)
    summary |= _provenance(arms, command=command, smoothing=smoothing)
    summary |= {"comparable": comparable, "bootstrap": bootstrap}
    caption = _caption(summary)
    temporary = {suffix: output / f".{name}.tmp.{suffix}" for suffix in SUFFIXES}
    try:
        output.mkdir(parents=True, exist_ok=True)
        temporary["json"].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        table = _csv(arms)
        temporary["csv"].write_text(table, encoding="utf-8")
        temporary["md"].write_text(_markdown(summary, title, name, caption), encoding="utf-8")
        write_report_page(
            temporary["html"], [Record("comparison", name, summary, table), *shown], title=title,
            files=[f"{name}.{suffix}" for suffix in SUFFIXES if suffix != "html"],
        )  # fmt: skip
        draw(
            arms, summary, [temporary["png"], temporary["svg"]],
            smoothing=smoothing, bootstrap=bootstrap, caption=caption,
        )  # fmt: skip
        for suffix in SUFFIXES:
            os.replace(temporary[suffix], paths[suffix])
    except OSError as error:
        raise _not_writable(output, error) from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):  # where no folder could be made
                path.unlink()
    return summary


def check_arm(option: str, arm: str, arms: Iterable[str]) -> None:
    """Refuse an option that names an arm of no run.

    Raises:
        CompareError: it is not among `arms`; says which there are.
    """
    known = list(dict.fromkeys(arms))
    if arm not in known:
        raise CompareError(f"{option} {arm}: no such arm; there are {', '.join(known)}")


def _free_paths(output: Path, name: str, *, overwrite: bool) -> dict[str, Path]:
    """The report's files by suffix.

    Raises:
        CompareError: no file can have that name, or one is there.
    """
    if name in ("", ".", "..") or "/" in name or os.sep in name:
        raise CompareError(f"--name {name!r}: not the name of a file; --output says in what folder")
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise CompareError(
            f"--name {name[:20]}...: has more than {MAX_NAME_BYTES} bytes; write a shorter one"
        )
    paths = {suffix: output / f"{name}.{suffix}" for suffix in SUFFIXES}
    try:
        present = [path for path in paths.values() if path.exists()]
    except OSError as error:
        raise _not_writable(output, error) from error
    if present and not overwrite:
        raise CompareError(
            f"{present[0]} exists; pass --overwrite, another --output or another --name"
        )
    for path in present:
        if path.is_dir():
            raise CompareError(f"{path} is a folder; pass another --output or another --name")
    return paths


def _not_writable(output: Path, error: OSError) -> CompareError:
    return CompareError(
        f"--output {output}: cannot be written ({error.strerror}); name a folder that can be made"
    )


def text_table(summary: dict[str, Any]) -> str:
    """The summary as aligned columns for a terminal."""
    rows = overview_rows(summary)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _provenance(arms: dict[str, list[Run]], *, command: str, smoothing: int) -> dict[str, Any]:
    runs = [run for members in arms.values() for run in members]
    machines = _distinct(_machine(run.provenance) for run in runs)
    settings = runs[0].config.get("environment") or {}
    asked = ["name", "eval_split", "eval_size", "eval_kinds", "strength"]
    asked += ["eval_benchmark"] if settings.get("eval_benchmark") else []
    return {
        "command": command,
        "commit": code_commit(),
        "run_commits": _distinct(_describe(run.provenance.get("commit")) for run in runs),
        "hardware": "; ".join(machines) or hardware(),
        "versions": _versions(runs),
        "smoothing": smoothing,
        "interval": interval_name(*(len(members) for members in arms.values())),
        "evaluation": {key: settings.get(key) for key in asked},
    }


def interval_name(*n_seeds: int) -> str:
    """How the intervals of arms with so many seeds are made, in words."""
    several = [n for n in n_seeds if n > 1]
    if not several:
        return "none: one seed"
    counts = {
        "bootstrap": [n for n in several if n >= BOOTSTRAP_MIN_SEEDS],
        "Student's t": [n for n in several if n < BOOTSTRAP_MIN_SEEDS],
    }
    kinds = [f"{kind} over {seeds_text(found)}" for kind, found in counts.items() if found]
    return f"95 %, {', '.join(kinds)}"


def _versions(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Package -> the versions that the runs had, as their environment.json says."""
    recorded = [run.provenance.get("versions") or {} for run in runs]
    names = dict.fromkeys(name for one in recorded for name in one)
    return {name: _distinct(_describe(one.get(name)) for one in recorded) for name in names}


def _machine(provenance: dict[str, Any]) -> str:
    cores = provenance.get("cores")
    machine = _describe(provenance.get("hardware"))
    return f"{machine}, {cores} cores" if machine and cores else machine


def _describe(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _caption(summary: dict[str, Any]) -> str:
    seeds = max(len(result["seeds"]) for result in summary["arms"].values())
    return (
        f"{asked_words(summary['evaluation'])}, greedy. "
        f"Up to {seeds} seed{'s' if seeds > 1 else ''} an arm. "
        f"Bold: mean over seeds of the last {summary['smoothing']} evaluations; "
        f"faint points: raw. Band and whiskers: {summary['interval']}. "
        f"Hardware: {summary['hardware']}."
    )


def _csv(arms: dict[str, list[Run]]) -> str:
    """One row an evaluation: arm, seed, step, time, tokens, then every metric that any run has."""
    runs = [run for members in arms.values() for run in members]
    head = ["arm", "seed", *SINCE_START]
    names = sorted({key for run in runs for line in run.evaluations for key in line} - set(head))
    lines = [{**line, "arm": run.arm, "seed": run.seed} for run in runs for line in run.evaluations]
    return csv_text([*head, *names], lines)


def _markdown(summary: dict[str, Any], title: str, name: str, caption: str) -> str:
    run_commits = ", ".join(summary["run_commits"]) or "not recorded"
    lines = [
        f"# {title}",
        "",
        *_verdict_lines(summary),
        f"![floor, accuracy and search rates]({name}.png)",
        "",
        caption,
        "",
        *markdown_table(overview_rows(summary)),
        "",
        "Floor: step 0, before any update; `searched` any search, `entity` the right entity in a "
        "text query, `passage` a gold passage retrieved, `floor` the answer right. "
        "Ceiling: the best smoothed accuracy; the search rates beside it are taken there (for an "
        "arm without training: at step 0). Area: mean height of the accuracy curve. "
        f"Steps: to reach {target_words(summary, code)}{_too_low(summary)}; 0 for a start whose "
        "floor lies above it. "
        "Square brackets: the 95 % interval over seeds.",
        "",
        *_each_against_the_reference(summary),
        *sections(summary),
        *parts_section(summary["arms"]),
        "## How it was made",
        "",
        "```",
        summary["command"],
        "```",
        "",
        f"* commit of the report: {summary['commit']}; of the runs: {run_commits}",
        f"* hardware: {summary['hardware']}",
        *_allowed_lines(summary["comparable"]),
        f"* interval: {summary['interval']}; smoothing over {summary['smoothing']} evaluations",
        f"* every evaluation of every seed: [{name}.csv]({name}.csv); numbers: "
        f"[{name}.json]({name}.json); a page to read them on: [{name}.html]({name}.html)",
        "",
    ]
    return "\n".join(lines)


def _too_low(summary: dict[str, Any]) -> str:
    """Why a height stands in the place of a ceiling."""
    target = summary["target"]
    if "ceiling" not in target or target["value"] is None:
        return ""
    return (
        f", since the ceiling of `{target['arm']}` ({target['ceiling']:.3f}) is less than one "
        "question"
    )


def _allowed_lines(comparable: dict[str, Any]) -> list[str]:
    """What `--allow` let differ, with the values: a comparison of more than starts must say so."""
    lines = []
    for found in comparable["differences"]:
        values = ", ".join(
            f"{text} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
            for text, runs in found["values"].items()
        )
        lines.append(f"* **differs between the runs** (`--allow`): `{found['setting']}`: {values}")
    return lines


def _verdict_lines(summary: dict[str, Any]) -> list[str]:
    from compare.verdict import comparison_verdict

    verdict = comparison_verdict(summary, str)
    if verdict is None:
        return []
    return [f"**{verdict.headline}**", "", *(f"* {text}" for text in verdict.sentences), ""]


def _each_against_the_reference(summary: dict[str, Any]) -> list[str]:
    from compare.verdict import each_against, reference_of

    verdicts = each_against(summary, str)
    if not verdicts:
        return []
    head = f"## Each against {reference_of(summary)}"
    return [head, "", *(f"* **{arm}** {text}" for arm, text in verdicts.items()), ""]
