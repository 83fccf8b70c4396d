"""Back ends of the search tools: BM25 over passages, nearest pictures by plain colour features."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import bm25s
import numpy as np
from PIL import Image

from environments.tools import Hit

# The title is indexed this often: it lifts "REL of NAME" above passages that only mention NAME.
TITLE_WEIGHT = 3
SNIPPET_WORDS = 40
TURN_PENALTY = 1.25
TURNS = (
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.FLIP_LEFT_RIGHT,
)
# So many pictures an image index remembers: more than a step of training asks for.
REMEMBERED_PICTURES = 4096
STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "is", "it", "its", "of", "on",
    "or", "that", "the", "this", "to", "was", "what", "which", "with",
})  # fmt: skip


class BM25TextIndex:
    """BM25 (bm25s, Lucene variant) over titled passages; the title counts TITLE_WEIGHT times.

    Args:
        ids, titles, texts: one entry a passage, same order.
        snippet_words: a hit's text is its best sentences of so many words; None = all of it.
    """

    in_memory = True  # answers at once: no watchdog thread is needed

    def __init__(
        self,
        ids: Sequence[str],
        titles: Sequence[str],
        texts: Sequence[str],
        snippet_words: int | None = SNIPPET_WORDS,
    ):
        self.snippet_words = snippet_words
        self.words_shown = snippet_words or SNIPPET_WORDS
        self.ids, self.titles, self.texts = list(ids), list(titles), list(texts)
        corpus = [
            split_words(" ".join([title] * TITLE_WEIGHT + [text]))
            for title, text in zip(titles, texts, strict=True)
        ]
        self._vocabulary: dict[str, int] = {}
        token_ids = [
            [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words]
            for words in corpus
        ]
        self._bm25 = bm25s.BM25()
        self._bm25.index((token_ids, self._vocabulary), show_progress=False)

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The k best passages for each query, best first; those that share no word are left out."""
        return [list(self._search_one(query, k)) for query in queries]

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - an index lives as long as its process
    def _search_one(self, query: str, k: int) -> tuple[Hit, ...]:
        known = [self._vocabulary[word] for word in split_words(query) if word in self._vocabulary]
        if not known:
            return ()
        scores = self._bm25.get_scores_from_ids(known)
        # stable: ties go to the earlier passage, on every machine
        best = np.argsort(-scores, kind="stable")[:k]
        return tuple(
            Hit(
                id=self.ids[i],
                title=self.titles[i],
                text=cut_snippet(self.texts[i], query, self.snippet_words),
                score=float(scores[i]),
            )
            for i in best
            if scores[i] > 0
        )


class ColourImageIndex:
    """Nearest pictures by 380 plain numbers: a 10x10 thumbnail and soft colour histograms.

    Several views may stand for one entry (multi-view); an entry scores as its best view. Pictures
    are remembered by their content: the episodes of a group all ask about the same photo.

    Args:
        ids, titles: one a view; views of one entry share their id.
        images: the views, or their features, float32 [views, 380].
        thumbnails: entry id -> small picture shown with a hit, or None.
        turns: look at a picture turned by quarters and mirrored, too; such a likeness counts as
            TURN_PENALTY times as far, since for many flags the way up is all that tells them apart.
    """

    in_memory = True

    def __init__(
        self,
        ids: Sequence[str],
        titles: Sequence[str],
        images: Sequence[Image.Image] | np.ndarray,
        thumbnails: dict[str, Image.Image] | None = None,
        turns: bool = False,
    ):
        self.turns = turns
        entries = list(dict.fromkeys(ids))
        position = {entry: i for i, entry in enumerate(entries)}
        self.ids = entries
        self.titles = [dict(zip(ids, titles, strict=True))[entry] for entry in entries]
        self.thumbnails = thumbnails or {}
        self._entry_of_view = np.array([position[i] for i in ids])
        self.views = (
            images
            if isinstance(images, np.ndarray)
            else np.stack([colour_features(image) for image in images])
        )
        if len(self.views) != len(ids):
            raise ValueError(f"{len(ids)} ids for {len(self.views)} views")
        self._remembered: dict[bytes, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, images: list[Image.Image], k: int) -> list[list[Hit]]:
        """The k most similar entries for each picture, best first; score is 1 / (1 + distance)."""
        return [self._search_one(image, k) for image in images]

    def _search_one(self, image: Image.Image, k: int) -> list[Hit]:
        of_entry = self._distances(image)
        best = np.argsort(of_entry, kind="stable")[:k]
        return [
            Hit(
                id=self.ids[i],
                title=self.titles[i],
                text="",
                score=float(1 / (1 + of_entry[i])),
                image=self.thumbnails.get(self.ids[i]),
            )
            for i in best
        ]

    def _distances(self, image: Image.Image) -> np.ndarray:
        """Distance of a picture to every entry's best view, float64 [entries]."""
        image = image.convert("RGB")  # bytes alone do not tell a palette's colours
        content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        known = self._remembered.get(content)
        if known is not None:
            return known
        of_entry = self._nearest_view(image)
        for way in TURNS if self.turns else ():
            turned = TURN_PENALTY * self._nearest_view(image.transpose(way))
            of_entry = np.minimum(of_entry, turned)
        if len(self._remembered) >= REMEMBERED_PICTURES:  # the oldest goes: repeats come close by
            self._remembered.pop(next(iter(self._remembered)), None)
        self._remembered[content] = of_entry
        return of_entry

    def _nearest_view(self, image: Image.Image) -> np.ndarray:
        distance = np.abs(self.views - colour_features(image)).sum(1)
        of_entry = np.full(len(self.ids), np.inf)
        np.minimum.at(of_entry, self._entry_of_view, distance)
        return of_entry


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers without the commonest function words."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS]


