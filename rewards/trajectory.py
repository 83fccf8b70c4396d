"""Reads trajectories, given as dicts (from trajectories.jsonl) or as objects of the same names."""

from collections.abc import Sequence
from typing import Any


def get(record: Any, name: str, default: Any = None) -> Any:
    """A field of a dict or an attribute of an object."""
    if isinstance(record, dict):
        return record.get(name, default)
    return getattr(record, name, default)


def turns_of(trajectory: Any) -> Sequence[Any]:
    """The turns, first to last."""
    return get(trajectory, "turns") or ()


def turn_texts(trajectory: Any) -> list[str]:
    """What the policy itself wrote, turn by turn; observations are not in it."""
    return [get(turn, "text") or "" for turn in turns_of(trajectory)]


def action_types(trajectory: Any) -> list[str]:
    """`search`, `image_search`, `visit`, `answer` or `invalid`, in order; a turn may hold several
    calls."""
    types = []
    for turn in turns_of(trajectory):
        action = get(turn, "action") or {}
        calls = action["calls"] if action.get("type") == "parallel" else [action]
        types += [call.get("type", "invalid") for call in calls]
    return types


def has_infrastructure_fault(trajectory: Any) -> bool:
    """Whether a tool failed through no fault of the policy."""
    return any(get(turn, "fault") == "infrastructure" for turn in turns_of(trajectory))
