"""What an episode's searches cost and what they found. Functions of one trajectory alone.

What the episodes of a group say about each other (ranks of thrift, hop credit) is in
`train.credit`.
"""

from typing import Any, Literal

from rewards.normalize import normalize_answer
from rewards.trajectory import action_types, actions_of, get, turns_of

CALLS = ("search", "image_search", "visit")
"""Types of actions that ask a tool."""


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


def search_penalty(
    trajectory: Any,
    is_correct: bool,
    share: float,
    per: Literal["episode", "search"] = "episode",
) -> float:
    """Share of the accuracy part that is lost to searching, in [0, 1].

        share                   for a right answer with a search, however many
        1 - (1 - share) ** n    with per = "search": each of n calls takes its share of the rest

    Never from a wrong answer: a policy that cannot answer yet must not learn to stop searching.
    """
    if not is_correct or not has_searched(trajectory):
        return 0.0
    return share if per == "episode" else 1.0 - (1.0 - share) ** count_calls(trajectory)


def count_calls(trajectory: Any) -> int:
    """Tool calls of the policy, refused and failed ones included."""
    return sum(count_searches(trajectory).values())


def evidence_hit(trajectory: Any, question: Any) -> float | None:
    """1.0 if a search of the episode returned a gold passage, else 0.0.

    What counts is what the environment returned, never what the policy wrote. None for a question
    that names no `gold_passages`.
    """
    gold = set(get(question, "gold_passages") or ())
    if not gold:
        return None
    found = (set(get(turn, "hits") or ()) for turn in turns_of(trajectory) if _asks_text(turn))
    return float(any(gold & hits for hits in found))


def redundancy(trajectory: Any) -> float:
    """Share of the tool calls that repeat an earlier one of the episode, in [0, 1].

    Two text queries are the same if they have the same normalised words, in any order; two image
    searches if they look at the same region; two visits if they read the same page. To ask again
    after a fault of the service is no repetition.
    """
    sound = [turn for turn in turns_of(trajectory) if get(turn, "fault") != "infrastructure"]
    calls = [action for action in actions_of({"turns": sound}) if action.get("type") in CALLS]
    distinct = {_call_key(call) for call in calls}
    return (len(calls) - len(distinct)) / len(calls) if calls else 0.0


def economy(trajectory: Any, question: Any, accuracy: float) -> float | None:
    """How close a right answer's number of calls n comes to the best known b, in [0, 1].

        accuracy * (1 + b) / (1 + max(n, b))

    To call less than b earns nothing more: it may be luck. None for a question that states neither
    `best_calls` nor `hops`.
    """
    best = get(question, "best_calls")
    if best is None:
        best = get(question, "hops")
    if best is None:
        return None
    return accuracy * (1 + best) / (1 + max(count_calls(trajectory), best))


def _asks_text(turn: Any) -> bool:
    return any(action.get("type") == "search" for action in actions_of({"turns": [turn]}))


def _call_key(call: dict[str, Any]) -> tuple[Any, ...]:
    if call["type"] == "search":
        return ("search", frozenset(normalize_answer(str(call.get("query", ""))).split()))
    if call["type"] == "visit":
        return ("visit", call.get("url"))
    region = call.get("region", "full")
    return ("image_search", region if isinstance(region, str) else tuple(region))
