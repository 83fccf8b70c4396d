"""What both rollout engines share: prompts and observations as tokens, and the rules of a turn.

`Engine` says what the trainer, the evaluation and `train.worlds` ask of an engine; behind it stand
`train.rollout` (the policy in this process) and `train.vllm_rollout` (a vLLM server). They differ
in who computes the next token, and in nothing that an episode consists of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from environments.dialects import IMAGE_MARK, action_dict
from environments.sanitize import forgeable
from train.policy import causal_model
from train.timing import timed
from train.trajectories import Trajectory, Turn
from train.vision import EncodedImage, ImageStore, suppressed_token_ids

WORDS_PER_HIT = (20, 10, 5, 2, 0)
"""Lengths tried in turn when a result has to be shortened to fit the token budget."""

Script = Callable[[dict[str, Any], int], str | None]
"""(question, turn number) -> text that the policy is made to say, or None to let it sample."""


@dataclass
class Prompt:
    """A question ready for the model."""

    text: str
    token_ids: list[int]
    pictures: list[EncodedImage]
    images: list[Any]


class Engine(Protocol):
    """A rollout engine, whichever back end computes the tokens."""

    model: Any
    environment: Any
    tokenizer: Any
    images: ImageStore | None
    image_token_id: int | None
    temperature: float
    max_completion_tokens: int
    n_rollouts: int
    """rollouts so far: the number that the next one's random numbers depend on"""
    timings: dict[str, float]
    """seconds per stage of the latest rollout"""
    is_remote: bool
    """the policy is elsewhere and must be sent there"""
    policy_version: int | None
    """optimizer step of the weights that a remote policy has; None before they were sent"""

    def rollout(
        self, questions: Sequence[dict[str, Any]], group_size: int = 1, greedy: bool = False
    ) -> list[Trajectory]:
        """A group of episodes per question; those of one question are neighbours."""
        ...

    def rollout_rows(
        self,
        questions: Sequence[dict[str, Any]],
        *,
        greedy: bool = False,
        first_row: int = 0,
        number: int | None = None,
    ) -> list[Trajectory]:
        """One episode per row; see `EpisodeEngine.rollout_rows`."""
        ...

    def prepare(self, question: dict[str, Any]) -> Prompt:
        """The prompt of a question: token ids and pictures."""
        ...

    def prepare_observation(
        self, text: str, images: Sequence[Any]
    ) -> tuple[list[int], list[EncodedImage]]:
        """Token ids and pictures of an observation, placeholders as long as the pictures need."""
        ...

    def encode_image(self, image: Any) -> EncodedImage:
        """Pixels of a picture, kept until `release_images`."""
        ...

    def release_images(self) -> None:
        """Forgets the pictures of past rollouts."""
        ...

    def send_policy(self, model: Any, version: int) -> None:
        """Hands a remote back end the weights of `model`."""
        ...

    def confirm_policy(self, version: int) -> None:
        """Waits until a remote back end has the weights of this step."""
        ...

    def wake(self) -> None:
        """Gives a sleeping server its memory back."""
        ...

    def sleep(self) -> None:
        """Lets a server free its memory."""
        ...


