"""The run folder: made, kept from being overwritten, and checked before a run goes on in it.

A run folder stands alone. Made here: config.yaml, environment.json, merge.json and start_cost.json
(of a merged start), own/ (reward functions and dialect of one's own), frozen_heads.json (where some
are). Written as it goes: metrics.jsonl, trajectories.jsonl, pictures/, checkpoints/, heartbeat/,
health.jsonl, wandb_id and, at the end, done.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import DIALECT_SUFFIX, Config, dump_config, load_config
from configs.sections import FREE_LIVE
from merge.errors import MergeError
from merge.output import RECORD_NAME
from merge.verify import read_record
from rewards.functions import split_place
from train.files import write_json, write_text
from train.frozen import FILE_NAME as FROZEN_HEADS
from train.frozen import FrozenHeads, check_same_heads
from train.lock import LOCK_NAME
from train.machine import describe_machine
from train.start_cost import cost_of_start
from train.watchdog import clear_heartbeats

OWN_FOLDER = "own"
"""Copies of the user's files in a run folder: reward functions, a dialect."""

MAY_CHANGE = (
    "rewards.judge_key_variable", "rewards.judge_timeout_s", "rewards.judge_workers",
    "rewards.judge_cache",
    "sport.iterations", "sport.llm_timeout_s", "sport.llm_workers",
    "output", "tracking.", "compare.", "deepspeed", "hang_timeout_s", "grpo.max_steps",
    "grpo.save_", "rollout.tool_workers", "rollout.url", "rollout.timeout_s", "rollout.retries",
    # train.resume checks that their products with the number of processes stay
    "grpo.per_device_train_batch_size", "grpo.gradient_accumulation_steps",
    "grpo.steps_per_generation",
    "rollout.sync_dir", "rollout.sleep", "environment.timeout_s", "environment.retries",
    # the heads that they choose are compared themselves (train.frozen)
    "conflict.", "freeze_heads.map",
    "environment.backoff_s", "environment.cache", *(f"live.{key}" for key in FREE_LIVE),
)  # fmt: skip
"""Settings that may differ between a run and its continuation."""


