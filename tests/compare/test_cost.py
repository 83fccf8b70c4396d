"""Cost to the target: tokens, device seconds, calibration and merge; equal budgets."""

import json

import pytest

from compare.cost import cost_of, preparation_device_s, training_device_s
from compare.runs import Run, group_runs
from compare.summary import summarise

CPU = {"device": "cpu", "world_size": 1}
PLAIN = {"merged": False, "stats": [], "cost": None}


def make_run(arm="obm", seed=0, curve=(0.2, 0.4, 0.6), *, step_s=10.0, start=None, **values):
    """A run evaluated every five steps that spends `step_s` device seconds between evaluations."""
    evaluations = [
        {"step": 5 * i, "accuracy": a, "tokens": 100 * i, "device_s": step_s * i}
        for i, a in enumerate(curve)
    ]
    return Run(
        folder=values.pop("folder", f"{arm}-s{seed}"), arm=arm, seed=seed, config={},
        evaluations=evaluations, provenance=values.pop("provenance", CPU),
        start=PLAIN if start is None else start, **values,
    )  # fmt: skip


def test_recorded_device_seconds_are_taken_as_they_are():
    assert training_device_s(make_run()) == ([0.0, 10.0, 20.0], "recorded")


def test_an_evaluation_costs_no_more_than_the_training_that_comes_after_it():
    """The clock once ran on during an evaluation and was set back."""
    run = make_run(training=[{"step": 1, "device_s": 2.0}, {"step": 5, "device_s": 9.0}])
    run.evaluations[0]["device_s"] = 7.0  # 2 at the first step
    run.evaluations[1]["device_s"] = 14.0  # 9 at the same step
    assert training_device_s(run)[0] == [2.0, 9.0, 20.0]


def test_older_runs_have_wall_time_times_processes_without_evaluations():
    run = make_run(provenance={"world_size": 2})
    for line, wall, took in zip(run.evaluations, (4.0, 20.0, 40.0), (3.0, 2.0, 5.0), strict=True):
        del line["device_s"]
        line |= {"time_s": wall, "evaluation_s": took}
    # 2 * (4 - 3), 2 * (20 - 5), 2 * (40 - 10)
    assert training_device_s(run) == ([2.0, 30.0, 60.0], "wall time")
    # an evaluation without a clock took nothing; what took longer than the run is a clock's error
    del run.evaluations[0]["evaluation_s"]
    run.evaluations[1]["evaluation_s"] = 30.0
    assert training_device_s(run)[0] == [8.0, 0.0, 10.0]  # 2 * 4, none, 2 * (40 - 35)


def test_without_any_clock_the_cost_is_not_known():
    run = make_run()
    for line in run.evaluations:
        del line["device_s"]
    assert cost_of(run).total_s is None


COST = {
    "merge": {"time_s": 3.0, "processor_s": 5.0},
    "calibrate-vlm": {"time_s": 2.0, "processor_s": 4.0},
}
TAUGHT = {"merged": False, "stats": [], "cost": {"sft": {"device_s": 24.0}}}


@pytest.mark.parametrize(
    ("provenance", "parts"),
    [
        ({"device": "cpu"}, {"merge": 5.0, "calibrate-vlm": 4.0}),
        ({"device": "gpu"}, {"merge": 3.0, "calibrate-vlm": 2.0}),
        ({"hardware": "NVIDIA H100"}, {"merge": 3.0, "calibrate-vlm": 2.0}),
        ({"hardware": "Intel Xeon"}, {"merge": 5.0, "calibrate-vlm": 4.0}),
    ],
)
def test_preparation_is_counted_by_the_clock_of_the_training(provenance, parts):
    run = make_run(start={"merged": True, "stats": [], "cost": COST}, provenance=provenance)
    assert preparation_device_s(run) == (parts, "")
    before = sum(parts.values())
    assert cost_of(run).total_s == [before, before + 10.0, before + 20.0]


def test_a_start_that_is_no_merge_costs_nothing_and_an_unknown_one_is_not_known():
    assert preparation_device_s(make_run()) == ({}, "")
    parts, note = preparation_device_s(make_run(start={"merged": None, "cost": None}))
    assert parts is None
    assert "nothing recorded" in note
    broken = {"merged": True, "stats": [], "cost": {**COST, "calibrate-agent": None}}
    parts, note = preparation_device_s(make_run(start=broken))
    assert parts is None
    assert note == "calibrate-agent: no cost recorded"


def test_older_studies_have_the_wall_time_of_their_stages(tmp_path):
    stages = tmp_path / "stages"
    stages.mkdir()
    for name, seconds in (
        ("merge-obm", 8.7), ("calibrate-vlm", 2.4), ("calibrate-agent", 0.0),
        ("calibrate-other-vlm", 99.0),
    ):  # fmt: skip
        (stages / f"{name}.json").write_text(json.dumps({"done": True, "seconds": seconds}))
    start = {"merged": True, "stats": ["vlm/diagonal", "agent/diagonal"], "cost": None}
    run = make_run(start=start, folder=tmp_path / "runs" / "obm-s0")
    parts, note = preparation_device_s(run)
    assert parts == {"merge": 8.7, "calibrate-vlm": 2.4, "calibrate-agent": 0.0}
    assert "wall time" in note
    (stages / "calibrate-vlm.json").unlink()
    assert preparation_device_s(run) == (None, "calibrate-vlm: no cost recorded")


