"""Measure what the documentation promises about this tool itself.

cli           processor time of every verb's --help, target 0.5 s each (the default)
merge         the merge beside mergekit and beside a raw copy of the same bytes
calibration   what collecting statistics adds to a forward pass
rewards       how fast answers are checked, and what tricks earn
serve         the search server beside Search-R1's, under load
rollout       rollout and GRPO step beside stock TRL's tool loop

Each writes bench-NAME.json; merge, serve and rollout write a page as well. The exit code is 1 if a
target is missed and --allow-missed is not given.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

EXAMPLES = (
    "obm bench",
    "obm bench merge --sizes 0.5b,1.5b,7b --output runs/bench",
    "obm bench cli merge --sizes tiny --peer none --output runs/bench",
    "obm bench rollout --policies tiny --growth none --output runs/bench",
)
NAMES = ("cli", "merge", "calibration", "rewards", "serve", "rollout")
HELP_TARGET_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and where to write."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--output", metavar="DIR", default="docs/results", help="default: docs/results"
    )
    parser.add_argument(
        "--allow-missed", action="store_true",
        help="exit code 0 where a target is missed; what was written says so",
    )  # fmt: skip
    merge = parser.add_argument_group("merge")
    merge.add_argument(
        "--sizes", default="0.5b,1.5b,7b", metavar="LIST",
        help="of tiny, 0.5b, 1.5b, 7b (default: 0.5b,1.5b,7b)",
    )  # fmt: skip
    merge.add_argument(
        "--peer", choices=("mergekit", "none"), default="mergekit",
        help="installed into .cache/mergekit-venv when it is missing",
    )  # fmt: skip
    merge.add_argument(
        "--repeats", type=int, default=3, help="measurements of ours and the copy (default: 3)"
    )
    merge.add_argument(
        "--peer-repeats", type=int, default=1, help="measurements of the peer (default: 1)"
    )
    merge.add_argument(
        "--work", metavar="DIR", default="runs", help="disk for the files (default: runs)"
    )
    merge.add_argument("--keep", action="store_true", help="leave the files for another run")
    rewards = parser.add_argument_group("rewards")
    rewards.add_argument(
        "--answers", type=int, default=1_000_000, metavar="N", help="default: a million"
    )
    serve = parser.add_argument_group("serve")
    serve.add_argument(
        "--passages", type=int, default=1_000_000, metavar="N",
        help="of the synthetic corpus (default: 1000000)",
    )  # fmt: skip
    serve.add_argument(
        "--search-peer", choices=("lucene", "bm25s", "none"), default="lucene",
        help="searcher of the peer, installed into .cache/pyserini-venv (default: lucene)",
    )  # fmt: skip
    serve.add_argument(
        "--seconds", type=float, default=8, help="of load for each number of clients (default: 8)"
    )
    rollout = parser.add_argument_group("rollout")
    rollout.add_argument(
        "--policies", default="tiny,80m", metavar="LIST",
        help="of tiny, 20m, 80m (default: tiny,80m)",
    )  # fmt: skip
    rollout.add_argument(
        "--growth", choices=("tiny", "20m", "80m", "none"), default="tiny",
        help="policy for the growth with group, turns and prompt (default: tiny)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measure, print, write bench-NAME.json; exit code 1 if a target is missed (see above)."""
    for name in options.names:
        if name not in NAMES:
            raise LaunchError(f"there is no bench {name!r}; choose of {', '.join(NAMES)}")
    measure = {
        "cli": bench_cli,
        "merge": _bench_merge,
        "calibration": _bench_calibration,
        "rewards": _bench_rewards,
        "serve": _bench_serve,
        "rollout": _bench_rollout,
    }
    all_met = True
    for name in dict.fromkeys(options.names or ["cli"]):
        record = measure[name](options)
        _write(Path(options.output), name, record)
        all_met &= all(target["met"] for target in record["targets"])
    return 0 if all_met or options.allow_missed else 1


def bench_cli(options: argparse.Namespace) -> dict[str, Any]:
    """Processor time of every --help."""
    from launch.cli import VERBS

    targets = []
    for arguments in ([], *([verb] for verb in VERBS)):
        seconds = min(cpu_seconds([*arguments, "--help"]) for _ in range(3))
        name = " ".join(["obm", *arguments, "--help"])
        met = seconds <= HELP_TARGET_S
        targets.append(
            {"name": name, "value": round(seconds, 3), "target": HELP_TARGET_S, "met": met}
        )
        print(f"{name.ljust(24)} {seconds:.3f} s")
    return {"targets": targets}


