"""The atlas as an environment: its text index, its image index, and how well both retrieve."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from environments.atlas.distortions import as_chalk, as_grey, as_sketch, cut
from environments.atlas.editions import AS_IT_IS, Edition
from environments.atlas.entities import (
    HEADLINE_RELATIONS,
    has_picture,
    load_entities,
    load_flag,
    load_picture,
)
from environments.atlas.passages import load_passages, passage_id
from environments.atlas.photos import PHOTO_SIZE, render_photo
from environments.episode import SearchEnvironment
from environments.retrieval import SNIPPET_WORDS, BM25TextIndex, ColourImageIndex

# The flat picture and warped views of it, of other seeds than any question's photo. Maps differ in
# outline alone, which a thumbnail sees only where it lies as in the photo: they need more views.
N_VIEWS = {"flags": 4, "maps": 8}
_VIEW_SEED = 7_000_003
VIEWS_FILE = Path(__file__).parent / "data" / "flag_views.safetensors"
ROBUST_VIEWS = (
    as_grey,
    as_sketch,
    as_chalk,
    *(cut(0.65, x, y) for x in (0, 1) for y in (0, 1)),
)


def load_text_index(
    edition: Edition = AS_IT_IS, snippet_words: int | None = SNIPPET_WORDS
) -> BM25TextIndex:
    """BM25 over the whole corpus of an edition; built once a process.

    See BM25TextIndex for `snippet_words`.
    """
    return _build_text_index(edition, snippet_words)


def load_image_index(
    n_views: int | None = None, domains: tuple[str, ...] = ("flags",), robust: bool = False
) -> ColourImageIndex:
    """Every place in several views of its flag, its map or both; built once a process.

    Hits carry the entity's name and a small flat picture of the first domain.

    Args:
        n_views: the flat picture and photos of it; None = N_VIEWS.
        domains: flags, maps or both.
        robust: finds turned, mirrored, cut and otherwise drawn pictures, too (the table is in
            docs/results/image-recall.md): further views, and every picture is looked at from all
            sides. The shipped checkpoints were trained without.
    """
    return _build_image_index(n_views, domains, robust)


@functools.cache
def _build_text_index(edition: Edition, snippet_words: int | None) -> BM25TextIndex:
    passages = load_passages(edition)
    return BM25TextIndex(
        [p.id for p in passages],
        [p.title for p in passages],
        [p.text for p in passages],
        snippet_words,
    )


@functools.cache
def _build_image_index(
    n_views: int | None, domains: tuple[str, ...], robust: bool
) -> ColourImageIndex:
    """Views of the default index are shipped: drawing them takes two seconds a process."""
    shipped = n_views is None and domains == ("flags",) and not robust
    ids, titles, images = [], [], []
    thumbnails: dict[str, Image.Image] = {}
    for domain in domains:
        for iso, entity in load_entities().items():
            if not has_picture(domain, iso):
                continue
            picture = load_picture(domain, iso)
            size = (PHOTO_SIZE, PHOTO_SIZE)
            flat = Image.fromarray(picture).resize(size, Image.Resampling.BOX)
            thumbnails.setdefault(iso, flat)
            n_warped = (n_views or N_VIEWS[domain]) - 1
            n_drawn = 1 + n_warped + (len(ROBUST_VIEWS) if robust else 0)
            ids += [iso] * n_drawn
            titles += [entity.name] * n_drawn
            if shipped:
                continue
            images.append(flat)
            images += [render_photo(picture, _VIEW_SEED + i, 0.4) for i in range(n_warped)]
            if robust:
                images += [distort(Image.fromarray(picture)) for distort in ROBUST_VIEWS]
    views = load_file(VIEWS_FILE)["views"] if shipped else images
    return ColourImageIndex(ids, titles, views, thumbnails, turns=robust)


def draw_views() -> np.ndarray:
    """Features of the default image index as `obm atlas views` ships them, float32 [views, 380]."""
    return load_image_index(n_views=N_VIEWS["flags"]).views


def load_environment(
    edition: Edition = AS_IT_IS, domains: tuple[str, ...] = ("flags",), **settings: Any
) -> SearchEnvironment:
    """The atlas's tools as a search environment.

    Args:
        edition: whose fact sheets the text search finds.
        domains: what the image search knows: flags, maps or both.
        settings: go to SearchEnvironment (dialect, budgets, top_k ...).
    """
    return SearchEnvironment(
        load_text_index(edition), load_image_index(domains=domains), **settings
    )


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
