"""MMSearch-R1's published image searches (FVQA), read without trusting the pickle they come in.

`fvqa_{train,test}_image_search_results_cache.pkl` of lmms-lab/FVQA holds, for every `data_id`,

    {"tool_returned_web_title_list": [str, ...], "tool_returned_images_urls": [str | picture, ...]}

A pickle is a program: unpickling it may run anything. Here it may build dicts, lists, tuples, sets
and plain values, and nothing else: every class that it names is refused, except those of PIL's
pictures, in whose place stands an inert stub that drops what it is given (the pictures' pickled
form differs between versions of Pillow, and their titles are what a search needs).

The entries are stored under the hash of the question's own picture, which only the data set holds:
`obm cache import FOLDER CACHE.pkl --fvqa fvqa_train.parquet`.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from environments.benchmarks.pictures import PictureError, decode_picture
from environments.cache import CacheError, Question, Record, ResultCache
from environments.content import canonical, picture_hash

if TYPE_CHECKING:
    from PIL.Image import Image

TITLES, PICTURES = "tool_returned_web_title_list", "tool_returned_images_urls"
MAX_PICKLE_BYTES = 2_000_000_000
_PLAIN_CODES = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE", "PUT", "BINPUT",
    "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT",
    "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM",
    "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET",
})  # fmt: skip
_CLASS_CODES = frozenset({"GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"})
"""What pictures need; every class that they name goes through `find_class`."""
_MEMO_CODES = ("PUT", "BINPUT", "LONG_BINPUT")
_PICTURE_MODULE = re.compile(r"PIL\.[A-Za-z0-9]+")
_PICTURE_CLASS = re.compile(r"[A-Z][A-Za-z0-9]*")


class DroppedPicture:
    """Stands for a pickled picture; keeps nothing of it."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> DroppedPicture:
        """Drops the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Drops the state."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain values only; every callable that a pickle asks for goes through `find_class`."""

    def find_class(self, module: str, name: str) -> Any:
        if _PICTURE_MODULE.fullmatch(module) and _PICTURE_CLASS.fullmatch(name):
            return DroppedPicture
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to things outside of it")


def read_plain_pickle(file: IO[bytes], name: str = "the pickle") -> Any:
    """The value of a pickle that consists of dicts, lists, tuples, sets, strings, bytes, numbers,
    None, booleans and PIL pictures (as DroppedPicture).

    Raises:
        CacheError: it asks for anything else, or is broken. Nothing of it has been run then.
    """
    try:
        check_codes(file)
        return _PlainUnpickler(file).load()
    except Exception as error:  # a hostile stream makes the reader fail in every way there is
        raise CacheError(
            f"{name}: refused, since a pickle may run any program: {type(error).__name__}: "
            f"{str(error)[:200]}; take only the file that lmms-lab/FVQA publishes"
        ) from None


def check_codes(file: IO[bytes]) -> None:
    """Walks through a pickle without building anything, then rewinds the file.

    Raises:
        pickle.UnpicklingError: an operation beyond plain values and classes, or a memo number that
            would have the reader reserve more memory than the file is long.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    for code, argument, _ in pickletools.genops(file):
        if code.name not in _PLAIN_CODES and code.name not in _CLASS_CODES:
            raise pickle.UnpicklingError(f"it uses the operation {code.name}")
        if code.name in _MEMO_CODES and int(argument or 0) > size:
            raise pickle.UnpicklingError(f"its memo number {argument} is beyond its size")
    file.seek(0)


def read_fvqa(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Title and picture URL ("" where it held a picture) of every hit, by data_id.

    Raises:
        CacheError: not such a file.
    """
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise CacheError(f"{path}: larger than {MAX_PICKLE_BYTES} bytes; that is another file")
    with path.open("rb") as file:
        content = read_plain_pickle(file, str(path))
    entries: dict[str, list[tuple[str, str]]] = {}
    try:
        for data_id, entry in content.items():
            titles, pictures = entry[TITLES], entry[PICTURES]
            pictures = [*pictures, *[""] * len(titles)][: len(titles)]
            entries[str(data_id)] = [
                (str(title or ""), picture if isinstance(picture, str) else "")
                for title, picture in zip(titles, pictures, strict=True)
            ]
    except (AttributeError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path}: no image-search cache of FVQA ({type(error).__name__}: {error}); each entry "
            f"has {TITLES} and {PICTURES}"
        ) from error
    return entries


def hash_pictures(path: Path, wanted: Container[str]) -> list[tuple[str, str]]:
    """data_id and picture hash of FVQA's questions, from its Parquet file, a few rows at a time.

    The pictures are decoded as a run decodes them, upright and RGB: it asks by that hash.

    Raises:
        CacheError: not such a file, or a picture in it that cannot be decoded.
    """
    import pyarrow
    import pyarrow.parquet

    hashes: list[tuple[str, str]] = []
    try:
        rows = pyarrow.parquet.ParquetFile(path).iter_batches(64, columns=["data_id", "images"])
        for number, row in enumerate((row for batch in rows for row in batch.to_pylist()), 1):
            if row["data_id"] not in wanted or not row["images"]:
                continue
            try:
                picture = decode_picture(row["images"][0], path.parent)
            except PictureError as error:
                raise CacheError(f"{path}, row {number}, column 'images': {error}") from error
            hashes.append((row["data_id"], picture_hash(picture)))
    except (OSError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise CacheError(f"{path}: not the questions of FVQA ({error})") from error
    return hashes


def import_fvqa(
    cache: ResultCache,
    entries: Mapping[str, list[tuple[str, str]]],
    pictures: Sequence[tuple[str, str]],
    identity: dict[str, Any],
    k: int,
    fetch: Callable[[str], Image] | None = None,
    replace: bool = False,
) -> dict[str, int]:
    """Stores the published image searches as answers of an image provider.

    Args:
        cache: where to.
        entries: of `read_fvqa`.
        pictures: of `hash_pictures`.
        identity: of the image provider that a run will name.
        k: hits a search; a run must ask for as many.
        fetch: URL -> small picture, for hits with pictures; None = titles only. What it raises
            leaves a hit without picture.
        replace: records that are there already are replaced instead of kept.

    Returns:
        Numbers of `records`, `kept` and of entries `without_question`.
    """
    provider = canonical(identity)
    counts = {"records": 0, "kept": 0, "without_question": 0}
    for data_id, picture in pictures:
        question = Question("image_search", provider, picture, k)
        rows = [
            _row(data_id, rank, title, url, cache, fetch)
            for rank, (title, url) in enumerate(entries[data_id][:k], 1)
        ]
        record = Record(question, canonical({"hits": rows}), time.time())
        counts["records" if cache.put(record, replace) else "kept"] += 1
    counts["without_question"] = len(set(entries) - {data_id for data_id, _ in pictures})
    return counts


def _row(
    data_id: str,
    rank: int,
    title: str,
    url: str,
    cache: ResultCache,
    fetch: Callable[[str], Image] | None,
) -> dict[str, Any]:
    image = None
    if fetch is not None and url:
        try:
            image = cache.save_image(fetch(url))
        except RuntimeError:  # published thumbnails vanish; the title still says what it showed
            image = None
    hit_id = f"{data_id}:{rank}"
    return {"id": hit_id, "title": title, "text": "", "url": "", "score": 1 / rank, "image": image}
