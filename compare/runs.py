"""Run folders as data: read them, group them by arm and seed, and refuse what must not be compared.

Two kinds of folder are read: a training run (`config.yaml`, `metrics.jsonl`, `environment.json`,
`done.json`) and a zero-shot evaluation (`eval.json`, written by `obm eval`), which becomes an arm
with a floor and no curve.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from compare.errors import CompareError

# What may differ between runs of one comparison: where they write, how they are drawn, and the
# seed.
_FREE_ENVIRONMENT = {"timeout_s", "retries", "backoff_s"}
_FREE_GRPO = {
    "seed", "data_seed", "output_dir", "run_name", "report_to", "log_level", "logging_steps",
    "logging_dir", "save_steps", "save_strategy", "save_total_limit", "disable_tqdm",
}  # fmt: skip
_FREE_REWARDS = {"judge_key_variable", "judge_timeout_s", "judge_workers", "judge_cache"}
_SINCE_START = ("step", "time_s", "device_s", "tokens")
_EVALUATION_KEYS = {"eval_split", "eval_size", "eval_kinds"}


@dataclass
class Run:
    """One arm and seed: its settings and its metrics.

    `evaluations` holds one dict an evaluation, ordered by step, keys without the `eval/` prefix;
    `training` one dict a logged training step. A zero-shot evaluation has one evaluation at step 0
    and `is_trained` False.
    """

    folder: Path
    arm: str
    seed: int
    config: dict[str, Any]
    evaluations: list[dict[str, Any]]
    training: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    is_trained: bool = True

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
            raise CompareError(f"{self.folder}: not every evaluation has eval/{metric}")
        return [float(value) for value in values if value is not None]

    def metrics(self) -> set[str]:
        """Names of the metrics that every evaluation has as a number."""
        names = [
            {name for name, value in line.items() if isinstance(value, int | float)}
            for line in self.evaluations
        ]
        return set.intersection(*names) - set(_SINCE_START) if names else set()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn last line, as a killed run leaves it, is dropped.

    Raises:
        CompareError: any other line is not a JSON object.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise CompareError(
                f"{path}:{number}: not JSON ({error}); restore it or run again"
            ) from error
        if not isinstance(record, dict):
            raise CompareError(f"{path}:{number}: not a JSON object")
        records.append(record)
    return records


def read_run(folder: str | Path, *, partial: bool = False) -> Run:
    """Read a training run's folder or a zero-shot evaluation's.

    Args:
        folder: holds either `metrics.jsonl` or `eval.json`.
        partial: take a run that has not finished, up to its last evaluation.

    Raises:
        CompareError: the folder is missing, unfinished (unless `partial`), or has no evaluation.
    """
    folder = Path(folder)
    if (folder / "eval.json").is_file():
        return _read_zero_shot(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise CompareError(
            f"{folder}: neither metrics.jsonl (a training run) nor eval.json (`obm eval`) there"
        )
    config = _read_config(folder / "config.yaml")
    records = read_metrics(folder / "metrics.jsonl")
    evaluations = [_strip_prefix(record) for record in records if record.get("phase") == "eval"]
    if not evaluations:
        raise CompareError(
            f"{folder}: no evaluation yet; set compare.eval_every and let the run go on"
        )
    evaluations.sort(key=lambda record: int(record["step"]))
    if not partial and not (folder / "done.json").is_file():
        last = evaluations[-1]["step"]
        raise CompareError(
            f"{folder}: the run is not finished (last evaluation at step {last}); "
            "train on with --resume, or pass --partial"
        )
    return Run(
        folder=folder,
        arm=_arm(config),
        seed=int(config.get("seed") or 0),
        config=config,
        evaluations=evaluations,
        training=[record for record in records if record.get("phase") == "train"],
        provenance=_read_json(folder / "environment.json"),
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


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs whose data, evaluation, rewards or budget differ.

    Zero-shot evaluations are held to the data and the evaluation only.

    Raises:
        CompareError: names the first differing setting and both values.
    """
    trained = [run for run in runs if run.is_trained]
    for run in runs:
        _compare_settings(runs[0], run, _question_settings(runs[0]), _question_settings(run))
    for run in trained:
        _compare_settings(trained[0], run, _training_settings(trained[0]), _training_settings(run))
        if run.steps != trained[0].steps:
            raise CompareError(
                f"evaluation: {trained[0].folder} was evaluated at {_brief(trained[0].steps)}, "
                f"{run.folder} at {_brief(run.steps)}; compare runs of one length"
            )


