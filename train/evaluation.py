"""What a batch of episodes shows: the four parts of the floor, by question kind and by seen entity.

    searched   the episode made any search
    entity     a text query names the entity it must name (whole words, after normalisation)
    passage    a passage that states the asked fact was among the text hits
    accuracy   the final answer is right

Each part needs the one before, so they say where a policy's skill ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from environments.episode import STOP_REASONS
from rewards.answer import exact_match, final_answer
from rewards.normalize import contains_phrase
from train.trajectories import Trajectory

if TYPE_CHECKING:
    from train.episodes import Engine

FOUR_PARTS = ("searched", "entity", "passage", "accuracy")

BEHAVIOURS = ("image_only", "text_only", "both", "none")


def behaviour(n_image: int, n_text: int) -> str:
    """How an episode searched: one of BEHAVIOURS. Visits of pages are no searches."""
    if n_image and n_text:
        return "both"
    return "image_only" if n_image else "text_only" if n_text else "none"


def outcome(trajectory: Trajectory, question: dict[str, Any]) -> dict[str, bool]:
    """The four parts for one episode."""
    queries = [a["query"] for t in trajectory.turns for a in t.actions if a["type"] == "search"]
    names = question.get("entity_names") or []
    gold = set(question.get("gold_passages") or [])
    with_query = [t for t in trajectory.turns if any(a["type"] == "search" for a in t.actions)]
    found = {hit for turn in with_query for hit in turn.hits}
    return {
        "searched": bool(queries) or trajectory.count("image_search") > 0,
        "entity": any(contains_phrase(query, name) for query in queries for name in names),
        "passage": bool(found & gold),
        "accuracy": exact_match(final_answer(trajectory), question["answers"]),
    }


def measure(trajectory: Trajectory, question: dict[str, Any]) -> dict[str, Any]:
    """What one episode shows, as plain data that `summarize_measured` takes."""
    return {
        "kind": question["kind"],
        "seen": question.get("seen"),
        **outcome(trajectory, question),
        "n_text": trajectory.count("search"),
        "n_image": trajectory.count("image_search"),
        "n_calls": trajectory.n_calls,
        "n_tokens": trajectory.n_policy_tokens,
        "stop_reason": trajectory.stop_reason,
    }


def summarize(
    trajectories: Sequence[Trajectory], questions: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Means over episodes, in all and by group.

    Args:
        trajectories: one per question.
        questions: in the same order.

    Returns:
        See `summarize_measured`.
    """
    return summarize_measured([measure(t, q) for t, q in zip(trajectories, questions, strict=True)])


def summarize_measured(episodes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over measured episodes, in all and by group.

    Args:
        episodes: of `measure`.

    Returns:
        The four parts, `n`, `search_rate_text`, `search_rate_image`, `calls_per_episode`,
        `tokens_per_episode`, `behaviour/<name>` (see `behaviour`), `stop/<reason>`; the four parts
        and `n` again under `kind/<kind>/`, `seen/` and `unseen/` (entities whose picture the VLM
        was trained on, or not; where the questions do not say it, neither).
    """
    if not episodes:
        raise ValueError("there is no episode to summarise")
    n = len(episodes)
    metrics = _means(episodes)
    metrics |= {
        "search_rate_text": sum(e["n_text"] > 0 for e in episodes) / n,
        "search_rate_image": sum(e["n_image"] > 0 for e in episodes) / n,
        "calls_per_episode": sum(e["n_calls"] for e in episodes) / n,
        "tokens_per_episode": sum(e["n_tokens"] for e in episodes) / n,
    }
    shown = [behaviour(e["n_image"], e["n_text"]) for e in episodes]
    metrics |= {f"behaviour/{name}": shown.count(name) / n for name in BEHAVIOURS}
    for reason in STOP_REASONS:
        metrics[f"stop/{reason}"] = sum(e["stop_reason"] == reason for e in episodes) / n
    groups = {
        f"kind/{kind}/": [e["kind"] == kind for e in episodes]
        for kind in sorted({e["kind"] for e in episodes})
    }
    groups["seen/"] = [e["seen"] is not None and bool(e["seen"]) for e in episodes]
    groups["unseen/"] = [e["seen"] is not None and not e["seen"] for e in episodes]
    for prefix, members in groups.items():
        chosen = [e for e, is_member in zip(episodes, members, strict=True) if is_member]
        if chosen:
            metrics |= {prefix + name: value for name, value in _means(chosen).items()}
    return metrics


def evaluate(
    engine: Engine, questions: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], list[Trajectory]]:
    """One greedy episode per question.

    Args:
        engine: holds policy and environment.
        questions: held-out questions.

    Returns:
        `summarize`'s metrics and the episodes.
    """
    trajectories = engine.rollout_rows(list(questions), greedy=True, number=0)
    return summarize(trajectories, questions), trajectories


def _means(episodes: Sequence[dict[str, Any]]) -> dict[str, float]:
    n = len(episodes)
    return {**{part: sum(e[part] for e in episodes) / n for part in FOUR_PARTS}, "n": float(n)}
