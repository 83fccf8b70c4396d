"""The bench: files of true shapes, figures of the command alone, targets that stay missed."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import yaml

from launch import bench_merge
from launch.bench_files import SIZES, Size, make_trio
from launch.bench_merge import Run, plan_rounds
from launch.bench_peer import make_peer_environment, peer_config
from launch.bench_report import judge, medians, render_table
from launch.errors import LaunchError
from merge.shards import SafetensorsFile

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    make_trio(folder, TINY)
    return folder


def read(folder, name):
    """A tensor of a sharded checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return SafetensorsFile(folder / index["weight_map"][name]).read(name)


# --- files


@pytest.mark.parametrize(
    ("size", "n_parameters"),
    # as the model cards of Qwen2.5 count them
    [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("7b", 7_615_616_512)],
)
def test_shapes_are_those_of_qwen(size, n_parameters):
    assert SIZES[size].n_bytes == 2 * n_parameters


def test_a_trio_loads_in_transformers_without_a_missing_tensor(trio):
    from transformers import AutoModelForCausalLM

    for role in ("base", "vlm", "agent"):
        assert len(list((trio / role).glob("*.safetensors"))) > 1
        _, report = AutoModelForCausalLM.from_pretrained(trio / role, output_loading_info=True)
        assert not any(report.values())


def test_updates_alternate_between_two_sizes(trio):
    def spread(name):
        return (read(trio / "agent", name) - read(trio / "base", name)).std()

    names = [name for name, _ in TINY.shapes()]
    assert spread(names[0]) == pytest.approx(1e-3, rel=0.05)
    # bf16's steps around 0.02 are 1.2e-4, so rounding adds to an update of 1e-4, but not tenfold
    assert 0.5e-4 < spread(names[5]) < 2e-4


def test_equal_seeds_give_equal_files(trio, tmp_path):
    make_trio(tmp_path, TINY)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert made == sorted(path.relative_to(trio) for path in trio.rglob("*.*"))
    assert all((tmp_path / path).read_bytes() == (trio / path).read_bytes() for path in made)


def test_a_complete_trio_is_not_made_again(tmp_path):
    make_trio(tmp_path, TINY)
    shard = next((tmp_path / "vlm").glob("*.safetensors"))
    shard.write_bytes(b"mine")
    make_trio(tmp_path, TINY)
    assert shard.read_bytes() == b"mine"
    make_trio(tmp_path, TINY, seed=1)
    assert shard.read_bytes() != b"mine"


def test_a_sparse_trio_has_full_length_and_little_on_the_disk(tmp_path):
    size = Size(512, 64, 4096, 8, 4, 2, tie_word_embeddings=False, is_sparse=True)
    make_trio(tmp_path, size)
    stat = next((tmp_path / "vlm").glob("*.safetensors")).stat()
    assert stat.st_size > size.n_bytes
    assert stat.st_blocks * 512 < 0.3 * stat.st_size
    assert (read(tmp_path / "vlm", "model.layers.0.mlp.up_proj.weight") != 0).any()
    assert not read(tmp_path / "vlm", "model.layers.1.mlp.up_proj.weight").any()


# --- runs


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "obm"])
def test_our_settings_merge_every_tensor(trio, tmp_path, monkeypatch, obm, method):
    monkeypatch.setenv("OBM_KERNELS", "numpy")  # nothing to compile
    config = tmp_path / "merge.yaml"
    run = Run("tiny", "ours", method, 2)
    config.write_text(yaml.safe_dump(bench_merge.our_config(run, trio, tmp_path)))
    code, _, err = obm("merge", "--config", config, "--output", tmp_path / "merged")
    assert code == 0, err
    for name, _ in TINY.shapes():
        # bf16's steps around 1 are 80 times an update of 1e-4: of a norm, little or nothing changes
        if not name.endswith("norm.weight"):
            changed = read(tmp_path / "merged", name) != read(trio / "base", name)
            # a fifth of each task vector, less what the votes drop; or nearly everything
            assert (changed.mean() > 0.5) == (method == "task_arithmetic"), name
            assert changed.mean() > 0.15, name


def test_the_peer_gets_the_same_weights_and_density(trio):
    config = peer_config("ties", trio, ("vlm", "agent"), bench_merge.recipe("ties"))
    ours = bench_merge.our_config(Run("tiny", "ours", "ties", 2), trio, trio)["merge"]
    for model in config["models"]:
        assert model["parameters"] == {"weight": 1.0, "density": ours["density"]}
    assert set(ours["weights"].values()) == {1.0}


