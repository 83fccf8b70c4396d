"""Merge base, VLM and agent into one checkpoint that loads as the VLM does.

Methods: obm (needs `obm calibrate` first), task_arithmetic, ties, dare. Every tensor is planned
before anything is written; --dry-run prints the plan.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import add_config_arguments, read_config

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm merge --config configs/demo.yaml --dry-run",
    "obm merge merge.method=ties merge.density=0.3 --output runs/merged/ties",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Output and the three statistics; the recipe is configuration."""
    add_config_arguments(parser)
    parser.add_argument(
        "--output", metavar="DIR", help="default: merged/METHOD beside the settings' output"
    )
    parser.add_argument(
        "--stats", metavar="DIR", help="folder that `obm calibrate` wrote (default: the settings')"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def run(options: argparse.Namespace) -> int:
    """Plan or merge."""
    extra = [f"calibration.output={options.stats}"] if options.stats else []
    config = read_config(options, *extra)
    output = Path(options.output or Path(config.output).parent / "merged" / config.merge.method)
    record = merge_checkpoints(config, output, overwrite=options.overwrite, dry_run=options.dry_run)
    if options.dry_run:
        print(record["table"])
    else:
        print(f"{config.merge.method}: {output}")
    return 0


def merge_checkpoints(
    config: Config, output: Path, *, overwrite: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Merge as the settings say.

    Args:
        config: models, merge and calibration are used.
        output: folder to write.
        overwrite: replace an earlier merge.
        dry_run: plan only.

    Returns:
        What `merge.engine.merge` returns: the content of merge.json, or the plan.
    """
    from launch.commands.calibrate import ROLES, parent_folder, stats_path
    from merge.engine import merge

    settings = config.merge
    stats = {role: stats_path(config, role) for role in ROLES}
    needs_stats = settings.method == "obm" or settings.scope["linear"] == "obm"
    return merge(
        parent_folder(config, "base"),
        parent_folder(config, "vlm"),
        parent_folder(config, "agent"),
        output,
        method=settings.method,
        density=settings.density,
        weights=asdict(settings)["weights"],
        saliency=settings.saliency,
        normalization=settings.normalization,
        combine=settings.combine,
        scope=asdict(settings)["scope"],
        stats=stats if needs_stats else None,
        seed=settings.seed,
        overwrite=overwrite,
        dry_run=dry_run,
    )
