"""Is the episode well-formed? Range {0, 1}.

The exact rule belongs to a dialect and can be handed in; without one, the rule is what all dialects
share: every turn is one reasoning block and one call, the last turn one reasoning block and one
answer, with nothing empty and nothing but white space around them.
"""

import re
from collections.abc import Callable
from typing import Any

from rewards.trajectory import turn_texts

FormatCheck = Callable[[list[str]], bool]

_BLOCK = r"(?:(?!</?(?:think|reason|search|text_search|answer|information)>).)*?"
_THOUGHT = rf"<(?P<think>think|reason)>(?=\s*[^\s<]){_BLOCK}</(?P=think)>"
_CALL = rf"<(?P<call>search|text_search)>(?=\s*(?:[^\s<]|<img>)){_BLOCK}</(?P=call)>"
_ANSWER = rf"<answer>(?=\s*[^\s<]){_BLOCK}</answer>"
_END = r"(?:\s|<\|im_end\|>|<\|endoftext\|>)*"
_CALL_TURN = re.compile(rf"\s*{_THOUGHT}\s*{_CALL}{_END}", re.DOTALL)
_ANSWER_TURN = re.compile(rf"\s*{_THOUGHT}\s*{_ANSWER}{_END}", re.DOTALL)


def is_well_formed(turns: list[str]) -> bool:
    """The shared rule, on the policy's own turns."""
    if not turns:
        return False
    *calls, last = turns
    return all(map(_CALL_TURN.fullmatch, calls)) and _ANSWER_TURN.fullmatch(last) is not None


def format_score(trajectory: Any, check_format: FormatCheck | None = None) -> float:
    """1.0 for a well-formed episode, else 0.0."""
    return float((check_format or is_well_formed)(turn_texts(trajectory)))
