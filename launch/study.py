"""A study: several starts, evaluated, trained over several seeds, and compared.

    calibrate -> merge every recipe -> evaluate zero-shot -> train arms x seeds -> compare

`obm demo` is the study configs/studies/demo.yaml. Every stage is made once (launch/stages.py), a
broken training goes on from its last checkpoint. Folders of a study:

    calibration/  merged/ARM/  zero-shot/ARM/  runs/ARM-sSEED/  logs/  configs/  stages/  report/
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import LaunchError
from launch.jobs import Job, run_jobs
from launch.stages import Stages, fingerprint
from launch.tasks import merged_roles, needed_kinds

if TYPE_CHECKING:
    from configs.schema import Config

NOT_STUDIES = ("recipes", "recipes-convergence", "grid")
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
    floors: bool = False
    """True: nothing is trained; every arm is evaluated as it is, with every seed"""
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
        "zero_shot", "overrides", "report", "report_name", "recipes", "floors", "benchmarks"
    }, str(path))  # fmt: skip
    recipes = read_yaml(path.parent / raw["recipes"]) if "recipes" in raw else {}
    if not isinstance(raw["arms"], list) or not raw["arms"]:
        raise LaunchError(f"{path}:arms: expected a list of arms, each with a name")
    arms = [_load_arm(entry, recipes, f"{path}:arms[{i}]") for i, entry in enumerate(raw["arms"])]
    names = [arm.name for arm in arms]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise LaunchError(f"{path}:arms: {repeated[0]!r} appears twice; give each a name")
    shows_starts = raw.get("zero_shot") or raw.get("floors") or raw.get("benchmarks")
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
        floors=bool(raw.get("floors", False)),
        benchmarks=dict(raw.get("benchmarks") or {}),
    )


def run_study(
    study: Study,
    *,
    command: str,
    overrides: Sequence[str] = (),
    parallel: int | None = None,
    redo: bool = False,
) -> dict[str, Any]:
    """Run what is missing of a study and write its report.

    Args:
        study: what to run.
        command: kept in the report.
        overrides: `key=value`, laid over the study's own.
        parallel: trainings at a time; default: one a GPU, or one a core.
        redo: make stages again whose settings have changed.

    Returns:
        The report's summary.
    """
    plan = Plan(study, list(overrides))
    plan.check()
    stages = Stages(study.output, redo=redo)
    started = time.monotonic()
    make_starts(plan, stages)
    if study.zero_shot:
        _evaluate(plan, stages, command)
    train_arms(plan, stages, parallel)
    summary = _compare(plan, command)
    say(f"finished in {(time.monotonic() - started) / 60:.1f} minutes")
    return summary


def describe_study(study: Study, overrides: Sequence[str] = ()) -> str:
    """What a study would run, without running it; every setting is checked on the way."""
    plan = Plan(study, list(overrides))
    lines = [f"study {study.name}: {study.title}", f"output {study.output}"]
    for arm in study.arms:
        start = arm.init or f"merge {json.dumps(arm.merge)}"
        seeds = f"seeds {', '.join(map(str, study.seeds))}"
        runs = seeds if arm.train or study.floors else "zero-shot only"
        lines.append(f"  {arm.name}: {start}; {runs}")
    if study.floors:
        lines.append(f"{len(study.arms) * len(study.seeds)} evaluations, no training")
        return "\n".join(lines)
    if study.benchmarks:
        n_starts = sum(len(arm.modes) for arm in study.arms)
        n_policies = sum(
            len(study.seeds) if arm.train else arm.trained is not None for arm in study.arms
        )
        columns = ", ".join(study.benchmarks)
        n = (n_starts + n_policies) * len(study.benchmarks)
        lines.append(f"{n} evaluations on {columns}")
    config = plan.config(study.arms[0])
    n_runs = sum(arm.train for arm in study.arms) * len(study.seeds)
    lines.append(f"{n_runs} trainings of {_max_steps(config)} steps")
    return "\n".join(lines)


class Plan:
    """Settings of every arm, all loaded and checked before anything runs."""

    def __init__(self, study: Study, overrides: list[str]) -> None:
        self.study = study
        self._overrides = [*flatten(study.overrides), *overrides]
        self._configs = {arm.name: self._load(arm) for arm in study.arms}
        self._join_kinds()

    def config(self, arm: Arm, seed: int | None = None) -> Config:
        """Settings of an arm, or of its training with a seed."""
        if seed is None:
            return self._configs[arm.name]
        return self._load(arm, seed)

    def start(self, arm: Arm) -> Path | str:
        """The checkpoint that the arm starts from."""
        from configs.schema import resolve_model

        return self.merged_folder(arm) if arm.merge else resolve_model(arm.init or "")

    def merged_folder(self, arm: Arm) -> Path:
        """Where the arm's merge lies."""
        return self.study.output / "merged" / arm.name

    def check(self) -> None:
        """Hold the training settings against TRL's names and the arithmetic of a step."""
        from train.settings import describe_step

        for arm in self.study.arms:
            describe_step(self.config(arm), 1)

    def run_folder(self, arm: Arm, seed: int) -> Path:
        """Where a training of the arm lies."""
        return self.study.output / "runs" / f"{arm.name}-s{seed}"

    def _load(self, arm: Arm, seed: int | None = None) -> Config:
        from configs.schema import load_config

        output = self.study.output if seed is None else self.run_folder(arm, seed)
        calibration = self.study.output / "calibration"
        own: dict[str, Any] = {
            "output": str(output),
            "models": {**arm.models, "init": arm.init or str(self.merged_folder(arm).resolve())},
            "calibration.output": str(calibration / arm.name if arm.models else calibration),
            "tracking.arm": arm.name,
            "tracking.group": self.study.name,
        }
        if seed is not None:
            own["seed"] = seed
        merge = {"merge": arm.merge} if arm.merge else {}
        return load_config(self.study.config, [*self._overrides, *flatten(merge), *flatten(own)])

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


