"""The verdict says what the numbers say, also that the method does not win."""

import pytest

from compare.verdict import comparison_verdict, each_against, floor_verdict, signed
from tests.compare.pages import comparison, floor, pair


def text_of(verdict):
    return " ".join([verdict.headline, *verdict.sentences])


def test_ahead_of_all_is_said_when_no_interval_overlaps():
    verdict = comparison_verdict(comparison({"obm": 0.6, "vlm": 0.1, "ties": 0.4}), str)
    assert verdict.tone == "good"
    assert verdict.headline == "obm is ahead of every other start after training."
    assert "obm is above vlm and ties" in text_of(verdict)
    # floors are half of the ceilings
    assert verdict.sentences[0] == (
        "Before any training obm answers 0.30 [0.25, 0.35] of the questions, vlm 0.05 "
        "[0.00, 0.10]; the best other start is ties with 0.20 [0.15, 0.25]."
    )
    assert "0.60 [0.55, 0.65], the highest mean; the next is ties" in verdict.sentences[1]


def test_below_one_is_a_loss_whatever_else_it_beats():
    verdict = comparison_verdict(comparison({"obm": 0.4, "vlm": 0.1, "ties": 0.6}), str)
    assert verdict.tone == "bad"
    assert verdict.headline == "obm does not win: after training it lies below ties."
    assert "the highest mean is that of ties, 0.60" in verdict.sentences[1]


def test_overlapping_intervals_are_not_separated():
    verdict = comparison_verdict(comparison({"obm": 0.5, "vlm": 0.1, "ties": 0.45}), str)
    assert verdict.tone == "open"
    assert verdict.headline == ("obm is ahead of vlm after training, but not separated from ties.")
    assert "not separated does not mean equal" in verdict.sentences[-1]
    alone = comparison_verdict(comparison({"obm": 0.5, "ties": 0.45}, target="ties"), str)
    assert alone.headline == "obm is not separated from any other start after training."


def test_paired_differences_count_before_overlap():
    arms = {"obm": 0.5, "ties": 0.45}
    apart = comparison(arms, target="ties", pairs=[pair("obm", "ties", 0.05, 0.01)])
    assert comparison_verdict(apart, str).tone == "good"
    assert "By differences within a seed" in text_of(comparison_verdict(apart, str))
    behind = comparison(arms, target="ties", pairs=[pair("obm", "ties", -0.05, 0.01)])
    assert comparison_verdict(behind, str).tone == "bad"
    # a pair the other way round, or of another measure, says nothing
    other = [pair("ties", "obm", 0.05, 0.01), pair("obm", "ties", 0.05, 0.01, metric="auc")]
    assert comparison_verdict(comparison(arms, target="ties", pairs=other), str).tone == "open"


def test_one_seed_separates_nothing():
    verdict = comparison_verdict(comparison({"obm": 0.9, "vlm": 0.1}, half=None), str)
    assert verdict.tone == "open"
    assert verdict.headline == "One seed: nothing here separates obm from the other starts."
    assert "repeat with more" in verdict.sentences[-1]
    assert "[" not in text_of(verdict)


def test_an_arm_with_one_seed_is_not_judged_and_the_others_are():
    summary = comparison({"obm": 0.6, "vlm": 0.1, "ties": 0.4})
    summary["arms"]["ties"] |= {"seeds": [0], "intervals": {}}
    verdict = comparison_verdict(summary, str)
    assert (verdict.tone, verdict.headline) == ("open", "obm is ahead of vlm after training.")
    assert "obm is above vlm; not judged against the one seed of ties." in text_of(verdict)
    assert verdict.sentences[-1].startswith("1 to 3 seeds an arm.")
    summary["arms"]["vlm"]["intervals"]["ceiling"] = [0.5, 0.7]
    verdict = comparison_verdict(summary, str)
    assert verdict.headline == "obm is not separated from vlm after training."
    summary["arms"]["vlm"]["intervals"]["ceiling"] = [0.7, 0.8]
    assert comparison_verdict(summary, str).tone == "bad"


