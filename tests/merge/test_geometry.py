"""The figures of updates by hand, planted, and from files a block at a time."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.diagnosis import diagnose
from merge.errors import MergeError
from merge.geometry import (
    advise,
    average_figures,
    model_figures,
    no_magnitudes,
    no_sums,
    pair_figures,
    sum_entries,
)
from tests.merge.folders import change_tensors, weights_of

NAMES = ("vlm", "agent")


def sums_of(base, *deltas, threshold=0.5, effective=None):
    base = np.array(base, np.float32)
    tuned = [base + np.array(delta, np.float32) for delta in deltas]
    return sum_entries(base, tuned, threshold, effective or [0.5] * len(deltas))


def test_figures_of_updates_by_hand():
    # supports: vlm {0, 1, 2}, agent {1, 2, 3}; they meet in 1 and 2 and disagree in 2
    sums = sums_of([8.0] * 5, [3, 1, 2, 0, 0.25], [0, 2, -1, 2, 0])
    vlm, agent = model_figures(sums, 0), model_figures(sums, 1)
    assert (vlm["unchanged"], agent["unchanged"]) == (0.2, 0.4)
    assert (vlm["support"], agent["support"]) == (0.6, 0.6)
    assert vlm["norm"] == pytest.approx(np.sqrt(9 + 1 + 4 + 0.0625))
    pair = pair_figures(sums, 0, 1)
    # dot 1 * 2 - 2 * 1 = 0
    assert pair["cosine"] == 0
    assert pair["norm_ratio"] == pytest.approx(3 / np.sqrt(14.0625))
    assert (pair["overlap"], pair["jaccard"], pair["conflict"]) == (2 / 3, 0.5, 0.5)
    # .36 / (.6 + .6 - .36)
    assert pair["jaccard_chance"] == pytest.approx(0.36 / 0.84)


def test_a_cosine_and_a_single_common_entry_by_hand():
    # norms 5 and sqrt(1.25), dot 3: cosine 3 / (5 sqrt(1.25)); they meet in entry 0, both upwards;
    # entry 2 of the agent is at the threshold .5, and not above
    sums = sums_of([1.0] * 3, [3, 4, 0], [1, 0, 0.5], threshold=0.5, effective=[4.0, 0.5])
    pair = pair_figures(sums, 0, 1)
    assert pair["cosine"] == pytest.approx(3 / (5 * np.sqrt(1.25)))
    assert (pair["overlap"], pair["jaccard"], pair["conflict"]) == (1.0, 0.5, 0.0)
    vlm, agent = model_figures(sums, 0), model_figures(sums, 1)
    assert (vlm["support"], agent["support"]) == pytest.approx((2 / 3, 1 / 3))
    assert (vlm["effective"], vlm["effective_sparsity"]) == pytest.approx((1 / 3, 2 / 3))
    assert agent["effective"] == pytest.approx(2 / 3)
    # (25 + 3) / (2 * 25), (3 + 1.25) / (2 * 1.25)
    assert (vlm["left_by_average"], agent["left_by_average"]) == pytest.approx((0.56, 1.7))
    small = sums_of([0.0], [0.5], [-0.5])  # a square below 1 has a share, too
    assert model_figures(small, 0)["left_by_average"] == 0.0


def test_shares_of_nothing_are_left_out():
    sums = sums_of([1.0] * 2, [0, 0], [1, 0])
    nothing = model_figures(sums, 0)
    assert not {"left_by_average", "principal", "principal_chance"} & nothing.keys()
    assert pair_figures(sums, 0, 1) == {}
    assert average_figures(sums_of([1.0], [0], [0])) == {}
    assert average_figures(sums_of([0.0] * 2, [1, 0], [0, 1])) == {
        "average_norm": pytest.approx(1 / np.sqrt(2))
    }


def test_below_bf16_counts_what_bf16_would_not_store():
    # at 1.0 a step of bf16 is 1/128 upwards; 1/512 rounds back, 1/64 does not, zeros are one
    sums = sums_of([1.0, 1.0, 0.0, 1.0], [1 / 512, 1 / 64, -0.0, 0.0])
    figures = model_figures(sums, 0)
    assert figures["below_bf16"] == 0.75
    assert figures["unchanged"] == 0.5


def test_an_average_leaves_one_share_of_orthogonal_updates_and_all_of_equal_ones():
    orthogonal = sums_of([0.0] * 4, [2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0])
    equal = sums_of([0.0] * 2, [2, 1], [2, 1])
    opposite = sums_of([0.0] * 2, [2, 1], [-2, -1])
    assert model_figures(orthogonal, 1)["left_by_average"] == pytest.approx(1 / 3)
    assert average_figures(orthogonal)["average_norm"] == pytest.approx(1 / np.sqrt(3))
    assert model_figures(equal, 0)["left_by_average"] == pytest.approx(1)
    assert average_figures(equal)["average_norm"] == pytest.approx(1)
    assert model_figures(opposite, 0)["left_by_average"] == pytest.approx(0)
    assert average_figures(opposite)["average_norm"] == pytest.approx(0)


def test_the_effective_support_holds_nine_tenths_of_the_energy():
    # squares 81, 9, 9, 1: the 9 reaches .81, one 3 more .9; both threes are in one bin
    magnitudes = no_magnitudes()
    for part in ([9.0, -3.0], [3.0, 1.0]):
        magnitudes.add(np.array(part, np.float32))
    assert magnitudes.effective() == (3, 3.0)
    assert magnitudes.effective(0.8) == (1, 9.0)
    assert no_magnitudes().effective() == (0, float("inf"))
    # against a sort, within a bin of 1/128
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    magnitudes = no_magnitudes()
    magnitudes.add(values)
    ordered = np.sort(np.square(values.astype(np.float64)))[::-1].cumsum()
    exact = int(np.searchsorted(ordered, 0.9 * ordered[-1])) + 1
    assert exact <= magnitudes.effective()[0] <= 1.02 * exact


def test_sums_of_blocks_are_sums_of_the_whole():
    rng = np.random.default_rng(1)
    base, *tuned = rng.normal(size=(3, 40, 30)).astype(np.float32)
    whole = sum_entries(base, tuned, 0.5, [1.0, 2.0])
    parts = no_sums(2)
    for rows in (slice(0, 7), slice(7, 40)):
        parts = parts + sum_entries(base[rows], [t[rows] for t in tuned], 0.5, [1.0, 2.0])
    for field in ("n", "support", "both", "conflict", "effective", "both_effective", "gram"):
        assert getattr(parts, field) == pytest.approx(getattr(whole, field), rel=1e-12), field


# ---- advice


def planted(n, vlm_share, agent_share, *, agreement=0.0, disjoint=False, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    vlm = rng.normal(size=n) * (rng.random(n) < vlm_share)
    own = rng.random(n) < agent_share
    if disjoint:
        own &= vlm == 0
    noise = rng.normal(size=n)
    agent = scale * np.where(own, agreement * vlm + (1 - agreement) * noise, 0.0)
    base = np.zeros(n)
    return sums_of(base, vlm, agent, threshold=1e-5, effective=[1.0, 1.0])


@pytest.mark.parametrize(
    ("given", "first", "word"),
    [
        ({"vlm_share": 0.1, "agent_share": 0.1, "disjoint": True}, "sar", "sum keeps both whole"),
        ({"vlm_share": 1.0, "agent_share": 0.05}, "sar", "changed 5% of the entries"),
        ({"vlm_share": 1.0, "agent_share": 1.0}, "obm", "in opposite directions"),
        ({"vlm_share": 1.0, "agent_share": 1.0, "agreement": 0.6}, "task_arithmetic", "same way"),
    ],
)
def test_advice_follows_the_geometry_that_was_planted(given, first, word):
    advice, *_ = advise(planted(20_000, **given), NAMES)
    assert advice["method"].split(", ")[0] == first
    assert word in advice["reason"]


def test_advice_names_norms_that_lie_apart_and_models_without_an_update():
    *_, apart = advise(planted(5000, 1.0, 1.0, scale=0.1), NAMES)
    assert apart["method"].startswith("weights.agent up")
    assert "of vlm is 1" in apart["reason"]  # some 10 times
    [same] = advise(sums_of([1.0, 2.0], [1, 0], [0, 0]), NAMES)
    assert (same["about"], same["method"]) == ("agent", "none")


# ---- from files


def test_a_trio_is_measured_from_its_files(make_trio, monkeypatch):
    trio = make_trio(tied=True)
    models = {"vlm": trio.paths["vlm"], "agent": trio.paths["agent"]}
    record = diagnose(trio.paths["base"], models, rank=8)
    base = trio.models["base"].state_dict()
    deltas = {
        "agent": {k: v - base[k] for k, v in trio.models["agent"].state_dict().items()},
        "vlm": {
            k: trio.models["vlm"].state_dict()[k.replace("model.", "model.language_model.", 1)]
            - base[k] for k in base if k != "lm_head.weight"
        },
    }  # fmt: skip
    by_name = {row["tensor"]: row for row in record["tensors"]}
    assert set(by_name) == set(deltas["vlm"])
    name = "model.layers.1.mlp.up_proj.weight"
    row, pair = by_name[name], [deltas[role][name].double().flatten() for role in models]
    assert row["models"]["agent"]["norm"] == pytest.approx(float(pair[1].norm()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(*pair, dim=0)
    assert row["pairs"]["vlm/agent"]["cosine"] == pytest.approx(float(cosine), abs=1e-9)
    values = torch.linalg.svdvals(deltas["agent"][name].double())
    assert row["spectra"]["agent"]["values"] == pytest.approx(values[:8].tolist(), rel=1e-5)
    stable = float(values.square().sum() / values[0] ** 2)
    assert row["spectra"]["agent"]["stable_rank"] == pytest.approx(stable, rel=1e-5)
    left, _, right = torch.linalg.svd(base[name].double())
    inside = left[:, :8].T @ deltas["vlm"][name].double() @ right[:8].T
    share = float(inside.square().sum() / pair[0].square().sum())
    assert row["models"]["vlm"]["principal"] == pytest.approx(share, rel=1e-4)
    assert row["models"]["vlm"]["principal_chance"] == pytest.approx(64 / (96 * 64))
    # totals are over all tensors, layers over theirs
    assert record["total"]["entries"] == sum(d.numel() for d in deltas["vlm"].values())
    assert set(record["layers"]) == {"0", "1", "outside the layers"}
    assert record["modules"]["mlp.up_proj"]["entries"] == 2 * 96 * 64
    # small blocks, and no exact decomposition of a small matrix: the same but for rounding
    monkeypatch.setattr("merge.diagnosis.BLOCK_ENTRIES", 500)
    again = diagnose(trio.paths["base"], models, rank=8)
    for one, other in ((record, again), (record["layers"]["0"], again["layers"]["0"])):
        figures = one.get("total", one), other.get("total", other)
        for role in models:
            assert figures[1]["models"][role] == pytest.approx(figures[0]["models"][role], rel=1e-6)
        assert figures[1]["pairs"]["vlm/agent"] == pytest.approx(
            figures[0]["pairs"]["vlm/agent"], rel=1e-6
        )


def test_sparse_disjoint_updates_are_seen_and_advised(make_trio, tmp_path):
    """RLVR's geometry, planted: 5 % of the entries each, no two the same."""
    from merge.checkpoint import Checkpoint

    base = make_trio(tied=True).paths["base"]
    rng = torch.Generator().manual_seed(0)
    weights = load_file(f"{base}/model.safetensors")
    folders = {}
    for index, role in enumerate(("math", "code")):
        changed = {}
        for name, weight in weights.items():
            place = torch.rand(weight.shape, generator=torch.Generator().manual_seed(7))
            own = (place * 20).long() == index
            step = torch.randn(weight.shape, generator=rng).sign() * 0.01
            changed[name] = torch.where(own, weight + step, weight)
        folders[role] = tmp_path / role
        folders[role].mkdir()
        save_file(changed, folders[role] / "model.safetensors", {"format": "pt"})
        config = (Checkpoint(base, "base").folder / "config.json").read_text()
        (folders[role] / "config.json").write_text(config)
    record = diagnose(base, folders)
    for role in folders:
        assert record["total"]["models"][role]["support"] == pytest.approx(0.05, abs=0.005)
        assert record["total"]["models"][role]["left_by_average"] == pytest.approx(0.5, abs=1e-6)
    assert record["total"]["pairs"]["math/code"]["jaccard"] == 0
    assert record["advice"][0]["method"].startswith("sar")


