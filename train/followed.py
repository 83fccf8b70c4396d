"""Questions of the evaluation that are followed: the same at every evaluation, and what changed.

The episodes stay where all evaluation episodes are, in trajectories.jsonl; those of followed
questions carry `"followed": true`. Which ones depends on `environment.data_seed` alone, so that two
arms of a comparison follow the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Visit:
    """One evaluation of a followed question."""

    step: int
    answer: str | None
    stop_reason: str
    reward: float | None
    """total; None where a failed tool leaves the episode unscored"""
    searches: tuple[str, ...]
    """queries in order; an image search is its region in brackets"""
    text: str
    """turns and observations"""
    changed: tuple[str, ...] = ()
    """what is not as it was at the evaluation before: answer, reward, searches, stop"""


def chosen(n_questions: int, n_followed: int, seed: int) -> list[int]:
    """Indices of the questions to follow, in order; all if there are no more than that."""
    n = min(n_followed, n_questions)
    # a question stays chosen when more are followed: the first n of one fixed order
    order = random.Random(f"follow {seed}").sample(range(n_questions), n_questions)
    return sorted(order[:n])


def follow(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Visit]]:
    """Visits of each followed question, by step, with what changed since the one before.

    Args:
        rows: lines of trajectories.jsonl, checked; others than followed ones are left out.
    """
    found: dict[str, list[Visit]] = {}
    for row in rows:
        if row.get("followed"):
            found.setdefault(row["question_id"], []).append(_visit(row))
    for question_id, visits in found.items():
        visits.sort(key=lambda visit: visit.step)
        pairs = zip([None, *visits], visits, strict=False)
        found[question_id] = [
            replace(visit, changed=_changes(before, visit)) for before, visit in pairs
        ]
    return found


def _visit(row: Mapping[str, Any]) -> Visit:
    actions = [action for turn in row["turns"] for action in _actions(turn["action"])]
    searches = [
        action["query"] if action["type"] == "search" else f"[{action['region']}]"
        for action in actions
        if action["type"] in ("search", "image_search")
    ]
    return Visit(
        step=row["step"],
        answer=row.get("answer"),
        stop_reason=row["stop_reason"],
        reward=(row["rewards"] or {}).get("total"),
        searches=tuple(searches),
        text="".join(turn["text"] + (turn.get("observation") or "") for turn in row["turns"]),
    )


def _actions(action: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(action["calls"]) if action["type"] == "parallel" else [action]


def _changes(before: Visit | None, now: Visit) -> tuple[str, ...]:
    if before is None:
        return ()
    pairs = {
        "answer": (before.answer, now.answer),
        "reward": (before.reward, now.reward),
        "searches": (before.searches, now.searches),
        "stop": (before.stop_reason, now.stop_reason),
    }
    return tuple(name for name, (old, new) in pairs.items() if old != new)