def cpu_seconds(arguments: list[str]) -> float:
    """Processor time of the console script with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _bench_merge(options: argparse.Namespace) -> dict[str, Any]:
    from launch.bench_files import SIZES
    from launch.bench_merge import DENSITY, bench_merge, versions
    from launch.bench_report import judge

    sizes = list(dict.fromkeys(options.sizes.lower().split(",")))
    for size in sizes:
        if size not in SIZES:
            raise LaunchError(f"--sizes: {size!r} is unknown; choose of {', '.join(SIZES)}")
    if options.repeats < 1 or options.peer_repeats < 1:
        raise LaunchError("--repeats and --peer-repeats have to be 1 or more")
    peer = options.peer != "none"
    runs, compiled = bench_merge(
        sizes,
        Path(options.work) / "bench-merge",
        peer=peer,
        repeats=options.repeats,
        peer_repeats=options.peer_repeats,
        keep=options.keep,
    )
    return {
        "targets": judge(runs),
        "density": DENSITY,
        "versions": versions(peer),
        "compiled": compiled,
        "runs": runs,
    }


def _bench_calibration(options: argparse.Namespace) -> dict[str, Any]:
    from launch.bench_calibration import bench_calibration

    targets = bench_calibration()
    _print_targets(targets)
    return {"targets": targets}


def _bench_rewards(options: argparse.Namespace) -> dict[str, Any]:
    from launch.bench_rewards import bench_rewards

    if options.answers < 10:
        raise LaunchError("--answers has to be 10 or more")
    record = bench_rewards(options.answers)
    for row in record["speeds"]:
        print(
            f"{row['name'].ljust(24)} {row['n']:>9,}  {row['s']:8.2f} s  {row['us']:7.1f} µs each"
        )
    _print_targets(record["targets"])
    return record


def _bench_serve(options: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    from launch.bench_serve import PYSERINI, bench_serve
    from launch.bench_serve_report import judge

    if options.passages < 1000 or options.seconds <= 0:
        raise LaunchError("--passages has to be 1000 or more and --seconds above 0")
    record = bench_serve(
        Path(options.work) / "bench-serve",
        n_passages=options.passages,
        seconds=options.seconds,
        peer=options.search_peer,
        keep=options.keep,
    )
    versions = {name: version(name) for name in ("starlette", "uvicorn", "numba", "numpy")}
    if options.search_peer == "lucene":
        versions["pyserini"] = PYSERINI.partition("==")[2]
    return {"targets": judge(record), "versions": versions, **record}


def _bench_rollout(options: argparse.Namespace) -> dict[str, Any]:
    from launch.bench_rollout import POLICIES, bench_rollout, judge, plan, versions

    policies = list(dict.fromkeys(options.policies.lower().split(",")))
    for policy in policies:
        if policy not in POLICIES:
            raise LaunchError(f"--policies: {policy!r} is unknown; choose of {', '.join(POLICIES)}")
    growth = None if options.growth == "none" else options.growth
    runs = bench_rollout(list(plan(policies, growth)), Path(options.work) / "bench-rollout")
    return {"targets": judge(runs), "versions": versions(), "runs": runs}


def _print_targets(targets: list[dict[str, Any]]) -> None:
    for target in targets:
        word = "met" if target["met"] else "MISSED"
        print(f"{target['name']}: {target['value']} (target {target['target']:g}, {word})")


def _write(output: Path, name: str, record: dict[str, Any]) -> None:
    """Writes bench-NAME.json and, where there is one, the page."""
    from compare.provenance import origin
    from launch.arguments import command_line
    from train.files import write_json, write_text

    record = {
        **origin(command_line()),
        **record,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"bench-{name}.json", record)
    if name == "merge":
        from launch.bench_report import medians, render_page, render_table

        print(f"\n{render_table(medians(record['runs']))}\n")
        _print_targets(record["targets"])
        write_text(output / "bench-merge.md", render_page(record))
    if name == "rewards":
        from launch.bench_rewards import render_page as render_rewards

        write_text(output / "bench-rewards.md", render_rewards(record))
    if name == "serve":
        from launch.bench_serve_report import render_page as render_serve_page

        _print_targets(record["targets"])
        write_text(output / "bench-serve.md", render_serve_page(record))
    if name == "rollout":
        from launch.bench_rollout_report import draw_growth
        from launch.bench_rollout_report import render_page as render_rollout_page

        _print_targets(record["targets"])
        write_text(output / "bench-rollout.md", render_rollout_page(record))
        if any(run["part"] != "headline" for run in record["runs"]):
            pictures = [output / f"bench-rollout.{kind}" for kind in ("svg", "png")]
            draw_growth(record["runs"], pictures, f"One thread of {record['hardware']}.")
