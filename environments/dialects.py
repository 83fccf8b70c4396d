"""Dialects: what a call, an observation and an answer look like as text.

Two dialects, held as data. `search_r1` (arXiv 2503.09516) puts a search result inside the
assistant's turn; `mmsearch_r1` (arXiv 2506.20670) sends it as a new user turn. Both accept the
other's call tags when they *parse*, because a merged policy may mix them and its search rate would
otherwise be under-measured; `check_format` accepts the dialect's own tags only.

Deviation from both sources: a call or an answer counts only at the end of the turn. What the
policy wrote before it (a rehearsed result, a second call) is thought, not action.

Retrieved text is data. It passes `sanitize` before it stands in an observation, so that no tag and
no special token can come from a tool; only the frame around it is ours.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from environments.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from environments.tools import Hit, ToolResult

IMAGE_MARK = "\ufffc"
"""Stands for one returned image in an observation; the policy expands it to its image tokens."""

MAX_OBSERVATION_CHARS = 8000
"""Hard cap on one observation's text, whatever a tool returns."""
MAX_TITLE_CHARS, MAX_SNIPPET_CHARS = 200, 600
"""Caps on one hit: a word without end must not fill the context that other hits need."""


@dataclass(frozen=True)
class Search:
    """A text search."""

    query: str


@dataclass(frozen=True)
class ImageSearch:
    """A search with the question's picture; `region` as the policy wrote it (the tool checks)."""

    region: str = "full"


@dataclass(frozen=True)
class Answer:
    """The final answer."""

    text: str


@dataclass(frozen=True)
class Invalid:
    """A turn that ends in neither a call nor an answer."""

    reason: str


Action = Search | ImageSearch | Answer | Invalid


def action_dict(action: Action) -> dict[str, str]:
    """An action as plain data, as trajectories store it; `type` names the action."""
    match action:
        case Search(query):
            return {"type": "search", "query": query}
        case ImageSearch(region):
            return {"type": "image_search", "region": region}
        case Answer(text):
            return {"type": "answer", "text": text}
        case Invalid(reason):
            return {"type": "invalid", "reason": reason}


# ---------------------------------------------------------------- sanitising

_LOOKALIKES = str.maketrans(
    # NFKC, which some tokenizers apply, turns the wide and small forms into real brackets
    {
        "<": "‹",
        "＜": "‹",
        "﹤": "‹",
        ">": "›",
        "＞": "›",
        "﹥": "›",
        "\u2028": "\n",
        "\u2029": "\n",
        IMAGE_MARK: None,
    }
)
_JOINERS = "\u200c\u200d"  # part of Persian and Indic spelling and of emoji


