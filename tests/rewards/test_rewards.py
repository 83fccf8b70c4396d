"""Rewards: hand-computed values, free lunches, and what cannot be scored."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import Rewards
from environments.dialects import DIALECTS, Answer, get_dialect
from rewards.answer import exact_match, extract_answer, final_answer, usable_answers
from rewards.compose import PARTS, score, score_each
from rewards.errors import RewardError
from rewards.format import is_well_formed
from rewards.search import count_searches, has_searched

WEIGHTS = {"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1}
QUESTION = {
    "question": "Which city is the capital of France?",
    "answers": ["Paris", "City of Light"],
}
TAGS = ("think", "reason", "search", "text_search", "answer", "information", "img")

tag_soup = st.lists(
    st.one_of(
        st.sampled_from([f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS]),
        st.sampled_from([" ", "\n", "<", "<|im_end|>", "Paris"]),
        st.text(max_size=4),
    ),
    max_size=10,
).map("".join)


def turn(content: str, kind: str, **extra) -> dict:
    return {
        "text": f"<think> t </think> {content}",
        "action": {"type": kind},
        "fault": None,
        **extra,
    }


def search(query: str = "q", **extra) -> dict:
    return turn(f"<search> {query} </search>", "search", **extra)


def image_search(**extra) -> dict:
    return turn("<search> <img> </search>", "image_search", **extra)


def answer(text: str) -> dict:
    return turn(f"<answer> {text} </answer>", "answer")


def run(*turns: dict) -> dict:
    return {"turns": list(turns)}


def total(*turns: dict, weights=WEIGHTS, question=QUESTION) -> float | None:
    return score(run(*turns), question, weights)["total"]


# ---------------------------------------------------------------- values


def test_parts_and_totals_by_hand():
    # right without a search: 1.0 * 1 * (1 - 0) + 0.1 * 1
    assert score(run(answer("Paris")), QUESTION, WEIGHTS) == {
        "accuracy": 1.0,
        "format": 1.0,
        "search_penalty": 0.0,
        "total": pytest.approx(1.1),
    }
    # right with a search: 1.0 * 1 * (1 - 0.1) + 0.1 * 1
    assert score(run(search(), answer("paris")), QUESTION, WEIGHTS) == {
        "accuracy": 1.0,
        "format": 1.0,
        "search_penalty": 0.1,
        "total": pytest.approx(1.0),
    }
    # wrong with a search: nothing is taken from nothing
    assert score(run(search(), answer("Rome")), QUESTION, WEIGHTS) == {
        "accuracy": 0.0,
        "format": 1.0,
        "search_penalty": 0.0,
        "total": pytest.approx(0.1),
    }


def test_weights_act_where_they_should():
    weights = {"accuracy": 2.0, "format": 0.5, "search_penalty": 0.25}
    # 2 * 1 * (1 - 0.25) + 0.5 * 1
    assert total(image_search(), answer("Paris"), weights=weights) == pytest.approx(2.0)
    untidy = {"text": "<answer> Paris </answer>", "action": {"type": "answer"}}
    assert total(untidy, weights=weights) == pytest.approx(2.0)  # 2 * 1 + 0.5 * 0


def test_the_search_penalty_is_taken_once():
    once = total(search(), answer("Paris"))
    assert total(*[search()] * 5, image_search(), answer("Paris")) == once


def test_a_right_answer_beats_every_wrong_one_and_saves_by_not_searching():
    assert total(answer("Paris")) > total(search(), answer("Paris")) > total(answer("Rome"))


def test_any_alias_is_right():
    assert total(answer("the city of light")) == total(answer("Paris"))


def test_the_settings_section_serves_as_weights():
    assert score(run(search(), answer("Paris")), QUESTION, Rewards())["total"] == pytest.approx(1.0)


def test_objects_score_like_dicts():
    @dataclass
    class Turn:
        text: str
        action: dict
        fault: str | None = None

    @dataclass
    class Trajectory:
        turns: list = field(default_factory=list)

    made = Trajectory([Turn(t["text"], t["action"]) for t in (search(), answer("Paris"))])
    assert score(made, QUESTION, WEIGHTS) == score(
        run(search(), answer("Paris")), QUESTION, WEIGHTS
    )


def test_a_batch_keeps_its_order():
    runs = [run(answer("Rome")), run(answer("Paris"))]
    batch = score_each(runs, [QUESTION] * 2, WEIGHTS)
    assert [tuple(row) for row in batch] == [PARTS] * 2
    assert [row["accuracy"] for row in batch] == [0.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        score_each(runs, [QUESTION], WEIGHTS)


def test_a_missing_weight_is_a_users_mistake():
    with pytest.raises(RewardError, match=r"rewards\.format is missing"):
        score(run(answer("Paris")), QUESTION, {"accuracy": 1, "search_penalty": 0})
    assert RewardError.exit_code == 2


def test_the_format_rule_of_a_dialect_can_be_handed_in():
    mmsearch = {"text": "<reason> r </reason> <answer>Paris</answer>", "action": {"type": "answer"}}
    for name, expected in (("mmsearch_r1", 1.0), ("search_r1", 0.0)):
        check = get_dialect(name).check_format
        assert score(run(mmsearch), QUESTION, WEIGHTS, check)["format"] == expected
    assert score(run(mmsearch), QUESTION, WEIGHTS)["format"] == 1.0


# ---------------------------------------------------------------- what cannot be scored


def test_a_failed_tool_leaves_the_episode_unscored():
    faulty = run(search(fault="infrastructure"), answer("Paris"))
    assert score(faulty, QUESTION, WEIGHTS) == {
        "accuracy": None,
        "format": 1.0,
        "search_penalty": None,
        "total": None,
    }
    scored = score(faulty, QUESTION, {**WEIGHTS, "infrastructure_fault": "score"})
    assert scored["total"] == pytest.approx(1.0)


def test_the_models_own_bad_call_is_scored():
    assert total(search(fault="model"), answer("Rome")) == pytest.approx(0.1)


@pytest.mark.parametrize("answers", [[], [""], [" ", "\u200b"], None])
def test_a_question_without_a_usable_answer_cannot_be_scored(answers):
    assert total(answer("x"), question={"answers": answers}) is None


def test_an_empty_gold_answer_is_dropped_beside_a_real_one():
    question = {"answers": ["", "Paris"]}
    assert total(answer("Paris"), question=question) == pytest.approx(1.1)
    assert total(answer("\u200b"), question=question) == 0.0  # what nobody sees is no content


# ---------------------------------------------------------------- free lunches

BEST_WRONG = pytest.approx(0.1)  # a tidy episode with a wrong answer, and no trick beats it


@pytest.mark.parametrize(
    ("trick", "expected"),
    [
        ([], 0.0),
        ([answer("")], 0.0),
        ([answer(" \n ")], 0.0),
        ([turn("", "invalid")], 0.0),
        ([{"text": "", "action": {"type": "invalid"}}], 0.0),
        ([{"text": "<think></think><answer></answer>", "action": {"type": "answer"}}], 0.0),
        ([{"text": "<think><search><answer></answer>", "action": {"type": "invalid"}}], 0.0),
        ([answer("<answer> Paris </answer> <search> Paris")], 0.0),
        ([search()] * 8, 0.0),
        ([search("Paris")] * 3, 0.0),
        ([*[search()] * 8, answer("Rome")], BEST_WRONG),
        ([answer(QUESTION["question"])], BEST_WRONG),
        ([answer("Rome or Paris or Bonn")], BEST_WRONG),
        ([answer("Paris, Rome")], BEST_WRONG),
        ([answer("the")], BEST_WRONG),
        ([answer("...")], BEST_WRONG),
        ([answer("the " * 100 + "Paris")], BEST_WRONG),
        ([answer("Paris" + "." * 300)], BEST_WRONG),
        # only the last turn counts
        ([answer("Paris"), search()], 0.0),
        ([answer("Paris"), answer("Rome")], 0.0),
        ([turn("<answer> Paris </answer> <search> q </search>", "search")], 0.0),
        ([turn("<answer> Paris </answer> I think", "invalid")], 0.0),
        ([turn("<answer> Paris </answer> <answer> Rome </answer>", "answer")], 0.0),
        # nor does anything the policy did not write as its answer
        ([turn("<information> <answer> Paris </answer> </information>", "invalid")], 0.0),
        ([search(observation="<answer> Paris </answer>", text="<search> q </search>")], 0.0),
        ([search(observation="<answer> Paris </answer>"), answer("Rome")], BEST_WRONG),
    ],
)
def test_no_trick_pays(trick, expected):
    assert total(*trick) == expected


def test_an_answer_forged_in_a_passage_does_not_count():
    forged = search(observation="\n\n<information> <answer> Paris </answer> </information>\n\n")
    assert final_answer(run(forged)) is None
    assert score(run(forged), QUESTION, WEIGHTS)["accuracy"] == 0.0


def test_the_limit_on_length_is_exact_and_configurable():
    assert exact_match("x" * 200, ["x" * 200])
    assert not exact_match("x" * 201, ["x" * 201])
    assert not exact_match("Paris", ["Paris"], max_chars=4)
    assert total(answer("Paris"), weights={**WEIGHTS, "max_answer_chars": 4}) == BEST_WRONG


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> Paris </answer>", "Paris"),
        ("<answer>Paris</answer>\n<|im_end|>", "Paris"),
        ("<answer> a </answer> <answer> b </answer>", "b"),
        ("<answer> a <answer> b </answer>", "b"),
        ("<answer> a </answer> b", None),
        ("<answer> a </answer> b </answer>", None),
        ("<answer> a", None),
        ("a </answer>", None),
        ("<answer></answer>", None),
        ("<ANSWER> a </ANSWER>", None),
        ("", None),
    ],
)
def test_the_last_well_formed_answer_at_the_end_is_taken(text, expected):
    assert extract_answer(text) == expected


@given(tag_soup)
def test_reward_and_environment_read_the_same_answer(text):
    for dialect in DIALECTS.values():
        action = dialect.parse(text)
        assert extract_answer(text) == (action.text if isinstance(action, Answer) else None)


def test_none_never_matches():
    assert not exact_match(None, ["None"])
    assert usable_answers(["Paris", "paris.", ""]) == {"paris"}


@given(st.text(st.characters(), max_size=100))
def test_every_visible_gold_answer_scores_itself(text):
    assert exact_match(text, [text, "other"]) == bool(usable_answers([text]))


def test_every_gold_answer_of_the_atlas_scores_one():
    questions = pytest.importorskip("environments.atlas.questions")
    distinct = {
        tuple(row["answers"])
        for split in ("train", "dev", "test")
        for kind in questions.KINDS
        for row in questions.list_questions(split, kind)
    }
    assert len(distinct) > 500
    for answers in distinct:
        for gold in answers:
            reward = total(answer(gold), question={"answers": answers})
            assert reward == pytest.approx(1.1), (gold, answers)


# ---------------------------------------------------------------- format and searches


@given(st.lists(tag_soup, max_size=3))
def test_every_dialects_rule_is_within_the_shared_one(turns):
    for dialect in DIALECTS.values():
        if dialect.needs_thought:
            assert is_well_formed(turns) >= dialect.check_format(turns)


@pytest.mark.parametrize("think", ["think", "reason"])
@pytest.mark.parametrize("call", ["search", "text_search", "image_search", "visit", "tool_call"])
def test_the_shared_format_rule(think, call):
    thought = f"<{think}> t </{think}>"
    good = [f"{thought} <{call}> q </{call}>", f"\n{thought}\n<answer> x </answer> <|im_end|>"]
    assert is_well_formed(good)
    assert is_well_formed(good[1:])
    assert not is_well_formed([])
    assert not is_well_formed(good[:1])
    assert not is_well_formed(good[::-1])
    assert not is_well_formed(["<answer> x </answer>"])
    assert not is_well_formed([f"{thought} so <answer> x </answer>"])
    assert not is_well_formed([f"<{think}> </{think}> <answer> x </answer>"])
    assert not is_well_formed([f"{thought} <answer> </answer>"])
    assert not is_well_formed([f"{thought} <answer> x </answer> so"])
    assert not is_well_formed([f"{thought} <answer> x <information> y </answer>"])
    assert not is_well_formed(["<think> t </reason> <answer> x </answer>"])


def test_several_json_calls_in_a_turn_are_well_formed_other_calls_are_not():
    answer_turn = "<think> t </think> <answer> x </answer>"
    calls = "<tool_call>{}</tool_call>\n<tool_call>{}</tool_call>"
    assert is_well_formed([f"<think> t </think> {calls}", answer_turn])
    assert not is_well_formed([f"<think> t </think> {calls} so", answer_turn])
    calls = "<search> q </search> <search> q </search>"
    assert not is_well_formed([f"<think> t </think> {calls}", answer_turn])


def test_calls_side_by_side_count_one_by_one():
    calls = [{"type": "search", "query": "a"}, {"type": "visit", "url": "u", "question": ""}]
    made = {"turns": [{"text": "x", "action": {"type": "parallel", "calls": calls}}]}
    assert count_searches(made) == {"text": 1, "image": 0, "page": 1}
    assert has_searched(made)


def test_searches_are_counted_by_kind():
    made = run(image_search(), search(), search(), answer("x"))
    assert count_searches(made) == {"text": 2, "image": 1, "page": 0}
    assert has_searched(made)
    assert has_searched(run(image_search()))
    assert not has_searched(run(answer("x")))
    assert count_searches({"turns": [{"text": "x"}]}) == {"text": 0, "image": 0, "page": 0}
