"""The study over ZeRO's stages: equal work for every arm, differences, the page."""

import pytest

from launch.zero_study import ARMS, Arm, compare, main, make_job, render


def test_every_arm_has_the_same_completions_a_step(tmp_path):
    for arm in ARMS:
        job = make_job(arm, tmp_path / "start", tmp_path)
        [rows] = [a for a in job.arguments if a.startswith("grpo.per_device_train_batch_size=")]
        assert int(rows.partition("=")[2]) * job.n_processes == 64
        assert job.n_processes == (1 if "one process" in arm.name else 2)
    assert {arm.twin for arm in ARMS} <= {None, *(arm.name for arm in ARMS)}


def curve(*rewards):
    return {
        "reward": list(rewards), "loss": [0.5, -0.5], "grad_norm": [1.0, 2.0], "tokens": [10, 20],
        "step_s": [1.0, 3.0], "accuracy": [0.25, 0.5],
    }  # fmt: skip


def test_differences_are_the_largest_of_any_step():
    arms = (Arm("one", 1, "none"), Arm("two", 2, "zero2", (), "one"))
    curves = {"one": curve(0.1, 0.4), "two": curve(0.1, 0.1)}
    curves["two"]["tokens"] = [10, 25]
    found = compare(curves, arms)
    assert set(found) == {"two"}
    assert found["two"] == pytest.approx(
        {"reward": 0.3, "loss": 0.0, "grad_norm": 0.0, "tokens": 5}
    )
    page = render(
        {"hardware": "h", "commit": "c", "arms": [vars(arm) for arm in arms],
         "curves": curves, "differences": found}
    )  # fmt: skip
    assert "| two | 2 | 0.100 → 0.100 | 0.250 → 0.500 | 0.3 | 0 | 0 | 5 | 2.00 |" in page
    assert "| one | 0.100 | 0.400 |" in page


def test_a_folder_that_the_study_did_not_make_is_not_emptied(tmp_path, capsys):
    (tmp_path / "precious").touch()
    with pytest.raises(SystemExit):
        main(["--work", str(tmp_path)])
    assert "is not an earlier study's; name a folder that is new" in capsys.readouterr().err
    assert (tmp_path / "precious").exists()
