"""What calibrations and merges cost lies beside what they made."""

import json
import time

import pytest

from compare.cost import preparation_device_s
from compare.runs import Run
from launch.preparation_cost import (
    join_shard_costs,
    keep_calibration_cost,
    keep_merge_cost,
    measured,
    measured_without_compiling,
    shard_cost_name,
)
from train.start_cost import read_cost

ONE = {"time_s": 2.0, "processor_s": 3.0}
TWO = {"time_s": 4.0, "processor_s": 7.0}


def test_waiting_is_wall_time_and_no_computing():
    with measured() as cost:
        time.sleep(0.2)
    assert cost["time_s"] >= 0.2
    assert cost["processor_s"] < 0.15


def test_compiling_a_kernel_is_noted_apart():
    from numba import njit

    @njit
    def inner(x):
        return x + 1.0

    @njit
    def outer(x):
        return inner(x) * 2.0

    began = time.perf_counter()
    with measured_without_compiling() as cost:
        assert outer(1.0) == 4.0
        time.sleep(0.2)
    took = time.perf_counter() - began
    # the sleep stays; compiling, the inner kernel within the outer one, is the rest and counts once
    assert 0.2 <= cost["time_s"] < 0.5 * took + 0.2
    assert cost["compile_s"] > 0
    assert cost["time_s"] + cost["compile_s"] <= took + 0.01
    assert cost["compile_processor_s"] > 0
    with measured_without_compiling() as again:
        outer(1.0)
    assert again.keys() == {"time_s", "processor_s"}


def test_measurements_of_one_parent_stand_beside_each_other(tmp_path):
    path = tmp_path / "cost.json"
    keep_calibration_cost(path, "inputs", ONE)
    keep_calibration_cost(path, "fisher", TWO)
    keep_calibration_cost(path, "inputs", TWO)  # measured again
    assert read_cost(path) == {"inputs": TWO, "fisher": TWO}


def test_shards_add_up(tmp_path):
    assert shard_cost_name((0, 1)) == "cost.json"
    for rank, cost in enumerate((ONE, TWO)):
        keep_calibration_cost(tmp_path / shard_cost_name((rank, 2)), "inputs", cost)
    join_shard_costs(tmp_path, {"time_s": 0.5, "processor_s": 0.25})
    # 2 + 4 + .5 and 3 + 7 + .25
    assert read_cost(tmp_path / "cost.json") == {"inputs": {"time_s": 6.5, "processor_s": 10.25}}


def test_a_shard_without_a_record_leaves_the_sum_out(tmp_path):
    keep_calibration_cost(tmp_path / shard_cost_name((1, 2)), "inputs", ONE)
    join_shard_costs(tmp_path, ONE)
    assert not (tmp_path / "cost.json").exists()


def statistics(tmp_path, task, kind, cost):
    folder = tmp_path / "calibration" / task
    folder.mkdir(parents=True, exist_ok=True)
    if cost:
        keep_calibration_cost(
            folder / "cost.json", "fisher" if kind == "fisher" else "inputs", cost
        )
    return {f"{task}/{kind}": {"source": str(folder / f"{kind}.safetensors")}}


def test_a_merge_costs_itself_and_the_calibrations_it_read(tmp_path):
    stats = {
        **statistics(tmp_path, "vlm", "diagonal", ONE),
        **statistics(tmp_path, "vlm", "inverse", ONE),  # came with the other, counted once
        **statistics(tmp_path, "vlm", "fisher", TWO),
        **statistics(tmp_path, "agent", "diagonal", None),
    }
    keep_merge_cost(tmp_path, {"stats": stats}, TWO)
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found == {
        "merge": TWO,
        "calibrate-vlm": {"time_s": 6.0, "processor_s": 10.0},
        "calibrate-agent": None,
    }
    run = Run("x", "obm", 0, {}, [], start={"merged": True, "stats": [], "cost": found})
    assert preparation_device_s(run) == (None, "calibrate-agent: no cost recorded")


def test_a_broken_cost_file_is_no_reason_to_stop(tmp_path):
    (tmp_path / "cost.json").write_text("{")
    assert read_cost(tmp_path / "cost.json") == {}
    keep_calibration_cost(tmp_path / "cost.json", "inputs", ONE)
    assert read_cost(tmp_path / "cost.json") == {"inputs": ONE}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from train.tiny import make_tiny_checkpoints

    return make_tiny_checkpoints(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.mark.timeout(600)
def test_a_real_calibration_and_merge_leave_their_cost_for_the_training(tiny, tmp_path):
    from configs.schema import load_config
    from launch.commands.calibrate import calibrate_parent
    from launch.commands.merge import merge_checkpoints
    from train.run_folder import prepare_folder

    path = tmp_path / "settings.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\n"
        f"models: {{base: {tiny['base']}, vlm: {tiny['vlm']}, agent: {tiny['agent']}}}\n"
        f"calibration: {{samples: 4, batch_size: 2, output: {tmp_path / 'stats'}}}\n"
        "merge: {threads: 1}\ntracking: {wandb: disabled}\n"
    )
    config = load_config(path)
    for role in ("vlm", "agent"):
        calibrate_parent(config, role)
    records = []
    for name in ("one", "two"):
        merge_checkpoints(config, tmp_path / name)
        records.append((tmp_path / name / "merge.json").read_bytes())
    assert records[0] == records[1]  # the cost differs, the record does not
    cost = json.loads((tmp_path / "one" / "cost.json").read_text())
    assert set(cost) == {"merge", "calibrate-vlm", "calibrate-agent"}
    assert all(entry["processor_s"] > 0 and entry["time_s"] > 0 for entry in cost.values())
    merge_checkpoints(config, tmp_path / "dry", dry_run=True)
    assert not (tmp_path / "dry").exists()
    prepare_folder(tmp_path / "run", config, str(tmp_path / "one"), False, False)
    assert json.loads((tmp_path / "run" / "start_cost.json").read_text()) == cost
