"""Evaluations as the table of arXiv 2603.01416: rows of methods, columns of benchmarks.

Each benchmark has accuracy, the share of episodes with an image search (SR_img) and with a text
search (SR_txt); behind them stand means over the benchmarks, with calls and the cost-aware score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare.curves import interval
from compare.provenance import how_it_was_made, origin
from train.files import write_json, write_text

GROUPS = (
    ("baseline", "Plain VLM"),
    ("merge", "Merged, not trained"),
    ("rl", "RL from each start"),
)
MODE_WORDS = {
    "direct": "direct answer",
    "prompted": "prompted agent",
    "rag": "RAG workflow",
    "agent": "agent",
}
MEANS = ("accuracy", "sr_any", "calls", "cas")
CELLS = ("accuracy", "sr_img", "sr_txt", "sr_any", "calls", "cas", "n")


def write_table(
    results: Sequence[dict[str, Any]],
    output: Path,
    *,
    name: str,
    title: str,
    command: str,
    benchmarks: dict[str, dict[str, Any]],
    training: str,
) -> dict[str, Any]:
    """Write NAME.json and NAME.md.

    Args:
        results: one an evaluation: row, arm, mode, seed, benchmark, metrics, intervals.
        output: folder.
        name: of the files.
        title: of the page.
        command: that made them.
        benchmarks: title -> what was asked and what scores it.
        training: the trainings in words.

    Returns:
        The content of the .json.
    """
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        row = rows.setdefault(result["row"], _new_row(result))
        row["benchmarks"].setdefault(result["benchmark"], []).append(result)
    table = {
        "title": title,
        **origin(command),
        "training": training,
        "benchmarks": benchmarks,
        "rows": [_finish_row(row) for row in rows.values()],
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{name}.json", table)
    write_text(output / f"{name}.md", "\n".join(_page(table, name)) + "\n")
    return table


def table_lines(table: dict[str, Any]) -> list[str]:
    """The table in Markdown, a line for each group's name."""
    titles = list(table["benchmarks"])
    head = ["method"]
    head += [f"{title}: {word}" for title in titles for word in ("Acc", "SR_img", "SR_txt")]
    head += ["mean Acc", "mean SR", "calls", "CAS"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for group, words in GROUPS:
        members = [row for row in table["rows"] if row["group"] == group]
        if members:
            lines.append(f"| **{words}** |{' |' * (len(head) - 1)}")
        lines += [_line(row, titles) for row in members]
    return lines


def _new_row(result: dict[str, Any]) -> dict[str, Any]:
    is_trained = result["seed"] is not None
    is_merge = not is_trained and result["mode"] == "agent"
    group = "rl" if is_trained else "merge" if is_merge else "baseline"
    words = MODE_WORDS[result["mode"]]
    label = {
        "rl": f"RL from {result['arm']}",
        "merge": result["arm"],
        "baseline": f"{result['arm']}, {words}",
    }[group]
    head = {key: result[key] for key in ("row", "arm", "mode")}
    return {**head, "label": label, "group": group, "benchmarks": {}}


def _finish_row(row: dict[str, Any]) -> dict[str, Any]:
    cells = {title: _cell(results) for title, results in row["benchmarks"].items()}
    means = {
        name: sum(cell[name]["value"] for cell in cells.values()) / len(cells) for name in MEANS
    }
    return {**row, "benchmarks": cells, "means": means}


def _cell(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of each metric, with an interval: over seeds, or over questions for one."""
    cell: dict[str, Any] = {"seeds": [result["seed"] for result in results]}
    for name in CELLS:
        values = [float(result["metrics"][name]) for result in results]
        if len(values) > 1:
            bounds = (0.0, 1.0) if name in ("accuracy", "sr_img", "sr_txt", "sr_any") else None
            estimate = interval(values, bounds=bounds)
            low_high = [estimate.low, estimate.high]
        else:
            low_high = results[0]["intervals"].get(name)
        mean = sum(values) / len(values)
        cell[name] = {"value": mean, "interval": low_high, "by_seed": values}
    official = [name for name in results[0]["metrics"] if name.startswith(("official/", "strict/"))]
    for name in official:
        known = [result["metrics"][name] for result in results if name in result["metrics"]]
        cell[name] = {"value": sum(known) / len(known), "by_seed": known}
    return cell


def _line(row: dict[str, Any], titles: Sequence[str]) -> str:
    has_tools = row["mode"] != "direct"
    words = [row["label"]]
    for title in titles:
        cell = row["benchmarks"][title]
        bounds = cell["accuracy"]["interval"]
        shown = f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
        words.append(f"{cell['accuracy']['value']:.2f}{shown}")
        words += [
            f"{cell[name]['value']:.2f}" if has_tools else "-" for name in ("sr_img", "sr_txt")
        ]
    means = row["means"]
    words.append(f"{means['accuracy']:.2f}")
    words += [f"{means['sr_any']:.2f}", f"{means['calls']:.2f}"] if has_tools else ["-", "-"]
    words.append(f"{means['cas']:.1f}")
    return f"| {' | '.join(words)} |"


def _readings(table: dict[str, Any]) -> list[str]:
    """The best of each group on each benchmark, and who searches by image."""
    lines = []
    for title in table["benchmarks"]:
        best = []
        for group, words in GROUPS:
            members = [row for row in table["rows"] if row["group"] == group]
            if members:
                cells = {row["label"]: row["benchmarks"][title]["accuracy"] for row in members}
                label = max(cells, key=lambda name: cells[name]["value"])
                n_beside = sum(_overlap(cells[label], cell) for cell in cells.values()) - 1
                beside = f" ({n_beside} of {len(cells) - 1} others not separated)"
                best.append(f"{words.lower()}: {label} {cells[label]['value']:.2f}{beside}")
        lines.append(f"* {title}: highest accuracy of {'; of '.join(best)}.")
    by_image = [
        row["label"]
        for row in table["rows"]
        if row["mode"] != "rag"
        and any(c["sr_img"]["value"] > 0 for c in row["benchmarks"].values())
    ]
    lines.append(
        "* Image search outside the workflow, where the program makes it: "
        + (", ".join(by_image) if by_image else "no row ever makes one")
        + "."
    )
    says = (
        "They say how another choice of questions would come out, not how another training would."
    )
    if any(len(c["seeds"]) > 1 for row in table["rows"] for c in row["benchmarks"].values()):
        says = (
            "Those over seeds say how another training would come out, the others how another "
            "choice of questions would."
        )
    return [*lines, f"* Not separated: the 95 % intervals overlap. {says}"]


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two cells' intervals have a point in common."""
    a, b = one["interval"], other["interval"]
    if not a or not b:
        return one["value"] == other["value"]
    return a[0] <= b[1] and b[0] <= a[1]


def _page(table: dict[str, Any], name: str) -> list[str]:
    lines = [f"# {table['title']}", "", *table_lines(table), ""]
    lines += [
        "Acc: share of right answers (exact match over the aliases), with the 95 % interval: a "
        "bootstrap over the entities asked about, or Student's t over the seeds where there are "
        "several. SR_img, SR_txt: share of episodes in which a tool answered an image search, a "
        "text search; mean SR: any of the two. calls: tool calls an episode. CAS: 100 Acc^2 / "
        "(thousands of tokens + 2 calls + 1), HyperEyes (arXiv 2605.07177). The means run over "
        "the benchmarks. Every evaluation is greedy.",
        "",
        "## What was asked",
        "",
        "| column | questions | n | official metric |",
        "| --- | --- | ---: | --- |",
    ]
    for title, about in table["benchmarks"].items():
        n = table["rows"][0]["benchmarks"][title]["n"]["value"]
        metrics = ", ".join(about["metrics"])
        lines.append(f"| {title} | {about['questions']} | {n:.0f} | {metrics} |")
    return [
        *lines,
        "",
        "## What it shows, and what not",
        "",
        *_readings(table),
        "",
        *how_it_was_made(
            table,
            f"RL: {table['training']}",
            "one merge and one evaluation a row before training",
            f"official metrics, strict twins, every seed: [{name}.json]({name}.json)",
        ),
    ]
