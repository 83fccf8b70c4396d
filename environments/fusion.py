"""Several text indexes as one, by their ranks, and a reranker behind an index."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import replace

from environments.encoders import Reranker
from environments.tools import Hit, TextIndex

RANK_CONSTANT = 60
"""k of reciprocal-rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""


class FusedTextIndex:
    """Reciprocal-rank fusion: score(d) = sum over indexes of 1 / (60 + rank of d), ranks from 1.

    Args:
        indexes: what they give under one id counts as one passage if title and text are equal, too:
            indexes of one corpus have to give whole passages, or equal cuts of them.
        depth: hits that each gives at least.
    """

    def __init__(self, indexes: Sequence[TextIndex], depth: int = 100):
        self.indexes = list(indexes)
        self.depth = depth

    def __len__(self) -> int:
        return max(map(size_of, self.indexes))

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The k best passages of each query by their fused ranks."""
        found = [index.search(queries, max(k, self.depth)) for index in self.indexes]
        return [fuse(lists)[:k] for lists in zip(*found, strict=True)]


class RerankedTextIndex:
    """The first hits of an index in the order of a reranker.

    Args:
        index: gives whole passages, since that is what the reranker reads.
        reranker: `score(query, texts) -> numbers`.
        depth: hits that it reads; those behind are cut off.
    """

    def __init__(self, index: TextIndex, reranker: Reranker, depth: int = 20):
        self.index = index
        self.reranker = reranker
        self.depth = depth

    def __len__(self) -> int:
        return size_of(self.index)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The k best passages of each query, scored by the reranker."""
        found = self.index.search(queries, max(k, self.depth))
        return [self._rerank(query, hits)[:k] for query, hits in zip(queries, found, strict=True)]

    def _rerank(self, query: str, hits: list[Hit]) -> list[Hit]:
        if not hits:
            return []
        scores = self.reranker.score(query, [f"{hit.title}\n{hit.text}" for hit in hits])
        scored = [replace(hit, score=float(s)) for hit, s in zip(hits, scores, strict=True)]
        return sorted(scored, key=lambda hit: -hit.score)  # stable: ties keep the index's order


def size_of(index: object) -> int:
    """Number of entries of an index, 0 if it does not say."""
    return len(index) if isinstance(index, Sized) else 0


def fuse(lists: Sequence[Sequence[Hit]]) -> list[Hit]:
    """Reciprocal-rank fusion of one query's hits; ties go to what an earlier list ranks higher.

    A passage is its id, title and text, since ids of several corpora may be equal; what stands
    twice in a list counts by its better rank.
    """
    scores: dict[tuple[str, str, str], float] = {}
    first: dict[tuple[str, str, str], Hit] = {}
    for hits in lists:
        ranks: dict[tuple[str, str, str], int] = {}
        for rank, hit in enumerate(hits, 1):
            passage = (hit.id, hit.title, hit.text)
            ranks.setdefault(passage, rank)
            first.setdefault(passage, hit)
        for passage, rank in ranks.items():
            scores[passage] = scores.get(passage, 0.0) + 1 / (RANK_CONSTANT + rank)
    order = sorted(scores, key=lambda passage: -scores[passage])
    return [replace(first[passage], score=scores[passage]) for passage in order]
