"""Multi-turn search episodes over a live key-value cache.

How it runs: every distinct prompt is prefilled once and its cache repeated for the group; then all
rows of all questions decode together. A row whose turn ends (closing tag of a call or answer, end
token, or budget) goes through its episode at once: a row that is done leaves the batch, a row that
gets an observation has it appended to its cache while the others wait for one forward only. No row
waits for another's turn. Tokens go in and come out; the policy's own tokens are never tokenised
again.

Differs from TRL's tool loop, which prefills the whole conversation again for every turn and every
copy of a prompt. Rows that have said the same so far and get the same result read it once.

Randomness: the token number t of row r of rollout number n depends on (seed, n, r, t) alone, so a
resumed run, another number of processes or another order of tool answers draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from train.batch import TokenBatch
from train.cache import SLOT_ATTENTION, rows_that_fit
from train.episodes import EpisodeEngine, Prompt, Script
from train.gpu import free_bytes
from train.trajectories import Trajectory, Turn
from train.vision import EncodedImage

__all__ = ["Prompt", "RolloutEngine", "Script"]


@dataclass
class _Row:
    """One episode under way."""

    number: int
    """index into the rollout's rows: picks the random numbers and the place of the result"""
    question: dict[str, Any]
    episode: Any
    trajectory: Trajectory
    history: tuple[Any, ...]
    """what the row has in its context; equal histories have equal caches"""
    turn_start: int = 0
    """policy tokens before the current turn"""
    observation: list[int] = field(default_factory=list)
    """tokens to append before the next turn"""
    pictures: list[EncodedImage] = field(default_factory=list)
    future: Future[Any] | None = None


class RolloutEngine(EpisodeEngine):
    """Rolls out search episodes with a policy held in memory.

    Args:
        model: see `EpisodeEngine`.
        processor: see there.
        environment: see there.
        settings: its keyword arguments; `max_rows` episodes decode together, more are run in waves.
    """

    def __init__(self, model: Any, processor: Any, environment: Any, **settings: Any) -> None:
        super().__init__(model, processor, environment, **settings)
        last_characters = {stop[-1] for stop in self._stops}
        self._may_stop = torch.tensor(
            [
                token in self._end_ids or piece.rstrip()[-1:] in last_characters
                for token, piece in enumerate(self._pieces)
            ]
        )

    @torch.inference_mode()
    def rollout_rows(
        self,
        questions: Sequence[dict[str, Any]],
        *,
        greedy: bool = False,
        first_row: int = 0,
        number: int | None = None,
    ) -> list[Trajectory]:
        """One episode per row; neighbouring rows that hold the same question share its prefill.

        Args:
            questions: one question per episode.
            greedy: most likely tokens instead of samples.
            first_row: number of the first row among all processes' rows.
            number: number of this rollout, the second part of the random key; by default they
                are counted.

        Returns:
            One trajectory per row.
        """
        number, prompts = self._begin(questions, number)
        uniforms = np.random.default_rng([self.seed, number]).random(
            (first_row + len(questions), self.max_completion_tokens), dtype=np.float32
        )[first_row:]
        trajectories: list[Trajectory] = []
        with self._for_generation():
            n_rows = self._rows_together(prompts)
            for start in range(0, len(questions), n_rows):
                wave = list(questions[start : start + n_rows])
                rows = slice(start, start + len(wave))
                trajectories += _Wave(self, wave, prompts[rows], uniforms[rows], greedy).run()
        return trajectories

    # ---------------------------------------------------------------- helpers

    def _rows_together(self, prompts: Sequence[Prompt]) -> int:
        """Rows of a wave."""
        weight = self._core.get_output_embeddings().weight
        free = free_bytes(weight.device) if self.fits_memory else None
        if free is None or not prompts:
            return self.max_rows
        n_slots = max(len(prompt.token_ids) for prompt in prompts) + self.max_completion_tokens + 1
        config = self._core.config.get_text_config()
        return min(self.max_rows, rows_that_fit(config, weight.dtype, n_slots, free))

    @contextmanager
    def _for_generation(self) -> Iterator[None]:
        """Evaluation mode and an attention that takes explicit masks, for the block."""
        text_config = self._core.config.get_text_config()
        was_training, attention = self.model.training, text_config._attn_implementation
        self.model.eval()
        text_config._attn_implementation = SLOT_ATTENTION
        try:
            yield
        finally:
            text_config._attn_implementation = attention
            self.model.train(was_training)


