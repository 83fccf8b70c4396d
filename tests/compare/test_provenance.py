"""Where a report says it comes from, and pictures that are there whole or not."""

import re
import subprocess

import pytest

from compare.drawing import save_figure, start_drawing
from compare.provenance import how_it_was_made, origin
from train import machine
from train.machine import code_commit, describe_machine


def test_a_report_ends_with_its_command_commit_and_hardware():
    record = origin("obm study floor")
    assert list(record) == ["command", "commit", "hardware"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", record["commit"])
    assert how_it_was_made({**record, "commit": "abc", "hardware": "two cores"}, "seeds: 0, 1") == [
        "## How it was made", "", "```", "obm study floor", "```", "",
        "* commit: abc", "* hardware: two cores", "* seeds: 0, 1",
    ]  # fmt: skip


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Git in a folder of its own, in which the package seems to lie."""

    def run(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run([*command, *arguments], check=True, capture_output=True)

    for name in ("train/machine.py", "docs/results/table.md", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "train/machine.py"))
    run("init")
    run("add", ".")
    run("commit", "-m", "m")
    return run


def test_results_made_before_do_not_count_as_a_change_of_the_code(git, tmp_path):
    assert re.fullmatch("[0-9a-f]{12}", code_commit())
    (tmp_path / "docs/results/table.md").write_text("after")
    assert re.fullmatch("[0-9a-f]{12}", code_commit())
    (tmp_path / "docs/page.md").write_text("after")
    assert re.fullmatch("[0-9a-f]{12}-dirty", code_commit())
    assert describe_machine()["commit"] == code_commit()  # a run says so, too


def test_the_commit_of_another_repository_around_an_installed_package_is_not_ours(
    git, tmp_path, monkeypatch
):
    installed = tmp_path / "venv" / "site-packages" / "train"
    installed.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(installed / "machine.py"))
    assert code_commit() == "unknown"


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
