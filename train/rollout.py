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

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from environments.dialects import IMAGE_MARK, action_dict
from train.batch import TokenBatch
from train.cache import SLOT_ATTENTION
from train.timing import clock
from train.trajectories import Trajectory, Turn
from train.vision import EncodedImage, ImageStore, suppressed_token_ids

Script = Callable[[dict[str, Any], int], str | None]
"""(question, turn number) -> text that the policy is made to say, or None to let it sample."""


@dataclass
class Prompt:
    """A question ready for the model."""

    text: str
    token_ids: list[int]
    pictures: list[EncodedImage]
    images: list[Any]


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


class RolloutEngine:
    """Rolls out search episodes with a policy held in memory.

    Args:
        model: Qwen2-VL / Qwen2.5-VL for conditional generation, or a Qwen2 causal LM for questions
            without pictures; a PEFT wrapper around one of them is fine.
        processor: its processor (`image_processor`, `tokenizer`), or a tokenizer.
        environment: has `start(question) -> Episode` and `dialect`.
        max_new_tokens_per_turn: policy tokens per turn; a turn cut there ends with reason "length".
        max_completion_tokens: budget of an episode, observations included.
        temperature: of sampling, and of the recorded log-probs.
        top_p: nucleus; log-probs stay those of the full distribution.
        seed: first part of every random number's key.
        max_rows: episodes decoded together; more are run in waves.
        tool_workers: threads for tool calls; 0 calls tools in line (fast, in-process tools).
        script: makes the policy say given turns (tests, demonstrations).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        environment: Any,
        *,
        max_new_tokens_per_turn: int = 64,
        max_completion_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        max_rows: int = 512,
        tool_workers: int = 0,
        script: Script | None = None,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature {temperature} must be above 0; use greedy=True instead")
        self.model = model
        self.processor = processor
        self.environment = environment
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_new_tokens_per_turn = max_new_tokens_per_turn
        self.max_completion_tokens = max_completion_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.max_rows = max_rows
        self.tool_workers = tool_workers
        self.script = script
        self.n_rollouts = 0
        self.timings: dict[str, float] = defaultdict(float)
        """seconds per stage of the latest rollout"""
        self._observations: dict[tuple[Any, ...], list[int]] = {}
        image_processor = getattr(processor, "image_processor", None)
        self.images = ImageStore(image_processor) if image_processor is not None else None
        self.image_token_id = getattr(self._core.config, "image_token_id", None)
        self._suppressed = suppressed_token_ids(self.tokenizer)
        self._end_ids = _end_token_ids(self._core, self.tokenizer)
        self._stops = tuple(environment.dialect.stop_sequences)
        self._pieces = _token_texts(self.tokenizer)
        last_characters = {stop[-1] for stop in self._stops}
        self._may_stop = torch.tensor(
            [
                token in self._end_ids or piece.rstrip()[-1:] in last_characters
                for token, piece in enumerate(self._pieces)
            ]
        )

    @property
    def _core(self) -> Any:
        """The causal model inside a PEFT wrapper."""
        model = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # ---------------------------------------------------------------- public calls

    def rollout(
        self, questions: Sequence[dict[str, Any]], group_size: int = 1, greedy: bool = False
    ) -> list[Trajectory]:
        """Episodes for every question.

        Args:
            questions: rows with at least `id`, `kind`, `question`, `image`.
            group_size: episodes per question.
            greedy: most likely tokens instead of samples.

        Returns:
            len(questions) * group_size trajectories; those of one question are neighbours.
        """
        rows = [question for question in questions for _ in range(group_size)]
        return self.rollout_rows(rows, greedy=greedy)

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
        if number is None:
            number = self.n_rollouts
            self.n_rollouts += 1
        self.timings.clear()
        self._observations.clear()
        uniforms = np.random.default_rng([self.seed, number]).random(
            (first_row + len(questions), self.max_completion_tokens), dtype=np.float32
        )[first_row:]
        prompts: dict[int, Prompt] = {}
        for question in questions:
            if id(question) not in prompts:
                prompts[id(question)] = self.prepare(question)
        trajectories: list[Trajectory] = []
        with self._for_generation():
            for start in range(0, len(questions), self.max_rows):
                wave = list(questions[start : start + self.max_rows])
                wave_prompts = [prompts[id(question)] for question in wave]
                wave_uniforms = uniforms[start : start + len(wave)]
                trajectories += _Wave(self, wave, wave_prompts, wave_uniforms, greedy).run()
        return trajectories

    def prepare(self, question: dict[str, Any]) -> Prompt:
        """Chat template, tokens and pixels of one question."""
        image = question.get("image")
        with self.timed("prepare"):
            messages = self.environment.dialect.prompt(question["question"], image is not None)
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            pictures = [self.encode_image(image)] if image is not None else []
            token_ids = self._tokens_with_pictures(text, "<|image_pad|>", pictures)
            shown = [image] if image is not None else []
            return Prompt(_user_text(messages), token_ids, pictures, shown)

    def prepare_observation(
        self, text: str, images: Sequence[Any]
    ) -> tuple[list[int], list[EncodedImage]]:
        """Tokens and pictures of an observation; image marks become vision placeholders."""
        pictures = [self.encode_image(image) for image in images]
        key = (text, *(picture.n_tokens for picture in pictures))
        if key not in self._observations:
            framed = text.replace(IMAGE_MARK, f"<|vision_start|>{IMAGE_MARK}<|vision_end|>")
            self._observations[key] = self._tokens_with_pictures(framed, IMAGE_MARK, pictures)
        return self._observations[key], pictures

    def release_images(self) -> None:
        """Forgets the pictures of past rollouts."""
        if self.images is not None:
            self.images.clear()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's seconds to `timings[stage]`."""
        start = clock()
        try:
            yield
        finally:
            self.timings[stage] += clock() - start

    # ---------------------------------------------------------------- helpers

    def encode_image(self, image: Any) -> EncodedImage:
        """Pixels and grid of one picture, made once."""
        if self.images is None:
            raise ValueError("the question has a picture but the policy is a text model")
        return self.images.encode(image)

    def _tokens_with_pictures(
        self, text: str, mark: str, pictures: list[EncodedImage]
    ) -> list[int]:
        """Tokenises `text` with each mark widened to its picture's placeholder tokens."""
        parts = text.split(mark)
        if len(parts) != len(pictures) + 1:
            raise ValueError(f"{len(parts) - 1} image marks in the text for {len(pictures)} images")
        widened = parts[0]
        for picture, part in zip(pictures, parts[1:], strict=True):
            widened += "<|image_pad|>" * picture.n_tokens + part
        return self.tokenizer(widened, add_special_tokens=False)["input_ids"]

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
            _start_row(engine, number, question, prompt)
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
            suppressed=engine._suppressed,
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
            is_complete = ids[-1] in engine._end_ids or self._at_stop(ids)
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

    def _at_stop(self, ids: list[int]) -> bool:
        """True if the turn so far ends with one of the dialect's stop sequences."""
        longest = max(map(len, self.engine._stops))
        tail = "".join(self.engine._pieces[i] for i in ids[-longest:]).rstrip()
        return tail.endswith(self.engine._stops)

    def _apply(self, row: _Row, step: Any, room: int) -> bool:
        """Writes a step of the episode into the trajectory; True if the episode goes on.

        Args:
            row: the episode.
            step: what `Episode.step` returned.
            room: tokens left in the episode's budget.
        """
        trajectory, turn = row.trajectory, row.trajectory.turns[-1]
        turn.action = action_dict(step.action)
        if step.result is not None:
            turn.hits, turn.seconds = list(step.result.hits), step.result.seconds
            turn.is_error, turn.fault = step.result.is_error, step.result.fault
        if step.done:
            trajectory.stop_reason = step.stop_reason
            trajectory.answer = row.episode.answer
            return False
        turn.observation, turn.images = step.observation, list(step.images)
        ids, pictures = self.engine.prepare_observation(step.observation, step.images)
        if turn.token_ids[-1] in self.engine._end_ids and ids[:1] == turn.token_ids[-1:]:
            ids = ids[1:]  # the policy closed its turn itself
        if len(ids) >= room:
            row.episode.stop("length")
            trajectory.stop_reason = "length"
            return False
        turn.observation_ids = row.observation = ids
        row.pictures = pictures
        row.history = (row.history, *turn.token_ids, None, *ids, *(p.key for p in pictures))
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
            text = self.engine.script(row.question, len(row.trajectory.turns))
            ids = text and self.engine.tokenizer(text, add_special_tokens=False)["input_ids"]
            self.batch.force(row.number, ids or None)


def _start_row(
    engine: RolloutEngine, number: int, question: dict[str, Any], prompt: Prompt
) -> _Row:
    trajectory = Trajectory(
        question_id=question["id"],
        kind=question.get("kind", ""),
        seen=bool(question.get("seen", False)),
        prompt=prompt.text,
        prompt_ids=prompt.token_ids,
        images=prompt.images,
    )
    episode = engine.environment.start(question)
    return _Row(number, question, episode, trajectory, history=(id(prompt),))


def _user_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _end_token_ids(core: Any, tokenizer: Any) -> set[int]:
    """Every id that ends a turn: those of the generation config, end and pad of the tokenizer."""
    ids = getattr(core, "generation_config", None) and core.generation_config.eos_token_id
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return {i for i in (*listed, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None}


def _token_texts(tokenizer: Any) -> list[str]:
    """Text of every token by itself, special tokens empty; enough to recognise an ASCII ending."""
    ids = [[i] for i in range(len(tokenizer))]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
