"""Work that is done once: a stage keeps a marker with the hash of what it was made from.

A second run with the same settings and inputs finds the marker and does nothing. With other
settings the stage is made again, or refused, as the caller chooses.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.sections import Environment, Sft
from launch.errors import LaunchError
from train.files import write_json

LATER_KEYS = {
    "environment": (Environment(), ("snippet_words",)),
    "sft": (Sft(), ("micro_batch_size", "gradient_checkpointing")),
}
"""Section -> its defaults, and keys that came when stages had been made: at their default they are
no input, so that what was made without them stays valid."""
LATER_INPUTS = ("episode_lengths", "checkpoints")
"""Inputs that came when stages had been made. A marker without one does not say what it was then:
what is marked as finished stays valid, under the key it had."""


class Stages:
    """The stages of one study folder; markers lie in its `stages/`.

    Args:
        folder: of the study; stages may remove nothing outside of it.
        redo: make stages again whose settings have changed, instead of refusing; what lies there
            and was not made here is refused all the same.
    """

    def __init__(self, folder: Path, *, redo: bool) -> None:
        self._folder = folder.resolve()
        self._redo = redo
        self._keys: dict[str, str] = {}

    def key(self, name: str) -> str:
        """Hash of a stage seen in this run; what is made from it takes it as an input."""
        return self._keys[name]

    def look(self, name: str, inputs: dict[str, Any], target: Path) -> str:
        """What is there of a stage; touches nothing, but takes note of its key.

        Returns:
            `done`; `begun`: from these inputs, not to its end; `changed`: from others; `foreign`:
            its target is there, but was not made here; `missing`.
        """
        marker = self._read(name)
        key = hash_inputs(_known(inputs, marker))
        self._keys[name] = key
        if marker is None:
            return "foreign" if target.exists() else "missing"
        if marker["key"] != key:
            return "changed"
        return "done" if marker["done"] and target.exists() else "begun"

    def seconds(self, name: str) -> float | None:
        """How long a finished stage took; None where it is not known."""
        seconds = (self._read(name) or {}).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    def is_done(self, name: str, inputs: dict[str, Any], target: Path) -> bool:
        """Whether the stage was made from these inputs and is complete.

        Where it was made from others, its target is removed (`redo`) or refused.

        Raises:
            LaunchError: made from other settings, and `redo` is off; or not made here.
        """
        found = self.look(name, inputs, target)
        if found == "foreign":
            raise LaunchError(
                f"{target} exists but was not made here; remove it, or choose another --output"
            )
        if found == "changed" and not self._redo:
            marker = self._read(name) or {}
            now = json.loads(_canonical(_known(inputs, marker)))
            changed = first_difference(_as_ever(marker["inputs"]), now)
            raise LaunchError(
                f"{target} was made with other settings ({changed}); "
                "pass --redo to make it again, or choose another --output"
            )
        if found not in ("done", "begun"):
            self.clear(name, target)
        return found == "done"

    def start(self, name: str, inputs: dict[str, Any]) -> None:
        """Note that the stage is under way, so that a broken one can be told from a foreign one."""
        self._keys[name] = hash_inputs(inputs)  # of all inputs, whatever `look` has accepted
        self._write(name, {"key": self._keys[name], "inputs": inputs, "done": False})

    def finish(self, name: str, inputs: dict[str, Any], seconds: float) -> None:
        """Note that the stage is complete."""
        marker = {"key": hash_inputs(inputs), "inputs": inputs, "done": True}
        self._write(name, {**marker, "seconds": round(seconds, 1)})

    def run(
        self,
        name: str,
        inputs: dict[str, Any],
        target: Path,
        make: Callable[[], object],
        *,
        resumes: bool = False,
    ) -> bool:
        """Make the stage unless it is there.

        Args:
            name: of the stage.
            inputs: plain data that decides its result.
            target: file or folder that it makes.
            make: makes it.
            resumes: `make` goes on with what a run that was broken off has left in the target.

        Returns:
            True if it was made, False if it was there.
        """
        if self.is_done(name, inputs, target):
            return False
        if not resumes:
            self.clear(name, target)
        self.start(name, inputs)
        started = time.monotonic()
        make()
        self.finish(name, inputs, time.monotonic() - started)
        return True

    def _marker(self, name: str) -> Path:
        return self._folder / "stages" / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            marker = json.loads(self._marker(name).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return marker if isinstance(marker, dict) and "key" in marker else None

    def _write(self, name: str, marker: dict[str, Any]) -> None:
        path = self._marker(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, marker)

    def clear(self, name: str, target: Path) -> None:
        """Remove a stage's marker and what it made.

        Raises:
            LaunchError: the target lies outside of the study's folder.
        """
        # a part of the study's folder may be a link to another disk: what is not there is no loss
        target = target.resolve()
        if target.exists() and self._folder not in target.parents:
            raise LaunchError(
                f"{target} lies outside of {self._folder}, so it is not removed; remove it by hand"
            )
        # the marker goes last: a kill in between must leave nothing that looks foreign, or done
        if marker := self._read(name):
            self._write(name, {**marker, "done": False})
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        self._marker(name).unlink(missing_ok=True)


def hash_inputs(inputs: dict[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(_canonical(inputs).encode()).hexdigest()


def fingerprint(checkpoint: str) -> list[list[Any]] | str:
    """What tells a checkpoint folder from a changed one: its files' names, sizes and times.

    A hub id stands for itself.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def environment_inputs(environment: Environment) -> dict[str, Any]:
    """The section `environment` as an input, see LATER_KEYS."""
    return _as_ever({"environment": asdict(environment)})["environment"]


def _canonical(inputs: dict[str, Any]) -> str:
    return json.dumps(_as_ever(inputs), sort_keys=True)


def _as_ever(inputs: dict[str, Any]) -> dict[str, Any]:
    for name, (default, later) in LATER_KEYS.items():
        section = inputs.get(name)
        if isinstance(section, dict):
            kept = {k: v for k, v in section.items() if k not in later or v != getattr(default, k)}
            inputs = {**inputs, name: kept}
    return inputs


def _known(inputs: dict[str, Any], marker: dict[str, Any] | None) -> dict[str, Any]:
    """Inputs without those that a marker was written too early for, see LATER_INPUTS."""
    if marker is None:
        return inputs
    then = marker.get("inputs") or {}
    return {k: v for k, v in inputs.items() if k in then or k not in LATER_INPUTS}


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """The first key at which plain data differ, such as `grpo.steps was 1, is 3`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    if isinstance(old, list) and isinstance(new, list):
        return f"{path} has changed"
    return f"{path} was {old!r}, is {new!r}"
