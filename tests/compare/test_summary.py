"""Pairs of arms, stability and curves in the summary; the null study of whole comparisons."""

import json
import math

import numpy as np
import pytest

from compare.cost import cost_of
from compare.intervals import interval
from compare.measures import numbers_of
from compare.pairs import all_pairs, compare_arms
from compare.runs import Run, group_runs
from compare.series import thin
from compare.summary import summarise
from compare.tables import sections
from compare.verdict import ABOVE, OPEN, side_of_difference
from train.evaluation import BEHAVIOURS

PLAIN = {"merged": False, "stats": [], "cost": None}


def make_run(arm, seed, curve, training=(), **metrics):
    evaluations = [
        {"step": 5 * i, "accuracy": a, "device_s": float(i), "tokens": 10 * i,
         **{name: values[i] for name, values in metrics.items()}}
        for i, a in enumerate(curve)
    ]  # fmt: skip
    return Run(f"{arm}-s{seed}", arm, seed, {}, evaluations, list(training), start=PLAIN)


def pair_of(summary, arm, other, metric):
    [found] = [
        pair for pair in summary["pairs"]
        if (pair["arm"], pair["other"], pair["metric"]) == (arm, other, metric)
    ]  # fmt: skip
    return found


def test_seeds_that_two_arms_share_are_paired():
    # seed noise of .1 and .2 cancels: every difference is .3 within .01
    runs = [
        *(make_run("a", s, [0.4 + n, 0.5 + n]) for s, n in enumerate((0.0, 0.1, 0.21))),
        *(make_run("b", s, [0.1 + n, 0.2 + n]) for s, n in enumerate((0.0, 0.1, 0.2))),
    ]
    summary = summarise(group_runs(runs), smoothing=1)
    found = pair_of(summary, "a", "b", "floor")
    assert found["per_seed"] == pytest.approx([0.3, 0.3, 0.31])
    estimate = interval([0.3, 0.3, 0.31], bounds=None)
    assert (found["low"], found["high"]) == pytest.approx((estimate.low, estimate.high))
    assert (found["n_pairs"], found["paired"]) == (3, True)
    assert found["probability"] == 1.0
    assert found["p_value"] == pytest.approx(0.25)
    assert side_of_difference(found) == ABOVE
    mirrored = pair_of(summary, "b", "a", "floor")
    assert mirrored["mean"] == pytest.approx(-found["mean"])
    assert (mirrored["low"], mirrored["probability"]) == (pytest.approx(-found["high"]), 0.0)
    assert mirrored["per_seed"] == pytest.approx([-0.3, -0.3, -0.31])


def test_every_ordered_pair_of_arms_is_there_once():
    runs = [make_run(arm, s, [0.1, 0.2 + s / 10]) for arm in "abc" for s in (0, 1)]
    summary = summarise(group_runs(runs), smoothing=1)
    keys = [(p["arm"], p["other"], p["metric"]) for p in summary["pairs"]]
    assert len(keys) == len(set(keys))
    assert {key[:2] for key in keys} == {(a, b) for a in "abc" for b in "abc" if a != b}
    assert {key[2] for key in keys} == {
        "floor", "ceiling", "auc", "final", "at_equal_budget", "steps_to_0.1", "steps_to_0.2",
    }  # fmt: skip


