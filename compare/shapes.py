"""What the files of a run must hold, checked once when they are read.

    config.yaml, eval.json, environment.json, merge.json, start_cost.json, a line of metrics.jsonl

Each check names the file, the key, what stands there and what must; the rest of the package takes
what has passed as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from compare.errors import CompareError

SECTIONS = (
    "models", "tracking", "compare", "environment", "grpo", "rewards", "algorithm", "lora",
    "freeze_heads", "rollout", "live",
)  # fmt: skip
"""Sections of config.yaml that a comparison reads."""
MEASURED = ("time_s", "device_s", "tokens", "reward", "frac_reward_zero_std")
"""Values of a line that a comparison computes with, beside those of its phase."""
MAX_STEP = 2**53
"""From here on a float no longer holds every integer."""
MEND = "restore the file, or leave the run out"


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CompareError: it cannot be read, or holds none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(f"{path}: cannot be read ({error.strerror}); {MEND}") from error
    except RecursionError as error:
        raise CompareError(f"{path}: is nested too deep; {MEND}") from error
    except ValueError as error:
        raise CompareError(f"{path}: not JSON ({error}); {MEND}") from error
    if not isinstance(record, dict):
        raise CompareError(f"{path}: not a JSON object; {MEND}")
    return record


def check_config(config: Any, where: str | Path) -> dict[str, Any]:
    """The settings of a run, as config.yaml and eval.json hold them.

    Raises:
        CompareError: names the first setting that is not what it must be.
    """
    _mapping(config, where, "the settings")
    for name in SECTIONS:
        _mapping(_or(config.get(name), {}), where, name)
    _whole(config.get("seed"), where, "seed")
    for section, name in (("tracking", "arm"), ("models", "init"), ("compare", "target_arm"),
                          ("compare", "budget_arm")):  # fmt: skip
        _plain(_of(config, section, name), where, f"{section}.{name}")
    for name in ("smoothing", "bootstrap"):
        _whole(_of(config, "compare", name), where, f"compare.{name}", least=1)
    kinds = _of(config, "environment", "eval_kinds")
    if not (kinds is None or _is_list_of(kinds, str)):
        raise _wrong(where, "environment.eval_kinds", kinds, "a list of names")
    benchmark = _or(_of(config, "environment", "eval_benchmark"), {})
    _mapping(benchmark, where, "environment.eval_benchmark")
    for name in ("format", "evidence", "economy", "redundancy"):
        _number(_of(config, "rewards", name), where, f"rewards.{name}")
    functions = config.get("reward_functions")
    if not (functions is None or _is_list_of(functions, dict)):
        raise _wrong(where, "reward_functions", functions, "a list of functions")
    for entry in functions or ():
        if "function" not in entry or "weight" not in entry:
            raise _wrong(where, "reward_functions", entry, "a function and its weight")
        _number(entry["weight"], where, "reward_functions: weight")
    try:
        # two runs' settings are held against each other as JSON
        json.dumps(config, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CompareError(f"{where}: holds what no setting can be ({error}); {MEND}") from error
    return dict(config)


def check_line(line: Mapping[str, Any], where: str) -> None:
    """A line of metrics.jsonl; lines of other phases than `train` and `eval` are not looked at.

    Raises:
        CompareError: names the first value that is not what it must be.
    """
    phase = line.get("phase")
    if phase not in ("train", "eval"):
        return
    step = line.get("step")
    if not (_is_whole(step) and 0 <= step < MAX_STEP):
        raise _wrong(where, "step", step, "a whole number from 0 on")
    prefix = "eval/" if phase == "eval" else "rewards/"
    names = (*MEASURED, *(name for name in line if name.startswith(prefix)))
    _measured(line, names, where, "eval/n")


def check_metrics(metrics: Any, where: str | Path) -> dict[str, Any]:
    """The metrics of an eval.json.

    Raises:
        CompareError: there is none, or one that is no number.
    """
    _mapping(metrics, where, "metrics")
    if not metrics:
        raise _wrong(where, "metrics", metrics, "what was measured")
    _measured(metrics, metrics, where, "n")
    return dict(metrics)


def check_seed(seed: Any, where: str | Path) -> int:
    """The seed; 0 where none is named.

    Raises:
        CompareError: it is no whole number.
    """
    _whole(seed, where, "seed")
    return int(seed or 0)


def check_arm(arm: Any, where: str | Path) -> str:
    """The name of an arm.

    Raises:
        CompareError: it is no text.
    """
    if arm is None:
        raise _wrong(where, "arm", arm, "a name")
    _plain(arm, where, "arm")
    return str(arm)


def check_name(value: Any, where: str | Path, key: str) -> str | None:
    """A name, None where there is none.

    Raises:
        CompareError: it is no text.
    """
    _plain(value, where, key)
    return None if value is None else str(value)


def check_provenance(record: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The content of environment.json.

    Raises:
        CompareError: names the first entry that is not what it must be.
    """
    _whole(record.get("world_size"), where, "world_size", least=1)
    _mapping(_or(record.get("versions"), {}), where, "versions")
    return record


