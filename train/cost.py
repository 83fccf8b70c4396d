"""What a stage cost in device seconds, part by part: `cost.json` of a run folder.

    {"device_s": 83.1, "parts": {"sampling": 40.2, "tuning": 42.9}}

A comparison at an equal budget adds it to the `device_s` of the training that follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from train.callbacks import DeviceClock
from train.files import write_json

FILE = "cost.json"


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
        total = round(sum(self.parts.values()), 3)
        write_json(folder / FILE, {"device_s": total, "parts": self.rounded})