def test_steps_are_counted_to_every_tenth_that_a_run_reaches():
    curves = {"obm": [0.1, 0.3, 0.4], "ties": [0.1, 0.2, 0.4], "vlm": [0.0, 0.25, 0.25]}
    shifts = {0: 0.0, 1: 0.01, 2: 0.05}
    runs = [
        make_run(arm, s, [value + shift for value in curve])
        for arm, curve in curves.items() for s, shift in shifts.items()
    ]  # fmt: skip
    summary = summarise(group_runs(runs), smoothing=1)
    arms, steps = summary["arms"], runs[0].steps
    names = {name for arm in arms.values() for name in arm["per_seed"] if "steps_to_0" in name}
    assert names == {f"steps_to_0.{tenth}" for tenth in (1, 2, 3, 4)}
    assert arms["obm"]["per_seed"]["steps_to_0.3"] == [steps[1]] * 3
    assert arms["ties"]["per_seed"]["steps_to_0.3"] == [steps[2]] * 3
    assert arms["ties"]["steps_to_0.3"] == steps[2]
    # only the third seed of the VLM gets there, so it has no mean and no difference
    assert arms["vlm"]["per_seed"]["steps_to_0.3"] == [None, None, steps[1]]
    assert arms["vlm"]["steps_to_0.3"] is None
    found = pair_of(summary, "ties", "obm", "steps_to_0.3")
    assert found["mean"] == steps[2] - steps[1]
    metrics = {p["metric"] for p in summary["pairs"] if {p["arm"], p["other"]} == {"vlm", "obm"}}
    assert "steps_to_0.3" not in metrics
    text = "\n".join(sections(summary)).partition("## Speed")[2].partition("##")[0]
    assert "| steps to | 0.1 | 0.2 | 0.3 | 0.4 |" in text
    assert "| 1 of 3 seeds | 0 of 3 seeds |" in text
    assert "| ties minus obm | +0 [+0, +0] | +0 [+0, +0] | **+5 [+5, +5]** | +0 [+0, +0] |" in text


@pytest.mark.parametrize(
    ("reference", "value"),
    # .39 and .41: 0.3 is the highest tenth that both get to; .01 and .01: there is none
    [([[0.1, 0.41], [0.1, 0.39]], 0.3), ([[0.0, 0.01], [0.0, 0.01]], None)],
)
def test_a_ceiling_of_less_than_one_question_is_no_target(reference, value):
    runs = [make_run("obm", s, curve) for s, curve in enumerate(reference)]
    runs += [make_run("vlm", s, [0.0, 0.004]) for s in (0, 1)]
    for run in runs:
        run.evaluations[0]["n"] = 200.0
    summary = summarise(group_runs(runs), smoothing=1)
    assert summary["target"] == {"arm": "vlm", "value": value, "ceiling": pytest.approx(0.004)}
    obm = summary["arms"]["obm"]
    assert obm["steps_to_target"] == (None if value is None else runs[0].steps[1])
    for run in runs:
        run.evaluations[0]["n"] = 250.0
    assert summarise(group_runs(runs), smoothing=1)["target"] == {
        "arm": "vlm",
        "value": pytest.approx(0.004),
    }


@pytest.mark.parametrize("n", [44, 49, 98, 200])
def test_a_ceiling_of_one_question_is_a_target_whatever_the_floats_make_of_it(n):
    # in floats (3 / 44) / 3 * 44 and 1 / 49 * 49 are a little less than 1
    runs = [make_run(arm, 0, [0.0, 1 / n, 1 / n, 1 / n]) for arm in ("obm", "vlm")]
    for run in runs:
        run.evaluations[0]["n"] = float(n)
    target = summarise(group_runs(runs), smoothing=3)["target"]
    assert target == {"arm": "vlm", "value": pytest.approx(1 / n)}


def test_recognition_is_summarised_with_its_change_by_run():
    runs = [make_run(arm, s, [0.1, 0.2]) for arm in ("obm", "cast", "vlm") for s in (0, 1, 2)]
    before = {2: 0.7, 0: 0.9, 1: 0.8}  # as a study file may order its seeds
    measured = {
        "obm": {"before": before, "after": {2: 0.5, 0: 0.7, 1: 0.6}},
        "cast": {"before": before, "after": {0: 0.9, 1: 0.8, 2: 0.6}},
        "sport": {"before": {}, "after": {}},  # every training failed
    }
    summary = summarise(group_runs(runs), smoothing=1, recognition=measured)
    assert summary["arms"]["obm"]["recognition"] == pytest.approx(
        {"before": 0.8, "after": 0.6, "change": -0.2}
    )
    found = pair_of(summary, "cast", "obm", "recognition.change")
    # 0 + .2, 0 + .2, -.1 + .2
    assert found["per_seed"] == pytest.approx([0.2, 0.2, 0.1])
    low, high = summary["arms"]["cast"]["intervals"]["recognition.change"]
    assert low < 0 < high < 1
    assert "recognition" not in summary["arms"]["vlm"]
    text = "\n".join(sections(summary | {"comparable": {"differences": []}}))
    assert "| obm | 0.80 [" in text.partition("## Perception kept")[2]
    assert "| vlm |" not in text.partition("## Perception kept")[2].partition("##")[0]


