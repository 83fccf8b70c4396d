"""The trajectory viewer: recorded episodes as one page that needs nothing but a browser.

    obm view runs/obm-s0 runs/vlm-s0 --output runs/view.html

How it works: `pack` turns lines of trajectories.jsonl into an index (a few numbers for each
episode: what the list shows, filters and sorts by) and chunks (the episodes themselves, neighbours
by question, each text once a chunk). Both are JSON, deflated, and lie as base64 in data blocks of
the page; `compare/viewer_page` inflates a chunk when one of its episodes is looked at.

Texts of policies and pages are data: they stand in JSON in base64, the page shows them as text
nodes, and its content security policy allows its own script and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.figure import arm_colours
from compare.trajectory_files import TrajectoryFile, calls
from compare.viewer_pictures import find_pictures
from train.disk import writing
from train.trajectories import FATAL_FAULTS

CHUNK_BYTES = 128 * 1024
"""JSON of a chunk before it is deflated: one is inflated and parsed in about 2 ms"""
ANSWER_CHARS = 120
"""An answer is cut there in the list; the episode has all of it."""
PAGE = Path(__file__).parent / "viewer_page"
SCRIPTS = ("data.js", "dom.js", "filters.js", "list.js", "episode.js", "views.js", "app.js")

FAULTS = {"model": 1, "infrastructure": 2}
FATAL, MASKED, UNREAD = 4, 8, 16
"""Bits of an episode's marks, with FAULTS."""


@dataclass
class Packed:
    """What goes into the page."""

    index: dict[str, Any]
    chunks: list[bytes] = field(default_factory=list)
    """JSON, ASCII"""
    pictures: list[bytes] = field(default_factory=list)
    """image files, in the order of index["pictures"]; empty where one is missing"""

    @property
    def n_episodes(self) -> int:
        """Episodes in the page."""
        return len(self.index["columns"]["step"])

    @property
    def n_missing(self) -> int:
        """Pictures that episodes have and that no folder has."""
        return sum(not picture for picture in self.pictures)


# ---------------------------------------------------------------- episodes -> index and chunks


def pack(files: Sequence[TrajectoryFile], *, with_pictures: bool = True) -> Packed:
    """Index, chunks and pictures of the lines of some files.

    Args:
        files: checked lines; a folder `pictures` beside a file has its pictures.
        with_pictures: take pictures into the page.
    """
    runs, order = _runs(files), _question_order(files)
    episodes = sorted(
        ((run, row) for run, row in _by_run(files, runs)),
        key=lambda pair: (
            order[pair[1]["question_id"]], pair[1]["phase"] != "eval", pair[0], pair[1]["step"],
        ),
    )  # fmt: skip
    index = _index(episodes, runs, list(order))
    pictures: dict[str, int] = {}
    packed = Packed(index)
    for n, chunk in _chunks(episodes, index["parts"], pictures if with_pictures else None):
        index["chunks"].append(n)
        packed.chunks.append(chunk)
    packed.pictures = find_pictures(list(pictures), files)
    index["columns"]["picture"] = [
        pictures.get(str(row["images"][0])) if row["images"] else None for _, row in episodes
    ]
    index["pictures"] = [bool(picture) for picture in packed.pictures]
    return packed


def _runs(files: Sequence[TrajectoryFile]) -> dict[tuple[int, str, int], str]:
    """(number of the file, arm, seed) -> name of the run; equal names get their folder's."""
    runs: dict[tuple[int, str, int], str] = {}
    for number, file in enumerate(files):
        for row in file.rows:
            arm, seed = str(row.get("arm") or "unnamed"), int(row.get("seed") or 0)
            runs.setdefault((number, arm, seed), f"{arm}-s{seed}")
    names = list(runs.values())
    for key, name in runs.items():
        if names.count(name) > 1:
            runs[key] = f"{name} ({files[key[0]].path.parent.name})"
    # two folders may have the same name, too
    seen: dict[str, int] = {}
    for key, name in runs.items():
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            runs[key] = f"{name} #{seen[name]}"
    return runs


