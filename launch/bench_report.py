"""What `obm bench merge` found: medians, targets, page; targets and endings for other benches."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from launch.bench_files import SIZES

Measurement = dict[str, Any]

TIMES_LESS = 20.0
TIMES_LESS_TASK_ARITHMETIC = 4.0
PEAK_GB = 0.5
OVER_WARM_COPY = 2.5
OVER_COLD_COPY = 1.5
JUDGED_THREADS = 2
FIGURES = ("wall_s", "cpu_s", "peak_rss_gb", "peak_anon_gb", "load")


def medians(runs: Sequence[Measurement]) -> list[Measurement]:
    """One row for each size and run, in the order of their first measurement.

    Returns:
        Rows with the figures' medians, `fastest_s` (the shortest wall time) and `repeats`.
    """
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for run in runs:
        groups.setdefault((run["size"], run["run"]), []).append(run)
    kept = ("size", "run", "tool", "method", "threads", "cache")
    return [
        {key: group[0][key] for key in kept}
        | {figure: median(run[figure] for run in group) for figure in FIGURES}
        | {"fastest_s": min(run["wall_s"] for run in group), "repeats": len(group)}
        for group in groups.values()
    ]


def find(
    rows: Sequence[Measurement], size: str, tool: str, method: str, threads: int, cache: str
) -> Measurement | None:
    """The row of one run, or None if it was not measured."""
    wanted = {"size": size, "tool": tool, "method": method, "threads": threads, "cache": cache}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def fastest_copy(rows: Sequence[Measurement], size: str, cache: str) -> float | None:
    """Wall seconds of the fastest raw copy, of either kind and any repeat; None without copies.

    The least that the bytes take: what the first write of a page costs depends on the host.
    """
    copies = [row for row in rows if (row["size"], row["tool"]) == (size, "copy")]
    return min((row["fastest_s"] for row in copies if row["cache"] == cache), default=None)


def is_ours(row: Measurement) -> bool:
    """Whether the merge was ours, with numba or without."""
    return str(row["tool"]).startswith("ours")


def judge(runs: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The targets of all sizes that were measured: name, value, target, met.

    Ours is judged with two threads, by its median, and the raw copy is the fastest one. Memory is
    the highest of all our runs, not the median.
    """
    rows = medians(runs)
    targets = []
    for size in dict.fromkeys(row["size"] for row in rows):
        for method in ("ties", "obm", "task_arithmetic"):
            targets += _judge_method(rows, size, method)
        peaks = [
            run["peak_rss_gb"] for run in runs if run["size"] == size and is_ours(run)
        ]  # fmt: skip
        targets.append(at_most(f"{size}: peak memory of all our runs, GB", max(peaks), PEAK_GB))
    return targets


def _judge_method(rows: Sequence[Measurement], size: str, method: str) -> list[dict[str, Any]]:
    ours = find(rows, size, "ours", method, JUDGED_THREADS, "warm")
    cold = find(rows, size, "ours", method, JUDGED_THREADS, "cold")
    peer_method = "task_arithmetic" if method == "task_arithmetic" else "ties"
    peer = find(rows, size, "mergekit", peer_method, 0, "warm")
    targets = []
    if ours and peer:
        least = TIMES_LESS_TASK_ARITHMETIC if method == "task_arithmetic" else TIMES_LESS
        judged = {"CPU": "cpu_s", "wall": "wall_s"}
        for words, figure in judged.items():
            if figure == "cpu_s" or method != "task_arithmetic":
                name = f"{size}: {method}, times less {words} than mergekit's {peer_method}"
                targets.append(at_least(name, peer[figure] / ours[figure], least))
    for row, cache, most in ((ours, "warm", OVER_WARM_COPY), (cold, "cold", OVER_COLD_COPY)):
        copy_s = fastest_copy(rows, size, cache)
        if row and copy_s:
            name = f"{size}: {method}, wall over fastest {cache} raw copy"
            targets.append(at_most(name, row["wall_s"] / copy_s, most))
    return targets


def at_least(name: str, value: float, target: float) -> dict[str, Any]:
    """A target that is met by this value or more."""
    return {
        "name": f"{name} (at least)",
        "value": round(value, 2),
        "target": target,
        "met": value >= target,
    }