def test_arms_of_other_seeds_are_compared_unpaired():
    found, differences = compare_arms({0: 0.5, 1: 0.6}, {2: 0.1, 3: 0.2}, 100)
    assert (found.is_paired, found.n, differences) == (False, 2, [])
    assert found.mean == pytest.approx(0.4)
    # one seed in common of two and two is too little to pair
    assert not compare_arms({0: 0.5, 1: 0.6}, {1: 0.1, 3: 0.2}, 100)[0].is_paired
    # but all there is of a single run
    found, differences = compare_arms({0: 0.5, 1: 0.6}, {1: 0.1}, 100)
    assert found.is_paired
    assert differences == pytest.approx([0.5])
    assert found.low is None


def test_a_seed_without_a_number_makes_no_pair():
    assert compare_arms({0: 0.5, 1: None}, {0: 0.1, 1: 0.2}, 100) == (None, [])


def test_the_same_arm_twice_differs_by_nothing():
    runs = [make_run(arm, s, [0.1 * s, 0.5, 0.3]) for arm in "ab" for s in range(5)]
    for pair in summarise(group_runs(runs), smoothing=1)["pairs"]:
        assert (pair["mean"], pair["low"], pair["high"]) == (0.0, 0.0, 0.0)
        assert (pair["probability"], pair["p_value"]) == (0.5, 1.0)
        assert side_of_difference(pair) == OPEN


def test_halves_of_one_arm_differ_in_five_per_cent_of_the_comparisons():
    """The null study on whole curves: 300 comparisons of five seeds with five of the same arm.

    The error of a share is .0126: three of them either way. A ceiling is a maximum and not normal,
    but differences of two ceilings are nearly so.
    """
    generator = np.random.default_rng(0)
    n_studies, steps = 300, np.arange(11)
    held = {"floor": 0, "ceiling": 0, "auc": 0, "final": 0, "steps_to_0.2": 0, "steps_to_0.3": 0}
    for _ in range(n_studies):
        per_seed = {}
        for arm in "ab":
            # a learning curve whose end differs from seed to seed, asked 256 questions a time
            ends = generator.normal(0.5, 0.05, 5)
            true = 0.2 + (ends[:, None] - 0.2) * (1 - np.exp(-steps / 3))
            curves = generator.binomial(256, np.clip(true, 0, 1)) / 256
            runs = [make_run(arm, s, curve.tolist()) for s, curve in enumerate(curves)]
            per_seed[arm] = numbers_of(runs, [cost_of(run) for run in runs], None, None, 3)
        for pair in all_pairs(per_seed, dict.fromkeys("ab", range(5)), 200):
            if pair["arm"] == "a" and pair["metric"] in held:
                held[pair["metric"]] += side_of_difference(pair) == OPEN
    for metric, n in held.items():
        # Steps are known to the evaluation: equal ones are frequent, and are not separated.
        most = 1.0 if metric.startswith("steps") else 0.988
        assert 0.912 <= n / n_studies <= most, metric