def prepare_folder(
    folder: Path,
    config: Config,
    init: str,
    resume: bool,
    overwrite: bool,
    frozen: FrozenHeads | None = None,
    *,
    can_resume: bool = True,
) -> None:
    """Creates the run folder, or checks the one that shall go on.

    Args:
        folder: of the run.
        config: its settings.
        init: folder of its start.
        resume: go on with what is there.
        overwrite: delete what is there.
        frozen: heads that stay as they are.
        can_resume: the stage has `--resume`, for the message.

    Raises:
        ConfigError: it is in use, or holds a run with other settings or of another start.
    """
    recipe, kept = Path(init) / RECORD_NAME, folder / RECORD_NAME
    if _holds_anything(folder):
        if resume:
            check_same_run(folder, config, frozen)
            _check_same_start(recipe, kept)
        elif overwrite:
            if not (folder / "config.yaml").exists():
                raise ConfigError(
                    f"output: {folder} is not a run folder (no config.yaml), so it is not "
                    "overwritten; choose another output"
                )
            _empty(folder)
        else:
            go_on = "go on with --resume, " if can_resume else ""
            raise ConfigError(
                f"output: {folder} exists already; {go_on}choose another name with output=..., or "
                "delete it with --overwrite"
            )
    folder.mkdir(parents=True, exist_ok=True)
    clear_heartbeats(folder)
    (folder / "done.json").unlink(missing_ok=True)
    write_text(folder / "config.yaml", dump_config(config))
    about = {"deepspeed": config.deepspeed, "own_files": own_files(config)}
    write_json(folder / "environment.json", {**describe_machine(), **about})
    for name in own_files(config):
        (folder / OWN_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(Path(name).expanduser(), folder / OWN_FOLDER / Path(name).name)
    if frozen is not None:
        write_json(folder / FROZEN_HEADS, frozen.to_dict())
    if recipe.is_file() and not kept.is_file():
        write_text(kept, recipe.read_text(encoding="utf-8"))  # whole, or not there
    if cost := cost_of_start(init, frozen):
        write_json(folder / "start_cost.json", cost)


def _holds_anything(folder: Path) -> bool:
    """Whether a folder holds more than a lock and files that a kill has left half written."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


def _empty(folder: Path) -> None:
    """Removes all in a folder but the lock, by which this process holds it.

    The settings go last: they mark it as a run's, whenever a kill comes.
    """
    paths = [path for path in folder.iterdir() if path.name != LOCK_NAME]
    for path in sorted(paths, key=lambda path: path.name == "config.yaml"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def own_files(config: Config) -> dict[str, str]:
    """Files of the user's that decide on the result: reward functions and a dialect, with SHA-256.

    Raises:
        ConfigError: one is not there, or two have one name and cannot lie in one folder.
    """
    names = [split_place(section.function)[0] for section in config.reward_functions]
    if config.environment.dialect.endswith(DIALECT_SUFFIX):
        names.append(config.environment.dialect)
    names = list(dict.fromkeys(names))
    if len({Path(name).name for name in names}) < len(names):
        raise ConfigError(f"{', '.join(names)}: two files of one name; give each its own")
    hashes = {}
    for name in names:
        try:
            content = Path(name).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{name}: cannot be read ({error.strerror}); check the path"
            ) from error
        hashes[name] = hashlib.sha256(content).hexdigest()
    return hashes


def is_done(folder: Path, n_steps: int) -> bool:
    """Whether a run ended, not before this many steps, and its policy is still there.

    Args:
        folder: the run folder.
        n_steps: of the settings to go on with.
    """
    path = folder / "done.json"
    if not path.is_file():
        return False
    done = json.loads(path.read_text(encoding="utf-8"))
    return int(done["step"]) >= n_steps and (folder / str(done["policy"])).is_dir()


def check_same_run(folder: Path, config: Config, frozen: FrozenHeads | None) -> None:
    """A continuation with other data, rewards, heads or hyperparameters would be neither run.

    Raises:
        ConfigError: this one would have other settings than the run in the folder.
    """
    _check_same_settings(folder, config)
    check_same_heads(folder, frozen)


def _check_same_settings(folder: Path, config: Config) -> None:
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"output: {folder} holds no config.yaml, so there is nothing to resume")
    before, now = _flat(asdict(load_config(path))), _flat(asdict(config))
    changed = [
        f"{key} ({before.get(key)!r} before, {now.get(key)!r} now)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"output: {folder} was started with other settings: {', '.join(changed)}; "
            "resume it with its own, or choose another output"
        )
    _refuse_other_files(folder, config)


def _refuse_other_files(folder: Path, config: Config) -> None:
    """A reward function that was rewritten since is another reward."""
    path = folder / "environment.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = before.get("own_files") or {}
    for name, digest in own_files(config).items():
        if kept.get(name, digest) != digest:
            raise ConfigError(
                f"output: {name} has changed since {folder} was started; put "
                f"{folder / OWN_FOLDER / Path(name).name} back in its place, or choose another "
                "output"
            )


def _check_same_start(recipe: Path, kept: Path) -> None:
    """An adapter, a reference or an anchor would go on upon other weights than it began with."""
    if not recipe.is_file() or not kept.is_file():
        return
    try:
        now, before = (read_record(path.parent)["tensors"] for path in (recipe, kept))
    except MergeError as error:
        raise ConfigError(f"output: {error}") from error
    changed = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name, {}).get("checksum") != now.get(name, {}).get("checksum")
    ]
    if changed:
        raise ConfigError(
            f"models.init: {recipe.parent} was merged otherwise since {kept.parent} was started "
            f"({len(changed)} tensors differ, {changed[0]} is the first); put that start back, or "
            "choose another output"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {k: v for key in value for k, v in _flat(value[key], f"{prefix}{key}.").items()}
