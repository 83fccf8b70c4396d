"""Whether two output folders hold the same result: tensors bit by bit, numbers apart from clocks.

What may differ is named here and nowhere else: seconds, who made it and where (`CLOCKS`), files
that only say how a run went (`NO_RESULT`), and the folders' own paths within texts.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLOCKS = re.compile(
    r"(^|[/._])(seconds|step_time|cost|commit|command|hardware|machine|versions|python|since)$"
    r"|_s(_to_target)?(\[\d+\])*$|_per_s(econd)?$|(^|\.)(time|speed)([/._]|$)|^files\.|^plan\.checkpoint"
)
"""Keys whose values are clocks (a name that ends in `_s` is seconds here) or provenance; nested
keys are joined by dots. `files` of a checkpoint are sizes, of files that hold clocks, too; an
evaluation's `plan.checkpoint` has times beside them."""
NO_RESULT = re.compile(
    r"(^|/)(heartbeat/|logs/|\.)|(^|/)(environment|cost|start_cost)\.json$"
    r"|\.(png|svg|html|log)$|(^|/)checkpoints/.*\.(pt|pth|bin|py)$|/latest$|(^|/)stages/"
)
"""Files that say how a run went; hidden ones, which count for nothing; pictures, which are drawn
from the json beside them; and the optimizer's pickles, which decide on later steps' weights."""
MAX_SHOWN = 5


def compare_folders(whole: Path, other: Path) -> list[str]:
    """Differences between what an undisturbed run left and another one.

    Args:
        whole: of the undisturbed run.
        other: of the one that was disturbed; its leaf has the same name.

    Returns:
        One line a difference, the first few; none where the results are equal.
    """
    files, others = _files(whole), _files(other)
    found = [f"{name} is missing" for name in sorted(files - others)]
    found += [f"{name} is left over" for name in sorted(others - files)]
    for name in sorted(files & others):
        if len(found) >= MAX_SHOWN:
            break
        found += [f"{name}: {line}" for line in _compare_files(whole, other, name)]
    return found[:MAX_SHOWN]


def _compare_files(whole: Path, other: Path, name: str) -> list[str]:
    """Differences between two files of one name, by what their suffix says they hold."""
    if name.endswith(".safetensors"):
        return _compare_tensors(whole / name, other / name)
    one, two = (_neutral(folder / name, folder.parent) for folder in (whole, other))
    if one == two:
        return []
    if name.endswith(".json"):
        return list(differences(json.loads(one), json.loads(two)))[:MAX_SHOWN]
    if name.endswith(".jsonl"):
        lines = [[json.loads(line) for line in text.split(b"\n") if line] for text in (one, two)]
        return list(differences(lines[0], lines[1]))[:MAX_SHOWN]
    if name.endswith(".csv"):
        return _compare_csv(one, two)
    return ["differs"]


def differences(one: Any, two: Any, key: str = "") -> Iterator[str]:
    """Where two plain values differ, clocks left out.

    Args:
        one, two: of json.
        key: where they stand, for the message and for `CLOCKS`.
    """
    if CLOCKS.search(key):
        return
    if isinstance(one, dict) and isinstance(two, dict):
        for name in sorted(one.keys() | two.keys()):
            inner = f"{key}.{name}" if key else name
            if CLOCKS.search(inner):
                continue
            if (name in one) != (name in two):
                yield f"{inner} stands in one alone"
            else:
                yield from differences(one[name], two[name], inner)
    elif isinstance(one, list) and isinstance(two, list):
        if len(one) != len(two):
            yield f"{key or 'lines'}: {len(one)} and {len(two)} entries"
        for index, pair in enumerate(zip(one, two, strict=False)):
            yield from differences(*pair, f"{key}[{index}]")
    elif one != two and not _both_nan(one, two):
        yield f"{key}: {str(one)[:80]!r} and {str(two)[:80]!r}"


def _both_nan(one: Any, two: Any) -> bool:
    return all(isinstance(value, float) and math.isnan(value) for value in (one, two))


def _compare_tensors(one: Path, two: Path) -> list[str]:
    """Names, dtypes, shapes and every byte; the header's metadata too, but for its paths."""
    from merge.shards import SafetensorsFile

    files = [SafetensorsFile(path) for path in (one, two)]
    names = [file.tensors.keys() for file in files]
    if names[0] != names[1]:
        return [f"tensors {sorted(names[0] ^ names[1])[:MAX_SHOWN]} stand in one alone"]
    unequal = [
        name
        for name, info in files[0].tensors.items()
        if (info.dtype, info.shape) != (files[1].tensors[name].dtype, files[1].tensors[name].shape)
        or files[0].read_bytes(name) != files[1].read_bytes(name)
    ]
    found = [f"tensor {name} differs" for name in unequal]
    return found + list(differences(files[0].metadata, files[1].metadata, "header"))


def _compare_csv(one: bytes, two: bytes) -> list[str]:
    """Rows of two csv files, columns of clocks left out."""
    tables = [list(csv.DictReader(io.StringIO(text.decode()))) for text in (one, two)]
    return list(differences(tables[0], tables[1]))[:MAX_SHOWN]


def _files(folder: Path) -> set[str]:
    """Files that hold results; a page beside a json of its name is drawn from it."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = {name for name in names if not NO_RESULT.search(name)}
    return {
        n for n in names if not (n.endswith(".md") and f"{n.removesuffix('.md')}.json" in names)
    }


def _neutral(path: Path, root: Path) -> bytes:
    """A file's bytes without the path of the folder that its run lies in."""
    content = path.read_bytes()
    for place in {str(root.resolve()), str(root.absolute()), str(root)}:
        content = content.replace(place.encode(), b"@")
    return content
