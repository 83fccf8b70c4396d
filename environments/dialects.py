"""The dialects: what a call, an observation and an answer look like as text.

Four, held as data. `search_r1` (arXiv 2503.09516) puts a search result inside the assistant's turn
and asks in few words, for the tiny models of the atlas; `search_r1_full` asks with the instruction
that the published agents were trained on, and lays results out as they saw them; `mmsearch_r1`
(arXiv 2506.20670) sends a result as a new user turn; `hermes` is the tool calling of the Qwen2.5
and Qwen3 chat templates: JSON calls, several in a turn if need be, results as tool responses. Every
dialect understands every tag when it *parses*, because a merged policy may mix its parents' habits
and its search rate would otherwise be under-measured; `check_format` accepts the dialect's own tags
only.
"""

from collections.abc import Sequence
from dataclasses import replace

from environments.actions import (
    Action,
    Answer,
    ImageSearch,
    Invalid,
    Parallel,
    Search,
    Visit,
    action_dict,
)
from environments.dialect import CALL_TAGS, TAGS, Dialect, strip_end
from environments.errors import EnvironmentSetupError
from environments.sanitize import IMAGE_MARK, MAX_OBSERVATION_CHARS, one_line, sanitize

__all__ = [
    "DIALECTS", "HERMES", "IMAGE_MARK", "MAX_OBSERVATION_CHARS", "MMSEARCH_R1", "SEARCH_R1",
    "SEARCH_R1_FULL", "TAGS", "Action", "Answer", "Dialect", "ImageSearch", "Invalid", "Parallel",
    "Search", "Visit", "action_dict", "get_dialect", "one_line", "sanitize", "strip_end",
]  # fmt: skip

# After any of these the policy has said what it wants; the rest would be a rehearsed result.
_ENDS = tuple(f"</{tag}>" for tag in CALL_TAGS)


# ---------------------------------------------------------------- Search-R1


def _search_r1_hits(pairs: Sequence[tuple[str, str]], tool: str) -> str:
    numbered = enumerate(pairs, 1)
    return " ".join(f"Doc {i}(Title: {title}) {text}".rstrip() for i, (title, text) in numbered)


def _search_r1_frame(texts: Sequence[str], question: str, tool: str) -> str:
    return f"\n\n<information> {' '.join(texts)} </information>\n\n"


SEARCH_R1 = Dialect(
    name="search_r1",
    stop_sequences=_ENDS,
    in_turn=True,
    think="think",
    calls={"search": "search", "image_search": "search", "visit": "visit", "answer": "answer"},
    agent_text="Think, then search with <search> query </search> or <search> <img> </search> "
    "if you need, {visit}then <answer>.\nQuestion: {question}",
    visit_text="read a page with <visit> address </visit> if you need, ",
    direct_text="Answer directly.\nQuestion: {question}",
    frame=_search_r1_frame,
    hits=_search_r1_hits,
)

# Byte for byte the source's, but for the sentences about pictures and pages, which it has not.

_ANSWER_ONLY = (
    "Answer the given question inside <answer> and </answer>, without detailed illustrations. For "
    "example, <answer> Beijing </answer>.\nQuestion: {question}"
)


def _listed_hits(pairs: Sequence[tuple[str, str]], tool: str) -> str:
    numbered = enumerate(pairs, 1)
    return "\n".join(f"Doc {i}(Title: {title}) {text}".rstrip() for i, (title, text) in numbered)


def _search_r1_full_frame(texts: Sequence[str], question: str, tool: str) -> str:
    found = "\n".join(texts)
    return f"\n\n<information>{found}</information>\n\n"


