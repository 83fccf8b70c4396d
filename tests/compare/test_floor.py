"""Floors: means over seeds, differences within a seed, and sentences that say no more than that."""

import csv
import json

import pytest

from compare.errors import CompareError
from compare.floor import (
    floor_text_table,
    separation_text,
    signed_cell,
    summarise_floor,
    write_floor,
)
from configs.sections import Environment

METRICS = ("searched", "entity", "passage", "accuracy", "seen/accuracy", "unseen/accuracy")


def rows_of(arm, values, recipe="r"):
    return [
        {"arm": arm, "seed": seed, "recipe": recipe, "metrics": dict.fromkeys(METRICS, value)}
        for seed, value in enumerate(values)
    ]


@pytest.fixture
def rows():
    """obm is about 0.1 above ties in every seed, though both vary more than that between seeds."""
    return [
        *rows_of("obm", [0.2, 0.5, 0.8]),
        *rows_of("ties", [0.11, 0.4, 0.69]),
        *rows_of("dare", [0.3, 0.3, 0.9]),
        *rows_of("vlm", [0.9, 0.95, 1.0]),
    ]


def test_an_arm_has_the_mean_over_seeds_with_students_interval(rows):
    parts = summarise_floor(rows, "obm")["arms"]["obm"]["parts"]
    # mean 0.5, standard deviation 0.3, t(2) = 4.303: 0.5 -+ 4.303 * 0.3 / sqrt(3), cut to 0 and 1
    assert parts["accuracy"]["mean"] == pytest.approx(0.5)
    assert (parts["accuracy"]["low"], parts["accuracy"]["high"]) == (0.0, 1.0)
    vlm = summarise_floor(rows, "obm")["arms"]["vlm"]["parts"]["seen accuracy"]
    # 0.95 - 4.303 * 0.05 / sqrt(3) = 0.8258
    assert vlm["low"] == pytest.approx(0.8258, abs=1e-4)
    assert vlm["per_seed"] == [0.9, 0.95, 1.0]


def test_differences_are_taken_within_a_seed(rows):
    differences = summarise_floor(rows, "obm")["differences"]
    ties = differences["ties"]["accuracy"]
    assert ties["per_seed"] == pytest.approx([0.09, 0.1, 0.11])
    # 0.1 - 4.303 * 0.01 / sqrt(3)
    assert ties["low"] == pytest.approx(0.0752, abs=1e-4)
    # -0.1, 0.2, -0.1: mean 0
    assert differences["dare"]["accuracy"]["mean"] == pytest.approx(0.0)
    assert "obm" not in differences


def test_the_sentence_separates_only_what_the_interval_does(rows):
    summary = summarise_floor(rows, "obm")
    # against vlm: -0.7, -0.45, -0.2: mean -0.45, half 4.303 * 0.25 / sqrt(3) = 0.62
    assert separation_text(summary, "accuracy") == (
        "accuracy: obm is above ties; not separated from dare, vlm."
    )
    lower = [*rows_of("obm", [0.1, 0.1, 0.12]), *rows_of("ties", [0.6, 0.6, 0.6])]
    assert separation_text(summarise_floor(lower, "obm"), "passage") == (
        "passage: obm is below ties."
    )


def test_a_difference_that_is_equal_in_all_seeds_separates_for_each_asked_its_own_questions():
    rows = [*rows_of("obm", [0.2, 0.5, 0.8]), *rows_of("ties", [0.1, 0.4, 0.7])]
    summary = summarise_floor(rows, "obm")
    assert separation_text(summary, "accuracy") == "accuracy: obm is above ties."
    assert signed_cell(summary["differences"]["ties"]["accuracy"]) == "**+0.10**"


def test_one_seed_separates_nothing():
    summary = summarise_floor([*rows_of("obm", [0.9]), *rows_of("ties", [0.1])], "obm")
    assert "not separated from ties" in separation_text(summary, "accuracy")


def test_the_table_begins_with_the_most_right_answers(rows):
    lines = floor_text_table(summarise_floor(rows, "obm"))
    assert lines[0].startswith("| start | searched | entity | passage | accuracy | seen accuracy")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["vlm", "obm", "dare", "ties"]
    assert "recognition" not in lines[0]


def test_an_arm_without_all_seeds_or_a_missing_reference_is_refused(rows):
    with pytest.raises(CompareError, match="vlm has other seeds than obm"):
        summarise_floor(rows[:-1], "obm")
    with pytest.raises(CompareError, match="'sce'"):
        summarise_floor(rows, "sce")


def test_the_report_says_where_its_numbers_come_from(rows, tmp_path):
    for row in rows:
        row["metrics"]["recognition"] = 1.0
    record = write_floor(
        summarise_floor(rows, "obm"),
        rows,
        tmp_path / "results",
        name="floor",
        title="Floors",
        command="obm study floor",
        environment=Environment(eval_split="test", eval_size=128),
    )
    assert json.loads((tmp_path / "results" / "floor.json").read_text()) == record
    with (tmp_path / "results" / "floor.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    assert (lines[1]["arm"], lines[1]["seed"], lines[1]["accuracy"]) == ("obm", "1", "0.5")
    page = (tmp_path / "results" / "floor.md").read_text()
    for words in (
        "128 test questions a seed", "| ties | **+0.10 [+0.08, +0.12]** |",
        "not separated from dare, vlm",
        "seeds: 0, 1, 2; interval: 95 %, Student's t over 3 seeds", "obm study floor",
        "The highest mean accuracy is that of vlm (0.95)", "Of 12 such intervals",
        f"commit: {record['commit']}", record["hardware"],
    ):  # fmt: skip
        assert words in page
