"""Parity with mergekit 0.1.5: the same pico trio, the same settings, real folders on both sides.

mergekit's results are files in golden/, made by make_golden.py; where its environment is there
(`obm bench merge` makes it), they are made once more and compared as well. The two tools differ on
purpose in what follows, and the settings are chosen so that it cannot show:

* how many entries a density keeps: mergekit max(1, int(density * n)), ours floor(density * n +
  1/2). Every tensor here has a multiple of 8 entries, so density * n is whole. (mergekit's SCE
  counts entries that vary at all; here all do, since no entry is unchanged in both donors.)
* which entries stay that tie at the threshold: mergekit arbitrary ones, ours the first. The fp32
  trio has no ties there; the bf16 one has many, which are left out of the comparison.
* mergekit's signs are voted by weighted deltas, ours by deltas. Weights are equal.
* mergekit's DARE and DELLA rescale to the norm before (l1), ours by the probability as in the
  papers. mergekit's rescaling is off; ours is undone before comparing.
* ours gives back a parent's own bits where the result is that parent's value. Differences of the
  trio's values are exact in fp32, so base + (parent - base) is the parent anyway.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.engine import merge
from merge.shards import SafetensorsFile

HERE = Path(__file__).parent
MERGEKIT_PYTHON = HERE.parents[1] / ".cache" / "mergekit-venv" / "bin" / "python"
ROLES = ("base", "vlm", "agent")
NAMES = {"dare_linear": "dare", "ramplus_tl": "ram_plus"}
OPTIONS = {
    "density": "density",
    "select_topk": "density",
    "gamma": "outliers",
    "r": "boost",
    "alpha": "boost_limit",
}
SIGMAS = 4.0


@pytest.fixture(
    scope="module",
    params=["committed", pytest.param("live", marks=pytest.mark.slow)],
)
def golden_folder(request, tmp_path_factory):
    """Folder of mergekit's results: the committed ones, and fresh ones where mergekit is."""
    if request.param == "committed":
        return HERE / "golden"
    if not MERGEKIT_PYTHON.exists():
        pytest.skip("mergekit's environment is not there; `obm bench merge` makes it")
    folder = tmp_path_factory.mktemp("golden")
    command = [MERGEKIT_PYTHON, HERE / "make_golden.py", "--output", folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def trio():
    """Role -> tensor -> fp32."""
    return {role: read_tensors(HERE / "golden" / f"{role}.safetensors") for role in ROLES}


@pytest.fixture(scope="module")
def compare(golden_folder, tmp_path_factory):
    """`compare("ties")` gives mergekit's tensors and ours, merged with the settings it records."""
    folder = tmp_path_factory.mktemp("parity")
    made = {}

    def run(name):
        if name not in made:
            file = SafetensorsFile(golden_folder / f"{name}.safetensors")
            settings = json.loads(file.metadata["settings"])
            parents = write_parents(folder, settings["dtype"])
            if settings["donors"] == ["agent"]:
                parents["vlm"] = parents["base"]
            output = folder / name
            merge(**parents, output=output, **our_settings(settings))
            made[name] = read_tensors(file.path), read_tensors(output / "model.safetensors")
        return made[name]

    return run


def read_tensors(path):
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}


def write_parents(folder, dtype):
    """The trio as checkpoint folders of a dtype."""
    config = {"model_type": "qwen2", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1,
              "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
              "tie_word_embeddings": True}  # fmt: skip
    paths = {role: folder / dtype / role for role in ROLES}
    for role, path in paths.items():
        if not path.exists():
            path.mkdir(parents=True)
            (path / "config.json").write_text(json.dumps(config))
            tensors = load_file(HERE / "golden" / f"{role}.safetensors")
            stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
            save_file(stored, path / "model.safetensors", {"format": "pt"})
    return paths


def our_settings(settings):
    """What mergekit's settings are called here."""
    method = NAMES.get(settings["method"], settings["method"])
    given = {**settings["each"], **settings["all"]}
    weight = given.get("weight", 1.0)
    weights = weight if isinstance(weight, list) else [weight, weight]
    options = {OPTIONS[key]: value for key, value in given.items() if key in OPTIONS}
    if "epsilon" in given:
        options["window" if method == "della" else "threshold"] = given["epsilon"]
    return {
        "method": method,
        "weights": dict(zip(("vlm", "agent"), weights, strict=True)),
        "scope": {"linear": "method", "norm_bias": method, "embedding": method},
        **options,
    }


def flatten(tensors):
    """All entries of a model in one row, in the order of the tensors' names."""
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])


def donor_deltas(trio):
    base = flatten(trio["base"])
    return base, flatten(trio["vlm"]) - base, flatten(trio["agent"]) - base


def assert_share(kept, probability):
    """The share of kept entries is within four standard deviations of what it should be."""
    expected = np.broadcast_to(probability, kept.shape)
    deviation = np.sqrt((expected * (1 - expected)).sum())
    assert abs(kept.sum() - expected.sum()) < SIGMAS * deviation


def test_golden_files_say_what_made_them(golden_folder):
    for path in golden_folder.glob("*.safetensors"):
        if path.stem not in ROLES:
            metadata = SafetensorsFile(path).metadata
            assert metadata["mergekit"] == "0.1.5"
            assert json.loads(metadata["settings"])["method"]


