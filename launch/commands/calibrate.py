"""Statistics of every linear input of the parents' language modules.

The VLM answers questions with pictures, through its vision tower; the agent and the donors search
for text questions of the training split. Or each gets samples of a data set, of a file, or of
recorded rollouts: calibration.vlm_data and calibration.agent_data. Padding does not count. Writes
vlm/stats.safetensors, agent/stats.safetensors and so on, which `obm merge` finds by itself; other
statistics than second moments by calibration.kinds. A run that was killed goes on where it was.

Fisher information can also be taken from the optimizer of a training: --adam CHECKPOINT.

Several machines share the work: `--shard 0/2` and `--shard 1/2`, then `--merge-shards`.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import add_config_arguments, read_config
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config
    from launch.calibration_progress import Progress

EXAMPLES = (
    "obm calibrate --config configs/demo.yaml",
    "obm calibrate --parent vlm calibration.samples=128 calibration.output=runs/stats",
    "obm calibrate --dry-run calibration.kinds=[diagonal,inverse] calibration.streaming=true",
    "obm calibrate --parent agent calibration.agent_data.source=runs/agent/trajectories.jsonl",
    "obm calibrate --parent agent --adam runs/agent/checkpoints/checkpoint-60",
)
ROLES = ("vlm", "agent")
WHOLE = (0, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which parents; everything else is configuration."""
    add_config_arguments(parser)
    parser.add_argument(
        "--parent", metavar="NAME", default="all",
        help="vlm, agent or the name of a donor (default: all of them)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace statistics")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")
    parser.add_argument(
        "--adam", metavar="DIR",
        help="take the parent's Fisher information from Adam's second moments in this checkpoint "
        "of a training under DeepSpeed",
    )  # fmt: skip
    parser.add_argument(
        "--shard", metavar="RANK/N", help="measure every N-th batch, from the RANK-th on"
    )
    parser.add_argument(
        "--merge-shards", action="store_true", help="add up what the shards have measured"
    )


def run(options: argparse.Namespace) -> int:
    """Calibrate the chosen parents."""
    config = read_config(options)
    shard = _parse_shard(options.shard)
    if options.merge_shards and options.shard:
        raise LaunchError("--shard measures, --merge-shards adds up afterwards; give one of them")
    roles = _chosen_roles(config, options.parent)
    if options.adam:
        return _take_adam(options, config, roles)
    for role in roles:
        parent_folder(config, role)  # a missing setting is found before anything has run
    if options.dry_run:
        for role in roles:
            progress_of(config, role, shard, overwrite=options.overwrite)
            print(f"{role}: {describe(config, role, shard)}")
        return 0
    _make(options, config, roles, shard)
    return 0


def _make(
    options: argparse.Namespace, config: Config, roles: tuple[str, ...], shard: tuple[int, int]
) -> None:
    """Measures, or adds up; a run that was killed goes on with the files that it had not made."""
    from merge.sums import shard_suffix
    from train import gpu
    from train.lock import locked

    with ExitStack() as held:
        for role in roles:
            name = f".lock{shard_suffix(shard)}"
            folder = stats_path(config, role).parent
            held.enter_context(locked(folder, name, setting="calibration.output=FOLDER"))
        progress = {
            role: progress_of(config, role, shard, overwrite=options.overwrite) for role in roles
        }
        try:
            for role in roles:
                progress[role].begin()
            for role in roles:
                if options.merge_shards:
                    print(f"{role}: {merge_parent_shards(config, role)}")
                else:
                    made = calibrate_parent(config, role, shard=shard, progress=progress[role])
                    print(f"{role}: {made}")
                    gpu.give_back()  # the next parent needs it
        except Exception:
            for one in progress.values():
                one.give_up()
            raise
        for one in progress.values():
            one.finish()


def _take_adam(options: argparse.Namespace, config: Config, roles: tuple[str, ...]) -> int:
    """Writes fisher.safetensors of one parent from an optimizer."""
    from merge.adam import adam_fisher, open_adam
    from merge.checkpoint import Checkpoint
    from merge.stats import FILE_NAMES
    from train.lock import locked

    if len(roles) != 1 or options.shard or options.merge_shards:
        raise LaunchError("--adam is of one parent and needs no shards; add --parent NAME alone")
    role = roles[0]
    folder = stats_path(config, role).parent
    target = folder / FILE_NAMES["fisher"]
    if target.exists() and not options.overwrite:
        raise LaunchError(f"{target} exists; pass --overwrite, or calibration.output=FOLDER")
    checkpoint = Checkpoint(parent_folder(config, role), role)
    if options.dry_run:
        adam = open_adam(options.adam)
        print(
            f"{role}: second moments of {sum(map(len, adam.shapes))} parameters after {adam.step} "
            f"steps (ZeRO-{adam.stage}, {len(adam.ranks)} processes); into {target}"
        )
        return 0
    with locked(folder, setting="calibration.output=FOLDER"):
        made = adam_fisher(options.adam, checkpoint, folder, families=config.merge.families)
    print(f"{role}: {made}")
    return 0


