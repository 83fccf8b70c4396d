"""The newcomer's path: its commands can be started, and the page shows them with times."""

import shlex
from pathlib import Path

import pytest

from tests.docs.blocks import Command, blocks, read
from tests.docs.programs import check
from tests.docs.walk import (
    BEGIN,
    END,
    RECIPES,
    STEPS,
    Step,
    Timed,
    commands_of,
    plan,
    table,
    walk,
    write_table,
)

COPIED = {block.file_name: block.text for block in blocks(RECIPES) if block.file_name}


def test_every_command_of_the_path_could_be_started(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("output: runs/x\nmodels: {init: atlas://vlm}\n")
    there = {"my.yaml"}
    for step in STEPS:
        for name in step.files:
            (tmp_path / name).write_text(COPIED[name])
            there.add(name)
        for text in step.commands:
            words = tuple(shlex.split(text.removesuffix(" &")))
            if words[0] == "python":
                assert words[1] in there
            else:
                check(Command("walk.py", 0, text, words))


def test_the_page_shows_the_commands_of_the_path():
    page = commands_of(read("docs/quickstart.md"))
    path = [command for step in STEPS for command in step.commands]
    assert page == path, "measure again: make walk"


def test_a_table_has_times_and_says_that_the_machine_was_busy():
    timed = [Timed(Step("a", ("obm doctor",), ("x.py",)), 10.4, 2.6), Timed(STEPS[0], 1.0, 0.4)]
    text = table(timed, load=0.5, date="2026-01-01")
    assert "| a | `obm doctor`<br>with `x.py` from [recipes.md](recipes.md) | 10 | 3 |" in text
    assert "| in all | | 11 | 3 |" in text  # 10.4 + 1.0, 2.6 + 0.4
    assert "Other work" not in text
    assert "Other work ran meanwhile (load 900" in table(timed, load=900, date="2026-01-01")


def test_the_table_is_written_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(AssertionError, match="have to stand in it"):
        write_table(page, "new")
    assert page.read_text() == "nothing"


def test_a_changed_path_keeps_the_times_of_the_steps_that_stayed(monkeypatch):
    old, new = Step("old", ("obm doctor",)), Step("new", ("obm demo",))
    measured = table([Timed(old, 12.0, 3.0)], load=0.0, date="2026-01-01")
    monkeypatch.setattr("tests.docs.walk.STEPS", (old, new))
    lines = plan(f"x\n{BEGIN}\n{measured}\n{END}\n").splitlines()
    assert "| old | `obm doctor` | 12 | 3 |" in lines
    assert "| new | `obm demo` | - | - |" in lines
    assert "| in all | | - | - |" in lines
    assert lines[-2].startswith("Measured on 2026-01-01 with Python")


def test_a_server_runs_while_the_walk_goes_on_and_ends_with_it(tmp_path, monkeypatch):
    steps = (
        Step("a", ("mkdir obm-warmstart",)),
        Step("b", ("sh -c 'echo $$ > pid; exec sleep 100' &",)),
        Step("until it is up", ("until test -s pid; do sleep 0.05; done",)),
        Step("c", ("timeout --signal=KILL 0.2 sleep 100",)),
    )
    monkeypatch.setattr("tests.docs.walk.STEPS", steps)
    assert [one.step.title for one in walk(tmp_path)] == [step.title for step in steps]
    pid = int((tmp_path / "obm-warmstart" / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_a_command_that_fails_ends_the_walk(tmp_path, monkeypatch):
    steps = (Step("a", ("mkdir obm-warmstart",)), Step("b", ("pwd", "exit 3")))
    monkeypatch.setattr("tests.docs.walk.STEPS", steps)
    with pytest.raises(SystemExit, match="'exit 3' ended with code 3"):
        walk(tmp_path)
