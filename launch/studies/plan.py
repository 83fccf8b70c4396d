"""Settings of every arm of a study, all loaded and checked before anything runs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from configs.reader import parse_yaml
from launch.stages import Stages, fingerprint
from launch.studies.file import Arm, Study
from launch.tasks import merged_roles, named_files, needed_kinds

if TYPE_CHECKING:
    from configs.schema import Config

COMMAND_LINE = "command line:"
"""How the message of a wrong override begins."""
SEEDED = ("calibration.seed", "merge.seed", "environment.data_seed")
"""What a seed of a study without training decides, see `launch.studies.measure.seeded`."""


class Plan:
    """Settings of every arm, all loaded and checked before anything runs."""

    def __init__(self, study: Study, overrides: list[str]) -> None:
        self.study = study
        self._overrides = overrides
        self._configs = {arm.name: self._load(arm) for arm in study.arms}
        check_heeded(study, overrides, [self._said(arm) for arm in study.arms])
        self._check_arms()
        self._map_owners = map_owners(study, self._configs)
        for arm in study.arms:
            self._place_map(arm, self._configs[arm.name])
        self._join_kinds()

    def config(self, arm: Arm, seed: int | None = None) -> Config:
        """Settings of an arm, or of its training with a seed."""
        if seed is None:
            return self._configs[arm.name]
        config = self._load(arm, seed)
        self._place_map(arm, config)
        if config.freeze_heads.source == "random":
            config.freeze_heads.seed = seed  # other heads with every seed: many controls
        return config

    def start(self, arm: Arm) -> Path | str:
        """The checkpoint that the arm starts from."""
        from configs.schema import resolve_model

        if arm.merge:
            return self.merged_folder(arm)
        try:
            return resolve_model(arm.init or "")
        except ConfigError as error:
            raise ConfigError(f"{self.study.place(arm)}.init: {error}") from error

    def merged_folder(self, arm: Arm) -> Path:
        """Where the arm's merge lies."""
        return self.study.output / "merged" / arm.name

    def check(self) -> None:
        """Hold the training settings against TRL's names and the arithmetic of a step."""
        from train.settings import describe_step

        for arm in self.study.arms:
            try:
                describe_step(self.config(arm), 1)
            except ConfigError as error:
                raise ConfigError(f"{self.study.place(arm)}: {error}") from error

    def prepared_folder(self, arm: Arm, seed: int) -> Path:
        """Where the run of the arm's `prepare` lies; its policy is what is trained."""
        return self.study.output / "prepared" / f"{arm.name}-s{seed}"

    def trained_start(self, arm: Arm, seed: int) -> Path | str:
        """The checkpoint that a training of the arm starts from."""
        return self.prepared_folder(arm, seed) / "policy" if arm.prepare else self.start(arm)

    def preparation(self, arm: Arm, seed: int) -> Config:
        """Settings of the arm's `prepare` with a seed."""
        config = self.config(arm, seed)
        return replace(
            config,
            output=str(self.prepared_folder(arm, seed)),
            models=replace(config.models, init=self.config(arm).models.init),
        )

    def map_owner(self, arm: Arm) -> str | None:
        """The arm under whose name the study makes the conflict map that this arm freezes heads by.

        Arms with one start and reward share the map of the first; None where the arm needs none.
        """
        return self._map_owners.get(arm.name)

    def map_folder(self, owner: str) -> Path:
        """Where a conflict map lies."""
        return self.study.output / "conflict" / owner

    def run_folder(self, arm: Arm, seed: int) -> Path:
        """Where a training of the arm lies."""
        return self.study.output / "runs" / f"{arm.name}-s{seed}"

    def _said(self, arm: Arm) -> set[str]:
        """Keys and sections of which an arm does not take what the command line says."""
        said = {override.partition("=")[0] for _, own in self._own(arm) for override in own}
        seeded = SEEDED if self.study.kind == "floor" else ()
        return {*said, "seed", *seeded, *(() if arm.merge else ("merge",))}

    def _load(self, arm: Arm, seed: int | None = None) -> Config:
        settings = [
            (f"{self.study.file}:overrides.", flatten(self.study.overrides)),
            (f"{self.study.place(arm)}.settings.", flatten(arm.settings)),
            (COMMAND_LINE, self._overrides),
            *self._own(arm, seed),
        ]
        return load_settings(self.study.config, settings)

    def _own(self, arm: Arm, seed: int | None = None) -> list[tuple[str, list[str]]]:
        """What makes an arm this arm; it stays whatever the command line says."""
        output = self.study.output if seed is None else self.run_folder(arm, seed)
        calibration = self.study.output / "calibration"
        init = arm.init or str(self.merged_folder(arm).resolve())
        if arm.prepare and seed is not None:
            init = str(Path(self.trained_start(arm, seed)).resolve())
        own: dict[str, Any] = {
            "output": str(output),
            "models": {**arm.models, "init": init},
            "calibration.output": str(calibration / arm.name if arm.models else calibration),
            "tracking.arm": arm.name,
            "tracking.group": self.study.name,
        }
        if seed is not None:
            own["seed"] = seed
        place = f"{self.study.place(arm)}."
        return [(place, flatten({"merge": arm.merge} if arm.merge else {})), (place, flatten(own))]

    def _place_map(self, arm: Arm, config: Config) -> None:
        if owner := self.map_owner(arm):
            config.freeze_heads.map = str(self.map_folder(owner).resolve() / "conflict.json")

    def _check_arms(self) -> None:
        """Refuse settings of an arm that nothing would follow: two arms would be one, silently.

        Raises:
            ConfigError: names arm and key.
        """
        statistics: dict[str | None, tuple[Arm, dict[str, Any]]] = {}
        for arm in self.study.arms:
            place, said = self.study.place(arm), self._said(arm)
            for override in flatten(arm.settings):
                key = override.partition("=")[0]
                if _is_said(key, said):
                    raise ConfigError(
                        f"{place}.settings.{key}: would change nothing, for the arm or its seed "
                        "says it itself or has no use for it; leave it out, or change the recipe"
                    )
            config = self._configs[arm.name]
            if calibrations(arm, config):
                section = {**asdict(config.calibration), "kinds": None}
                first, found = statistics.setdefault(config.calibration.output, (arm, section))
                if section != found:
                    raise ConfigError(
                        f"{place}.settings.calibration: differs from that of {first.name}, whose "
                        "statistics it shares; say it under overrides, for all arms, or make a "
                        "study of its own"
                    )

    def _join_kinds(self) -> None:
        """Arms that share a folder of statistics have all kinds made that any of them needs."""
        kinds: dict[str | None, set[str]] = {}
        for arm in self.study.arms:
            if arm.merge:
                config = self._configs[arm.name]
                needed = kinds.setdefault(config.calibration.output, set())
                needed.update(needed_kinds(config.merge))
        for config in self._configs.values():
            joined: list[Any] = sorted(kinds.get(config.calibration.output, ()))
            if joined:
                config.calibration.kinds = joined


