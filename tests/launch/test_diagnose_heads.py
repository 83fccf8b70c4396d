"""`obm diagnose heads`: the map of a start, its files, and what the verb refuses."""

import json

import pytest

from configs.sections import FreezeHeads
from launch.cli import build_parser, main
from launch.commands import diagnose_heads
from launch.errors import LaunchError
from train.frozen import choose_heads
from train.heads import HeadLayout

SMALL = (
    "conflict.search=agent", "conflict.search_questions=8", "conflict.keep_questions=16",
)  # fmt: skip


def diagnose(*arguments):
    parser = build_parser("diagnose heads", diagnose_heads)
    return diagnose_heads.run(parser.parse_intermixed_args(list(arguments)))


def test_the_map_of_a_start(tmp_path, capsys):
    folder = tmp_path / "map"
    assert diagnose("--output", str(folder), "models.init=atlas://vlm", *SMALL) == 0
    out = capsys.readouterr().out
    assert "| place | layer | head | cosine |" in out
    record = json.loads((folder / "conflict.json").read_text())
    assert record["start"] == "atlas://vlm"
    layout = HeadLayout(**record["layout"])
    assert [(row["layer"], row["head"]) for row in record["heads"]] == layout.heads()
    assert sorted(row["place"] for row in record["heads"]) == list(range(1, 9))
    for row in record["heads"]:
        assert row["opposition"] == pytest.approx(max(0.0, -row["cosine"]))
        assert row["search_norm"] > 0
        assert row["keep_norm"] > 0
    first = min(record["heads"], key=lambda row: row["place"])
    settings = FreezeHeads("cast", 0.1, str(folder / "conflict.json"))
    assert choose_heads(settings, layout, "").heads == ((first["layer"], first["head"]),)
    page = (folder / "conflict.md").read_text()
    assert f"| 1 | {first['layer']} | {first['head']} |" in page
    assert (folder / "conflict.svg").read_text().lstrip().startswith("<?xml")
    assert (folder / "conflict.png").read_bytes().startswith(b"\x89PNG")
    # what it took, for the trainings that freeze heads by it
    cost = json.loads((folder / "cost.json").read_text())["diagnose"]
    assert cost["time_s"] > 0
    assert cost["processor_s"] > 0

    with pytest.raises(LaunchError, match="--overwrite"):
        diagnose("--output", str(folder), "models.init=atlas://vlm", *SMALL)


def test_a_folder_that_takes_no_map_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnose_heads, "make_map", lambda *given: pytest.fail("too late"))
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"--output .*conflict\.json: cannot be written"):
        diagnose("--output", str(tmp_path / "file" / "map"), "models.init=atlas://vlm", *SMALL)


def test_a_dry_run_says_what_would_be_compared(tmp_path, capsys):
    arguments = ("--output", str(tmp_path / "map"), "--dry-run", "models.init=atlas://vlm")
    assert diagnose(*arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 heads of ")
    assert "search (grpo, 64 questions)" in out
    assert not (tmp_path / "map").exists()


def test_the_verb_is_reached_from_the_command_line(tmp_path, capsys):
    arguments = ["diagnose", "heads", "--output", str(tmp_path / "map"), "models.init=atlas://vlm"]
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("8 heads of ")
    assert main(["diagnose", "heads", "models.init=atlas://vlm"]) == 2
    assert "error: --output: missing" in capsys.readouterr().err


def test_a_start_is_needed_and_a_folder_for_its_map():
    with pytest.raises(LaunchError, match=r"--output: missing; the map of atlas://vlm"):
        diagnose("models.init=atlas://vlm")
    with pytest.raises(LaunchError, match=r"models\.init is not set"):
        diagnose("models.init=")
