"""The atlas's corpus: short passages about every entity, written by templates from the facts.

Every fact stands in one passage beside distractor facts of the same topic. Each entity also has an
overview and a news item that state none of them: a search for the bare name finds those, so an
agent must ask for what it wants to know. Where an edition has dated fact sheets, every sentence
says as of when its fact holds.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass

from environments.atlas.editions import AS_IT_IS, Edition, load_sheets
from environments.atlas.entities import TOPIC_OF, TOPICS, Entity, load_entities

FACT_WORDINGS = (
    "{name} {relation} {value}.",
    "In {name} the {relation} {value} is known.",
    "{name} has the {relation} {value}.",
)
OVERVIEW_WORDINGS = (
    "{name} is a place in the atlas: read about {name}, the flag of {name} and the people.",
    "{name}: an overview of {name} and of the flag of {name}.",
    "{name} is a place with a flag. All about {name} in this overview of {name}.",
)
DATED_WORDING = "As of {year}: {fact}"
NEWS_WORDINGS = (
    "{name} in the news: people of {name} met in {name} today.",
    "A day in {name}: {name} at work, {name} at play.",
    "Travel notes about {name}: how to see {name} and like {name}.",
)


@dataclass(frozen=True)
class Passage:
    """`id` is "iso/topic" or "iso/topic@year"; `facts` are the relations that the text states."""

    id: str
    title: str
    text: str
    facts: tuple[str, ...]
    year: int | None = None


def passage_id(iso: str, relation: str, year: int | None = None) -> str:
    """The gold passage of a fact, that of a year where the sheets are dated."""
    page = f"{iso}/{TOPIC_OF[relation]}"
    return page if year is None else f"{page}@{year}"


def state_facts(
    name: str, facts: list[tuple[str, str]], rng: random.Random, year: int | None = None
) -> str:
    """Sentences that state (relation, value) pairs about `name`; `rng` chooses each wording."""
    sentences = [
        rng.choice(FACT_WORDINGS).format(name=name, relation=relation, value=value)
        for relation, value in facts
    ]
    if year is not None:
        # every sentence: a snippet may show any of them alone
        sentences = [DATED_WORDING.format(year=year, fact=sentence) for sentence in sentences]
    return " ".join(sentences)


def write_passages(entity: Entity, year: int | None = None) -> list[Passage]:
    """All passages about one entity; wordings and order are fixed by its code and the year.

    Overview and news are the same for every year.
    """
    rng = _generator(f"passages/{entity.iso}")
    overview = rng.choice(OVERVIEW_WORDINGS).format(name=entity.name)
    news = rng.choice(NEWS_WORDINGS).format(name=entity.name)
    passages = [
        Passage(f"{entity.iso}/overview", entity.name, overview, ()),
        Passage(f"{entity.iso}/news", entity.name, news, ()),
    ]
    if year is not None:
        rng = _generator(f"passages/{entity.iso}/{year}")
    for relations in TOPICS.values():
        facts = [
            (relation, entity.relations[relation][0])
            for relation in relations
            if relation in entity.relations
        ]
        if facts:
            rng.shuffle(facts)
            text = state_facts(entity.name, facts, rng, year)
            stated = tuple(relation for relation, _ in facts)
            identity = passage_id(entity.iso, relations[0], year)
            passages.append(Passage(identity, entity.name, text, stated, year))
    return passages


@functools.cache
def load_passages(edition: Edition = AS_IT_IS) -> tuple[Passage, ...]:
    """The whole corpus, in the entities' order."""
    pages: dict[str, Passage] = {}
    for iso in load_entities():
        sheets = list(load_sheets(edition))
        # equal scores go to the earlier page: it must not always be of the same year
        _generator(f"sheets/{iso}").shuffle(sheets)
        for sheet in sheets:
            pages |= {page.id: page for page in write_passages(sheet.entities[iso], sheet.year)}
    return tuple(pages.values())


def _generator(key: str) -> random.Random:
    digest = hashlib.sha256(key.encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
