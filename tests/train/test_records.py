"""What a run writes: JSON lines that survive a crash, and the W&B run that is found again."""

import json
from pathlib import Path

import pytest
from PIL import Image

from configs.schema import Config, load_config
from train.callbacks import Recorder, _spread
from train.trajectories import (
    SCHEMA_VERSION,
    Trajectory,
    Turn,
    append_jsonl,
    image_hash,
    loss_mask,
    truncate_jsonl,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "output: x\nseed: 3\nmodels: {init: atlas://vlm}\n"
        "tracking: {wandb: offline, group: g, log_trajectories: 2}\n"
    )
    return load_config(path)


def make_trajectory() -> Trajectory:
    picture = Image.new("RGB", (4, 4), "red")
    turns = [
        Turn(
            "a",
            [1, 2],
            [-0.5, -0.25],
            {"type": "search", "query": "q"},
            [2.0, 1.0],
            "obs",
            [7, 8, 9],
            [picture],
        ),
        Turn("b", [3], [-1.0], {"type": "answer", "text": "Paris"}, [0.5]),
    ]
    return Trajectory("q1", "two", True, "What?", [4, 5], [picture], turns, "answer", "Paris")


def test_a_trajectory_lines_up_tokens_mask_and_logprobs():
    trajectory = make_trajectory()
    assert trajectory.completion_ids == [1, 2, 7, 8, 9, 3]
    assert trajectory.completion_mask == [1, 1, 0, 0, 0, 1]
    assert trajectory.completion_logprobs == [-0.5, -0.25, 0.0, 0.0, 0.0, -1.0]
    assert trajectory.completion_entropies == [2.0, 1.0, 0.0, 0.0, 0.0, 0.5]
    assert trajectory.n_policy_tokens == 3
    assert trajectory.text == "aobsb"


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ("iii", 0),
        ("oiiii", 1),
        ("iioiii", 3),
        ("iimii", None),  # a bad call of the policy is no failure of the service
        ("ioioioi", None),
        ("", None),
    ],
)
def test_a_fatal_turn_is_the_first_of_three_failures_in_a_row(faults, expected):
    names = {"i": "infrastructure", "m": "model", "o": None}
    trajectory = make_trajectory()
    trajectory.turns = [
        Turn("x", [1, 2], [0.0, 0.0], {"type": "search"}, observation_ids=[3], fault=names[fault])
        for fault in faults
    ]
    assert trajectory.fatal_turn == expected
    n_sound = len(faults) if expected is None else expected
    assert trajectory.mask_before_fatal == [1, 1, 0] * n_sound + [0] * 3 * (len(faults) - n_sound)


def test_an_episode_that_was_cut_or_lost_its_service_carries_less_loss():
    trajectory = make_trajectory()
    trajectory.turns = [
        Turn("x", [1, 2], [0.0, 0.0], {"type": "search"}, observation_ids=[3], fault=fault)
        for fault in (None, *["infrastructure"] * 3)
    ]
    assert loss_mask(trajectory, False, True) == [1, 1, 0] * 4
    assert loss_mask(trajectory, True, True) == [1, 1, 0] + [0] * 9
    trajectory.stop_reason = "length"
    assert loss_mask(trajectory, False, True) == [0] * 12
    assert loss_mask(trajectory, False, False) == [1, 1, 0] * 4


def test_a_line_holds_hashes_of_pictures_and_no_pixels():
    row = make_trajectory().to_dict(step=5, arm="vlm", seed=2)
    text = json.dumps(row)
    assert row["schema_version"] == SCHEMA_VERSION
    assert row["images"] == [image_hash(Image.new("RGB", (4, 4), "red"))]
    assert row["turns"][0]["logprob"] == -0.75
    assert len(text) < 1500


