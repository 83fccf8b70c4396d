"""What each mode of the atlas allows, by scripted agents that use the real tools, and its tables.

A scripted agent searches with the picture, takes the first name, asks "REL of NAME", and reads the
asked value out of the snippets that it is shown. It errs only where the tools do, so the best of
them is the ceiling of a mode. The others make one mistake each: they look at the whole picture,
read the first page whatever its date, or read the older one. Two agents never search: `memory`
knows every place and the facts as they are, `constant` says the one answer that is right most
often.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments.atlas.editions import NEWER, OLDER, Edition, load_sheets
from environments.atlas.entities import load_entities
from environments.episode import Episode, SearchEnvironment
from environments.tools import Hit
from rewards.answer import exact_match
from train.files import with_ending, write_json, write_text

_SIDE = re.compile(r"on the (left|right)\?")
_DATED = re.compile(r"As of (\d{4}): ")
_BEFORE_A_DATE = re.compile(r" (?=As of \d{4}: )")


@dataclass(frozen=True)
class Script:
    """How a scripted agent searches and reads.

    Attributes:
        whole_picture: it never names a half of the picture.
        trusts: which of several pages that state the fact it believes: newest, first or older.
    """

    whole_picture: bool = False
    trusts: str = "newest"


SCRIPTS = {
    "ceiling": Script(),
    "whole picture": Script(whole_picture=True),
    "first page": Script(trusts="first"),
    "older page": Script(trusts="older"),
}


def measure_mode(
    environment: SearchEnvironment, questions: Sequence[dict[str, Any]], edition: Edition
) -> dict[str, float]:
    """Shares over questions of one mode.

    Returns:
        `image` (the first name is that of the place) and `passage` (the gold passage is among the
        hits) of the ceiling, `image, whole picture`; accuracy of every script, of `memory` and of
        `constant`.
    """
    n = len(questions)
    shares: dict[str, float] = {}
    for name, script in SCRIPTS.items():
        found = [play(environment, question, edition, script) for question in questions]
        shares[name] = (
            sum(
                exact_match(item.answer, q["answers"])
                for item, q in zip(found, questions, strict=True)
            )
            / n
        )
        if name == "whole picture":
            shares[f"image, {name}"] = sum(item.has_place for item in found) / n
        if name == "ceiling":
            shares["image"] = sum(item.has_place for item in found) / n
            shares["passage"] = sum(item.has_passage for item in found) / n
    shares["memory"] = sum(exact_match(remember(q), q["answers"]) for q in questions) / n
    shares["constant"] = (
        max(Counter(answer for q in questions for answer in set(q["answers"])).values()) / n
    )
    return shares


@dataclass(frozen=True)
class Played:
    """What a scripted agent found: the right place, the gold passage, an answer."""

    has_place: bool
    has_passage: bool
    answer: str | None


def play(
    environment: SearchEnvironment, question: dict[str, Any], edition: Edition, script: Script
) -> Played:
    """One episode of a scripted agent."""
    episode = environment.start(question)
    side = _SIDE.search(question["question"])
    name: str | None = question["entity_names"][0]
    if question["kind"] != "text":
        region = side[1] if side and not script.whole_picture else ""
        seen = _ask(episode, f"<img> {region}")
        name = seen[0].title if seen else None
    has_place = name == question["entity_names"][0]
    if question["kind"] == "three" and name is not None:
        name = read(_ask(episode, f"longest border of {name}"), "longest border", edition, script)
    if name is None:
        return Played(has_place, False, None)
    hits = _ask(episode, f"{question['relation']} of {name}")
    has_passage = bool({hit.id for hit in hits} & set(question["gold_passages"]))
    own = [hit for hit in hits if hit.title == name]
    return Played(has_place, has_passage, read(own or hits, question["relation"], edition, script))


def read(hits: Sequence[Hit], relation: str, edition: Edition, script: Script) -> str | None:
    """The value of a relation that the shown snippets state, or None."""
    values = {
        entity.relations[relation][0]
        for sheet in load_sheets(edition)
        for entity in sheet.entities.values()
        if relation in entity.relations
    }
    stated: list[tuple[int, str]] = []
    for hit in hits:
        for sentence in _BEFORE_A_DATE.split(hit.text):
            dated = _DATED.match(sentence)
            # the longest: "euro" also stands in a value that begins with it
            found = [value for value in values if f"{relation} {value}" in sentence]
            if found:
                stated.append((int(dated[1]) if dated else 0, max(found, key=len)))
    if not stated:
        return None
    if script.trusts == "first":
        return stated[0][1]
    choose = max if script.trusts == "newest" else min
    return choose(stated, key=lambda item: item[0])[1]


def remember(question: dict[str, Any]) -> str | None:
    """What someone answers who knows the place and every fact as it is, without a search."""
    known = load_entities()
    place = known[question["entity"]]
    if question["kind"] == "three":
        if place.neighbour not in known:
            return None
        place = known[place.neighbour]
    return place.relations.get(question["relation"], (None,))[0]


def write_worlds(record: Mapping[str, Any], output: Path) -> None:
    """The record as OUTPUT.json and OUTPUT.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(with_ending(output, ".json"), dict(record))
    write_text(with_ending(output, ".md"), _markdown(record))


