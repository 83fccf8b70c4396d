"""How a checkpoint is asked: four modes, the rows of the papers' tables.

    direct    the dialect's prompt without tools, one turn
    prompted  a prompt that explains tools and format at length, for a policy that was never trained
              on them
    rag       a fixed workflow: one image search (if there is a picture), one text search, then one
              turn with the results in the prompt
    agent     the dialect's prompt, as in training

In `rag` the program searches, not the policy. The query of the text search is a rule (the best
image match and the question) or written by the policy in a turn of its own; MMSearch-R1's workflow
(arXiv 2506.20670) has the latter. The searches are turns of the trajectory, without tokens but
those of a query that the policy wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from compare.errors import CompareError
from environments.actions import ImageSearch, Search, action_dict
from environments.dialect import Dialect
from environments.results import ToolResult
from environments.sanitize import one_line
from environments.tools import image_search, text_search
from rewards.answer import final_answer
from train.token_texts import TokenTexts
from train.trajectories import Trajectory, Turn
from train.worlds import build_engine, load_environment

if TYPE_CHECKING:
    from configs.schema import Config

Mode = Literal["direct", "prompted", "rag", "agent"]
MODES: tuple[str, ...] = get_args(Mode)
Query = Literal["rule", "policy"]
"""Who writes the text query of `rag`."""

MAX_QUERY_CHARS = 200
TITLE_CHARS = 600
"""A title in the prompt of `rag` is cut there; of a text so much is shown as to an agent."""

PROMPTED_SEARCH_R1 = (
    "Answer the question about the picture. You have two tools.\n"
    "Image search: it finds names of what the picture shows. To use it, end your reply with "
    "<search> <img> </search>\n"
    "Text search: it finds passages. To use it, end your reply with <search> your query </search> "
    "and name in the query whom or what you ask about.\n"
    "The results come back between <information> and </information>. Think between <think> and "
    "</think> before every step. If you do not recognise the picture, search it first; if you do "
    "not know the fact, search the text then. When you know the answer, end your reply with "
    "<answer> the answer </answer>, in a few words.\n"
    "For example:\n"
    "<think> I do not know this place. </think> <search> <img> </search>\n"
    "<information> Doc 1(Title: Atlantis) </information>\n"
    "<think> It is Atlantis; I need its harbour. </think> <search> harbour of Atlantis </search>\n"
    "<information> Doc 1(Title: Atlantis) The harbour of Atlantis is Poseidonis. </information>\n"
    "<think> The harbour is Poseidonis. </think> <answer> Poseidonis </answer>\n"
    "Question: {question}"
)
QUERY_REQUEST = "Write only the words to look up in order to answer this question: {question}"


@dataclass(frozen=True)
class _Found:
    """What the workflow's searches brought."""

    turns: list[Turn]
    text: str