def make_starts(plan: Plan, stages: Stages) -> None:
    """Statistics and merges that are missing."""
    _calibrate(plan, stages)
    _merge(plan, stages)


def _calibrate(plan: Plan, stages: Stages) -> None:
    seen: set[str] = set()
    for arm in plan.study.arms:
        config = plan.config(arm)
        for role, name in _calibrations(arm, config):
            if name not in seen:
                seen.add(name)
                calibrate_role(config, role, name, stages)


def calibrate_role(config: Config, role: str, name: str, stages: Stages) -> None:
    """The stage that makes one model's statistics, of the kinds that the settings name."""
    from launch.commands.calibrate import calibrate_parent, parent_folder, stats_path

    inputs = {
        "checkpoint": fingerprint(parent_folder(config, role)),
        "calibration": asdict(config.calibration),
        "environment": asdict(config.environment),
    }
    target = stats_path(config, role).parent
    made = stages.run(name, inputs, target, partial(calibrate_parent, config, role))
    kinds = ", ".join(config.calibration.kinds)
    what = name.removeprefix("calibrate-")
    say(f"calibrate  {what}: {kinds} of {config.calibration.samples} samples{reused(made)}")


def _merge(plan: Plan, stages: Stages) -> None:
    from launch.commands.calibrate import parent_folder
    from launch.commands.merge import merge_checkpoints

    for arm in plan.study.arms:
        if not arm.merge:
            continue
        config = plan.config(arm)
        roles = ("base", *merged_roles(config))
        inputs = {
            "merge": asdict(config.merge),
            "parents": {role: fingerprint(parent_folder(config, role)) for role in roles},
            "stats": [stages.key(name) for _, name in _calibrations(arm, config)],
        }
        target = plan.merged_folder(arm)
        make = partial(merge_checkpoints, config, target)
        made = stages.run(f"merge-{arm.name}", inputs, target, make)
        say(f"merge      {arm.name}: {_recipe(config)}{reused(made)}")


def _evaluate(plan: Plan, stages: Stages, command: str) -> None:
    from launch.commands.eval import describe, evaluate_checkpoint

    for arm in plan.study.arms:
        config = plan.config(arm)
        target = plan.study.output / "zero-shot" / arm.name
        inputs = {
            "start": start_key(plan, stages, arm),
            "environment": asdict(config.environment),
            "grpo": config.grpo,
        }
        make = partial(
            evaluate_checkpoint, config, str(plan.start(arm)), target, arm=arm.name, command=command
        )
        made = stages.run(f"evaluate-{arm.name}", inputs, target, make)
        record = json.loads((target / "eval.json").read_text(encoding="utf-8"))
        say(f"evaluate   {describe(record)}{reused(made)}")


def train_arms(plan: Plan, stages: Stages, parallel: int | None) -> None:
    """Trainings that are missing, of every arm that is to be trained, with every seed."""
    from tqdm import tqdm

    trainings = _missing_trainings(plan, stages)
    if not trainings:
        return
    inputs_of = {job.name: inputs for job, inputs in trainings}
    n_steps = len(trainings) * _max_steps(plan.config(plan.study.arms[0]))
    devices = _devices()
    with tqdm(total=n_steps, desc="train", unit="step", disable=None) as bar:
        reached: dict[str, int] = {}

        def on_line(job: Job, line: dict[str, Any]) -> None:
            before, step = reached.get(job.name, 0), int(line.get("step", 0))
            reached[job.name] = max(step, before)
            bar.update(max(0, step - before))
            if line.get("phase") == "eval":
                say(f"train      {job.name} step {step}: {_floor_words(line)}")

        def on_done(job: Job, seconds: float) -> None:
            stages.finish(f"train-{job.name}", inputs_of[job.name], seconds)

        run_jobs(
            [job for job, _ in trainings],
            parallel=parallel or len(devices) or len(os.sched_getaffinity(0)),
            on_line=on_line,
            on_done=on_done,
            devices=devices,
        )


