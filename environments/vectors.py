"""Nearest neighbours among vectors on disk: exact, or by a HNSW graph of faiss (extra `dense`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from environments.building import Building
from environments.errors import EnvironmentSetupError

VECTORS_FILE = "vectors.npy"
GRAPH_FILE = "hnsw.faiss"
BLOCK_ROWS = 65_536
HNSW_LINKS = 32
HNSW_BUILD_WIDTH = 200
HNSW_SEARCH_WIDTH = 128

Neighbours = Literal["flat", "hnsw"]
Metric = Literal["dot", "l1"]


class VectorStore:
    """The vectors of an index.

    Args:
        folder: has `vectors.npy`, float32 [rows, dimension], and for hnsw `hnsw.faiss`.
        neighbours: flat compares with every vector, memory-mapped; hnsw walks a graph in memory.
        metric: dot product, or for flat the L1 distance, scored 1 / (1 + distance).
    """

    def __init__(self, folder: Path, neighbours: Neighbours = "flat", metric: Metric = "dot"):
        self.vectors = np.load(folder / VECTORS_FILE, mmap_mode="r")
        self.metric = metric
        self._graph: Any = None
        if neighbours == "hnsw":
            self._graph = import_faiss().read_index(str(folder / GRAPH_FILE))
            self._graph.hnsw.efSearch = HNSW_SEARCH_WIDTH

    def __len__(self) -> int:
        return len(self.vectors)

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows for every query, best first, ties by the smaller row.

        Args:
            queries: float32 [queries, dimension].
            k: cut to the number of vectors.

        Returns:
            scores float32 and rows int64, both [queries, k].
        """
        k = min(k, len(self))
        if self._graph is not None:
            scores, rows = self._graph.search(np.ascontiguousarray(queries, np.float32), k)
            return scores, rows
        best = np.full((len(queries), 0), -np.inf, np.float32)
        best_rows = np.zeros((len(queries), 0), np.int64)
        for start in range(0, len(self), BLOCK_ROWS):
            block = np.asarray(self.vectors[start : start + BLOCK_ROWS])
            scores = _similarity(queries, block, self.metric)
            rows = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
            best, best_rows = _keep_best(
                np.concatenate([best, scores], 1), np.concatenate([best_rows, rows], 1), k
            )
        return best, best_rows


def _similarity(queries: np.ndarray, block: np.ndarray, metric: Metric) -> np.ndarray:
    """float32 [queries, rows], higher is nearer."""
    if metric == "dot":
        product: np.ndarray = queries @ block.T
        return product
    distances = [np.abs(block - query).sum(1) for query in queries]
    return (1 / (1 + np.stack(distances))).astype(np.float32)


def _keep_best(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of each line; rows ascend among equal scores, so a stable sort keeps them."""
    if scores.shape[1] > 4 * k:
        # whatever reaches the k-th score may be among the best: ties are not cut by chance
        least = np.partition(scores, -k, axis=1)[:, -k]
        kept = [np.flatnonzero(line >= limit) for line, limit in zip(scores, least, strict=True)]
        order = np.stack(
            [at[np.argsort(-line[at], kind="stable")][:k]
             for line, at in zip(scores, kept, strict=True)]
        )  # fmt: skip
    else:
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def gather_vectors(building: Building, neighbours: Neighbours) -> dict[str, Any]:
    """Joins the shards' vectors in one file, and for hnsw links them; memory is that of a shard.

    Returns:
        What index.json says about them.
    """
    dimension = next(building.load(".vectors.npy")).shape[1]
    shape = (building.n_rows, dimension)
    vectors = open_memmap(building.folder / VECTORS_FILE, "w+", np.float32, shape)
    first = 0
    for shard in building.load(".vectors.npy"):
        vectors[first : first + len(shard)] = shard
        first += len(shard)
    vectors.flush()
    if neighbours == "hnsw":
        faiss = import_faiss()
        graph = faiss.IndexHNSWFlat(dimension, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = HNSW_BUILD_WIDTH
        for start in tqdm(range(0, len(vectors), BLOCK_ROWS), desc="hnsw", disable=None):
            graph.add(np.asarray(vectors[start : start + BLOCK_ROWS]))
        faiss.write_index(graph, str(building.folder / GRAPH_FILE))
    return {"dimension": dimension}


def import_faiss() -> Any:
    """The library faiss.

    Raises:
        EnvironmentSetupError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise EnvironmentSetupError(
            "a HNSW graph needs faiss; pip install 'obm-warmstart[dense]', or build with "
            "--neighbours flat"
        ) from error
    return faiss
