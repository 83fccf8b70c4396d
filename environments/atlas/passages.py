"""The atlas's corpus: short passages about every entity, written by templates from the facts.

Every fact stands in one passage beside distractor facts of the same topic. Each entity also has an
overview and a news item that state none of them: a search for the bare name finds those, so an
agent must ask for what it wants to know.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass

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
NEWS_WORDINGS = (
    "{name} in the news: people of {name} met in {name} today.",
    "A day in {name}: {name} at work, {name} at play.",
    "Travel notes about {name}: how to see {name} and like {name}.",
)


@dataclass(frozen=True)
class Passage:
    """`id` is "iso/topic"; `facts` are the relations that the text states."""

    id: str
    title: str
    text: str
    facts: tuple[str, ...]


def passage_id(iso: str, relation: str) -> str:
    """The gold passage of a fact."""
    return f"{iso}/{TOPIC_OF[relation]}"


def state_facts(name: str, facts: list[tuple[str, str]], rng: random.Random) -> str:
    """Sentences that state (relation, value) pairs about `name`; `rng` chooses each wording."""
    return " ".join(
        rng.choice(FACT_WORDINGS).format(name=name, relation=relation, value=value)
        for relation, value in facts
    )


def write_passages(entity: Entity) -> list[Passage]:
    """All passages about one entity; wordings and order are fixed by the entity's code."""
    digest = hashlib.sha256(f"passages/{entity.iso}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    overview = rng.choice(OVERVIEW_WORDINGS).format(name=entity.name)
    news = rng.choice(NEWS_WORDINGS).format(name=entity.name)
    passages = [
        Passage(f"{entity.iso}/overview", entity.name, overview, ()),
        Passage(f"{entity.iso}/news", entity.name, news, ()),
    ]
    for topic, relations in TOPICS.items():
        facts = [
            (relation, entity.relations[relation][0])
            for relation in relations
            if relation in entity.relations
        ]
        if facts:
            rng.shuffle(facts)
            text = state_facts(entity.name, facts, rng)
            stated = tuple(relation for relation, _ in facts)
            passages.append(Passage(f"{entity.iso}/{topic}", entity.name, text, stated))
    return passages


@functools.cache
def load_passages() -> tuple[Passage, ...]:
    """The whole corpus, in the entities' order."""
    return tuple(
        passage for entity in load_entities().values() for passage in write_passages(entity)
    )