def _by_run(
    files: Sequence[TrajectoryFile], runs: dict[tuple[int, str, int], str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    numbers = {key: number for number, key in enumerate(runs)}
    for number, file in enumerate(files):
        for row in file.rows:
            key = number, str(row.get("arm") or "unnamed"), int(row.get("seed") or 0)
            yield numbers[key], row


def _question_order(files: Sequence[TrajectoryFile]) -> dict[str, int]:
    """Questions in the order in which evaluations ask them, then those of training alone."""
    order: dict[str, int] = {}
    for is_training in (False, True):
        for row in (row for file in files for row in file.rows):
            if (row["phase"] != "eval") == is_training:
                order.setdefault(row["question_id"], len(order))
    return order


def _index(
    episodes: Sequence[tuple[int, dict[str, Any]]],
    runs: dict[tuple[int, str, int], str],
    questions: Sequence[str],
) -> dict[str, Any]:
    """The page's index; columns have a value for each episode."""
    rows = [row for _, row in episodes]
    arms = list(dict.fromkeys(arm for _, arm, _ in runs))
    colours = arm_colours(arms)
    kinds, stops, answers = _Table(), _Table(), _Table()
    parts = list(dict.fromkeys(part for row in rows for part in row["rewards"]))
    number_of = {question: number for number, question in enumerate(questions)}
    texts = {row["question_id"]: row["prompt"].rstrip().rpartition("\n")[2] for row in rows}
    columns = {
        "run": [run for run, _ in episodes],
        "step": [row["step"] for row in rows],
        "is_training": [int(row["phase"] != "eval") for row in rows],
        "question": [number_of[row["question_id"]] for row in rows],
        "kind": [kinds.number(str(row.get("kind") or "")) for row in rows],
        "seen": [int(bool(row.get("seen"))) for row in rows],
        "reward": [_number(row["rewards"].get("total")) for row in rows],
        "right": [is_right(row) for row in rows],
        "stop": [stops.number(row["stop_reason"]) for row in rows],
        "answer": [answers.optional(_brief(row.get("answer"))) for row in rows],
        "calls": [n_calls(row) for row in rows],
        "tokens": [sum(int(turn.get("n_tokens") or 0) for turn in row["turns"]) for row in rows],
        "marks": [marks(row) for row in rows],
        "followed": [int(bool(row.get("followed"))) for row in rows],
    }
    return {
        "runs": [
            {"name": name, "arm": arms.index(arm), "seed": seed}
            for (_, arm, seed), name in runs.items()
        ],
        "arms": [{"name": arm, "colour": colours[arm]} for arm in arms],
        "questions": [{"id": question, "text": texts[question]} for question in questions],
        "kinds": kinds.values,
        "stops": stops.values,
        "answers": answers.values,
        "parts": parts,
        "columns": columns,
        "chunks": [],
        "pictures": [],
    }


def is_right(row: dict[str, Any]) -> int | None:
    """1 if the answer is right, 0 if not; None where nobody checked it.

    A line of `obm eval` has measured it; one of a run has the reward's part for accuracy.
    """
    measured = (row.get("measured") or {}).get("accuracy")
    if measured is None:
        measured = row["rewards"].get("accuracy")
        measured = None if measured is None else measured >= 1.0
    return None if measured is None else int(bool(measured))


def n_calls(row: dict[str, Any]) -> int:
    """Tool calls of an episode, refused and failed ones included."""
    types = [action.get("type") for turn in row["turns"] for action in calls(turn)]
    return sum(kind in ("search", "image_search", "visit") for kind in types)


def marks(row: dict[str, Any]) -> int:
    """Bits for what went wrong: FAULTS, FATAL, MASKED, UNREAD."""
    found, n_in_row = 0, 0
    for turn in row["turns"]:
        found |= FAULTS.get(turn.get("fault") or "", 0)
        n_in_row = n_in_row + 1 if turn.get("fault") == "infrastructure" else 0
        if n_in_row == FATAL_FAULTS:
            found |= FATAL
        if turn.get("observation") is not None and not turn.get("n_observation_tokens", 1):
            found |= UNREAD
    return found | (MASKED if row.get("masked_from") is not None else 0)


class _Table:
    """Numbers for values that repeat."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def values(self) -> list[str]:
        return list(self._numbers)

    def number(self, value: str) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    def optional(self, value: str | None) -> int | None:
        return None if value is None else self.number(value)


def _brief(answer: Any) -> str | None:
    if answer is None:
        return None
    text = str(answer)
    return text if len(text) <= ANSWER_CHARS else text[: ANSWER_CHARS - 1] + "…"


def _number(value: Any) -> float | int | None:
    """JSON has no NaN: a number that is none is null."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return round(value, 4) if is_number else None


# ---------------------------------------------------------------- chunks


def _chunks(
    episodes: Iterable[tuple[int, dict[str, Any]]],
    parts: Sequence[str],
    pictures: dict[str, int] | None,
) -> Iterator[tuple[int, bytes]]:
    """(number of episodes, JSON) of each chunk; fills `pictures` with hash -> number."""
    texts, bodies, size = _Table(), list[str](), 0
    for _, row in episodes:
        n_texts = len(texts.values)
        bodies.append(_json(_body(row, parts, texts, pictures)))
        size += len(bodies[-1]) + sum(len(text) for text in texts.values[n_texts:])
        if size >= CHUNK_BYTES:
            yield len(bodies), _chunk(texts, bodies)
            texts, bodies, size = _Table(), [], 0
    if bodies:
        yield len(bodies), _chunk(texts, bodies)


def _chunk(texts: _Table, bodies: Sequence[str]) -> bytes:
    return f'{{"texts":{_json(texts.values)},"episodes":[{",".join(bodies)}]}}'.encode("ascii")


def _body(
    row: dict[str, Any], parts: Sequence[str], texts: _Table, pictures: dict[str, int] | None
) -> dict[str, Any]:
    """An episode as the page has it: texts by number, what is empty left out."""
    gold = row.get("gold") or {}
    answers = gold.get("answers") or (row.get("question") or {}).get("answers") or []
    body = {
        "prompt": texts.number(row["prompt"]),
        "images": _pictures(row["images"], pictures),
        "turns": [_turn(turn, texts, pictures) for turn in row["turns"]],
        "answer": texts.optional(None if row.get("answer") is None else str(row["answer"])),
        "rewards": [_number(row["rewards"].get(part)) for part in parts],
        "advantages": [_number(value) for value in row.get("advantages") or []],
        "masked_from": row.get("masked_from"),
        "answers": [texts.number(str(answer)) for answer in answers],
        "gold": [texts.number(str(hit)) for hit in gold.get("hits") or []],
    }
    return {key: value for key, value in body.items() if value not in (None, [])}


def _turn(turn: dict[str, Any], texts: _Table, pictures: dict[str, int] | None) -> dict[str, Any]:
    tokens = [str(token) for token in turn.get("tokens") or []]
    observation = turn.get("observation")
    packed = {
        "text": texts.number("".join(tokens) if tokens else turn["text"]),
        "pieces": [utf16_length(token) for token in tokens],
        # thousandths of a nat; what is not finite is as unlikely as can be
        "logprobs": [
            round(1000 * p) if math.isfinite(p) else -1_000_000 for p in turn.get("logprobs") or []
        ],
        "n_tokens": turn.get("n_tokens") or None,
        "logprob": _number(turn.get("logprob")),
        "entropy": _number(turn.get("entropy")),
        "calls": calls(turn),
        "observation": texts.optional(None if observation is None else str(observation)),
        "n_observation_tokens": turn.get("n_observation_tokens"),
        "images": _pictures(turn.get("images") or [], pictures),
        "hits": [texts.number(str(hit)) for hit in turn.get("hits") or []],
        "is_error": turn.get("is_error") or None,
        "fault": turn.get("fault"),
        "seconds": _number(turn.get("seconds")) or None,
        "retries": turn.get("retries") or None,
    }
    return {key: value for key, value in packed.items() if value not in (None, [])}


def _pictures(keys: Iterable[Any], pictures: dict[str, int] | None) -> list[int]:
    """Numbers of pictures; -1 for each where the page shall have none."""
    if pictures is None:
        return [-1 for _ in keys]
    return [pictures.setdefault(str(key), len(pictures)) for key in keys]


def utf16_length(text: str) -> int:
    """Length of a text as a browser counts it."""
    if text.isascii():
        return len(text)
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _json(value: Any) -> str:
    # ASCII: a lone surrogate, which is no UTF-8, stays an escape
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


# ---------------------------------------------------------------- the page


def write_page(packed: Packed, path: Path, title: str) -> int:
    """Writes the page, whole or not at all.

    Args:
        packed: of `pack`.
        path: HTML file; replaced if it is there.
        title: of the page.

    Returns:
        Its size in bytes.

    Raises:
        DiskError: the disk takes no more.
        CompareError: the file cannot be written for another reason.
    """
    try:
        with writing(path):
            return _write_whole(path, _page(packed, title))
    except OSError as error:
        raise CompareError(
            f"--output {path}: cannot be written ({error.strerror}); name another file"
        ) from error


def _write_whole(path: Path, parts: Iterable[str]) -> int:
    """Writes a text whole or not at all; returns its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # a lone surrogate, which is no UTF-8, can stand in the title alone
    file = temporary.open("w", encoding="utf-8", errors="xmlcharrefreplace", newline="\n")
    try:
        with file:
            file.writelines(parts)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _page(packed: Packed, title: str) -> Iterator[str]:
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    parts = [(PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS]
    script = "(() => {\n'use strict';\n" + "\n".join(parts) + "\n})();\n"
    head, foot = (PAGE / "page.html").read_text(encoding="utf-8").split("<!-- data -->\n")
    policy = (
        f"default-src 'none'; script-src {_allow(script)}; style-src {_allow(style)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    # the title last: it may hold any text, the others' places too
    yield (
        head.replace("{style}", style)
        .replace("{policy}", policy)
        .replace("{title}", html.escape(title))
    )
    yield _block("index", deflate(_json(packed.index).encode("ascii")))
    for number, chunk in enumerate(packed.chunks):
        yield _block(f"chunk-{number}", deflate(chunk))
    for number, picture in enumerate(packed.pictures):
        if picture:
            yield _block(f"picture-{number}", picture)
    yield foot.replace("{script}", script)


def _allow(content: str) -> str:
    """The content security policy's name of an inline script or style."""
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _block(name: str, content: bytes) -> str:
    # a script element of another type than a script's is never run
    data = base64.b64encode(content).decode("ascii")
    return f'<script type="text/plain" id="{name}">{data}</script>\n'


def deflate(content: bytes) -> bytes:
    """Raw deflate, which a browser's `DecompressionStream` undoes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()