def test_the_cost_to_the_target_has_the_preparation_in_it():
    merged = {"merged": True, "stats": [], "cost": COST}
    runs = [
        make_run("vlm", 0, (0.0, 0.2, 0.4)),
        make_run("obm", 0, (0.2, 0.4, 0.6), step_s=20.0, start=merged),
    ]
    summary = summarise(group_runs(runs), target_arm="vlm", smoothing=1)
    obm = summary["arms"]["obm"]
    # the target is .4, which obm reaches at its second evaluation
    assert summary["target"]["value"] == pytest.approx(0.4)
    assert (obm["steps_to_target"], obm["tokens_to_target"]) == (5, 100)
    assert obm["device_s_to_target"] == pytest.approx(9.0 + 20.0)
    assert obm["preparation_device_s"] == {"merge": 5.0, "calibrate-vlm": 4.0}
    assert obm["training_device_s"] == pytest.approx(40.0)
    assert summary["arms"]["vlm"]["device_s_to_target"] == pytest.approx(20.0)
    assert summary["arms"]["vlm"]["preparation_device_s"] == {}
    assert summary["cost"] == {"clock": "recorded", "notes": []}
    curve = summary["curves"]["obm"]["accuracy"]
    assert curve["device_s"] == [9.0, 29.0, 49.0]
    assert curve["tokens"] == [0.0, 100.0, 200.0]


def test_at_an_equal_budget_an_arm_is_where_it_has_spent_as_much_as_the_cheapest():
    merged = {"merged": True, "stats": [], "cost": COST}
    runs = [
        make_run("vlm", 0, (0.0, 0.2, 0.4)),  # 20 s in all
        make_run("obm", 0, (0.2, 0.4, 0.6), step_s=20.0, start=merged),  # 9, 29, 49 s
    ]
    summary = summarise(group_runs(runs), target_arm="vlm", smoothing=1)
    budget = {"device_s": pytest.approx(20.0), "arm": "vlm", "cheaper": {}}
    assert summary["equal_budget"] == budget
    assert summary["arms"]["vlm"]["at_equal_budget"] == pytest.approx(0.4)
    # 11 of 20 seconds after the first evaluation: .2 + .2 * 11 / 20
    assert summary["arms"]["obm"]["at_equal_budget"] == pytest.approx(0.31)


def test_the_equal_budget_can_be_what_one_arm_spent():
    merged = {"merged": True, "stats": [], "cost": COST}
    runs = [
        make_run("vlm", 0, (0.0, 0.2, 0.4)),  # 20 s in all
        make_run("obm", 0, (0.2, 0.4, 0.6), start=merged),  # 9, 19, 29 s
        make_run("sft", 0, (0.1, 0.3, 0.5), start=TAUGHT),  # 24, 34, 44 s
    ]
    summary = summarise(group_runs(runs), smoothing=1, budget_arm="obm")
    assert summary["equal_budget"] == {
        "device_s": pytest.approx(29.0), "arm": "obm", "cheaper": {"vlm": pytest.approx(20.0)},
    }  # fmt: skip
    at = {arm: one["at_equal_budget"] for arm, one in summary["arms"].items()}
    # vlm's last value; obm's own; half way from .1 to .3
    assert at == {arm: pytest.approx(v) for arm, v in (("vlm", 0.4), ("obm", 0.6), ("sft", 0.2))}
    assert summary["arms"]["sft"]["preparation_device_s"] == {"sft": 24.0}
    unknown = make_run("obm", 0, start={"merged": True, "stats": [], "cost": {"merge": None}})
    assert summarise(group_runs([unknown]), budget_arm="obm")["equal_budget"] is None


def test_a_budget_that_does_not_pay_for_the_merge_gives_no_number():
    dear = {"merged": True, "stats": [], "cost": {"merge": {"time_s": 1.0, "processor_s": 99.0}}}
    runs = [make_run("vlm", 0), make_run("obm", 0, start=dear)]
    summary = summarise(group_runs(runs), smoothing=1)
    assert summary["arms"]["obm"]["at_equal_budget"] is None
    assert not [p for p in summary["pairs"] if p["metric"] == "at_equal_budget"]


def test_clocks_that_differ_between_runs_are_noted():
    runs = [make_run("vlm", 0), make_run("obm", 0)]
    for line in runs[1].evaluations:
        line["time_s"] = line.pop("device_s")
    summary = summarise(group_runs(runs), smoothing=1)
    assert summary["cost"]["clock"] == "mixed"
    assert "hold none against the other" in summary["cost"]["notes"][0]
