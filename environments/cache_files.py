"""A ResultCache as plain files, to carry it to another machine or to publish it: export, import.

    results.jsonl              one record a line: tool, provider, query, k, value, created
    images/ab/abcd....png      the pictures that the records show, named by their SHA-256

in a folder or a tar file. An import believes nothing: names that are not of these two forms, links,
pictures that do not match their name and records of another shape are refused, and then nothing at
all is taken over. No pickles, neither way.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import shutil
import sqlite3
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from sys import float_info
from typing import Any

from environments.cache import CacheError, Question, Record, ResultCache, image_file
from environments.content import canonical, image_names, sha256, write_whole

RECORDS = "results.jsonl"
TOOLS = ("text_search", "image_search", "visit")
MAX_IMAGE_BYTES = 64_000_000
ORPHAN_AGE_S = 3600.0
"""Pictures younger than this may belong to a result that is just being written."""
MAX_K = 2**31 - 1
END_OF_TIME = 253_402_300_800.0
"""The year 10000, which no date reaches."""
_IMAGE_FILE = re.compile(r"images/([0-9a-f]{2})/([0-9a-f]{64})\.png")
_HIT = {"id": str, "title": str, "text": str, "url": str}
_PAGE = {"title": str, "text": str, "url": str}


# ---------------------------------------------------------------- export


def export_cache(cache: ResultCache, target: Path) -> Counter[str]:
    """Writes all records and their pictures.

    Args:
        cache: what to export.
        target: a new folder, or a new file that ends with .tar or .tar.gz.

    Returns:
        Numbers of `records` and `images`.

    Raises:
        CacheError: the target exists or cannot be written, or a picture is missing. Nothing is left
            then.
    """
    try:
        if target.exists():
            raise CacheError(f"{target} exists; name another one")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".part-{target.name}")
        if target.name.endswith((".tar", ".tar.gz", ".tgz")):
            return _export_tar(cache, part, target)
        return _export_folder(cache, part, target)
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, FileExistsError):
            reason = f"{error.filename} is no folder"
        raise CacheError(
            f"{target}: cannot be written ({reason}); name another one, or free space"
        ) from error


def _export_folder(cache: ResultCache, part: Path, target: Path) -> Counter[str]:
    shutil.rmtree(part, ignore_errors=True)  # what a kill left
    try:
        counts = _export(cache, lambda name, content: write_whole(part / name, content))
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


def _export_tar(cache: ResultCache, part: Path, target: Path) -> Counter[str]:
    packed = "w" if target.name.endswith(".tar") else "w:gz"
    try:
        with tarfile.open(part, packed) as tar:  # type: ignore[call-overload]

            def add(name: str, content: bytes) -> None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

            counts = _export(cache, add)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return counts


def _export(cache: ResultCache, write: Any) -> Counter[str]:
    lines, names = [], set()
    for record in cache.records():
        lines.append(record_line(record))
        names.update(image_names(record.value))
    for name in sorted(names):
        try:
            content = cache.image_path(name).read_bytes()
        except OSError as error:
            raise CacheError(
                f"{cache.image_path(name)}: {error.strerror}; run it again with cache_mode read, "
                "or drop what lacks pictures with obm cache prune"
            ) from error
        write(f"images/{name[:2]}/{name}.png", content)
    write(RECORDS, "".join(lines).encode())
    return Counter(records=len(lines), images=len(names))


def record_line(record: Record) -> str:
    """One line of results.jsonl."""
    q = record.question
    row = {
        "tool": q.tool,
        "provider": json.loads(q.provider),
        "query": q.query,
        "k": q.k,
        "value": json.loads(record.value),
        "created": record.created,
    }
    return canonical(row) + "\n"


# ---------------------------------------------------------------- import


@dataclass(frozen=True)
class Export:
    """An export that has been looked through and may be taken over.

    Attributes:
        source: the folder or tar file.
        records: all of them.
        images: names of the pictures that come along.
    """

    source: Path
    records: list[Record]
    images: set[str]


def import_cache(cache: ResultCache, source: Path, replace: bool = False) -> Counter[str]:
    """Takes over an export, all of it or, if anything in it is wrong, nothing.

    Args:
        cache: where to.
        source: the folder or tar file.
        replace: records that are there already are replaced instead of kept.

    Returns:
        Numbers of `records` (new or replaced), `kept` and `images`.

    Raises:
        CacheError: names the entry and what is wrong with it.
    """
    return take_over(cache, read_export(source, cache.folder), replace)


def read_export(source: Path, folder: Path) -> Export:
    """Looks through an export; writes nothing.

    Args:
        source: the folder or tar file.
        folder: of the cache that shall take it over; pictures may be there already.

    Raises:
        CacheError: names the entry and what is wrong with it.
    """
    records: list[Record] = []
    images: set[str] = set()
    has_records = False
    for name, content in _entries(source):
        if name == RECORDS:
            has_records = True
            records += list(read_records(content, source))
            continue
        match = _IMAGE_FILE.fullmatch(name)
        if match is None or match[1] != match[2][:2]:
            raise CacheError(f"{source}: '{name[:120]}' is no part of an exported cache; remove it")
        if sha256(content) != match[2]:
            raise CacheError(f"{source}: {name} does not match its hash; export it again")
        images.add(match[2])
    if not has_records:  # it stands last: a tar file that was cut lacks it
        raise CacheError(
            f"{source}: lacks {RECORDS}; name what obm cache export wrote, or copy it again"
        )
    for record in records:
        for image in image_names(record.value):
            if image not in images and not image_file(folder, image).is_file():
                raise CacheError(f"{source}: lacks the picture {image}; export it again")
    return Export(source, records, images)


def take_over(cache: ResultCache, export: Export, replace: bool = False) -> Counter[str]:
    """Writes what `read_export` found into a cache; pictures first, so that no record lacks one.

    Args:
        cache: where to.
        export: of the same folder.
        replace: as for `import_cache`.

    Returns:
        As `import_cache`.

    Raises:
        CacheError: the cache cannot be written; no record is in it then.
    """
    try:
        for name, content in _entries(export.source):
            match = _IMAGE_FILE.fullmatch(name)
            if match is not None and match[2] in export.images and sha256(content) == match[2]:
                write_whole(cache.image_path(match[2]), content)
        n_new = cache.put_all(export.records, replace)
    except (OSError, sqlite3.Error) as error:
        raise CacheError(
            f"{cache.folder}: cannot be written ({error}); nothing was taken over; free space or "
            "name another folder"
        ) from error
    return Counter(records=n_new, kept=len(export.records) - n_new, images=len(export.images))


def read_records(content: bytes, source: Path) -> Iterator[Record]:
    """The records of a results.jsonl, every field checked.

    Raises:
        CacheError: names the line.
    """
    for number, line in enumerate(content.splitlines(), 1):
        try:
            yield _record(json.loads(line))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise CacheError(
                f"{source}/{RECORDS}, line {number}: no record of a cache ({reason}); "
                "export it again"
            ) from error


def _record(row: Any) -> Record:
    if set(row) != {"tool", "provider", "query", "k", "value", "created"}:
        raise ValueError(f"has the fields {sorted(row)}")
    if row["tool"] not in TOOLS:
        raise ValueError(f"knows no tool '{row['tool']}'")
    if not isinstance(row["provider"], dict) or not isinstance(row["query"], str):
        raise ValueError("provider or query is of another type")
    row["query"].encode()  # half a surrogate pair, which JSON can write, is a UnicodeEncodeError
    least = 0 if row["tool"] == "visit" else 1
    if type(row["k"]) is not int or not least <= row["k"] <= MAX_K:
        raise ValueError(f"k is no whole number from {least} to {MAX_K}")
    # NaN is in no range
    if type(row["created"]) not in (int, float) or not 0 <= row["created"] < END_OF_TIME:
        raise ValueError("created is no Unix time from 1970 to the year 9999")
    _check_value(row["value"])
    question = Question(row["tool"], canonical(row["provider"]), row["query"], row["k"])
    return Record(question, canonical(row["value"]), float(row["created"]))


def _check_value(value: Any) -> None:
    match value:
        case {"hits": list(hits), **rest} if not rest:
            for hit in hits:
                score, image = hit["score"], hit["image"]
                _check_fields({k: v for k, v in hit.items() if k not in ("score", "image")}, _HIT)
                is_number = type(score) in (int, float)
                if not is_number or not -float_info.max <= score <= float_info.max:
                    raise ValueError("the score of a hit is no finite number")
                if image is not None and not re.fullmatch(r"[0-9a-f]{64}", image):
                    raise ValueError("the picture of a hit is no hash")
        case {"page": dict(page), **rest} if not rest:
            _check_fields(page, _PAGE)
        case {"refused": str(), **rest} if not rest:
            pass
        case _:
            raise ValueError("its value is neither hits, page nor refused")


def _check_fields(row: dict[str, Any], types: Mapping[str, type]) -> None:
    if set(row) != set(types) or not all(isinstance(row[k], t) for k, t in types.items()):
        raise ValueError(f"expected the fields {sorted(types)}")


def _entries(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an export; of plain files only.

    Raises:
        CacheError: no export, a link, a special file or a file beyond all measure.
    """
    try:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                name = path.relative_to(source).as_posix()
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise CacheError(f"{source}: '{name}' is no plain file; remove it")
                if path.is_file():
                    _check_size(source, name, path.stat().st_size)
                    yield name, path.read_bytes()
            return
        with tarfile.open(source, "r:*") as tar:
            for member in tar:
                name = str(PurePosixPath(member.name))
                if member.isdir() and not name.startswith(("/", "..")):
                    continue
                if not member.isreg():
                    raise CacheError(f"{source}: '{name[:120]}' is no plain file; remove it")
                _check_size(source, name, member.size)
                file = tar.extractfile(member)
                assert file is not None
                yield name, file.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CacheError(
            f"{source}: neither a folder nor a tar file of a cache ({error}); "
            "name what obm cache export wrote"
        ) from error


