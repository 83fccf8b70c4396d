"""The benchmarks by name: where each is published, its schema, its official metric.

    for question in load_benchmark("mmsearch", source="copies/mmsearch.parquet"):
        ...

Rows come one at a time (streaming from the hub, line by line from a .jsonl file), and a picture is
decoded only when its question is asked.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from environments.benchmarks.rows import PICTURE_COLUMN, BenchmarkError, Pictures, Row
from environments.benchmarks.schemas import SCHEMAS, Schema

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_SLICE = re.compile(r"([^\[\]]*)\[(\d*%?):(\d*%?)\]")
"""A split's name, which may be empty, and the part of it: `train[:80%]`, `[8:]`."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as it is published."""

    name: str
    schema: Schema | None
    """None: the project's own, which has no files"""
    split: str
    """split of the hub's data set, and of the questions where a row names none"""
    metrics: tuple[str, ...]
    """of `rewards.metrics.METRICS`, the official one first"""
    source: str | None = None
    """hub id; None: not on the hub"""
    file: str | None = None
    """the one file of the hub's data set"""
    subset: str | None = None
    where: str = ""
    """how to get it, where the hub alone is not enough"""
    joined: tuple[str, ...] = ()
    """endings of files beside FILE.jsonl that have further columns of its rows"""
    key: str = "data_id"
    """column by which they are joined"""


BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark("atlas", None, "test", ("em",)),
        Benchmark(
            "fvqa_train", SCHEMAS["fvqa"], "train", ("em", "mmsearch_r1"), "lmms-lab/FVQA",
            "fvqa_train.parquet",
        ),
        Benchmark(
            "fvqa_test", SCHEMAS["fvqa"], "test", ("em", "mmsearch_r1"), "lmms-lab/FVQA",
            "fvqa_test.parquet",
        ),
        Benchmark(
            "infoseek", SCHEMAS["infoseek"], "val", ("infoseek",),
            where="infoseek_val.jsonl from github.com/edchengg/infoseek_eval, pictures from OVEN",
            joined=("_qtype", "_withkb"),
        ),
        Benchmark(
            "mmsearch", SCHEMAS["mmsearch"], "end2end", ("mmsearch",), "CaraJ/MMSearch",
            subset="end2end",
        ),
        Benchmark(
            "livevqa", SCHEMAS["livevqa"], "test", ("livevqa",), "ONE-Lab/LiveVQA-new",
            "Dataset_viewer_flat.parquet",
            where="its pictures are zip files of the same data set: unpack them into one folder",
        ),
        Benchmark(
            "nq_hotpotqa_train", SCHEMAS["search_r1"], "train", ("em", "search_r1_em"),
            "PeterJinGo/nq_hotpotqa_train", "train.parquet",
        ),
        Benchmark(
            "nq_hotpotqa_test", SCHEMAS["search_r1"], "test", ("em", "search_r1_em"),
            "PeterJinGo/nq_hotpotqa_train", "test.parquet",
        ),
        Benchmark(
            "table", SCHEMAS["table"], "all", ("em",),
            where="a .jsonl, .csv or .parquet file with the columns question, answers, image",
        ),
    )
}  # fmt: skip


class BenchmarkQuestion(dict[str, Any]):
    """A question that decodes its picture whenever `image` is read, and so holds the stored bytes.

    A copy made with `{**question}` holds the picture as published: set `image` in it anew.

    Args:
        values: the question, `image` as published.
        row: where it comes from.
    """

    def __init__(self, values: dict[str, Any], row: Row) -> None:
        super().__init__(values)
        self._column = self.pop(PICTURE_COLUMN, "")
        self._row = row

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if key != "image" or value is None:
            return value
        return self._row.picture(self._column, value)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (it is `get`)


