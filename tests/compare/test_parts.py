"""Where the reward came from: parts add up, thirds of the training, and a rise without answers."""

import json

import pytest

from compare.parts import contributions, parts_section, parts_summary, reward_phases
from compare.report import write_report
from compare.runs import read_run

WEIGHTS = {"rewards": {"accuracy": 1.0, "format": 0.1, "evidence": 0.5, "redundancy": 0.2}}


def line(step, **means):
    return {"step": step, "phase": "train", **{f"rewards/{k}/mean": v for k, v in means.items()}}


def trained(make_run, arm, lines):
    """A run whose training lines are these."""
    folder = make_run(arm, 0, [0.0, 0.5])
    path = folder / "metrics.jsonl"
    kept = [row for row in path.read_text().splitlines() if '"eval"' in row]
    path.write_text("\n".join([*kept, *map(json.dumps, lines)]) + "\n")
    return read_run(folder)


def test_the_parts_of_a_step_add_up_to_its_reward():
    # .1 * 1 + .5 * .4 - .2 * .5 = .2; the rest of .6 comes from right answers
    made = contributions(
        line(1, total=0.6, format=1.0, evidence=0.4, redundancy=0.5, overlong=0.0), WEIGHTS
    )
    assert made == {
        "total": 0.6,
        "accuracy": pytest.approx(0.4),
        "format": pytest.approx(0.1),
        "evidence": pytest.approx(0.2),
        "redundancy": pytest.approx(-0.1),
        "overlong": 0.0,
    }
    assert contributions({"step": 1, "reward": 0.2}, WEIGHTS) is None
    assert contributions(line(1, total=float("nan")), WEIGHTS) is None


def test_thirds_of_the_training(make_run):
    lines = [line(step, total=0.1 * step, format=1.0) for step in range(1, 7)]
    phases = reward_phases([trained(make_run, "vlm", lines)])
    assert [phase.steps for phase in phases] == [(1, 2), (3, 4), (5, 6)]
    assert [phase.reward for phase in phases] == pytest.approx([0.15, 0.35, 0.55])
    assert phases[0].parts == {"accuracy": pytest.approx(0.05), "format": pytest.approx(0.1)}
    assert reward_phases([trained(make_run, "short", lines[:2])]) == []


def test_a_rise_that_right_answers_do_not_explain_is_named(make_run):
    honest = [line(step, total=0.1 + 0.1 * step, format=1.0) for step in range(6)]
    hacked = [line(step, total=0.02 * step, format=0.2 * step) for step in range(6)]
    flat = [line(step, total=0.3, format=1.0) for step in range(6)]
    arms = {}
    for arm, lines in (("honest", honest), ("hacked", hacked), ("flat", flat)):
        arms[arm] = {"reward_parts": parts_summary([trained(make_run, arm, lines)])}
    named = {arm: made["reward_parts"]["rises_without_answers"] for arm, made in arms.items()}
    assert named == {"honest": False, "hacked": True, "flat": False}
    text = "\n".join(parts_section(arms))
    assert "**hacked: the reward rose mostly by other parts than right answers.**" in text
    # .02 * 4.5 in the last third, all of it format
    assert "| hacked | 4-5 | 0.090 | 0.000 (0%) | 0.090 (100%) |" in text


def test_the_report_shows_the_parts_where_they_were_logged(make_run, tmp_path):
    lines = [line(step, total=0.3, format=1.0) for step in range(6)]
    runs = [trained(make_run, "vlm", lines), read_run(make_run("obm", 0, [0.1, 0.5]))]
    summary = write_report(runs, tmp_path / "report", command="c")
    assert summary["arms"]["obm"]["reward_parts"] is None
    assert summary["arms"]["vlm"]["reward_parts"]["phases"][0]["reward"] == pytest.approx(0.3)
    text = (tmp_path / "report" / "compare.md").read_text()
    assert "## Where the reward came from" in text
    assert "| vlm | 0-1 | 0.300 | 0.200 (67%) | 0.100 (33%) |" in text
    without = write_report(runs[1:], tmp_path / "other", command="c")
    assert without["arms"]["obm"]["reward_parts"] is None
    assert "Where the reward" not in (tmp_path / "other" / "compare.md").read_text()
