"""An ablation's summary, its readings and its picture."""

import pytest

from compare.ablation import draw_axes, summarise_ablation, write_ablation
from compare.errors import CompareError
from configs.sections import Environment

METRICS = ("searched", "entity", "passage", "accuracy", "recognition")
AXES = {
    "density": {
        "setting": "merge.density",
        "points": [
            {"value": 0.1, "arm": "density 0.1", "is_reference": False},
            {"value": 0.25, "arm": "obm", "is_reference": True},
            {"value": 0.5, "arm": "density 0.5", "is_reference": False},
        ],
    },
    "combine": {
        "setting": "merge.combine",
        "points": [
            {"value": "sum", "arm": "obm", "is_reference": True},
            {"value": "mean", "arm": "combine mean", "is_reference": False},
        ],
    },
}


@pytest.fixture
def rows():
    """Density 0.1 is about 0.2 below the reference in every seed, 0.5 now above and now below."""
    values = {
        "obm": [0.3, 0.5, 0.7], "density 0.1": [0.11, 0.3, 0.49],
        "density 0.5": [0.4, 0.4, 0.7], "combine mean": [0.51, 0.7, 0.89],
    }  # fmt: skip
    return [
        {"arm": arm, "seed": seed, "recipe": "r", "metrics": dict.fromkeys(METRICS, value)}
        for arm, per_seed in values.items()
        for seed, value in enumerate(per_seed)
    ]


def test_points_take_the_numbers_of_their_arm_and_the_reference_is_on_every_axis(rows):
    summary = summarise_ablation(rows, AXES, "obm")
    assert summary["seeds"] == [0, 1, 2]
    means = [
        [point["parts"]["accuracy"]["mean"] for point in axis["points"]] for axis in summary["axes"]
    ]
    assert means == [pytest.approx([0.3, 0.5, 0.5]), pytest.approx([0.5, 0.7])]
    # reference minus arm
    assert summary["differences"]["density 0.1"]["accuracy"]["mean"] == pytest.approx(0.2)
    assert summary["differences"]["combine mean"]["accuracy"]["mean"] == pytest.approx(-0.2)
    assert "obm" not in summary["differences"]


def test_a_missing_seed_is_refused(rows):
    with pytest.raises(CompareError, match="combine mean has other seeds than obm"):
        summarise_ablation(rows[:-1], AXES, "obm")


def test_the_page_says_which_points_lie_below_and_above(rows, tmp_path):
    record = write_ablation(
        summarise_ablation(rows, AXES, "obm"), rows, tmp_path,
        name="ablation", title="Ablation", command="obm study ablation",
        environment=Environment(eval_split="test", eval_size=128), recipe="density 0.25",
    )  # fmt: skip
    page = (tmp_path / "ablation.md").read_text()
    for words in (
        "# Ablation", "128 test questions a seed", "`obm` (density 0.25)",
        "| 0.25 (reference) |", "* density, accuracy against the reference: below: 0.1; not "
        "separated: 0.5.", "* combine, accuracy against the reference: above: mean.",
        "**+0.20 [+0.18, +0.22]**", "**-0.20 [-0.22, -0.18]**", "Of 6 such intervals",
        f"commit: {record['commit']}",
    ):  # fmt: skip
        assert words in page
    assert len((tmp_path / "ablation.csv").read_text().splitlines()) == 13


def test_the_picture_has_a_panel_an_axis_and_is_the_same_every_time(rows, tmp_path):
    record = write_ablation(
        summarise_ablation(rows, AXES, "obm"), rows, tmp_path,
        name="a", title="t", command="c", environment=Environment(), recipe="r",
    )  # fmt: skip
    svg = (tmp_path / "a.svg").read_text()
    assert svg.count('<g id="axes_') == 2
    draw_axes(record, [tmp_path / "b.svg"])
    assert (tmp_path / "b.svg").read_text() == svg
    assert not list(tmp_path.glob(".*"))
