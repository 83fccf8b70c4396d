"""Reward functions of one's own: how they are found, called and added, and their mistakes."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rewards.errors import RewardError
from rewards.functions import (
    RewardFunction,
    add_functions,
    call_function,
    check_columns,
    load_functions,
)

EPISODES = [SimpleNamespace(answer="Paris"), SimpleNamespace(answer=None)]
QUESTIONS = [{"id": "q1", "answers": ["Paris"], "level": 3}, {"id": "q2", "answers": ["Rome"]}]


@pytest.fixture
def load(tmp_path):
    """Writes a file of functions and loads one of them."""

    def make(text, name="brevity", weight=0.5, file="mine.py"):
        (tmp_path / file).write_text(text)
        place = {"function": f"{tmp_path / file}:{name}", "weight": weight}
        [function] = load_functions([place])
        return function

    return make


def own(call, weight=0.5):
    return RewardFunction("brevity", weight, call, "mine.py:brevity")


def test_a_function_gets_the_episodes_and_the_columns_in_their_order(load):
    function = load(
        "def brevity(trajectories, answers, **columns):\n"
        "    assert columns == {'id': ['q1', 'q2'], 'level': [3, None]}, columns\n"
        "    return [float(t.answer in gold) for t, gold in zip(trajectories, answers)]\n"
    )
    assert call_function(function, EPISODES, QUESTIONS) == [1.0, 0.0]
    assert (function.name, function.weight) == ("brevity", 0.5)


def test_a_column_that_no_question_of_the_batch_has_is_passed_as_none():
    def by_level(trajectories, level, extra="kept"):
        assert (level, extra) == ([None, None], "kept")
        return [0.0, 1.0]

    check_columns([own(by_level)], QUESTIONS)
    assert call_function(own(by_level), EPISODES, [QUESTIONS[1]] * 2) == [0.0, 1.0]


def test_its_weight_times_its_value_is_added_to_the_total():
    scores = [{"total": 1.0, "accuracy": 1.0}, {"total": 0.1, "accuracy": 0.0}]
    add_functions([own(lambda t: [2.0, None], -0.25)], EPISODES, QUESTIONS, scores)
    # 1 - 0.25 * 2 = 0.5; what it says nothing about stays as it was
    assert scores == [
        {"total": 0.5, "accuracy": 1.0, "brevity": 2.0},
        {"total": 0.1, "accuracy": 0.0, "brevity": None},
    ]


def test_without_an_episode_no_function_is_asked():
    # whose columns have no names then
    add_functions([own(lambda t, answers: [len(gold) for gold in answers])], [], [], [])


def test_an_episode_that_cannot_be_scored_stays_unscored():
    scores = [{"total": None}, {"total": 0.0}]
    add_functions([own(lambda t: [2.0, 4.0])], EPISODES, QUESTIONS, scores)
    assert scores == [{"total": None, "brevity": 2.0}, {"total": 2.0, "brevity": 4.0}]


def test_a_picture_is_passed_to_who_names_it_alone():
    class Reads(dict):
        def get(self, key, default=None):
            assert key != "image", "a picture was decoded for nothing"
            return super().get(key, default)

    rows = [Reads(id="q1", image=b"..."), Reads(id="q2", image=None)]
    assert call_function(own(lambda t, **columns: [len(columns)] * 2), EPISODES, rows) == [1.0, 1.0]
    named = own(lambda t, image: [float(i is None) for i in image])
    plain = [dict(row) for row in rows]
    assert call_function(named, EPISODES, plain) == [0.0, 1.0]


def test_numbers_of_numpy_are_numbers():
    values = call_function(own(lambda t: np.array([0.5, 2], np.float32)), EPISODES, QUESTIONS)
    assert values == [0.5, 2.0]
    assert all(type(value) is float for value in values)


def test_a_file_is_run_once_and_may_import_what_lies_beside_it(load, tmp_path):
    (tmp_path / "beside_it.py").write_text("FACTOR = 3.0\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom beside_it import FACTOR\n"
        "@dataclass\nclass State:\n    n: int = 0\nSTATE = State()\n"
        "def one(trajectories): STATE.n += 1; return [STATE.n * FACTOR] * len(trajectories)\n"
        "def two(trajectories): STATE.n += 1; return [STATE.n * FACTOR] * len(trajectories)\n"
    )
    place = f"{tmp_path / 'mine.py'}"
    one, two = load_functions([{"function": f"{place}:{n}", "weight": 1.0} for n in ("one", "two")])
    assert call_function(one, EPISODES, QUESTIONS) == [3.0, 3.0]
    assert call_function(two, EPISODES, QUESTIONS) == [6.0, 6.0]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: [1.0], r"mine.py:brevity: it returned 1 values for 2 episodes; return one"),
        (lambda t: None, "mine.py:brevity: it returned NoneType, not a list"),
        (lambda t: [1.0, math.nan], "for question q2 it returned nan; return None where"),
        (lambda t: [math.inf, 1.0], "for question q1 it returned inf"),
        (lambda t: ["1", 2], "for question q1 it returned '1', which is no number"),
        (lambda t: [t[1].answer.x] * 2, "it stopped with AttributeError: .* 'x' .line"),
        (
            lambda t: sys.exit(3),
            r"mine.py:brevity: it stopped with SystemExit: 3 \(line \d+\); mend",
        ),
        (lambda t: (e.answer.x for e in t), "it stopped with AttributeError: .* 'x' .line"),
        (lambda t: (sys.exit(3) for e in t), "it stopped with SystemExit: 3 .line"),
        (lambda t: [10**400, 1], "for question q1 it returned inf; return None where"),
        (lambda t: [1, 10**5000], "for question q2 it returned inf; return None where"),
    ],
)
def test_what_is_no_list_of_numbers_is_one_clear_error(call, words):
    scores = [{"total": 1.0}, {"total": 1.0}]
    with pytest.raises(RewardError, match=words):
        add_functions([own(call)], EPISODES, QUESTIONS, scores)
    assert scores == [{"total": 1.0}, {"total": 1.0}], "half of it was added"


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (
            "def brevty(t): return []",
            "brevity",
            "no function 'brevity' in it; did you mean 'brevty'",
        ),
        ("x = 1", "brevity", "there is no function 'brevity' in it; it has none"),
        ("brevity = 3", "brevity", "there is no function 'brevity'"),
        ("def accuracy(t): return []", "accuracy", "there is a part 'accuracy' already"),
        ("def overlong(t): return []", "overlong", "there is a part 'overlong' already"),
        ("def brevity(): return []", "brevity", r"takes no episodes; define it as def f\(traj"),
        ("def brevity(*, answers): return []", "brevity", "takes no episodes"),
        ("def brevity(t, a, /): return []", "brevity", "columns are passed by name"),
        ("def brevity(t:\n", "brevity", r"the file does not run: SyntaxError: .*\(line 1\)"),
        ("\nimport nowhere_at_all\n", "brevity", r"not run: ModuleNotFoundError: .*\(line 2\)"),
        ("import sys\n\nsys.exit(3)\n", "brevity", r"not run: SystemExit: 3 \(line 3\); mend it"),
        ("raise SystemExit", "brevity", r"the file does not run: SystemExit: .*\(line 1\)"),
        ("x = '\0'", "brevity", "the file does not run: "),
    ],
)
def test_what_is_no_function_is_one_clear_error(load, text, name, words):
    with pytest.raises(RewardError, match=words) as caught:
        load(text, name)
    assert f"mine.py:{name}: " in str(caught.value)


@pytest.mark.parametrize(
    "place",
    ["brevity", "mine.py", "mine.py:", "mine.txt:brevity", "owner/name", "mine.py:a b",
     "https://example.org/mine.py:brevity", "hf://owner/name/mine.py:brevity"],
)  # fmt: skip
def test_only_a_function_in_a_local_file_is_taken(place):
    with pytest.raises(RewardError, match=r"reward_functions\[0\].function: .* of this machine"):
        load_functions([{"function": place, "weight": 1.0}])


def test_a_file_that_is_not_there_and_a_name_twice_are_refused(tmp_path):
    with pytest.raises(RewardError, match=r"none.py:brevity: no such file \(looked in"):
        load_functions([{"function": "none.py:brevity", "weight": 1.0}])
    (tmp_path / "mine.py").write_text("def brevity(t): return []")
    place = {"function": f"{tmp_path / 'mine.py'}:brevity", "weight": 1.0}
    with pytest.raises(RewardError, match="there is a part 'brevity' already"):
        load_functions([place, place])


@pytest.mark.parametrize("file", ["~nobody-of-this-name/x.py", "a\0b.py", "a" * 300 + ".py"])
def test_a_path_that_no_file_can_have_is_one_clear_error(file):
    with pytest.raises(RewardError, match=r"x?\.py:brevity: no such file .*; check the path"):
        load_functions([{"function": f"{file}:brevity", "weight": 1.0}])


def test_a_column_that_no_question_has_is_found_before_anything_runs():
    check_columns([own(lambda t, level, extra=1, **columns: [])], QUESTIONS)
    with pytest.raises(
        RewardError, match="no question has a column 'answer'; did you mean 'answer"
    ):
        check_columns([own(lambda t, answer: [])], QUESTIONS)
    with pytest.raises(RewardError, match="column 'zzz'; there are answers, id, level"):
        check_columns([own(lambda t, zzz: [])], QUESTIONS)