def cut_snippet(text: str, query: str, n_words: int | None) -> str:
    """The sentences of a passage that share most words with the query, at most n_words in all.

    They keep the passage's order. Without a limit (None) it is the whole passage.
    """
    if n_words is None:
        return text
    wanted = set(split_words(query))
    sentences = re.split(r"(?<=[.!?]) ", text)
    n_shared = [len(wanted & set(split_words(sentence))) for sentence in sentences]
    ranked = sorted(range(len(sentences)), key=lambda i: (-n_shared[i], i))
    kept: list[int] = []
    room = n_words
    for i in ranked:
        length = len(sentences[i].split())
        if length <= room or not kept:
            kept.append(i)
            room -= length
    return " ".join(" ".join(sentences[i].split()[:n_words]) for i in sorted(kept))


def colour_features(image: Image.Image) -> np.ndarray:
    """Features of a picture: normalised 10x10 thumbnail, global and 3x3 soft colour histograms.

    Every part is scaled by its length, so that the L1 distance weighs thumbnail and histograms
    alike.

    Args:
        image: any size and mode.

    Returns:
        float32 vector [380]: 300 of the thumbnail, 8 global bins, 72 bins of the 3x3 cells.
    """
    small = image.convert("RGB").resize((30, 30), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32) / 255
    thumbnail = rgb.reshape(10, 3, 10, 3, 3).mean((1, 3))
    chroma = _opponent_colours(thumbnail)
    bins = _soft_histogram(_opponent_colours(rgb))
    cells = bins.reshape(3, 10, 3, 10, -1).mean((1, 3))
    parts = [chroma.ravel() / chroma.size * 4, bins.mean((0, 1)), cells.ravel() / 9]
    return np.concatenate(parts).astype(np.float32)


def _opponent_colours(rgb: np.ndarray) -> np.ndarray:
    """Lightness and two opponent axes after a grey-world balance of the light, [..., 3]."""
    balanced = rgb / (rgb.max() + 1e-6)
    light = balanced.mean(-1)
    return np.stack(
        [
            light * 0.7,
            balanced[..., 0] - balanced[..., 1],
            (balanced[..., 0] + balanced[..., 1]) / 2 - balanced[..., 2],
        ],
        axis=-1,
    )


_PALETTE = np.array(
    [
        [0.1, 0, 0],
        [0.35, 0, 0],
        [0.65, 0, 0],
        [0.35, 0.7, 0.3],
        [0.3, -0.3, 0.1],
        [0.3, 0, -0.4],
        [0.5, 0.1, 0.7],
        [0.4, 0.4, 0.6],
    ]
)


def _soft_histogram(opponent: np.ndarray) -> np.ndarray:
    """Share of each pixel in eight colour bins, [..., 8]."""
    distance = ((opponent[..., None, :] - _PALETTE) ** 2).sum(-1)
    weight = np.exp(-distance / 0.02)
    return weight / (weight.sum(-1, keepdims=True) + 1e-9)
