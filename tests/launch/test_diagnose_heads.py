"""`obm diagnose heads`: the map of a start, its files, and what the verb refuses."""

import json

import pytest

from configs.sections import FreezeHeads
from launch import cast_study
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

    with pytest.raises(LaunchError, match="--overwrite"):
        diagnose("--output", str(folder), "models.init=atlas://vlm", *SMALL)


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


# ---------------------------------------------------------------- the study


def test_differences_are_taken_within_a_seed():
    found = {
        (arm, seed): {"recognition": value, "accuracy": 0.5, "searched": 1.0, "reward": value}
        for arm, values in (("none", (0.2, 0.6)), ("cast 10 %", (0.5, 0.7)))
        for seed, value in enumerate(values)
    }
    found |= {("start", s): {"recognition": 0.9, "accuracy": 0.4, "searched": 1.0} for s in (0, 1)}
    summary = cast_study.summarise(found, [0, 1])
    difference = summary["differences"]["cast 10 %"]["recognition"]
    assert difference["per_seed"] == pytest.approx([0.3, 0.1])
    assert difference["mean"] == pytest.approx(0.2)
    # Student's t of two values: 12.706 * std 0.1414 / sqrt(2) = 1.27
    assert difference["low"] == pytest.approx(0.2 - 1.27, abs=0.01)
    assert set(summary["differences"]) == {"cast 10 %"}
    assert "reward" not in summary["arms"]["start"]
    page = cast_study.render({
        "steps": 30, "seeds": [0, 1], "questions": 256, "n_heads": 8, "command": "c",
        "commit": "x", "hardware": "y", "frozen": {"cast 10 %": "0.1"}, **summary,
    })  # fmt: skip
    assert "| cast 10 % | 0.1 | +0.200 [-1.071, +1.471] | +0.000 [+0.000, +0.000] |" in page


def test_every_arm_is_a_setting(tmp_path):
    from configs.schema import load_config

    for arm in cast_study.ARMS:
        job = cast_study.make_job(arm, 2, tmp_path / "obm", tmp_path, 30)
        overrides = [argument for argument in job.arguments if "=" in argument]
        config = load_config("configs/demo.yaml", overrides)
        section = config.freeze_heads
        assert arm == "all heads" or section.source == arm.split()[0]
        assert section.source != "random" or section.seed == 2
