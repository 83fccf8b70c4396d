"""What a start costs before training: seconds of a merge and of the calibrations that it uses.

`obm calibrate` keeps `cost.json` beside a parent's statistics, `obm merge` one beside `merge.json`
with its own seconds and those of the calibrations it read:

    {"merge": {"time_s": 8.7, "processor_s": 9.9}, "calibrate-vlm": {...}, "calibrate-agent": null}

`time_s` is wall time; `processor_s` what this process computed on all its threads. `obm compare`
takes the one that the training's own clock counts: wall time where a GPU is occupied, computed time
on a CPU. A null was not recorded. What was interrupted counts from its last start.

The first merge after an installation compiles its kernels, which lie on disk from then on. That is
noted apart (`compile_s`, `compile_processor_s`) and left out of the other two: else the method that
a study happens to merge first would look dearer than the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.files import write_json
from train.start_cost import COST_NAME, read_cost

CLOCKS = ("time_s", "processor_s")
COMPILED = ("compile_s", "compile_processor_s")


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """A dict that holds the seconds of what happens within, once that has ended."""
    cost: dict[str, float] = {}
    wall, computed = time.perf_counter(), time.process_time()
    yield cost
    cost["time_s"] = round(time.perf_counter() - wall, 3)
    cost["processor_s"] = round(time.process_time() - computed, 3)


@contextmanager
def measured_without_compiling() -> Iterator[dict[str, float]]:
    """As `measured`; what numba compiles within is noted apart, where there is any."""
    from numba.core.event import Listener, install_listener

    class CompileClock(Listener):
        """Seconds of compiling; a kernel that is compiled within another one counts once."""

        def __init__(self) -> None:
            self.seconds, self.began, self.depth = (0.0, 0.0), (0.0, 0.0), 0

        def on_start(self, event: Any) -> None:
            self.depth += 1
            if self.depth == 1:
                self.began = (time.perf_counter(), time.process_time())

        def on_end(self, event: Any) -> None:
            self.depth -= 1
            if self.depth == 0:
                wall, computed = self.seconds
                wall += time.perf_counter() - self.began[0]
                self.seconds = (wall, computed + time.process_time() - self.began[1])

    compiler = CompileClock()
    with measured() as cost, install_listener("numba:compile", compiler):
        yield cost
    if any(compiler.seconds):
        for clock, name, seconds in zip(CLOCKS, COMPILED, compiler.seconds, strict=True):
            cost[clock] = round(max(0.0, cost[clock] - seconds), 3)
            cost[name] = round(seconds, 3)


def shard_cost_name(shard: tuple[int, int]) -> str:
    """Name of the cost file of a share of a calibration."""
    rank, world = shard
    return COST_NAME if world == 1 else f"cost-{rank}-of-{world}.json"


def keep_calibration_cost(path: Path, measurement: str, cost: Mapping[str, float]) -> None:
    """Notes in a calibration's cost file what one measurement took; others stay.

    Args:
        path: the file.
        measurement: `inputs` (second moments and what comes with them) or `fisher`.
        cost: of `measured`.
    """
    write_json(path, {**read_cost(path), measurement: dict(cost)})


def join_shard_costs(folder: Path, own: Mapping[str, float]) -> None:
    """Adds up the cost files of all shards, and what adding up the statistics took, in cost.json.

    A measurement that a shard has no record of is left out.

    Args:
        folder: of one parent's statistics.
        own: seconds of putting the shards together.
    """
    shards = [read_cost(path) for path in sorted(folder.glob("cost-*-of-*.json"))]
    worlds = {int(path.stem.split("-")[-1]) for path in folder.glob("cost-*-of-*.json")}
    if not shards or worlds != {len(shards)}:
        return
    total: dict[str, Any] = {}
    for measurement in shards[0]:
        entries = [shard.get(measurement) for shard in shards]
        if all(entries):
            total[measurement] = {
                clock: round(sum(entry[clock] for entry in entries if entry), 3) for clock in CLOCKS
            }
    if total:
        first = next(iter(total))
        total[first] = {clock: round(total[first][clock] + own[clock], 3) for clock in CLOCKS}
        write_json(folder / COST_NAME, total)


def keep_merge_cost(output: Path, record: Mapping[str, Any], cost: Mapping[str, float]) -> None:
    """Writes cost.json of a merged folder: its own seconds and those of the statistics it read.

    Args:
        output: the merged folder.
        record: content of its merge.json; `stats` names the files that were read.
        cost: of `measured`.
    """
    parts: dict[str, Any] = {"merge": dict(cost)}
    for key, statistics in (record.get("stats") or {}).items():
        task, _, kind = key.rpartition("/")
        name = f"calibrate-{task}"
        # one measurement gives several kinds; a parent may have been measured in both ways
        measurement = "fisher" if kind == "fisher" else "inputs"
        entry = read_cost(Path(statistics["source"]).parent / COST_NAME).get(measurement)
        before = parts.get(name, {})
        parts[name] = None if entry is None or before is None else {**before, measurement: entry}
    for name, entries in parts.items():
        if name != "merge" and entries is not None:
            parts[name] = {
                clock: round(sum(entry[clock] for entry in entries.values()), 3) for clock in CLOCKS
            }
    write_json(output / COST_NAME, parts)
