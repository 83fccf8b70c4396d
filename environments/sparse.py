"""BM25 over any number of passages, served from disk.

The scores are bm25s's (Lucene variant, k1 1.5, b 0.75), to the last bit, and lie in its files
(`data`, `indices`, `indptr` of a sparse matrix, words by passages), so that `bm25s.BM25.load` reads
them, too. Other than bm25s this builds them shard by shard, keeps the words in a sorted file
instead of a dictionary in memory, and looks at no passage that has none of the query's words.
"""

from __future__ import annotations

import functools
import heapq
import mmap
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.lib.format import open_memmap
from tqdm import tqdm

from environments.building import Building, build, read_index, write_json
from environments.corpus import Corpus, JsonLines, Row
from environments.errors import EnvironmentSetupError
from environments.retrieval import TITLE_WEIGHT, cut_snippet, split_words
from environments.tools import Hit

K1, B = 1.5, 0.75  # bm25s's defaults
SLACK = 1e-4
"""Share by which a bound is widened: sums in another order differ by a few bits."""
SAMPLE = 16
"""Passages whose whole score is looked up for an early bound."""
LONG = 4096
"""So many postings cost about as much to walk as that bound does."""
DATA_FILE = "data.csc.index.npy"
INDICES_FILE = "indices.csc.index.npy"
INDPTR_FILE = "indptr.csc.index.npy"
MOST_FILE = "most.npy"
WORDS_FILE = "words.txt"
WORD_OFFSETS_FILE = "words.offsets.npy"


class MappedBM25Index:
    """BM25 over a folder that `build_bm25` has made; memory holds two numbers a passage
    and one a word.

    Args:
        folder: the index.
        snippet_words: a hit's text is its best sentences of so many words; None = all of it.
        mapped: False reads the matrix into memory.
    """

    def __init__(self, folder: Path, snippet_words: int | None = None, mapped: bool = True):
        read_index(folder)
        mode: Any = "r" if mapped else None
        # Plain views that cannot be written to, mapped or not: numba compiles each function for one
        # type only. Two that are compiled at once by two processes may change places in its cache.
        self._data, self._indices, self._indptr = (
            np.asarray(np.load(folder / name, mmap_mode=mode))
            for name in (DATA_FILE, INDICES_FILE, INDPTR_FILE)
        )
        for part in (self._data, self._indices, self._indptr):
            part.setflags(write=False)
        self._most = np.load(folder / MOST_FILE)
        self.corpus = Corpus(folder)
        self.words = SortedWords(folder)
        self.snippet_words = snippet_words
        self._scratch = threading.local()

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The k best passages for each query, best first; those that share no word are left out."""
        return [self._search_one(query, k) for query in queries]

    def _search_one(self, query: str, k: int) -> list[Hit]:
        numbers = [self.words.find(word) for word in split_words(query)]
        known = np.array([number for number in numbers if number >= 0], np.int64)
        if not len(known):
            return []
        scores, touched = self._accumulators()
        best, best_scores = top_passages(
            self._data, self._indices, self._indptr, self._most, known, scores, touched, k
        )
        return [
            self._hit(int(number), float(score), query)
            for number, score in zip(best, best_scores, strict=True)
        ]

    def _hit(self, number: int, score: float, query: str) -> Hit:
        row = self.corpus[number]
        text = cut_snippet(row.text, query, self.snippet_words)
        return Hit(row.id, row.title, text, score)

    def _accumulators(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores (all zero) and a list of passages, one pair a thread."""
        if not hasattr(self._scratch, "arrays"):
            n = len(self.corpus)
            self._scratch.arrays = np.zeros(n, np.float32), np.empty(n, np.int32)
        arrays: tuple[np.ndarray, np.ndarray] = self._scratch.arrays
        return arrays


