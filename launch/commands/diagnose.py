"""The geometry of what fine-tuning changed, and which merge method suits it.

For a base and any number of models tuned from it: how sparse each update is, where updates meet
and disagree, their cosine and norms by layer, their spectrum and what of it lies in the base's
principal directions, what averaging would leave of each. Prints a table with advice; --output
writes geometry.json, .csv, .md, .svg and .png. Nothing is trained or merged; docs/sar.md has the
formulas.

`obm diagnose heads` compares attention heads instead, by gradients (docs/cast.md).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import (
    add_config_arguments,
    command_line,
    make_folder_of,
    read_config,
)
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm diagnose --config configs/demo.yaml",
    "obm diagnose --model rl=runs/obm-s0/checkpoints/checkpoint-30 --output runs/geometry",
)
NAME = "geometry"
SUB_VERBS = {"heads": "launch.commands.diagnose_heads"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models beside the settings', and where to write."""
    add_config_arguments(parser)
    parser.add_argument(
        "--model", metavar="NAME=DIR", action="append", default=[],
        help="a further model of models.base, or another one under a name of the settings; "
        "may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=int, default=32, metavar="K",
        help="leading directions of the base's weights (default: 32)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write tables and a picture here"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--dry-run", action="store_true", help="check models, read headers only")


def run(options: argparse.Namespace) -> int:
    """Measure and print, and write where asked; or hand over to a sub-verb."""
    if options.overrides and options.overrides[0] in SUB_VERBS:
        return _run_sub_verb(options)
    config = read_config(options)
    models = tuned_models(config, options.model)
    written = []
    if options.output:
        written = [options.output / f"{NAME}{suffix}" for suffix in (".json", ".csv", ".md", ".svg",
                                                                    ".png")]  # fmt: skip
        present = [path for path in written if path.exists()]
        if present and not options.overwrite:
            raise LaunchError(f"{present[0]} exists; pass --overwrite or another --output")
        if not options.dry_run:
            make_folder_of(written[0], "--output")
    from compare.geometry_report import text_table
    from launch.commands.calibrate import parent_folder
    from merge.diagnosis import diagnose

    record = diagnose(
        parent_folder(config, "base"), models, threshold=config.merge.threshold, rank=options.rank,
        families=config.merge.families, dry_run=options.dry_run,
    )  # fmt: skip
    if options.dry_run:
        print(record["text"])
        return 0
    # as the settings name them: a shipped checkpoint's folder is of this machine
    record["base"] = str(config.models.base)
    record["models"] = _named_sources(config, options.model, models)
    print("\n".join(text_table(record)))
    if options.output:
        _write(record, written)
    return 0


def tuned_models(config: Config, further: list[str]) -> dict[str, str]:
    """Name -> folder or hub id of every model whose update is measured.

    Args:
        config: `models.vlm`, `models.agent` and `models.donors`, as far as they are set.
        further: `NAME=DIR`, on top.

    Raises:
        LaunchError: an argument without a name, or no model at all.
        ConfigError: a folder that does not exist.
    """
    from configs.schema import resolve_model

    models = {
        role: resolve_model(source)
        for role, source in (("vlm", config.models.vlm), ("agent", config.models.agent),
                             *config.models.donors.items())
        if source
    }  # fmt: skip
    for argument in further:
        name, equals, source = argument.partition("=")
        if not (name and equals and source) or name == "base" or "/" in name:
            raise LaunchError(f"--model {argument}: write NAME=DIR, such as rl=checkpoints/rl")
        models[name] = resolve_model(source)
    if not models:
        raise LaunchError("nothing to diagnose; set models.vlm or models.agent, or give --model")
    return models


def _named_sources(config: Config, further: list[str], models: dict[str, str]) -> dict[str, str]:
    given = {"vlm": config.models.vlm, "agent": config.models.agent, **config.models.donors}
    given |= {name: source for name, _, source in (item.partition("=") for item in further)}
    return {name: str(given[name]) for name in models}


def _write(record: dict[str, Any], paths: list[Path]) -> None:
    from compare.geometry_figure import draw_geometry
    from compare.geometry_report import markdown, tensor_csv
    from compare.provenance import origin
    from train.files import write_json, write_text

    record |= origin(command_line())
    as_json, as_csv, page, *pictures = paths
    caption = f"Linear projections. {record['command']}; commit {record['commit']}"
    draw_geometry(record, pictures, caption)
    write_text(as_csv, tensor_csv(record))
    write_text(page, markdown(record))
    write_json(as_json, record)
    print(f"wrote {as_json}")


def _run_sub_verb(options: argparse.Namespace) -> int:
    name, *options.overrides = options.overrides
    module = SUB_VERBS[name]
    if importlib.util.find_spec(module) is None:
        raise LaunchError(f"obm diagnose {name}: this version has no such diagnosis")
    return int(importlib.import_module(module).run(options) or 0)