class _Wave:
    """Up to `max_rows` episodes that decode together; `rows[i]` is row i of the token batch."""

    def __init__(
        self,
        engine: RolloutEngine,
        questions: list[dict[str, Any]],
        prompts: list[Prompt],
        uniforms: np.ndarray,
        greedy: bool,
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self.rows = [
            _Row(number, question, *engine._start(question, prompt), history=(id(prompt),))
            for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True))
        ]
        self.trajectories = [row.trajectory for row in self.rows]
        self.batch = TokenBatch(
            engine._core,
            len(prompts),
            max(len(prompt.token_ids) for prompt in prompts),
            engine.max_completion_tokens,
            uniforms,
            temperature=engine.temperature,
            top_p=engine.top_p,
            greedy=greedy,
            suppressed=[*engine._suppressed, *engine._unnamed],
            merge_size=engine.images.merge_size if engine.images else 2,
        )
        self.may_stop = engine._may_stop.to(self.batch.device)

    def run(self) -> list[Trajectory]:
        """Runs all episodes to their end."""
        engine, batch = self.engine, self.batch
        pool = ThreadPoolExecutor(engine.tool_workers) if engine.tool_workers else None
        try:
            with engine.timed("prefill"):
                batch.prefill(
                    [prompt.token_ids for prompt in self.prompts],
                    [prompt.pictures for prompt in self.prompts],
                    [id(prompt) for prompt in self.prompts],
                )
                self._open_turns(self.rows)
            while self.rows:
                with engine.timed("sample"):
                    ended = self._sample()
                with engine.timed("tools"):
                    ready, done = self._end_turns(ended, pool)
                    if ready or done or (pool is not None and self._has_waiting()):
                        ready = self._arrange(ready, done, pool)
                if not self.rows:
                    break
                with engine.timed("decode"):
                    batch.decode()
                if ready:
                    with engine.timed("observe"):
                        self._observe(ready)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        return self.trajectories

    # ---------------------------------------------------------------- a turn's end

    def _sample(self) -> list[int]:
        """Draws a token per active row; returns the rows whose turn may be over."""
        batch, engine = self.batch, self.engine
        n = batch.n_active
        is_over = self.may_stop[batch.sample()]
        is_over |= batch.n_in_turn[:n] >= engine.max_new_tokens_per_turn
        is_over |= batch.length[:n] + 1 >= batch.limit[:n]
        return is_over.nonzero()[:, 0].tolist()

    def _end_turns(
        self, ended: list[int], pool: ThreadPoolExecutor | None
    ) -> tuple[list[int], list[int]]:
        """Checks the given rows and passes finished turns to their episodes.

        Returns:
            Rows with an observation to append, and rows whose episode is over.
        """
        ready: list[int] = []
        done: list[int] = []
        if not ended:
            return ready, done
        batch, engine = self.batch, self.engine
        index = torch.tensor(ended, device=batch.device)
        numbers = batch.number[index]
        tokens, logprobs = batch.tokens[numbers].tolist(), batch.logprobs[numbers].tolist()
        entropies = batch.entropies[numbers].tolist()
        n_sampled, n_in_turn = batch.n_sampled[index].tolist(), batch.n_in_turn[index].tolist()
        rooms = (batch.limit[index] - batch.length[index] - 1).tolist()
        for i, place in enumerate(ended):
            row = self.rows[place]
            turn = slice(row.turn_start, n_sampled[i])
            ids = tokens[i][turn]
            is_complete = engine._is_complete(ids)
            is_cut = n_in_turn[i] >= engine.max_new_tokens_per_turn or rooms[i] <= 0
            if not is_complete and not is_cut:
                continue
            text = engine.tokenizer.decode(ids, skip_special_tokens=True)
            row.turn_start = n_sampled[i]
            row.trajectory.turns.append(Turn(text, ids, logprobs[i][turn], {}, entropies[i][turn]))
            if pool is not None:
                row.future = pool.submit(row.episode.step, text, truncated=not is_complete)
                continue
            step = row.episode.step(text, truncated=not is_complete)
            (ready if self._apply(row, step, rooms[i]) else done).append(place)
        return ready, done

    def _apply(self, row: _Row, step: Any, room: int) -> bool:
        """Writes a step of the episode into the trajectory; True if the episode goes on."""
        trajectory = row.trajectory
        pictures = self.engine._apply(row.episode, trajectory, step, room)
        if pictures is None:
            return False
        turn = trajectory.turns[-1]
        row.observation, row.pictures = turn.observation_ids, pictures
        keys = (picture.key for picture in pictures)
        row.history = (row.history, *turn.token_ids, None, *turn.observation_ids, *keys)
        return True

    # ---------------------------------------------------------------- between tokens

    def _arrange(
        self, ready: list[int], done: list[int], pool: ThreadPoolExecutor | None
    ) -> list[int]:
        """Reorders the batch: rows that decode first, then those that wait for a tool.

        Returns:
            The rows with an observation, after the reordering.
        """
        while True:
            if pool is not None:
                self._collect(ready, done)
            gone, ready_numbers = set(done), {self.rows[i].number for i in ready}
            stay = [i for i in range(len(self.rows)) if i not in gone]
            active = [i for i in stay if self.rows[i].future is None]
            waiting = [i for i in stay if self.rows[i].future is not None]
            self.rows = [self.rows[i] for i in self.batch.reorder(active, waiting)]
            if active or not waiting:
                return [i for i in range(len(active)) if self.rows[i].number in ready_numbers]
            ready, done = [], []

    def _has_waiting(self) -> bool:
        return any(row.future is not None for row in self.rows)

    def _collect(self, ready: list[int], done: list[int]) -> None:
        """Takes over the answers of tools that have finished; waits if nothing else can be done."""
        waiting = {i: row.future for i, row in enumerate(self.rows) if row.future is not None}
        if waiting and len(waiting) + len(done) == len(self.rows):
            wait(waiting.values(), return_when=FIRST_COMPLETED)
        for place, future in waiting.items():
            if future.done():
                row = self.rows[place]
                row.future = None
                goes_on = self._apply(row, future.result(), self.batch.room(place))
                (ready if goes_on else done).append(place)

    def _observe(self, places: list[int]) -> None:
        """Appends the observations of these rows and opens their next turns."""
        rows = [self.rows[place] for place in places]
        self.batch.append(
            places,
            [row.observation for row in rows],
            [row.pictures for row in rows],
            [row.history for row in rows],
        )
        self._open_turns(rows)

    def _open_turns(self, rows: list[_Row]) -> None:
        """Hands the next scripted turn to the batch, if there is a script."""
        if self.engine.script is None:
            return
        for row in rows:
            ids = self.engine._scripted_ids(row.question, len(row.trajectory.turns))
            self.batch.force(row.number, ids)
