"""Where a report says it comes from, and pictures that are there whole or not."""

import re
import subprocess

import pytest

from compare import provenance
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


def test_results_made_before_do_not_count_as_a_change_of_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run([*command, *arguments], check=True, capture_output=True)

    for name in ("compare/provenance.py", "docs/results/table.md", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "compare/provenance.py"))
    assert re.fullmatch("[0-9a-f]{12}", provenance.code_commit())
    (tmp_path / "docs/results/table.md").write_text("after")
    assert re.fullmatch("[0-9a-f]{12}", provenance.code_commit())
    (tmp_path / "docs/page.md").write_text("after")
    assert re.fullmatch("[0-9a-f]{12}-dirty", provenance.code_commit())


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