class EpisodeEngine:
    """Base of the engines.

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
        max_rows: episodes under way at a time; more have to wait.
        fits_memory: in process on a GPU, fewer rows where the cache of so many would not fit in
            what is free. Not in training, whose processes must take the same steps.
        tool_workers: threads for tool calls; 0 calls tools in line (fast, in-process tools).
        script: makes the policy say given turns (tests, demonstrations).
    """

    is_remote = False
    policy_version: int | None = None

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
        fits_memory: bool = False,
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
        self.fits_memory = fits_memory
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
        open_tokens = forgeable(special_tokens(self.tokenizer))
        if open_tokens:
            raise ValueError(
                f"retrieved text could spell the special tokens {', '.join(open_tokens[:5])} of "
                "this tokenizer; only those in angle brackets are kept out of it"
            )
        self._pieces = _token_texts(self.tokenizer)
        # models have more rows than their tokenizer has tokens, to round the matrix up
        n_rows = self._core.config.get_text_config().vocab_size
        self._unnamed = range(len(self._pieces), n_rows)
        self._pieces += [""] * len(self._unnamed)

    @property
    def _core(self) -> Any:
        """The causal model inside a PEFT wrapper."""
        return causal_model(self.model)

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

    def rollout_rows(
        self,
        questions: Sequence[dict[str, Any]],
        *,
        greedy: bool = False,
        first_row: int = 0,
        number: int | None = None,
    ) -> list[Trajectory]:
        """One episode per row; the back end's work.

        Args:
            questions: one question per episode.
            greedy: most likely tokens instead of samples.
            first_row: number of the first row among all processes' rows.
            number: number of this rollout, the second part of the random key; by default they
                are counted.

        Returns:
            One trajectory per row.
        """
        raise NotImplementedError

    def send_policy(self, model: Any, version: int) -> None:
        """Hands a remote back end the weights of `model`; in process there is nothing to send."""

    def confirm_policy(self, version: int) -> None:
        """Notes that the back end has the weights of optimizer step `version`."""
        self.policy_version = version

    def wake(self) -> None:
        """Readies a back end that sleeps between rollouts; in process there is none."""

    def sleep(self) -> None:
        """Lets a back end give its memory back until the next rollout."""

    def prepare(self, question: dict[str, Any]) -> Prompt:
        """Chat template, tokens and pixels of one question."""
        image = question.get("image")
        with self.timed("prepare"):
            # a workflow's question brings its own messages, with what it has found
            messages = question.get("messages") or self.environment.dialect.prompt(
                question["question"], image is not None
            )
            text = self.tokenizer.apply_chat_template(
                messages_for(self.processor, messages), tokenize=False, add_generation_prompt=True
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

    def encode_image(self, image: Any) -> EncodedImage:
        """Pixels and grid of one picture, made once."""
        if self.images is None:
            raise ValueError("the question has a picture but the policy is a text model")
        return self.images.encode(image)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's seconds to `timings[stage]`."""

        def record(seconds: float) -> None:
            self.timings[stage] += seconds

        with timed(stage, record):
            yield

    # ---------------------------------------------------------------- a rollout

    def _begin(
        self, questions: Sequence[dict[str, Any]], number: int | None
    ) -> tuple[int, list[Prompt]]:
        """Number of the rollout, and the prompt of every row; equal questions share one."""
        if number is None:
            number = self.n_rollouts
            self.n_rollouts += 1
        self.timings.clear()
        self._observations.clear()
        prompts: dict[int, Prompt] = {}
        for question in questions:
            if id(question) not in prompts:
                prompts[id(question)] = self.prepare(question)
        return number, [prompts[id(question)] for question in questions]

    def _start(self, question: dict[str, Any], prompt: Prompt) -> tuple[Any, Trajectory]:
        """A fresh episode and its empty trajectory."""
        trajectory = Trajectory(
            question_id=question["id"],
            kind=question.get("kind", ""),
            seen=bool(question.get("seen", False)),
            prompt=prompt.text,
            prompt_ids=prompt.token_ids,
            images=prompt.images,
        )
        return self.environment.start(question), trajectory

    # ---------------------------------------------------------------- a turn

    def _scripted_ids(self, question: dict[str, Any], turn: int) -> list[int] | None:
        """Tokens that the script puts into the policy's mouth, or None."""
        text = self.script(question, turn) if self.script is not None else None
        ids = text and self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids or None

    def _is_complete(self, ids: list[int]) -> bool:
        """True if the turn so far ends with an end token or one of the dialect's stop sequences."""
        if ids[-1] in self._end_ids:
            return True
        longest = max(map(len, self._stops))
        tail = "".join(self._pieces[i] for i in ids[-longest:]).rstrip()
        return tail.endswith(self._stops)

    def _apply(
        self, episode: Any, trajectory: Trajectory, step: Any, room: int
    ) -> list[EncodedImage] | None:
        """Writes a step of the episode into the trajectory's last turn.

        Args:
            episode: the running episode.
            trajectory: its record.
            step: what `Episode.step` returned.
            room: tokens left in the episode's budget.

        Returns:
            Pictures of the observation, whose tokens are the turn's `observation_ids`; None if the
            episode is over.
        """
        turn = trajectory.turns[-1]
        turn.action = action_dict(step.action)
        if step.result is not None:
            turn.hits, turn.seconds = list(step.result.hits), step.result.seconds
            turn.is_error, turn.fault = step.result.is_error, step.result.fault
            turn.call_faults = [part.fault for part in step.result.parts]
            turn.retries = step.result.retries
        if step.done:
            trajectory.stop_reason = step.stop_reason
            trajectory.answer = episode.answer
            return None
        turn.images = list(step.images)
        pictures = self._show(turn, step.observation)
        if len(turn.observation_ids) >= room and episode.long_results == "shorten":
            # what is left is shared with the turn that is to read it
            share = room - min(room // 2, self.max_new_tokens_per_turn)
            for n_words in WORDS_PER_HIT:
                pictures = self._show(turn, episode.shortened(n_words))
                if len(turn.observation_ids) < share:
                    break
        if len(turn.observation_ids) >= room:
            turn.observation_ids = []
            episode.stop("length")
            trajectory.stop_reason = "length"
            return None
        return pictures

    def _show(self, turn: Turn, text: str) -> list[EncodedImage]:
        """Writes an observation and its tokens into the turn; returns its pictures."""
        turn.observation = text
        turn.observation_ids, pictures = self.prepare_observation(text, turn.images)
        if turn.token_ids[-1] in self._end_ids and turn.observation_ids[:1] == turn.token_ids[-1:]:
            turn.observation_ids = turn.observation_ids[1:]  # the policy closed its turn itself
        return pictures

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


def messages_for(processor: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages as the template of a processor, or of a bare tokenizer, takes them.

    Text models' templates take strings: a list of parts stops Qwen2.5's, is left out by Qwen3's and
    stands as Python writes it in the prompts of others. VLMs' templates keep the parts.
    """
    if getattr(processor, "image_processor", None) is not None:
        return messages
    return [{**message, "content": _joined(message["content"])} for message in messages]


def _joined(content: Any) -> Any:
    """The text of parts that are all text; any other content as it is."""
    is_text = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    )
    return "".join(part["text"] for part in content) if is_text else content


def _user_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def special_tokens(tokenizer: Any) -> list[str]:
    """Every token that stands for itself in any text and is no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [token.content for token in added if token.special]


def _end_token_ids(core: Any, tokenizer: Any) -> set[int]:
    """Every id that ends a turn: those of the generation config, end and pad of the tokenizer."""
    ids = getattr(core, "generation_config", None) and core.generation_config.eos_token_id
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return {i for i in (*listed, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None}


def _token_texts(tokenizer: Any) -> list[str]:
    """Text of every token by itself, special tokens empty; enough to recognise an ASCII ending."""
    ids = [[i] for i in range(len(tokenizer))]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
