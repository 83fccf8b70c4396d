"""Runs as data: read them and group them by arm and seed.

A run is read from any of

* a run folder (`config.yaml`, `metrics.jsonl`, `environment.json`, `done.json`, ...);
* a zero-shot evaluation (`eval.json`, written by `obm eval`): an arm with a floor and no curve;
* W&B: `wandb/offline-run-*` or a `.wandb` file, or `wandb://entity/project/run_id` on a server; see
  `compare.wandb_runs`.

What must agree between them is in `compare.comparable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.shapes import (
    check_arm,
    check_config,
    check_cost,
    check_line,
    check_metrics,
    check_name,
    check_provenance,
    check_seed,
    check_stats,
    read_object,
)
from compare.trajectory_files import read_lines
from configs.errors import ConfigError
from configs.reader import read_yaml

SINCE_START = ("step", "time_s", "device_s", "tokens")
WANDB_PREFIX = "wandb://"


@dataclass
class Run:
    """One arm and seed: its settings and its metrics.

    `evaluations` holds one dict an evaluation, ordered by step, keys without the `eval/` prefix;
    `training` one dict a logged training step. A zero-shot evaluation has one evaluation at step 0
    and `is_trained` False.
    """

    folder: Path | str
    """where it was read from"""
    arm: str
    seed: int
    config: dict[str, Any]
    evaluations: list[dict[str, Any]]
    training: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    is_trained: bool = True
    start: dict[str, Any] = field(default_factory=dict)
    """of the start: `merged` (None: not known), `stats` that its merge read, `cost` of making it"""
    mode: str = "agent"
    """how the evaluation asked; see `compare.modes`"""
    query: str | None = None
    """of mode `rag`: who wrote the text query"""

    @property
    def steps(self) -> list[int]:
        """Steps at which the run was evaluated."""
        return [int(line["step"]) for line in self.evaluations]

    def curve(self, metric: str) -> list[float]:
        """The metric at every evaluation.

        Raises:
            CompareError: an evaluation lacks it.
        """
        values = [line.get(metric) for line in self.evaluations]
        if any(value is None for value in values):
            raise CompareError(
                f"{self.folder}: not every evaluation has eval/{metric}; leave the run out, or "
                "train it again"
            )
        return [float(value) for value in values if value is not None]

    def metrics(self) -> set[str]:
        """Names of the metrics that every evaluation has as a number."""
        names = [
            {name for name, value in line.items() if isinstance(value, int | float)}
            for line in self.evaluations
        ]
        return set.intersection(*names) - {*SINCE_START, "evaluation_s"} if names else set()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn last line, as a killed run leaves it, is dropped.

    Raises:
        CompareError: any other line is not a JSON object, or holds what a training does not write.
    """
    records = []
    try:
        for number, record in read_lines(path):
            if record is not None:
                check_line(record, f"{path}:{number}")
                records.append(record)
    except OSError as error:
        raise CompareError(
            f"{path}: cannot be read ({error.strerror}); restore it, or leave the run out"
        ) from error
    except RecursionError as error:
        raise CompareError(
            f"{path}: a line is nested too deep; restore it, or leave the run out"
        ) from error
    return records


def read_runs(sources: Iterable[str | Path], *, partial: bool = False) -> list[Run]:
    """Read runs; W&B's folders of one run, which was resumed, are one source.

    Args:
        sources: see `read_run`.
        partial: see `read_run`.

    Raises:
        CompareError: see `read_run`.
    """
    runs, seen = [], set()
    for source in sources:
        if _is_offline(source):
            from compare.wandb_runs import files_of_run

            files = tuple(files_of_run(Path(source)))
            if files in seen:
                continue
            seen.add(files)
        runs.append(read_run(source, partial=partial))
    return runs


def _is_offline(source: str | Path) -> bool:
    """Whether W&B wrote it on this machine."""
    folder = Path(source)
    return folder.suffix == ".wandb" or (
        not (folder / "metrics.jsonl").is_file() and any(folder.glob("run-*.wandb"))
    )


def read_run(source: str | Path, *, partial: bool = False) -> Run:
    """Read a training run or a zero-shot evaluation.

    Args:
        source: a folder, a `.wandb` file or `wandb://entity/project/run_id`.
        partial: take a run that has not finished, up to its last evaluation.

    Raises:
        CompareError: it is missing, unfinished (unless `partial`), or has no evaluation.
    """
    if str(source).startswith(WANDB_PREFIX):
        from compare.wandb_runs import read_online

        return read_online(str(source), partial=partial)
    folder = Path(source)
    if (folder / "eval.json").is_file():
        return _read_zero_shot(folder)
    if _is_offline(folder):
        from compare.wandb_runs import read_offline

        return read_offline(folder, partial=partial)
    if not (folder / "metrics.jsonl").is_file():
        raise CompareError(
            f"{folder}: neither metrics.jsonl (a training run), eval.json (`obm eval`) nor "
            "run-*.wandb (W&B offline) there"
        )
    recipe = folder / "merge.json"
    environment, cost = folder / "environment.json", folder / "start_cost.json"
    return build_run(
        folder,
        _read_config(folder / "config.yaml"),
        read_metrics(folder / "metrics.jsonl"),
        provenance=check_provenance(_read_json(environment), environment),
        start={
            "merged": recipe.is_file(),
            "stats": check_stats(_read_json(recipe), recipe),
            "cost": check_cost(_read_json(cost), cost) or None,
        },
        is_finished=(folder / "done.json").is_file(),
        partial=partial,
    )


