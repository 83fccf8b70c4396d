"""What a study file says: arms, seeds, settings, and which kind of study it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

KINDS = ("ceiling", "floor", "ablation", "transfer", "table")
"""What is done: arms are trained and compared (ceiling), evaluated as they are (floor), one is
varied (ablation), asked where they were not trained (transfer), or put in the paper's table."""
ALL_NEED = {"config", "output", "seeds", "title"}
ALL_MAY = {"kind", "overrides", "report", "report_name", "recipes"}
NEEDED = {
    "ceiling": {"arms"},
    "floor": {"arms"},
    "ablation": {"reference", "axes"},
    "transfer": {"arms", "benchmarks", "references"},
    "table": {"arms", "benchmarks"},
}
OPTIONAL = {"ceiling": {"zero_shot", "perception"}, "transfer": {"trained", "starts"}}
NOT_STUDIES = ("recipes", "recipes-second", "grid", "grid-second")
"""Files in configs/studies that studies and `obm tune` read."""
PREPARE = ("sport", "sft")
"""Verbs that make a start from another one, see docs/sport.md."""


@dataclass
class Arm:
    """One start of the comparison: a checkpoint as it is, or a merge."""

    name: str
    init: str | None = None
    merge: dict[str, Any] | None = None
    models: dict[str, str] = field(default_factory=dict)
    """parents of this merge, where they are not the study's"""
    train: bool = True
    """False: evaluated as it is, not trained"""
    prepare: str | None = None
    """one of `PREPARE`: what is done to the start, with every seed anew, before it is trained"""
    settings: dict[str, Any] = field(default_factory=dict)
    """of this arm alone, over the study's `overrides`; the report says what they let differ"""
    modes: list[str] = field(default_factory=lambda: ["agent"])
    """table: how the start is asked, see `compare.modes`"""
    trained: str | None = None
    """table: a policy that was trained from this start already"""


@dataclass
class Study:
    """What a study file says; see configs/studies/demo.yaml for an example."""

    name: str
    config: Path
    output: Path
    arms: list[Arm]
    seeds: list[int]
    title: str
    kind: str = "ceiling"
    """one of `KINDS`"""
    zero_shot: bool = False
    perception: bool = False
    """ceiling: also measure recognition before and after training"""
    overrides: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None
    """folder of the report; None = `report/` of the output"""
    report_name: str = "compare"
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """title -> settings of its questions; every arm is evaluated on each (table, transfer)"""
    axes: dict[str, Any] = field(default_factory=dict)
    """ablation: name -> what is varied, see `launch.studies.axes`"""
    trained: str | None = None
    """transfer: run folders of another study, with `{arm}` and `{seed}`; None = trained here"""
    starts: str | None = None
    """transfer: merges of another study, with `{arm}`; None = merged here"""
    references: list[str] = field(default_factory=list)
    """transfer: arms that the others are held against"""
    file: Path = Path()
    """the study file"""

    @property
    def folder(self) -> Path:
        """Where the study file lies."""
        return self.file.parent

    @property
    def report_folder(self) -> Path:
        """Where the report goes."""
        return self.report or self.output / "report"

    def place(self, arm: Arm) -> str:
        """Where the study file has an arm, for messages."""
        if self.kind == "ablation":
            return f"{self.file}:reference"
        return f"{self.file}:arms[{self.arms.index(arm)}] ({arm.name})"