CEILING_COLUMNS = ("image", "image, whole picture", "passage", *SCRIPTS, "memory", "constant")


def ceiling_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The modes and what scripted agents reach in them, as Markdown."""
    lines = _header(["mode", "kind", "n", *CEILING_COLUMNS])
    for row in rows:
        cells = [
            f"{row['shares'][column]:.2f}" if _differs(column, row) else ""
            for column in CEILING_COLUMNS
        ]
        lines.append("| " + " | ".join([row["mode"], row["kind"], str(row["n"]), *cells]) + " |")
    return lines


def policy_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The modes and the four parts of every policy in them, as Markdown."""
    columns = {"searched": "searched", "by image": "search_rate_image", "entity": "entity",
               "passage": "passage", "accuracy": "accuracy"}  # fmt: skip
    lines = _header(["mode", "kind", "policy", *columns])
    for row in rows:
        for name, metrics in row["policies"].items():
            cells = [f"{metrics[metric]:.2f}" for metric in columns.values()]
            lines.append("| " + " | ".join([row["mode"], row["kind"], name, *cells]) + " |")
    return lines


def _ask(episode: Episode, query: str) -> list[Hit]:
    """Hits of one call; none where the budget or the turns are spent."""
    step = episode.step(f"<think> ask </think> <search> {query} </search>")
    return step.result.documents if step.result is not None else []


def _differs(column: str, row: Mapping[str, Any]) -> bool:
    """Whether a column can differ from the ceiling's: halves and several dates are not in all."""
    if "whole picture" in column:
        return bool(row["kind"] == "pair")
    return column not in ("first page", "older page") or row["mode"] == "news: both"


def _header(names: Sequence[str]) -> list[str]:
    align = ["---" if name in ("mode", "kind", "policy") else "---:" for name in names]
    return ["| " + " | ".join(names) + " |", "| " + " | ".join(align) + " |"]


def _markdown(record: Mapping[str, Any]) -> str:
    lines = [
        "# What every mode of the atlas asks of an agent",
        "",
        f"{record['n']} test questions a mode, photos at strength {record['strength']:g}.",
        "",
        "## What the tools allow",
        "",
        *ceiling_table(record["rows"]),
        "",
        "Scripted agents with the real tools and budgets. `image`: the first name of an image "
        "search (the asked half of a scene) is the place. `passage`: the gold passage is found. "
        '`ceiling`: accuracy of the agent that takes the first name, asks "REL of NAME" and '
        "reads the newest page. `whole picture`, `first page` and `older page` are the same agent "
        "with one mistake, shown where it can be made. `memory` knows every place and the facts "
        "as they are and never searches; `constant` says the one answer that is right most often "
        "here.",
        "",
        "## What the policies do",
        "",
        *policy_table(record["rows"]),
        "",
        "Greedy episodes: shares that searched at all and by image, named the place in a query, "
        "found the gold passage, answered right. base and agent read no pictures, so they are "
        "asked the `text` kind. `obm` is the merge of configs/demo.yaml before any training; the "
        "command names the checkpoints of others.",
        "",
        f"In the newer fact sheet, {record['changed']:.2f} of the asked facts of the test split "
        f"differ from the older one ({OLDER}, {NEWER}).",
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}.",
        "",
    ]
    return "\n".join(lines)
