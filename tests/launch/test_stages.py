"""Stages: made once, made again or refused when their settings change."""

from dataclasses import asdict

import pytest

from configs.sections import Environment, Sft
from launch.errors import LaunchError
from launch.stages import Stages, fingerprint, hash_inputs


def make(target, made):
    def write():
        target.mkdir()
        (target / "file").write_text(str(len(made)))
        made.append(target.name)

    return write


def test_a_stage_is_made_once(tmp_path):
    made, target = [], tmp_path / "a"
    for expected in (True, False):
        stages = Stages(tmp_path, redo=False)
        assert stages.run("a", {"x": 1}, target, make(target, made)) is expected
    assert made == ["a"]


def test_changed_settings_make_it_again(tmp_path):
    made, target = [], tmp_path / "a"
    stages = Stages(tmp_path, redo=True)
    stages.run("a", {"x": 1}, target, make(target, made))
    assert stages.run("a", {"x": 2}, target, make(target, made)) is True
    assert (target / "file").read_text() == "1"


def test_changed_settings_are_refused_by_their_name(tmp_path):
    target = tmp_path / "a"
    stages = Stages(tmp_path, redo=False)
    stages.run("a", {"grpo": {"steps": 1, "rate": 2}}, target, make(target, []))
    with pytest.raises(LaunchError, match=r"grpo\.steps was 1, is 3.*--redo"):
        stages.run("a", {"grpo": {"steps": 3, "rate": 2}}, target, make(target, []))
    assert (target / "file").exists()


def test_a_broken_stage_is_made_again(tmp_path):
    made, target = [], tmp_path / "a"

    def breaks():
        target.mkdir()
        raise RuntimeError("power cut")

    stages = Stages(tmp_path, redo=False)
    with pytest.raises(RuntimeError):
        stages.run("a", {"x": 1}, target, breaks)
    assert stages.run("a", {"x": 1}, target, make(target, made)) is True


def test_a_stage_that_resumes_finds_what_was_left_and_nothing_of_other_settings(tmp_path):
    found, target = [], tmp_path / "a"

    def go_on():
        found.append(target.exists())
        target.mkdir(exist_ok=True)
        if len(found) < 3:
            raise RuntimeError("power cut")

    stages = Stages(tmp_path, redo=True)
    for x in (1, 1):
        with pytest.raises(RuntimeError):
            stages.run("a", {"x": x}, target, go_on, resumes=True)
    stages.run("a", {"x": 2}, target, go_on, resumes=True)
    assert found == [False, True, False]


def test_a_stage_whose_result_was_deleted_is_made_again(tmp_path):
    made, target = [], tmp_path / "a"
    stages = Stages(tmp_path, redo=False)
    stages.run("a", {}, target, make(target, made))
    (target / "file").unlink()
    target.rmdir()
    assert stages.run("a", {}, target, make(target, made)) is True


@pytest.mark.parametrize("redo", [False, True])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, redo):
    target = tmp_path / "a"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(LaunchError, match="was not made here"):
        Stages(tmp_path, redo=redo).run("a", {}, target, make(target, []))
    assert (target / "precious").exists()


def test_a_kill_while_a_stage_is_cleared_leaves_it_ours(tmp_path, monkeypatch):
    made, target = [], tmp_path / "a"
    stages = Stages(tmp_path, redo=True)
    stages.run("a", {"x": 1}, target, make(target, made))
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stages.clear("a", target)
    assert stages.look("a", {"x": 1}, target) == "begun"
    assert stages.run("a", {"x": 1}, target, make(target, made)) is True


def test_a_part_of_the_folder_may_lie_on_another_disk(tmp_path):
    made, study = [], tmp_path / "study"
    (tmp_path / "disk").mkdir()
    study.mkdir()
    (study / "runs").symlink_to(tmp_path / "disk")
    stages = Stages(study, redo=False)
    target = study / "runs" / "a"
    assert stages.run("a", {}, target, make(target, made)) is True
    assert stages.run("a", {}, target, make(target, made)) is False
    assert (tmp_path / "disk" / "a" / "file").exists()


