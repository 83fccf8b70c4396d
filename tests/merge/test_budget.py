"""Densities that a layer or the whole model shares, against a plain reference over all tensors."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from merge.budget import _bounded
from merge.shards import SafetensorsFile
from merge.stats import open_stats
from tests.merge.folders import run, write_text_checkpoint

NORM = "model.norm.weight"


def write_trio(folder: Path, seed: int, dtype: str):
    """Base and VLM are equal; the agent's task vector is of few values, so that most scores tie."""
    generator = np.random.default_rng(seed)
    base, delta = {}, {}
    for layer in (1, 0):  # the order in the files is that of ties
        for part, shape in (("mlp.up_proj", (6, 4)), ("self_attn.q_proj", (5, 4)),
                            ("mlp.down_proj", (4, 6))):  # fmt: skip
            name = f"model.layers.{layer}.{part}.weight"
            base[name] = generator.integers(-4, 5, shape) * 0.25
            delta[name] = generator.integers(-3, 4, shape) * 0.25 * (1 + layer)
    base[NORM], delta[NORM] = np.ones(4), np.full(4, 8.0)
    agent = {name: base[name] + delta[name] for name in base}
    paths = {"base": write_text_checkpoint(folder / "base", base, dtype)}
    paths["vlm"] = write_text_checkpoint(folder / "vlm", base, dtype)
    paths["agent"] = write_text_checkpoint(folder / "agent", agent, dtype)
    return type("TextTrio", (), {"paths": paths}), base, delta


def keep_first(delta: dict[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    """Keeps the largest magnitudes over all tensors; of equal ones those that come first."""
    flat = np.concatenate([values.reshape(-1) for values in delta.values()])
    n_keep = math.floor(density * flat.size + 0.5)
    order = np.argsort(-np.abs(flat), kind="stable")[:n_keep]
    kept = np.zeros(flat.size, bool)
    kept[order] = flat[order] != 0
    ends = np.cumsum([values.size for values in delta.values()])[:-1]
    parts = np.split(kept, ends)
    return {
        name: part.reshape(values.shape)
        for (name, values), part in zip(delta.items(), parts, strict=True)
    }


def linears_of(delta: dict[str, np.ndarray], layer: int | None = None) -> dict[str, np.ndarray]:
    return {
        name: values
        for name, values in delta.items()
        if "proj" in name and (layer is None or f"layers.{layer}." in name)
    }


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch):
    """With every tensor in memory, and row by row."""
    if request.param == "pieces":
        monkeypatch.setattr("merge.writer.RESIDENT_BYTES", 0)
        monkeypatch.setattr("merge.writer.PIECE_BYTES", 1)


@pytest.mark.parametrize("budget", ["tensor", "layer", "global"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.37, 0.7, 1.0])
@pytest.mark.parametrize(("seed", "dtype"), [(0, "F32"), (1, "BF16")])
@pytest.mark.usefixtures("pieces")
def test_what_is_kept_equals_a_plain_reference(tmp_path, budget, density, seed, dtype):
    trio, base, delta = write_trio(tmp_path, seed, dtype)
    groups = {
        "tensor": [{name: values} for name, values in linears_of(delta).items()],
        "layer": [linears_of(delta, layer) for layer in (0, 1)],
        "global": [linears_of(delta)],
    }[budget]
    expected = {name: kept for group in groups for name, kept in keep_first(group, density).items()}
    run(trio, tmp_path / "out", method="ties", budget=budget, density=density, threads=3)
    merged = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    for name, kept in expected.items():
        np.testing.assert_array_equal(merged.read(name), base[name] + kept * delta[name], name)
    np.testing.assert_array_equal(merged.read(NORM), base[NORM] + delta[NORM])


def test_a_global_density_is_exact_over_all_tensors_and_for_each_task(distinct_trio, tmp_path):
    record = run(distinct_trio, tmp_path / "out", method="ties", budget="global", density=0.3)
    linear = record["groups"]["linear"]
    n_keep = math.floor(0.3 * linear["entries"] + 0.5)
    assert linear["density"] == dict.fromkeys(("vlm", "agent"), n_keep / linear["entries"])
    densities = {entry["density"]["agent"] for entry in record["tensors"].values()
                 if entry["group"] == "linear"}  # fmt: skip
    assert len(densities) > 5, "tensors differ in what they keep"


def test_the_passes_of_a_shared_budget_keep_every_worker_busy():
    together = threading.Barrier(12)

    def work(number):
        together.wait(timeout=10)
        return number

    with ThreadPoolExecutor(12) as executor:
        assert list(_bounded(executor, work, range(36), 24)) == list(range(36))


@pytest.fixture
def distinct_trio(tmp_path):
    """Text models whose task vectors have no two equal entries."""
    generator = np.random.default_rng(3)
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (16, 8) for i in range(6)}
    base = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    paths = {}
    for role, noise in (("base", 0.0), ("vlm", 0.1), ("agent", 0.2)):
        # layers differ in how much they changed
        tensors = {
            name: value + generator.normal(size=value.shape) * noise * (1 + index)
            for index, (name, value) in enumerate(base.items())
        }
        paths[role] = write_text_checkpoint(tmp_path / "parents" / role, tensors)
    return type("TextTrio", (), {"paths": paths})


