"""The two objectives that the diagnosis of heads compares: search, and perception to keep.

Each is a list of losses, one a batch of episodes, whose sum is the objective:

    search, grpo    L = -sum_bt A_b log pi(token_bt) / n_tokens,   A of groups of sampled episodes
    search, agent   L = -sum_bt log pi(token_bt) / n_tokens,       the agent's right episodes
    keep            L = -sum_bt log pi(token_bt) / n_tokens,       the teacher's right answers

over the policy's own tokens t (observations do not count). The first is the gradient that GRPO
takes in its first step (ratio 1, token mean as in `loss_type: dapo`), with the rewards, the scale
and the masks of training; groups are not sampled again, and hops have no credit of their own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs.errors import ConfigError
from configs.schema import resolve_model
from rewards.answer import exact_match, final_answer
from rewards.compose import score_each
from rewards.functions import RewardFunction, add_functions, check_columns, load_functions
from rewards.judge import make_judge
from train.conflict import Loss
from train.groups import Groups, punish_length
from train.policy import load_policy
from train.scoring import ROWS_PER_BUCKET, ScoredRows, score_rows
from train.settings import resolved_grpo
from train.trajectories import Trajectory, loss_mask
from train.worlds import (
    build_engine,
    is_benchmark,
    load_benchmark,
    load_environment,
    load_questions,
    load_train_questions,
)

if TYPE_CHECKING:
    from configs.schema import Config


@dataclass
class Objective:
    """Losses whose sum is the objective, and what they are made of."""

    losses: list[Loss]
    n_episodes: int
    """episodes that have a gradient"""
    n_asked: int
    """episodes that were rolled out"""
    n_tokens: int
    """tokens of the policy in them"""

    def words(self) -> str:
        """For a person."""
        return f"{self.n_episodes} of {self.n_asked} episodes, {self.n_tokens} tokens"


def search_objective(config: Config, model: Any, processor: Any) -> Objective:
    """What training would descend on.

    Args:
        config: `conflict`, environment, rewards, `grpo` and models are used.
        model: the policy.
        processor: of the policy.

    Raises:
        ConfigError: no episode has a gradient.
    """
    section, grpo = config.conflict, resolved_grpo(config)
    if section.search == "agent":
        return _agent_objective(config, model)
    questions = _draw(load_train_questions(config), section.search_questions, section.seed)
    functions = load_functions(config.reward_functions)
    check_columns(functions, questions)
    engine = _engine(config, model, processor)
    episodes = engine.rollout(questions, section.group_size)
    asked = [question for question in questions for _ in range(section.group_size)]
    _score(config, engine, episodes, asked, functions)
    advantages = group_advantages(
        [episode.rewards["total"] for episode in episodes],
        section.group_size,
        grpo.get("scale_rewards", "group"),
    )
    masks_fatal = config.rewards.infrastructure_fault == "mask"
    masks_truncated = grpo.get("mask_truncated_completions", False)
    masks = [loss_mask(episode, masks_fatal, masks_truncated) for episode in episodes]
    if masks_fatal:  # what a dead service cut short is not blamed
        advantages = [
            advantage if episode.fatal_turn is None else max(0.0, advantage)
            for advantage, episode in zip(advantages, episodes, strict=True)
        ]
    chosen = [i for i, advantage in enumerate(advantages) if advantage != 0.0 and any(masks[i])]
    if not chosen:
        raise ConfigError(
            f"conflict.search: all episodes of each of {len(questions)} groups got one reward, or "
            "are masked, so there is no policy gradient; ask more (conflict.search_questions, "
            "group_size), or set conflict.search to agent"
        )
    losses, n_tokens = episode_losses(
        model,
        engine,
        [episodes[i] for i in chosen],
        torch.tensor([advantages[i] for i in chosen]),
        temperature=engine.temperature,
        batch_size=section.batch_size,
        masks=[masks[i] for i in chosen],
    )
    return Objective(losses, len(chosen), len(episodes), n_tokens)


def _score(
    config: Config,
    engine: Any,
    episodes: Sequence[Trajectory],
    asked: Sequence[dict[str, Any]],
    functions: Sequence[RewardFunction],
) -> None:
    """Gives episodes the rewards of training, part by part."""
    check_format = engine.environment.dialect.check_format
    scores = score_each(episodes, asked, config.rewards, check_format, make_judge(config.rewards))
    add_functions(functions, episodes, asked, scores)
    for episode, parts in zip(episodes, scores, strict=True):
        episode.rewards = parts
        punish_length(episode, config.algorithm, engine.max_completion_tokens)
    size, seed = config.conflict.group_size, config.conflict.seed
    groups = Groups(config.algorithm, size, len(asked), seed, all_rows=list, rank=0)
    groups.add_bonuses(list(episodes), list(episodes))


def _agent_objective(config: Config, model: Any) -> Objective:
    """The text agent's right episodes on text questions of the training split, greedy."""
    section = config.conflict
    questions = load_questions(
        config, "train", ["text"], section.search_questions, seed=section.seed
    )
    engine = _engine(config, *_load_teacher(config, "agent", "conflict.search to grpo"))
    right = _right_ones(engine.rollout(questions, greedy=True), questions)
    if not right:
        raise ConfigError(
            f"conflict.search: models.agent answers none of {len(questions)} text questions right; "
            "ask more (conflict.search_questions), or set conflict.search to grpo"
        )
    return _likelihood(config, model, engine, right, len(questions))


