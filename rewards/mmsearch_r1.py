"""The reward of MMSearch-R1 (arXiv 2506.20670; repository at 583c6b4), also the metric of FVQA.

    reward = 0.9 * score + 0.1 * format,  score = EM, times 0.9 if it is right and searched

Known flaws of the source: its format rule knows four sequences of turns (answer; image, answer;
text, answer; image, text, answer), so that two text searches, which its environment allows, lose
the format part; reasoning and answer may be empty; a search counts wherever its tag stands, in the
reasoning, too; more than three turns stop its script. The strict twin is `rewards.compose.score`
with its weights: any legal order, nothing empty, searches as the environment saw them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from rewards.compose import score
from rewards.squad import between, squad_em, squad_subem
from rewards.trajectory import turn_texts

SEARCH_PENALTY, FORMAT_WEIGHT = 0.1, 0.1
MAX_TURNS = 3

_IMAGE = "<search><img></search>"
_SHAPES = {
    "answer": re.compile(r"^<reason>.*</reason>.*<answer>.*</answer>$", re.DOTALL),
    "image": re.compile(r"^<reason>.*</reason>.*<search><img></search>$", re.DOTALL),
    "text": re.compile(r"^<reason>.*</reason>.*<text_search>.*</text_search>$", re.DOTALL),
}
_SEQUENCES = (("answer",), ("image", "answer"), ("text", "answer"), ("image", "text", "answer"))


def official_reward(
    turns: Sequence[str],
    answers: Sequence[str],
    *,
    mode: Literal["em", "subem"] = "em",
    per_search: bool = False,
) -> float | None:
    """The source's reward. Range [0, 1].

    Args:
        turns: the policy's turns.
        answers: gold answer and candidates together.
        mode: exact match, or gold as a substring.
        per_search: the penalty is taken with every search.

    Returns:
        None where the source's script stops: no turn, or more than MAX_TURNS.
    """
    if not 0 < len(turns) <= MAX_TURNS:
        return None
    found = between(turns[-1], "<answer>", "</answer>")
    matches = squad_em if mode == "em" else squad_subem
    right = float(bool(found) and matches(found[-1].strip(), answers))
    stripped = [turn.strip() for turn in turns]
    n_searches = sum(map(_searches, stripped[:MAX_TURNS])) - _last_search(stripped)
    if right and n_searches:
        right *= (1.0 - SEARCH_PENALTY) ** (n_searches if per_search else 1)
    return (1.0 - FORMAT_WEIGHT) * right + FORMAT_WEIGHT * official_format(stripped)


def official_format(turns: Sequence[str]) -> float:
    """1.0 if the turns are one of the four sequences that the source knows, else 0.0."""
    kinds = [_kind(turn) for turn in turns]
    return float(tuple(kinds) in _SEQUENCES)


def strict_reward(trajectory: Any, answers: Sequence[str]) -> float | None:
    """The same reward by our rules; None where an episode cannot be scored."""
    weights = {
        "accuracy": 1.0 - FORMAT_WEIGHT,
        "format": FORMAT_WEIGHT,
        "search_penalty": SEARCH_PENALTY,
    }
    return score(trajectory, {"answers": list(answers)}, weights)["total"]


def official_of_trajectory(trajectory: Any, answers: Sequence[str]) -> float | None:
    """`official_reward` of an episode."""
    return official_reward(turn_texts(trajectory), answers)


def _searches(turn: str) -> bool:
    return _IMAGE in turn or ("<text_search>" in turn and "</text_search>" in turn)


def _last_search(turns: Sequence[str]) -> bool:
    """The source looks for a search in every turn but the last; a single turn is looked at."""
    return len(turns) > 1 and _searches(turns[-1])


def _kind(turn: str) -> str | None:
    """answer, image or text: the one whose shape the turn has, with each tag once, or None."""
    if turn.count("<reason>") != 1 or turn.count("</reason>") != 1:
        return None
    n_image = turn.count(_IMAGE)
    n_text = (turn.count("<text_search>"), turn.count("</text_search>"))
    n_answer = (turn.count("<answer>"), turn.count("</answer>"))
    match (n_image, n_text, n_answer):
        case (0, (0, 0), (1, 1)):
            kind = "answer"
        case (1, (0, 0), (0, 0)):
            kind = "image"
        case (0, (1, 1), (0, 0)):
            kind = "text"
        case _:
            return None
    return kind if _SHAPES[kind].match(turn) else None
