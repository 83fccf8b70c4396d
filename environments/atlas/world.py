"""The atlas as an environment: its text index, its image index, and how well both retrieve."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from environments.atlas.distortions import as_chalk, as_grey, as_sketch, cut
from environments.atlas.entities import HEADLINE_RELATIONS, load_entities, load_flag
from environments.atlas.passages import load_passages, passage_id
from environments.atlas.photos import PHOTO_SIZE, render_photo
from environments.episode import SearchEnvironment
from environments.retrieval import SNIPPET_WORDS, BM25TextIndex, ColourImageIndex

N_VIEWS = 4  # the flat flag and three warped views of it, of other seeds than any question's photo
_VIEW_SEED = 7_000_003
ROBUST_VIEWS = (
    as_grey,
    as_sketch,
    as_chalk,
    *(cut(0.65, x, y) for x in (0, 1) for y in (0, 1)),
)


@functools.cache
def load_text_index(snippet_words: int | None = SNIPPET_WORDS) -> BM25TextIndex:
    """BM25 over the whole corpus; see BM25TextIndex for `snippet_words`."""
    passages = load_passages()
    return BM25TextIndex(
        [p.id for p in passages],
        [p.title for p in passages],
        [p.text for p in passages],
        snippet_words,
    )


@functools.cache
def load_image_index(n_views: int = N_VIEWS, robust: bool = False) -> ColourImageIndex:
    """Every flag in several views; hits carry the entity's name and a small flat flag.

    Args:
        n_views: the flat flag and photos of it.
        robust: finds turned, mirrored, cut and otherwise drawn pictures, too (the table is in
            docs/results/image-recall.md): further views, and every picture is looked at from all
            sides. The shipped checkpoints were trained without.
    """
    ids, titles, images = [], [], []
    thumbnails: dict[str, Image.Image] = {}
    for iso, entity in load_entities().items():
        flag = load_flag(iso)
        size = (PHOTO_SIZE, PHOTO_SIZE)
        thumbnails[iso] = Image.fromarray(flag).resize(size, Image.Resampling.BOX)
        views = [thumbnails[iso]]
        views += [render_photo(flag, _VIEW_SEED + i, strength=0.4) for i in range(n_views - 1)]
        if robust:
            views += [distort(Image.fromarray(flag)) for distort in ROBUST_VIEWS]
        ids += [iso] * len(views)
        titles += [entity.name] * len(views)
        images += views
    return ColourImageIndex(ids, titles, images, thumbnails, turns=robust)


def load_environment(**settings: Any) -> SearchEnvironment:
    """The atlas's tools as a search environment.

    Args:
        settings: go to SearchEnvironment (dialect, budgets, top_k ...).
    """
    return SearchEnvironment(load_text_index(), load_image_index(), **settings)


def measure_retrieval(
    strengths: Sequence[float] = (0.0, 0.5, 1.0), seed: int = 1
) -> list[dict[str, Any]]:
    """recall@1 and @3 of both indexes: one row a kind of query.

    Text queries are "REL of NAME", the bare name, and the question without its entity; pictures are
    photos at each strength.
    """
    rows: list[dict[str, Any]] = []
    index, entities = load_text_index(), load_entities()
    facts = [(e, r) for e in entities.values() for r in HEADLINE_RELATIONS if r in e.relations]
    gold = [passage_id(e.iso, r) for e, r in facts]
    queries = {
        "text: REL of NAME": [f"{r} of {e.name}" for e, r in facts],
        "text: NAME alone": [e.name for e, _ in facts],
        "text: question without the entity": [f"What is the {r} of this place?" for _, r in facts],
    }
    for name, texts in queries.items():
        found = [[hit.id for hit in hits] for hits in index.search(texts, 3)]
        rows.append(_recall(name, found, gold))
    for strength in strengths:
        photos = [
            render_photo(load_flag(iso), seed * 1000 + i, strength)
            for i, iso in enumerate(entities)
        ]
        found = [[hit.id for hit in hits] for hits in load_image_index().search(photos, 3)]
        rows.append(_recall(f"image: photo at strength {strength:g}", found, list(entities)))
    return rows


def _recall(name: str, found: list[list[str]], gold: list[str]) -> dict[str, Any]:
    at_1 = sum(g in hits[:1] for hits, g in zip(found, gold, strict=True)) / len(gold)
    at_3 = sum(g in hits[:3] for hits, g in zip(found, gold, strict=True)) / len(gold)
    return {"query": name, "n": len(gold), "recall@1": round(at_1, 3), "recall@3": round(at_3, 3)}