# linear: mergekit averages the checkpoints, ours base plus the averaged deltas: the same bits here
# since both are exact until the last rounding. task_arithmetic has weights 0.3 and 0.7, at which
# every step rounds; the bf16 one rounds fp32 results to bf16.
@pytest.mark.parametrize(
    "name", ["linear", "task_arithmetic", "task_arithmetic_bf16", "ties", "breadcrumbs", "ram"]
)
def test_result_has_the_same_bits(compare, name):
    theirs, ours = compare(name)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        np.testing.assert_array_equal(
            ours[tensor].view(np.uint32), expected.view(np.uint32), err_msg=tensor
        )


def test_ties_of_bf16_differs_only_where_the_threshold_ties(compare, trio):
    theirs, ours = compare("ties_bf16")
    parents = {role: to_bf16(tensors) for role, tensors in trio.items()}
    n_tied = 0
    for name, expected in theirs.items():
        tied = np.zeros(expected.shape, bool)
        for role in ("vlm", "agent"):
            magnitude = np.abs(parents[role][name] - parents["base"][name])
            n_keep = magnitude.size // 4  # density 0.25
            threshold = np.sort(magnitude, axis=None)[-n_keep]
            if (magnitude >= threshold).sum() > n_keep:
                tied |= magnitude == threshold
        n_tied += int(tied.sum())
        np.testing.assert_array_equal(ours[name][~tied], expected[~tied], err_msg=name)
    # the comparison has a point: ties are there, and are few of the 2,512 entries
    assert 0 < n_tied < 250


def to_bf16(tensors):
    return {
        name: torch.from_numpy(value).bfloat16().float().numpy() for name, value in tensors.items()
    }


# Both weigh survivors by factors that mergekit rounds in fp32 and ours elsewhere: SCE's energies in
# steps of 2^-20 (so that no order of summing shows), RAM+'s ratios of counts in fp64.
@pytest.mark.parametrize("name", ["sce", "ram_plus"])
def test_result_is_the_same_but_for_the_rounding_of_factors(compare, trio, name):
    theirs, ours = compare(name)
    for tensor, expected in theirs.items():
        largest = max(
            np.abs(trio[role][tensor] - trio["base"][tensor]).max() for role in ("vlm", "agent")
        )
        limit = 3e-6 * largest + 2.0**-23 * np.abs(expected)
        assert (np.abs(ours[tensor] - expected) <= limit).all(), tensor
    base, _, _ = donor_deltas(trio)
    assert ((flatten(ours) != base) == (flatten(theirs) != base)).all()


def test_dare_keeps_each_donor_as_often_and_independently(compare, trio):
    base, vlm, agent = donor_deltas(trio)
    theirs, ours = map(flatten, compare("dare"))
    # weight 0.5 and probability 0.5: ours adds 0.5 * delta / 0.5, mergekit (unscaled) 0.5 * delta
    for update in (theirs - base, (ours - base) * 0.5):
        only_vlm, only_agent = update == 0.5 * vlm, update == 0.5 * agent
        both = update == 0.5 * (vlm + agent)
        assert (only_vlm | only_agent | both | (update == 0)).all()
        changed = (vlm != 0) & (agent != 0)
        assert changed.sum() > 1000
        assert_share((only_vlm | both)[changed], 0.5)
        assert_share((only_agent | both)[changed], 0.5)
        assert_share(both[changed], 0.25)


def test_dare_ties_drops_the_loser_where_both_are_kept(compare, trio):
    base, vlm, agent = donor_deltas(trio)
    theirs, ours = map(flatten, compare("dare_ties"))
    changed = (vlm != 0) & (agent != 0)
    agree = changed & (vlm * agent > 0)
    disagree = changed & (vlm * agent < 0)
    winner = np.where(np.abs(vlm) > np.abs(agent), vlm, agent)
    loser = vlm + agent - winner
    for update in (theirs - base, (ours - base) * 0.5):
        both = update == 0.5 * (vlm + agent)
        wins, loses = update == 0.5 * winner, update == 0.5 * loser
        assert (both | wins | loses | (update == 0))[~disagree].all()
        assert (wins | loses | (update == 0))[disagree].all()
        assert_share(both[agree], 0.25)
        assert_share(wins[agree], 0.25)
        assert_share(wins[disagree], 0.5)  # alone, or against the other
        assert_share(loses[disagree], 0.25)  # the winner dropped


def test_della_keeps_by_rank_in_the_row_with_the_same_probabilities(compare, trio):
    theirs, ours = compare("della")
    deltas = {name: trio["agent"][name] - trio["base"][name] for name in theirs}
    # density 0.5, window 0.375: from 0.125 for the smallest of a row to 0.875 for the largest
    chances = {}
    for name, delta in deltas.items():
        rank = np.argsort(np.argsort(np.abs(delta), axis=-1, kind="stable"), axis=-1)
        chances[name] = 0.125 + 0.75 * rank / (delta.shape[-1] - 1)
    base, delta, chance = flatten(trio["base"]), flatten(deltas), flatten(chances)
    their_update, our_update = flatten(theirs) - base, flatten(ours) - base
    changed = delta != 0
    assert np.isin(their_update[changed] / delta[changed], (0, 1)).all()
    kept = changed & (our_update != 0)
    # one rounding of delta / p, one of base + update, both to fp32's 24 bits
    np.testing.assert_allclose(our_update[kept], (delta / chance)[kept], rtol=2e-7, atol=3e-7)
    # the agent leaves 30 % unchanged, which have the lowest ranks, so the first range is wide
    for low, high in ((0.125, 0.5), (0.5, 0.65), (0.65, 0.8), (0.8, 0.9)):
        group = changed & (chance >= low) & (chance < high)
        assert group.sum() > 200
        for update in (their_update, our_update):
            assert_share(update[group] != 0, chance[group])
