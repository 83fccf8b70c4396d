"""How a dialect is read and written: the class behind `environments.dialects`.

Deviation from the sources of all dialects: a call or an answer counts only at the end of the turn.
What the policy wrote before it (a rehearsed result, a second call) is thought, not action. Only
JSON calls side by side at the end of a turn are all carried out.

Retrieved text is data. It passes `sanitize` before it stands in an observation, so that no tag and
no special token can come from a tool; only the frame around it is ours.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from environments.actions import (
    Action,
    Answer,
    ImageSearch,
    Invalid,
    Parallel,
    Search,
    Visit,
    action_dict,
    read_region,
)
from environments.sanitize import IMAGE_MARK, MAX_OBSERVATION_CHARS, one_line, sanitize, with_marks
from environments.tool_calls import MAX_CALLS, read_calls, schemas

if TYPE_CHECKING:
    from environments.results import Hit, ToolResult

MAX_TITLE_CHARS = 200
"""Of a hit; its text has a cap of its own. A word without end must not fill the context that other
hits need."""

CALL_TAGS = ("search", "text_search", "image_search", "visit", "tool_call", "answer")
"""Tags whose closing ends a turn with an action, in every dialect."""
TAGS = ("think", "reason", *CALL_TAGS, "information", "tool_response", "img")
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_IMAGE = "<img>"
_JSON_OPENING, _JSON_CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Dialect:
    """One dialect, as data.

    Attributes:
        name: key in configuration files.
        stop_sequences: a turn ends after any of these.
        in_turn: the observation continues the assistant's turn; otherwise it is a user turn.
        think: tag around the reasoning.
        needs_thought: a well-formed turn has that tag; otherwise it may.
        calls: tag of each action in a well-formed turn, by the action's name.
        is_parallel: several JSON calls at the end of a turn are all carried out.
        own_tags: tags beside TAGS that this dialect alone understands: tag -> name of the action,
            or None for one that is no call.
        agent_text: user text with tools, `{question}` in it, `{visit}` where pages are offered.
        direct_text: user text without tools.
        visit_text: stands for `{visit}` where pages can be visited.
        system_text: system message with tools, `{tools}` (their JSON schemas) in it; "" = none.
        tools: what is offered; the environment sets it.
        frame: builds an observation from (sanitised texts, one a call; sanitised question; tool).
        hits: builds the text of a list of hits; the second argument names the tool.
    """

    name: str
    stop_sequences: tuple[str, ...]
    in_turn: bool
    think: str
    calls: dict[str, str]
    agent_text: str
    direct_text: str
    frame: Callable[[Sequence[str], str, str], str]
    hits: Callable[[Sequence[tuple[str, str]], str], str]
    needs_thought: bool = True
    is_parallel: bool = False
    own_tags: dict[str, str | None] = field(default_factory=dict)
    visit_text: str = ""
    system_text: str = ""
    tools: tuple[str, ...] = ("text_search", "image_search")

    def prompt(self, question: str, has_image: bool) -> list[dict[str, Any]]:
        """Chat messages that offer the tools; the image part comes first."""
        text = self.agent_text.replace("{visit}", self.visit_text if "visit" in self.tools else "")
        names = [tool for tool in self.tools if has_image or tool != "image_search"]
        messages = [_user_message(text, question, has_image)]
        if self.system_text and names:
            lines = "".join("\n" + json.dumps(s, ensure_ascii=False) for s in schemas(names))
            content = self.system_text.replace("{tools}", lines)
            messages.insert(0, {"role": "system", "content": content})
        return messages

    def direct_prompt(self, question: str, has_image: bool) -> list[dict[str, Any]]:
        """Chat messages that offer no tools."""
        return [_user_message(self.direct_text, question, has_image)]

    def without_tools(self) -> "Dialect":
        """The dialect with its direct prompt in the place of the one that offers tools."""
        return replace(self, agent_text=self.direct_text, tools=())

    @property
    def call_tags(self) -> tuple[str, ...]:
        """Tags whose closing ends a turn with an action."""
        return (*CALL_TAGS, *(tag for tag, action in self.own_tags.items() if action))

    def has_tag(self, text: str) -> bool:
        """Whether any tag that this dialect knows stands in the text."""
        return _tags(*TAGS, *self.own_tags).search(text) is not None

    def parse(self, turn: str) -> Action:
        """Reads the action at the end of a turn. Total: never raises."""
        turn = strip_end(turn)
        tag = next((tag for tag in self.call_tags if turn.endswith(f"</{tag}>")), None)
        if tag is None:
            return Invalid(_why_no_call(turn, self.call_tags))
        if tag == "tool_call":
            return self._parse_json(turn)
        opening, closing = f"<{tag}>", f"</{tag}>"
        start = turn.rfind(opening)
        if start < 0:
            return Invalid(f"{closing} without {opening}")
        content = turn[start + len(opening) : -len(closing)].strip()
        kind = self.own_tags.get(tag) or tag
        if kind in ("search", "text_search", "image_search"):
            is_image = kind == "image_search" or content.startswith(_IMAGE)
            region = content.removeprefix(_IMAGE).strip() or "full"
            if is_image and not self.has_tag(region):
                return ImageSearch(read_region(region))
        if self.has_tag(content):
            return Invalid(f"a tag stands inside {opening}{closing}")
        if not content:
            return Invalid(f"{opening}{closing} is empty")
        if kind == "answer":
            return Answer(content)
        return Visit(content) if kind == "visit" else Search(content)

    def _parse_json(self, turn: str) -> Action:
        _, texts = _json_blocks(turn)
        if not texts:
            return Invalid(f"{_JSON_CLOSING} without {_JSON_OPENING}")
        calls = read_calls(
            texts if self.is_parallel else texts[-1:], self.tools or ("text_search",)
        )
        if isinstance(calls, Invalid):
            return calls
        return calls[0] if len(calls) == 1 else Parallel(calls)

    def write(self, thought: str, action: Action) -> str:
        """A well-formed turn in this dialect, which `parse` reads back.

        Args:
            thought: the reasoning before it.
            action: a search of text or picture, or an answer.

        Raises:
            ValueError: another action.
        """
        match action:
            case Search(query):
                arguments, content = {"query": query}, query
            case ImageSearch(str(region)):
                arguments = {"region": region}
                content = _IMAGE if region == "full" else f"{_IMAGE} {region}"
            case Answer(text):
                arguments, content = {}, text
            case _:
                raise ValueError(f"cannot write a turn for {action}")
        kind = action_dict(action)["type"]
        tag = self.calls[kind]
        if tag == "tool_call":
            name = {"search": "text_search"}.get(kind, kind)
            call = {"name": name, "arguments": arguments}
            content = f"\n{json.dumps(call, ensure_ascii=False)}\n"
        else:
            content = f" {content} "
        return f"<{self.think}> {thought} </{self.think}> <{tag}>{content}</{tag}>"

    def render_observation(self, result: "ToolResult", question: str) -> str:
        """Text of an observation; each returned image stands as one IMAGE_MARK.

        Args:
            result: what the tool returned; all its text is sanitised here and cut.
            question: the user's question, repeated by some dialects.
        """
        room = MAX_OBSERVATION_CHARS // len(result.each)
        texts = [self._body(part, room) for part in result.each]
        return self.frame(texts, one_line(question), result.tool)

    def _body(self, result: "ToolResult", room: int) -> str:
        text = result.text
        if result.documents:
            pairs = [(_hit_title(hit), _hit_text(hit)) for hit in result.documents]
            text = self.hits(pairs, result.tool)
        return with_marks(text, len(result.images), room)

    def check_format(self, turns: Sequence[str]) -> bool:
        """Whether the policy's turns are a legal episode: `think call` ..., `think answer`.

        Every turn is the reasoning tag (where the dialect needs it), then one call, several where
        the dialect has them, or the answer, with only white space around them; the last turn and no
        other is the answer; nothing is empty.
        """
        if not turns:
            return False
        for i, turn in enumerate(turns):
            rest = self._after_thought(strip_end(turn).lstrip())
            if rest is None:
                return False
            action, is_last = self.parse(rest), i == len(turns) - 1
            if isinstance(action, Invalid) or isinstance(action, Answer) != is_last:
                return False
            kind = "search" if isinstance(action, Parallel) else action_dict(action)["type"]
            if not self._is_alone(rest, self.calls[kind]):
                return False
        return True

    def _after_thought(self, turn: str) -> str | None:
        """What follows the reasoning; None if the reasoning is untidy, or missing but needed."""
        head, closing, rest = turn.partition(f"</{self.think}>")
        if not closing:
            return None if self.needs_thought else turn
        thought = head.removeprefix(f"<{self.think}>")
        if self.has_tag(thought):
            return None
        # some templates open the reasoning in the prompt, so that the turn begins inside it
        is_whole = not self.needs_thought or (thought != head and bool(thought.strip()))
        return rest if is_whole else None

    def _is_alone(self, rest: str, tag: str) -> bool:
        """Whether nothing but calls with this tag stands there: one, or several JSON ones."""
        if tag == "tool_call":
            head, texts = _json_blocks(strip_end(rest))
            return bool(texts) and not head.strip() and (self.is_parallel or len(texts) == 1)
        return rest.lstrip().startswith(f"<{tag}>") and rest.count(f"<{tag}>") == 1


def strip_end(turn: str) -> str:
    """A turn without white space and end-of-turn tokens at its end."""
    turn = turn.rstrip()  # a pattern would look at every run of white space again and again
    while turn.endswith(_END_TOKENS):
        turn = turn[: turn.rindex("<|")].rstrip()
    return turn


def _json_blocks(turn: str) -> tuple[str, list[str]]:
    """What stands before the JSON calls at the end of a turn, and what stands inside each."""
    texts: list[str] = []
    while turn.endswith(_JSON_CLOSING) and len(texts) <= MAX_CALLS:  # one more is refused
        start = turn.rfind(_JSON_OPENING)
        if start < 0:
            break
        texts.append(turn[start + len(_JSON_OPENING) : -len(_JSON_CLOSING)].strip())
        turn = turn[:start].rstrip()
    return turn, texts[::-1]


@cache
def _tags(*names: str) -> re.Pattern[str]:
    return re.compile(rf"</?(?:{'|'.join(names)})>")


def _why_no_call(turn: str, tags: Sequence[str]) -> str:
    if turn.endswith("<tool_response>"):
        return "<tool_response> is not yours to write; end the turn after </tool_call>"
    for tag in tags:
        if turn.rfind(f"<{tag}>") > turn.rfind(f"</{tag}>"):
            return f"<{tag}> is not closed"
        if f"</{tag}>" in turn:
            return f"text after </{tag}>"
    return "neither a call nor an answer"


def _user_message(template: str, question: str, has_image: bool) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image"}] if has_image else []
    # not str.format: a question may hold braces; sanitised: it may hold special tokens
    content.append({"type": "text", "text": template.replace("{question}", sanitize(question))})
    return {"role": "user", "content": content}


def _hit_title(hit: "Hit") -> str:
    return one_line(hit.title, MAX_TITLE_CHARS)


def _hit_text(hit: "Hit") -> str:
    text = IMAGE_MARK if hit.image is not None else one_line(hit.text, hit.max_chars)
    return f"{one_line(hit.url)} {text}".rstrip() if hit.url else text
