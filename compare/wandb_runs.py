"""Runs as W&B holds them, put back into the lines of metrics.jsonl.

    obm compare runs/x/wandb/offline-run-20261128_161343-a0e1d10c
    obm compare wandb://me/obm-warmstart/a0e1d10c

`train.callbacks.Recorder` logs one row a step: the training line under `train/`, the evaluation
under `eval/`, the clocks of each under `train_clock/` and `eval_clock/`, a null as NaN. Rows of
older runs lack the clocks; there the plain `time_s`, `device_s` and `tokens` of the row stand for
both lines, which at a step with an evaluation are the evaluation's.

Files are read by W&B's own reader (`wandb leet inspect --json`), those of online runs as well as
offline ones. A run that was resumed has several of them, in one folder `wandb`; what a later one
did again counts. Of a run on a server the
whole history is read, not the sampled one. There, steps that a resumed run did again are as they
were the first time, since W&B takes no step twice.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.runs import WANDB_PREFIX, Run, build_run
from compare.shapes import check_config, check_line, check_record

PHASES = ("train", "eval")
NOT_SETTINGS = ("_wandb", "wandb_version", "arm", "record")
"""Keys of a W&B config that are none of config.yaml."""
NOT_METRICS = ("train/global_step",)
READER_TIMEOUT_S = 300.0


@dataclass
class History:
    """What one `.wandb` file, or a server, holds of a run."""

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    """flat, each with `_step`"""
    is_finished: bool

    @property
    def record(self) -> dict[str, Any]:
        """What the run folder had beside its settings; see `train.callbacks.start_wandb`."""
        return self.config.get("record") or {}


def read_offline(path: Path, *, partial: bool = False) -> Run:
    """Read a run from what W&B wrote offline.

    Args:
        path: a `.wandb` file or the folder it lies in. Other folders of the same run beside it are
            read, too.
        partial: see `compare.runs.read_run`.

    Raises:
        CompareError: no such file, or not one of a training of this package.
    """
    files = files_of_run(path)
    parts = [_read_file(file) for file in files]
    rows: list[dict[str, Any]] = []
    for part in parts:
        resumed_at = part.record.get("resumed_at")
        if resumed_at is not None:
            rows = [row for row in rows if row["_step"] <= resumed_at]
        rows += part.rows
    return _make_run(path, History(parts[-1].config, rows, parts[-1].is_finished), partial)


def read_online(source: str, *, partial: bool = False, api: Any = None) -> Run:
    """Read a run's whole history from a W&B server.

    Args:
        source: `wandb://entity/project/run_id`.
        partial: see `compare.runs.read_run`.
        api: a `wandb.Api`; made where None.

    Raises:
        CompareError: it cannot be read, or is no training of this package.
    """
    name = source.removeprefix(WANDB_PREFIX)
    if name.count("/") != 2 or not all(name.split("/")):
        raise CompareError(f"{source}: write wandb://entity/project/run_id")
    import wandb

    try:
        found = (api or wandb.Api()).run(name)
        rows = [dict(row) for row in found.scan_history()]
        # the api gives settings as they were logged
        history = History(dict(found.config), rows, found.state == "finished")
    except Exception as error:  # those of reading a history have no class in common
        raise CompareError(
            f"{source}: cannot be read from W&B ({error}); check the name, `wandb login` and the "
            "connection"
        ) from error
    check_record(history.record, source)
    return _make_run(source, history, partial)


def lines_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that the rows of a history were made from, in their order."""
    lines = []
    for row in sorted(rows, key=lambda row: int(row["_step"])):
        for phase in PHASES:
            values = {
                key: _number(value)
                for key, value in row.items()
                if key.startswith(f"{phase}/") and key not in NOT_METRICS
            }
            if not values:
                continue
            clocks = {
                name: row.get(f"{phase}_clock/{name}", row.get(name))
                for name in ("time_s", "device_s", "tokens")
            }
            clocks = {name: value for name, value in clocks.items() if value is not None}
            if phase == "train":
                values = {key.removeprefix("train/"): value for key, value in values.items()}
            lines.append({"step": int(row["_step"]), "phase": phase, **clocks, **values})
    return lines


