"""The language in which documents name their figures."""

import json

import pytest

from compare.errors import CompareError
from compare.figures import Results, holds, value_of

CONTENT = {
    "n": 128,
    "arms": {"obm": {"ceiling": 0.5, "seen share": 0.75}, "ties": {"ceiling": 0.25}},
    "runs": [
        {"size": "7b", "name": "step, times less", "s": 3.0, "steps": 8, "work": {"a": {"b": "x"}}},
        {"size": "7b", "name": "other", "s": 9.0, "steps": 16},
        {"size": "1.5b", "name": "other", "s": 4.0, "steps": 8},
    ],
    "interval": [0.1, None],
}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CONTENT))
    (tmp_path / "b.csv").write_text("arm,step,accuracy\nobm,0,0.5\nobm,60,0.75\nties,60,\n")
    (tmp_path / "broken.json").write_text("{")
    return Results(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n", 128),
        ("arms.obm.ceiling", 0.5),
        ('arms.obm."seen share"', 0.75),
        ("interval.0", 0.1),
        ("interval.1", None),
        ("runs[size=1.5b].s", 4.0),
        ("runs[size=7b, steps=16].s", 9.0),
        ('runs[name="step, times less"].s', 3.0),
        ("runs[work.a.b=x].s", 3.0),
        ("b.csv: [arm=obm, step=60].accuracy", 0.75),
        ("max(arms.*.ceiling)", 0.5),
        ("median(runs.*.s)", 4.0),  # of 3, 4, 9
        ("mean(runs.*.s)", 16 / 3),
        ("sum(runs.*.s, n)", 144.0),
        ("count(runs[size=7b])", 2),
        ("min(runs[size=7b].s, arms.ties.ceiling)", 0.25),
        ("arms.ties.ceiling / arms.obm.ceiling * 100", 50.0),
        ("1 + 2 * 3", 9.0),  # from left to right
        ("max(runs[size=7b].s) - min(runs[size=7b].s)", 6.0),
    ],
)
def test_an_expression_says_what_the_files_hold(results, text, expected):
    assert value_of(text, results, "a.json") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms.wudi.ceiling", r"'arms.wudi' leads nowhere; there are \['obm', 'ties'\]"),
        ("runs[size=3b].s", r"'runs\[size=3b\]' leads nowhere; there are 3 records"),
        ("interval.2", "leads nowhere"),
        ("n.s", "'n.s' leads nowhere; there is 128"),
        ("max(n.*)", "leads nowhere; there is 128"),
        ("n[s=1]", "leads nowhere; there is 128"),
        ("arms[s=1]", r"leads nowhere; there are \['obm', 'ties'\]"),
        ("interval[s=1]", "leads nowhere; there are 2 records"),
        ("runs.*.s", r"leads to 3 values; say median\(...\) of"),
        ("n n", "'n' stands where"),
        ("max(n", r"a '\)' is missing"),
        ("n +", "the end is no value"),
        ("n )", "too many"),
        ("__import__('os')", "cannot be read|leads nowhere"),
        ("broken.json: n", "broken.json"),
        ("missing.json: n", "No such file"),
    ],
)
def test_what_cannot_be_read_is_one_error(results, text, message):
    with pytest.raises(CompareError, match=message):
        value_of(text, results, "a.json")


def test_a_path_without_a_file_needs_one(results):
    with pytest.raises(CompareError, match=r"names no file; write FILE\.json: PATH"):
        value_of("n", results)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("arms.obm.ceiling = max(arms.*.ceiling)", True),
        ("arms.ties.ceiling = max(arms.*.ceiling)", False),
        ("arms.ties.ceiling < 0.25", False),
        ("arms.ties.ceiling <= 0.25", True),
        ("n > 127", True),
        ("n != 128", False),
    ],
)
def test_a_comparison_holds_or_does_not(results, text, expected):
    assert holds(text, results, "a.json") is expected


def test_a_claim_must_compare_two_things(results):
    with pytest.raises(CompareError, match="no comparison"):
        holds("n", results, "a.json")