def build_run(
    source: Path | str,
    config: dict[str, Any],
    records: Sequence[dict[str, Any]],
    *,
    provenance: dict[str, Any],
    start: dict[str, Any],
    is_finished: bool,
    partial: bool,
) -> Run:
    """A run from its settings and the lines of its metrics.

    Args:
        source: for messages.
        config: content of config.yaml.
        records: lines of metrics.jsonl; of an evaluation that stands there twice, the last counts.
        provenance: content of environment.json.
        start: see `Run.start`.
        is_finished: whether it came to its end.
        partial: take it although it did not.

    Raises:
        CompareError: no evaluation, or unfinished and not `partial`.
    """
    by_step = {
        int(record["step"]): _strip_prefix(record)
        for record in records
        if record.get("phase") == "eval"
    }
    evaluations = [by_step[step] for step in sorted(by_step)]
    if not evaluations:
        raise CompareError(
            f"{source}: no evaluation yet; set compare.eval_every and let the run go on"
        )
    if not partial and not is_finished:
        raise CompareError(
            f"{source}: the run is not finished (last evaluation at step "
            f"{evaluations[-1]['step']}); train on with --resume, or pass --partial"
        )
    return Run(
        folder=source,
        arm=_arm(config),
        seed=int(config.get("seed") or 0),
        config=config,
        evaluations=evaluations,
        training=[record for record in records if record.get("phase") == "train"],
        provenance=provenance,
        start=start,
    )


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by arm (in the order first seen), each arm's by seed.

    Raises:
        CompareError: two runs are the same arm and seed, or an arm mixes trained and untrained
            runs.
    """
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    for arm, members in arms.items():
        # A zero-shot evaluation says nothing that a training run's step 0 does not say as well.
        if any(run.is_trained for run in members):
            arms[arm] = members = [run for run in members if run.is_trained]
        members.sort(key=lambda run: run.seed)
        for one, other in pairwise(members):
            if one.seed == other.seed:
                raise CompareError(
                    f"{one.folder} and {other.folder} are both arm {arm!r} with seed {one.seed}; "
                    "give one of them another tracking.arm, or leave it out"
                )
    return arms


def cut_to_common_steps(runs: Sequence[Run]) -> None:
    """Drop, in place, the evaluations that not every trained run has, and training after the last.

    For unfinished runs, and for runs that were allowed to be of unequal length.
    """
    trained = [run for run in runs if run.is_trained]
    if not trained:
        return
    common = set.intersection(*(set(run.steps) for run in trained))
    if not common:
        raise CompareError(
            "the runs share no evaluation step; compare runs with one compare.eval_every"
        )
    for run in trained:
        run.evaluations = [line for line in run.evaluations if int(line["step"]) in common]
        run.training = [line for line in run.training if int(line["step"]) <= max(common)]


def _read_zero_shot(folder: Path) -> Run:
    path = folder / "eval.json"
    record = read_object(path)
    for key in ("arm", "config", "metrics"):
        if key not in record:
            raise CompareError(f"{path}: no {key!r}; write it with `obm eval`")
    return Run(
        folder=folder,
        arm=check_arm(record["arm"], path),
        seed=check_seed(record.get("seed"), path),
        config=check_config(record["config"], path),
        evaluations=[{"step": 0, **check_metrics(record["metrics"], path)}],
        provenance={key: record[key] for key in ("commit", "hardware") if key in record},
        is_trained=False,
        mode=check_name(record.get("mode"), path, "mode") or "agent",
        query=check_name(record.get("query"), path, "query"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_yaml(path)
    except ConfigError as error:
        raise CompareError(f"{error}; a run keeps its settings there") from error
    if not config:
        raise CompareError(f"{path}: holds no settings; restore it, or leave the run out")
    return check_config(config, path)


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _strip_prefix(record: dict[str, Any]) -> dict[str, Any]:
    measured = {
        key.removeprefix("eval/"): value for key, value in record.items() if key.startswith("eval/")
    }
    # eval/time_s is how long the evaluation took; time_s says when it was
    if "time_s" in measured:
        measured["evaluation_s"] = measured.pop("time_s")
    return measured | {key: record[key] for key in SINCE_START if key in record}


def _arm(config: dict[str, Any]) -> str:
    arm = (config.get("tracking") or {}).get("arm")
    init = (config.get("models") or {}).get("init")
    return str(arm or Path(str(init or "unnamed").rstrip("/")).name)