def _make_run(source: Path | str, history: History, partial: bool) -> Run:
    config = {key: value for key, value in history.config.items() if key not in NOT_SETTINGS}
    if "environment" not in config or "grpo" not in config:
        raise CompareError(f"{source}: its W&B config is not that of a training by `obm train`")
    check_config(config, source)
    record, lines = history.record, lines_of(history.rows)
    for line in lines:
        check_line(line, f"{source}: step {line['step']}")
    return build_run(
        source,
        config,
        lines,
        provenance=record.get("environment") or {},
        start={
            "merged": record.get("merged"), "stats": [], "cost": record.get("start_cost"),
        },
        is_finished=history.is_finished,
        partial=partial,
    )  # fmt: skip


def _number(value: Any) -> Any:
    """metrics.jsonl has null where W&B has NaN, which its reader writes as a word."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- offline files


def files_of_run(path: Path) -> list[Path]:
    """All `.wandb` files of the run that `path` belongs to, oldest first."""
    files = sorted(path.glob("run-*.wandb")) if path.is_dir() else [path]
    if len(files) != 1:
        raise CompareError(f"{path}: holds {len(files)} runs of W&B; name one .wandb file")
    if not files[0].is_file():
        raise CompareError(f"{path}: no such file; name a folder wandb/offline-run-*")
    file = files[0].resolve()
    # folders are offline-run-DATE_TIME-ID or run-DATE_TIME-ID, with -1, -2 ... in one second
    beside = file.parent.parent.glob(f"*run-*/{file.name}")
    return sorted({file, *beside}, key=_started)


def _started(file: Path) -> tuple[str, int]:
    _, _, rest = file.parent.name.partition("run-")
    date, _, name = rest.partition("-")
    number = name.removeprefix(file.stem.removeprefix("run-")).strip("-")
    return date, int(number) if number.isdigit() else 0


def _read_file(file: Path) -> History:
    history = History({}, [], False)
    for record in _records(file):
        if record.get("type") == "run":
            update = record["run"].get("config", {}).get("update", {})
            history.config.update(update)
        elif record.get("type") == "config":
            history.config.update(record["config"].get("update", {}))
        elif record.get("type") == "history":
            item = record["history"]["item"]
            history.rows.append({**item, "_step": int(item.get("_step", 0))})
        elif record.get("type") == "exit":
            history.is_finished = not record["exit"].get("exit_code")
    if not history.config:
        raise CompareError(f"{file}: holds no settings; W&B wrote no run there, or it is damaged")
    check_record(history.record, file)
    return history


def _records(file: Path) -> Iterable[dict[str, Any]]:
    """The records of a file as W&B's reader prints them, one JSON object a line."""
    from wandb.errors import WandbCoreNotAvailableError

    arguments = ["leet", "inspect", "--json", "--no-observability", "--run-file", str(file),
                 str(file.parent.parent)]  # fmt: skip
    try:
        answer = _run_reader(arguments)
    except subprocess.TimeoutExpired as error:
        raise CompareError(
            f"{file}: W&B's reader was not done after {READER_TIMEOUT_S:.0f} s; "
            "name the run's own folder instead"
        ) from error
    except WandbCoreNotAvailableError as error:
        raise CompareError(
            f"{file}: W&B's reader is missing ({error}); name the run's own folder instead"
        ) from error
    # not splitlines: JSON leaves U+2028 and U+0085, at which that splits, as they are
    lines = [line for line in answer.stdout.split("\n") if line.strip()]
    if answer.returncode != 0 and not lines:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CompareError(f"{file}: W&B cannot read it ({reason})")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return  # a killed run leaves a torn record at the end
            raise CompareError(
                f"{file}: record {number} is damaged ({error}); restore it, or leave the run out"
            ) from error
        if isinstance(record, dict):
            yield record


def _run_reader(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """W&B's program; `python -m wandb` would do the same and take two seconds longer a file."""
    from wandb.util import get_core_path

    return subprocess.run(
        [get_core_path(), *arguments],
        capture_output=True,
        text=True,
        timeout=READER_TIMEOUT_S,
        check=False,
    )