@dataclass(frozen=True)
class Options:
    """How a study is run."""

    command: str
    """kept in the report"""
    overrides: Sequence[str] = ()
    """`key=value`, laid over the study's own"""
    parallel: int | None = None
    """trainings, or evaluations, at a time; None = what the machine takes"""
    n_processes: int = 1
    """of one training"""
    redo: bool = False
    """make stages again whose settings have changed"""
    partial: bool = False
    """where trainings fail, report what is complete"""


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Args:
        path: a YAML file, or the bare name of a shipped one.

    Raises:
        ConfigError: the file cannot be read.
        LaunchError: an unknown key, a value of another shape, an arm without a start, a recipe that
            is not there.
    """
    from configs.reader import read_yaml
    from launch.studies.shapes import STUDY, check_values

    path = _study_path(str(path))
    raw = read_yaml(path)
    kind = raw.get("kind", KINDS[0])
    if kind not in KINDS:
        raise LaunchError(f"{path}:kind: {kind!r}; choose one of {', '.join(KINDS)}")
    may = ALL_MAY | OPTIONAL.get(kind, set())
    _check_keys(raw, ALL_NEED | NEEDED[kind], may, str(path))
    check_values(raw, STUDY, f"{path}:")
    if kind == "table":
        _check_columns(raw["benchmarks"], path)
    recipes = _read_recipes(path.parent / raw["recipes"]) if "recipes" in raw else {}
    entries = [_reference(raw["reference"])] if kind == "ablation" else raw["arms"]
    arms = _load_arms(entries, recipes, f"{path}:{'reference' if kind == 'ablation' else 'arms'}")
    for arm in arms:
        if kind != "ceiling" and (arm.prepare or arm.settings):
            raise LaunchError(f"{path}: {arm.name}: prepare and settings are for kind: ceiling")
    shows_starts = raw.get("zero_shot") or kind != "ceiling"
    if not shows_starts and not all(arm.train for arm in arms):
        raise LaunchError(f"{path}: an arm with train: false is only seen with zero_shot: true")
    untrained = [arm.name for arm in arms if not arm.train]
    if kind == "transfer" and raw.get("trained") is None and untrained:
        raise LaunchError(
            f"{path}: {untrained[0]}: every arm is asked after its training; drop train: false, or "
            "name the runs as `trained`"
        )
    references = [str(name) for name in raw.get("references") or []]
    repeated = [name for name in references if references.count(name) > 1]
    if repeated:
        raise LaunchError(f"{path}:references: {repeated[0]!r} is listed twice; list each once")
    unknown = [name for name in references if name not in [arm.name for arm in arms]]
    if unknown or (kind == "transfer" and not references):
        named = f"no arm {unknown[0]!r}" if unknown else "none is named"
        raise LaunchError(f"{path}:references: {named}; choose among the arms")
    return Study(
        name=path.stem,
        config=(path.parent / raw["config"]).resolve(),
        output=Path(os.path.expanduser(raw["output"])),  # else `~` would be a folder here
        arms=arms,
        seeds=raw["seeds"],
        title=str(raw["title"]),
        kind=str(kind),
        zero_shot=raw.get("zero_shot", False),
        perception=raw.get("perception", False),
        overrides=dict(raw.get("overrides") or {}),
        report=Path(os.path.expanduser(raw["report"])) if raw.get("report") else None,
        report_name=str(raw.get("report_name", "compare")),
        benchmarks=dict(raw.get("benchmarks") or {}),
        axes=dict(raw.get("axes") or {}),
        trained=raw.get("trained"),
        starts=raw.get("starts"),
        references=references,
        file=path,
    )


def _study_path(name: str) -> Path:
    from importlib import resources

    path = Path(name)
    # Path.is_file raises where a name is too long
    if os.path.isfile(path) or path.suffix or len(path.parts) > 1:
        return path
    folder = Path(str(resources.files("configs"))) / "studies"
    shipped = folder / f"{name}.yaml"
    if not os.path.isfile(shipped):
        names = sorted(p.stem for p in folder.glob("*.yaml") if p.stem not in NOT_STUDIES)
        raise LaunchError(f"no shipped study {name!r}; choose one of {', '.join(names)}, or a file")
    return shipped


def _check_columns(titles: Iterable[str], path: Path) -> None:
    """A column of the table is part of the names of its evaluations' folders."""
    from launch.studies.shapes import check_name

    for title in titles:
        check_name(title, f"{path}:benchmarks.{title}")


