"""What is counted of the episodes of a rollout; docs/metrics.md says what each name means."""

from __future__ import annotations

from collections.abc import Sequence

from environments.episode import STOP_REASONS
from environments.tools import CUT_MARK
from train.trajectories import Trajectory


def episode_sums(
    trajectories: Sequence[Trajectory], replaced: Sequence[Trajectory], added_parts: Sequence[str]
) -> dict[str, float]:
    """Sums over episodes of one process, under TRL's names where it has them.

    Args:
        trajectories: the episodes that are trained on.
        replaced: episodes that were sampled, too, but whose groups were given up.
        added_parts: reward parts that TRL does not know.

    Returns:
        Name -> sum. `tokens` and `prompt_tokens` count those of the replaced episodes as well; all
        others are over `trajectories`, and become means when divided by their number.
    """
    lengths = [t.n_policy_tokens for t in trajectories]
    sampled = [*trajectories, *replaced]
    return {
        "tokens": sum(t.n_policy_tokens for t in sampled),
        "prompt_tokens": sum(len(t.prompt_ids) for t in sampled),
        "search/rate_image": sum(t.count("image_search") > 0 for t in trajectories),
        "search/rate_text": sum(t.count("search") > 0 for t in trajectories),
        "search/calls_per_episode": sum(t.n_calls for t in trajectories),
        "search/retries_per_episode": sum(u.retries for t in trajectories for u in t.turns),
        "search/failure_rate": sum(any(u.is_error for u in t.turns) for t in trajectories),
        "search/service_failure_rate": sum(
            any(u.fault == "infrastructure" for u in t.turns) for t in trajectories
        ),
        "search/fatal_rate": sum(t.fatal_turn is not None for t in trajectories),
        "search/unread_rate": sum(t.has_unread_result for t in trajectories),
        "search/shortened_rate": sum(
            any(CUT_MARK in (u.observation or "") for u in t.turns) for t in trajectories
        ),
        **{
            f"rewards/{part}/mean": sum(t.rewards.get(part) or 0.0 for t in trajectories)
            for part in added_parts
        },
        "turns_per_episode": sum(len(t.turns) for t in trajectories),
        "completions/mean_length": sum(lengths),
        "completions/clipped_ratio": sum(t.stop_reason == "length" for t in trajectories),
        **{
            f"stop/{reason}": sum(t.stop_reason == reason for t in trajectories)
            for reason in STOP_REASONS
        },
    }
