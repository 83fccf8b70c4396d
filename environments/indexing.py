"""Opening an index by its folder, whatever kind it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environments.building import read_index
from environments.errors import EnvironmentSetupError
from environments.tools import ImageIndex, TextIndex


def open_text_index(folder: Path, *, device: str = "cpu", mapped: bool = True) -> TextIndex:
    """An index over passages that `obm index` has built.

    Args:
        folder: the index.
        device: of the encoder of a dense index.
        mapped: False reads the matrix of a BM25 index into memory.

    Raises:
        EnvironmentSetupError: it is none.
    """
    index = read_index(folder)
    with _reading(folder):
        if index["kind"] == "bm25":
            from environments.sparse import MappedBM25Index

            return MappedBM25Index(folder, mapped=mapped)
        if index["kind"] == "dense":
            from environments.dense import DenseTextIndex
            from environments.encoders import TransformerTextEncoder

            encoding: dict[str, Any] = index["encoding"]
            encoder = TransformerTextEncoder(index["encoder"], device=device, **encoding)
            return DenseTextIndex(folder, encoder)
    raise EnvironmentSetupError(f"{folder}: an index of {index['kind']}, not of passages")


def open_image_index(folder: Path, *, device: str = "cpu") -> ImageIndex:
    """An index over pictures that `obm index` has built.

    Raises:
        EnvironmentSetupError: it is none.
    """
    index = read_index(folder)
    if index["kind"] != "images":
        raise EnvironmentSetupError(f"{folder}: an index of {index['kind']}, not of pictures")
    from environments.dense import VectorImageIndex, open_image_encoder

    with _reading(folder):
        return VectorImageIndex(folder, open_image_encoder(index["encoder"], device))


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """An array that numpy cannot read, one that is a pickle among them, is one clear error."""
    try:
        yield
    except EnvironmentSetupError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EnvironmentSetupError(
            f"{folder}: a file of the index cannot be read ({reason}); build it again"
        ) from error
