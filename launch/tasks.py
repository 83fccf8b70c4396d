"""From settings to measurements: which statistics a merge needs, and what decides a result.

`obm tune`, `obm merge --sweep` and the study of floors merge by many settings and evaluate each;
they share what is here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.sections import FREE_LIVE, Live, Merge
from launch.stages import environment_inputs, fingerprint, hash_inputs

if TYPE_CHECKING:
    from compare.zero_shot import Task
    from configs.schema import Config

NOT_OF_THE_RESULT = ("threads", "shard_size")
"""Keys of `merge:` that change no bit of the merged weights."""
PACKAGES = ("merge", "environments", "rewards", "train")
"""Code that decides a result; where it has changed, an earlier result is not taken again."""


def needed_kinds(merge: Merge) -> list[str]:
    """Kinds of statistics that a merge reads, in the order of `merge.stats.KINDS`."""
    from merge.methods import METHODS
    from merge.scope import resolve_scope
    from merge.stats import KINDS

    actions = [*resolve_scope(asdict(merge)["scope"], merge.method).values()]
    actions += [rule.method for rule in merge.rules if rule.method]
    needs = {METHODS[action].needs for action in actions if action in METHODS}
    kinds = {need for need in needs if need in KINDS}
    # a vector is of the kind that `saliency` names, but for RegMean, whose own it is
    if "obm" in actions:
        kinds.add(merge.saliency)
    if "regmean_diagonal" in actions:
        kinds.add("diagonal")
    return [kind for kind in KINDS if kind in kinds]


def merged_roles(config: Config) -> tuple[str, ...]:
    """The models that are merged into the base, each with statistics of its own."""
    return ("vlm", "agent", *config.models.donors)


def statistics_files(config: Config, kinds: Iterable[str]) -> list[Path]:
    """Files of these kinds, of every model that is merged."""
    from launch.commands.calibrate import stats_path
    from merge.stats import FILE_NAMES

    folders = [stats_path(config, role).parent for role in merged_roles(config)]
    return [folder / FILE_NAMES[kind] for folder in folders for kind in kinds]


def make_statistics(config: Config, kinds: Sequence[str]) -> None:
    """Make the statistics of these kinds that are not there.

    Raises:
        LaunchError: some are there that this has made with other settings.
    """
    from launch.calibration_note import check_made, note_made
    from launch.commands.calibrate import calibrate_parent, stats_path
    from merge.stats import FILE_NAMES
    from train import gpu

    folders = {role: stats_path(config, role).parent for role in merged_roles(config)}
    for role, folder in folders.items():  # before any is made, which may take long
        check_made(config, role, [k for k in kinds if (folder / FILE_NAMES[k]).exists()], folder)
    for role, folder in folders.items():
        missing: list[Any] = [k for k in kinds if not (folder / FILE_NAMES[k]).exists()]
        if missing:
            print(f"calibrate {role}: {', '.join(missing)}")
            calibrate_parent(
                replace(config, calibration=replace(config.calibration, kinds=missing)), role
            )
            note_made(config, role, missing, folder)
            gpu.give_back()  # the next parent, or the processes that evaluate, need it


def evaluation_inputs(config: Config) -> dict[str, Any]:
    """What decides an evaluation, beside its checkpoint and seed, as the inputs of a stage."""
    return {
        "environment": environment_inputs(config.environment),
        "grpo": config.grpo,
        **named_files(config, "eval", "dialect"),
        **live_inputs(config),
        **picture_inputs(config),
    }


def calibration_inputs(config: Config, role: str) -> dict[str, Any]:
    """What decides a parent's statistics beside it, `calibration` and `environment`.

    Empty at the defaults, so that what was made before stays valid.
    """
    data = "vlm_data" if role == "vlm" else "agent_data"
    return {
        **named_files(config, "train", "dialect", "families", data),
        **live_inputs(config),
        **picture_inputs(config),
    }


def length_inputs(config: Config, role: str) -> dict[str, Any]:
    """{"episode_lengths": ...} where a parent's calibration samples are episodes of its own."""
    from train.settings import episode_lengths, resolved_grpo

    if role == "vlm" or config.calibration.agent_data["source"] is not None:
        return {}
    return {"episode_lengths": episode_lengths(resolved_grpo(config))}


def picture_inputs(config: Config) -> dict[str, int]:
    """{"max_pixels": N} where the settings bound pictures, as an input of a stage."""
    return {} if config.models.max_pixels is None else {"max_pixels": config.models.max_pixels}


def live_inputs(config: Config) -> dict[str, Any]:
    """What of the live services decides a result, as an input of a stage.

    Returns:
        {"live": keys and values}. Empty at the defaults, so that what was made before stays valid.
    """
    found, default = (
        {key: value for key, value in asdict(section).items() if key not in FREE_LIVE}
        for section in (config.live, Live())
    )
    return {} if found == default else {"live": found}


