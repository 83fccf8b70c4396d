"""Small copies of recorded episodes' pictures: pictures/<hash>.webp beside trajectories.jsonl.

The hash is that of the trajectory's line, so that equal pictures are kept once, over all steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.disk import writing
from train.trajectories import Trajectory

PICTURES = "pictures"
QUALITY = 85
"""of WebP, 0 to 100"""


class PictureFolder:
    """Writes each picture once; what lies in the folder already is not written again.

    Args:
        folder: run folder or folder of an evaluation.
        size: longest side in pixels; larger pictures are scaled down, smaller ones stay. 0 keeps
            no pictures.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder / PICTURES, size
        self._written = {path.stem for path in self._folder.glob("*.webp")} if size else set()

    def add(self, episode: Trajectory, row: Mapping[str, Any]) -> None:
        """Keeps the pictures of an episode.

        Args:
            episode: has the pictures.
            row: its line (`Trajectory.to_dict`), which has their hashes.
        """
        if self._size == 0:
            return
        for key, image in _pairs(episode, row):
            if key not in self._written:
                self._write(key, image)
                self._written.add(key)

    def _write(self, key: str, image: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # the processes of an evaluation may write the same picture at once
        temporary = self._folder / f".{key}.{os.getpid()}.tmp"
        target = self._folder / f"{key}.webp"
        with writing(target):
            small(image, self._size).save(temporary, format="WEBP", quality=QUALITY)
            temporary.replace(target)


def small(image: Any, size: int) -> Any:
    """A copy of a PIL image in RGB or RGBA, scaled down to `size` pixels on its longest side."""
    is_clear = "A" in image.getbands() or "transparency" in image.info
    copy = image.convert("RGBA" if is_clear else "RGB")
    copy.thumbnail((size, size), reducing_gap=2.0)
    return copy


def _pairs(episode: Trajectory, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from zip(row["images"], episode.images, strict=True)
    for line, turn in zip(row["turns"], episode.turns, strict=True):
        yield from zip(line["images"], turn.images, strict=True)