def test_each_density_of_a_rule_is_a_budget_of_its_own(distinct_trio, tmp_path):
    rules = [{"match": r"layers\.[012]\.", "density": 0.1}]
    record = run(
        distinct_trio, tmp_path / "out", method="ties", budget="global", density=0.5, rules=rules
    )
    kept = {name: round(entry["density"]["vlm"] * 128) for name, entry in record["tensors"].items()}
    first = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    assert sum(kept[name] for name in first) == 38  # 0.1 * 384 = 38.4
    assert sum(kept.values()) - 38 == 192  # 0.5 * 384


@pytest.mark.parametrize("normalization", ["none", "mean", "rank"])
def test_obm_shares_a_budget_by_saliency(pico_trio, stats, tmp_path, normalization):
    settings = {"density": 0.2, "stats": stats, "normalization": normalization}
    record = run(pico_trio, tmp_path / "out", budget="global", **settings)
    linear = record["groups"]["linear"]
    n_keep = math.floor(0.2 * linear["entries"] + 0.5)
    assert linear["density"]["vlm"] == n_keep / linear["entries"]
    # by hand: the saliencies h_j * delta^2 of all linears, the 20 % that are largest
    vectors = open_stats(stats["vlm"], "diagonal")
    base, vlm = (
        SafetensorsFile(Path(pico_trio.paths[role]) / "model.safetensors")
        for role in ("base", "vlm")
    )
    names = [name for name, entry in record["tensors"].items() if entry["group"] == "linear"]
    saliencies = {}
    for name in names:
        delta = vlm.read(name) - base.read(name)
        saliencies[name] = vectors.vector(name) * (delta * delta)
    threshold = np.sort(np.concatenate([s.reshape(-1) for s in saliencies.values()]))[-n_keep]
    for name in names:
        share = float(np.mean(saliencies[name] >= threshold))
        assert record["tensors"][name]["density"]["vlm"] == pytest.approx(share, abs=1e-12)


@pytest.fixture
def pico_trio(make_trio):
    return make_trio()


def test_the_plan_says_how_many_budgets_there_are(pico_trio, stats, tmp_path):
    tables = {
        budget: run(pico_trio, tmp_path / "out", stats=stats, budget=budget, dry_run=True)["table"]
        for budget in ("tensor", "layer", "global")
    }
    assert "budget" not in tables["tensor"]
    assert "density: 2 budgets over 14 tensors" in tables["layer"]
    assert "density: 1 budget over 14 tensors" in tables["global"]
