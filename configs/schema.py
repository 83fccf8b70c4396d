"""Loads, checks, dumps and documents the settings of an experiment.

Precedence: dataclass default < inherited file < file < override on the command line.

    config = load_config("configs/demo.yaml", ["grpo.learning_rate=2e-6", "seed=1"])
"""

import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from configs.checks import Where, build, fail, nearest
from configs.documentation import describe
from configs.errors import ConfigError
from configs.reader import expand_call, parse_yaml, read_yaml, write_yaml
from configs.sections import (
    Algorithm,
    Benchmark,
    Calibration,
    Compare,
    Config,
    Conflict,
    Environment,
    FreezeHeads,
    Lora,
    Merge,
    Method,
    Models,
    Rewards,
    Scope,
    TensorRule,
    Tracking,
)

__all__ = [
    "Algorithm",
    "Calibration",
    "Compare",
    "Config",
    "ConfigError",
    "Conflict",
    "Environment",
    "FreezeHeads",
    "Lora",
    "Merge",
    "Models",
    "Rewards",
    "Scope",
    "TensorRule",
    "Tracking",
    "describe",
    "dump_config",
    "load_config",
    "resolve_model",
    "shipped_config",
]

COMMAND_LINE = "command line"
ATLAS_PREFIX = "atlas://"
ROLES = ("base", "vlm", "agent")
"""What a merge calls the three models of `models`; a donor may not take their names."""
SEARCH_TOKEN_VARIABLE = "OBM_SEARCH_TOKEN"
"""of the server that `environment.retrieval` names; environments/remote.py reads it"""
LARGEST_SEED = 2**32 - 1
"""NumPy's generator, which a training seeds, takes no larger one."""
SHIPPED_DIALECTS = ("search_r1", "search_r1_full", "mmsearch_r1", "hermes")
"""Names that the setting `environment.dialect` takes; else it is a file."""
DIALECT_SUFFIX = ".yaml"
SHIPPED_DEEPSPEED = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""Files of configs/deepspeed, by the names that the setting `deepspeed` takes."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads one experiment.

    Args:
        path: YAML file; its `inherits: other.yaml` is relative to the file itself.
        overrides: `dotted.key=value`, the value parsed as YAML.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, value out of range or bad choice.
    """
    origins: dict[str, str] = {}
    raw = _read_chain(Path(path), origins, ())
    for override in overrides:
        _apply_override(raw, override, origins)

    def where(key: str) -> str:
        """The file that set this key, or the nearest section above it."""
        while key and key not in origins:
            key = key.rpartition(".")[0] if "[" not in key else key.partition("[")[0]
        return origins.get(key, str(path))

    config = build(raw, Config, "", where)
    tasks = ("vlm", "agent", *config.models.donors)
    for name in config.merge.weights:
        if name not in tasks:
            key = f"merge.weights.{name}"
            fail(where, key, "no model of this name is merged", nearest(name, tasks))
    if config.models.freeze_vision and config.lora.train_vision:
        reason = "models.freeze_vision says the opposite"
        fail(where, "lora.train_vision", reason, "remove one of the two")
    for name in config.models.donors:
        if name in ROLES:
            reason = f"'{name}' is a model of its own, not a donor"
            fail(where, f"models.donors.{name}", reason, f"set models.{name}, or rename the donor")
        if name in get_args(Method):
            reason = f"'{name}' is the name of a merge method"
            fail(where, f"models.donors.{name}", reason, "rename the donor")
        if not re.fullmatch(r"[\w-]+", name):  # dots part the keys of settings, slashes pairs
            reason = f"'{name}' has other signs than letters, digits, _ and -"
            fail(where, f"models.donors.{name}", reason, "rename the donor")
    if not 0 <= config.seed <= LARGEST_SEED:
        fix = f"use a whole number from 0 to {LARGEST_SEED}"
        fail(where, "seed", f"{reprlib.repr(config.seed)} is out of range", fix)
    _check_address(
        config.environment.retrieval, "environment.retrieval", SEARCH_TOKEN_VARIABLE, where
    )
    _check_judge(config.rewards, where)
    _check_atlas(config.environment.train_benchmark, "environment.train_benchmark", where)
    _check_atlas(config.environment.eval_benchmark, "environment.eval_benchmark", where)
    _check_atlas(config.conflict.keep_benchmark, "conflict.keep_benchmark", where)
    dialect = config.environment.dialect
    if dialect not in SHIPPED_DIALECTS and not dialect.endswith(DIALECT_SUFFIX):
        names = (*SHIPPED_DIALECTS, f"the path of a {DIALECT_SUFFIX} file")
        reason = f"there is no dialect '{dialect}'"
        fix = nearest(dialect, SHIPPED_DIALECTS)
        if not fix.startswith("did"):
            fix = f"use {', '.join(names)}"
        fail(where, "environment.dialect", reason, fix)
    if config.deepspeed == "none":
        config.deepspeed = None
    name = config.deepspeed
    if name and name not in SHIPPED_DEEPSPEED and not name.endswith(".json"):
        raise ConfigError(
            f"{where('deepspeed')}:deepspeed: '{name}' is not known; "
            f"use {', '.join(SHIPPED_DEEPSPEED)}, none or the path of a .json file"
        )
    _expand_home(config)
    return config


def _expand_home(config: Config) -> None:
    """Puts the home folder in the place of `~`, where a setting is a path that is used as it is.

    No shell does it in `calibration.output=~/stats` or in a file. A folder named `~` would be made
    here, and who removes it as the shell reads it removes the home folder.
    """
    asks = (
        config.environment.train_benchmark,
        config.environment.eval_benchmark,
        config.conflict.keep_benchmark,
    )
    paths: list[tuple[Any, str]] = [
        (config, "output"),
        (config, "deepspeed"),
        (config.calibration, "output"),
        (config.environment, "cache"),
        (config.live, "image_host"),
        (config.rewards, "judge_cache"),
        (config.rollout, "sync_dir"),
        *((asked, "images") for asked in asks if asked is not None),
    ]
    for section, key in paths:
        if getattr(section, key):
            setattr(section, key, os.path.expanduser(getattr(section, key)))
    config.algorithm.anchor_stats = [*map(os.path.expanduser, config.algorithm.anchor_stats)]


def _check_address(url: str | None, key: str, variable: str, where: Where) -> None:
    """That a service can be asked there, so that a dry run says so as well.

    The settings are written into the run folder, so no key may stand in them.
    """
    if not url:
        return
    try:
        parts = urlsplit(url)
        has_port = parts.port != 0  # a ValueError for what is no port at all
    except ValueError:
        parts, has_port = urlsplit(""), False
    if parts.username or parts.password or parts.query:
        fix = f"put it into the environment variable {variable}"
        fail(where, key, "an address must not hold a key", fix)
    is_web = url.lower().startswith(("http://", "https://")) and url.isprintable()
    if not is_web or not parts.hostname or not has_port or " " in parts.netloc:
        fail(where, key, f"{url!r} is no address of a service", "write it as http://host:port")


def _check_judge(rewards: Rewards, where: Where) -> None:
    """That the judge can be asked, and by an address without a key."""
    if rewards.judge is None:
        return
    if any(mark in rewards.judge for mark in "@?#"):
        fix = "name an environment variable in rewards.judge_key_variable"
        fail(where, "rewards.judge", "an address must not hold a key", fix)
    _check_address(rewards.judge, "rewards.judge", rewards.judge_key_variable, where)
    if not rewards.judge_model:
        fail(where, "rewards.judge_model", "nobody is named to judge", "name the service's model")


def _check_atlas(asked: Benchmark | None, key: str, where: Where) -> None:
    """That nothing is chosen of the atlas where it would not be read."""
    if asked is None or asked.name != "atlas":
        return
    for item in fields(Benchmark):
        if item.name != "name" and getattr(asked, item.name) != getattr(Benchmark(), item.name):
            reason = "not read where the atlas asks (name: atlas)"
            fix = f"remove it, or set {key}.name; docs/configuration.md has the atlas' own keys"
            fail(where, f"{key}.{item.name}", reason, fix)


def _read_chain(path: Path, origins: dict[str, str], children: tuple[Path, ...]) -> dict[str, Any]:
    """Reads a file on top of what it inherits; notes in `origins` which file set which key."""
    raw = read_yaml(path)
    if path.resolve() in children:
        raise ConfigError(f"{path}:inherits: the files inherit in a circle; remove one 'inherits'")
    parent = raw.pop("inherits", None)
    if parent is None:
        merged: dict[str, Any] = {}
    elif isinstance(parent, str):
        parent = os.path.expanduser(parent)
        merged = _read_chain(path.parent / parent, origins, (*children, path.resolve()))
    else:
        raise ConfigError(f"{path}:inherits: expected a file name, got {parent!r}; name one file")
    _lay_over(merged, raw, str(path), "", origins)
    return merged


def _lay_over(
    below: dict[str, Any], above: dict[str, Any], origin: str, key: str, origins: dict[str, str]
) -> None:
    """Deep update of `below` in place; lists and scalars replace, mappings merge."""
    for name, value in above.items():
        dotted = f"{key}.{name}" if key else str(name)
        origins[dotted] = origin
        if dotted == "freeze_heads" and isinstance(value, str):
            value = expand_call(value, f"{origin}:{dotted}")
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            _lay_over(below[name], value, origin, dotted, origins)
        elif isinstance(value, dict):
            below[name] = {}
            _lay_over(below[name], value, origin, dotted, origins)
        elif value is None and isinstance(below.get(name), dict):
            continue  # an empty section in a child keeps what its parent says
        else:
            below[name] = value


def _apply_override(raw: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(
            f"{COMMAND_LINE}:{override}: not an override; write key=value, "
            "for example seed=1 or grpo.max_steps=2"
        )
    *parents, name = dotted.split(".")
    value = parse_yaml(text, f"{COMMAND_LINE}:{dotted}")
    section, key = raw, ""
    for parent in parents:
        key = f"{key}.{parent}" if key else parent
        if not isinstance(section.get(parent), dict):
            section[parent], origins[key] = {}, COMMAND_LINE
        section = section[parent]
    if value is None:  # unlike an empty section in a file, `models.init=` sets the key to nothing
        section[name] = None
        origins[dotted] = COMMAND_LINE
    else:
        _lay_over(section, {name: value}, COMMAND_LINE, key, origins)


def dump_config(config: Config) -> str:
    """YAML text with every key; loads back equal."""
    return write_yaml(asdict(config))


def shipped_config(name: str) -> Path:
    """Path of a YAML file that ships with the package, by `demo` or `demo.yaml`.

    Raises:
        ConfigError: no such file; names the nearest one.
    """
    folder = Path(str(resources.files("configs")))
    stem = name.removesuffix(".yaml")
    path = folder / f"{stem}.yaml"
    if not path.is_file():
        names = sorted(item.stem for item in folder.glob("*.yaml"))
        raise ConfigError(f"no shipped configuration '{stem}'; {nearest(stem, names)}")
    return path


def resolve_model(ref: str) -> str:
    """Turns a model reference into what `from_pretrained` takes.

    Args:
        ref: `atlas://name` (a checkpoint that ships with the package), a folder (relative to the
            current directory), or a hub id `owner/name` or `owner/name@revision`.

    Returns:
        An absolute folder, or the hub id unchanged.

    Raises:
        ConfigError: the shipped checkpoint or the folder does not exist.
    """
    if ref.startswith(ATLAS_PREFIX):
        name = ref.removeprefix(ATLAS_PREFIX).strip("/")
        folder = Path(str(resources.files("environments.atlas"))) / "checkpoints"
        names = sorted(item.name for item in folder.glob("*") if item.is_dir())
        if name not in names:
            raise ConfigError(
                f"no shipped checkpoint '{ref}'; {nearest(name, names)}"
                if names
                else f"no shipped checkpoint '{ref}' in {folder}; "
                "make the checkpoints with 'obm atlas build'"
            )
        return str(folder / name)
    path = Path(os.path.expanduser(ref))  # the ~ of an unknown user stays
    if path.is_dir():
        return str(path.resolve())
    owner = ref.partition("/")[0]
    # a typing error in a local path must not become a download attempt
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", ref) is not None
    if is_hub_id and owner != "runs" and not Path(owner).is_dir():
        return ref
    raise ConfigError(
        f"no checkpoint folder '{ref}' (looked in {Path.cwd()}); check the path, "
        "or name a hub id as owner/name or owner/name@revision"
    )
