"""What a calibration that was killed had finished, so that the same command goes on with the rest.

Statistics are published file by file. While a run is under way `.begun.json` in each parent's
folder says what it was started with; a run that finds the note of an equal one takes the files that
were published since for its own. Without the note a file is somebody's result, and not touched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import LaunchError
from launch.stages import fingerprint, hash_inputs
from launch.tasks import calibration_inputs
from train.files import write_json

if TYPE_CHECKING:
    from configs.schema import Config


class Progress:
    """Which files of one parent's calibration are there already.

    Args:
        path: the note; gone once the whole command is through.
        key: see `calibration_key`.
        targets: files that the calibration makes.
        overwrite: files of other runs are replaced.

    Raises:
        LaunchError: one of the files is another run's.
    """

    def __init__(
        self, path: Path, key: str, targets: Sequence[Path], *, overwrite: bool = False
    ) -> None:
        self._path, self._key, self._targets = path, key, targets
        found = _read(path)
        # of the files that were there when the run began, their times of change
        self._before: dict[str, int] = {t.name: _time(t) for t in targets if t.exists()}
        if found.get("key") == key:
            self._before = found["before"]
        others = [target for target in targets if target.exists() and not self.has(target)]
        if others and not overwrite:
            raise LaunchError(
                f"{others[0]} exists; pass --overwrite, or another calibration.output=FOLDER"
            )

    def begin(self) -> None:
        """Leaves the note."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"key": self._key, "before": self._before})

    def has(self, target: Path) -> bool:
        """Whether this run, before it was killed, has published a file."""
        return target.exists() and self._before.get(target.name) != _time(target)

    def give_up(self) -> None:
        """After an error the note stays only where something was made."""
        if not any(map(self.has, self._targets)):
            self.finish()

    def finish(self) -> None:
        """Removes the note: what lies there now is a result."""
        self._path.unlink(missing_ok=True)


def calibration_key(config: Config, role: str, parent: str) -> str:
    """Hash of what decides on a parent's statistics.

    Args:
        config: calibration, environment, live, grpo's lengths and models.max_pixels are used.
        role: vlm, agent or the name of a donor.
        parent: its folder or hub id.
    """
    return hash_inputs(
        {
            "parent": fingerprint(parent),
            "calibration": {**asdict(config.calibration), "output": None},
            "environment": asdict(config.environment),
            "grpo": config.grpo,
            **calibration_inputs(config, role),
        }
    )


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found["before"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
