"""Which attention heads a training leaves alone: read from a conflict map, or drawn as a control.

The choice goes into `frozen_heads.json` of the run folder, with the checksum of the map it was made
from, so that a run can only be continued with the same heads frozen.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.sections import FreezeHeads
from train.heads import Head, HeadLayout

SCHEMA_VERSION = 1
"""Of conflict.json."""
FILE_NAME = "frozen_heads.json"
MAP_NAME = "conflict/conflict.json"
"""Where a start's own conflict map lies, in its folder."""


@dataclass(frozen=True)
class FrozenHeads:
    """Heads that stay as they are, and where the choice comes from."""

    source: str
    top: float
    seed: int
    shared: str
    map: str | None
    map_sha256: str | None
    n_heads: int
    """heads of the model"""
    heads: tuple[Head, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for frozen_heads.json."""
        return {**asdict(self), "heads": [list(head) for head in self.heads]}


def choose_heads(settings: FreezeHeads, layout: HeadLayout, start: str) -> FrozenHeads | None:
    """The heads that the section `freeze_heads` names; None where it names none.

    Args:
        settings: the section.
        layout: of the policy.
        start: folder or hub id of the policy, whose own map is the default.

    Raises:
        ConfigError: no map, or one of another architecture.
    """
    if settings.source == "none":
        return None
    n_frozen = count_heads(settings.top, len(layout.heads()))
    path = digest = None
    if settings.source == "random":
        heads = random.Random(settings.seed).sample(layout.heads(), n_frozen)
    else:
        path = Path(os.path.expanduser(settings.map)) if settings.map else Path(start) / MAP_NAME
        record, digest = read_map(path)
        ranked = rank_heads(record, layout, path)
        heads = ranked[:n_frozen] if settings.source == "cast" else ranked[-n_frozen:]
    return FrozenHeads(
        source=settings.source,
        top=settings.top,
        seed=settings.seed,
        shared=settings.shared,
        map=None if path is None else str(path),
        map_sha256=digest,
        n_heads=len(layout.heads()),
        heads=tuple(sorted(heads)),
    )


def count_heads(top: float, n_heads: int) -> int:
    """Heads in a share of all, rounded up; at least one."""
    # 0.1 * 30 is a little more than 3 in floats
    return max(1, math.ceil(round(top * n_heads, 9)))


def read_map(path: Path) -> tuple[dict[str, Any], str]:
    """Content and SHA-256 of a conflict map.

    Raises:
        ConfigError: there is none, or it is no conflict map.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"freeze_heads.map: no conflict map at {path}; make one with "
            "`obm diagnose heads models.init=START`, or set source: random"
        ) from error
    try:
        record = json.loads(content)
        version = record["schema_version"]
        rows = [(row["layer"], row["head"], row["score"], row["cosine"]) for row in record["heads"]]
        is_sound = all(math.isfinite(number) for row in rows for number in row)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"freeze_heads.map: {path} is no conflict map; make it again with `obm diagnose heads`"
        ) from error
    if version != SCHEMA_VERSION or not is_sound:
        reason = f"version {version}" if is_sound else "numbers that are not finite"
        raise ConfigError(
            f"freeze_heads.map: {path} has {reason}; make it again with `obm diagnose heads`"
        )
    return record, hashlib.sha256(content).hexdigest()


def rank_heads(record: dict[str, Any], layout: HeadLayout, path: Path) -> list[Head]:
    """Heads of a conflict map, the most conflicting first; see `conflict_order`.

    Raises:
        ConfigError: the map is of a model with other heads.
    """
    rows = sorted(record["heads"], key=conflict_order)
    heads = [Head(row["layer"], row["head"]) for row in rows]
    if sorted(heads) != layout.heads():
        raise ConfigError(
            f"freeze_heads.map: {path} has {len(heads)} heads that are not the policy's "
            f"{layout.n_layers} layers of {layout.n_heads}; diagnose this start"
        )
    return heads


def conflict_order(row: dict[str, Any]) -> tuple[float, ...]:
    """Sorts heads of a map by score; of equal ones the more opposed first, then by place."""
    return (-row["score"], row["cosine"], row["layer"], row["head"])


def check_same_heads(folder: Path, frozen: FrozenHeads | None) -> None:
    """Checks that a continued run freezes what it froze before.

    Raises:
        ConfigError: other heads, or another map.
    """
    path = folder / FILE_NAME
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    now = None if frozen is None else json.loads(json.dumps(frozen.to_dict()))
    if before is None and now is None:
        return
    for key in ("heads", "shared", "map_sha256"):
        old, new = ((record or {}).get(key) for record in (before, now))
        if old != new:
            raise ConfigError(
                f"freeze_heads: {path} says {key} {old}, now it is {new}; give the run its own "
                "conflict map back, or choose another output"
            )
