"""One search episode: the state between the policy's turns, its budgets and how it ends.

    environment = SearchEnvironment(text_index, image_index, dialect="search_r1")
    episode = environment.start(question)
    step = episode.step(turn_text)     # step.observation goes back to the policy until step.done

Stop reasons: `answer` (the policy answered), `invalid` (a turn without call or answer),
`turn_limit` (still searching in its last turn), `budget` (asked again after being told that no
searches are left), `length` (out of tokens).

Budgets count calls, not turns: of several calls in one turn the first ones within the budget are
carried out, the others are refused in the same observation.
"""

import copy
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from environments.actions import Action, Answer, Call, ImageSearch, Invalid, Search, Visit, calls_of
from environments.dialects import Dialect, get_dialect
from environments.errors import EnvironmentSetupError
from environments.results import ToolResult, combined, model_fault, shorten
from environments.sanitize import one_line
from environments.tools import MAX_URL_CHARS, ImageIndex, PageReader, TextIndex, ask

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
        results: one per turn, None where no tool was asked; with `parts` where several were.
        queries: text queries that were carried out.
        answer: final answer, or None.
        n_text, n_image, n_visits: calls carried out (failed ones included, refused ones not).
        urls: addresses that the results showed: as the policy saw them -> as they are.
        stop_reason: None while running.
    """

    def __init__(
        self,
        question: dict[str, Any],
        dialect: Dialect,
        text_index: TextIndex | None,
        image_index: ImageIndex | None,
        page_reader: PageReader | None = None,
        *,
        image_searches: int = 1,
        text_searches: int = 2,
        visits: int = 0,
        visit_urls: str = "results",
        max_turns: int = 4,
        top_k_text: int = 2,
        top_k_image: int = 3,
        thumbnails: bool = False,
        timeout_s: float | None = 10.0,
        retries: int = 0,
        backoff_s: float = 0.5,
        invalid_ends: bool = True,
        long_results: str = "end",
    ) -> None:
        self.question = question
        self.dialect = dialect
        self.text_index = text_index
        self.image_index = image_index
        self.page_reader = page_reader
        self.image_searches = image_searches
        self.text_searches = text_searches
        self.visits = visits
        self.visit_urls = visit_urls
        self.max_turns = max_turns
        self.top_k_text = top_k_text
        self.top_k_image = top_k_image
        self.thumbnails = thumbnails
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self.invalid_ends = invalid_ends
        self.long_results = long_results

        self.actions: list[Action] = []
        self.results: list[ToolResult | None] = []
        self.queries: list[str] = []
        self.answer: str | None = None
        self.n_text = 0
        self.n_image = 0
        self.n_visits = 0
        self.urls: dict[str, str] = {}
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
        return self._carry_out(action, calls_of(action))

    def stop(self, reason: str) -> None:
        """Ends a running episode from outside, as the rollout does when tokens run out."""
        if reason not in STOP_REASONS:
            raise ValueError(
                f"unknown stop reason '{reason}'; use one of {', '.join(STOP_REASONS)}"
            )
        if not self.done:
            self.stop_reason = reason

    def fork(self) -> "Episode":
        """A copy that goes on by itself: same question and tools, its own past and budgets."""
        copied = copy.copy(self)
        copied.actions, copied.results = list(self.actions), list(self.results)
        copied.queries, copied.urls = list(self.queries), dict(self.urls)
        return copied

    def shortened(self, n_words: int) -> str:
        """The latest observation again, with at most `n_words` words of text per hit."""
        result = self.results[-1]
        if result is None:
            raise RuntimeError("the latest turn has no observation to shorten")
        return self.dialect.render_observation(shorten(result, n_words), self.question["question"])

    def metrics(self) -> dict[str, float]:
        """Counts of the episode so far: searches, refusals, faults and seconds spent in tools."""
        turns = [result for result in self.results if result is not None]
        results = [part for result in turns for part in result.each]
        return {
            "turns": float(len(self.actions)),
            "text_searches": float(self.n_text),
            "image_searches": float(self.n_image),
            "visits": float(self.n_visits),
            "model_faults": float(sum(result.fault == "model" for result in results)),
            "infrastructure_faults": float(sum(r.fault == "infrastructure" for r in results)),
            "retries": float(sum(result.retries for result in results)),
            "tool_s": sum(result.seconds for result in turns),
        }

    def _take_invalid(self, action: Invalid, truncated: bool) -> Step:
        if truncated:
            return self._end(action, "length")
        if self.invalid_ends and not action.is_call:
            return self._end(action, "invalid")
        if len(self.actions) >= self.max_turns:
            return self._end(action, "turn_limit")
        if action.is_call:
            return self._observe(action, model_fault(f"The call failed: {action.reason}."))
        hint = f"No valid action: {action.reason}. End with a search call or with an answer."
        return self._observe(action, model_fault(hint))

    def _carry_out(self, action: Action, calls: tuple[Call, ...]) -> Step:
        """Asks the tools as far as the budgets go; who asks beyond them is told so once."""
        is_granted = [self._spend(call) for call in calls]
        if not any(is_granted) and self._was_refused:
            return self._end(action, "budget")
        self._was_refused |= not all(is_granted)
        start = time.perf_counter()
        found = iter(
            ask(self, [c for c, granted in zip(calls, is_granted, strict=True) if granted])
        )
        results = [
            next(found) if granted else _refusal(call)
            for call, granted in zip(calls, is_granted, strict=True)
        ]
        for hit in (hit for result in results for hit in result.documents if hit.url):
            self.urls[one_line(hit.url, MAX_URL_CHARS)] = hit.url
        if len(results) == 1:
            return self._observe(action, results[0])
        return self._observe(action, combined(results, time.perf_counter() - start))

    def _spend(self, call: Call) -> bool:
        """Takes one call off its budget; False if nothing is left of it."""
        match call:
            case Search(query) if self.n_text < self.text_searches:
                self.n_text += 1
                self.queries.append(query)
            case ImageSearch() if self.n_image < self.image_searches:
                self.n_image += 1
            case Visit() if self.n_visits < self.visits:
                self.n_visits += 1
            case _:
                return False
        return True

    def _observe(self, action: Action, result: ToolResult) -> Step:
        self.results.append(result)
        observation = self.dialect.render_observation(result, self.question["question"])
        return Step(action, observation, list(result.images), result=result)

    def _end(self, action: Action, reason: str) -> Step:
        self.results.append(None)
        self.stop_reason = reason
        return Step(action, done=True, stop_reason=reason)


def _refusal(call: Call) -> ToolResult:
    match call:
        case Search():
            return model_fault("No searches left for text. Give the answer.", "text")
        case ImageSearch():
            return model_fault("No searches left for the image. Search text or answer.", "image")
        case Visit():
            return model_fault("No visits left. Search or answer.", "page")


class SearchEnvironment:
    """Indexes, dialect and budgets; starts one episode per question.

    Args:
        text_index: back end of text search, or None.
        image_index: back end of image search, or None.
        page_reader: back end of visits, or None.
        dialect: name of the dialect, or a Dialect.
        budgets: the keyword arguments of Episode (`image_searches`, `text_searches`, `visits`,
            `visit_urls`, `max_turns`, `top_k_text`, `top_k_image`, `thumbnails`, `timeout_s`,
            `retries`, `backoff_s`, `invalid_ends`, `long_results`).

    Raises:
        EnvironmentSetupError: an unknown setting, or visits without anything that reads pages.
    """

    def __init__(
        self,
        text_index: TextIndex | None,
        image_index: ImageIndex | None,
        page_reader: PageReader | None = None,
        *,
        dialect: str | Dialect = "search_r1",
        **budgets: Any,
    ) -> None:
        self.text_index = text_index
        self.image_index = image_index
        self.page_reader = page_reader
        self.dialect = get_dialect(dialect) if isinstance(dialect, str) else dialect
        self.budgets = budgets
        try:
            episode = self.start({"question": ""})
        except TypeError as error:
            raise EnvironmentSetupError(f"unknown setting of the environment: {error}") from error
        if episode.visits and page_reader is None:
            raise EnvironmentSetupError(
                f"visits {episode.visits}: nothing here can read pages; give a page reader, or "
                "set environment.visits to 0"
            )
        tools = {
            "text_search": text_index is not None and episode.text_searches > 0,
            "image_search": image_index is not None and episode.image_searches > 0,
            "visit": episode.visits > 0,
        }
        self.dialect = replace(
            self.dialect, tools=tuple(t for t, offered in tools.items() if offered)
        )

    def start(self, question: dict[str, Any]) -> Episode:
        """A fresh episode for one question row."""
        back_ends = (self.text_index, self.image_index, self.page_reader)
        return Episode(question, self.dialect, *back_ends, **self.budgets)