def add_tensor(source, folder, name):
    """A copy of a checkpoint with one tensor more."""
    shutil.copytree(source, folder)
    embeddings = "model.embed_tokens.weight"
    value = weights_of(folder)[embeddings]
    change_tensors(folder, **{embeddings: value, name: value.clone()})


def test_an_output_head_that_only_a_model_has_is_named(make_trio, tmp_path, caplog):
    trio, untied = make_trio(tied=True), tmp_path / "untied"
    add_tensor(trio.paths["agent"], untied, "lm_head.weight")
    diagnose(trio.paths["base"], {"agent": str(untied)}, dry_run=True)
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("lm_head.weight: not measured, for agent has one and base ties it")


def test_what_cannot_be_compared_is_one_clear_error(make_trio, tmp_path, builders):
    trio = make_trio()
    with pytest.raises(MergeError, match="no model; set models"):
        diagnose(trio.paths["base"], {})
    with pytest.raises(MergeError, match="rank of 0"):
        diagnose(trio.paths["base"], {"agent": trio.paths["agent"]}, rank=0)
    other = tmp_path / "wide"
    builders["text_model"](intermediate_size=100).save_pretrained(other)
    with pytest.raises(MergeError, match=r"wide has shape \[64, 100\], the base \[64, 96\]"):
        diagnose(trio.paths["base"], {"agent": str(other)})
    deeper = tmp_path / "deeper"
    add_tensor(trio.paths["agent"], deeper, "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(MergeError, match=r"layers\.2\..*: agent .* has it, base .* does not"):
        diagnose(trio.paths["base"], {"vlm": trio.paths["vlm"], "agent": str(deeper)})
    broken = tmp_path / "broken"
    model = builders["agent"](trio.models["base"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(MergeError, match=r"agent .*up_proj\.weight holds NaN"):
        diagnose(trio.paths["base"], {"agent": str(broken)})
