"""Editions of the atlas: which facts hold, and which fact sheets the corpus is written from.

The default edition is the world as it is. Two switches change the facts, never the places:

counterfactual: inside every relation the answers change places, by a seed. What a model may have
    memorised is wrong, what the passages state is right.
news: a second fact sheet, NEWS_SHARE of whose facts have changed. The older sheet is the world as
    it was known, the newer one what the world has come to; the corpus holds one of them or both,
    dated, and the right answer is that of the newest page.

Answers change places inside a split only, so no fact of a held-out place comes into training. The
neighbour of a chain of three travels with the answer to `longest border`: the chain goes on from
the neighbour that the passage names.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from environments.atlas.entities import SPLITS, Entity, load_entities
from environments.errors import EnvironmentSetupError

OLDER, NEWER = 2019, 2026
YEARS_OF_NEWS = {"older": (OLDER,), "newer": (NEWER,), "both": (OLDER, NEWER)}
NEWS_SHARE = 0.5
_NEWS_SEED = 20_26


@dataclass(frozen=True)
class Edition:
    """Which facts hold.

    Attributes:
        counterfactual: seed of the exchange of answers; None = the answers of the world as it is.
        news: which dated fact sheets the corpus holds: older, newer or both; None = one undated.
    """

    counterfactual: int | None = None
    news: str | None = None

    def __post_init__(self) -> None:
        if self.news is not None and self.news not in YEARS_OF_NEWS:
            raise EnvironmentSetupError(
                f"environment news {self.news!r} is unknown; choose one of "
                f"{', '.join(YEARS_OF_NEWS)}, or null for a corpus without dates"
            )


AS_IT_IS = Edition()


@dataclass(frozen=True)
class Sheet:
    """One fact sheet: `year` dates its pages (None: undated), `entities` hold its facts."""

    year: int | None
    entities: Mapping[str, Entity]


@functools.cache
def load_sheets(edition: Edition = AS_IT_IS) -> tuple[Sheet, ...]:
    """The fact sheets in the corpus, the newest last."""
    known = load_entities()
    facts = known
    if edition.counterfactual is not None:
        facts = exchange_answers(facts, edition.counterfactual)
    if edition.news is None:
        return (Sheet(None, facts),)
    changed = exchange_answers(facts, _NEWS_SEED, NEWS_SHARE, never=[known])
    by_year = {OLDER: facts, NEWER: changed}
    return tuple(Sheet(year, by_year[year]) for year in YEARS_OF_NEWS[edition.news])


def exchange_answers(
    entities: Mapping[str, Entity],
    seed: int,
    share: float = 1.0,
    never: Sequence[Mapping[str, Entity]] = (),
) -> dict[str, Entity]:
    """The same places, whose answers have changed places inside each split and relation.

    A place keeps an answer only where no swap inside its split gives it another. Answers move with
    their aliases, and `longest border` with the neighbour, which is never the place itself.

    Args:
        entities: places by code.
        seed: the same seed makes the same exchange.
        share: of the places of each split and relation that take part.
        never: further states of the places, whose answers shall not come back either.
    """
    past = [entities, *never]
    relations = dict.fromkeys(name for e in entities.values() for name in e.relations)
    new = {iso: dict(e.relations) for iso, e in entities.items()}
    donors: dict[str, str] = {}
    for relation in relations:
        for split in SPLITS:
            rng = random.Random(f"exchange/{seed}/{relation}/{split}")
            members = [
                iso for iso, e in entities.items() if e.split == split and relation in e.relations
            ]
            members = rng.sample(members, round(share * len(members)))
            for iso, donor in _pair_off(members, relation, entities, past, rng).items():
                new[iso][relation] = entities[donor].relations[relation]
                if relation == "longest border":
                    donors[iso] = donor
    return {
        iso: replace(entity, relations=new[iso], neighbour=entities[donors.get(iso, iso)].neighbour)
        for iso, entity in entities.items()
    }


def _pair_off(
    members: list[str],
    relation: str,
    entities: Mapping[str, Entity],
    past: Sequence[Mapping[str, Entity]],
    rng: random.Random,
) -> dict[str, str]:
    """Place -> the place whose answer it gets: a random order, then misfits swapped away."""
    had = {
        iso: {answer.casefold() for sheet in past for answer in sheet[iso].relations[relation]}
        for iso in members
    }
    for iso in members:
        had[iso].update(name.casefold() for name in entities[iso].names)
    offered = {iso: {a.casefold() for a in entities[iso].relations[relation]} for iso in members}

    def fits(iso: str, donor: str) -> bool:
        return not had[iso] & offered[donor]

    donors = dict(zip(members, rng.sample(members, len(members)), strict=True))
    for iso in members:
        if fits(iso, donors[iso]):
            continue
        for other in rng.sample(members, len(members)):
            if fits(iso, donors[other]) and fits(other, donors[iso]):
                donors[iso], donors[other] = donors[other], donors[iso]
                break
    return donors
