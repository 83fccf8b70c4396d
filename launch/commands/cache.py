"""The cache of tool results: carry it, look into it, tidy it up.

export  writes it as JSONL and PNG, into a folder or a tar file;
import  takes such an export over, or MMSearch-R1's published image searches (--fvqa);
stats   what it holds, by tool and provider;
prune   drops old records, records without their pictures, and pictures that nothing shows.
"""

from __future__ import annotations

import argparse
import os
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError

if TYPE_CHECKING:
    from environments.cache import ResultCache

EXAMPLES = (
    "obm cache export runs/cache runs/cache.tar.gz",
    "obm cache import runs/cache cache.tar.gz",
    "obm cache import runs/cache fvqa_train_image_search_results_cache.pkl --fvqa "
    "fvqa_train.parquet",
    "obm cache stats runs/cache",
    "obm cache prune runs/cache --older-than 30d",
)
_AGE = re.compile(r"(\d+)([hd])")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, with which cache."""
    parser.add_argument("action", choices=("export", "import", "stats", "prune"))
    parser.add_argument("cache", help="folder of the cache (environment.cache)")
    parser.add_argument(
        "file", nargs="?",
        help="export: what to write; import: what to read (a folder, .tar or .tar.gz)",
    )  # fmt: skip
    parser.add_argument("--replace", action="store_true", help="import: over records of equal key")
    parser.add_argument(
        "--fvqa", metavar="PARQUET",
        help="import: the file is FVQA's pickled image-search cache, and this the data set with "
        "the questions' pictures",
    )  # fmt: skip
    parser.add_argument("--k", type=int, default=3, help="import --fvqa: environment.top_k_image")
    parser.add_argument(
        "--country", default="us", help="import --fvqa: live.country of the runs that will use it"
    )
    parser.add_argument("--language", default="en", help="import --fvqa: live.language, likewise")
    parser.add_argument(
        "--pictures", action="store_true",
        help="import --fvqa: fetch the hits' small pictures (for environment.thumbnails)",
    )  # fmt: skip
    parser.add_argument("--older-than", metavar="AGE", help="prune: e.g. 12h, 30d")
    parser.add_argument("--provider", metavar="NAME", help="prune: only this one's, e.g. serper")


def run(options: argparse.Namespace) -> int:
    """Open the cache and do it."""
    from environments.cache import ResultCache
    from environments.cache_files import MAX_K

    folder = Path(options.cache)
    if options.action != "import" and not os.path.isfile(folder / "results.sqlite"):
        raise LaunchError(f"{folder}: there is no cache; name the folder of environment.cache")
    if options.action in ("export", "import") and not options.file:
        raise LaunchError(f"obm cache {options.action} needs a second path: what to write or read")
    if not 1 <= options.k <= MAX_K:
        raise LaunchError(f"--k has to be from 1 to {MAX_K}, not {options.k}")
    actions = {"export": _export, "stats": _stats, "prune": _prune}
    try:
        if options.action == "import":
            print(_import(folder, options))
        else:
            with closing(ResultCache(folder)) as cache:
                print(actions[options.action](cache, options))
    except sqlite3.Error as error:
        raise LaunchError(
            f"{folder / 'results.sqlite'}: cannot be read ({error}); import an export of it into a "
            "new folder"
        ) from error
    return 0


def _export(cache: ResultCache, options: argparse.Namespace) -> str:
    from environments.cache_files import export_cache

    counts = export_cache(cache, Path(options.file))
    return f"{counts['records']} records and {counts['images']} pictures in {options.file}"


def _import(folder: Path, options: argparse.Namespace) -> str:
    """Opens the cache last: for a source that is refused none is made."""
    from environments.cache import ResultCache

    source = Path(options.file)
    for path in (source, Path(options.fvqa or source)):
        if not os.path.exists(path):
            raise LaunchError(f"{path} does not exist; name a file that is there")
    if options.fvqa:
        return _import_fvqa(folder, source, options)
    if source.suffix in (".pkl", ".pickle", ".pt"):
        raise LaunchError(
            f"{source}: pickles are not imported, since they may run any program; for FVQA's "
            "published image searches add --fvqa with the data set's Parquet file"
        )
    from environments.cache_files import read_export, take_over

    export = read_export(source, folder)
    with closing(ResultCache(folder)) as cache:
        counts = take_over(cache, export, options.replace)
    return f"{counts['records']} records taken over, {counts['kept']} were there already"


def _import_fvqa(folder: Path, source: Path, options: argparse.Namespace) -> str:
    from functools import partial

    from environments.cache import ResultCache
    from environments.fetch import SafeFetcher
    from environments.fvqa import hash_pictures, import_fvqa, read_fvqa
    from environments.lens import lens_identity
    from environments.pictures import fetch_picture

    fetch = partial(fetch_picture, SafeFetcher(), max_side=256) if options.pictures else None
    identity = lens_identity(options.country, options.language, options.pictures)
    entries = read_fvqa(source)
    pictures = hash_pictures(Path(options.fvqa), entries)
    with closing(ResultCache(folder)) as cache:
        counts = import_fvqa(
            cache, entries, pictures, identity, options.k, fetch, options.replace
        )  # fmt: skip
    return (
        f"{counts['records']} image searches taken over, {counts['kept']} were there already, "
        f"{counts['without_question']} have no question in {options.fvqa}"
    )


def _stats(cache: ResultCache, options: argparse.Namespace) -> str:
    from environments.cache_files import cache_stats

    lines = ["| tool | provider | records | empty | refused | pictures | kB | oldest | newest |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    for row in cache_stats(cache):
        counts = f"{row['records']} | {row['empty']} | {row['refused']} | {row['images']}"
        kilobytes = f"{row['text_bytes'] / 1000:.1f}"
        days = f"{_day(row['oldest'])} | {_day(row['newest'])}"
        lines.append(f"| {row['tool']} | {row['provider']} | {counts} | {kilobytes} | {days} |")
    return "\n".join(lines)


def _prune(cache: ResultCache, options: argparse.Namespace) -> str:
    from environments.cache_files import prune_cache

    counts = prune_cache(cache, _seconds(options.older_than), options.provider)
    return (
        f"{counts['records']} records dropped ({counts['broken']} lacked a picture), "
        f"{counts['images']} pictures dropped"
    )


def _seconds(age: str | None) -> float | None:
    if age is None:
        return None
    match = _AGE.fullmatch(age)
    if match is None:
        raise LaunchError(f"--older-than {age!r}: write hours or days, such as 12h or 30d")
    return float(match[1]) * (3600 if match[2] == "h" else 86400)


def _day(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):  # of a cache that was filled by other hands
        return "no date"
