"""Followed questions: the same ones everywhere, and what changed from evaluation to evaluation."""

import json

import pytest

from launch.cli import main
from train.followed import chosen, follow


def line(step, question_id="q1", answer="Rome", total=0.1, queries=("capital of Italy",), **extra):
    turns = [
        {"text": "<search> <img> </search>", "action": {"type": "image_search", "region": "full"},
         "observation": "<information>Italy</information>"},
        *({"text": f"<search> {q} </search>", "action": {"type": "search", "query": q},
           "observation": "..."} for q in queries),
        {"text": "<answer>", "action": {"type": "answer", "text": answer}, "observation": None},
    ]  # fmt: skip
    return {
        "schema_version": 2, "images": [],
        "step": step, "phase": "eval", "question_id": question_id, "prompt": "Instruction.\nWhere?",
        "turns": turns, "stop_reason": "answer", "answer": answer, "rewards": {"total": total},
        "followed": True, **extra,
    }  # fmt: skip


def test_the_choice_depends_on_the_seed_and_grows_with_the_number():
    few = chosen(100, 4, seed=0)
    assert few == chosen(100, 4, seed=0) == sorted(few)
    assert few != chosen(100, 4, seed=1)
    assert set(few) < set(chosen(100, 8, seed=0))
    assert chosen(3, 8, seed=0) == [0, 1, 2]
    assert chosen(100, 0, seed=0) == []


def test_visits_are_in_order_and_say_what_changed():
    rows = [
        line(10, answer="Paris", total=1.0),
        line(0),
        line(5),
        line(0, question_id="q2"),
        line(0, question_id="q3", followed=False),
    ]
    found = follow(rows)
    assert list(found) == ["q1", "q2"]
    visits = found["q1"]
    assert [visit.step for visit in visits] == [0, 5, 10]
    assert [visit.changed for visit in visits] == [(), (), ("answer", "reward")]
    assert visits[0].searches == ("[full]", "capital of Italy")
    assert visits[0].text.startswith("<search> <img> </search><information>Italy</information>")


def test_other_searches_are_a_change_and_an_unscored_episode_has_no_reward():
    before, after = follow([line(0), line(5, queries=(), total=None)])["q1"]
    assert after.changed == ("reward", "searches")
    assert after.reward is None
    assert before.changed == ()


@pytest.fixture
def run_folder(tmp_path):
    rows = [line(0), line(5, answer="Paris", total=1.0), line(0, "q2")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "trajectories.jsonl").write_text(text + '{"step": 9, "fol')  # a torn line
    return tmp_path


def test_the_verb_prints_a_block_for_each_question(run_folder, capsys):
    assert main(["follow", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert "q1  Where?" in out
    assert "q2  Where?" in out
    row = next(text for text in out.splitlines() if text.split()[:2] == ["5", "1.00"])
    assert "Paris" in row
    assert "answer, reward" in row
    assert row.endswith("[full] | capital of Italy")


def test_one_question_with_its_episodes(run_folder, capsys):
    assert main(["follow", str(run_folder), "--question", "q1", "--text"]) == 0
    out = capsys.readouterr().out
    assert "q2" not in out
    assert "<search> capital of Italy </search>" in out


def test_a_line_separator_in_an_answer_does_not_end_the_reading(tmp_path, capsys):
    rows = [line(0, answer="a\u2028b"), line(5)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "trajectories.jsonl").write_text(text, encoding="utf-8")
    assert main(["follow", str(tmp_path)]) == 0
    steps = [text.split()[0] for text in capsys.readouterr().out.splitlines()[2:] if text]
    assert steps == ["0", "5"]


def test_searches_side_by_side_in_one_turn_are_followed_too():
    row = line(0)
    calls = [{"type": "search", "query": "a"}, {"type": "image_search", "region": "full"}]
    row["turns"] = [
        {"text": "", "action": {"type": "parallel", "calls": calls}, "observation": "x"}
    ]
    assert follow([row])["q1"][0].searches == ("a", "[full]")


def test_what_cannot_be_followed_is_said(run_folder, tmp_path_factory, capsys):
    assert main(["follow", str(run_folder), "--question", "q9"]) == 2
    assert "it follows q1, q2" in capsys.readouterr().err
    empty = tmp_path_factory.mktemp("empty")
    assert main(["follow", str(empty)]) == 2
    assert "no trajectories.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question_id": None}, "'question_id' is null"),
        ({"prompt": None}, "'prompt' is null"),
        ({"step": "1"}, "'step' is str"),
        ({"answer": 3}, "'answer' is int"),
        ({"rewards": {"total": "x"}}, "'rewards' holds str"),
        ({"turns": [{"text": "", "action": {"type": 3}}]}, "turn 0: 'action': 'type' is int"),
        (
            {"turns": [{"text": "", "action": {"type": "answer"}, "observation": 3}]},
            "turn 0: 'observation' is int",
        ),
    ],
)
def test_a_bad_line_of_a_followed_question_is_named(tmp_path, capsys, bad, message):
    path = tmp_path / "trajectories.jsonl"
    path.write_text(json.dumps(line(0)) + "\n" + json.dumps({**line(5), **bad}) + "\n")
    assert main(["follow", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error == f"error: {path}:2: {message}; restore the line\n"


@pytest.mark.parametrize("name", ["question_id", "prompt", "turns", "rewards", "step"])
def test_a_followed_line_without_a_key_is_named(tmp_path, capsys, name):
    path = tmp_path / "trajectories.jsonl"
    path.write_text(json.dumps({k: v for k, v in line(0).items() if k != name}) + "\n")
    assert main(["follow", str(tmp_path)]) == 2
    assert f"{path}:1: {name!r} is missing; is this a" in capsys.readouterr().err


def test_what_a_line_may_lack_is_not_asked_for(tmp_path, capsys):
    row = line(0, prompt="", question_id="q\ud800")
    row["turns"] = [{"text": "x", "action": {"type": "answer", "text": "\ud800"}}]
    del row["answer"]
    (tmp_path / "trajectories.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["follow", str(tmp_path), "--text"]) == 0
    assert capsys.readouterr().out.startswith("q\\ud800  \n")


def test_a_policys_words_cannot_steer_the_terminal(tmp_path, capsys):
    row = line(0, answer="Ro\x1b]0;x\x07me", queries=["\x1b[2J\u202eq"], prompt="x\nWho\x1b[8m?")
    row["turns"][0]["text"] += "\x9b8m"
    (tmp_path / "trajectories.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["follow", str(tmp_path), "--text"]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert r"Ro\x1b]0;x\x07me" in out
    assert r"\x1b[2J\u202eq" in out


def test_a_name_that_is_too_long_is_no_run(capsys):
    assert main(["follow", "x" * 300]) == 2
    assert "holds no trajectories.jsonl" in capsys.readouterr().err