def test_the_cost_to_the_target_is_told_with_and_without_device_time():
    summary = comparison({"obm": 0.6, "vlm": 0.3})
    assert "obm reaches the ceiling of vlm (0.30) after 5 steps." in text_of(
        comparison_verdict(summary, str)
    )
    summary["arms"]["obm"]["device_s_to_target"] = 300.0
    summary["arms"]["vlm"]["device_s_to_target"] = 9000.0
    assert (
        "after 5 steps and 5 device-minutes of device time, preparation included; vlm itself "
        "takes 2.5 device-hours." in text_of(comparison_verdict(summary, str))
    )
    summary["arms"]["obm"]["steps_to_target"] = None
    summary["arms"]["obm"]["per_seed"]["steps_to_target"] = [5, None, None]
    assert "in 1 of 3 seeds" in text_of(comparison_verdict(summary, str))
    summary["arms"]["obm"]["steps_to_target"] = 0.0
    assert "obm starts at or above" in text_of(comparison_verdict(summary, str))


def test_a_target_that_says_nothing_gives_way_to_a_height():
    summary = comparison({"obm": 0.6, "vlm": 0.3, "ties": 0.5, "dare": 0.4})
    summary["target"] = {"arm": "vlm", "value": 0.4, "ceiling": 0.004}
    for arm, steps in {"obm": [5, 5], "ties": [5, 10], "dare": [20, 20], "vlm": [None] * 2}.items():
        summary["arms"][arm]["per_seed"]["steps_to_0.4"] = steps
        summary["arms"][arm]["steps_to_0.4"] = None if None in steps else sum(steps) / 2
    summary["pairs"] = [
        pair("obm", "ties", -2.5, 3.0, metric="steps_to_0.4"),
        pair("obm", "dare", -15.0, 3.0, metric="steps_to_0.4"),
    ]
    verdict = comparison_verdict(summary, str)
    assert "obm reaches an accuracy of 0.4 after 5 steps." in verdict.sentences
    assert (
        "obm takes 5 steps to 0.4: fewer than dare; not separated from ties; not reached by every "
        "run of vlm." in verdict.sentences
    )
    assert ("5", "steps to an accuracy of 0.4") in verdict.tiles
    summary["target"]["value"] = None
    assert "The ceiling of vlm is 0.004: steps to it say nothing." in text_of(
        comparison_verdict(summary, str)
    )


def test_a_study_in_which_nothing_learns_names_no_best_start():
    verdict = comparison_verdict(comparison({"obm": 0.0, "vlm": 0.0, "ties": 0.0}), str)
    text = text_of(verdict)
    assert verdict.headline == "obm is not separated from any other start after training."
    assert "no other start reaches more" in text
    assert "highest mean" not in text
    assert "The ceiling of vlm is 0: steps to it say nothing." in text
    assert not any("steps to the ceiling" in words for _, words in verdict.tiles)


def test_an_equal_mean_is_not_beaten():
    text = text_of(comparison_verdict(comparison({"obm": 0.5, "vlm": 0.1, "ties": 0.5}), str))
    assert "0.50 [0.45, 0.55], the highest mean, and ties the same." in text


def test_nothing_that_rounds_to_zero_has_a_minus():
    assert [signed(value) for value in (-0.0, -0.004, 0.004, -0.006, 0.016)] == [
        "+0.00", "+0.00", "+0.00", "-0.01", "+0.02",
    ]  # fmt: skip
    assert signed(-0.0004, 3) == "+0.000"
    assert signed(-0.0006, 3) == "-0.001"


def test_two_to_six_sentences_and_none_where_nothing_is_to_compare():
    for arms in ({"obm": 0.5, "vlm": 0.1}, {"obm": 0.5, "vlm": 0.1, "ties": 0.4}):
        assert 2 <= len(comparison_verdict(comparison(arms), str).sentences) <= 6
    assert comparison_verdict(comparison({"obm": 0.5}), str) is None