@dataclass(frozen=True)
class Selection:
    """Which questions of a benchmark."""

    source: str | None = None
    """file, folder or hub id; None: where it is published"""
    split: str | None = None
    """only questions of this split, or a part of it: `train[:80%]`, `[80%:]`, `[:100]`"""
    kinds: list[str] = field(default_factory=list)
    """only questions of these kinds; empty: all"""
    images: str | None = None
    """folder of the pictures that rows name"""
    pictured: bool = False
    """only questions with a picture"""
    fetch: bool = False
    """take pictures given as base64 text or as an address, too"""
    limit: int | None = None
    """the first so many"""


def selection_of(section: Any) -> Selection:
    """The selection that a section of the settings describes: it has the same fields."""
    return Selection(**{item.name: getattr(section, item.name) for item in fields(Selection)})


def iterate_benchmark(name: str, selection: Selection | None = None) -> Iterator[dict[str, Any]]:
    """Questions in the published order; a picture is decoded when it is read.

    Raises:
        BenchmarkError: unknown benchmark, unreadable source, bad row, an id that comes twice.
    """
    benchmark, chosen = find_benchmark(name), selection or Selection()
    split, first, last = read_split(chosen.split)
    chosen = replace(chosen, split=split)
    found = _published(benchmark, chosen) if benchmark.schema else _atlas(benchmark, chosen)
    fitting = (question for question in found if _is_chosen(question, chosen))
    if first or last:
        fitting = iter(_part(list(fitting), first, last))
    return itertools.islice(fitting, chosen.limit)


def read_split(text: str | None) -> tuple[str | None, str, str]:
    """The name of a split, None for all of them, and the bounds of the part that is asked for.

    Raises:
        BenchmarkError: brackets that hold no part.
    """
    match = _SLICE.fullmatch(text or "")
    if match is not None:
        return match[1] or None, match[2], match[3]
    if text and ("[" in text or "]" in text):
        raise BenchmarkError(
            f"split {text!r}: not a part of a split; write train[:80%], [80%:] or [:100]"
        )
    return text, "", ""


def _part(questions: list[dict[str, Any]], first: str, last: str) -> list[dict[str, Any]]:
    """The questions from one bound to the other, in their order; percents are rounded."""

    def place(bound: str, otherwise: int) -> int:
        if not bound.endswith("%"):
            return int(bound) if bound else otherwise
        return round(len(questions) * int(bound[:-1] or 0) / 100)

    return questions[place(first, 0) : place(last, len(questions))]


def load_benchmark(
    name: str, selection: Selection | None = None, **chosen: Any
) -> list[dict[str, Any]]:
    """All questions.

    Args:
        name: of BENCHMARKS.
        selection: which; or its fields as keyword arguments.

    Raises:
        BenchmarkError: as `iterate_benchmark`; or no question is left.
    """
    selection = selection or Selection(**chosen)
    questions = list(iterate_benchmark(name, selection))
    if not questions:
        raise BenchmarkError(f"benchmark {name}: no question fits the selection; widen it")
    return questions