def keep_objective(config: Config, model: Any, processor: Any) -> Objective:
    """What training shall not make worse: right answers about pictures, without tools.

    Args:
        config: `conflict`, environment and models are used.
        model: the policy, the words' own teacher with `keep_words: init`.
        processor: of the policy.

    Raises:
        ConfigError: no teacher, or one that answers nothing right.
    """
    section = config.conflict
    if is_benchmark(section.keep_benchmark):
        questions = _draw(load_benchmark(section.keep_benchmark), section.keep_questions, 0)
    else:
        questions = load_questions(
            config, "train", section.keep_kinds, section.keep_questions, seed=section.seed
        )
    teacher = (model, processor)
    if section.keep_words == "vlm":
        teacher = _load_teacher(config, "vlm", "conflict.keep_words to init")
    environment = load_environment(config)
    environment.dialect = environment.dialect.without_tools()
    engine = _engine(config, *teacher, environment=environment)
    right = _right_ones(engine.rollout(questions, greedy=True), questions)
    if not right:
        raise ConfigError(
            f"conflict.keep_words: the teacher answers none of {len(questions)} questions right, "
            "so there is nothing to keep; choose other kinds (conflict.keep_kinds) or another "
            "teacher"
        )
    return _likelihood(config, model, engine, right, len(questions))


def group_advantages(
    rewards: Sequence[float | None], group_size: int, scale: str | bool = "group"
) -> list[float]:
    """GRPO's advantages (r - mean) / (std + 1e-4) within groups, as TRL has them.

    Episodes that cannot be scored get 0 and count for nothing.

    Args:
        rewards: of all episodes; the rows of a group are neighbours.
        group_size: episodes a group.
        scale: `grpo.scale_rewards`: std of the "group" (true), of the whole "batch", or "none"
            (false), which divides by nothing.
    """
    everything = torch.tensor([reward for reward in rewards if reward is not None])
    advantages: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        scored = torch.tensor([reward for reward in group if reward is not None])
        # one reward in all of a group: rounding must not make a gradient of it
        if len(scored) < 2 or scored.min() == scored.max():
            advantages += [0.0] * len(group)
            continue
        mean, divisor = float(scored.mean()), 1.0
        if scale not in ("none", False):
            divisor = float((everything if scale == "batch" else scored).std()) + 1e-4
        advantages += [0.0 if r is None else (r - mean) / divisor for r in group]
    return advantages


