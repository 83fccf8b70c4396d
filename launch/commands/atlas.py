"""The embedded world: build its tiny checkpoints, or measure checkpoints and search.

build   trains base, agent and VLM from seeds (under half an hour on two cores);
report  what each checkpoint can do: recognition, reading, closed-book answers, search;
table   recall@1 and @3 of the text and the image index;
worlds  every mode (scenes, maps, counterfactual, news): what the tools allow, what policies do;
images  recall@1 of pictures that come turned, cut, compressed or drawn in another style;
views   what the image index knows of every flag, drawn once and shipped.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

EXAMPLES = (
    "obm atlas build --output runs/trio --tool-use none --only vlm",
    "obm atlas report --checkpoints runs/trio --output runs/trio/report",
    "obm atlas table --output runs/retrieval",
    "obm atlas worlds --start trained=runs/obm-s0/checkpoints/checkpoint-30",
    "obm atlas images --output runs/image-recall",
    "obm atlas views --output runs/flag_views.safetensors",
)
TRIO = ("base", "agent", "vlm")
TOOL_USE = ("none", "format", "1", "2", "5")
# What the two indexes must find; the tools' ceiling is the agent's ceiling.
RETRIEVAL_TARGETS = (
    ("text: REL of NAME", "recall@3", 0.95),
    ("image: photo at strength 0.5", "recall@1", 0.93),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do and where to write."""
    parser.add_argument("action", choices=("build", "report", "table", "worlds", "images", "views"))
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="build: a folder (default: runs/trio); report, table, worlds, images: a file name "
        "without suffix (default: docs/results/trio, retrieval, worlds, image-recall); views: a "
        "file (default: the one that is shipped)",
    )
    parser.add_argument(
        "--checkpoints",
        metavar="DIR",
        help="report: folder with base, vlm and agent (default: the shipped ones)",
    )
    parser.add_argument(
        "--encoder", metavar="MODEL",
        help="table: text encoder to measure, too (default: all-MiniLM-L6-v2 where its package is "
        "installed)",
    )  # fmt: skip
    parser.add_argument(
        "--only", metavar="NAMES", default=",".join(TRIO),
        help="build: some of base,agent,vlm; the parents need a base in the output folder",
    )  # fmt: skip
    parser.add_argument(
        "--tool-use", choices=TOOL_USE, default="format",
        help="build: what the VLM's data shows of tools: nothing, the format of a call, or 1, 2, 5 "
        "per cent whole trajectories (default: format)",
    )  # fmt: skip
    parser.add_argument(
        "--start", metavar="NAME=DIR", action="append", default=[],
        help="worlds: a further checkpoint that takes pictures; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, default=128, metavar="N", help="worlds: questions a mode (default: 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="build: of data and weights")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--dry-run", action="store_true", help="build: say what would be trained")


def run(options: argparse.Namespace) -> int:
    """Build or measure."""
    actions = {
        "build": _build,
        "report": _report,
        "table": _table,
        "worlds": _worlds,
        "images": _images,
        "views": _views,
    }
    return actions[options.action](options)


def _build(options: argparse.Namespace) -> int:
    output = Path(options.output or "runs/trio")
    only = [name for name in options.only.split(",") if name]
    unknown = sorted(set(only) - set(TRIO))
    if unknown or not only:
        raise LaunchError(f"--only {options.only!r}: choose among {', '.join(TRIO)}")
    if "base" not in only and not (output / "base" / "config.json").is_file():
        raise LaunchError(f"{output}/base is missing; build it too, or copy a base there")
    present = [name for name in only if (output / name).exists()]
    if present and not options.overwrite:
        raise LaunchError(f"{output / present[0]} exists; pass --overwrite or another --output")
    if options.dry_run:
        print(f"would train {', '.join(only)} into {output} (VLM's tool use: {options.tool_use})")
        return 0

    from train.trio import TrioSettings, build_trio

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = TrioSettings(seed=options.seed)
    settings.mix.tool_use = options.tool_use
    for name, folder in build_trio(output, settings, only).items():
        print(f"{name}: {folder}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from compare.provenance import origin
    from compare.trio import measure_trio, write_table
    from configs.schema import resolve_model
    from launch.arguments import command_line
    from train.files import with_ending, write_json

    where = options.checkpoints
    folders = {
        name: resolve_model(f"{where}/{name}" if where else f"atlas://{name}") for name in TRIO
    }
    rows = measure_trio(folders)
    output = Path(options.output or "docs/results/trio")
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **origin(command_line()),
        "rows": rows,
    }
    write_json(with_ending(output, ".json"), record)
    write_table(rows, with_ending(output, ".md"), "What the embedded trio can do", command_line())
    for row in rows:
        print(f"{row['checkpoint'].ljust(6)} {row['share']:.3f}  {row['skill']} (n = {row['n']})")
    return 0


def _table(options: argparse.Namespace) -> int:
    from compare.provenance import origin
    from environments.atlas.recall import measure_dense, packaged_encoder
    from environments.atlas.world import measure_retrieval
    from launch.arguments import command_line
    from train.files import with_ending, write_json, write_text

    rows = measure_retrieval()
    by_query = {row["query"]: row for row in rows}
    targets = []
    for query, metric, target in RETRIEVAL_TARGETS:
        value = by_query[query][metric]
        name = f"{query}, {metric}"
        targets.append({"name": name, "value": value, "target": target, "met": value >= target})
    encoder = options.encoder or packaged_encoder()
    record = {
        **origin(command_line()),
        "targets": targets,
        "rows": rows,
        "encoder": Path(options.encoder).name if options.encoder else "all-MiniLM-L6-v2",
        "retrievers": measure_dense(encoder) if encoder else [],
    }
    output = Path(options.output or "docs/results/retrieval")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(with_ending(output, ".json"), record)
    write_text(with_ending(output, ".md"), _markdown(record))
    print("\n".join(_table_lines(rows)))
    return 0 if all(target["met"] for target in targets) else 1


def _worlds(options: argparse.Namespace) -> int:
    from configs.schema import resolve_model
    from launch.arguments import command_line
    from launch.worlds import measure_worlds

    starts = dict(start.partition("=")[::2] for start in options.start)
    if not all(starts) or not all(starts.values()):
        raise LaunchError(f"--start {options.start}: write NAME=DIR")
    if options.size < 1:
        raise LaunchError(f"--size {options.size}: at least one question a mode is needed")
    measure_worlds(
        Path(options.output or "docs/results/worlds"),
        command=command_line(),
        n=options.size,
        starts={name: resolve_model(folder) for name, folder in starts.items()},
    )
    return 0


def _images(options: argparse.Namespace) -> int:
    from compare.provenance import origin
    from environments.atlas.recall import describe_images, measure_images
    from launch.arguments import command_line
    from train.files import with_ending, write_json, write_text

    rows = measure_images()
    record = {
        **origin(command_line()),
        "rows": rows,
    }
    output = Path(options.output or "docs/results/image-recall")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(with_ending(output, ".json"), record)
    write_text(with_ending(output, ".md"), describe_images(record))
    return 0


def _views(options: argparse.Namespace) -> int:
    from safetensors.numpy import save_file

    from environments.atlas.world import VIEWS_FILE, draw_views

    output = Path(options.output or VIEWS_FILE)
    views = draw_views()
    unfinished = output.with_name(f".{output.name}.tmp")
    save_file({"views": views}, unfinished)
    unfinished.replace(output)
    print(f"{len(views)} views: {output}")
    return 0


def _table_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| query | n | recall@1 | recall@3 |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['query']} | {row['n']} | {row['recall@1']:.3f} | {row['recall@3']:.3f} |"
        )
    return lines


def _retriever_lines(record: dict[str, Any]) -> list[str]:
    """The table of the other retrievers, or nothing where no encoder was measured."""
    if not record["retrievers"]:
        return []
    lines = [
        f"The query `REL of NAME` by every text retriever; vectors are those of "
        f"{record['encoder']}:",
        "",
        "| retriever | n | recall@1 | recall@3 |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in record["retrievers"]:
        lines.append(
            f"| {row['retriever']} | {row['n']} | {row['recall@1']:.3f} | {row['recall@3']:.3f} |"
        )
    return [*lines, ""]


def _markdown(record: dict[str, Any]) -> str:
    lines = [
        "# What the atlas's search finds",
        "",
        "Share of queries whose gold passage (text) or place (image) is among the first hits, over "
        "all entities and the six headline relations.",
        "",
        *_table_lines(record["rows"]),
        "",
        *_retriever_lines(record),
        *(
            f"* {target['name']}: {target['value']:.3f}, target {target['target']} "
            f"({'met' if target['met'] else 'missed'})"
            for target in record["targets"]
        ),
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}.",
        "",
    ]
    return "\n".join(lines)
