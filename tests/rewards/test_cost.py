"""Linear time on hostile text, and normal forms that the fast and the slow path share."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Rewards
from environments.dialects import SEARCH_R1
from rewards import normalize
from rewards.answer import (
    TAGS,
    correctness,
    exact_match,
    extract_answer,
    final_answer,
    usable_answers,
)
from rewards.checks import careful_f1, choice_matches, contains_answer, list_matches, token_f1
from rewards.compose import PARTS, part_names, score
from rewards.dates import date_matches, read_dates
from rewards.format import is_well_formed
from rewards.infoseek import read_prediction
from rewards.lunches import QUESTION
from rewards.mmsearch_r1 import official_reward
from rewards.normalize import normalize_answer
from rewards.numeric import number_matches
from rewards.quantities import read_quantities
from rewards.search import has_searched
from rewards.search_r1 import format_reward
from rewards.squad import squad_f1, squad_normalize

N = 100_000
HOSTILE = {
    "one word": "x" * N,
    "spaces": " " * N,
    "blank lines": "\n \t" * (N // 3),
    "digits": "9" * N,
    "groups": "1,234" * (N // 5),
    "numbers": "1 " * (N // 2),
    "quantities": "1.05 km (3445 ft) " * (N // 18),
    "dates": "5 May 1998 " * (N // 11),
    "articles": "the a " * (N // 6),
    "dashes": "-" * N,
    "points": "." * N,
    "commas": "a, " * (N // 3),
    "accents": "e\u0301" * (N // 2),
    "marks": "e" + "\u0301" * N,
    "zero width": "\u200b" * N,
    "openings": "<answer>" * (N // 8),
    "thoughts": "<think>t</think>" * (N // 16),
    "closings": "<answer>x</answer> " * (N // 19),
    "ends": "<|im_end|> " * (N // 11),
    "superscripts": "10⁵ " * (N // 4),
    "emoji": "🇫🇷" * (N // 2),
}
FUNCTIONS = {
    "normalize_answer": normalize_answer.__wrapped__,
    "squad_normalize": squad_normalize,
    "extract_answer": extract_answer,
    "is_well_formed": lambda text: is_well_formed([text, f"<think>{text}</think><answer>"]),
    "read_quantities": read_quantities,
    "read_dates": read_dates,
    "read_prediction": read_prediction,
    "number_matches": lambda text: number_matches(text, "5 km"),
    "date_matches": lambda text: date_matches(text, "1998"),
    "contains_answer": lambda text: contains_answer(text, "Paris"),
    "token_f1": lambda text: token_f1(text, "Paris"),
    "careful_f1": lambda text: careful_f1(text, "Paris"),
    "squad_f1": lambda text: squad_f1(text, "Paris"),
    "choice_matches": lambda text: choice_matches(text, "A", ["Paris"]),
    "list_matches": lambda text: list_matches(text, ["a", "b"]),
    "search_r1": lambda text: format_reward(f"<|im_start|>assistant{text}", ["Paris"]),
    "mmsearch_r1": lambda text: official_reward([text, text], ["Paris"]),
    "typed": lambda text: correctness(text, {"answers": ["5 km"]}, "typed", 2 * N),
    "score": lambda text: score(
        {"turns": [{"text": f"<think>t</think><answer>{text}</answer>"}]}, QUESTION, Rewards()
    ),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hundred_thousand_characters_take_no_time_that_matters(text):
    """A quadratic step would take minutes; the slowest linear one takes a second."""
    for name, function in FUNCTIONS.items():
        start = time.process_time()
        function(text)
        assert time.process_time() - start < 8.0, name


def seconds(function, text):
    """Processor time; the best of three where it is long enough to be disturbed."""
    times = []
    while len(times) < 3 and (not times or min(times) > 0.05):
        start = time.process_time()
        function(text)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_four_times_the_text_takes_about_four_times_as_long(name):
    """Sixteen times would be quadratic."""
    for text in HOSTILE.values():
        short, long = (seconds(FUNCTIONS[name], text[: N // part]) for part in (20, 5))
        assert long < max(0.1, 11 * short), text[:20]


# ---------------------------------------------------------------- fast and slow


@settings(max_examples=1000)
@given(st.text(st.characters(max_codepoint=127), max_size=20))
def test_the_ascii_path_equals_the_general_one(text):
    assert normalize._plain_ascii(text) == normalize._plain(text)


@given(st.text(st.characters(), max_size=30))
def test_normal_forms_are_normal(text):
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_the_ascii_path_equals_the_general_one_on_what_punctuation_can_do():
    rng = random.Random(0)
    for _ in range(20_000):
        text = "".join(rng.choices("aA1 .-_&/\\'\"$+,\t\n\x00\x1c()", k=rng.randint(0, 8)))
        assert normalize._plain_ascii(text) == normalize._plain(text)


# ---------------------------------------------------------------- today's reward

EVERY_TAG = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
tag_soup = st.lists(
    st.one_of(
        st.sampled_from(EVERY_TAG), st.sampled_from([" ", "t", "Paris", "Rome", "City of Light"])
    ),
    max_size=12,
).map("".join)
actions = st.sampled_from(["search", "image_search", "answer", "invalid"])
turns = st.lists(
    st.builds(
        lambda text, kind, fault: {"text": text, "action": {"type": kind}, "fault": fault},
        tag_soup,
        actions,
        st.sampled_from([None, None, None, "model", "infrastructure"]),
    ),
    max_size=4,
)


def first_reward(trajectory, question, weights, check_format):
    """The reward as it was before there were further parts, kept to compare with."""
    formatted = float(check_format([turn["text"] for turn in trajectory["turns"]]))
    if any(turn["fault"] == "infrastructure" for turn in trajectory["turns"]):
        return {"accuracy": None, "format": formatted, "search_penalty": None, "total": None}
    is_correct = exact_match(final_answer(trajectory), question["answers"], 200)
    penalty = weights.search_penalty if is_correct and has_searched(trajectory) else 0.0
    total = weights.accuracy * is_correct * (1.0 - penalty)
    total += weights.format * formatted
    return {
        "accuracy": float(is_correct),
        "format": formatted,
        "search_penalty": penalty,
        "total": total,
    }


@settings(max_examples=1000)
@given(turns)
def test_the_defaults_are_the_first_reward_bit_for_bit(made):
    trajectory = {"turns": made}
    for check in (SEARCH_R1.check_format, is_well_formed):
        ours = score(trajectory, QUESTION, Rewards(), check)
        assert ours == first_reward(trajectory, QUESTION, Rewards(), check)
        assert set(ours) == set(PARTS)
    assert part_names(Rewards()) == ("total", "accuracy", "format", "search_penalty")


@given(turns, st.sampled_from(["exact", "typed", "contains", "f1"]))
def test_every_part_is_total_and_bounded(made, match):
    weights = Rewards(evidence=0.2, economy=0.3, redundancy=0.4, answer_match=match)
    parts = score({"turns": made}, QUESTION, weights)
    assert set(parts) == set(part_names(weights))
    for part, value in parts.items():
        low, high = (-0.4, 1.0 + 0.1 + 0.2 + 0.3) if part == "total" else (0.0, 1.0)
        assert value is None or low <= value <= high + 1e-12


def test_usable_answers_cost_once_per_question():
    golds = [f"Answer number {i}" for i in range(100)]
    usable_answers(golds)
    before = normalize_answer.cache_info().misses
    usable_answers(golds)
    assert normalize_answer.cache_info().misses == before
