"""No trick pays, under any settings; the page shows what each one earns."""

import itertools
from pathlib import Path

import pytest

from environments.dialects import DIALECTS, get_dialect
from rewards.answer import correctness
from rewards.compose import SIGNS, score
from rewards.format import format_score
from rewards.lunches import (
    BEGIN,
    DEFAULT,
    END,
    FOUND,
    HERMES,
    HONEST,
    MMSEARCH_R1,
    QUESTION,
    SEARCH_R1,
    SETTINGS,
    TRICKS,
    Writer,
    earned,
    table,
    write_table,
)
from rewards.search import redundancy

EVERYTHING = (*HONEST, *TRICKS)
PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
WRITER = Writer()
WRITERS = {
    "search_r1": SEARCH_R1, "search_r1_full": SEARCH_R1, "mmsearch_r1": MMSEARCH_R1,
    "hermes": HERMES,
}  # fmt: skip


@pytest.mark.parametrize("lunch", EVERYTHING, ids=lambda lunch: lunch.name)
def test_a_trick_earns_what_it_is_worth(lunch):
    assert earned(lunch, DEFAULT) == pytest.approx(lunch.fair)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("lunch", TRICKS, ids=lambda lunch: lunch.name)
def test_no_setting_makes_a_trick_worth_more_than_an_honest_wrong_answer(lunch, settings):
    if lunch.fair > 1.0:  # what looks the same is the same answer
        assert earned(lunch, SETTINGS[settings]) == earned(HONEST[0], SETTINGS[settings])
    else:
        assert earned(lunch, SETTINGS[settings]) <= lunch.fair + 1e-12


@pytest.mark.parametrize("lunch", EVERYTHING, ids=lambda lunch: lunch.name)
@pytest.mark.parametrize("name", DIALECTS)
def test_the_dialect_reads_the_tricks_as_they_say(lunch, name):
    dialect = get_dialect(name)
    for turn in lunch.episode(WRITERS[name]):
        kind = type(dialect.parse(turn["text"])).__name__.lower()
        assert kind == turn["action"]["type"]


@pytest.mark.parametrize("lunch", EVERYTHING, ids=lambda lunch: lunch.name)
def test_the_dialects_own_format_rule_gives_no_more(lunch):
    for name, writer in WRITERS.items():
        episode = {"turns": lunch.episode(writer)}
        total = score(episode, QUESTION, DEFAULT, get_dialect(name).check_format)["total"]
        assert total <= lunch.fair + 1e-12


