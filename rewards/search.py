"""What searching costs: a right answer loses a share of its reward when it needed a search."""

from typing import Any

from rewards.trajectory import action_types


def count_searches(trajectory: Any) -> dict[str, int]:
    """Number of `text` and `image` searches and of visits to a `page` that the policy asked for,
    refused and failed ones included."""
    types = action_types(trajectory)
    return {
        "text": types.count("search"),
        "image": types.count("image_search"),
        "page": types.count("visit"),
    }


def has_searched(trajectory: Any) -> bool:
    """Whether the policy made any call of a tool."""
    return any(count_searches(trajectory).values())


def search_penalty(trajectory: Any, is_correct: bool, share: float) -> float:
    """Share of the accuracy part that is lost: `share` for a right answer with a search, else 0.

    Taken once, however many calls there were, and never from a wrong answer: a policy that cannot
    answer yet must not learn to stop searching.
    """
    return share if is_correct and has_searched(trajectory) else 0.0