def sanitize(text: str) -> str:
    """Makes retrieved text harmless: data that can hold no tag and no special token.

    Every `<` becomes `‹` and `>` becomes `›` (so do their wide forms), IMAGE_MARK, control, format
    (bidi, zero width, tags) and surrogate characters are removed; newline and tab stay. Total and
    idempotent; text without such characters comes back unchanged.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_LOOKALIKES)
    if text.isprintable():  # the common case, a hundred times faster
        return text
    return "".join(ch for ch in text if ch in "\n\t" or _is_harmless(ch))


def _is_harmless(ch: str) -> bool:
    return ch in _JOINERS or unicodedata.category(ch) not in ("Cc", "Cf", "Cs")


def one_line(text: str, limit: int = MAX_OBSERVATION_CHARS) -> str:
    """Sanitised text on one line, cut at `limit` characters."""
    # cut first: a passage of many megabytes must not cost seconds
    return " ".join(sanitize(text[: 4 * limit]).split())[:limit].rstrip()


# ---------------------------------------------------------------- dialects

TAGS = ("think", "reason", "search", "text_search", "answer", "information", "img")
_ANY_TAG = re.compile(rf"</?(?:{'|'.join(TAGS)})>")
_END_OF_TURN = re.compile(r"(?:\s|<\|im_end\|>|<\|endoftext\|>)+\Z")
_CALLS = ("search", "text_search", "answer")
_IMAGE = "<img>"


@dataclass(frozen=True)
class Dialect:
    """One dialect, as data.

    Attributes:
        name: key in configuration files.
        stop_sequences: a turn ends after any of these.
        in_turn: the observation continues the assistant's turn; otherwise it is a user turn.
        think: tag around the reasoning.
        call: tag of a text search in a well-formed turn.
        agent_text: user text with tools, `{question}` in it.
        direct_text: user text without tools.
        frame: builds an observation from (sanitised text, sanitised question, tool name).
        hits: builds the text of a list of hits; the second argument names the tool.
    """

    name: str
    stop_sequences: tuple[str, ...]
    in_turn: bool
    think: str
    call: str
    agent_text: str
    direct_text: str
    frame: Callable[[str, str, str], str]
    hits: Callable[[Sequence[tuple[str, str]], str], str]

    def prompt(self, question: str, has_image: bool) -> list[dict[str, Any]]:
        """Chat messages that offer the tools; the image part comes first."""
        return _user_message(self.agent_text, question, has_image)

    def direct_prompt(self, question: str, has_image: bool) -> list[dict[str, Any]]:
        """Chat messages that offer no tools."""
        return _user_message(self.direct_text, question, has_image)

    def parse(self, turn: str) -> Action:
        """Reads the action at the end of a turn. Total: never raises."""
        turn = strip_end(turn)
        tag = next((tag for tag in _CALLS if turn.endswith(f"</{tag}>")), None)
        if tag is None:
            return Invalid(_why_no_call(turn))
        opening, closing = f"<{tag}>", f"</{tag}>"
        start = turn.rfind(opening)
        if start < 0:
            return Invalid(f"{closing} without {opening}")
        content = turn[start + len(opening) : -len(closing)].strip()
        if tag != "answer" and content.startswith(_IMAGE):
            content = content.removeprefix(_IMAGE).strip() or "full"
            if not _ANY_TAG.search(content):
                return ImageSearch(content)
        if _ANY_TAG.search(content):
            return Invalid(f"a tag stands inside {opening}{closing}")
        if not content:
            return Invalid(f"{opening}{closing} is empty")
        return Answer(content) if tag == "answer" else Search(content)

    def render_observation(self, result: "ToolResult", question: str) -> str:
        """Text of an observation; each returned image stands as one IMAGE_MARK.

        Args:
            result: what the tool returned; all its text is sanitised here and cut.
            question: the user's question, repeated by some dialects.
        """
        if result.documents:
            pairs = [(_hit_title(hit), _hit_text(hit)) for hit in result.documents]
            text = self.hits(pairs, result.tool)
        else:
            text = result.text
        text = _clean_with_marks(text, len(result.images))
        return self.frame(text, one_line(question), result.tool)

    def check_format(self, turns: Sequence[str]) -> bool:
        """Whether the policy's turns are a legal episode: `think call` ..., `think answer`.

        Every turn is the reasoning tag, then one call or answer, with only white space around
        them; the last turn and no other is the answer; nothing is empty.
        """
        if not turns:
            return False
        for i, turn in enumerate(turns):
            turn = strip_end(turn).lstrip()
            head, closing, rest = turn.partition(f"</{self.think}>")
            thought = head.removeprefix(f"<{self.think}>")
            if not closing or thought == head or not thought.strip() or _ANY_TAG.search(thought):
                return False
            action, is_last = self.parse(rest), i == len(turns) - 1
            if isinstance(action, Invalid) or isinstance(action, Answer) != is_last:
                return False
            # exactly one call: its tag must open the rest
            tag = self.call if isinstance(action, Search) else "search"
            tag = "answer" if isinstance(action, Answer) else tag
            if not rest.lstrip().startswith(f"<{tag}>") or rest.count(f"<{tag}>") != 1:
                return False
        return True


def strip_end(turn: str) -> str:
    """A turn without white space and end-of-turn tokens at its end."""
    return _END_OF_TURN.sub("", turn)


def _why_no_call(turn: str) -> str:
    for tag in _CALLS:
        if turn.rfind(f"<{tag}>") > turn.rfind(f"</{tag}>"):
            return f"<{tag}> is not closed"
        if f"</{tag}>" in turn:
            return f"text after </{tag}>"
    return "neither a call nor an answer"


def _user_message(template: str, question: str, has_image: bool) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image"}] if has_image else []
    # not str.format: a question may hold braces; sanitised: it may hold special tokens
    content.append({"type": "text", "text": template.replace("{question}", sanitize(question))})
    return [{"role": "user", "content": content}]


def _hit_title(hit: "Hit") -> str:
    return one_line(hit.title, MAX_TITLE_CHARS)


def _hit_text(hit: "Hit") -> str:
    return IMAGE_MARK if hit.image is not None else one_line(hit.text, MAX_SNIPPET_CHARS)


def _clean_with_marks(text: str, n_images: int) -> str:
    """Sanitised text of at most MAX_OBSERVATION_CHARS with exactly `n_images` marks.

    The policy expands each mark to image tokens, and their number must equal the number of images:
    superfluous marks are dropped, missing ones added at the end.
    """
    room = MAX_OBSERVATION_CHARS
    parts: list[str] = []
    for i, piece in enumerate(text[: 4 * room].split(IMAGE_MARK)):
        if 0 < i <= n_images:
            parts.append(IMAGE_MARK)
        clean = sanitize(piece)[:room]
        room -= len(clean)
        parts.append(clean)
    missing = n_images - parts.count(IMAGE_MARK)
    return "".join(parts).strip() + f" {IMAGE_MARK}" * missing


# ---------------------------------------------------------------- Search-R1


def _search_r1_hits(pairs: Sequence[tuple[str, str]], tool: str) -> str:
    numbered = enumerate(pairs, 1)
    return " ".join(f"Doc {i}(Title: {title}) {text}".rstrip() for i, (title, text) in numbered)


def _search_r1_frame(text: str, question: str, tool: str) -> str:
    return f"\n\n<information> {text} </information>\n\n"


SEARCH_R1 = Dialect(
    name="search_r1",
    stop_sequences=("</search>", "</answer>"),
    in_turn=True,
    think="think",
    call="search",
    agent_text="Think, then search with <search> query </search> or <search> <img> </search> "
    "if you need, then <answer>.\nQuestion: {question}",
    direct_text="Answer directly.\nQuestion: {question}",
    frame=_search_r1_frame,
    hits=_search_r1_hits,
)


# ---------------------------------------------------------------- MMSearch-R1
# The tags, the order of the steps and the two "[... Search Results]" headings are the source's;
# its long instructions are shortened here.

_MM_AGENT = (
    "Answer the user's question based on the provided image. Examine the image carefully and "
    "identify any recognizable entities. Determine whether you have sufficient knowledge to "
    "confidently recognize the main visual element and answer the user's question. If so, first "
    "explain your reasoning, then provide a clear and direct answer.\n"
    "If you are unable to confidently identify the visual element, stop and invoke the image "
    "search tool by appending the string <search><img></search> at the end of your response.\n"
    "Once you have sufficient visual understanding, combine it with the user's question and "
    "assess whether you can confidently answer. If not, invoke the text search tool by generating "
    "a concise and specific query, and output it in the format <text_search>your query "
    "here</text_search> at the end of your response.\n"
    "You must include your reasoning inside <reason>...</reason> before taking any action. All "
    "search results will be placed inside <information> and </information> and returned to you. "
    "When you are ready to answer the question, wrap your final answer between <answer> and "
    "</answer>, without detailed illustrations. For example: <answer>Titanic</answer>.\n"
    "Here is the image and the question:\n{question}"
)
_MM_DIRECT = (
    "Answer the user's question based on the provided image. Wrap your final answer between "
    "<answer> and </answer>, without detailed illustrations. For example: "
    "<answer>Titanic</answer>.\n{question}"
)
_MM_AFTER = {
    "image": "Please extract the visual element relevant to the user's question from the search "
    "results. Then decide inside <reason> and </reason> whether a text search is needed. If it "
    "is, output <text_search>your query here</text_search> at the end. Otherwise give the final "
    "answer, for example: <answer>Titanic</answer>.",
    "text": "Please analyze the search results and the user's question and continue reasoning "
    "inside <reason> and </reason>. If no further external information is needed, provide the "
    "final answer between <answer> and </answer>, concise and to the point.",
}
_MM_HEADINGS = {
    "image": "[Image Search Results] The result of the image search consists of web page "
    "information related to the image from the user's original question, ranked in descending "
    "order of search relevance:",
    "text": "[Text Search Results] Below are the text summaries of the most relevant webpages "
    "related to your query, ranked in descending order of relevance:",
}


def _mmsearch_r1_hits(pairs: Sequence[tuple[str, str]], tool: str) -> str:
    lines = [_MM_HEADINGS.get(tool, "[Search Results]")]
    for i, (title, text) in enumerate(pairs, 1):
        if tool == "image":
            picture = f"image: {text}\n" if text else ""
            lines.append(f"{i}. {picture}title: {title}")
        else:
            lines.append(f"{i}. ({title}) {text}")
    return "\n".join(lines)


def _mmsearch_r1_frame(text: str, question: str, tool: str) -> str:
    after = _MM_AFTER.get(tool, _MM_AFTER["text"])
    return (
        f"<|im_end|>\n<|im_start|>user\nSearched results: <information>{text}</information>\n"
        f"Original user's question: {question}\n{after}<|im_end|>\n<|im_start|>assistant\n"
    )


MMSEARCH_R1 = Dialect(
    name="mmsearch_r1",
    stop_sequences=("</search>", "</text_search>", "</answer>"),
    in_turn=False,
    think="reason",
    call="text_search",
    agent_text=_MM_AGENT,
    direct_text=_MM_DIRECT,
    frame=_mmsearch_r1_frame,
    hits=_mmsearch_r1_hits,
)

DIALECTS = {dialect.name: dialect for dialect in (SEARCH_R1, MMSEARCH_R1)}


def get_dialect(name: str) -> Dialect:
    """The dialect of that name.

    Raises:
        EnvironmentSetupError: no such dialect.
    """
    if name not in DIALECTS:
        names = ", ".join(DIALECTS)
        raise EnvironmentSetupError(f"unknown dialect '{name}'; choose one of {names}")
    return DIALECTS[name]