class Asker:
    """Rolls out a checkpoint's greedy episodes in one mode.

    Args:
        config: world and the engine's limits.
        model: policy, in evaluation mode.
        processor: its processor or tokenizer.
        mode: of MODES.
        query: in `rag`, who writes the text query.
        environment: in the place of the settings' world.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        processor: Any,
        mode: str = "agent",
        query: str = "rule",
        environment: Any = None,
    ) -> None:
        if mode not in MODES:
            raise CompareError(f"there is no mode {mode!r}; choose one of {', '.join(MODES)}")
        if query not in get_args(Query):
            raise CompareError(f"no query by {query!r}; choose one of {', '.join(get_args(Query))}")
        self._mode, self._query = mode, query
        self._world = environment or load_environment(config)
        self._engine = build_engine(
            config, model, processor, environment=environment_of(self._world, mode)
        )
        texts = TokenTexts(self._engine.tokenizer)
        self._token_texts = texts if config.tracking.token_logprobs else None
        self._tool_workers = config.rollout.tool_workers

    def ask(self, questions: Sequence[dict[str, Any]]) -> list[Trajectory]:
        """One greedy episode per question, in order."""
        if self._mode == "rag":
            trajectories = self._work(list(questions))
        else:
            trajectories = self._roll_out(questions)
        self._engine.release_images()
        if self._token_texts is not None:
            for turn in (turn for trajectory in trajectories for turn in trajectory.turns):
                turn.tokens = self._token_texts(turn.token_ids)
        return trajectories

    def _roll_out(self, questions: Sequence[dict[str, Any]]) -> list[Trajectory]:
        return self._engine.rollout_rows(list(questions), greedy=True, number=0)

    def _work(self, questions: list[dict[str, Any]]) -> list[Trajectory]:
        """The fixed workflow, each of its steps for all questions before the next."""
        world = environment_of(self._world, "rag")
        episodes = [world.start(question) for question in questions]
        seen = self._search_all(_search_image, episodes)
        queries = [rule_query(q, result) for q, (_, result) in zip(questions, seen, strict=True)]
        writing: list[Turn | None] = [None] * len(queries)
        if self._query == "policy":
            queries, writing = self._ask_for_queries(questions, seen, queries)
        reads = self._search_all(text_search, episodes, queries)
        dialect, rows, found = world.dialect, [], []
        for question, (turns, result), query, read, written in zip(
            questions, seen, queries, reads, writing, strict=True
        ):
            texts = [_results(dialect, result), _results(dialect, read)]
            turn = _turn(dialect, query, read, written)
            found.append(_Found([*turns, turn], _framed(texts)))
            rows.append(_with_found(question, dialect, found[-1].text))
        trajectories = self._roll_out(rows)
        for trajectory, searches in zip(trajectories, found, strict=True):
            trajectory.turns[:0] = searches.turns
        return trajectories

    def _search_all(self, search: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
        """One call a question, `rollout.tool_workers` of them at the same time; in their order."""
        if not self._tool_workers:
            return list(map(search, *columns))
        with ThreadPoolExecutor(self._tool_workers) as pool:
            return list(pool.map(search, *columns))

    def _ask_for_queries(
        self,
        questions: list[dict[str, Any]],
        seen: list[tuple[list[Turn], ToolResult | None]],
        rules: list[str],
    ) -> tuple[list[str], list[Turn | None]]:
        """The policy's own queries, the rule's where it writes none; and the turns it took."""
        dialect = self._world.dialect
        rows = [
            _with_found(
                question,
                dialect,
                _framed([_results(dialect, result)]),
                QUERY_REQUEST.replace("{question}", question["question"]),
            )
            for question, (_, result) in zip(questions, seen, strict=True)
        ]
        trajectories = self._roll_out(rows)
        written = [final_answer(trajectory) for trajectory in trajectories]
        queries = [
            query[:MAX_QUERY_CHARS] if query else rule
            for query, rule in zip(written, rules, strict=True)
        ]
        return queries, [trajectory.turns[-1] for trajectory in trajectories]


def environment_of(world: Any, mode: str) -> Any:
    """The world as a mode shows it: another prompt, fewer turns."""
    environment = copy.copy(world)
    dialect = world.dialect
    if mode == "prompted" and dialect.name == "search_r1":
        # the other dialects' prompts explain the tools already
        environment.dialect = replace(dialect, agent_text=PROMPTED_SEARCH_R1)
    elif mode == "direct":
        environment.dialect = dialect.without_tools()
        environment.budgets = {**world.budgets, "max_turns": 1}
    elif mode == "rag":
        environment.budgets = {**world.budgets, "max_turns": 1}
    return environment


def rule_query(question: dict[str, Any], result: ToolResult | None) -> str:
    """The best image match, where there is one, and the question."""
    title = result.documents[0].title if result is not None and result.documents else ""
    return f"{title} {question['question']}".strip()[:MAX_QUERY_CHARS]


def _search_image(episode: Any) -> tuple[list[Turn], ToolResult | None]:
    """The image search of the workflow; nothing where the question has no picture."""
    if episode.question.get("image") is None:
        return [], None
    result = image_search(episode)
    return [_turn(episode.dialect, None, result)], result


def _turn(
    dialect: Dialect, query: str | None, result: ToolResult, written: Turn | None = None
) -> Turn:
    """A search as a turn that the policy did not write, or the one in which it wrote the query."""
    action = ImageSearch() if query is None else Search(query)
    return replace(
        written or Turn(text="", token_ids=[], logprobs=[], action={}),
        action=action_dict(action),
        observation=_results(dialect, result),
        hits=list(result.hits),
        is_error=result.is_error,
        fault=result.fault,
        seconds=result.seconds,
    )


def _results(dialect: Dialect, result: ToolResult | None) -> str:
    """The hits as the dialect writes them, names and texts only."""
    if result is None:
        return ""
    pairs = [
        (one_line(hit.title, TITLE_CHARS), one_line(hit.text, hit.max_chars))
        for hit in result.documents
    ]
    return dialect.hits(pairs, result.tool) if pairs else one_line(result.text)


def _framed(texts: Sequence[str]) -> str:
    return f"<information> {' '.join(text for text in texts if text)} </information>"


def _with_found(
    question: dict[str, Any], dialect: Dialect, information: str, text: str | None = None
) -> dict[str, Any]:
    """The question with its own messages: what was found, then the prompt without tools."""
    image = question.get("image")
    messages = dialect.direct_prompt(text or question["question"], image is not None)
    part = messages[-1]["content"][-1]
    part["text"] = f"{information}\n{part['text']}"
    return {**question, "image": image, "messages": messages}
