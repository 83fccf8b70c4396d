"""docs/scale.md: its tables are what the model says, and the stages around training by hand."""

import json
import shutil
from dataclasses import replace
from statistics import median

import pytest

from compare.figures import Results
from configs.schema import load_config, shipped_config
from launch.results_check import check_scale
from launch.scale import (
    Measured,
    calibration_bytes,
    calibration_seconds,
    fitted,
    handover_seconds,
    measured,
    merge_seconds,
    parents_bytes,
    query_seconds,
    shape_of_model,
    sizes_of,
    step_plan,
)
from launch.scale_page import PAGE, RECORD, outdated, page
from tests.docs.blocks import ROOT
from train.estimate import estimate, find_machine, plan_of
from train.plan import GB, MACHINES

H100 = MACHINES["h100"]


@pytest.fixture(scope="module")
def found():
    return measured(Results(ROOT / "docs/results"))


def test_page_and_record_are_those_of_the_benches():
    assert outdated(ROOT) == {}, "make them again: python -m launch.scale_page"


def test_a_figure_of_the_record_rounds_as_that_of_a_dry_run():
    """46.051 is 46.1; kept as 46.05 it would be 46.0."""
    settings = json.loads((ROOT / RECORD).read_text())["settings"]["7b atlas"]
    machine, n = find_machine(settings["machine"], 1)
    plan = plan_of(load_config(shipped_config("qwen2.5-vl-7b"), []), n)
    peak = estimate(plan, machine).memory.peak / GB
    assert f"{settings['peak_gb']:.1f}" == f"{peak:.1f}" == "46.1"


def test_another_bench_makes_page_and_record_another_way(tmp_path):
    for name in (PAGE, "docs/results"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    bench = tmp_path / "docs/results/bench-calibration.json"
    results = json.loads(bench.read_text())
    for target in results["targets"]:
        target["value"] = 0.25
    bench.write_text(json.dumps(results))
    made = outdated(tmp_path)
    assert set(made) == {PAGE, RECORD}
    assert "| watching a forward pass, bf16 | 25.0% |" in made[PAGE]
    assert json.loads(made[RECORD])["measured"]["watch_share"] == 0.25
    assert [problem.where for problem in check_scale(tmp_path)] == [PAGE, RECORD]
    check_scale(tmp_path, write=True)
    assert check_scale(tmp_path) == []


def test_a_page_without_a_table_is_refused(found):
    with pytest.raises(ValueError, match="scale: measured"):
        page("# Scale\n", found)


def test_the_coefficients_are_those_of_the_benches(found):
    """Read here without the language of the paths."""
    merges, served, calibration = (
        json.loads((ROOT / f"docs/results/bench-{name}.json").read_text())
        for name in ("merge", "serve", "calibration")
    )

    def merged(size, key):
        run = "ours obm 2 threads"
        return [row[key] for row in merges["runs"] if (row["size"], row["run"]) == (size, run)]

    # the median of three runs over a model of 1.54 billion numbers
    assert len(merged("1.5b", "cpu_s")) == 3
    assert found.merge_s == pytest.approx(median(merged("1.5b", "cpu_s")) / 1_543_714_304, rel=1e-3)
    assert [found.merge_gb] == merged("7b", "peak_rss_gb")
    assert [found.merge_7b_s] == merged("7b", "wall_s")
    cpu_ms = {
        row["corpus"]: row["cpu_ms"]
        for row in served["runs"]
        if (row["server"], row["clients"]) == ("ours", 64)
    }
    assert found.query_s == (cpu_ms["atlas"] / 1e3, cpu_ms["synthetic"] / 1e3)
    assert found.passages == (1315, 1_000_000)
    [share] = [
        target["value"]
        for target in calibration["targets"]
        if target["name"] == "calibration overhead, bfloat16"
    ]
    assert found.watch_share == share


def test_a_step_keeps_its_episodes_on_any_number_of_processes():
    for name in ("7B", "72B"):
        for n, plan in sizes_of(name, H100, is_served=True):
            assert plan.rows * plan.accumulation * plan.n_processes == 256
            assert plan.rollouts == 1
            assert plan.n_processes + plan.server_gpus == n
    with pytest.raises(ValueError, match="256 episodes cannot be shared out to 512"):
        step_plan("7B", 512)
    assert step_plan("7B", 8) == replace(step_plan("7B", 4, 0, 128), n_processes=8)


def test_what_does_not_fit_comes_with_its_changes():
    fits, changes = fitted(step_plan("7B", 2), H100)
    assert fits.fits
    assert changes == ["deepspeed=zero3_offload"]
    assert not fitted(step_plan("72B", 4, 4), H100)[0].fits


def test_merging_takes_the_longer_of_computing_and_moving():
    # 1e9 numbers: 10 s of CPU on two threads; 8 GB at 2 GB/s are 4 s
    assert merge_seconds(1e9, 1e-8, 2) == 5.0
    assert merge_seconds(1e9, 1e-8, 16) == 4.0


def test_calibration_reads_once_and_multiplies_twice_a_weight():
    shape = shape_of_model("7B")
    bare = replace(shape, vision=None)
    n_tokens = 96_000
    flops = n_tokens * (2 * shape.n_linear + 4 * 28 * 3584 * 750)
    expected = 2 * bare.n_parameters / 2e9 + 1.1 * flops / (0.4 * 989e12)
    assert calibration_seconds(bare, n_tokens, 0, H100, 0.1) == pytest.approx(expected)
    assert calibration_seconds(shape, n_tokens, 1000, H100, 0.1) > expected
    # embeddings and head 2 x 152064 x 3584, the tower, and a 28th of the decoder; two bytes each
    whole = 2 * (2 * 152064 * 3584 + shape.n_vision + shape.n_language / 28)
    assert calibration_bytes(shape) == whole < 0.3 * 2 * shape.n_parameters


def test_base_and_agent_have_no_vision_tower():
    shape = shape_of_model("7B")
    text = shape.n_parameters - shape.n_vision
    assert parents_bytes(shape) == 2 * (shape.n_parameters + 2 * text)
    assert handover_seconds(shape) == pytest.approx(2 * shape.n_parameters / 3e9)


def test_a_larger_corpus_takes_between_as_long_and_in_proportion():
    found = Measured(0, 0, 0, 0, (1e-4, 1e-3), (1000, 1_000_000), 0, 0, 0)
    assert query_seconds(1000, found) == (1e-4, 1e-4)
    assert query_seconds(500_000, found) == (1e-3, 1e-3)
    assert query_seconds(20_000_000, found) == (1e-3, pytest.approx(2e-2))
