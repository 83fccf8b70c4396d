"""Rows one at a time: from a .jsonl, .json, .csv or .parquet file, a folder of them, or the hub."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environments.benchmarks.rows import BenchmarkError

if TYPE_CHECKING:
    from environments.benchmarks.registry import Benchmark

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_CELL_CHARS = 64 * 2**20
"""Of a .csv: a picture of 48 MiB as base64. What is longer is a quote that was never closed."""


def read_rows(
    benchmark: Benchmark, source: str | None = None, split: str | None = None
) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    """(file, row number from 1, split of a row that names none, row as published), in order.

    Args:
        benchmark: says where it is published.
        source: a .jsonl, .json, .csv or .parquet file, a folder of such files (of which only the
            published one is read where it is there), or a hub id.
        split: which of its splits is loaded of a hub id of one's own, where it has this one.

    Raises:
        BenchmarkError: nothing there, or not readable.
    """
    source = source or benchmark.source
    if source is None:
        raise BenchmarkError(
            f"benchmark {benchmark.name} is not on the hub; set `source` to your copy "
            f"({benchmark.where})"
        )
    missing = BenchmarkError(
        f"benchmark {benchmark.name}: no file or folder '{source}'; check the path, or name a hub "
        "id as owner/name"
    )
    try:
        path = Path(source).expanduser()
        is_there, is_beside = path.exists(), path.parent.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long for any file; the home of nobody
        raise missing from error
    if is_there:
        for file, number, values in _read_local(benchmark, path):
            yield file, number, benchmark.split, values
    elif path.suffix in LOCAL_SUFFIXES or source.count("/") != 1 or is_beside:
        # a typing error in a local path must not become a download
        raise missing
    else:
        yield from _read_hub(benchmark, source, split)


def _read_local(benchmark: Benchmark, path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    files = [path]
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.suffix in LOCAL_SUFFIXES)
        files = [file for file in files if not file.stem.endswith(benchmark.joined or "/")]
        # a copy of the hub's folder has the other splits' files, too
        files = [file for file in files if file.name == benchmark.file] or files
    if not files or files[0].suffix not in LOCAL_SUFFIXES:
        endings = ", ".join(LOCAL_SUFFIXES)
        raise BenchmarkError(f"{path}: no file that ends in {endings}; name one as `source`")
    for file in files:
        further = _further_columns(benchmark, file)
        for number, values in _rows_of(file):
            yield str(file), number, {**further.get(values.get(benchmark.key), {}), **values}


def _further_columns(benchmark: Benchmark, file: Path) -> dict[Any, dict[str, Any]]:
    """key -> columns of the files beside this one that belong to its rows."""
    columns: dict[Any, dict[str, Any]] = {}
    for ending in benchmark.joined:
        beside = file.with_name(f"{file.stem}{ending}{file.suffix}")
        for _, values in _rows_of(beside) if beside.is_file() else ():
            columns.setdefault(values.get(benchmark.key), {}).update(values)
    return columns


def _rows_of(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv,
    }  # fmt: skip
    try:
        for number, values in readers[file.suffix](file):
            if not isinstance(values, dict):
                raise BenchmarkError(
                    f"{file}, row {number}: expected columns, got {type(values).__name__}; "
                    "write one JSON object a row"
                )
            yield number, values
    except OSError as error:
        raise BenchmarkError(
            f"{file}: cannot be read ({error.strerror or error}); name a file that may be read"
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    # not through `datasets`: InfoSeek mixes texts and objects in a column, which Arrow refuses
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8"), object_pairs_hook=_columns)
                # UnicodeDecodeError is a ValueError; RecursionError: nested thousands deep
                except (ValueError, RecursionError) as error:
                    raise BenchmarkError(
                        f"{path}, row {number}: not JSON ({error}); mend the line or copy the "
                        "file again"
                    ) from error


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_columns)
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: not JSON ({error}); mend it or copy it again") from error
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path}: expected a list of rows; name the file with the questions")
    yield from enumerate(rows, 1)


def _columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice, `json` would keep the last in silence.

    Raises:
        ValueError: names the key.
    """
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise ValueError(f"the key {_first_twice([key for key, _ in pairs])!r} stands twice")
    return columns


def _first_twice(names: Sequence[str]) -> str | None:
    """The first name that has stood there before."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows as a spreadsheet numbers them: the first one is the names of the columns."""
    csv.field_size_limit(max(MAX_CELL_CHARS, csv.field_size_limit()))  # 131,072 of the library
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(path, reader.fieldnames or [])
            for number, values in enumerate(reader, 2):
                if None in values or None in values.values():
                    raise BenchmarkError(
                        f"{path}, row {number}: another number of cells than columns; put cells "
                        "that hold a comma in quotes"
                    )
                yield number, values
    except (csv.Error, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: not a .csv in UTF-8 ({error}); save it again") from error


def _check_header(path: Path, names: Sequence[str]) -> None:
    twice = _first_twice([name for name in names if name])  # a spreadsheet's empty columns may
    if twice is not None:
        raise BenchmarkError(f"{path}: two columns are called '{twice[:60]}'; rename one of them")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t"):
        raise BenchmarkError(f"{path}: one column, '{names[0][:60]}'; separate columns by commas")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import datasets

    # what it says of a bad file it raises, too, and our error repeats it
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    try:
        rows = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True
        ).decode(False)
        yield from enumerate(rows, 1)
    except Exception as error:  # whatever Arrow says: the file is the user's
        raise BenchmarkError(f"{path}: not readable as parquet ({error}); copy it again") from error


def _read_hub(
    benchmark: Benchmark, source: str, split: str | None
) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    import datasets

    is_published = source == benchmark.source
    arguments: dict[str, Any] = {"streaming": True}
    if is_published and benchmark.file:
        arguments["data_files"] = benchmark.file
    if is_published and benchmark.subset:
        arguments["name"] = benchmark.subset
    place = f"{source}:{benchmark.file}" if "data_files" in arguments else source
    try:
        # what is asked for may be a split of the hub's, or a value in a column of splits
        if is_published or not split or split not in datasets.get_dataset_split_names(source):
            split = benchmark.split
        arguments["split"] = "train" if "data_files" in arguments else split
        rows = datasets.load_dataset(source, **arguments).decode(False)
        for number, values in enumerate(rows, 1):
            yield place, number, split, values
    except Exception as error:  # network, access, a moved file: all are the user's to mend
        raise BenchmarkError(
            f"benchmark {benchmark.name}: {source} cannot be read from the hub "
            f"({type(error).__name__}: {error}); log in, or set `source` to a local copy"
        ) from error
