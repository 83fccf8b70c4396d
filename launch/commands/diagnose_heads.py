"""Which attention heads search and perception pull apart: the conflict map of CAST.

Compares the gradients of two objectives head by head, the search that training would improve and
the perception that it should keep, and measures what perception loses without each head. Writes
conflict.json, conflict.md and conflict.svg / .png; `freeze_heads: cast(top=10%)` reads the first.
Nothing is trained. docs/cast.md has the formulas.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import (
    add_config_arguments,
    command_line,
    make_folder_of,
    read_config,
)
from launch.errors import LaunchError
from launch.preparation_cost import COST_NAME, measured

if TYPE_CHECKING:
    from configs.schema import Config
    from train.conflict import ConflictMap
    from train.heads import HeadLayout
    from train.objectives import Objective

EXAMPLES = (
    "obm diagnose heads models.init=runs/demo/merged/obm",
    "obm diagnose heads --output runs/conflict conflict.search=agent conflict.seed=1",
    "obm train models.init=runs/demo/merged/obm 'freeze_heads=cast(top=10%)' output=runs/cast-s0",
)
NAME = "conflict"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write; everything else is configuration."""
    add_config_arguments(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder of the map (default: `conflict` in the folder of models.init)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a map")
    parser.add_argument("--dry-run", action="store_true", help="say what would be compared")


def run(options: argparse.Namespace) -> int:
    """Diagnose, and write the map."""
    config = read_config(options)
    start, folder = _places(config, options.output)
    if (folder / f"{NAME}.json").exists() and not options.overwrite:
        raise LaunchError(f"{folder / NAME}.json exists; pass --overwrite, or another --output")
    from train.heads import head_layout
    from train.policy import load_config

    layout = head_layout(load_config(start))
    section = config.conflict
    if options.dry_run:
        n_heads, kinds = len(layout.heads()), ", ".join(section.keep_kinds)
        print(
            f"{n_heads} heads of {start}: gradients of search ({section.search}, "
            f"{section.search_questions} questions) and of keep ({kinds}, "
            f"{section.keep_questions} questions), then the keep loss {n_heads} times; "
            f"into {folder}"
        )
        return 0
    if section.device == "cuda":
        _require_gpu()
    make_folder_of(folder / f"{NAME}.json", "--output")
    record = make_map(config, start, folder)
    from compare.conflict_map import map_table

    print("\n".join(map_table(record)))
    print(f"wrote {folder / NAME}.json")
    return 0


def make_map(config: Config, start: str, folder: Path) -> dict[str, Any]:
    """Diagnoses a start and writes its map, with what it took beside it.

    Args:
        config: the experiment.
        start: folder or hub id.
        folder: of the map.

    Returns:
        The content of conflict.json.
    """
    from train.heads import head_layout
    from train.policy import load_config

    with measured() as cost:
        record = diagnose_start(config, start, head_layout(load_config(start)))
    write_map(record, folder, cost=cost)
    return record


def diagnose_start(config: Config, start: str, layout: HeadLayout) -> dict[str, Any]:
    """The content of conflict.json.

    Args:
        config: the experiment.
        start: folder or hub id of models.init.
        layout: of it.
    """
    from launch.models import load_for_inference
    from train.conflict import diagnose
    from train.objectives import keep_objective, search_objective

    model, processor = load_for_inference(
        start, config.conflict.device, max_pixels=config.models.max_pixels
    )
    search = search_objective(config, model, processor)
    keep = keep_objective(config, model, processor)
    found = diagnose(model, layout, search.losses, keep.losses)
    return _record(config, layout, search, keep, found)


def write_map(
    record: dict[str, Any],
    folder: Path,
    name: str = NAME,
    *,
    cost: Mapping[str, float] | None = None,
) -> None:
    """Writes `<name>.json`, `.md`, `.svg` and `.png`; the first comes last, so that it is whole.

    Args:
        record: of `diagnose_start`.
        folder: is made where missing.
        name: of the files.
        cost: seconds that it took; cost.json beside the map has them for trainings that use it.
    """
    from compare.conflict_map import draw_map, map_page
    from train.files import write_json, write_text

    folder.mkdir(parents=True, exist_ok=True)
    if cost is not None:
        write_json(folder / COST_NAME, {"diagnose": dict(cost)})
    draw_map(record, [folder / f"{name}.svg", folder / f"{name}.png"])
    write_text(folder / f"{name}.md", map_page(record, name))
    write_json(folder / f"{name}.json", record)


def _record(
    config: Config, layout: HeadLayout, search: Objective, keep: Objective, found: ConflictMap
) -> dict[str, Any]:
    from dataclasses import asdict

    from compare.provenance import origin
    from train.conflict import conflict_score
    from train.frozen import SCHEMA_VERSION, conflict_order

    score = conflict_score(found, config.conflict.join)
    rows: list[dict[str, Any]] = [
        {
            "layer": head.layer,
            "head": head.head,
            "group": layout.group_of(head.head),
            "cosine": float(found.cosine[head]),
            "cosine_of_halves": [float(half[head]) for half in found.halves],
            "search_norm": float(found.search_norm[head]),
            "keep_norm": float(found.keep_norm[head]),
            "opposition": float(found.opposition[head]),
            "sensitivity": float(found.sensitivity[head]),
            "score": float(score[head]),
        }
        for head in layout.heads()
    ]
    order = sorted(rows, key=conflict_order)
    places = {(row["layer"], row["head"]): place for place, row in enumerate(order, 1)}
    return {
        "schema_version": SCHEMA_VERSION,
        "start": config.models.init,
        "layout": asdict(layout),
        "settings": asdict(config.conflict),
        **origin(command_line()),
        "search": search.words(),
        "keep": keep.words(),
        "keep_loss": found.keep_loss,
        "heads": [{**row, "place": places[row["layer"], row["head"]]} for row in rows],
    }


def _places(config: Config, output: Path | None) -> tuple[str, Path]:
    """The start, and the folder of its map.

    Raises:
        LaunchError: no start, or one whose folder is not the user's.
    """
    from configs.schema import ATLAS_PREFIX, resolve_model

    init = config.models.init
    if not init:
        raise LaunchError("models.init is not set; name the start that shall be diagnosed")
    start = resolve_model(init)
    if output is not None:
        return start, output
    if init.startswith(ATLAS_PREFIX) or not Path(start).is_dir():
        raise LaunchError(f"--output: missing; the map of {init} cannot lie in its own folder")
    return start, Path(start) / NAME


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise LaunchError("conflict.device=cuda: torch sees no GPU; set cpu")
