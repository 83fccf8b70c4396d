"""The pictures of recorded episodes: from the runs' folders, or made again where the atlas can.

A run that was recorded without pictures (`tracking.picture_size: 0`, or an earlier version) has
their hashes. The atlas' photos follow from settings and seed, so that those of its questions can be
made again and known by their hash.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from compare.trajectory_files import TrajectoryFile
from train.pictures import PICTURES, QUALITY, small
from train.trajectories import image_hash

SIZE = 256
"""Longest side of a picture that is made again."""


def find_pictures(keys: Sequence[str], files: Sequence[TrajectoryFile]) -> list[bytes]:
    """A WebP file for each hash; empty where there is none to be had.

    Args:
        keys: hashes of `train.trajectories.image_hash`.
        files: the episodes' files; pictures lie in a folder beside them.
    """
    folders = list(dict.fromkeys(file.path.parent for file in files))
    found = {key: _read(key, folders) for key in keys}
    missing = {key for key, picture in found.items() if not picture}
    for key, image in _photos_again(folders, missing):
        buffer = io.BytesIO()
        small(image, SIZE).save(buffer, format="WEBP", quality=QUALITY)
        found[key] = buffer.getvalue()
    return [found[key] for key in keys]


def _read(key: str, folders: Iterable[Path]) -> bytes:
    """The file from the first folder that has a sound one."""
    from PIL import Image, UnidentifiedImageError

    if not key.isalnum():  # a name from a file must not lead out of the folder
        return b""
    for folder in folders:
        try:
            content = (folder / PICTURES / f"{key}.webp").read_bytes()
            with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
                image.load()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            continue
        return content
    return b""


def _photos_again(folders: Iterable[Path], missing: set[str]) -> Iterator[tuple[str, Any]]:
    """(hash, photo) of the missing ones that the runs' own settings make."""
    asked: list[Any] = []
    for folder in folders:
        # an evaluation's settings are in its eval.json, but it has its pictures or never had any
        if not missing or not (folder / "config.yaml").is_file():
            continue
        for question in _questions(folder / "config.yaml", asked):
            image = question.get("image")
            key = image_hash(image) if image is not None else ""
            if key in missing:
                missing.discard(key)
                yield key, image


def _questions(path: Path, asked: list[Any]) -> Iterator[dict[str, Any]]:
    """Questions of a run's evaluation and training, unless `asked` has the like.

    None where the settings are of another version, or not of the atlas.
    """
    from configs.schema import load_config
    from train.worlds import is_benchmark, load_eval_questions, load_train_questions

    try:
        config = load_config(path)
    except ValueError:
        return
    section = config.environment
    # the runs of a study differ in what the photos do not depend on
    if section.name != "atlas" or section in asked:
        return
    asked.append(section)
    if not is_benchmark(section.eval_benchmark):
        yield from load_eval_questions(config)
    if not is_benchmark(section.train_benchmark):
        yield from load_train_questions(config)
