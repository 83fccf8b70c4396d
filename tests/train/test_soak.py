"""The soak's verdict, of lines that its processes might have written."""

import json

import pytest

from tests.train.soak import judge, read_steps, render, summarize

N_STEPS = 120


@pytest.fixture
def report(tmp_path):
    """What a soak of 120 steps finds where process 1 stands out."""

    def make(n_steps=N_STEPS, kb_per_step=0.0, more_threads=0, exit_code=0):
        for rank in (0, 1):
            lines = [
                {
                    "step": step, "seconds": 1.0, "rss_mb": 600 + rank * kb_per_step * step / 1024,
                    "threads": 9 + (rank * more_threads if step > 100 else 0), "loss": 0.1,
                    "turns": [1, 2], "with_picture": 1, "faults": 0, "fatal": 0,
                }
                for step in range(1, n_steps + 1)
            ]  # fmt: skip
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"steps_{rank}.jsonl").write_text(text)
        found = {
            "command": "c", "commit": "d", "hardware": "h", "planned": N_STEPS,
            "exit_code": exit_code, **summarize(read_steps(tmp_path)),
        }  # fmt: skip
        return {**found, "targets": judge(found)}

    return make


@pytest.mark.parametrize(
    ("trouble", "missed"),
    [
        ({}, []),
        ({"n_steps": 110, "exit_code": 124}, ["steps that were made", "exit code of the launcher"]),
        ({"exit_code": -9}, ["exit code of the launcher"]),
        ({"kb_per_step": 90.0}, []),
        ({"kb_per_step": 110.0}, ["growth of memory, KB per step"]),
        ({"more_threads": 1}, ["more threads at the end"]),
    ],
)
def test_what_went_wrong_is_a_missed_target(report, trouble, missed):
    names = [t["name"].partition(" (")[0] for t in report(**trouble)["targets"] if not t["met"]]
    assert names == missed


def test_the_page_says_how_many_of_the_steps_were_made(report):
    page = render(report(n_steps=110))
    assert "| steps without a hang | 110 of 120 |" in page
    assert "* steps that were made (at least): 110, target 120 (missed)" in page


def test_memory_of_a_short_soak_is_not_judged(report):
    assert "memory" not in str(report(n_steps=20, kb_per_step=1000.0)["targets"])


def test_a_process_that_never_came_to_a_step_has_none(tmp_path):
    assert read_steps(tmp_path) == [[], []]
