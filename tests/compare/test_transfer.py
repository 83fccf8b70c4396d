"""Transfer: gains, what is lost from world to world, differences to references."""

import csv
import json

import pytest

from compare.errors import CompareError
from compare.transfer import summarise_transfer, write_transfer

METRICS = ("searched", "search_rate_image", "entity", "passage", "accuracy", "unseen/accuracy")
ACCURACY = {
    ("obm", "flags", "before"): [0.3, 0.5], ("obm", "flags", "after"): [0.4, 0.601],
    ("obm", "maps", "before"): [0.1, 0.3], ("obm", "maps", "after"): [0.1, 0.5],
    ("vlm", "flags", "before"): [0.0, 0.1], ("vlm", "flags", "after"): [0.2, 0.4],
    ("vlm", "maps", "before"): [0.0, 0.0], ("vlm", "maps", "after"): [0.0, 0.0],
}  # fmt: skip


@pytest.fixture
def rows():
    return [
        {"arm": arm, "world": world, "stage": stage, "seed": seed,
         "metrics": dict.fromkeys(METRICS, value)}
        for (arm, world, stage), values in ACCURACY.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_a_gain_is_after_minus_before_within_a_seed(rows):
    arms = summarise_transfer(rows, ["vlm"])["arms"]
    assert arms["obm"]["flags"]["gain"]["accuracy"]["per_seed"] == pytest.approx([0.1, 0.101])
    assert arms["obm"]["maps"]["gain"]["accuracy"]["per_seed"] == pytest.approx([0.0, 0.2])
    assert arms["obm"]["maps"]["after"]["accuracy"]["mean"] == pytest.approx(0.3)
    assert "seen accuracy" not in arms["obm"]["maps"]["after"]
    assert arms["obm"]["maps"]["after"]["unseen accuracy"]["mean"] == pytest.approx(0.3)


def test_a_shift_is_against_the_first_world(rows):
    shift = summarise_transfer(rows, ["vlm"])["shift"]
    # 0.1 - 0.4 and 0.5 - 0.601
    assert shift["obm"]["maps"]["after"]["per_seed"] == pytest.approx([-0.3, -0.101])
    assert shift["obm"]["maps"]["before"]["per_seed"] == pytest.approx([-0.2, -0.2])
    assert list(shift["obm"]) == ["maps"]


def test_a_difference_is_arm_minus_reference(rows):
    differences = summarise_transfer(rows, ["vlm"])["differences"]
    assert list(differences) == ["vlm"]
    assert list(differences["vlm"]) == ["obm"]
    flags = differences["vlm"]["obm"]["flags"]
    assert flags["before"]["accuracy"]["per_seed"] == pytest.approx([0.3, 0.4])
    assert flags["after"]["accuracy"]["per_seed"] == pytest.approx([0.2, 0.201])


def test_a_missing_evaluation_is_refused(rows):
    with pytest.raises(CompareError, match="missing or there twice"):
        summarise_transfer(rows[:-1], ["vlm"])
    with pytest.raises(CompareError, match="missing or there twice"):
        summarise_transfer([*rows[:-1], rows[0]], ["vlm"])


def test_the_page_has_a_table_a_world(rows, tmp_path):
    asked = {"eval_size": 128, "eval_split": "test"}
    record = write_transfer(
        summarise_transfer(rows, ["vlm"]), rows, tmp_path,
        name="transfer", title="Transfer", command="obm study transfer",
        worlds={"flags": {"settings": "as it was trained", "environment": asked},
                "maps": {"settings": "eval_domain maps", "environment": asked}},
        training="60 steps of GRPO",
    )  # fmt: skip
    assert json.loads((tmp_path / "transfer.json").read_text()) == record
    assert list(record["worlds"]) == ["flags", "maps"]
    page = (tmp_path / "transfer.md").read_text()
    for words in (
        "## flags", "## maps", "| maps | eval_domain maps |",
        "Trained in `flags`: 60 steps of GRPO",
        "| start | searched | by image | entity | passage | accuracy | unseen | gain | minus vlm |",
        "**+0.10 [+0.09, +0.11]**", "obm study transfer", "seeds: 0, 1",
    ):  # fmt: skip
        assert words in page
    with (tmp_path / "transfer.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 16
    assert (lines[3]["arm"], lines[3]["stage"], lines[3]["accuracy"]) == ("obm", "after", "0.601")