def _check_size(source: Path, name: str, size: int) -> None:
    if name != RECORDS and size > MAX_IMAGE_BYTES:
        raise CacheError(f"{source}: '{name[:120]}' is larger than any picture; remove it")


# ---------------------------------------------------------------- upkeep


def cache_stats(cache: ResultCache) -> list[dict[str, Any]]:
    """One row for each tool and provider: records, empty ones, pictures, bytes, oldest, newest."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in cache.records():
        q = record.question
        row = rows.setdefault(
            (q.tool, q.provider),
            {
                "tool": q.tool, "provider": q.provider, "records": 0, "empty": 0, "refused": 0,
                "images": 0, "text_bytes": 0, "oldest": record.created, "newest": record.created,
            },
        )  # fmt: skip
        row["records"] += 1
        row["empty"] += record.value == '{"hits":[]}'
        row["refused"] += record.value.startswith('{"refused"')
        row["images"] += len(image_names(record.value))
        row["text_bytes"] += len(record.value)
        row["oldest"] = min(row["oldest"], record.created)
        row["newest"] = max(row["newest"], record.created)
    return [rows[key] for key in sorted(rows)]


def prune_cache(
    cache: ResultCache,
    older_than_s: float | None = None,
    provider: str | None = None,
    now: float | None = None,
) -> Counter[str]:
    """Drops records, and pictures that no record shows any more.

    Args:
        cache: what to prune.
        older_than_s: age in seconds; None = no record goes for its age.
        provider: only records whose identity holds this name, e.g. `serper`; with no age, all of
            them.
        now: Unix time.

    Returns:
        Numbers of `records` (dropped), `broken` (of these, ones that lacked a picture) and
        `images` (dropped).
    """
    now = time.time() if now is None else now
    counts, used, gone = Counter(records=0, broken=0, images=0), set(), []
    for record in cache.records():
        names = image_names(record.value)
        is_broken = any(not cache.image_path(name).is_file() for name in names)
        is_meant = provider is None or f'"{provider}"' in record.question.provider
        is_old = older_than_s is None or record.created < now - older_than_s
        is_chosen = older_than_s is not None or provider is not None
        if is_broken or (is_chosen and is_meant and is_old):
            gone.append(record.question.key)
            counts["broken"] += is_broken
        else:
            used.update(names)
    cache.delete(gone)
    counts["records"] = len(gone)
    for path in (cache.folder / "images").rglob("*"):
        is_orphan = path.is_file() and path.stem not in used
        if is_orphan and path.stat().st_mtime < now - ORPHAN_AGE_S:
            path.unlink(missing_ok=True)
            counts["images"] += 1
    return counts
