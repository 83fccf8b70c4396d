"""What a stage cost in device seconds, part by part: `cost.json` of a run folder.

    {"device_s": 83.1, "parts": {"sampling": 40.2, "tuning": 42.9}}

The policy that it made has a `cost.json` of its own, that of its start and one entry more:

    {"merge": {"time_s": 8.7, "processor_s": 9.9}, ..., "sport": {"device_s": 83.1}}

A training copies it, and a comparison at an equal budget adds it to the training's `device_s`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from train.callbacks import DeviceClock
from train.files import write_json
from train.start_cost import COST_NAME, cost_with_stage


class Cost:
    """Device seconds by part.

    Args:
        parts: of what was done before.
    """

    def __init__(self, parts: Mapping[str, float] = {}) -> None:
        self.parts = dict(parts)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block's device seconds under this name, once it has ended well."""
        clock = DeviceClock()
        yield
        self.add({name: clock.seconds})

    def add(self, parts: Mapping[str, float]) -> None:
        """Counts more."""
        for name, seconds in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + seconds

    @property
    def rounded(self) -> dict[str, float]:
        """The parts to a millisecond."""
        return {name: round(seconds, 3) for name, seconds in self.parts.items()}

    def write(self, folder: Path) -> None:
        """Writes cost.json."""
        write_json(folder / COST_NAME, {"device_s": self.device_s, "parts": self.rounded})

    @property
    def device_s(self) -> float:
        """All parts together."""
        return round(sum(self.parts.values()), 3)

    def write_for_policy(self, policy: Path, init: str, stage: str) -> None:
        """Writes cost.json of the policy that a stage made: its start's costs and the stage's.

        Args:
            policy: folder of the policy.
            init: folder or hub id of the start.
            stage: name of the entry, `sport` or `sft`.
        """
        write_json(policy / COST_NAME, cost_with_stage(init, stage, self.device_s))
