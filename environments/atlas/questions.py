"""Questions over the atlas, by what they need.

Kinds: look, image, text, two (picture, then fact), three (picture, neighbour, fact), pair (one half
of a picture of two places, then fact).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from environments.atlas.editions import AS_IT_IS, Edition, load_sheets
from environments.atlas.entities import (
    DOMAINS,
    HEADLINE_RELATIONS,
    SPLITS,
    Entity,
    has_picture,
    load_flag,
    load_picture,
)
from environments.atlas.passages import passage_id
from environments.atlas.photos import render_photo, render_two_flags
from environments.errors import EnvironmentSetupError

ONE_PLACE_KINDS = ("look", "image", "text", "two", "three")
KINDS = (*ONE_PLACE_KINDS, "pair")

IMAGE_WORDINGS = ("Which place is this?", "What is the name of this place?")
LOOK_WORDING = "What is the main colour of the flag?"
TWO_WORDING = "What is the {relation} of this place?"
TEXT_WORDINGS = (
    "{name}. What is the {relation} of this place?",
    "What is the {relation} of {name}?",
)
THREE_WORDING = "What is the {relation} of the longest border neighbour of this place?"
PAIR_WORDING = "What is the {relation} of the place on the {side}?"

COLOURS = {
    "red": (200, 30, 45),
    "blue": (20, 60, 150),
    "green": (0, 130, 60),
    "yellow": (250, 210, 30),
    "white": (255, 255, 255),
    "black": (10, 10, 10),
    "orange": (240, 130, 30),
    "light blue": (110, 180, 230),
}


def main_colour(flag: np.ndarray, least_share: float = 0.5) -> str | None:
    """The named colour that covers at least `least_share` of a flag, or None if there is none.

    Args:
        flag: [height, width, 3] of uint8.
        least_share: 0 to 1.
    """
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    distance = ((flag.reshape(-1, 1, 3).astype(np.float32) - palette) ** 2).sum(-1)
    counts = np.bincount(distance.argmin(1), minlength=len(palette)) / len(distance)
    return list(COLOURS)[int(counts.argmax())] if counts.max() >= least_share else None


def list_questions(
    split: str,
    kind: str,
    relations: Sequence[str] = HEADLINE_RELATIONS,
    edition: Edition = AS_IT_IS,
) -> Iterator[dict[str, Any]]:
    """Every question of a kind in a split, without its photo, in a fixed order.

    Answers are those of the edition's newest fact sheet, whose pages are the gold passages.
    """
    sheet = load_sheets(edition)[-1]
    entities, year = sheet.entities, sheet.year
    for entity in entities.values():
        if entity.split != split:
            continue
        if kind == "look":
            colour = main_colour(load_flag(entity.iso))
            if colour is not None:
                yield _question(entity, kind, None, LOOK_WORDING, [colour], [])
        elif kind == "image":
            wording = IMAGE_WORDINGS[_stable_hash(entity.iso) % len(IMAGE_WORDINGS)]
            yield _question(entity, kind, None, wording, entity.names, [])
        elif kind in ("text", "two"):
            for relation in relations:
                if relation in entity.relations:
                    text = _fact_wording(kind, entity.iso + relation)
                    text = text.format(name=entity.name, relation=relation)
                    yield _fact_question(entity, kind, relation, text, entity, year)
        elif kind == "three":
            neighbour = entities.get(entity.neighbour or "")
            if neighbour is None or neighbour.split != split:
                continue  # a chain out of its split would show held-out facts in training
            for relation in relations:
                if relation in neighbour.relations and relation != "longest border":
                    text = THREE_WORDING.format(relation=relation)
                    yield _fact_question(entity, kind, relation, text, neighbour, year)
        elif kind == "pair":
            for relation in relations:
                partner = _partner(entity, relation, entities.values())
                if partner is not None:
                    side = ("left", "right")[_stable_hash(f"side/{entity.iso}/{relation}") % 2]
                    text = PAIR_WORDING.format(relation=relation, side=side)
                    scene = [entity.iso, partner.iso]
                    yield {
                        **_fact_question(entity, kind, relation, text, entity, year),
                        "scene": scene if side == "left" else scene[::-1],
                    }


def load_questions(
    split: str,
    kinds: Sequence[str],
    n: int | None = None,
    seed: int = 0,
    strength: float = 0.5,
    relations: Sequence[str] | None = None,
    edition: Edition = AS_IT_IS,
    domain: str = "flags",
) -> list[dict[str, Any]]:
    """Questions with their photos, shuffled by `seed`.

    More than exist are made by taking new photos of the same flags or maps.

    Args:
        split: train, dev or test.
        kinds: any of KINDS.
        n: how many; None gives each question once.
        seed: of order and photos.
        strength: of the photos' warp.
        relations: which facts are asked for; None gives the headline six.
        edition: whose facts are right.
        domain: what the photos show, flags or maps; questions without a picture there are left
            out, and so is `look`, which asks for a flag's colour, from maps.

    Raises:
        EnvironmentSetupError: unknown split, kind or domain, or nothing to ask.
    """
    if domain not in DOMAINS:
        raise EnvironmentSetupError(
            f"environment domain {domain!r} is unknown; choose one of {', '.join(DOMAINS)}"
        )
    if split not in SPLITS:
        raise EnvironmentSetupError(
            f"environment split {split!r} is unknown; choose one of {', '.join(SPLITS)}"
        )
    for kind in kinds:
        if kind not in KINDS:
            raise EnvironmentSetupError(
                f"environment kind {kind!r} is unknown; choose among {', '.join(KINDS)}"
            )
    pool = [
        question
        for kind in kinds
        for question in list_questions(split, kind, relations or HEADLINE_RELATIONS, edition)
        if _is_pictured(question, domain)
    ]
    if not pool:
        raise EnvironmentSetupError(
            f"no question of kinds {list(kinds)} in split {split!r} with pictures of {domain}; "
            "widen `relations` or `kinds`"
        )
    rng = random.Random(seed)
    questions: list[dict[str, Any]] = []
    round_ = 0
    while len(questions) < (n if n is not None else len(pool)):
        order = rng.sample(pool, len(pool))
        questions += [
            _with_photo(question, seed, round_, strength, domain)
            for question in order[: (n or len(pool)) - len(questions)]
        ]
        round_ += 1
    return questions


def _fact_wording(kind: str, key: str) -> str:
    if kind == "two":
        return TWO_WORDING
    return TEXT_WORDINGS[_stable_hash(key) % len(TEXT_WORDINGS)]


def _fact_question(
    entity: Entity, kind: str, relation: str, text: str, subject: Entity, year: int | None
) -> dict[str, Any]:
    """A question about a pictured entity whose answer is a fact of `subject`, the last hop's."""
    gold = [passage_id(subject.iso, relation, year)]
    return _question(entity, kind, relation, text, list(subject.relations[relation]), gold)


