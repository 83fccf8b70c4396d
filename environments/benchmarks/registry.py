"""The benchmarks by name: where each is published, its schema, its official metric.

    for question in load_benchmark("mmsearch", source="copies/mmsearch.parquet"):
        ...

Rows come one at a time (streaming from the hub, line by line from a .jsonl file), and a picture is
decoded only when its question is asked.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from environments.benchmarks.reading import read_rows
from environments.benchmarks.rows import MAX_SHOWN, PICTURE_COLUMN, BenchmarkError, Pictures, Row
from environments.benchmarks.schemas import SCHEMAS, Schema

_SLICE = re.compile(r"([^\[\]]*)\[(\d{0,18}%?):(\d{0,18}%?)\]")
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
        """As a dict's; the picture is opened."""
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
        BenchmarkError: unknown benchmark, unreadable source, bad row, an id that comes twice; or no
            question fits.
    """
    benchmark, chosen = find_benchmark(name), selection or Selection()
    split, first, last = read_split(chosen.split)
    chosen = replace(chosen, split=split)
    if benchmark.schema:
        found = _published(benchmark, chosen)
    else:  # its photos are made here, so no more than needed; but what is left out must not count
        is_cut = bool(first or last or chosen.pictured)
        found = _atlas(benchmark, chosen, None if is_cut else chosen.limit)
    fitting: Iterator[dict[str, Any]] = (q for q in found if _is_chosen(q, chosen))
    if first or last:
        fitting = iter(_part(list(fitting), first, last))
    return _some(itertools.islice(fitting, chosen.limit), name, chosen)


def _some(
    questions: Iterator[dict[str, Any]], name: str, chosen: Selection
) -> Iterator[dict[str, Any]]:
    """The questions; none at all is a mistake in the selection, or a file without rows."""
    first = next(questions, None)
    if first is None:
        place = f" from {chosen.source}" if chosen.source else ""
        raise BenchmarkError(
            f"benchmark {name}: no question fits the selection{place}; widen it, or add rows"
        )
    yield first
    yield from questions


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
            f"split {text[:MAX_SHOWN]!r}: not a part of a split; "
            "write train[:80%], [80%:] or [:100]"
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
        selection: which questions.
        **chosen: fields of `Selection`, where none is given.

    Raises:
        BenchmarkError: as `iterate_benchmark`.
    """
    return list(iterate_benchmark(name, selection or Selection(**chosen)))


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


def _published(benchmark: Benchmark, chosen: Selection) -> Iterator[dict[str, Any]]:
    """Every question of the published rows."""
    assert benchmark.schema is not None
    pictures = Pictures(Path(chosen.images) if chosen.images else None, chosen.fetch)
    seen: dict[str, str] = {}
    n_before, last = 0, ("", 0)
    for file, number, split, published in read_rows(benchmark, chosen.source, chosen.split):
        if file != last[0]:
            n_before += last[1]
        last = file, number
        row = Row(published, file, number, pictures, n_before)
        place = f"{file}, row {number}"
        for question in benchmark.schema(row, split):
            first = seen.setdefault(question["id"], place)
            if first != place:
                row.fail("id", f"{question['id']!r} stands in {first} already", "drop one of them")
            names = {"benchmark": benchmark.name, "metrics": list(benchmark.metrics)}
            yield BenchmarkQuestion({**question, **names}, row)


def _atlas(benchmark: Benchmark, chosen: Selection, limit: int | None) -> Iterator[dict[str, Any]]:
    """The atlas' questions of one split, each once, with new photos of the default strength."""
    from environments.atlas.questions import KINDS, load_questions

    split, kinds = chosen.split or benchmark.split, chosen.kinds or list(KINDS)
    for question in load_questions(split, kinds, limit):
        yield {
            **question,
            "benchmark": benchmark.name,
            "metrics": list(benchmark.metrics),
        }


def _is_chosen(question: dict[str, Any], chosen: Selection) -> bool:
    return (
        (chosen.split is None or question["split"] == chosen.split)
        and (not chosen.kinds or question["kind"] in chosen.kinds)
        # as stored: a picture is not opened to see that it is there
        and not (chosen.pictured and dict.get(question, "image") is None)
    )
