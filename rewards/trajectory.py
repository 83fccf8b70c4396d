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


def actions_of(trajectory: Any) -> list[dict[str, Any]]:
    """What the policy asked for, in order; a turn may hold several calls, or (invalid) none."""
    actions: list[dict[str, Any]] = []
    for turn in turns_of(trajectory):
        action = get(turn, "action") or {}
        actions += action["calls"] if action.get("type") == "parallel" else [action]
    return actions


def action_types(trajectory: Any) -> list[str]:
    """`search`, `image_search`, `visit`, `answer` or `invalid`, in order."""
    return [action.get("type", "invalid") for action in actions_of(trajectory)]


def has_infrastructure_fault(trajectory: Any) -> bool:
    """Whether a tool failed through no fault of the policy."""
    return any(get(turn, "fault") == "infrastructure" for turn in turns_of(trajectory))
