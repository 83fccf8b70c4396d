"""Build an index over passages or pictures, for `obm serve`.

bm25     words, served from disk: no model, any size
dense    vectors of a text encoder (sentence-transformers or plain transformers)
images   vectors of CLIP or SigLIP, or plain colour features

SOURCE is a .jsonl or .jsonl.gz file: {"id", "title", "text"} or {"id", "contents"} a line, for
images {"id", "title", "image": PATH}. A build that was cut short goes on where it was when the same
command is given again; the folder appears when it is complete.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from launch.errors import LaunchError

EXAMPLES = (
    "obm index bm25 wiki-18.jsonl --output runs/wiki-bm25",
    "obm index dense wiki-18.jsonl --output runs/wiki-e5 --model intfloat/e5-base-v2 "
    "--query-prefix 'query: ' --passage-prefix 'passage: ' --neighbours hnsw --device cuda",
    "obm index images photos.jsonl --output runs/photos --model openai/clip-vit-base-patch32",
)
SHARD_ROWS = {"bm25": 100_000, "dense": 4096, "images": 1024}
MAX_TITLE_WEIGHT = 1000
"""The title is written so often before it is split into words: more would fill the memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is indexed, how, and where to."""
    parser.add_argument("kind", choices=tuple(SHARD_ROWS))
    parser.add_argument("source", metavar="SOURCE", help="a .jsonl or .jsonl.gz file")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the index")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--shard-rows", type=int, metavar="N",
        help="rows in memory at a time (default: 100000 bm25, 4096 dense, 1024 images)",
    )  # fmt: skip
    parser.add_argument(
        "--title-weight", type=int, default=3, metavar="N",
        help="bm25: how often the title counts (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="MODEL",
        help="dense, images: encoder, a folder or hub id (images: default colour, without a model)",
    )  # fmt: skip
    parser.add_argument(
        "--neighbours", choices=("flat", "hnsw"), default="flat",
        help="dense, images: exact search on disk, or a graph in memory (default: flat)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the encoder")
    parser.add_argument(
        "--pooling", choices=("mean", "cls"),
        help="dense (default: as sentence-transformers stored it, else mean)",
    )  # fmt: skip
    for name in ("query", "passage"):
        parser.add_argument(
            f"--{name}-prefix", metavar="TEXT",
            help="dense: stands before every text (default: the stored prompt, else nothing)",
        )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="dense: longer texts are cut (default: stored)"
    )
    parser.add_argument(
        "--thumbnails", type=int, default=0, metavar="PX",
        help="images: keep small pictures of this longer side (default: 0, none)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Build, and say what was built."""
    from environments.building import read_index

    output = Path(options.output)
    for name, least in (
        ("shard_rows", 1),
        ("title_weight", 0),
        ("max_tokens", 1),
        ("thumbnails", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise LaunchError(f"--{name.replace('_', '-')} has to be {least} or more, not {value}")
    if options.title_weight > MAX_TITLE_WEIGHT:
        raise LaunchError(
            f"--title-weight has to be {MAX_TITLE_WEIGHT} or less, not {options.title_weight}"
        )
    if options.kind == "dense" and not options.model:
        raise LaunchError("dense needs --model, a text encoder's folder or hub id")
    start = time.monotonic()
    _build(options, Path(options.source), output)
    index = read_index(output)
    seconds = time.monotonic() - start
    print(f"{index['rows']} rows in {output} ({options.kind}, {seconds:.0f} s)")
    return 0


def _build(options: argparse.Namespace, source: Path, output: Path) -> None:
    shard_rows = options.shard_rows or SHARD_ROWS[options.kind]
    if options.kind == "bm25":
        from environments.sparse import build_bm25

        build_bm25(
            source, output, title_weight=options.title_weight,
            shard_rows=shard_rows, overwrite=options.overwrite,
        )  # fmt: skip
        return
    from environments.dense import COLOUR, build_dense, build_images

    if options.kind == "dense":
        build_dense(
            source, output, options.model, neighbours=options.neighbours, shard_rows=shard_rows,
            overwrite=options.overwrite, device=options.device, pooling=options.pooling,
            query_prefix=options.query_prefix, passage_prefix=options.passage_prefix,
            max_tokens=options.max_tokens,
        )  # fmt: skip
    else:
        build_images(
            source, output, options.model or COLOUR, neighbours=options.neighbours,
            thumbnail_px=options.thumbnails, shard_rows=shard_rows,
            overwrite=options.overwrite, device=options.device,
        )  # fmt: skip
