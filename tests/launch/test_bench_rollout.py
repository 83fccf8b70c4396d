"""The bench of the rollout: both sides do the same work, and the report has every figure of it."""

import json
from dataclasses import replace

import pytest
import torch

from launch import bench_rollout
from launch.bench_rollout import check_equal_work, judge, pairs, plan
from launch.bench_rollout_clock import PeakMemory, StageClock
from launch.bench_rollout_report import STAGES, draw_growth, render_growth
from launch.bench_rollout_work import OURS, PEER, Script, Workload, make_policy
from launch.errors import JobFailedError

# a prompt has to hold TRL's list of tools
SMALL = {"group": 2, "prompt_tokens": 512, "turn_tokens": 32}

torch.set_num_threads(1)


def spin(seconds):
    import time

    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


# --- clock


def test_stages_count_by_their_path_and_only_once():
    class Model:
        def forward(self):
            spin(0.02)

    model, clock = Model(), StageClock()
    with clock:
        clock.wrap(model, "forward", "vision")
        with clock.stage("rollout"), clock.stage("decode"):
            model.forward()
            with clock.stage("decode"):
                spin(0.02)
        with clock.stage("loss"):
            model.forward()
    assert clock.total("vision") == pytest.approx(0.04, abs=0.01)
    assert clock.total("vision", within="rollout") == pytest.approx(0.02, abs=0.01)
    assert clock.total("decode") == pytest.approx(0.04, abs=0.01)  # not 0.06
    model.forward()
    assert clock.total("vision") == pytest.approx(0.04, abs=0.01)  # the clock is over


def test_memory_that_was_freed_again_is_in_the_peak():
    memory = PeakMemory()
    block = torch.ones(25_000_000)  # 100 MB
    del block
    assert 90 < memory.growth_mb < 140


# --- work


@pytest.mark.parametrize("frames", [OURS, PEER], ids=["ours", "trl"])
def test_turns_and_results_have_their_exact_lengths_and_differ(frames):
    _, processor = make_policy("tiny")
    script = Script(Workload(), frames, processor)
    turns = [script.turn(row, turn) for turn in range(4) for row in range(8)]
    assert {script.writer.count(text) for text in turns} == {40}
    assert len(set(turns)) == 32
    results = [script.text_result() for _ in range(8)]
    assert len(set(results)) == 8


def test_shared_results_are_the_same_for_a_group_and_others_for_the_next_turn():
    _, processor = make_policy("tiny")
    script = Script(Workload(results="shared", group=4), OURS, processor)
    texts = [script.text_result() for _ in range(8)]
    assert len(set(texts[:4])) == len(set(texts[4:])) == 1
    assert texts[0] != texts[4]
    (words, pictures), (same_words, same_pictures) = script.image_result(), script.image_result()
    assert words == same_words
    assert pictures is same_pictures


def test_the_80m_policy_has_about_80_million_parameters():
    model, _ = make_policy("80m")
    assert 75e6 < sum(parameter.numel() for parameter in model.parameters()) < 90e6


# --- plan and targets


def test_both_sides_take_turns():
    tasks = list(plan(["tiny", "80m"], "tiny"))
    assert [task.side for task in tasks] == ["trl", "ours"] * (len(tasks) // 2)
    assert {task.part for task in tasks} == {"headline", "group", "turns", "prompt_tokens"}
    (group, _) = [task for task in tasks if task.part == "group"]
    assert [work["group"] for work in group.works] == [2, 4, 8, 16, 32]


def fake_record(side, rollout, step, policy="80m", **done):
    figures = dict.fromkeys([*STAGES, "rollout_mb", "backward_mb", "step_mb"], 1.0)
    return {
        "part": "headline",
        "side": side,
        "work": {"policy": policy, "group": 2, "turns": 3, "results": "distinct"},
        "parameters": 80_000_000,
        "done": {
            "rows": 2, "rows with a gradient": 2, "different rows": 2, "prompt tokens": 9,
            "policy tokens": 8, "observation tokens": 7, "pictures": 6, **done,
        },
        "figures": {**figures, "rollout": rollout, "step": step},
    }  # fmt: skip


def test_targets_compare_the_two_sides():
    found = judge([fake_record("trl", 40.0, 100.0), fake_record("ours", 8.0, 50.0)])
    assert [(target["value"], target["met"]) for target in found] == [
        (5.0, True),  # 40 / 8, at least 4
        (2.0, False),  # 100 / 50, at least 2.5
        (1.0, True),
        (1.0, True),
    ]


@pytest.mark.parametrize(
    "done", [{"policy tokens": 9}, {"pictures": 5}, {"rows with a gradient": 1}]
)
def test_sides_that_did_not_do_the_same_are_no_result(done):
    records = [fake_record("trl", 1.0, 1.0), fake_record("ours", 1.0, 1.0, **done)]
    with pytest.raises(JobFailedError, match="differ"):
        check_equal_work(records)


def test_rows_that_could_be_spared_are_no_result():
    records = [fake_record(s, 1.0, 1.0, **{"different rows": 1}) for s in ("trl", "ours")]
    with pytest.raises(JobFailedError, match="spared"):
        check_equal_work(records)


# --- the command


@pytest.mark.slow
def test_the_bench_runs_both_sides_on_the_same_tokens_and_reports_every_stage(
    obm, tmp_path, monkeypatch
):
    def small_plan(policies, growth):
        tasks = [t for t in plan(policies, growth, SMALL) if t.works[0].get("results") != "shared"]
        return [
            replace(task, works=tuple({**task.works[0], "group": group} for group in (2, 3)))
            for task in tasks
            if task.part == "headline"
        ]

    monkeypatch.setattr(bench_rollout, "plan", small_plan)
    monkeypatch.setattr(bench_rollout, "STEPS", {})
    output = tmp_path / "results"
    code, out, err = obm(
        "bench", "rollout", "--policies", "tiny", "--output", output, "--work", tmp_path / "work"
    )
    assert code in (0, 1), err  # so small a step need not meet a target
    record = json.loads((output / "bench-rollout.json").read_text())
    assert {"command", "commit", "hardware", "versions", "targets", "runs"} <= record.keys()
    assert [run["side"] for run in record["runs"]] == ["trl", "trl", "ours", "ours"]
    assert [run["work"]["group"] for run in record["runs"]] == [2, 3, 2, 3]
    for trl, ours in pairs(record["runs"]):
        group = ours["work"]["group"]
        assert trl["done"] == ours["done"]
        assert ours["done"]["policy tokens"] == group * 4 * 32
        assert ours["done"]["prompt tokens"] == group * 512
        assert ours["done"]["pictures"] == group * 3
        for side in (trl, ours):
            figures = side["figures"]
            assert all(figures[stage] > 0 for stage in STAGES)
            parts = ("rollout", "loss forward", "backward", "optimizer")
            assert sum(figures[part] for part in parts) <= figures["step"] * 1.01
            assert figures["prefill"] + figures["decode"] < figures["rollout"]
    page = (output / "bench-rollout.md").read_text()
    assert all(words in page for words in STAGES.values())
    growth = [{**run, "part": "group"} for run in record["runs"]]
    assert render_growth(growth, "group").startswith("| group size |")
    pictures = [tmp_path / f"growth.{kind}" for kind in ("svg", "png")]
    draw_growth(growth, pictures, "caption")
    assert all(picture.stat().st_size > 1000 for picture in pictures)
    assert "tiny, distinct results: decode, CPU over TRL's" in out