def test_stability_is_worked_out_by_hand():
    training = [
        {"step": 1, "loss": 0.1, "reward": 0.5, "frac_reward_zero_std": 1.0},
        {"step": 2, "loss": None, "reward": 0.5, "frac_reward_zero_std": 0.5},
    ]
    runs = [
        make_run("a", 0, [0.2, 0.6, 0.2], training),  # falls below .3
        make_run("a", 1, [0.2, 0.4, 0.3], training),
    ]
    found = summarise(group_runs(runs), smoothing=1)["arms"]["a"]
    assert found["per_seed"]["stability.collapses"] == [1.0, 0.0]
    stability = found["stability"]
    assert stability["collapses"] == pytest.approx(0.5)
    assert stability["final_minus_best"] == pytest.approx((-0.4 - 0.1) / 2)
    assert stability["largest_drop"] == pytest.approx((0.4 + 0.1) / 2)
    assert found["final"] == pytest.approx((0.2 + 0.3) / 2)
    # ceilings .6 and .4: sd = .2 / sqrt(2)
    assert stability["ceiling_sd"] == pytest.approx(0.2 / math.sqrt(2))
    # sds along the curve: 0, .2 / sqrt(2), .1 / sqrt(2)
    assert stability["curve_sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert stability["zero_signal"] == pytest.approx(0.75)
    assert stability["not_a_number"] == pytest.approx(0.5)


def test_curves_have_a_smoothed_band_and_every_seeds_raw_values():
    shares = {f"behaviour/{name}": [0.25, 0.25, 0.25] for name in BEHAVIOURS}
    runs = [
        make_run("a", 0, [0.0, 0.2, 0.4], calls_per_episode=[2.0, 3.0, 4.0], **shares),
        make_run("a", 1, [0.2, 0.4, 0.6], calls_per_episode=[2.0, 3.0, 4.0], **shares),
    ]
    curves = summarise(group_runs(runs), smoothing=2)["curves"]["a"]
    accuracy = curves["accuracy"]
    assert accuracy["steps"] == [0, 5, 10]
    # smoothed over two: 0, .1, .3 and .2, .3, .5
    assert accuracy["mean"] == pytest.approx([0.1, 0.2, 0.4])
    assert accuracy["per_seed"] == [[0.0, 0.2, 0.4], [0.2, 0.4, 0.6]]
    assert (accuracy["low"][0], accuracy["high"][0]) == pytest.approx((0.0, 1.0))  # cut to shares
    assert curves["calls_per_episode"]["mean"] == pytest.approx([2.0, 2.5, 3.5])  # not cut
    assert {f"behaviour/{name}" for name in BEHAVIOURS} <= curves.keys()
    assert "reward" not in curves


def test_the_reward_has_a_grid_of_its_own_of_at_most_two_hundred_points():
    training = [
        {"step": s, "reward": s / 1000, "device_s": 2.0 * s, "tokens": s} for s in range(1, 1001)
    ]
    reward = summarise(group_runs([make_run("a", 0, [0.1, 0.2], training)]))["curves"]["a"][
        "reward"
    ]
    assert len(reward["steps"]) == 200
    assert (reward["steps"][0], reward["steps"][-1]) == (1, 1000)
    assert reward["window"] == 50
    # the mean of .951 to 1.000
    assert reward["mean"][-1] == pytest.approx(0.9755)
    assert reward["device_s"][-1] == 2000.0
    assert thin(5) == [0, 1, 2, 3, 4]


def test_the_sections_name_what_they_show():
    runs = [
        *(make_run("vlm", s, [0.0, 0.1, 0.1 + s / 25]) for s in range(3)),
        *(make_run("obm", s, [0.3, 0.4, 0.5 + s / 50], **{"stop/answer": [1.0] * 3})
          for s in range(3)),
    ]  # fmt: skip
    text = "\n".join(sections(summarise(group_runs(runs), smoothing=1)))
    for heading in ("## Differences", "## Cost to target", "## Speed", "## Stability"):
        assert heading in text
    assert "| minus obm | pairs |" in text
    # the start is the same for every seed, so its floor was measured once: no interval
    assert "| vlm | 3 | -0.300 | **-0.380 [" in text
    assert "of 4 intervals" in text
    assert "0 of 3 seeds" in text
    assert "stop/answer" in text
    assert "stop/invalid" not in text


def test_a_summary_is_plain_json():
    runs = [make_run(arm, s, [0.1, 0.2]) for arm in "ab" for s in (0, 1)]
    summary = summarise(group_runs(runs), smoothing=1)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