def test_pictures_that_differ_in_one_pixel_or_in_shape_have_other_hashes():
    red = Image.new("RGB", (4, 4), "red")
    touched = red.copy()
    touched.putpixel((0, 0), (254, 0, 0))
    hashes = {image_hash(image) for image in (red, touched, Image.new("RGB", (2, 8), "red"))}
    assert len(hashes) == 3


def test_lines_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": step} for step in (0, 1, 2, 2, 3)])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    kept = truncate_jsonl(path, last_step=2)
    assert [row["step"] for row in kept] == [0, 1, 2, 2]
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept


def test_a_line_that_is_cut_within_a_character_is_dropped(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    whole = '{"step": 1,  "answer": "Zürich"}\n'.encode()
    path.write_bytes(whole + '{"step": 2, "answer": "Zü'.encode()[:-1])
    assert truncate_jsonl(path, last_step=2) == [{"step": 1, "answer": "Zürich"}]
    assert path.read_bytes() == whole  # the bytes that were there


def test_only_the_lines_that_are_wanted_are_kept_in_memory(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    append_jsonl(path, [{"step": step, "followed": step == 1} for step in (0, 1, 2)])
    found = truncate_jsonl(path, 1, lambda row: row["followed"])
    assert found == [{"step": 1, "followed": True}]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]


def test_a_last_line_without_its_end_gets_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}')
    truncate_jsonl(path, 1)
    append_jsonl(path, [{"step": 2}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_missing_file_has_no_lines(tmp_path):
    assert truncate_jsonl(tmp_path / "none.jsonl", 3) == []


def test_a_mean_over_nothing_is_null_in_the_file(tmp_path, config):
    config.tracking.wandb = "disabled"
    recorder = Recorder(tmp_path, config, is_main=True)
    recorder.metrics(1, "train", 10, {"reward": float("nan"), "loss": 0.5})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["reward"] is None
    assert line["loss"] == 0.5
    assert line["tokens"] == 10


def test_device_seconds_leave_evaluations_out_and_go_on_after_a_stop(tmp_path, config, monkeypatch):
    config.tracking.wandb = "disabled"
    monkeypatch.setenv("WORLD_SIZE", "2")
    now = [100.0]
    monkeypatch.setattr("train.callbacks.time.process_time", lambda: now[0])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recorder = Recorder(tmp_path, config, is_main=True)
    now[0] += 3.0
    with recorder.not_training():
        now[0] += 50.0
    recorder.metrics(1, "train", 10, {"loss": 0.5})
    assert recorder.device_s == 6.0  # two processes of three seconds each
    now[0] = 900.0
    resumed = Recorder(tmp_path, config, is_main=True, resume_step=1)
    now[0] += 1.0
    assert resumed.device_s == 8.0


def test_other_processes_write_nothing(tmp_path, config):
    recorder = Recorder(tmp_path, config, is_main=False)
    recorder.metrics(1, "train", 10, {"loss": 0.5})
    recorder.trajectories(1, "eval", [make_trajectory()])
    assert list(tmp_path.glob("*.jsonl")) == []


def test_a_few_episodes_come_from_all_over_the_batch():
    assert _spread(range(100), 4) == [0, 25, 50, 75]
    assert _spread([1, 2], 4) == [1, 2]
    assert _spread([], 4) == []


@pytest.mark.timeout(120)
def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, config):
    """Offline: a second directory with the same id, as the first run was called."""
    for resume_step in (None, 1):
        recorder = Recorder(tmp_path, config, is_main=True, resume_step=resume_step)
        recorder.metrics(1, "eval", 0, {"accuracy": 0.5})
        recorder.trajectories(1, "eval", [make_trajectory()])
        assert recorder._wandb.name == "vlm-s3"
        assert recorder._wandb.group == "g"
        recorder.close()
    run_id = (tmp_path / "wandb_id").read_text().strip()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders
    # W&B numbers directories of one second: ...-ID, ...-ID-1
    assert all(f"-{run_id}" in folder.name for folder in folders)
