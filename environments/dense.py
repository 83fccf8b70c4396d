"""Search by vectors: passages by a text encoder, pictures by an image encoder."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from environments.building import Building, build, read_index
from environments.corpus import Corpus, JsonLines, Row
from environments.encoders import (
    ColourEncoder,
    ImageEncoder,
    TextEncoder,
    TransformerImageEncoder,
    TransformerTextEncoder,
)
from environments.errors import EnvironmentSetupError
from environments.retrieval import cut_snippet
from environments.tools import Hit
from environments.vectors import Neighbours, VectorStore, gather_vectors
from environments.wire import BadPictureError, decode_image

COLOUR = "colour"
"""The image encoder that needs no model."""
MAX_PIXELS = 100_000_000
THUMBNAIL_QUALITY = 85


class DenseTextIndex:
    """Passages by the dot product of their vectors with a query's.

    Args:
        folder: an index that `build_dense` has made.
        encoder: of the queries, the one that made the index.
        snippet_words: a hit's text is its best sentences of so many words; None = all of it.
    """

    def __init__(self, folder: Path, encoder: TextEncoder, snippet_words: int | None = None):
        self.corpus = Corpus(folder)
        self.store = VectorStore(folder, read_index(folder)["neighbours"])
        self.encoder = encoder
        self.snippet_words = snippet_words

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The k nearest passages of each query, best first."""
        if not queries:
            return []
        scores, rows = self.store.nearest(self.encoder.encode_queries(queries), k)
        return [
            [self._hit(int(row), float(score), query) for row, score in zip(*found, strict=True)
             if row >= 0]
            for query, found in zip(queries, zip(rows, scores, strict=True), strict=True)
        ]  # fmt: skip

    def _hit(self, number: int, score: float, query: str) -> Hit:
        row = self.corpus[number]
        text = cut_snippet(row.text, query, self.snippet_words)
        return Hit(row.id, row.title, text, score)


class VectorImageIndex:
    """Pictures by their vectors; several rows of one id are views of one entry, the best counts.

    Args:
        folder: an index that `build_images` has made.
        encoder: the one that made the index.
    """

    VIEWS = 4
    """So many rows are looked at for each wanted entry, since views of one may crowd the first;
    where they are not enough, twice as many."""

    def __init__(self, folder: Path, encoder: ImageEncoder):
        index = read_index(folder)
        self.corpus = Corpus(folder)
        metric: Any = "l1" if index["encoder"] == COLOUR else "dot"
        self.store = VectorStore(folder, index["neighbours"], metric)
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, images: list[Image.Image], k: int) -> list[list[Hit]]:
        """The k entries most alike, best first."""
        if not images:
            return []
        queries = self.encoder.encode_images(images)
        found: list[list[Hit]] = [[] for _ in images]
        short, n_rows = list(range(len(images))), k * self.VIEWS
        while short:
            scores, rows = self.store.nearest(queries[short], n_rows)
            for i, own_rows, own_scores in zip(short, rows, scores, strict=True):
                found[i] = self._entries(own_rows, own_scores, k)
            # who has k keeps them: a graph that is asked for more may find others
            short = [i for i in short if len(found[i]) < k and n_rows < len(self)]
            n_rows *= 2
        return found

    def _entries(self, rows: np.ndarray, scores: np.ndarray, k: int) -> list[Hit]:
        hits: dict[str, Hit] = {}
        for number, score in zip(rows, scores, strict=True):
            if number < 0 or len(hits) == k:
                break
            row = self.corpus[int(number)]
            if row.id not in hits:
                picture = row.image and decode_image(base64.b64decode(row.image), MAX_PIXELS)
                hits[row.id] = Hit(row.id, row.title, "", float(score), picture or None)
        return list(hits.values())


def build_dense(
    source: Path,
    output: Path,
    model: str,
    *,
    neighbours: Neighbours = "flat",
    shard_rows: int = 4096,
    overwrite: bool = False,
    device: str = "cpu",
    **encoding: Any,
) -> Path:
    """Builds a dense index over passages.

    Args:
        source: see `environments.corpus`.
        output: folder to make.
        model: encoder, folder or hub id.
        neighbours: see `environments.vectors`.
        shard_rows: passages in memory at a time.
        overwrite: replace what is there.
        device: where the encoder runs.
        encoding: pooling, query_prefix, passage_prefix, max_tokens of TransformerTextEncoder; those
            used are kept in the index, for its queries.

    Raises:
        EnvironmentSetupError: see `environments.building.build`; the encoder cannot be loaded.
    """
    encoder = TransformerTextEncoder(model, device=device, **encoding)
    kept = {
        name: getattr(encoder, name)
        for name in ("pooling", "query_prefix", "passage_prefix", "max_tokens")
    }
    settings = {"kind": "dense", "encoder": model, "neighbours": neighbours, "encoding": kept}

    def make_shard(rows: list[Row], stem: Path) -> list[Row]:
        texts = [f"{row.title}\n{row.text}" if row.title else row.text for row in rows]
        np.save(stem.with_suffix(".vectors.npy"), encoder.encode_passages(texts))
        return rows

    return build(
        JsonLines(source), output, settings, make_shard,
        functools.partial(gather_vectors, neighbours=neighbours),
        shard_rows=shard_rows, overwrite=overwrite,
    )  # fmt: skip


def build_images(
    source: Path,
    output: Path,
    model: str = COLOUR,
    *,
    neighbours: Neighbours = "flat",
    thumbnail_px: int = 0,
    shard_rows: int = 1024,
    overwrite: bool = False,
    device: str = "cpu",
) -> Path:
    """Builds an index over pictures.

    Args:
        source: .jsonl of `{"id", "title", "image"}`, paths relative to the file.
        output: folder to make.
        model: CLIP or SigLIP checkpoint, or `colour`.
        neighbours: see `environments.vectors`; colour takes flat alone.
        thumbnail_px: longer side of the pictures kept in the index; 0 = none.
        shard_rows: pictures in memory at a time.
        overwrite: replace what is there.
        device: where the encoder runs.

    Raises:
        EnvironmentSetupError: see `environments.building.build`; a picture cannot be read.
    """
    if model == COLOUR and neighbours != "flat":
        raise EnvironmentSetupError("colour features are compared by L1; use --neighbours flat")
    encoder = open_image_encoder(model, device)
    settings = {
        "kind": "images", "encoder": model, "neighbours": neighbours, "thumbnail_px": thumbnail_px,
    }  # fmt: skip

    def make_shard(rows: list[Row], stem: Path) -> list[Row]:
        images = [_read_picture(source.parent / cast(str, row.image)) for row in rows]
        np.save(stem.with_suffix(".vectors.npy"), encoder.encode_images(images))
        return [
            Row(row.id, row.title, row.text, _thumbnail(image, thumbnail_px))
            for row, image in zip(rows, images, strict=True)
        ]

    def finish(building: Building) -> dict[str, Any]:
        return gather_vectors(building, neighbours)

    return build(
        JsonLines(source, needs_image=True), output, settings, make_shard, finish,
        shard_rows=shard_rows, overwrite=overwrite,
    )  # fmt: skip


def open_image_encoder(model: str, device: str = "cpu") -> ImageEncoder:
    """The encoder behind a name in index.json."""
    return ColourEncoder() if model == COLOUR else TransformerImageEncoder(model, device=device)


def _read_picture(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes(), MAX_PIXELS)
    except (OSError, BadPictureError) as error:
        raise EnvironmentSetupError(f"{path}: {error}; correct or remove its line") from error


def _thumbnail(image: Image.Image, size: int) -> str | None:
    if not size:
        return None
    image = image.copy()
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
