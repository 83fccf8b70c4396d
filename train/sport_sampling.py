"""SPORT's step sampling: several candidates for every step, each executed in the real environment.

All tasks of an iteration go on in lockstep: their next steps are sampled in one rollout, verified,
and each task continues with its best candidate (the first one where there is no verdict or none is
better). Pairs of a chosen and a rejected step share the exact tokens before them; nothing is ever
tokenised a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from train.rollout import RolloutEngine
from train.sport_verify import Scores, Step, Verifier, same_action
from train.trajectories import Trajectory, Turn

if TYPE_CHECKING:
    from configs.sections import Sport
    from train.episodes import Prompt

MAX_STEPS = 10_000
"""Numbers of rollouts that an iteration keeps for itself, so that none repeats another's draws."""


@dataclass(frozen=True)
class StepPair:
    """Two candidates for one step, and everything before it."""

    question_id: str
    step: int
    """turns before it"""
    prompt_ids: list[int]
    """tokens before the step: prompt, turns, observations"""
    images: list[Any]
    """pictures among them, in order"""
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen: str
    rejected: str
    margin: float
    """difference of scores"""

    def to_dict(self) -> dict[str, Any]:
        """A line of pairs.jsonl; the tokens before the step are counted, not kept."""
        return {
            "question_id": self.question_id,
            "step": self.step,
            "n_before": len(self.prompt_ids),
            "n_images": len(self.images),
            "chosen": self.chosen,
            "rejected": self.rejected,
            "chosen_ids": self.chosen_ids,
            "rejected_ids": self.rejected_ids,
            "margin": round(self.margin, 4),
        }


@dataclass
class Sampled:
    """What an iteration sampled."""

    pairs: list[StepPair] = field(default_factory=list)
    episodes: list[Trajectory] = field(default_factory=list)
    """one a task: the path of best candidates"""
    journal: list[dict[str, Any]] = field(default_factory=list)
    """a line a step: all candidates, their scores, which was chosen"""
    n_unverified: int = 0
    """steps without a verdict"""

    @property
    def n_candidates(self) -> int:
        """Steps that were executed."""
        return sum(len(line["candidates"]) for line in self.journal)


def sample_steps(
    engine: TurnEngine,
    tasks: Sequence[dict[str, Any]],
    verifier: Verifier,
    settings: Sport,
    number: int,
) -> Sampled:
    """Plays all tasks to their end, each step the best of `settings.samples`.

    Args:
        engine: holds policy and environment.
        tasks: questions.
        verifier: scores the candidates.
        settings: the section `sport`.
        number: of the first rollout; decides, with the engine's seed, on every draw.

    Returns:
        Pairs, episodes and journal; the same for the same arguments.
    """
    sampled = Sampled()
    running = [engine.begin(task) for task in tasks]
    states = list(running)
    while running:
        candidates = engine.sample_turns(running, settings.samples, number)
        steps = [
            Step(state.question, state.trajectory.turns, [c.trajectory for c in found])
            for state, found in zip(running, candidates, strict=True)
        ]
        verdicts = verifier.score(steps)
        following: list[State] = []
        for state, found, scores in zip(running, candidates, verdicts, strict=True):
            best = choose(scores)
            sampled.n_unverified += all(score is None for score in scores)
            pairs = make_pairs(state, [c.trajectory.turns[-1] for c in found], scores, settings)
            sampled.pairs += pairs
            sampled.journal.append(_line(state, found, scores, best, len(pairs)))
            state.trajectory, state.episode = found[best].trajectory, found[best].episode
            if not state.trajectory.stop_reason:
                following.append(state)
        running = following
        number += 1
    sampled.episodes = [state.trajectory for state in states]
    sampled.pairs = without_repeats(sampled.pairs)
    return sampled


# ---------------------------------------------------------------- candidates


@dataclass
class State:
    """A task on its way: the episode, and what the policy has lived of it."""

    question: dict[str, Any]
    episode: Any
    trajectory: Trajectory


class TurnEngine(RolloutEngine):
    """A rollout engine that plays one turn at a time from any point of an episode.

    Its rows are dicts with the key `state`; the tokens before the turn are their prompt.

    Args:
        model: see `train.rollout.RolloutEngine`.
        processor: see there.
        environment: the real environment.
        settings: keyword arguments of `EpisodeEngine`.
    """

    def __init__(self, model: Any, processor: Any, environment: Any, **settings: Any) -> None:
        self._turns = _OneTurnEnvironment(environment)
        super().__init__(model, processor, self._turns, **settings)

    def begin(self, question: dict[str, Any]) -> State:
        """A task before its first step."""
        prompt = super().prepare(question)
        trajectory = Trajectory(
            question_id=question["id"],
            kind=question.get("kind", ""),
            seen=bool(question.get("seen", False)),
            prompt=prompt.text,
            prompt_ids=prompt.token_ids,
            images=prompt.images,
        )
        return State(question, self._turns.environment.start(question), trajectory)

    def prepare(self, question: dict[str, Any]) -> Prompt:
        """Everything before the turn of a row, as its prompt."""
        from train.episodes import Prompt

        past = question["state"].trajectory
        pictures = [self.encode_image(image) for image in past.all_images]
        ids = [*past.prompt_ids, *past.completion_ids]
        return Prompt(past.prompt, ids, pictures, past.all_images)

    def sample_turns(self, states: Sequence[State], n: int, number: int) -> list[list[State]]:
        """n executed candidates for the next turn of each state.

        Args:
            states: running tasks; they stay as they are.
            n: candidates each.
            number: of the rollout.

        Returns:
            Per state n states after the turn; a candidate that ended its episode has a
            `trajectory.stop_reason`.
        """
        rows = [{"id": state.question["id"], "state": state} for state in states]
        self._turns.started = []
        episodes = self.rollout_rows([row for row in rows for _ in range(n)], number=number)
        after = [
            self._finish(state, played, turn_episode)
            for state, played, turn_episode in zip(
                [state for state in states for _ in range(n)],
                episodes,
                self._turns.started,
                strict=True,
            )
        ]
        return [after[start : start + n] for start in range(0, len(after), n)]

    def _finish(self, state: State, played: Trajectory, one_turn: _OneTurn) -> State:
        """The state after a turn: its observation is read in the episode's own token budget."""
        [turn] = played.turns
        trajectory = replace(state.trajectory, turns=[*state.trajectory.turns, turn])
        step, episode = one_turn.taken, one_turn.episode
        room = self.max_completion_tokens - len(trajectory.completion_ids)
        if room < 0 and not step.done:
            episode.stop("length")
            trajectory.stop_reason = "length"
            return State(state.question, episode, trajectory)
        self._apply(episode, trajectory, step, room)
        return State(state.question, episode, trajectory)


