"""What a machine takes at a time, by hand-computed numbers."""

import pytest

from configs.schema import load_config, shipped_config
from launch.studies import machine as machine_module
from launch.studies.machine import (
    LAUNCHER_BYTES,
    PROCESS_BYTES,
    Machine,
    duration_words,
    evaluation_bytes,
    gpu_groups,
    share_evaluations,
    share_trainings,
    time_left,
    training_bytes,
)

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("n_cores", "memory_gb", "each_gb", "n_processes", "parallel"),
    [
        (8, 100, 4, 1, 8),  # by cores
        (8, 20, 4, 1, 4),  # 0.9 * 20 / 4 = 4.5
        (8, 100, 4, 3, 2),  # 8 // 3
        (2, 3, 4, 1, 1),  # nothing fits: one tries
        (1, 100, 4, 2, 1),
    ],
)
def test_the_default_is_what_cores_and_memory_take(
    n_cores, memory_gb, each_gb, n_processes, parallel
):
    machine = Machine(n_cores, memory_gb * GB)
    share = share_trainings(machine, each_gb * GB, n_processes=n_processes)
    assert share.parallel == parallel
    assert f"{n_cores} cores, {memory_gb}.0 GB free, {each_gb}.0 each" in share.words


def test_gpus_decide_where_there_are_some():
    machine = Machine(64, 1000 * GB, n_gpus=5)
    assert share_trainings(machine, GB).parallel == 5
    assert share_trainings(machine, GB, n_processes=2).parallel == 2
    # two trainings on one GPU would take each other's memory
    assert share_trainings(machine, GB, n_processes=2, wanted=9).parallel == 2
    assert share_trainings(machine, GB, wanted=3).parallel == 3
    assert gpu_groups(5, 2) == [(0, 1), (2, 3)]
    assert gpu_groups(0, 1) == []


def test_evaluations_on_gpus_are_counted_by_them(monkeypatch):
    config = load_config(shipped_config("demo"))
    monkeypatch.setattr(machine_module, "this_machine", lambda: Machine(64, 1000 * GB, n_gpus=2))
    share = share_evaluations(config)
    assert (share.parallel, share.words) == (2, "1 GPU an evaluation, 2 there")
    assert share_evaluations(config, wanted=9).parallel == 2
    monkeypatch.setattr(machine_module, "this_machine", lambda: Machine(3, 1000 * GB))
    assert share_evaluations(config).parallel == 3


def test_what_was_asked_for_is_taken_with_a_warning_where_it_is_too_much():
    machine = Machine(2, 100 * GB)
    assert share_trainings(machine, GB, wanted=1).words.startswith("as --parallel says")
    share = share_trainings(machine, GB, wanted=7)
    assert share.parallel == 7
    assert "--parallel 7 is more than fits" in share.words


def test_a_training_takes_more_than_its_libraries_and_an_evaluation_less_than_a_training():
    config = load_config(shipped_config("demo"))
    floor = LAUNCHER_BYTES + PROCESS_BYTES
    assert floor < training_bytes(config) < 8 * GB
    assert PROCESS_BYTES < evaluation_bytes(config) < training_bytes(config)
    # a merge that is not there yet has the VLM's shape
    merged = load_config(shipped_config("demo"), ["models.init=runs/not/there"])
    assert training_bytes(merged) == training_bytes(config)
    unknown = ["models.init=owner/unknown", "models.vlm=owner/unknown"]
    assert training_bytes(load_config(shipped_config("demo"), unknown)) == floor


def test_time_left_is_the_mean_over_what_is_left():
    # seven more at two at a time, 20 s each in the mean: 3.5 rounds
    assert time_left([10.0, 30.0], 7, 2) == pytest.approx(70.0)
    # the last one has nobody beside it
    assert time_left([20.0], 1, 4) == pytest.approx(20.0)
    assert time_left([20.0], 0, 2) == 0
    assert time_left([], 7, 2) is None


def test_durations_are_for_people():
    assert [duration_words(s) for s in (50.4, 240, 9000, None)] == [
        "50 s", "4 min", "2.5 h", "unknown"
    ]  # fmt: skip
