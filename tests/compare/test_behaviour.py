"""Joint shares of image and text searches, counted in the episodes of older runs."""

import json

import pytest

from compare.behaviour import add_behaviour, count_behaviours
from compare.runs import read_run

IMAGE, TEXT = {"type": "image_search", "region": None}, {"type": "search", "query": "q"}
BOTH = {"type": "parallel", "calls": [IMAGE, TEXT]}
ANSWER, VISIT = {"type": "answer", "text": "a"}, {"type": "visit", "url": "u", "question": "q"}


def episode(step, *actions, phase="eval"):
    turns = [{"text": "", "action": action} for action in actions]
    return json.dumps({"step": step, "phase": phase, "turns": turns}) + "\n"


@pytest.fixture
def folder(make_run):
    folder = make_run("obm", 0, [0.1, 0.5])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["phase"] == "eval":
            line["eval/n"] = 5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "trajectories.jsonl").write_text(
        episode(0, IMAGE, ANSWER) + episode(0, TEXT, ANSWER) + episode(0, BOTH, ANSWER)
        + episode(0, IMAGE, TEXT, ANSWER) + episode(0, VISIT, ANSWER)
        + episode(1, TEXT, phase="train")
        + episode(5, TEXT) * 4 + '{"step": 5, "ph'  # one is torn, so that step 5 is not whole
    )  # fmt: skip
    return folder


def test_shares_are_counted_where_the_evaluation_did_not_report_them(folder):
    run = read_run(folder)
    add_behaviour(run)
    first, second = run.evaluations
    assert {k: v for k, v in first.items() if k.startswith("behaviour/")} == {
        "behaviour/image_only": 0.2, "behaviour/text_only": 0.2, "behaviour/both": 0.4,
        "behaviour/none": 0.2,
    }  # fmt: skip
    assert "behaviour/both" not in second


@pytest.mark.parametrize(
    "broken",
    [b"[1]\n", b'"x"\n', b'{"phase": "eval", "step": "\xff"}\n', b'{"phase": "eval"}\n',
     b'{"phase": "eval", "step": 0, "turns": 3}\n',
     b'{"phase": "eval", "step": 0, "turns": [3]}\n',
     b'{"phase": "eval", "step": 1e400}\n', b"[" * 5000 + b"\n"],
)  # fmt: skip
def test_a_line_that_is_no_episode_is_left_out(folder, broken):
    path = folder / "trajectories.jsonl"
    whole = count_behaviours(path)
    path.write_bytes(broken + path.read_bytes() + b'{"phase": "eval", "prompt": "\xc3')
    assert count_behaviours(path) == whole


def test_shares_that_were_reported_stay(folder):
    run = read_run(folder)
    for line in run.evaluations:
        line |= {"behaviour/image_only": 1.0}
    add_behaviour(run)
    assert "behaviour/both" not in run.evaluations[0]


def test_a_run_without_episodes_stays_as_it_is(make_run):
    run = read_run(make_run("obm", 0, [0.1, 0.5]))
    before = [dict(line) for line in run.evaluations]
    add_behaviour(run)
    assert run.evaluations == before