class _OneTurn:
    """Stands in for an episode during one turn: the real one takes it, and here it is over."""

    def __init__(self, episode: Any) -> None:
        self.episode = episode
        self.taken: Any = None

    @property
    def answer(self) -> str | None:
        return self.episode.answer

    def step(self, turn_text: str, truncated: bool = False) -> Any:
        """Executes the turn."""
        self.taken = self.episode.step(turn_text, truncated)
        return replace(self.taken, done=True, stop_reason=self.taken.stop_reason or "turn")


class _OneTurnEnvironment:
    """Starts, for a row, a fork of its episode; keeps them in the order of the rows."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.dialect = environment.dialect
        self.started: list[_OneTurn] = []

    def start(self, question: dict[str, Any]) -> _OneTurn:
        self.started.append(_OneTurn(question["state"].episode.fork()))
        return self.started[-1]


# ---------------------------------------------------------------- preferences


def choose(scores: Scores) -> int:
    """Index of the best candidate, the first of equals; 0 where none has a score."""
    known = [(score, -i) for i, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else 0


def make_pairs(
    state: State, turns: Sequence[Turn], scores: Scores, settings: Sport
) -> list[StepPair]:
    """Pairs of the best candidate with each that is worse by the margin and not nearly the same.

    Equal candidates come in once, at most `max_illegal` of those that are no legal step.
    """
    best = choose(scores)
    top = scores[best]
    if top is None:
        return []
    past, pairs, seen, n_illegal = state.trajectory, [], set(), 0
    chosen = turns[best]
    for turn, score in zip(turns, scores, strict=True):
        if score is None or top - score < settings.margin - 1e-9:
            continue
        key = tuple(turn.token_ids)
        if key in seen or is_near_duplicate(chosen, turn, settings.max_similarity):
            continue
        is_illegal = turn.action["type"] == "invalid" or turn.is_error
        if is_illegal and n_illegal >= settings.max_illegal:
            continue
        n_illegal += is_illegal
        seen.add(key)
        pairs.append(
            StepPair(
                question_id=past.question_id,
                step=len(past.turns),
                prompt_ids=[*past.prompt_ids, *past.completion_ids],
                images=past.all_images,
                chosen_ids=list(chosen.token_ids),
                rejected_ids=list(turn.token_ids),
                chosen=chosen.text,
                rejected=turn.text,
                margin=top - score,
            )
        )
    return pairs


def is_near_duplicate(one: Turn, other: Turn, max_similarity: float) -> bool:
    """Whether two steps ask for the same, or share nearly all their words in order.

    Deviation from the source, which keeps pairs below a character-level BLEU of 0.3: steps of a
    search agent are short and share their tags, and the pair that differs in one word says most.
    """
    if one.action["type"] != "invalid" and same_action(one, other):
        return True
    return similarity(one.text, other.text) > max_similarity


def similarity(one: str, other: str) -> float:
    """Share of words in common, in order (Ratcliff-Obershelp): 2 M / T, 0 to 1."""
    return SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio()


def without_repeats(pairs: Sequence[StepPair]) -> list[StepPair]:
    """Each pair of steps after the same tokens once, the first of them."""
    found: dict[tuple[Any, ...], StepPair] = {}
    for pair in pairs:
        key = (tuple(pair.prompt_ids), tuple(pair.chosen_ids), tuple(pair.rejected_ids))
        found.setdefault((*key, pair.question_id), pair)
    return list(found.values())


def _line(
    state: State, candidates: Sequence[State], scores: Scores, best: int, n_pairs: int
) -> dict[str, Any]:
    """A line of steps.jsonl."""
    return {
        "question_id": state.question["id"],
        "step": len(state.trajectory.turns),
        "chosen": best,
        "n_pairs": n_pairs,
        "candidates": [
            {
                "text": turn.text,
                "action": turn.action,
                "observation": turn.observation,
                "hits": turn.hits,
                "is_error": turn.is_error,
                "fault": turn.fault,
                "stop_reason": candidate.trajectory.stop_reason,
                "score": None if score is None else round(score, 4),
            }
            for candidate, score in zip(candidates, scores, strict=True)
            for turn in [candidate.trajectory.turns[-1]]
        ],
    }