@njit(nogil=True, cache=True)
def top_passages(
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    most: np.ndarray,
    words: np.ndarray,
    scores: np.ndarray,
    touched: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best passages and their scores, best first, ties by the smaller number.

    Rare words come first. Once k passages are known whose scores are higher than all words left
    could give together, no other passage can be among the best, and the long lists of those words
    need not be walked (MaxScore, Turtle and Flood 1995). Known are the whole scores of those that
    lead so far. A passage that was met is looked up in the lists left, until it can no longer win;
    one that still can is scored word by word in the query's order, so that the result has the bits
    of the plain sum.

    Args:
        data: float32 [postings], all above 0.
        indices: int32 [postings], passages of each word in ascending order.
        indptr: int64 [words + 1].
        most: float32 [words], the highest score of each word.
        words: int64, the query's words; one that stands twice counts twice.
        scores: float32 [passages], all zero; is so again afterwards.
        touched: int32 [passages], room to work in.
        k: 1 or more.

    Returns:
        int32 and float32 arrays of k entries or fewer.
    """
    order = np.argsort(indptr[words + 1] - indptr[words])
    left = np.float32(0)
    for word in words:
        left += most[word]
    n_touched, n_walked, least = 0, 0, np.float32(0)
    for number in order:
        word = words[number]
        start, end = indptr[word], indptr[word + 1]
        if n_touched >= k and end - start > n_touched + LONG:
            room = min(n_touched, max(k, SAMPLE))
            sample = best_touched(scores, touched, n_touched, room)
            least = max(least, kth_whole(data, indices, indptr, words, sample, k))
            if least > left * (1 + SLACK):
                break
        for j in range(start, end):
            passage = indices[j]
            if scores[passage] == 0:
                touched[n_touched] = passage
                n_touched += 1
            scores[passage] += data[j]
        left -= most[word]
        n_walked += 1
    rest, left = order[n_walked:], max(left, np.float32(0))
    if n_touched > k:
        least = max(least, scores[best_touched(scores, touched, n_touched, k)[k - 1]])
    least *= 1 - SLACK
    best = np.empty(k, np.int32)
    best_scores = np.empty(k, np.float32)
    n_best = 0
    for t in range(n_touched):
        passage = touched[t]
        highest = scores[passage] + left
        scores[passage] = 0
        for number in rest:
            if highest * (1 + SLACK) < least:
                break
            word = words[number]
            highest -= most[word]
            j = find_passage(indices, indptr[word], indptr[word + 1], passage)
            if j >= 0:
                highest += data[j]
        if highest * (1 + SLACK) < least:
            continue
        score = whole_score(data, indices, indptr, words, passage)
        if n_best == k:
            worst = best_scores[k - 1]
            if score < worst or (score == worst and passage > best[k - 1]):
                continue
        else:
            n_best += 1
        place = n_best - 1
        while place > 0 and (
            best_scores[place - 1] < score
            or (best_scores[place - 1] == score and best[place - 1] > passage)
        ):
            best_scores[place] = best_scores[place - 1]
            best[place] = best[place - 1]
            place -= 1
        best_scores[place] = score
        best[place] = passage
        if n_best == k:
            least = max(least, best_scores[k - 1] * (1 - SLACK))
    return best[:n_best], best_scores[:n_best]


@njit(nogil=True, cache=True)
def best_touched(scores: np.ndarray, touched: np.ndarray, n_touched: int, n: int) -> np.ndarray:
    """The n touched passages of the highest scores, best first; there are n or more."""
    best = np.empty(n, np.int32)
    best_scores = np.zeros(n, np.float32)
    for t in range(n_touched):
        score = scores[touched[t]]
        if score <= best_scores[n - 1]:
            continue
        place = n - 1
        while place > 0 and best_scores[place - 1] < score:
            best_scores[place] = best_scores[place - 1]
            best[place] = best[place - 1]
            place -= 1
        best_scores[place] = score
        best[place] = touched[t]
    return best


@njit(nogil=True, cache=True)
def kth_whole(
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    words: np.ndarray,
    passages: np.ndarray,
    k: int,
) -> float:
    """The k-th highest whole score of these passages; there are k or more."""
    wholes = np.empty(len(passages), np.float32)
    for i, passage in enumerate(passages):
        wholes[i] = whole_score(data, indices, indptr, words, passage)
    wholes.sort()
    return wholes[len(wholes) - k]


@njit(nogil=True, cache=True)
def whole_score(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, words: np.ndarray, passage: int
) -> np.float32:
    """A passage's score: the plain sum, in the query's order."""
    score = np.float32(0)
    for word in words:
        j = find_passage(indices, indptr[word], indptr[word + 1], passage)
        if j >= 0:
            score += data[j]
    return score


@njit(nogil=True, cache=True)
def find_passage(indices: np.ndarray, start: int, end: int, passage: int) -> int:
    """Where a passage stands in the ascending indices[start:end], or -1."""
    stop = end
    while start < end:
        middle = (start + end) // 2
        if indices[middle] < passage:
            start = middle + 1
        else:
            end = middle
    return start if start < stop and indices[start] == passage else -1


class SortedWords:
    """The words of an index in a sorted file; a word's place is its number."""

    def __init__(self, folder: Path):
        self._offsets = np.load(folder / WORD_OFFSETS_FILE, mmap_mode="r")
        with (folder / WORDS_FILE).open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # of this index alone, and bounded: queries repeat their words
        self.find = functools.lru_cache(maxsize=65536)(self._find)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _find(self, word: str) -> int:
        """The word's number, or -1."""
        wanted = word.encode()
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._word(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self._word(low) == wanted else -1

    def _word(self, number: int) -> bytes:
        return self._bytes[self._offsets[number] : self._offsets[number + 1] - 1]


def build_bm25(
    source: Path,
    output: Path,
    *,
    title_weight: int = TITLE_WEIGHT,
    shard_rows: int = 100_000,
    overwrite: bool = False,
) -> Path:
    """Builds the index; memory is that of one shard and of two numbers a word.

    Args:
        source: see `environments.corpus`.
        output: folder to make.
        title_weight: how often the title counts.
        shard_rows: passages in memory at a time.
        overwrite: replace what is there.

    Raises:
        EnvironmentSetupError: see `environments.building.build`.
    """
    settings = {"kind": "bm25", "title_weight": title_weight, "k1": K1, "b": B}
    return build(
        JsonLines(source),
        output,
        settings,
        functools.partial(_make_shard, title_weight=title_weight),
        _finish,
        shard_rows=shard_rows,
        overwrite=overwrite,
    )


def _make_shard(rows: list[Row], stem: Path, title_weight: int) -> list[Row]:
    """Writes a shard's sorted words, and its postings in the order of words, then passages."""
    numbers: dict[str, int] = {}
    tokens, lengths = array("i"), np.empty(len(rows), np.int32)
    for i, row in enumerate(rows):
        words = split_words(" ".join([row.title] * title_weight + [row.text]))
        lengths[i] = len(words)
        tokens.extend([numbers.setdefault(word, len(numbers)) for word in words])
    # by code points as by bytes: UTF-8 keeps the order
    words = sorted(numbers)
    place = np.empty(len(words), np.int64)
    for new, word in enumerate(words):
        place[numbers[word]] = new
    passage = np.repeat(np.arange(len(rows), dtype=np.int64), lengths)
    pairs = place[np.frombuffer(tokens, np.int32)] * len(rows) + passage if tokens else passage
    pairs, counts = np.unique(pairs, return_counts=True)
    by_word = np.bincount(pairs // len(rows), minlength=len(words))
    np.save(stem.with_suffix(".lengths.npy"), lengths)
    np.save(stem.with_suffix(".postings.npy"), by_word.astype(np.int64))
    np.save(stem.with_suffix(".passages.npy"), (pairs % len(rows)).astype(np.int32))
    np.save(stem.with_suffix(".counts.npy"), counts.astype(np.int32))
    stem.with_suffix(".words.txt").write_text("".join(f"{word}\n" for word in words), "utf-8")
    return rows


def _finish(building: Building) -> dict[str, Any]:
    """Merges the shards' words, then scatters their postings into the matrix."""
    places = _merge_words(building)
    n_words = sum(1 for _ in (building.folder / WORDS_FILE).open("rb"))
    if not n_words:
        building.discard()
        raise EnvironmentSetupError(
            f"{building.identity['source']['path']}: the corpus has no words to index; name one "
            "with text"
        )
    frequency = np.zeros(n_words, np.int64)
    for place, by_word in zip(places, building.load(".postings.npy"), strict=True):
        frequency[place] += by_word
    n_tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in building.load(".lengths.npy"))
    average = n_tokens / building.n_rows
    weight = np.log(1 + (building.n_rows - frequency + 0.5) / (frequency + 0.5))
    weight = weight.astype(np.float32)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(frequency)])
    np.save(building.folder / INDPTR_FILE, start)
    shape = (int(start[-1]),)
    data = open_memmap(building.folder / DATA_FILE, "w+", np.float32, shape)
    indices = open_memmap(building.folder / INDICES_FILE, "w+", np.int32, shape)
    free, most = start[:-1].copy(), np.zeros(n_words, np.float32)
    first = 0
    for number in tqdm(range(len(building.shards)), desc="merge", disable=None):
        read = functools.partial(_read, building.stem(number))
        by_word, lengths = read(".postings.npy"), read(".lengths.npy")
        place, passages = places[number], read(".passages.npy")
        # a word's postings in this shard go, in their order, to its next free places
        within = np.arange(len(passages)) - np.repeat(np.cumsum(by_word) - by_word, by_word)
        target = np.repeat(free[place], by_word) + within
        share = K1 * ((1 - B) + B * lengths[passages] / average)
        counts = read(".counts.npy").astype(np.float32)
        scores = np.repeat(weight[place], by_word) * (counts / (share + counts))
        data[target] = scores
        if len(place):
            highest = np.maximum.reduceat(scores, np.cumsum(by_word) - by_word)
            most[place] = np.maximum(most[place], highest)
        indices[target] = passages + first
        free[place] += by_word
        first += len(lengths)
    np.save(building.folder / MOST_FILE, most)
    data.flush()
    indices.flush()
    # what bm25s wants to know when it reads the matrix itself
    parameters = {
        "k1": K1, "b": B, "delta": 0.5, "method": "lucene", "idf_method": "lucene",
        "dtype": "float32", "int_dtype": "int32", "num_docs": building.n_rows, "backend": "numpy",
    }  # fmt: skip
    write_json(building.folder / "params.index.json", parameters)
    return {"words": n_words, "postings": shape[0]}


def _merge_words(building: Building) -> list[np.ndarray]:
    """Writes the sorted words of all shards; returns where each shard's words stand there."""
    n_shards = len(building.shards)
    places = [array("i") for _ in range(n_shards)]
    ends, position, last = array("q", [0]), 0, None
    streams = [_words_of(building.stem(number), number) for number in range(n_shards)]
    with (building.folder / WORDS_FILE).open("wb") as file:
        for word, number in heapq.merge(*streams):
            if word != last:
                file.write(word)
                position += len(word)
                ends.append(position)
                last = word
            places[number].append(len(ends) - 2)
    np.save(building.folder / WORD_OFFSETS_FILE, np.frombuffer(ends, np.int64))
    return [np.array(place, np.int32) for place in places]


def _words_of(stem: Path, number: int) -> Iterator[tuple[bytes, int]]:
    with stem.with_suffix(".words.txt").open("rb") as file:
        for word in file:
            yield word, number


def _read(stem: Path, suffix: str) -> np.ndarray:
    array_of: np.ndarray = np.load(stem.with_suffix(suffix))
    return array_of