def _read_recipes(path: Path) -> dict[str, Any]:
    """Recipes by name, each with the settings of a merge."""
    from configs.reader import read_yaml
    from launch.studies.shapes import check_recipe

    recipes = {str(name): recipe for name, recipe in read_yaml(path).items()}
    for name, recipe in recipes.items():
        check_recipe(recipe, f"{path}:{name}")
    return recipes


def _reference(reference: Any) -> dict[str, Any]:
    """The one arm of an ablation: a recipe's name, or the merge's settings."""
    name = reference if isinstance(reference, str) else "reference"
    return {"name": name, "merge": reference}


def _load_arms(entries: Any, recipes: dict[str, Any], where: str) -> list[Arm]:
    if not isinstance(entries, list) or not entries:
        raise LaunchError(
            f"{where}: expected a list of arms, each with a name; write - {{name: ..., ...}}"
        )
    places = [f"{where}[{i}]" if where.endswith("arms") else where for i in range(len(entries))]
    arms = [_load_arm(entry, recipes, at) for entry, at in zip(entries, places, strict=True)]
    names = [arm.name for arm in arms]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise LaunchError(f"{where}: {repeated[0]!r} appears twice; give each a name")
    return arms


def _load_arm(entry: Any, recipes: dict[str, Any], where: str) -> Arm:
    from launch.studies.shapes import ARM, check_values

    if not isinstance(entry, dict):
        raise LaunchError(
            f"{where}: expected name and init or merge, got {entry!r}; "
            "write {name: ..., init: ...}"
        )
    _check_keys(entry, {"name"}, set(ARM), where)
    check_values({"name": entry["name"]}, ARM, f"{where}.")
    check_values(entry, ARM, f"{where} ({entry['name']}).")
    merge = entry.get("merge")
    if isinstance(merge, str):
        if merge not in recipes:
            known = ", ".join(recipes) or "none; name the file under `recipes:`"
            raise LaunchError(f"{where}.merge: no recipe {merge!r}; there are {known}")
        merge = recipes[merge]
    if (merge is None) == (entry.get("init") is None):
        raise LaunchError(f"{where}: give either init (a checkpoint) or merge (a recipe)")
    models = entry.get("models") or {}
    if models and merge is None:
        raise LaunchError(f"{where}.models: only a merge has parents; name the checkpoint as init")
    arm = Arm(
        str(entry["name"]),
        entry.get("init"),
        merge,
        models,
        entry.get("train", entry.get("trained") is None),
        entry.get("prepare"),
        dict(entry.get("settings") or {}),
        list(entry.get("modes") or ["agent"]),
        entry.get("trained"),
    )
    _check_modes(arm, where)
    if arm.prepare is not None and arm.prepare not in PREPARE:
        raise LaunchError(f"{where}.prepare: {arm.prepare!r}; choose one of {', '.join(PREPARE)}")
    if arm.prepare and not arm.train:
        raise LaunchError(f"{where}: an arm with prepare is trained afterwards; drop train: false")
    return arm


def _check_modes(arm: Arm, where: str) -> None:
    if arm.modes == ["agent"]:
        return
    from compare.modes import MODES

    for index, mode in enumerate(arm.modes):
        if mode not in MODES:
            raise LaunchError(
                f"{where}.modes: arm {arm.name}: no mode {mode!r}; choose among {', '.join(MODES)}"
            )
        if mode in arm.modes[:index]:
            raise LaunchError(
                f"{where}.modes: arm {arm.name}: {mode!r} is listed twice; list each once"
            )


def _check_keys(raw: dict[str, Any], needed: set[str], optional: set[str], where: str) -> None:
    from configs.checks import nearest

    for key in raw:
        if key not in needed | optional:
            hint = nearest(str(key), sorted(needed | optional))
            raise LaunchError(f"{where}: unknown key {key!r}; {hint}")
    missing = sorted(needed - raw.keys())
    if missing:
        raise LaunchError(f"{where}: {missing[0]!r} is missing; add it")
