"""Where a report says it comes from, and pictures that are there whole or not."""

import re

import pytest

from compare.drawing import save_figure, start_drawing
from compare.provenance import how_it_was_made, origin


def test_a_report_ends_with_its_command_commit_and_hardware():
    record = origin("obm study floor")
    assert list(record) == ["command", "commit", "hardware"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", record["commit"])
    assert how_it_was_made({**record, "commit": "abc", "hardware": "two cores"}, "seeds: 0, 1") == [
        "## How it was made", "", "```", "obm study floor", "```", "",
        "* commit: abc", "* hardware: two cores", "* seeds: 0, 1",
    ]  # fmt: skip


def test_a_picture_is_the_same_again_and_never_half_there(tmp_path):
    def draw(path):
        plt = start_drawing(8)
        figure, axes = plt.subplots()
        axes.plot([0, 1], [1, 0])
        save_figure(figure, [path])
        assert not plt.get_fignums()
        return path.read_bytes()

    assert draw(tmp_path / "one.svg") == draw(tmp_path / "two.svg")
    with pytest.raises(ValueError, match="not supported"):
        draw(tmp_path / "three.nonsense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.svg", "two.svg"]