SEARCH_R1_FULL = replace(
    SEARCH_R1,
    name="search_r1_full",
    agent_text="Answer the given question. You must conduct reasoning inside <think> and </think> "
    "first every time you get new information. After reasoning, if you find you lack some "
    "knowledge, you can call a search engine by <search> query </search> and it will return the "
    "top searched results between <information> and </information>. You can search as many times "
    "as your want. If you find no further external knowledge needed, you can directly provide the "
    "answer inside <answer> and </answer>, without detailed illustrations. For example, <answer> "
    "Beijing </answer>. You can search with the picture of the question by <search> <img> "
    "</search>. {visit}Question: {question}\n",
    visit_text="You can read a page by <visit> address </visit>. ",
    direct_text=_ANSWER_ONLY,
    frame=_search_r1_full_frame,
    hits=_listed_hits,
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
    "here</text_search> at the end of your response.\n{visit}"
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


def _mmsearch_r1_frame(texts: Sequence[str], question: str, tool: str) -> str:
    after = _MM_AFTER.get(tool, _MM_AFTER["text"])
    found = "\n".join(texts)
    return (
        f"<|im_end|>\n<|im_start|>user\nSearched results: <information>{found}</information>\n"
        f"Original user's question: {question}\n{after}<|im_end|>\n<|im_start|>assistant\n"
    )


MMSEARCH_R1 = Dialect(
    name="mmsearch_r1",
    stop_sequences=_ENDS,
    in_turn=False,
    think="reason",
    calls={"search": "text_search", "image_search": "search", "visit": "visit", "answer": "answer"},
    agent_text=_MM_AGENT,
    visit_text="To read one of the pages found, output its address in the format <visit>address"
    "</visit> at the end of your response.\n",
    direct_text=_MM_DIRECT,
    frame=_mmsearch_r1_frame,
    hits=_mmsearch_r1_hits,
)

# ---------------------------------------------------------------- Hermes, as Qwen2.5 and Qwen3
# Byte for byte what their chat templates make of `tools`, of a call's result and of several; the
# instruction about <think> and <answer> is that of verl's Search-R1 recipe with tool calls.

_HERMES_SYSTEM = (
    "You are a helpful assistant.\n\n# Tools\n\nYou may call one or more functions to assist with "
    "the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:"
    "\n<tools>{tools}\n</tools>\n\nFor each function call, return a json object with function name "
    "and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def _hermes_frame(texts: Sequence[str], question: str, tool: str) -> str:
    responses = "".join(f"\n<tool_response>\n{text}\n</tool_response>" for text in texts)
    return f"<|im_end|>\n<|im_start|>user{responses}<|im_end|>\n<|im_start|>assistant\n"


HERMES = Dialect(
    name="hermes",
    # not after a JSON call, which another may follow: the model's end token does that
    stop_sequences=(*(end for end in _ENDS if end != "</tool_call>"), "<tool_response>"),
    in_turn=False,
    think="think",
    needs_thought=False,
    is_parallel=True,
    calls={
        "search": "tool_call",
        "image_search": "tool_call",
        "visit": "tool_call",
        "answer": "answer",
    },
    agent_text="Answer the given question. You may reason inside <think> and </think> first. If "
    "you lack some knowledge, call a tool; the results come between <tool_response> and "
    "</tool_response>. If no further knowledge is needed, give the answer inside <answer> and "
    "</answer>, without detailed illustrations. For example, <answer> Beijing </answer>.\n"
    "Question: {question}",
    direct_text=_ANSWER_ONLY,
    system_text=_HERMES_SYSTEM,
    frame=_hermes_frame,
    hits=_listed_hits,
)

DIALECTS = {dialect.name: dialect for dialect in (SEARCH_R1, SEARCH_R1_FULL, MMSEARCH_R1, HERMES)}


def get_dialect(name: str) -> Dialect:
    """The dialect of that name, or the one that a `.yaml` file describes.

    Raises:
        EnvironmentSetupError: no such dialect, or a file that describes none.
    """
    if name in DIALECTS:
        return DIALECTS[name]
    if name.endswith(".yaml"):
        from environments.own_dialect import read_dialect

        return read_dialect(name, DIALECTS)
    names = ", ".join(DIALECTS)
    raise EnvironmentSetupError(
        f"unknown dialect '{name}'; choose one of {names}, or name a .yaml file"
    )