def stats_path(config: Config, role: str) -> Path:
    """Where a parent's second moments lie; other kinds lie beside them."""
    folder = Path(config.calibration.output or Path(config.output) / "calibration")
    return folder / role / "stats.safetensors"


def parent_folder(config: Config, role: str) -> str:
    """Folder or hub id of base, vlm, agent or a donor.

    Raises:
        LaunchError: the settings name none.
    """
    from configs.schema import resolve_model

    if role in config.models.donors:
        return resolve_model(config.models.donors[role])
    name = getattr(config.models, role, None)
    if not name:
        raise LaunchError(f"models.{role} is not set; give a folder, a hub id or atlas://{role}")
    return resolve_model(name)


def progress_of(
    config: Config, role: str, shard: tuple[int, int] = WHOLE, *, overwrite: bool = False
) -> Progress:
    """What is there of a parent's statistics.

    Raises:
        LaunchError: another run's, and `overwrite` is off.
    """
    from launch.calibration_progress import Progress, calibration_key
    from merge.sums import shard_suffix

    note = stats_path(config, role).parent / f".begun{shard_suffix(shard)}.json"
    key = calibration_key(config, role, parent_folder(config, role))
    return Progress(note, key, _targets(config, role, shard), overwrite=overwrite)


def calibrate_parent(
    config: Config,
    role: str,
    *,
    shard: tuple[int, int] = WHOLE,
    progress: Progress | None = None,
) -> Path:
    """Run one parent's calibration data through it and save the statistics.

    Args:
        config: models, calibration, environment and merge.families are used.
        role: vlm, agent or the name of a donor.
        shard: (rank, world): which share of the batches.
        progress: what is there already, and is not made again; nothing when None.

    Returns:
        The file of the first of calibration.kinds.
    """
    from launch.calibration_run import Parent, measure_fisher, measure_inputs
    from launch.preparation_cost import keep_calibration_cost, measured, shard_cost_name

    parent = Parent(config, role, parent_folder(config, role))
    folder = stats_path(config, role).parent
    costs = folder / shard_cost_name(shard)
    missing = [
        kind
        for kind, target in zip(
            config.calibration.kinds, _targets(config, role, shard), strict=True
        )
        if progress is None or not progress.has(target)
    ]
    inputs = [kind for kind in missing if kind != "fisher"]
    if inputs:
        with measured() as cost:
            measure_inputs(parent, inputs, folder, shard)
        keep_calibration_cost(costs, "inputs", cost)
    if "fisher" in missing:
        with measured() as cost:
            measure_fisher(parent, folder, shard)
        keep_calibration_cost(costs, "fisher", cost)
    return _targets(config, role, shard)[0]


def merge_parent_shards(config: Config, role: str) -> Path:
    """Add up the sums of all shards of one parent.

    Returns:
        The file of the first of calibration.kinds.
    """
    from launch.preparation_cost import join_shard_costs, measured
    from merge.sums import merge_shards

    folder = stats_path(config, role).parent
    with measured() as cost:
        for kind in config.calibration.kinds:
            merge_shards(folder, kind, damping=config.calibration.damping)
    join_shard_costs(folder, cost)
    return _targets(config, role, WHOLE)[0]


def describe(config: Config, role: str, shard: tuple[int, int] = WHOLE) -> str:
    """What calibrating a parent would measure, and what it would take."""
    from launch.calibration_run import Parent

    parent = Parent(config, role, parent_folder(config, role))
    kinds = config.calibration.kinds
    streams = parent.streams_fisher if kinds == ["fisher"] else parent.streams
    share = "" if shard == WHOLE else f", batches {shard[0]}, {sum(shard)}, ... of them"
    return (
        f"{config.calibration.samples} {parent.data_words}{share} through {parent.folder}, "
        f"{'a layer at a time' if streams else 'the whole model'}; "
        f"{parent.estimate.describe(streams, kinds)}; into {stats_path(config, role).parent}"
    )


def _chosen_roles(config: Config, parent: str) -> tuple[str, ...]:
    roles = (*ROLES, *config.models.donors)
    if parent in ("all", "both"):
        return roles
    if parent not in roles:
        raise LaunchError(f"--parent {parent}: no such parent; choose {', '.join(roles)} or all")
    return (parent,)


def _targets(config: Config, role: str, shard: tuple[int, int]) -> list[Path]:
    """Files that a calibration writes, in the order of calibration.kinds."""
    from merge.sums import shard_name

    folder = stats_path(config, role).parent
    return [folder / shard_name(kind, shard) for kind in config.calibration.kinds]


def _parse_shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return WHOLE
    rank, slash, world = text.partition("/")
    if slash and rank.isdecimal() and world.isdecimal() and int(rank) < int(world):
        return int(rank), int(world)
    raise LaunchError(f"--shard {text}: write RANK/N with RANK from 0 to N - 1, such as 0/2")