def cut_to_common_steps(runs: Sequence[Run]) -> None:
    """Drop, in place, the evaluations that not every trained run has; for unfinished runs."""
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


def _read_zero_shot(folder: Path) -> Run:
    record = _read_json(folder / "eval.json")
    for key in ("arm", "config", "metrics"):
        if key not in record:
            raise CompareError(f"{folder / 'eval.json'}: no {key!r}; write it with `obm eval`")
    return Run(
        folder=folder,
        arm=str(record["arm"]),
        seed=int(record.get("seed") or 0),
        config=record["config"],
        evaluations=[{"step": 0, **record["metrics"]}],
        provenance={key: record[key] for key in ("commit", "hardware") if key in record},
        is_trained=False,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(
            f"{path}: cannot be read ({error.strerror}); a run keeps its settings there"
        ) from error
    except yaml.YAMLError as error:
        raise CompareError(f"{path}: not YAML ({error})") from error
    if not isinstance(config, dict):
        raise CompareError(f"{path}: not a mapping of settings")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CompareError(f"{path}: not JSON ({error})") from error
    return record if isinstance(record, dict) else {}


def _strip_prefix(record: dict[str, Any]) -> dict[str, Any]:
    measured = {
        key.removeprefix("eval/"): value for key, value in record.items() if key.startswith("eval/")
    }
    # eval/time_s is how long the evaluation took; time_s, which says when it was, must win.
    return measured | {key: record[key] for key in _SINCE_START if key in record}


def _arm(config: dict[str, Any]) -> str:
    arm = (config.get("tracking") or {}).get("arm")
    init = (config.get("models") or {}).get("init")
    return str(arm or Path(str(init or "unnamed").rstrip("/")).name)


def _question_settings(run: Run) -> dict[str, Any]:
    environment = dict(run.config.get("environment") or {})
    return {
        f"{'evaluation' if key in _EVALUATION_KEYS else 'data'}: environment.{key}": value
        for key, value in environment.items()
        if key not in _FREE_ENVIRONMENT
    }


def _training_settings(run: Run) -> dict[str, Any]:
    grpo = dict(run.config.get("grpo") or {})
    settings = {
        f"budget: grpo.{key}": value for key, value in grpo.items() if key not in _FREE_GRPO
    }
    rewards = dict(run.config.get("rewards") or {})
    settings |= {
        f"rewards: rewards.{key}": value
        for key, value in rewards.items()
        if key not in _FREE_REWARDS
    }
    settings["rewards: reward_functions"] = run.config.get("reward_functions") or []
    # the same name may stand for other lines of Python
    settings["rewards: own_files"] = run.provenance.get("own_files") or {}
    compare = dict(run.config.get("compare") or {})
    settings["evaluation: compare.eval_every"] = compare.get("eval_every")
    world_size = run.provenance.get("world_size")
    if world_size is not None:
        settings["budget: world_size"] = world_size
    return settings


def _compare_settings(
    one: Run, other: Run, settings: dict[str, Any], other_settings: dict[str, Any]
) -> None:
    for key in sorted(settings.keys() | other_settings.keys()):
        value, other_value = settings.get(key), other_settings.get(key)
        if value != other_value:
            raise CompareError(
                f"{key} is {value!r} in {one.folder} and {other_value!r} in {other.folder}; "
                "compare runs that differ in their start only"
            )


def _brief(steps: Sequence[int]) -> str:
    return f"{steps[0]}..{steps[-1]} ({len(steps)} of them)" if len(steps) > 4 else str(list(steps))