def check_stats(record: Mapping[str, Any], where: str | Path) -> list[str]:
    """Names of the statistics that a merge.json says it read.

    Raises:
        CompareError: they are no names.
    """
    stats = _or(record.get("stats"), {})
    if not (isinstance(stats, dict) or _is_list_of(stats, str)):
        raise _wrong(where, "stats", stats, "statistics by name")
    return sorted(stats)


def check_cost(record: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The content of start_cost.json: what each part of a preparation cost, None: not recorded.

    Raises:
        CompareError: names the part whose seconds are no numbers.
    """
    for part, entry in record.items():
        if entry is None:
            continue
        _mapping(entry, where, part)
        names = ["device_s"] if "device_s" in entry else ["time_s", "processor_s"]
        for name in names if entry else ():
            if not is_finite(entry.get(name)):
                raise _wrong(where, f"{part}.{name}", entry.get(name), "a finite number")
    return record


def check_record(record: Any, where: str | Path) -> None:
    """What W&B holds of a run folder beside its settings; see `train.callbacks.start_wandb`.

    Raises:
        CompareError: names the first entry that is not what it must be.
    """
    _mapping(record, where, "record")
    for name in ("environment", "start_cost"):
        _mapping(_or(record.get(name), {}), where, f"record.{name}")
    check_provenance(record.get("environment") or {}, where)
    check_cost(record.get("start_cost") or {}, where)
    _whole(record.get("resumed_at"), where, "record.resumed_at")


def is_finite(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _measured(
    values: Mapping[str, Any], names: Iterable[str], where: str | Path, count: str
) -> None:
    for name in names:
        _number(values.get(name), where, name)
    n = values.get(count)
    if n is not None and n <= 0:
        raise _wrong(where, count, n, "above 0")


def _mapping(value: Any, where: str | Path, name: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(where, name, value, "keys and values")


def _number(value: Any, where: str | Path, name: str) -> None:
    if not (value is None or is_finite(value)):
        raise _wrong(where, name, value, "a finite number")


def _whole(value: Any, where: str | Path, name: str, *, least: int | None = None) -> None:
    if value is None or (_is_whole(value) and (least is None or value >= least)):
        return
    raise _wrong(
        where, name, value, f"a whole number{'' if least is None else f' from {least} on'}"
    )


def _plain(value: Any, where: str | Path, name: str) -> None:
    if not (value is None or isinstance(value, str | int | float)):
        raise _wrong(where, name, value, "a name")


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _of(config: Mapping[str, Any], section: str, name: str) -> Any:
    return (config.get(section) or {}).get(name)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _wrong(where: str | Path, name: str, value: Any, must: str) -> CompareError:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # more digits or levels than Python writes
        shown = type(value).__name__
    shown = f"{shown[:40]}..." if len(shown) > 43 else shown
    found = "is missing" if value is None else f"is {shown}"
    return CompareError(f"{where}: {name} {found}, and must be {must}; {MEND}")
