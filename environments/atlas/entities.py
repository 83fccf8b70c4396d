"""The atlas's entities: countries and territories, each with facts, a flag, a map and a split.

An entity also says whether the tiny VLM has seen its flag.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import numpy as np
from PIL import Image

SPLITS = ("train", "dev", "test")
HEADLINE_RELATIONS = (
    "capital",
    "currency",
    "aircraft prefix",
    "highest point",
    "national anthem",
    "longest border",
)

# Passages group facts by topic, so that a passage holds distractor facts beside the one that is
# asked for.
TOPICS = {
    "government": ("capital", "legislature", "national anthem"),
    "geography": ("highest point", "longest border", "internet code"),
    "economy": ("currency", "aircraft prefix", "independence year"),
    "symbols": ("national symbol",),
}
TOPIC_OF = {relation: topic for topic, relations in TOPICS.items() for relation in relations}

DOMAINS = ("flags", "maps")
# Sea, other land, the place itself: the colours of a map, which keeps class numbers.
MAP_COLOURS = ((150, 190, 225), (235, 225, 195), (200, 60, 50))

# A VLM knows much of the world: it has seen this share of the flags of every split, and never a
# fact about them.
SEEN_SHARE = 2 / 3


@dataclass(frozen=True)
class Entity:
    """One place; `relations` maps each relation to its accepted answers, canonical one first."""

    iso: str
    name: str
    aliases: tuple[str, ...]
    relations: dict[str, tuple[str, ...]]
    neighbour: str | None
    split: str
    seen: bool

    @property
    def names(self) -> list[str]:
        """Canonical name first, then the aliases."""
        return list(dict.fromkeys((self.name, *self.aliases)))


def _data(*parts: str) -> Traversable:
    return files("environments.atlas").joinpath("data", *parts)


@functools.cache
def load_entities() -> dict[str, Entity]:
    """All entities by ISO code, in a fixed order."""
    records = json.loads(_data("entities.json").read_text(encoding="utf-8"))
    seen = _seen_entities(records)
    return {
        iso: Entity(
            iso=iso,
            name=record["name"],
            aliases=tuple(record["aliases"]),
            relations={name: tuple(answers) for name, answers in record["relations"].items()},
            neighbour=record["neighbour"],
            split=record["split"],
            seen=iso in seen,
        )
        for iso, record in sorted(records.items())
    }


def _seen_entities(records: dict[str, dict[str, Any]]) -> set[str]:
    """Two thirds of every split, chosen by a hash of the code: it never depends on the order."""
    seen: set[str] = set()
    for split in SPLITS:
        members = sorted(
            (iso for iso, record in records.items() if record["split"] == split),
            key=lambda iso: hashlib.sha256(f"seen/{iso}".encode()).hexdigest(),
        )
        seen.update(members[: round(SEEN_SHARE * len(members))])
    return seen


@functools.cache
def load_flag(iso: str) -> np.ndarray:
    """The flat flag as an array [96, 128, 3] of uint8."""
    png = _data("flags", f"{iso}.png").read_bytes()
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@functools.cache
def load_map(iso: str) -> np.ndarray:
    """The flat map as an array [96, 128, 3] of uint8; two islands have none (see has_picture)."""
    png = _data("maps", f"{iso}.png").read_bytes()
    return np.array(MAP_COLOURS, dtype=np.uint8)[np.asarray(Image.open(io.BytesIO(png)))]


def load_picture(domain: str, iso: str) -> np.ndarray:
    """How a domain pictures a place, [96, 128, 3] of uint8."""
    return load_flag(iso) if domain == "flags" else load_map(iso)


@functools.cache
def has_picture(domain: str, iso: str) -> bool:
    """Whether a domain has a picture of a place."""
    return _data(domain, f"{iso}.png").is_file()
