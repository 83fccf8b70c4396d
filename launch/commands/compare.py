"""Compare finished runs: floor, ceiling, cost to target, differences by seed, with intervals.

A RUN is a run folder, a folder that `obm eval` wrote (an arm with a floor only), a W&B offline
folder or .wandb file, or wandb://entity/project/run_id. Writes compare.json, .csv, .md, .html, .png
and .svg; the html is one page that needs no network, and `--with` adds to it what other studies and
merges have written. Runs that differ in data, evaluation, rewards, budget or training are refused,
with every setting in which they differ; --allow lets one differ and is noted in the report.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = (
    "obm compare runs/demo/runs/* --output runs/demo/report",
    "obm compare runs/demo/runs/* --with runs/floor/floor.json runs/demo/merged/obm/merge.json",
    "obm compare runs/a-s0 runs/b-s0 runs/b-s1 --output runs/ab --target-arm a --smoothing 1",
    "obm compare runs/*/wandb/offline-run-* wandb://me/search/a0e1d10c --reference obm",
    "obm compare runs/gspo-s* runs/grpo-s* --allow grpo.loss_type --allow algorithm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Runs, where to, and how to summarise."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or W&B runs")
    parser.add_argument(
        "--output", metavar="DIR", default="runs/report", help="default: runs/report"
    )
    parser.add_argument("--name", default="compare", help="file name (default: compare)")
    parser.add_argument("--title", default="Comparison", help="heading of the md file")
    parser.add_argument("--target-arm", help="arm whose ceiling the others must reach")
    parser.add_argument(
        "--reference", metavar="ARM", help="held against each (default: obm, or the first)"
    )
    parser.add_argument(
        "--budget-arm", metavar="ARM",
        help="accuracy at an equal budget: what this arm spent (default: the cheapest)",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY",
        help="setting or section that may differ; can be repeated",
    )  # fmt: skip
    parser.add_argument("--smoothing", type=int, metavar="N", help="evaluations in a mean")
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help="resamples (of probabilities; of intervals from ten seeds on)",
    )
    parser.add_argument("--partial", action="store_true", help="take unfinished runs as they are")
    parser.add_argument(
        "--with", dest="beside", nargs="+", default=[], metavar="FILE",
        help="further json files for the page: of other studies, merge.json",
    )  # fmt: skip
    parser.add_argument(
        "--wandb-report",
        metavar="PROJECT",
        help="also send the report to W&B: ENTITY/PROJECT, or PROJECT",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a report of that name")


def check_counts(options: argparse.Namespace) -> None:
    """Refuse a smoothing or a number of resamples below 1.

    Raises:
        CompareError: names the option.
    """
    from compare.errors import CompareError

    for name in ("smoothing", "bootstrap"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CompareError(
                f"--{name} {value}: must be at least 1; leave it out for what the runs' settings "
                "say"
            )


def run(options: argparse.Namespace) -> int:
    """Read, compare, write, print the table."""
    from compare.comparable import check_allowed
    from compare.report import check_arm, text_table, write_report
    from compare.runs import read_runs
    from launch.arguments import command_line

    check_counts(options)
    runs = read_runs(options.runs, partial=options.partial)
    # What the command line leaves open, the runs' own settings say.
    settings = runs[0].config.get("compare") or {}
    check_allowed(options.allow, runs)
    for option in ("target_arm", "budget_arm"):
        if getattr(options, option) is not None:
            name = f"--{option.replace('_', '-')}"
            check_arm(name, getattr(options, option), [run.arm for run in runs])
    if options.wandb_report:
        from compare.wandb_report import load_reports

        load_reports()  # what is missing is said before anything is written
    summary = write_report(
        runs,
        options.output,
        command=command_line(),
        name=options.name,
        title=options.title,
        target_arm=options.target_arm or settings.get("target_arm") or "vlm",
        smoothing=options.smoothing or settings.get("smoothing") or 3,
        bootstrap=options.bootstrap or settings.get("bootstrap") or 2000,
        reference=options.reference,
        budget_arm=options.budget_arm or settings.get("budget_arm"),
        allow=options.allow,
        partial=options.partial,
        overwrite=options.overwrite,
        beside=options.beside,
    )
    print(text_table(summary))
    base = Path(options.output) / options.name
    print(f"\npicture: {base}.png\npage:    {base}.html")
    if options.wandb_report:
        from compare.wandb_report import send_report

        text = Path(f"{base}.md").read_text(encoding="utf-8")
        address = send_report(text, project=options.wandb_report, title=options.title)
        print(f"W&B:     {address}")
    return 0