def count_questions(questions: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Reads and decodes everything: how many questions of each kind, under "kind/..." and so on.

    Raises:
        BenchmarkError: names the first bad row.
    """
    counts: Counter[str] = Counter()
    for question in questions:
        counts["questions"] += 1
        counts["pictures"] += question.get("image") is not None
        counts[f"split/{question['split']}"] += 1
        counts[f"kind/{question['kind']}"] += 1
    return dict(counts)


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        BenchmarkError: there is none.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(f"no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read_rows(
    benchmark: Benchmark, source: str | None = None
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(file, row number from 1, row as published), in order.

    Args:
        benchmark: says where it is published.
        source: a .jsonl, .json, .csv or .parquet file, a folder of such files, or a hub id.

    Raises:
        BenchmarkError: nothing there, or not readable.
    """
    source = source or benchmark.source
    if source is None:
        raise BenchmarkError(
            f"benchmark {benchmark.name} is not on the hub; set `source` to your copy "
            f"({benchmark.where})"
        )
    path = Path(source).expanduser()
    if path.exists():
        yield from _read_local(benchmark, path)
    elif path.suffix in LOCAL_SUFFIXES or source.count("/") != 1 or path.parent.is_dir():
        # a typing error in a local path must not become a download
        raise BenchmarkError(f"benchmark {benchmark.name}: no file or folder '{source}'")
    else:
        yield from _read_hub(benchmark, source)


def _read_local(benchmark: Benchmark, path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    files = [path]
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.suffix in LOCAL_SUFFIXES)
        files = [file for file in files if not file.stem.endswith(benchmark.joined or "/")]
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
    for number, values in readers[file.suffix](file):
        if not isinstance(values, dict):
            raise BenchmarkError(
                f"{file}, row {number}: expected columns, got {type(values).__name__}; "
                "write one JSON object a row"
            )
        yield number, values


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    # not through `datasets`: InfoSeek mixes texts and objects in a column, which Arrow refuses
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise BenchmarkError(
                        f"{path}, row {number}: not JSON ({error}); mend the line or copy the "
                        "file again"
                    ) from error


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path}: expected a list of rows; name the file with the questions")
    yield from enumerate(rows, 1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows as a spreadsheet numbers them: the first one is the names of the columns."""
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
    if len(names) == 1 and any(mark in names[0] for mark in ";\t"):
        raise BenchmarkError(f"{path}: one column, '{names[0][:60]}'; separate columns by commas")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True
        ).decode(False)
        yield from enumerate(rows, 1)
    except Exception as error:  # whatever Arrow says: the file is the user's
        raise BenchmarkError(f"{path}: not readable as parquet ({error}); copy it again") from error


def _read_hub(benchmark: Benchmark, source: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    import datasets

    is_published = source == benchmark.source
    arguments: dict[str, Any] = {"split": benchmark.split, "streaming": True}
    if is_published and benchmark.file:
        arguments |= {"data_files": benchmark.file, "split": "train"}
    if is_published and benchmark.subset:
        arguments["name"] = benchmark.subset
    place = f"{source}:{benchmark.file}" if "data_files" in arguments else source
    try:
        rows = datasets.load_dataset(source, **arguments).decode(False)
        for number, values in enumerate(rows, 1):
            yield place, number, values
    except Exception as error:  # network, access, a moved file: all are the user's to mend
        raise BenchmarkError(
            f"benchmark {benchmark.name}: {source} cannot be read from the hub "
            f"({type(error).__name__}: {error}); log in, or set `source` to a local copy"
        ) from error


def _published(benchmark: Benchmark, chosen: Selection) -> Iterator[dict[str, Any]]:
    """Every question of the published rows."""
    assert benchmark.schema is not None
    pictures = Pictures(Path(chosen.images) if chosen.images else None, chosen.fetch)
    seen: dict[str, str] = {}
    for file, number, published in read_rows(benchmark, chosen.source):
        row = Row(published, file, number, pictures)
        place = f"{file}, row {number}"
        for question in benchmark.schema(row, benchmark.split):
            first = seen.setdefault(question["id"], place)
            if first != place:
                row.fail("id", f"{question['id']!r} stands in {first} already", "drop one of them")
            names = {"benchmark": benchmark.name, "metrics": list(benchmark.metrics)}
            yield BenchmarkQuestion({**question, **names}, row)


def _atlas(benchmark: Benchmark, chosen: Selection) -> Iterator[dict[str, Any]]:
    """The atlas' questions of one split, each once, with new photos of the default strength."""
    from environments.atlas.questions import KINDS, load_questions

    split, kinds = chosen.split or benchmark.split, chosen.kinds or list(KINDS)
    for question in load_questions(split, kinds, chosen.limit):
        yield {
            **question,
            "benchmark": benchmark.name,
            "metrics": list(benchmark.metrics),
        }


def _is_chosen(question: dict[str, Any], chosen: Selection) -> bool:
    return (
        (chosen.split is None or question["split"] == chosen.split)
        and (not chosen.kinds or question["kind"] in chosen.kinds)
        and not (chosen.pictured and question["image"] is None)
    )