def test_a_process_is_measured_without_its_parent(tmp_path):
    # The parent of this test has torch in memory, some 0.5 GB; the child has 60 MB and 0.3 s.
    code = (
        "import time; block = bytearray(60_000_000); start = time.process_time()\n"
        "while time.process_time() < start + 0.3: pass\n"
        "print('done')"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    found = bench_merge.measure_process(command, tmp_path / "log", {})
    assert found["code"] == 0
    assert (tmp_path / "log").read_text() == "done\n"
    assert 0.06 < found["peak_rss_gb"] < 0.1
    assert 0.06 < found["peak_anon_gb"] <= found["peak_rss_gb"]
    assert 0.3 <= found["cpu_s"] < 0.6
    assert found["wall_s"] >= 0.3


def test_a_command_that_fails_gives_its_code(tmp_path):
    command = [sys.executable, "-I", "-S", "-c", "raise SystemExit(3)"]
    assert bench_merge.measure_process(command, tmp_path / "log", {})["code"] == 3


def test_the_raw_copy_writes_the_vlms_bytes(trio, tmp_path):
    from launch.bench_process import copy

    copy(tmp_path / "out", trio / "vlm", trio / "base", trio / "agent", is_synced=True)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (trio / "vlm").glob("*.safetensors")}


def test_tools_take_turns():
    planned = list(plan_rounds("1.5b", peer=True, cold=True, repeats=3, peer_repeats=1))
    rounds = [repeat for repeat, _ in planned]
    assert rounds == sorted(rounds)
    runs = [[run for r, run in planned if r == repeat] for repeat in range(3)]
    assert {run.tool for run in runs[0]} == {"copy", "ours", "mergekit"}
    assert {run.tool for run in runs[1]} == {"copy", "ours"}
    assert set(runs[1]) == set(runs[2]) == {run for run in runs[0] if run.tool != "mergekit"}


def test_no_run_begins_two_repeats():
    planned = list(plan_rounds("1.5b", peer=True, cold=True, repeats=3, peer_repeats=3))
    firsts = dict(reversed(planned))
    assert len(set(firsts.values())) == 3


def test_the_first_copy_is_discarded(tmp_path, fake_measurements, monkeypatch):
    walls = iter(range(100))
    monkeypatch.setattr(
        bench_merge, "measure_process", lambda *_: {**fake_measurements, "wall_s": next(walls)}
    )
    runs, _ = bench_merge.bench_merge(["tiny"], tmp_path, peer=False)
    # six runs showed what numba compiles, the seventh was the copy
    assert runs[0]["wall_s"] == 7
    assert sum(run["run"] == "copy plain" for run in runs) == 3


def test_a_sparse_trio_is_merged_by_ours_alone():
    planned = [run for _, run in plan_rounds("7b", peer=True, cold=True, repeats=3, peer_repeats=1)]
    assert [(run.tool, run.method) for run in planned] == [("ours", "obm"), ("ours", "ties")]


def test_too_little_space_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(LaunchError, match=r"needs 14 GB .* 1 GB are free; pass another --work"):
        # 3 * 3.09 in, 3.09 out, 2 to spare
        bench_merge.check_space(["0.5b", "1.5b"], tmp_path, keep=False)


def test_the_peers_torch_is_installed_before_the_peer(tmp_path):
    commands = []
    make_peer_environment(tmp_path / "venv", lambda command, check: commands.append(command))
    assert [command[-1] for command in commands[1:]] == ["torch==2.13.0", "mergekit==0.1.5"]


# --- targets


def measured(run, wall_s, cpu_s, peak_rss_gb=0.2, size="0.5b", repeat=0):
    return {
        "size": size, "run": run.name, "tool": run.tool, "method": run.method, "repeat": repeat,
        "threads": run.threads, "cache": run.cache, "wall_s": wall_s, "cpu_s": cpu_s,
        "peak_rss_gb": peak_rss_gb, "peak_anon_gb": 0.1, "load": 1.0,
    }  # fmt: skip


RUNS = [
    *(
        measured(Run("0.5b", "ours", "ties", 2), wall, 4.0, peak, repeat=repeat)
        for repeat, (wall, peak) in enumerate([(5.0, 0.2), (3.0, 0.6), (4.0, 0.2)])
    ),
    measured(Run("0.5b", "ours", "ties", 2, "cold"), 9.0, 4.0),
    measured(Run("0.5b", "copy", "plain"), 6.0, 0.5),
    measured(Run("0.5b", "copy", "plain"), 4.0, 0.5, repeat=1),
    measured(Run("0.5b", "copy", "fsync"), 3.0, 0.5),
    measured(Run("0.5b", "copy", "fsync"), 2.0, 0.5, repeat=1),
    measured(Run("0.5b", "copy", "plain", cache="cold"), 5.0, 0.5),
    measured(Run("0.5b", "mergekit", "ties", 0), 100.0, 60.0, 5.0),
]