def test_nothing_outside_of_the_folder_is_removed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    stages = Stages(tmp_path / "study", redo=True)
    stages.start("a", {})
    with pytest.raises(LaunchError, match="lies outside"):
        stages.run("a", {}, outside, make(outside, []))
    assert outside.exists()


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert hash_inputs({"a": 1, "b": 2}) == hash_inputs({"b": 2, "a": 1})
    assert hash_inputs({"a": 1}) != hash_inputs({"a": 2})


def test_a_key_of_the_environment_that_came_later_counts_where_it_is_set(tmp_path):
    now = asdict(Environment())
    before = {key: value for key, value in now.items() if key != "snippet_words"}
    assert hash_inputs({"environment": now}) == hash_inputs({"environment": before})
    longer = {**now, "snippet_words": 100}
    assert hash_inputs({"environment": longer}) != hash_inputs({"environment": before})
    target = tmp_path / "a"
    Stages(tmp_path, redo=False).run("a", {"environment": before}, target, make(target, []))
    assert Stages(tmp_path, redo=False).look("a", {"environment": now}, target) == "done"
    other = {"environment": {**now, "top_k_text": 3}}
    with pytest.raises(LaunchError, match=r"environment\.top_k_text was 2, is 3"):
        Stages(tmp_path, redo=False).is_done("a", other, target)


def test_what_a_cold_start_keeps_in_memory_counts_where_it_is_set():
    now = asdict(Sft())
    later = ("micro_batch_size", "gradient_checkpointing")
    before = hash_inputs({"sft": {key: value for key, value in now.items() if key not in later}})
    assert hash_inputs({"sft": now}) == before
    assert hash_inputs({"sft": {**now, "micro_batch_size": 1}}) != before
    assert hash_inputs({"sft": {**now, "gradient_checkpointing": True}}) != before


def test_a_marker_without_an_input_that_came_later_stays_valid(tmp_path):
    target, lengths = tmp_path / "a", {"episode_lengths": {"max_new_tokens": 8}}
    before = Stages(tmp_path, redo=False)
    before.run("a", {"x": 1}, target, make(target, []))
    now = Stages(tmp_path, redo=False)
    assert now.look("a", {"x": 1, **lengths}, target) == "done"
    assert now.key("a") == before.key("a")  # so what was made from it stays valid, too
    with pytest.raises(LaunchError, match="x was 1, is 2"):
        now.is_done("a", {"x": 2, **lengths}, target)
    # made again, it says so, and what is made from it in the same run sees the whole key
    again = Stages(tmp_path, redo=True)
    again.run("a", {"x": 2, **lengths}, target, make(target, []))
    assert again.key("a") == hash_inputs({"x": 2, **lengths})
    longer = {"x": 2, "episode_lengths": {"max_new_tokens": 9}}
    with pytest.raises(LaunchError, match=r"episode_lengths\.max_new_tokens was 8, is 9"):
        now.is_done("a", longer, target)


def test_a_fingerprint_changes_with_the_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("owner/name") == "owner/name"


def test_looking_touches_nothing(tmp_path):
    target = tmp_path / "a"
    stages = Stages(tmp_path, redo=True)
    assert stages.look("a", {"x": 1}, target) == "missing"
    assert stages.seconds("a") is None
    stages.start("a", {"x": 1})
    assert stages.look("a", {"x": 1}, target) == "begun"
    stages.run("a", {"x": 1}, target, make(target, []))
    assert stages.look("a", {"x": 1}, target) == "done"
    assert stages.key("a") == hash_inputs({"x": 1})
    assert stages.seconds("a") is not None
    assert stages.look("a", {"x": 2}, target) == "changed"
    assert stages.look("b", {"x": 1}, target) == "foreign"
    assert (target / "file").exists()
