"""Merge base, VLM and agent into one checkpoint that loads as the VLM does.

Every tensor is planned before anything is written; --dry-run prints the plan and what it will cost.
A merge that was interrupted goes on when it is run again. `obm merge verify FOLDER` checks every
byte of a merged checkpoint. `obm merge adapter RUN` puts the LoRA adapter of a training into the
weights it was trained on. --sweep merges and evaluates a grid on held-out questions and keeps the
best. The methods, with formulas and sources, are in docs/merge.md.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import add_config_arguments, read_config
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm merge --config configs/demo.yaml --dry-run",
    "obm merge merge.method=ties merge.density=0.3 --output runs/merged/ties",
    "obm merge verify runs/merged/ties",
    "obm merge adapter runs/lora-s0 --output runs/merged/lora",
    "obm merge --sweep density=0.2,0.35,0.5 weights.agent=0.7,1 --output runs/merged/swept",
)
NOT_SETTINGS = ("method", "weights", "scope", "rules", "vocabulary", "threads", "shard_size")
"""Keys of `merge:` that are arguments of the engine by themselves; the others are a method's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Output and the statistics; the recipe is configuration."""
    add_config_arguments(parser)
    parser.add_argument(
        "--output", metavar="DIR", help="default: merged/METHOD beside the settings' output"
    )
    parser.add_argument(
        "--stats", metavar="DIR", help="folder that `obm calibrate` wrote (default: the settings')"
    )
    parser.add_argument(
        "--base", metavar="DIR",
        help="with adapter: the checkpoint that it was trained on (default: as it says itself)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument(
        "--sweep", nargs="+", metavar="KEY=V1,V2", default=[],
        help="settings of `merge:` to try; every combination is merged and evaluated",
    )  # fmt: skip
    parser.add_argument(
        "--agreement", action="store_true",
        help="with --sweep: pick without labels, the setting whose answers its neighbours share",
    )  # fmt: skip
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the merged checkpoint")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: a private one")


def run(options: argparse.Namespace) -> int:
    """Plan, merge, sweep, verify, or merge an adapter."""
    if options.overrides[:1] == ["verify"]:
        return _verify(options.overrides[1:])
    if options.overrides[:1] == ["adapter"]:
        return _merge_adapter(options)
    if options.base:
        raise LaunchError("--base goes with `obm merge adapter`; here set models.base=...")
    extra = [f"calibration.output={options.stats}"] if options.stats else []
    config = read_config(options, *extra)
    output = options.output or Path(config.output).parent / "merged" / config.merge.method
    output = Path(os.path.expanduser(output))
    if options.agreement and not options.sweep:
        raise LaunchError("--agreement chooses among the settings of --sweep; give it too")
    if options.sweep:
        from launch.sweep import sweep

        # before hours of measuring, not after
        if output.exists() and any(output.iterdir()) and not (options.overwrite or options.dry_run):
            raise LaunchError(f"{output} exists; pass --overwrite, or another --output")
        config = sweep(
            config, options.sweep, output, by_agreement=options.agreement, dry_run=options.dry_run
        )
        if options.dry_run:
            return 0
    # OpenBLAS starts its threads when it is loaded; a merge uses one, see merge.dense.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    record = merge_checkpoints(config, output, overwrite=options.overwrite, dry_run=options.dry_run)
    if options.dry_run:
        print(record["table"])
        return 0
    print(f"{config.merge.method}: {output}")
    _push(options, output)
    return 0


def _push(options: argparse.Namespace, output: Path) -> None:
    if options.push_to_hub:
        from merge.hub import push_folder

        print(push_folder(output, options.push_to_hub, private=options.private))


def _verify(folders: list[str]) -> int:
    from merge.verify import verify_folder

    if not folders:
        raise LaunchError("obm merge verify: which folder? give what `obm merge` wrote")
    for folder in folders:
        found = verify_folder(folder)
        vision = f"{found['vision']} vision tensors as recorded"
        if found["vlm"]:
            vision = f"{found['vision']} vision tensors as in {found['vlm']}"
        print(f"{folder}: {found['tensors']} tensors sound, {vision}")
    return 0


def _merge_adapter(options: argparse.Namespace) -> int:
    from merge.adapter import merge_adapter

    folder, *options.overrides = options.overrides[1:] or [""]
    if not folder or not options.output:
        raise LaunchError("write `obm merge adapter RUN_OR_ADAPTER_FOLDER --output DIR`")
    for name in ("sweep", "agreement", "stats"):
        if getattr(options, name):
            raise LaunchError(f"--{name}: goes with a merge, not with an adapter; leave it out")
    from configs.schema import resolve_model

    families = read_config(options).merge.families
    base = resolve_model(options.base) if options.base else None
    record = merge_adapter(
        folder, options.output, base=base, families=families,
        overwrite=options.overwrite, dry_run=options.dry_run,
    )  # fmt: skip
    what = f"{record['adapter']['tensors']} tensors of {record['parents']['vlm']['source']}"
    if options.dry_run:
        print(f"{what} would change, in {options.output}")
        return 0
    print(f"{what} changed: {options.output}")
    _push(options, Path(os.path.expanduser(options.output)))
    return 0


def merge_checkpoints(
    config: Config, output: Path, *, overwrite: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Merge as the settings say; what it cost lies beside, in cost.json.

    Args:
        config: models, merge and calibration are used.
        output: folder to write.
        overwrite: replace an earlier merge.
        dry_run: plan only.

    Returns:
        What `merge.engine.merge` returns: the content of merge.json, or the plan.
    """
    from configs.schema import resolve_model
    from launch.commands.calibrate import parent_folder, stats_path
    from launch.preparation_cost import keep_merge_cost, measured_without_compiling
    from merge.engine import merge

    settings = asdict(config.merge)
    own = {key: settings.pop(key) for key in (*NOT_SETTINGS, "families")}
    donors = {name: resolve_model(source) for name, source in config.models.donors.items()}
    with measured_without_compiling() as cost:
        record = merge(
            parent_folder(config, "base"),
            parent_folder(config, "vlm"),
            parent_folder(config, "agent"),
            output,
            donors=donors,
            # the engine opens those that the method needs, and says which are missing
            stats={role: stats_path(config, role).parent for role in ("vlm", "agent", *donors)},
            overwrite=overwrite,
            dry_run=dry_run,
            **own,
            **settings,
        )
    if not dry_run:
        keep_merge_cost(output, record, cost)
    return record