def check_heeded(study: Study, overrides: Sequence[str], said: Sequence[Collection[str]]) -> None:
    """Refuse what the command line says and nothing in a study would follow.

    Args:
        study: for the message.
        overrides: `key=value`; a value may be a whole section.
        said: for every arm the keys and sections that are not the command line's to say.

    Raises:
        ConfigError: names the first such override.
    """
    for override in overrides:
        key, _, text = override.partition("=")
        leaves = _leaves(key, parse_yaml(text, f"{COMMAND_LINE}{key}"))
        if all(_is_said(leaf, of_arm) for leaf in leaves for of_arm in said):
            raise ConfigError(
                f"{COMMAND_LINE}{key}: would change nothing, for every arm or seed says it itself "
                f"or has no use for it; change it in {study.file} (a folder: --output)"
            )


def _leaves(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [key]
    return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]


def _is_said(key: str, said: Collection[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in said)


def map_owners(study: Study, configs: Mapping[str, Config]) -> dict[str, str]:
    """Arm -> arm whose conflict map it freezes heads by, of those that bring no map of their own.

    Args:
        study: its arms; one start, one reward and one way to diagnose it make one map, the first
            arm's.
        configs: settings by arm.
    """
    first: dict[tuple[str, ...], str] = {}
    owners = {}
    for arm in study.arms:
        config = configs[arm.name]
        frozen = config.freeze_heads
        if frozen.source in ("cast", "anti") and frozen.map is None:
            sections = ("conflict", "rewards", "reward_functions", "grpo", "algorithm")
            decides = {"start": [arm.init, arm.merge, arm.models]}
            decides |= {name: asdict(config)[name] for name in sections}
            owners[arm.name] = first.setdefault(tuple(flatten(decides)), arm.name)
    return owners


def load_settings(config: Path, settings: Sequence[tuple[str, Sequence[str]]]) -> Config:
    """Load settings of which a study file, an arm and the command line each say some.

    Args:
        config: the file that they are laid over.
        settings: (who says them, `key=value` overrides), later ones over earlier ones.

    Raises:
        ConfigError: a value that its key cannot have; names who says it.
    """
    from configs.schema import load_config

    try:
        return load_config(config, [override for _, said in settings for override in said])
    except ConfigError as error:
        raise ConfigError(_name_source(str(error), settings)) from error


def _name_source(message: str, settings: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The message with the place in a study file where it says `command line`.

    To `load_config` every override is of the command line. Of several that set the key the last
    one counts, since it is the one that was read.
    """
    if not message.startswith(COMMAND_LINE):
        return message
    rest = message.removeprefix(COMMAND_LINE)
    key = rest.partition(": ")[0]
    for place, said in reversed(settings):
        for override in said:
            name = override.partition("=")[0]
            sections = (f"{name}.", f"{name}[")
            if name == key or key.startswith(sections) or name.startswith(f"{key}."):
                return f"{place}{rest}"
    return message


def flatten(mapping: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as `a.b=value` overrides."""
    overrides = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            overrides += flatten(value, f"{prefix}{key}.")
        else:
            overrides.append(f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}")
    return overrides


def calibrations(arm: Arm, config: Config) -> list[tuple[str, str]]:
    """(role, stage name) of the statistics that an arm's merge needs; arms share the study's."""
    if not arm.merge or not needed_kinds(config.merge):
        return []
    return [(role, f"calibrate-{arm.name}-{role}" if arm.models else f"calibrate-{role}")
            for role in merged_roles(config)]  # fmt: skip


def start_key(plan: Plan, stages: Stages, arm: Arm, seed: int | None = None) -> Any:
    """What tells an arm's start, or that of its training with a seed, from another one."""
    if arm.prepare and seed is not None:
        return stages.key(preparation_stage(arm, seed))
    return stages.key(f"merge-{arm.name}") if arm.merge else fingerprint(str(plan.start(arm)))


def map_stage(owner: str) -> str:
    """Name of the stage of a conflict map."""
    return f"diagnose-{owner}"


def frozen_inputs(plan: Plan, stages: Stages, arm: Arm, config: Config) -> dict[str, Any]:
    """The section freeze_heads as what decides a result: a map of the study by its key, the user's
    own by its file."""
    section = asdict(config.freeze_heads)
    if owner := plan.map_owner(arm):
        section["map"] = stages.key(map_stage(owner))
    elif section["source"] in ("cast", "anti"):
        section |= named_files(config, "map")
    return section


def preparation_stage(arm: Arm, seed: int) -> str:
    """Name of the stage of an arm's `prepare` with a seed."""
    return f"{arm.prepare}-{arm.name}-s{seed}"


def max_steps(config: Config) -> int:
    """Optimizer steps of a training, TRL's default included."""
    from train.settings import GRPO_DEFAULTS

    return int(config.grpo.get("max_steps", GRPO_DEFAULTS["max_steps"]))
