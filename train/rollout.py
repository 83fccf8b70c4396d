"""Multi-turn search episodes over a live key-value cache.

How it runs: every distinct prompt is prefilled once and its cache repeated for the group; then all
rows of all questions decode together. A row whose turn ends (closing tag of a call or answer, end
token, or budget) goes through its episode at once: a row that is done leaves the batch, a row that
gets an observation has it appended to its cache while the others wait for one forward only. No row
waits for another's turn. Tokens go in and come out; the policy's own tokens are never tokenised
again.

Differs from TRL's tool loop, which prefills the whole conversation again for every turn and every
copy of a prompt.

Randomness: the token number t of row r of rollout number n depends on (seed, n, r, t) alone, so a
resumed run, another number of processes or another order of tool answers draws the same tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from environments.dialects import IMAGE_MARK, action_dict
from train.cache import PrefillCache, SlotCache
from train.trajectories import Trajectory, Turn
from train.vision import (
    EncodedImage,
    ImageStore,
    encode_pictures,
    mrope_positions,
    suppressed_token_ids,
)

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
    n_prompt: int
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
        image_processor = getattr(processor, "image_processor", None)
        self.images = ImageStore(image_processor) if image_processor is not None else None
        self.image_token_id = getattr(self._core.config, "image_token_id", None)
        self._suppressed = suppressed_token_ids(self.tokenizer)
        self._end_ids = _end_token_ids(self._core, self.tokenizer)
        self._stops = tuple(environment.dialect.stop_sequences)
        self._pieces = _token_texts(self.tokenizer)
        last_characters = {stop[-1] for stop in self._stops}
        self._may_stop = torch.tensor(
            [piece.rstrip()[-1:] in last_characters for piece in self._pieces]
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
                run = _Wave(self, wave, wave_prompts, wave_uniforms, greedy)
                trajectories += run.run()
        return trajectories

    def prepare(self, question: dict[str, Any]) -> Prompt:
        """Chat template, tokens and pixels of one question."""
        image = question.get("image")
        with self.timed("prepare"):
            messages = self.environment.dialect.prompt(question["question"], image is not None)
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            pictures = [self._encode(image)] if image is not None else []
            token_ids = self._tokens_with_pictures(text, "<|image_pad|>", pictures)
            shown = [image] if image is not None else []
            return Prompt(_user_text(messages), token_ids, pictures, shown)

    def prepare_observation(
        self, text: str, images: Sequence[Any]
    ) -> tuple[list[int], list[EncodedImage]]:
        """Tokens and pictures of an observation; image marks become vision placeholders."""
        pictures = [self._encode(image) for image in images]
        framed = text.replace(IMAGE_MARK, f"<|vision_start|>{IMAGE_MARK}<|vision_end|>")
        return self._tokens_with_pictures(framed, IMAGE_MARK, pictures), pictures

    def release_images(self) -> None:
        """Forgets the pictures of past rollouts."""
        if self.images is not None:
            self.images.clear()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's seconds to `timings[stage]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] += time.perf_counter() - start

    # ---------------------------------------------------------------- helpers

    def _encode(self, image: Any) -> EncodedImage:
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
        text_config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            text_config._attn_implementation = attention
            self.model.train(was_training)


class _Wave:
    """Up to `max_rows` episodes that decode together.

    Batch layout: positions [0, n_active) decode, the rows behind them wait for a tool. `rows[i]`,
    `length[i]`, ... describe the episode at batch position i, and cache row i is its cache.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        questions: list[dict[str, Any]],
        prompts: list[Prompt],
        uniforms: np.ndarray,
        greedy: bool,
    ) -> None:
        self.engine = engine
        self.greedy = greedy
        core = engine._core
        self.backbone, self.head = core.model, core.get_output_embeddings()
        self.device = self.head.weight.device
        self.is_vlm = engine.image_token_id is not None
        self.prompts = prompts
        self.rows = [
            _start_row(engine, number, question, prompt)
            for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True))
        ]
        self.trajectories = [row.trajectory for row in self.rows]
        n, budget = len(self.rows), engine.max_completion_tokens
        longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
        # one spare slot takes the padding of short observations
        self.cache = SlotCache(n, longest_prompt + budget + 1)
        _refuse_sliding_window(core, self.cache.n_slots)
        self.n_active = n
        long = {"dtype": torch.long, "device": self.device}
        self.number = torch.arange(n, **long)
        self.length = torch.zeros(n, **long)  # tokens in the cache
        self.limit = torch.zeros(n, **long)  # cache length at which the episode's budget is spent
        self.position = torch.zeros(n, **long)  # M-RoPE position of the next text token
        self.n_sampled = torch.zeros(n, **long)  # policy tokens of the episode
        self.turn_tokens = torch.zeros(n, **long)  # policy tokens of the turn
        self.last_token = torch.zeros(n, **long)  # sampled, not yet in the cache
        self.tokens = torch.zeros((n, budget), **long)  # [row number, policy token]
        self.logprobs = torch.zeros((n, budget), device=self.device)
        self.uniforms = torch.from_numpy(uniforms).to(self.device)
        self.scripted = self._script_tensor() if engine.script else None
        self.may_stop = engine._may_stop.to(self.device)
        end_ids = torch.tensor(sorted(engine._end_ids), **long)
        self.may_stop = self.may_stop.clone()
        self.may_stop[end_ids] = True
        self.suppressed = torch.tensor(engine._suppressed, **long)
        self.slot_numbers = torch.arange(self.cache.n_slots, device=self.device)
        self.features: dict[str, torch.Tensor] = {}
        self.logits = torch.empty(0)

    def run(self) -> list[Trajectory]:
        """Runs all episodes to their end."""
        engine = self.engine
        workers = engine.tool_workers
        pool = ThreadPoolExecutor(workers) if workers else None
        try:
            with engine.timed("prefill"):
                self._prefill()
            while self.rows:
                with engine.timed("sample"):
                    ended = self._sample()
                with engine.timed("tools"):
                    ready, done = self._end_turns(ended, pool)
                if ready or done or (pool is not None and self._has_waiting()):
                    ready = self._arrange(ready, done, pool)
                    while self.rows and not self.n_active:
                        ready = self._arrange([], [], pool)
                if not self.rows:
                    break
                with engine.timed("decode"):
                    self._decode()
                if ready:
                    with engine.timed("observe"):
                        self._observe(ready)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        return self.trajectories

    # ---------------------------------------------------------------- prefill

    def _prefill(self) -> None:
        """Reads every distinct prompt once and spreads its cache over the group."""
        groups: list[tuple[Prompt, int]] = []
        for prompt in self.prompts:
            if groups and groups[-1][0] is prompt:
                groups[-1] = (prompt, groups[-1][1] + 1)
            else:
                groups.append((prompt, 1))
        logits, first = [], 0
        for start in range(0, len(groups), 128):
            chunk = groups[start : start + 128]
            counts = [count for _, count in chunk]
            cache = PrefillCache()
            hidden, after = self._read(
                [prompt.token_ids for prompt, _ in chunk],
                [prompt.pictures for prompt, _ in chunk],
                [0] * len(chunk),
                cache,
                masks=None,
            )
            self.cache.fill(cache, counts, first)
            spread = torch.repeat_interleave(torch.tensor(counts, device=self.device))
            logits.append(self.head(hidden)[spread])
            rows = slice(first, first + len(spread))
            lengths = [len(prompt.token_ids) for prompt, _ in chunk]
            self.length[rows] = torch.tensor(lengths, device=self.device)[spread]
            self.position[rows] = torch.tensor(after, device=self.device)[spread]
            first += len(spread)
        self.limit = self.length + self.engine.max_completion_tokens
        self.logits = torch.cat(logits)

    def _read(
        self,
        token_ids: list[list[int]],
        pictures: list[list[EncodedImage]],
        starts: list[int],
        cache: Any,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Runs right-padded rows through the backbone.

        Args:
            token_ids: B rows of tokens.
            pictures: pictures of each row, in order of their placeholders.
            starts: M-RoPE position of each row's first token.
            cache: takes the keys and values.
            masks: bool [B, 1, T, width]; None means causal among these tokens. Padding lies
                behind a row's tokens, so no token sees it.

        Returns:
            Hidden state of each row's last token [B, hidden], and the next position of each row.
        """
        width = max(map(len, token_ids))
        n = len(token_ids)
        ids = np.zeros((n, width), dtype=np.int64)
        positions = np.zeros((3, n, width), dtype=np.int64)
        after = []
        merge_size = self.engine.images.merge_size if self.engine.images else 2
        for i, (row, images, start) in enumerate(zip(token_ids, pictures, starts, strict=True)):
            ids[i, : len(row)] = row
            positions[:, i, : len(row)], end = mrope_positions(
                row, [p.grid for p in images], self.engine.image_token_id, merge_size, start
            )
            after.append(end)
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(self.device)}
        shown = [picture for images in pictures for picture in images]
        if shown:
            new = [picture for picture in shown if picture.key not in self.features]
            self.features |= encode_pictures(self.backbone, new)
            features = tuple(self.features[picture.key] for picture in shown)
            inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=features)}
        hidden = self._forward(inputs, torch.from_numpy(positions).to(self.device), cache, masks)
        last = torch.tensor([len(row) - 1 for row in token_ids], device=self.device)
        return hidden[torch.arange(n, device=self.device), last], after

    def _forward(
        self,
        inputs: dict[str, Any],
        positions: torch.Tensor,
        cache: Any,
        masks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Backbone call with explicit positions [3, B, T] and masks; hidden states [B, T, H]."""
        return self.backbone(
            **inputs,
            position_ids=positions if self.is_vlm else positions[0],
            attention_mask={"full_attention": masks, "sliding_attention": masks},
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    # ---------------------------------------------------------------- decode

    def _sample(self) -> list[int]:
        """Draws one token per active row; returns the batch positions whose turn may be over."""
        n = self.n_active
        logits = self.logits.float() / self.engine.temperature
        normalizer = torch.logsumexp(logits, dim=-1)
        if self.greedy:
            allowed = logits.index_fill(1, self.suppressed, -torch.inf)
            token = allowed.argmax(dim=-1)
        else:
            probs = torch.exp(logits - normalizer[:, None])
            probs[:, self.suppressed] = 0.0
            if self.engine.top_p < 1.0:
                probs = _nucleus(probs, self.engine.top_p)
            draw = self.uniforms[self.number[:n], self.n_sampled[:n]]
            token = _inverse_cdf(probs, draw)
        if self.scripted is not None:
            forced = self.scripted[self.number[:n], self.turn_tokens[:n]]
            token = torch.where(forced >= 0, forced, token)
        chosen = logits.gather(1, token[:, None])[:, 0] - normalizer
        self.tokens[self.number[:n], self.n_sampled[:n]] = token
        self.logprobs[self.number[:n], self.n_sampled[:n]] = chosen
        self.last_token[:n] = token
        self.n_sampled[:n] += 1
        self.turn_tokens[:n] += 1
        is_over = self.may_stop[token]
        is_over |= self.turn_tokens[:n] >= self.engine.max_new_tokens_per_turn
        is_over |= self.length[:n] + 1 >= self.limit[:n]
        return is_over.nonzero()[:, 0].tolist()

    def _decode(self) -> None:
        """Feeds the last token of every active row."""
        n = self.n_active
        slots = self.length[:n, None]
        width = int(slots.max()) + 1
        self.cache.select(n, slots, width)
        masks = (self.slot_numbers[:width] <= slots)[:, None, None, :]
        positions = self.position[:n, None].expand(3, n, 1)
        hidden = self._forward(
            {"input_ids": self.last_token[:n, None]}, positions, self.cache, masks
        )
        self.logits = self.head(hidden[:, -1])
        self.length[:n] += 1
        self.position[:n] += 1

    # ---------------------------------------------------------------- turns

    def _end_turns(
        self, ended: list[int], pool: ThreadPoolExecutor | None
    ) -> tuple[list[int], list[int]]:
        """Checks the given batch positions and passes finished turns to their episodes.

        Returns:
            Positions with an observation to append, and positions whose episode is over.
        """
        ready, done = [], []
        if not ended:
            return ready, done
        index = torch.tensor(ended, device=self.device)
        numbers = self.number[index]
        tokens, logprobs = self.tokens[numbers].tolist(), self.logprobs[numbers].tolist()
        sampled, n_turn = self.n_sampled[index].tolist(), self.turn_tokens[index].tolist()
        lengths, limits = self.length[index].tolist(), self.limit[index].tolist()
        for i, place in enumerate(ended):
            row = self.rows[place]
            turn = slice(row.turn_start, sampled[i])
            ids = tokens[i][turn]
            is_complete = ids[-1] in self.engine._end_ids or self._at_stop(ids)
            is_cut = n_turn[i] >= self.engine.max_new_tokens_per_turn or lengths[i] + 1 >= limits[i]
            if not is_complete and not is_cut:
                continue
            text = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
            row.turn_start = sampled[i]
            row.trajectory.turns.append(Turn(text, ids, logprobs[i][turn], {}))
            if pool is not None:
                row.future = pool.submit(row.episode.step, text, truncated=not is_complete)
                continue
            step = row.episode.step(text, truncated=not is_complete)
            if self._apply(row, step, limits[i] - lengths[i] - 1):
                ready.append(place)
            else:
                done.append(place)
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
            room: tokens left in the episode's budget, the turn's last token already counted.
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
        return True

    def _arrange(
        self, ready: list[int], done: list[int], pool: ThreadPoolExecutor | None
    ) -> list[int]:
        """Reorders the batch: rows that decode first, then those that wait for a tool.

        Returns:
            The positions of the rows with an observation, after the reordering.
        """
        if pool is not None:
            ready, done = self._collect(ready, done)
        gone, ready_rows = set(done), {self.rows[i].number for i in ready}
        stay = [i for i in range(len(self.rows)) if i not in gone]
        active = [i for i in stay if self.rows[i].future is None]
        parked = [i for i in stay if self.rows[i].future is not None]
        order = _fill_holes(active, 0) + _fill_holes(parked, len(active))
        width = int(self.length.max()) + 1 if len(self.length) else 0
        target = [place for place, source in enumerate(order) if place != source]
        if target:
            source = torch.tensor([order[place] for place in target], device=self.device)
            self.cache.move(torch.tensor(target, device=self.device), source, width)
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        for name in (
            "number", "length", "limit", "position", "n_sampled", "turn_tokens", "last_token",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[index])
        self.rows = [self.rows[i] for i in order]
        self.n_active = len(active)
        return [i for i in range(self.n_active) if self.rows[i].number in ready_rows]

    def _has_waiting(self) -> bool:
        return any(row.future is not None for row in self.rows)

    def _collect(self, ready: list[int], done: list[int]) -> tuple[list[int], list[int]]:
        """Takes over the answers of tools that have finished; waits if nothing else can be done."""
        waiting = {i: row.future for i, row in enumerate(self.rows) if row.future is not None}
        if waiting and len(waiting) + len(done) == len(self.rows):
            wait(waiting.values(), return_when=FIRST_COMPLETED)
        for place, future in waiting.items():
            if not future.done():
                continue
            row = self.rows[place]
            row.future = None
            room = int(self.limit[place] - self.length[place]) - 1
            (ready if self._apply(row, future.result(), room) else done).append(place)
        return ready, done

    def _observe(self, places: list[int]) -> None:
        """Appends the observations of the rows at `places` to the cache and opens their turns."""
        rows = [self.rows[place] for place in places]
        index = torch.tensor(places, device=self.device)
        before = self.length[index]
        longest = max(len(row.observation) for row in rows)
        slots = before[:, None] + torch.arange(longest, device=self.device)
        slots.clamp_(max=self.cache.n_slots - 1)
        width = int(slots.max()) + 1
        masks = (self.slot_numbers[:width] <= slots[:, :, None])[:, None]
        self.cache.select(index, slots, width)
        hidden, after = self._read(
            [row.observation for row in rows],
            [row.pictures for row in rows],
            self.position[index].tolist(),
            self.cache,
            masks,
        )
        self.logits[index] = self.head(hidden)
        lengths = torch.tensor([len(row.observation) for row in rows], device=self.device)
        self.length[index] = before + lengths
        self.position[index] = torch.tensor(after, device=self.device)
        self.turn_tokens[index] = 0
        for row in rows:
            row.observation, row.pictures = [], []
        if self.scripted is not None:
            for row in rows:
                self._write_script(row)

    # ---------------------------------------------------------------- scripted turns

    def _script_tensor(self) -> torch.Tensor:
        """Tokens that each row is made to say in its turn, -1 where it is free."""
        shape = (len(self.rows), self.engine.max_new_tokens_per_turn + 1)
        self.scripted = torch.full(shape, -1, dtype=torch.long, device=self.device)
        for row in self.rows:
            self._write_script(row)
        return self.scripted

    def _write_script(self, row: _Row) -> None:
        self.scripted[row.number] = -1
        text = self.engine.script(row.question, len(row.trajectory.turns))
        if text is not None:
            ids = self.engine.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = ids[: self.scripted.shape[1]]
            self.scripted[row.number, : len(ids)] = torch.tensor(ids, device=self.device)


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
    return _Row(number, question, episode, trajectory, len(prompt.token_ids))


def _user_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _fill_holes(members: list[int], start: int) -> list[int]:
    """Order of `members` in places start, start + 1, ... that leaves most of them where they are."""
    places = range(start, start + len(members))
    outside = [member for member in members if member not in places]
    inside = {member for member in members if member in places}
    return [place if place in inside else outside.pop() for place in places]


def _inverse_cdf(probs: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Token whose cumulative share of the (unnormalised) probs [n, V] contains draw [n]."""
    cumulative = probs.cumsum(dim=-1)
    threshold = draw[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # rounding can put the threshold at the very end, behind the last token with any mass
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(dim=-1)
    return torch.minimum(token, last)


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zeroes tokens outside the smallest set whose mass reaches top_p of the total."""
    ordered, index = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered[before >= top_p * ordered.sum(dim=-1, keepdim=True)] = 0.0
    return torch.zeros_like(probs).scatter(1, index, ordered)


def _end_token_ids(core: Any, tokenizer: Any) -> set[int]:
    """Every id that ends a turn: those of the generation config, end and pad of the tokenizer."""
    ids = getattr(core, "generation_config", None) and core.generation_config.eos_token_id
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return {i for i in (*listed, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None}


def _token_texts(tokenizer: Any) -> list[str]:
    """Text of every token by itself, special tokens empty; enough to recognise an ASCII ending."""
    ids = [[i] for i in range(len(tokenizer))]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def _refuse_sliding_window(core: Any, n_slots: int) -> None:
    config = core.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or []
    if window and "sliding_attention" in layers and n_slots > window:
        raise ValueError(
            f"episodes of up to {n_slots} tokens do not fit the model's sliding window of {window};"
            " lower the completion budget or set use_sliding_window to false in its config"
        )