def _load_teacher(config: Config, role: str, otherwise: str) -> tuple[Any, Any]:
    folder = getattr(config.models, role)
    if not folder:
        raise ConfigError(f"models.{role}: missing; name a checkpoint, or set {otherwise}")
    model, processor = load_policy(resolve_model(folder), max_pixels=config.models.max_pixels)
    return model.to(config.conflict.device).eval(), processor


def _engine(config: Config, model: Any, processor: Any, **settings: Any) -> Any:
    seed = config.conflict.seed
    return build_engine(config, model, processor, rollout=None, seed=seed, **settings)


def _draw(questions: Sequence[Any], n: int, seed: int) -> list[Any]:
    if n >= len(questions):
        return list(questions)
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), n))]


def _right_ones(
    episodes: Sequence[Trajectory], questions: Sequence[dict[str, Any]]
) -> list[Trajectory]:
    return [
        episode
        for episode, question in zip(episodes, questions, strict=True)
        if exact_match(final_answer(episode), question["answers"])
    ]


# ---------------------------------------------------------------- episodes as losses


def _likelihood(
    config: Config, model: Any, engine: Any, episodes: Sequence[Trajectory], n_asked: int
) -> Objective:
    """Negative log-likelihood of these episodes, a mean over their tokens."""
    losses, n_tokens = episode_losses(
        model,
        engine,
        episodes,
        torch.ones(len(episodes)),
        temperature=1.0,
        batch_size=config.conflict.batch_size,
    )
    return Objective(losses, len(episodes), n_asked, n_tokens)


def episode_losses(
    model: Any,
    engine: Any,
    episodes: Sequence[Trajectory],
    weights: torch.Tensor,
    *,
    temperature: float,
    batch_size: int,
    masks: Sequence[Sequence[int]] | None = None,
) -> tuple[list[Loss], int]:
    """-sum_bt w_b log pi(token_bt) / n_tokens, in batches.

    Args:
        model: whose log-probs.
        engine: the one that rolled out, for its pictures.
        episodes: B.
        weights: w, float [B].
        temperature: the logits are divided by it.
        batch_size: most episodes a loss.
        masks: 1 for tokens that count, one mask an episode; None = all of the policy's.

    Returns:
        The losses and n_tokens, the tokens of all episodes that count.
    """
    if masks is None:
        masks = [episode.completion_mask for episode in episodes]
    n_tokens = sum(map(sum, masks))
    merge_size = engine.images.merge_size if engine.images else 2
    # two at least: the diagnosis compares halves
    n_batches = min(len(episodes), max(2, -(-len(episodes) // batch_size)))
    losses: list[Loss] = []
    for part in np.array_split(np.arange(len(episodes)), n_batches):
        rows = rows_of([episodes[i] for i in part], [masks[i] for i in part], engine)
        weight = weights[torch.from_numpy(part)] / n_tokens
        losses.append(partial(_loss, model, rows, weight, temperature, merge_size))
    return losses, n_tokens


def _loss(
    model: Any, rows: ScoredRows, weight: torch.Tensor, temperature: float, merge_size: int
) -> torch.Tensor:
    logps, _ = score_rows(model, rows, temperature, merge_size)
    return -(logps.sum(dim=1) * weight.to(logps.device)).sum()


def rows_of(
    episodes: Sequence[Trajectory], masks: Sequence[Sequence[int]], engine: Any
) -> ScoredRows:
    """Episodes as the scoring forward takes them; only the tokens of the masks are scored."""
    return ScoredRows(
        prompt_ids=[episode.prompt_ids for episode in episodes],
        completion_ids=[episode.completion_ids for episode in episodes],
        policy_mask=[np.array(mask, dtype=bool) for mask in masks],
        pictures=[[engine.encode_image(image) for image in e.all_images] for e in episodes],
        width=max(len(episode.completion_ids) for episode in episodes),
        n_buckets=-(-len(episodes) // ROWS_PER_BUCKET),
    )
