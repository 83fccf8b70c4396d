"""Is the episode well-formed? Range {0, 1}.

The exact rule belongs to a dialect and can be handed in; without one, the rule is what the dialects
with tags share: every turn is one reasoning block and one call (or several JSON calls), the last
turn one reasoning block and one answer, with nothing empty and nothing but white space around them.
"""

import re
from collections.abc import Callable
from typing import Any

from rewards.answer import TAGS
from rewards.normalize import visible
from rewards.trajectory import turn_texts

FormatCheck = Callable[[list[str]], bool]

_NO_TAG = rf"(?!</?(?:{'|'.join(tag for tag in TAGS if tag != 'img')})>)"
_INSIDE = rf"(?:{_NO_TAG}.)*"
_TURN = re.compile(
    rf"\s*<(?P<think>think|reason)>(?P<thought>{_INSIDE})</(?P=think)>"
    rf"(?:\s*<tool_call>(?:{_INSIDE})</tool_call>)*"
    r"\s*<(?P<call>search|text_search|image_search|visit|tool_call|answer)>"
    rf"(?P<content>{_INSIDE})</(?P=call)>"
    r"(?:\s|<\|im_end\|>|<\|endoftext\|>)*",
    re.DOTALL,
)


def is_well_formed(turns: list[str]) -> bool:
    """The shared rule, on the policy's own turns."""
    matches = [_TURN.fullmatch(turn) for turn in turns]
    return bool(turns) and all(
        match is not None
        and bool(match["thought"].strip() and match["content"].strip())
        and (match["call"] == "answer") == (i == len(turns) - 1)
        for i, match in enumerate(matches)
    )


def format_score(trajectory: Any, check_format: FormatCheck | None = None) -> float:
    """1.0 for a well-formed episode, else 0.0.

    Invisible characters are no content: the episode must be well-formed with and without them.
    """
    check, texts = check_format or is_well_formed, turn_texts(trajectory)
    bare = [visible(text) for text in texts]
    return float(check(texts) and (bare == texts or check(bare)))
