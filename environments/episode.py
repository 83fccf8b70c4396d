"""One search episode: the state between the policy's turns, its budgets and how it ends.

    environment = SearchEnvironment(text_index, image_index, dialect="search_r1")
    episode = environment.start(question)
    step = episode.step(turn_text)     # step.observation goes back to the policy until step.done

Stop reasons: `answer` (the policy answered), `invalid` (a turn without call or answer),
`turn_limit` (still searching in its last turn), `budget` (asked again after being told that no
searches are left), `length` (out of tokens).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from environments.dialects import (
    Action,
    Answer,
    Dialect,
    ImageSearch,
    Invalid,
    Search,
    get_dialect,
)
from environments.errors import EnvironmentSetupError
from environments.tools import (
    ImageIndex,
    TextIndex,
    ToolResult,
    image_search,
    model_fault,
    shorten,
    text_search,
)

if TYPE_CHECKING:
    from PIL.Image import Image

STOP_REASONS = ("answer", "invalid", "turn_limit", "budget", "length")


@dataclass
class Step:
    """What one turn of the policy led to.

    Attributes:
        action: what the turn asked for.
        observation: rendered text for the policy, with one IMAGE_MARK per image; None when done.
        images: pictures for the marks.
        done: the episode is over.
        stop_reason: why, when done.
        result: the tool's result, if a tool ran or a call was refused.
    """

    action: Action
    observation: str | None = None
    images: list["Image"] = field(default_factory=list)
    done: bool = False
    stop_reason: str | None = None
    result: ToolResult | None = None


class Episode:
    """One question on its way to an answer.

    Attributes:
        question: the question's row.
        actions: one per turn.
        results: one per turn, None where no tool was asked.
        queries: text queries that were carried out.
        answer: final answer, or None.
        n_text, n_image: searches carried out (failed ones included, refused ones not).
        stop_reason: None while running.
    """

    def __init__(
        self,
        question: dict[str, Any],
        dialect: Dialect,
        text_index: TextIndex | None,
        image_index: ImageIndex | None,
        *,
        image_searches: int = 1,
        text_searches: int = 2,
        max_turns: int = 4,
        top_k_text: int = 2,
        top_k_image: int = 3,
        thumbnails: bool = False,
        timeout_s: float | None = 10.0,
        invalid_ends: bool = True,
        long_results: str = "end",
    ) -> None:
        self.question = question
        self.dialect = dialect
        self.text_index = text_index
        self.image_index = image_index
        self.image_searches = image_searches
        self.text_searches = text_searches
        self.max_turns = max_turns
        self.top_k_text = top_k_text
        self.top_k_image = top_k_image
        self.thumbnails = thumbnails
        self.timeout_s = timeout_s
        self.invalid_ends = invalid_ends
        self.long_results = long_results

        self.actions: list[Action] = []
        self.results: list[ToolResult | None] = []
        self.queries: list[str] = []
        self.answer: str | None = None
        self.n_text = 0
        self.n_image = 0
        self.stop_reason: str | None = None
        self._was_refused = False

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.stop_reason is not None

    @property
    def has_image(self) -> bool:
        """Whether the question comes with a picture."""
        return self.question.get("image") is not None

    def prompt(self) -> list[dict[str, Any]]:
        """Chat messages of the question, tools offered."""
        return self.dialect.prompt(self.question["question"], self.has_image)

    def step(self, turn_text: str, truncated: bool = False) -> Step:
        """Takes one turn of the policy.

        Args:
            turn_text: what the policy wrote, up to and including the closing tag.
            truncated: the turn was cut by a token limit; without an action it ends as `length`.

        Raises:
            RuntimeError: the episode is over already (an error of the caller).
        """
        if self.done:
            raise RuntimeError(f"the episode ended already ({self.stop_reason})")
        action = self.dialect.parse(turn_text)
        self.actions.append(action)
        if isinstance(action, Answer):
            self.answer = action.text
            return self._end(action, "answer")
        if isinstance(action, Invalid):
            return self._take_invalid(action, truncated)
        if len(self.actions) >= self.max_turns:
            # no turn is left to read a result, so the tool is not asked
            return self._end(action, "turn_limit")
        if not self._has_budget(action):
            return self._refuse(action)
        return self._observe(action, self._call(action))

    def stop(self, reason: str) -> None:
        """Ends a running episode from outside, as the rollout does when tokens run out."""
        if reason not in STOP_REASONS:
            raise ValueError(
                f"unknown stop reason '{reason}'; use one of {', '.join(STOP_REASONS)}"
            )
        if not self.done:
            self.stop_reason = reason

    def shortened(self, n_words: int) -> str:
        """The latest observation again, with at most `n_words` words of text per hit."""
        result = self.results[-1]
        if result is None:
            raise RuntimeError("the latest turn has no observation to shorten")
        return self.dialect.render_observation(shorten(result, n_words), self.question["question"])

    def metrics(self) -> dict[str, float]:
        """Counts of the episode so far: searches, refusals, faults and seconds spent in tools."""
        results = [result for result in self.results if result is not None]
        return {
            "turns": float(len(self.actions)),
            "text_searches": float(self.n_text),
            "image_searches": float(self.n_image),
            "model_faults": float(sum(result.fault == "model" for result in results)),
            "infrastructure_faults": float(sum(r.fault == "infrastructure" for r in results)),
            "tool_s": sum(result.seconds for result in results),
        }

    def _take_invalid(self, action: Invalid, truncated: bool) -> Step:
        if truncated:
            return self._end(action, "length")
        if self.invalid_ends:
            return self._end(action, "invalid")
        if len(self.actions) >= self.max_turns:
            return self._end(action, "turn_limit")
        hint = f"No valid action: {action.reason}. End with a search call or with an answer."
        return self._observe(action, model_fault(hint))

    def _has_budget(self, action: Action) -> bool:
        if isinstance(action, Search):
            return self.n_text < self.text_searches
        return self.n_image < self.image_searches

    def _refuse(self, action: Action) -> Step:
        """Says once that the budget is spent; who asks again has not read it."""
        if self._was_refused:
            return self._end(action, "budget")
        self._was_refused = True
        if isinstance(action, Search):
            result = model_fault("No searches left for text. Give the answer.", "text")
        else:
            result = model_fault("No searches left for the image. Search text or answer.", "image")
        return self._observe(action, result)

    def _call(self, action: Action) -> ToolResult:
        if isinstance(action, Search):
            self.n_text += 1
            self.queries.append(action.query)
            return text_search(self, action.query)
        assert isinstance(action, ImageSearch)
        self.n_image += 1
        return image_search(self, action.region)

    def _observe(self, action: Action, result: ToolResult) -> Step:
        self.results.append(result)
        observation = self.dialect.render_observation(result, self.question["question"])
        return Step(action, observation, list(result.images), result=result)

    def _end(self, action: Action, reason: str) -> Step:
        self.results.append(None)
        self.stop_reason = reason
        return Step(action, done=True, stop_reason=reason)


class SearchEnvironment:
    """Indexes, dialect and budgets; starts one episode per question.

    Args:
        text_index: back end of text search, or None.
        image_index: back end of image search, or None.
        dialect: name of the dialect, or a Dialect.
        budgets: the keyword arguments of Episode (`image_searches`, `text_searches`, `max_turns`,
            `top_k_text`, `top_k_image`, `thumbnails`, `timeout_s`, `invalid_ends`, `long_results`).
    """

    def __init__(
        self,
        text_index: TextIndex | None,
        image_index: ImageIndex | None,
        *,
        dialect: str | Dialect = "search_r1",
        **budgets: Any,
    ) -> None:
        self.text_index = text_index
        self.image_index = image_index
        self.dialect = get_dialect(dialect) if isinstance(dialect, str) else dialect
        self.budgets = budgets
        try:
            self.start({"question": ""})
        except TypeError as error:
            raise EnvironmentSetupError(f"unknown setting of the environment: {error}") from error

    def start(self, question: dict[str, Any]) -> Episode:
        """A fresh episode for one question row."""
        return Episode(question, self.dialect, self.text_index, self.image_index, **self.budgets)
