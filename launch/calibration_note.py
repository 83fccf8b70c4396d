"""With which settings statistics were made on the way to a merge, so that others are not taken.

`obm tune` and `--sweep` make the statistics that are missing and take those that are there. Beside
what they have made `.made.json` keeps the settings, and for which file they hold; without a note,
or of a file that was replaced since, statistics are the user's own, and taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import LaunchError
from launch.stages import first_difference
from launch.tasks import length_inputs, named_files, picture_inputs
from train.files import write_json

if TYPE_CHECKING:
    from configs.schema import Config

NOTE_NAME = ".made.json"
NOT_OF_THE_STATISTICS = ("kinds", "output", "batch_size", "streaming", "device")
"""Keys of `calibration:` that change no statistic beyond its last bits."""


def check_made(config: Config, role: str, kinds: Sequence[str], folder: Path) -> None:
    """Refuse statistics that were made with other settings than these.

    Args:
        config: settings.
        role: vlm, agent or the name of a donor.
        kinds: that are there.
        folder: of the parent's statistics.

    Raises:
        LaunchError: names the file and the setting.
    """
    from merge.stats import FILE_NAMES

    notes = _read(folder)
    for kind in kinds:
        path = folder / FILE_NAMES[kind]
        note = notes.get(path.name)
        if not isinstance(note, dict) or note.get("time") != path.stat().st_mtime_ns:
            continue
        now = json.loads(json.dumps(_settings(config, role, kind)))
        if note.get("settings") != now:
            changed = first_difference(note.get("settings"), now)
            raise LaunchError(
                f"{path}: was made with other settings ({changed}); remove it, or give another "
                "calibration.output=FOLDER"
            )


def note_made(config: Config, role: str, kinds: Sequence[str], folder: Path) -> None:
    """Keep with which settings these kinds have just been made; see `check_made`."""
    from merge.stats import FILE_NAMES

    notes = _read(folder)
    for kind in kinds:
        path = folder / FILE_NAMES[kind]
        settings = _settings(config, role, kind)
        notes[path.name] = {"time": path.stat().st_mtime_ns, "settings": settings}
    write_json(folder / NOTE_NAME, notes)


def _settings(config: Config, role: str, kind: str) -> dict[str, Any]:
    """What decides the statistics and a person would change; the weights are held by the merge."""
    free = NOT_OF_THE_STATISTICS if kind == "inverse" else (*NOT_OF_THE_STATISTICS, "damping")
    data, other = ("vlm_data", "agent_data") if role == "vlm" else ("agent_data", "vlm_data")
    section = asdict(config.calibration)
    return {
        "calibration": {k: v for k, v in section.items() if k not in (*free, other)},
        **named_files(config, "dialect", data),
        **length_inputs(config, role),
        **picture_inputs(config),
    }


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / NOTE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
