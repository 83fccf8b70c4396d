"""`obm diagnose`: what it prints and writes, what it refuses, and the way to its sub-verb."""

import csv
import json
import sys
import types

import pytest


def test_the_shipped_trio_is_diagnosed_into_tables_and_a_picture(obm, tmp_path):
    folder = tmp_path / "geometry"
    code, out, err = obm("diagnose", "--output", folder, "--rank", "8")
    assert code == 0, err
    assert "vlm/agent" in out
    assert "obm, sar, ties. both changed most entries" in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "geometry.csv", "geometry.json", "geometry.md", "geometry.png", "geometry.svg",
    ]  # fmt: skip
    record = json.loads((folder / "geometry.json").read_text())
    # as the settings name them, whatever machine this is
    assert record["models"] == {"vlm": "atlas://vlm", "agent": "atlas://agent"}
    assert (record["base"], record["rank"]) == ("atlas://base", 8)
    linear = record["groups"]["linear"]
    assert linear["models"]["vlm"]["norm"] > linear["models"]["agent"]["norm"] > 0
    assert record["groups"]["embedding"]["models"]["vlm"]["unchanged"] == 1.0  # frozen
    page = (folder / "geometry.md").read_text()
    assert f"{linear['pairs']['vlm/agent']['cosine']:.3f}" in page
    assert "| layer |" in page
    assert "| mlp.up_proj |" in page
    rows = list(csv.DictReader((folder / "geometry.csv").open()))
    # a line a tensor for vlm, for agent, and for the two together
    assert len(rows) == 3 * len(record["tensors"])
    first = record["tensors"][0]
    pair = next(row for row in rows if row["tensor"] == first["tensor"] and row["other"] == "agent")
    assert pair["model"] == "vlm"
    assert float(pair["conflict"] or 0) == pytest.approx(
        first["pairs"]["vlm/agent"].get("conflict", 0), rel=1e-5
    )
    assert (folder / "geometry.png").read_bytes()[:4] == b"\x89PNG"
    code, _, err = obm("diagnose", "--output", folder)
    assert (code, "exists; pass --overwrite" in err) == (2, True)


def test_further_models_are_named_and_a_dry_run_reads_no_weights(obm, tmp_path):
    code, out, err = obm("diagnose", "--model", "twin=atlas://agent", "--dry-run")
    assert code == 0, err
    assert "of 3 models" in out
    assert "under 1 GB" in out
    code, out, err = obm("diagnose", "--model", "twin=atlas://agent", "--rank", "4")
    assert code == 0, err
    # the agent beside itself: the same update
    line = next(line for line in out.splitlines() if line.strip().startswith("agent/twin"))
    assert line.split()[1:3] == ["1.000", "1.000"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "agent"], "--model agent: write NAME=DIR"),
        (["--model", "base=atlas://base"], "write NAME=DIR"),
        (["--model", "x=nowhere/at/all"], "nowhere/at/all"),
        (["--rank", "0"], "a rank of 0 has no directions"),
        (["models.base=null"], "models.base is not set"),
        (["elsewhere"], "neither an option nor key=value"),
    ],
)
def test_bad_arguments_are_one_clear_error(obm, arguments, message):
    code, _, err = obm("diagnose", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_that_takes_no_results_is_refused_before_the_work(obm, tmp_path, monkeypatch):
    monkeypatch.setattr("merge.diagnosis.diagnose", lambda *given, **options: pytest.fail("late"))
    (tmp_path / "file").touch()
    code, _, err = obm("diagnose", "--output", tmp_path / "file" / "folder")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be written" in err


def test_heads_are_handed_to_their_own_module_where_there_is_one(obm, monkeypatch):
    seen = []
    module = types.ModuleType("launch.commands.diagnose_heads")
    module.run = lambda options: seen.append(options.overrides) or 0
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert obm("diagnose", "heads", "seed=3")[0] == 0
    assert seen == [["seed=3"]]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = obm("diagnose", "heads")
    assert (code, "has no such diagnosis" in err) == (2, True)