def _missing_trainings(plan: Plan, stages: Stages) -> list[tuple[Job, dict[str, Any]]]:
    """Trainings that are not done, with what decides their result; each is marked as begun."""
    from configs.schema import dump_config
    from train.resume import whole_checkpoints
    from train.run import write_text

    trainings = []
    # Seeds outside, arms inside: a study that is stopped early has whole seeds to compare.
    for seed, arm in product(plan.study.seeds, plan.study.arms):
        if not arm.train:
            continue
        config, name = plan.config(arm, seed), f"{arm.name}-s{seed}"
        settings = asdict(config)
        inputs = {
            "start": start_key(plan, stages, arm),
            **{key: settings[key] for key in ("seed", "environment", "rewards", "grpo")},
            "eval_every": config.compare.eval_every,
            "deepspeed": config.deepspeed,
        }
        if config.freeze_heads.source != "none":
            inputs["freeze_heads"] = settings["freeze_heads"]
        output = plan.run_folder(arm, seed)
        if stages.is_done(f"train-{name}", inputs, output):
            say(f"train      {name}{reused(False)}")
            continue
        resume = ["--resume"] if whole_checkpoints(output) else []
        if not resume:
            stages.clear(f"train-{name}", output)
        stages.start(f"train-{name}", inputs)
        file = plan.study.output / "configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, dump_config(config))
        log = plan.study.output / "logs" / f"{name}.log"
        trainings.append((Job(name, ["--config", str(file), *resume], output, log), inputs))
    return trainings


def _compare(plan: Plan, command: str) -> dict[str, Any]:
    from compare.report import text_table, write_report
    from compare.runs import read_run

    study = plan.study
    folders = []
    for arm in study.arms:
        if arm.train:
            folders += [plan.run_folder(arm, seed) for seed in study.seeds]
        elif study.zero_shot:
            folders.append(study.output / "zero-shot" / arm.name)
    config = plan.config(study.arms[0])
    output = study.report or study.output / "report"
    summary = write_report(
        [read_run(folder) for folder in folders],
        output,
        command=command,
        name=study.report_name,
        title=study.title,
        target_arm=config.compare.target_arm,
        smoothing=config.compare.smoothing,
        bootstrap=config.compare.bootstrap,
        overwrite=True,
    )
    print(f"\n{text_table(summary)}\n")
    say(f"picture: {output / study.report_name}.png")
    say(f"tables:  {output / study.report_name}.md")
    return summary


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


def flatten(mapping: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as `a.b=value` overrides."""
    overrides = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            overrides += flatten(value, f"{prefix}{key}.")
        else:
            overrides.append(f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}")
    return overrides


def _calibrations(arm: Arm, config: Config) -> list[tuple[str, str]]:
    """(role, stage name) of the statistics that an arm's merge needs; arms share the study's."""
    if not arm.merge or not needed_kinds(config.merge):
        return []
    return [(role, f"calibrate-{arm.name}-{role}" if arm.models else f"calibrate-{role}")
            for role in merged_roles(config)]  # fmt: skip


def start_key(plan: Plan, stages: Stages, arm: Arm) -> Any:
    """What tells an arm's start from another one."""
    return stages.key(f"merge-{arm.name}") if arm.merge else fingerprint(str(plan.start(arm)))


def _max_steps(config: Config) -> int:
    from train.settings import GRPO_DEFAULTS

    return int(config.grpo.get("max_steps", GRPO_DEFAULTS["max_steps"]))


def _recipe(config: Config) -> str:
    from merge.methods import METHODS

    settings = config.merge
    weights = [f"{role} {settings.weights.get(role, 1.0):g}" for role in merged_roles(config)]
    is_sparse = METHODS[settings.method].is_sparse
    density = f"density {settings.density:g}, " if is_sparse else ""
    return f"{density}weights {', '.join(weights)}"


def _floor_words(line: dict[str, Any]) -> str:
    parts = ("searched", "entity", "passage", "accuracy")
    return ", ".join(
        f"{part} {line[f'eval/{part}']:.2f}" for part in parts if f"eval/{part}" in line
    )


def _devices() -> list[int]:
    import torch

    return list(range(torch.cuda.device_count()))


def reused(made: bool) -> str:
    """What is said of a stage that was there."""
    return "" if made else " (there already)"


def say(message: str) -> None:
    """One line, above a bar where there is one."""
    from tqdm import tqdm

    tqdm.write(message)