def at_most(name: str, value: float, target: float) -> dict[str, Any]:
    """A target that is met by this value or less."""
    return {
        "name": f"{name} (at most)",
        "value": round(value, 3),
        "target": target,
        "met": value <= target,
    }


def render_table(rows: Sequence[Measurement]) -> str:
    """The measurements as a Markdown table, with ratios to the fastest copy and mergekit's TIES."""
    lines = [
        "| size | run | n | wall s | CPU s | peak GB | of it anonymous | wall / fastest warm copy "
        "| mergekit TIES wall / this | mergekit TIES CPU / this | load |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        copy_s = fastest_copy(rows, row["size"], "warm")
        peer = find(rows, row["size"], "mergekit", "ties", 0, "warm")
        cells = [
            row["size"], row["run"], str(row["repeats"]), f"{row['wall_s']:.2f}",
            f"{row['cpu_s']:.2f}", f"{row['peak_rss_gb']:.3f}", f"{row['peak_anon_gb']:.3f}",
            f"{row['wall_s'] / copy_s:.1f}" if copy_s else "",
            *(_ratio(peer if is_ours(row) else None, row, key) for key in ("wall_s", "cpu_s")),
            f"{row['load']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(above: Measurement | None, below: Measurement | None, figure: str) -> str:
    if above is None or below is None or not below[figure]:
        return ""
    return f"{above[figure] / below[figure]:.1f}"


def target_lines(targets: Sequence[Measurement]) -> list[str]:
    """One line for each target: what was found, what it should be, and whether it is."""
    return [
        f"* {target['name']}: {target['value']}, target {target['target']:g} "
        f"({'met' if target['met'] else 'missed'})"
        for target in targets
    ]


def ending(record: Measurement) -> list[str]:
    """Last lines of a bench's page: its targets, and what made it."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        *target_lines(record["targets"]),
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}, "
        f"with {versions}.",
    ]


def render_page(record: dict[str, Any]) -> str:
    """docs/results/bench-merge.md from the content of bench-merge.json."""
    rows = medians(record["runs"])
    files = []
    for size in dict.fromkeys(row["size"] for row in rows):
        n_bytes = SIZES[size].n_bytes
        sparse = ", sparse" if SIZES[size].is_sparse else ""
        files.append(f"{size}: {3 * n_bytes / 1e9:.2f} GB in, {n_bytes / 1e9:.2f} GB out{sparse}")
    lines = [
        "# Merging beside mergekit and beside a raw copy",
        "",
        f"Synthetic Qwen2-shaped trios in bf16 ({'; '.join(files)}): they measure bytes and work, "
        "not quality. Each row is a command in a process of its own, start-up included; medians "
        "over n measurements, tools in turn. TIES and OBM keep "
        f"{record['density']:.0%} of each task vector; OBM merges linears, and TIES the rest. "
        "mergekit computes in bf16, its default; ours in fp32.",
        "",
        render_table(rows),
        "",
        "* Peak is the largest resident memory that the system counted, pages of mapped files "
        "included; anonymous is what no file backs, sampled every 50 ms.",
        "* copy reads all three inputs and writes one output in blocks of 4 MiB. `fsync` waits "
        "until the disk has the output, which neither tool does. Ratios are to the fastest copy of "
        "all repeats, plain or fsync, warm or cold as the target says: what a first write costs "
        "depends on the host, and the fastest shows what the bytes take.",
        "* cold: the inputs were dropped from the page cache before. load: the system's load "
        "average at the start; other work on the machine shows here.",
        "* ours numpy: `OBM_KERNELS=numpy`, without numba.",
        "* A sparse trio is mostly holes that read as zero: it shows memory, not speed.",
        "",
        "What numba compiles once, on the tiny trio:",
        "",
        "| method | first run CPU s | wall s | second run CPU s | wall s |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['method']} | {row['first_cpu_s']:.2f} | {row['first_wall_s']:.2f} "
            f"| {row['second_cpu_s']:.2f} | {row['second_wall_s']:.2f} |"
            for row in record["compiled"]
        ),
        "",
        *ending(record),
    ]
    return "\n".join(lines) + "\n"