def named_files(config: Config, *uses: str) -> dict[str, Any]:
    """Files of the user's that settings name, so that no result outlives their content.

    Args:
        config: settings.
        uses: which count: the questions of `train`, `eval` and `keep` (of a conflict map), the
            `dialect`, `vlm_data` and `agent_data` of the calibration, the `families` of the merge;
            of a training the `map` of its heads, `anchor_stats` and settings of `deepspeed`.

    Returns:
        {"files": {path: [[name, size, time of change], ...]}}; of a folder the files that hold
        rows, or second moments. Empty where no file is named, so that what was made before stays
        valid; what ships with the package changes with it alone and does not count.
    """
    from configs.schema import DIALECT_SUFFIX
    from train.deepspeed_json import SHIPPED_DEEPSPEED

    section, calibration = config.environment, config.calibration
    benchmarks = {
        "train": section.train_benchmark,
        "eval": section.eval_benchmark,
        "keep": config.conflict.keep_benchmark,
    }
    named = {use: [one.source] for use, one in benchmarks.items() if one is not None}
    named["vlm_data"] = [calibration.vlm_data["source"]]
    named["agent_data"] = [calibration.agent_data["source"]]
    named["families"] = [config.merge.families]
    named["map"] = [config.freeze_heads.map]
    named["anchor_stats"] = list(config.algorithm.anchor_stats)
    if config.deepspeed not in (*SHIPPED_DEEPSPEED, "none"):
        named["deepspeed"] = [config.deepspeed]
    if section.dialect.endswith(DIALECT_SUFFIX):
        named["dialect"] = [section.dialect]
    shipped = Path(str(resources.files("configs"))).resolve()
    stamps = {}
    pairs = [(use, name) for use in uses for name in named.get(use, ()) if name]
    for use, name in pairs:
        try:
            path = Path(name).expanduser()
            if path.exists() and shipped not in path.resolve().parents:
                stamps[name] = [_stamp(file) for file in _files_of(path, use)]
        except (OSError, RuntimeError):
            continue  # no path that there can be: whoever reads it says so
    return {"files": stamps} if stamps else {}


def checkpoint_inputs(named: Mapping[str, str | None]) -> dict[str, Any]:
    """Checkpoints beside the start, such as teachers, so that no result outlives their weights.

    Args:
        named: key of the settings -> folder, hub id or `atlas://name`; None does not count.

    Returns:
        {"checkpoints": {key: fingerprint}}; empty where none is named.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    from configs.errors import ConfigError
    from configs.schema import resolve_model

    prints = {}
    for key, name in named.items():
        try:
            if name:
                prints[key] = fingerprint(resolve_model(name))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    return {"checkpoints": prints} if prints else {}


def _files_of(path: Path, use: str) -> list[Path]:
    """What is read of a path: of a folder of statistics the second moments, of another one the rows
    of questions, or a data set that was saved there; not the pictures that they name."""
    from environments.benchmarks.reading import LOCAL_SUFFIXES
    from merge.stats import FILE_NAMES

    if not path.is_dir():
        return [path]
    if use == "anchor_stats":
        return [path / FILE_NAMES["diagonal"]]
    suffixes = (*LOCAL_SUFFIXES, ".arrow")
    # a `cache-` file is what reading a data set has left there
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix in suffixes and not file.match("cache-*.arrow")
    )


def make_task(
    name: str, config: Config, *, checkpoint: str | None = None, recognition: bool = False
) -> Task:
    """A measurement, under a key that changes with whatever decides its result.

    Args:
        name: for messages.
        config: settings; statistics that its merge needs must be there.
        checkpoint: evaluated as it is; None merges.
        recognition: see `compare.zero_shot.Task`.
    """
    from compare.zero_shot import Task
    from launch.commands.calibrate import parent_folder

    inputs: dict[str, Any] = {
        **evaluation_inputs(config),
        "seed": config.seed,
        "recognition": recognition,
        "code": _code_digest(),
    }
    if checkpoint is not None:
        inputs["checkpoint"] = fingerprint(checkpoint)
    else:
        section = asdict(config.merge)
        inputs |= named_files(config, "eval", "dialect", "families")
        inputs["merge"] = {k: v for k, v in section.items() if k not in NOT_OF_THE_RESULT}
        roles = ("base", "vlm", "agent", *config.models.donors)
        inputs["parents"] = [fingerprint(parent_folder(config, role)) for role in roles]
        files = statistics_files(config, needed_kinds(config.merge))
        inputs["statistics"] = [_stamp(path) for path in files]
    return Task(name, hash_inputs(inputs), config, checkpoint, recognition)


def check_merges(tasks: Iterable[Task], scratch: Path) -> None:
    """Plan every merge, so that a setting that cannot be merged is refused before any is measured.

    Args:
        tasks: those that merge are planned.
        scratch: folder where the merges would be made; nothing is written.

    Raises:
        MergeError: see `merge.engine.merge`.
    """
    from launch.commands.merge import merge_checkpoints

    for task in tasks:
        if task.checkpoint is None:
            merge_checkpoints(task.config, scratch / f".{task.key[:16]}", dry_run=True)


def away_from_test(config: Config, verb: str) -> Config:
    """Settings for choosing a merge, which could not be judged by the questions it was chosen on.

    Questions of an `environment.eval_benchmark` are asked as they are.
    """
    section = config.environment
    is_of_atlas = section.eval_benchmark is None or section.eval_benchmark.name == "atlas"
    if section.eval_split != "test" or not is_of_atlas:
        return config
    print(f"{verb}: settings are chosen on dev; environment.eval_split=test is left for the result")
    return replace(config, environment=replace(section, eval_split="dev"))


def _stamp(path: Path) -> list[Any] | None:
    if not path.exists():
        return None
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


@cache
def _code_digest() -> str:
    content = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(Path(str(resources.files(package))).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                content.update(path.read_bytes())
    return content.hexdigest()