def test_targets_are_judged_by_medians_the_fastest_copy_and_the_most_memory():
    found = {target["name"]: (target["value"], target["met"]) for target in judge(RUNS)}
    assert found == {
        "0.5b: ties, times less CPU than mergekit's ties (at least)": (15.0, False),  # 60 / 4
        "0.5b: ties, times less wall than mergekit's ties (at least)": (25.0, True),  # 100 / 4
        "0.5b: ties, wall over fastest warm raw copy (at most)": (2.0, True),  # 4 / 2
        "0.5b: ties, wall over fastest cold raw copy (at most)": (1.8, False),  # 9 / 5
        "0.5b: peak memory of all our runs, GB (at most)": (0.6, False),
    }


def test_without_a_peer_there_are_no_targets_against_it():
    names = [target["name"] for target in judge([run for run in RUNS if run["tool"] != "mergekit"])]
    assert not any("mergekit" in name for name in names)
    assert len(names) == 3


def test_the_table_has_one_line_a_run_with_its_ratios():
    lines = render_table(medians(RUNS)).splitlines()
    assert len(lines) == 2 + 6
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:6] == ["0.5b", "ours ties 2 threads", "3", "4.00", "4.00", "0.200"]
    # wall 4 s; 4 / 2 of the fastest copy; 100 / 4 and 60 / 4 of the peer
    assert cells[7:10] == ["2.0", "25.0", "15.0"]


# --- the command


@pytest.fixture
def fake_measurements(monkeypatch):
    """Every command takes a second and 0.6 GB; the tiny files are really made."""
    figures = {"code": 0, "wall_s": 1.0, "cpu_s": 1.0, "peak_rss_gb": 0.6, "peak_anon_gb": 0.1}
    monkeypatch.setattr(bench_merge, "measure_process", lambda *_: dict(figures))
    return figures


def test_bench_merge_writes_a_missed_target_as_missed(obm, tmp_path, fake_measurements):
    output, work = tmp_path / "results", tmp_path / "work"
    code, out, _ = obm(
        "bench", "merge", "--sizes", "tiny", "--peer", "none", "--output", output, "--work", work
    )
    assert code == 1
    record = json.loads((output / "bench-merge.json").read_text())
    assert {"command", "commit", "hardware", "targets", "runs", "compiled"} <= record.keys()
    missed = [target["name"] for target in record["targets"] if not target["met"]]
    assert "tiny: peak memory of all our runs, GB (at most)" in missed
    page = (output / "bench-merge.md").read_text()
    assert "peak memory of all our runs, GB (at most): 0.6, target 0.5 (missed)" in page
    assert "MISSED" in out
    assert not any(work.iterdir())


def test_a_missed_target_can_be_allowed(obm, tmp_path, fake_measurements):
    arguments = ["--sizes", "tiny", "--peer", "none", "--work", tmp_path / "work"]
    code, _, _ = obm("bench", "merge", *arguments, "--allow-missed", "--output", tmp_path)
    assert code == 0
    assert "(missed)" in (tmp_path / "bench-merge.md").read_text()


def test_kept_files_stay(obm, tmp_path, fake_measurements):
    arguments = ["--sizes", "tiny", "--peer", "none", "--output", tmp_path / "results", "--keep"]
    obm("bench", "merge", *arguments, "--work", tmp_path / "work")
    assert (tmp_path / "work" / "bench-merge" / "tiny" / "vlm" / "config.json").exists()


def test_a_failed_command_names_its_log(obm, tmp_path, fake_measurements):
    fake_measurements["code"] = 1
    arguments = ["--sizes", "tiny", "--peer", "none", "--output", tmp_path / "results"]
    code, _, err = obm("bench", "merge", *arguments, "--work", tmp_path / "work")
    assert code == 1
    assert "tiny-ours-ties-2-threads.log says why" in err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["merg"],
            "there is no bench 'merg'; choose of cli, merge, calibration, rewards, serve, rollout",
        ),
        (["merge", "--sizes", "3b"], "'3b' is unknown; choose of tiny, 0.5b, 1.5b, 7b"),
        (["merge", "--repeats", "0"], "have to be 1 or more"),
    ],
)
def test_a_mistake_is_one_line(obm, arguments, message):
    code, _, err = obm("bench", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
