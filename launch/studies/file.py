"""What a study file says: arms, seeds, settings, and which kind of study it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

KINDS = ("ceiling", "floor", "table")
"""What is done with the arms: trained and compared, evaluated as they are, put in a table."""

NOT_STUDIES = ("recipes", "grid")
"""Files in configs/studies that studies and `obm tune` read."""


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
    modes: list[str] = field(default_factory=lambda: ["agent"])
    """with `benchmarks`: how the start is asked, see `compare.modes`"""
    trained: str | None = None
    """with `benchmarks`: a policy that was trained from this start already"""


@dataclass
class Study:
    """What a study file says; see configs/studies/demo.yaml for an example."""

    name: str
    config: Path
    output: Path
    arms: list[Arm]
    seeds: list[int]
    title: str
    zero_shot: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None
    report_name: str = "compare"
    kind: str = "ceiling"
    """one of `KINDS`"""
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """title -> settings of its questions; every arm is evaluated on each, for a table"""


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Args:
        path: a YAML file, or the bare name of a shipped one.

    Raises:
        ConfigError: the file cannot be read.
        LaunchError: an unknown key, an arm without a start, a recipe that is not there.
    """
    from configs.reader import read_yaml

    path = _study_path(str(path))
    raw = read_yaml(path)
    _check_keys(raw, {"config", "output", "arms", "seeds", "title"}, {
        "kind", "zero_shot", "overrides", "report", "report_name", "recipes", "benchmarks"
    }, str(path))  # fmt: skip
    recipes = read_yaml(path.parent / raw["recipes"]) if "recipes" in raw else {}
    if not isinstance(raw["arms"], list) or not raw["arms"]:
        raise LaunchError(f"{path}:arms: expected a list of arms, each with a name")
    arms = [_load_arm(entry, recipes, f"{path}:arms[{i}]") for i, entry in enumerate(raw["arms"])]
    names = [arm.name for arm in arms]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise LaunchError(f"{path}:arms: {repeated[0]!r} appears twice; give each a name")
    kind = raw.get("kind", KINDS[0])
    if kind not in KINDS:
        raise LaunchError(f"{path}:kind: {kind!r}; choose one of {', '.join(KINDS)}")
    shows_starts = raw.get("zero_shot") or kind != "ceiling"
    if not shows_starts and not all(arm.train for arm in arms):
        raise LaunchError(f"{path}: an arm with train: false is only seen with zero_shot: true")
    seeds = raw["seeds"]
    if not isinstance(seeds, list) or not seeds or len(set(seeds)) < len(seeds):
        raise LaunchError(f"{path}:seeds: {seeds!r}; list at least one seed, each once")
    return Study(
        name=path.stem,
        config=(path.parent / raw["config"]).resolve(),
        output=Path(raw["output"]),
        arms=arms,
        seeds=[int(seed) for seed in seeds],
        title=str(raw["title"]),
        zero_shot=bool(raw.get("zero_shot", False)),
        overrides=dict(raw.get("overrides") or {}),
        report=Path(raw["report"]) if raw.get("report") else None,
        report_name=str(raw.get("report_name", "compare")),
        kind=str(kind),
        benchmarks=dict(raw.get("benchmarks") or {}),
    )


def _study_path(name: str) -> Path:
    from importlib import resources

    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return path
    folder = Path(str(resources.files("configs"))) / "studies"
    shipped = folder / f"{name}.yaml"
    if not shipped.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml") if p.stem not in NOT_STUDIES)
        raise LaunchError(f"no shipped study {name!r}; choose one of {', '.join(names)}, or a file")
    return shipped


def _load_arm(entry: Any, recipes: dict[str, Any], where: str) -> Arm:
    if not isinstance(entry, dict):
        raise LaunchError(f"{where}: expected name and init or merge, got {entry!r}")
    optional = {"init", "merge", "models", "train", "modes", "trained"}
    _check_keys(entry, {"name"}, optional, where)
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
    return Arm(
        str(entry["name"]),
        entry.get("init"),
        merge,
        models,
        bool(entry.get("train", entry.get("trained") is None)),
        list(entry.get("modes") or ["agent"]),
        entry.get("trained"),
    )


def _check_keys(raw: dict[str, Any], needed: set[str], optional: set[str], where: str) -> None:
    from configs.checks import nearest

    for key in raw:
        if key not in needed | optional:
            hint = nearest(key, sorted(needed | optional))
            raise LaunchError(f"{where}: unknown key {key!r}; {hint}")
    missing = sorted(needed - raw.keys())
    if missing:
        raise LaunchError(f"{where}: {missing[0]!r} is missing; add it")