def test_untrained_starts_are_judged_by_their_floor():
    summary = comparison({"obm": 0.8, "vlm": 0.2})
    for result in summary["arms"].values():
        result |= {"is_trained": False, "ceiling": None, "steps_to_target": None}
    verdict = comparison_verdict(summary, str)
    # floors .4 and .1, intervals .05 to either side
    assert verdict.headline == "obm is ahead of every other start before any training."


@pytest.mark.parametrize(
    ("accuracy", "tone", "words"),
    [
        ({"obm": 0.5, "ties": 0.2}, "good", "ahead of every other start before any training"),
        ({"obm": 0.2, "ties": 0.5}, "bad", "does not win: before any training it lies below ties"),
        ({"obm": 0.5, "ties": 0.48}, "open", "not separated from any other start"),
    ],
)
def test_a_floor_has_its_verdict(accuracy, tone, words):
    verdict = floor_verdict(floor(accuracy), str)
    assert verdict.tone == tone
    assert words in verdict.headline


def test_a_floor_of_one_seed_separates_nothing():
    verdict = floor_verdict(floor({"obm": 0.9, "ties": 0.1}, half=None), str)
    assert verdict.headline.startswith("One seed")


def test_floors_that_are_equal_in_all_seeds_separate_nothing():
    # untrained starts answer the same questions in the same way, whatever the seed
    summary = comparison({"obm": 0.5, "ties": 0.3}, target="ties", half=0.0)
    for arm in summary["arms"].values():
        arm["is_trained"] = False
    assert comparison_verdict(summary, str).tone == "open"
    summary["pairs"] = [{**pair("obm", "ties", 0.2, 0.0), "metric": "floor"}]
    assert comparison_verdict(summary, str).tone == "open"


def test_other_numbers_that_are_equal_in_all_seeds_separate_unless_they_are_equal():
    summary = comparison({"obm": 0.5, "ties": 0.3}, target="ties", half=0.0)
    for summary["pairs"] in ([], [pair("obm", "ties", 0.2, 0.0)]):
        assert comparison_verdict(summary, str).tone == "good"
    summary["pairs"] = [pair("obm", "ties", 0.0, 0.0)]
    assert comparison_verdict(summary, str).tone == "open"
    # in a study of floors every seed has questions of its own
    assert floor_verdict(floor({"obm": 0.9, "ties": 0.1}, half=0.0), str).tone == "good"


def test_a_headline_counts_where_there_are_many_and_a_sentence_names_them():
    arms = {"obm": 0.5, **{f"low{i}": 0.1 for i in range(6)}, "near": 0.48}
    verdict = floor_verdict(floor(arms), str)
    assert verdict.headline == (
        "obm is ahead of 6 other starts before any training, but not separated from near."
    )
    assert "above low0, low1, low2, low3, low4 and low5" in verdict.sentences[1]


def test_each_arm_is_held_against_the_reference_in_every_measure():
    pairs = [
        pair("sar", "obm", 0.05, 0.01), pair("sar", "obm", -0.02, 0.03, metric="floor"),
        pair("sar", "obm", -0.2, 0.1, metric="recognition.change"),
        pair("sar", "obm", 0.5, 0.1, metric="auc"), pair("obm", "sar", -0.05, 0.01),
    ]  # fmt: skip
    arms = {"obm": 0.5, "sar": 0.55, "vlm": 0.1}
    found = each_against(comparison(arms, pairs=pairs), str)
    assert found == {
        "sar": "better: ceiling +0.05 [+0.04, +0.06]; "
        "worse: recognition lost or won by training -0.20 [-0.30, -0.10]; "
        "not separated: before training -0.02 [-0.05, +0.01]"
    }
    assert each_against(comparison(arms), str) == {}
    once = [{**pair("sar", "obm", 0.05, 0.01), "low": None, "high": None}]
    words = each_against(comparison(arms, pairs=once), str)["sar"]
    assert words == "measured once, no interval: ceiling +0.05"