def _question(
    entity: Entity, kind: str, relation: str | None, text: str, answers: list[str], gold: list[str]
) -> dict[str, Any]:
    identity = f"{kind}/{entity.iso}/{relation or '-'}"
    hops = {"look": 0, "image": 1, "text": 1, "two": 2, "three": 3, "pair": 2}[kind]
    return {
        "id": identity,
        "kind": kind,
        "split": entity.split,
        "entity": entity.iso,
        "entity_names": entity.names,
        "relation": relation,
        "question": text,
        "answers": answers,
        "gold_passages": gold,
        "seen": entity.seen,
        "hops": hops,
    }


def _partner(entity: Entity, relation: str, entities: Iterable[Entity]) -> Entity | None:
    """The other place of a scene: of the same split, with another answer, fixed by the codes.

    None if the entity has no such fact, or nobody else another answer.
    """
    own = entity.relations.get(relation, ())
    others = [
        other
        for other in entities
        if own
        and other.split == entity.split
        and other.iso != entity.iso
        and relation in other.relations
        and not set(own) & set(other.relations[relation])
    ]
    key = f"pair/{entity.iso}/{relation}/"
    return min(others, key=lambda other: _stable_hash(key + other.iso), default=None)


def _is_pictured(question: dict[str, Any], domain: str) -> bool:
    """Whether the domain has a picture of every place that the question shows."""
    if domain == "flags" or question["kind"] == "text":
        return True
    return question["kind"] != "look" and all(has_picture(domain, iso) for iso in _shown(question))


def _shown(question: dict[str, Any]) -> list[str]:
    """The places in a question's picture, from left to right."""
    return question.get("scene", [question["entity"]])


def _with_photo(
    question: dict[str, Any], seed: int, round_: int, strength: float, domain: str
) -> dict[str, Any]:
    image = None
    if question["kind"] != "text":
        photo_seed = _stable_hash(f"{seed}/{round_}/{question['id']}")
        pictures = [load_picture(domain, iso) for iso in _shown(question)]
        if len(pictures) == 2:
            image = render_two_flags(pictures[0], pictures[1], photo_seed, strength)
        else:
            image = render_photo(pictures[0], photo_seed, strength)
    return {**question, "id": f"{question['id']}/{round_}", "image": image}


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