CALLS = {
    "search_r1": ("<search>q</search>", "<search><img></search>"),
    "search_r1_full": ("<search>q</search>", "<search><img></search>"),
    "mmsearch_r1": ("<text_search>q</text_search>", "<search><img></search>"),
    "hermes": (
        '<tool_call>{"name": "text_search", "arguments": {"query": "q"}}</tool_call>',
        '<tool_call>{"name": "image_search", "arguments": {}}</tool_call>',
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("n_calls", range(5))
def test_every_legal_sequence_is_well_formed_and_no_other(name, n_calls):
    """All orders of text and image searches, then the answer; every turn in turn left out."""
    think = WRITERS[name].think
    check = get_dialect(name).check_format
    for calls in itertools.product(CALLS[name], repeat=n_calls):
        turns = [f"<{think}>t</{think}>\n{call}\n" for call in (*calls, "<answer>x</answer>")]
        made = {"turns": [{"text": turn} for turn in turns]}
        assert format_score(made, check) == format_score(made) == 1.0
        broken = [turns[:-1], [*turns, turns[0]], [turns[-1], *turns], [*turns[:-1], "x"]]
        broken += [[*turns[:i], turns[i] + "so", *turns[i + 1 :]] for i in range(len(turns))]
        for texts in broken:
            assert format_score({"turns": [{"text": text} for text in texts]}, check) == 0.0


@pytest.mark.parametrize("part", ["format", *SIGNS])
def test_no_part_is_raised_by_tags_without_content(part):
    weights = {"accuracy": 0.0, "format": 0.0, "search_penalty": 0.0, part: 1.0}
    for turn in (
        WRITER.turn("", "answer", "", "answer"),
        WRITER.turn(" ", "answer", "\u200b", "answer"),
        WRITER.turn("\u2060", "search", "\u200b", "search"),
        # letters, marks and a symbol by their category, and drawn as nothing all the same
        WRITER.turn("\u3164", "answer", "\u2800", "answer"),
        WRITER.turn("\u034f", "answer", "\U000e0100", "answer"),
    ):
        assert score({"turns": [turn] * 3}, QUESTION, weights)["total"] <= 0.0


def test_a_tag_that_becomes_one_without_invisible_characters_is_none():
    """The environment does not read it, so it must not be well-formed."""
    hidden = "<th\u200bink>t</th\u200bink><answer>Rome</answer>"
    episode = {"turns": [WRITER.raw(hidden, "answer", "Rome")]}
    assert score(episode, QUESTION, DEFAULT)["format"] == 0.0


def test_evidence_is_what_the_environment_returned():
    weights = DEFAULT | {"evidence": 1.0}

    def evidence(*turns):
        return score({"turns": list(turns)}, QUESTION, weights)["evidence"]

    assert evidence(WRITER.search("q", FOUND)) == 1.0
    assert evidence(WRITER.search("q", FOUND[1:])) == 0.0
    assert evidence(WRITER.search(FOUND[0], page=FOUND[0])) == 0.0  # named, not found
    image = WRITER.search("q", FOUND) | {"action": {"type": "image_search", "region": "full"}}
    assert evidence(image) == 0.0  # a picture's neighbours are no passages
    several = {"type": "parallel", "calls": [{"type": "search", "query": "q"}]}
    assert evidence(WRITER.search("q", FOUND) | {"action": several}) == 1.0
    nothing_known = {**QUESTION, "gold_passages": []}
    parts = score({"turns": [WRITER.answer("Paris")]}, nothing_known, weights)
    assert parts["evidence"] is None
    assert parts["total"] == pytest.approx(1.1)


def test_economy_compares_a_right_answers_calls_with_the_best_known_number():
    weights = DEFAULT | {"economy": 1.0}

    def economy(n, text="Paris", **question):
        turns = [*(WRITER.search(f"q{i}") for i in range(n)), WRITER.answer(text)]
        return score({"turns": turns}, {**QUESTION, **question}, weights)["economy"]

    assert economy(1) == 1.0
    assert economy(0) == 1.0  # fewer than the best known earns nothing more
    assert economy(3) == pytest.approx(0.5)  # (1 + 1) / (1 + 3)
    assert economy(3, best_calls=3) == 1.0
    assert economy(1, text="Rome") == 0.0
    assert economy(3, best_calls=None) == pytest.approx(0.5)  # hops say it then
    assert economy(1, hops=None) is None


def test_redundancy_counts_calls_that_say_the_same_again():
    def share(*turns):
        return redundancy({"turns": list(turns)})

    assert share(WRITER.search("capital of France"), WRITER.search("France, capital of")) == 0.5
    assert share(WRITER.search("a b"), WRITER.search("a c")) == 0.0
    assert share(WRITER.answer("x")) == 0.0
    image = {"action": {"type": "image_search", "region": "full"}}
    box = {"action": {"type": "image_search", "region": [0, 0, 1, 1]}}
    assert share(image, image, box) == pytest.approx(1 / 3)
    visit = {"action": {"type": "visit", "url": "u", "question": ""}}
    assert share(visit, visit) == 0.5
    failed = WRITER.search("q") | {"fault": "infrastructure"}
    assert share(failed, WRITER.search("q")) == 0.0  # asking again is no repetition then


def test_the_penalty_can_be_taken_for_every_search():
    weights = DEFAULT | {"search_penalty_per": "search"}
    turns = [WRITER.search("a"), WRITER.search("b"), WRITER.answer("Paris")]
    parts = score({"turns": turns}, QUESTION, weights)
    # 1 - 0.9 * 0.9
    assert parts["search_penalty"] == pytest.approx(0.19)
    assert parts["total"] == pytest.approx(0.91)
    wrong = score({"turns": [*turns[:2], WRITER.answer("Rome")]}, QUESTION, weights)
    assert wrong["search_penalty"] == 0.0


def test_the_parts_add_up_to_the_total():
    weights = {
        "accuracy": 2.0, "format": 0.5, "search_penalty": 0.25, "evidence": 0.3, "economy": 0.7,
        "redundancy": 0.9,
    }  # fmt: skip
    turns = [WRITER.search("q", FOUND), WRITER.search("q"), WRITER.answer("Paris")]
    parts = score({"turns": turns}, QUESTION, weights)
    # 2 * 1 * 0.75 + 0.5 + 0.3 + 0.7 * (1 + 1) / (1 + 2) - 0.9 * 1 / 2
    assert parts["total"] == pytest.approx(1.5 + 0.5 + 0.3 + 1.4 / 3 - 0.45)


def test_an_unscored_episode_has_every_part_and_no_value():
    weights = DEFAULT | {"evidence": 1.0}
    failed = {"turns": [WRITER.search("q") | {"fault": "infrastructure"}, WRITER.answer("Paris")]}
    parts = score(failed, QUESTION, weights)
    assert parts == {
        "total": None,
        "accuracy": None,
        "format": 1.0,
        "search_penalty": None,
        "evidence": None,
    }


def test_look_alike_letters_are_another_answer_and_zero_width_ones_are_not():
    for match in ("exact", "typed", "contains", "f1"):
        assert correctness("P\u0430ris", QUESTION, match) == 0.0
        assert correctness("Pa\u200bris", QUESTION, match) == 1.0


def test_the_page_holds_the_table_of_now(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    inside = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert inside == table(), "run: python -m rewards.lunches docs/rewards.md"
    copy = tmp_path / "rewards.md"
    copy.write_text(text, encoding="utf-8")
    write_table(copy)
    assert copy.read_text(encoding="utf-8") == text
    copy.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="are missing"):
        write_table(copy)
