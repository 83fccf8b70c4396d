"""Whole merges on pico models: identities, bytes, donors, embeddings, transformers, the record."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_info, threadpool_limits
from transformers import AutoModelForImageTextToText

from merge import dense, kernels, writer
from merge.checkpoint import Checkpoint
from merge.engine import merge
from merge.errors import MergeError
from merge.memory import available_memory
from merge.methods import METHODS
from merge.report import figures
from merge.shards import SafetensorsFile
from merge.stats import open_stats
from tests.merge.folders import (
    ADDITIVE,
    KEEP_ALL,
    all_bits,
    bits,
    recast,
    run,
    weights_of,
    write_text_checkpoint,
)

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def is_language(name: str) -> bool:
    return not name.startswith("visual.")


def is_merged(name: str) -> bool:
    return is_language(name) and name not in EMBEDDINGS


def is_linear(name: str) -> bool:
    return is_merged(name) and "proj.weight" in name


# ---- identities


@pytest.mark.parametrize("method", [*ADDITIVE, "linear", "fisher", "regmean_diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_zero_gives_the_base(make_trio, stats, tmp_path, method, dtype):
    trio = make_trio(dtype)
    scope = {"embedding": "task_arithmetic"}
    zero = {"vlm": 0.0, "agent": 0.0}
    run(trio, tmp_path / "out", method=method, weights=zero, scope=scope, stats=stats)
    base, vlm = all_bits(trio.paths["base"]), all_bits(trio.paths["vlm"])
    for name, value in all_bits(tmp_path / "out").items():
        assert value == (base if is_language(name) else vlm)[name], name


@pytest.mark.parametrize("tied", [True, False])
def test_both_weights_one_give_plain_addition(make_trio, tmp_path, tied):
    trio = make_trio(torch.float32, tied)
    scope = {"embedding": "task_arithmetic"}
    run(trio, tmp_path / "out", method="task_arithmetic", scope=scope)
    merged = weights_of(tmp_path / "out")
    base, vlm, agent = (weights_of(trio.paths[role]) for role in ("base", "vlm", "agent"))
    assert set(merged) == set(vlm)
    for name in filter(is_language, merged):
        expected = base[name] + ((vlm[name] - base[name]) + (agent[name] - base[name]))
        # where one delta is lost in rounding, the merge gives the other parent's own value back
        torch.testing.assert_close(merged[name], expected, rtol=2e-7, atol=1e-9)


def test_obm_at_density_one_is_plain_addition_where_the_signs_agree(make_trio, stats, tmp_path):
    trio = make_trio()
    run(trio, tmp_path / "out", density=1.0, stats=stats)
    merged = weights_of(tmp_path / "out")
    base, vlm, agent = (weights_of(trio.paths[role]) for role in ("base", "vlm", "agent"))
    for name in filter(is_merged, merged):
        delta_v, delta_s = vlm[name] - base[name], agent[name] - base[name]
        agree = delta_v * delta_s > 0
        expected = base[name] + (delta_v + delta_s)
        torch.testing.assert_close(merged[name][agree], expected[agree], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("method", ADDITIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_agent_that_equals_the_base_gives_the_vlm_bit_by_bit(
    make_trio, stats, tmp_path, method, dtype
):
    trio = make_trio(dtype)
    scope = {"embedding": "task_arithmetic"}
    agent = trio.paths["base"]
    run(trio, tmp_path / "out", agent=agent, method=method, scope=scope, stats=stats, **KEEP_ALL)
    assert all_bits(tmp_path / "out") == all_bits(trio.paths["vlm"])


@pytest.mark.parametrize("method", ADDITIVE)
def test_a_vlm_that_equals_the_base_gives_the_agent_bit_by_bit(
    make_trio, stats, tmp_path, builders, method
):
    trio = make_trio()
    vlm = builders["vlm"](trio.models["base"])
    vlm.model.language_model.load_state_dict(trio.models["base"].model.state_dict())
    vlm.save_pretrained(tmp_path / "vlm")
    vlm_path = str(tmp_path / "vlm")
    run(trio, tmp_path / "out", vlm=vlm_path, method=method, stats=stats, **KEEP_ALL)
    agent, merged = all_bits(trio.paths["agent"]), all_bits(tmp_path / "out")
    assert all(merged[name] == agent[name] for name in filter(is_merged, merged))


@pytest.mark.parametrize("method", ["linear", "fisher", "regmean_diagonal"])
def test_averages_of_equal_parents_are_these_parents(make_trio, stats, tmp_path, method):
    trio = make_trio()
    vlm = {name: value.clone() for name, value in weights_of(trio.paths["vlm"]).items()}
    agent = write_text_checkpoint(
        tmp_path / "agent", {n: v.numpy() for n, v in vlm.items() if is_language(n)}
    )
    run(trio, tmp_path / "out", agent=agent, method=method, stats=stats)
    for name, value in weights_of(tmp_path / "out").items():
        # norms and biases are added by default, the agent's change a second time
        expected = vlm[name]
        if is_merged(name) and not is_linear(name):
            expected = 2 * vlm[name] - weights_of(trio.paths["base"])[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_layer_swap_takes_whole_layers_from_the_agent(make_trio, tmp_path):
    trio = make_trio(torch.bfloat16)
    scope = {"norm_bias": "method"}
    run(trio, tmp_path / "out", method="layer_swap", layers="1", scope=scope)
    vlm, agent = all_bits(trio.paths["vlm"]), all_bits(trio.paths["agent"])
    for name, value in all_bits(tmp_path / "out").items():
        assert value == (agent if ".layers.1." in name else vlm)[name], name


# ---- bytes


@pytest.mark.parametrize("method", METHODS)
def test_vision_tower_and_embeddings_are_the_vlms_byte_for_byte(make_trio, stats, tmp_path, method):
    trio = make_trio(torch.bfloat16, tied=False)
    record = run(
        trio, tmp_path / "out", method=method, density=0.3, stats=stats, layers="0-1", steps=5
    )
    merged, vlm = all_bits(tmp_path / "out"), all_bits(trio.paths["vlm"])
    copied = {name for name in vlm if not is_merged(name)}
    assert any("visual.merger" in name for name in copied)
    assert all(merged[name] == vlm[name] for name in copied)
    actions = {name: entry["action"] for name, entry in record["tensors"].items()}
    assert {name for name, action in actions.items() if action == "vlm"} == copied
    assert all(merged[name] != vlm[name] for name in filter(is_merged, vlm))


def test_of_a_tensor_that_is_copied_the_disk_is_asked_for_one_parents_only(
    make_trio, tmp_path, monkeypatch
):
    asked = set()

    def will_need(file, name):
        asked.add((file.path.parent, name))

    monkeypatch.setattr(SafetensorsFile, "will_need", will_need)
    paths = {role: Path(path) for role, path in make_trio().paths.items()}
    run(make_trio(), tmp_path / "out", method="ties")
    assert {folder for folder, name in asked if name == EMBEDDINGS[0]} == {paths["vlm"]}
    assert {folder for folder, name in asked if name == Q} == set(paths.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_fp32_and_rounded_once_to_nearest_even(make_trio, tmp_path, dtype):
    trio = make_trio(dtype)
    weights = {"vlm": 0.7, "agent": 0.4}
    run(trio, tmp_path / "out", method="task_arithmetic", weights=weights)
    merged = weights_of(tmp_path / "out")
    base, vlm, agent = (
        {name: value.float() for name, value in weights_of(trio.paths[role]).items()}
        for role in ("base", "vlm", "agent")
    )
    for name in filter(is_merged, merged):
        delta = 0.7 * (vlm[name] - base[name]) + 0.4 * (agent[name] - base[name])
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], (base[name] + delta).to(dtype)), name


@pytest.fixture(scope="session")
def mixed_trio(make_trio, tmp_path_factory):
    """A trio of three dtypes: base fp32, VLM bf16, agent fp16."""
    folder, trio = tmp_path_factory.mktemp("mixed"), make_trio()
    dtypes = {"base": torch.float32, "vlm": torch.bfloat16, "agent": torch.float16}
    paths = {role: recast(trio.paths[role], folder / role, dtypes[role]) for role in dtypes}
    return type("MixedTrio", (), {"paths": paths})


def in_shards(source: str, folder: Path, n_files: int = 3) -> str:
    """A copy of a one-file checkpoint in several files, tensors in another order."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = sorted(load_file(path).items(), reverse=True)
    path.unlink()
    for index in range(n_files):
        name = f"model-{index + 1:05d}-of-{n_files:05d}.safetensors"
        save_file(dict(tensors[index::n_files]), folder / name, metadata={"format": "pt"})
    return str(folder)


def without_norms(tensors: dict) -> dict:
    """Norms are sums of squares, whose last digits depend on the pieces."""
    return {
        name: {key: value for key, value in entry.items() if not key.endswith("_norm")}
        for name, entry in tensors.items()
    }


@pytest.mark.parametrize("kind", ["bfloat16", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_no_bit_depends_on_threads_pieces_shards_or_kernels(
    make_trio, mixed_trio, stats, tmp_path, monkeypatch, method, kind
):
    trio = mixed_trio if kind == "mixed" else make_trio(torch.bfloat16)
    settings = {"method": method, "density": 0.3, "stats": stats, "seed": 4, "layers": "1",
                "steps": 20, "normalization": "rank"}  # fmt: skip
    if not METHODS[method].linear_only:
        settings["scope"] = {"norm_bias": method, "embedding": method}
    one = run(trio, tmp_path / "one", threads=1, **settings)
    sharded = {role: in_shards(path, tmp_path / role) for role, path in trio.paths.items()}
    many = run(trio, tmp_path / "shards", threads=5, shard_size="50KB", **sharded, **settings)
    with monkeypatch.context() as patch:
        patch.setattr("merge.writer.RESIDENT_BYTES", 0)
        patch.setattr("merge.writer.PIECE_BYTES", 8000)  # of 64 columns in bf16, about 20 rows
        pieces = run(trio, tmp_path / "pieces", threads=2, **settings)
        patch.setenv("OBM_KERNELS", "numpy")
        plain = run(trio, tmp_path / "numpy", threads=2, **settings)
    assert len(many["output"]["files"]) > 5
    expected = all_bits(tmp_path / "one")
    for name in ("shards", "pieces", "numpy"):
        found = all_bits(tmp_path / name)
        assert set(found) == set(expected)
        assert [key for key in found if found[key] != expected[key]] == [], name
    for record in (pieces, many):
        assert without_norms(record["tensors"]) == without_norms(one["tensors"])
        for norm in ("delta_norm", "update_norm"):
            assert record["totals"][norm] == pytest.approx(one["totals"][norm], rel=1e-6)
    # four digits are the same however they are summed
    assert saliencies_of(plain) == saliencies_of(one)
    assert (len(saliencies_of(one)) > 0) == (method == "obm")


@pytest.mark.parametrize(("n_free", "n_together"), [(0, 1), (10**9, 2)])
def test_dense_tensors_are_merged_at_a_time_as_memory_allows(
    make_trio, tmp_path, monkeypatch, n_free, n_together
):
    plain, running, most = writer.merge_tensor, [], []

    def merge_slowly(*arguments):
        running.append(1)
        time.sleep(0.02)
        most.append(len(running))
        running.pop()
        return plain(*arguments)

    monkeypatch.setattr(writer, "merge_tensor", merge_slowly)
    monkeypatch.setattr(writer, "available_memory", lambda: n_free)
    run(make_trio(), tmp_path / "out", method="wudi", steps=2, threads=2)
    assert max(most) == n_together


@pytest.mark.parametrize("method", ["wudi", "regmean"])
def test_a_matrix_product_has_one_thread_however_many_the_process_has(
    make_trio, stats, tmp_path, monkeypatch, method
):
    def counts() -> set[int]:
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        return {pool["num_threads"] for pool in pools}

    plain, seen = dense.merge_matrix, []

    def watched(*arguments):
        seen.append(counts())
        return plain(*arguments)

    monkeypatch.setattr("merge.tensor.merge_matrix", watched)
    with threadpool_limits(2, user_api="blas"):
        assert counts() == {2}
        run(make_trio(), tmp_path / "out", method=method, stats=stats, steps=2, threads=2)
        assert counts() == {2}
    assert len(seen) > 1
    assert all(count == {1} for count in seen)


@pytest.mark.parametrize(("budget", "named"), [("tensor", "proj.weight: "), ("global", " to ")])
def test_weights_that_change_between_two_passes_are_refused(
    make_trio, stats, tmp_path, monkeypatch, budget, named
):
    plain = kernels.refine

    def refine(piece, *arguments):
        piece.tasks[:] = piece.base
        plain(piece, *arguments)

    monkeypatch.setattr(kernels, "refine", refine)
    recipe = {"method": "obm", "density": 0.3, "normalization": "rank", "budget": budget}
    with pytest.raises(MergeError, match="two passes over the weights found other sc") as error:
        run(make_trio(torch.bfloat16), tmp_path / "out", stats=stats, threads=1, **recipe)
    assert named in str(error.value)
    assert list(tmp_path.glob("*out*")) == []


def test_a_containers_limit_counts(tmp_path):
    everything = available_memory(tmp_path)
    assert everything > 0
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1600000\n")
    # files that were read count as used until somebody needs the memory
    stat = "anon 900000\nfile 700000\ninactive_anon 1\ninactive_file 600000\nactive_file 100000\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert available_memory(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 2_000_000


def saliencies_of(record: dict) -> dict:
    return {
        name: (entry["saliency"], entry["saliency_kept"])
        for name, entry in record["tensors"].items()
        if "saliency" in entry
    }


def test_two_runs_write_the_same_files(make_trio, stats, tmp_path):
    for name in ("one", "two"):
        run(make_trio(), tmp_path / name / "out", stats=stats, threads=1 + len(name) % 2)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


def test_merging_does_not_import_torch(make_trio, tmp_path):
    arguments = {**make_trio().paths, "output": str(tmp_path / "out"), "method": "ties"}
    code = (
        "import json, sys; from merge.engine import merge; merge(**json.loads(sys.argv[1])); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


# ---- layouts and shards


def in_memory_layout(trio, folder: Path) -> str:
    """The VLM as a raw state-dict dump of another trainer would name it."""
    shutil.copytree(trio.paths["vlm"], folder)
    state = {name: value.clone() for name, value in trio.models["vlm"].state_dict().items()}
    if trio.models["vlm"].config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_both_layouts_merge_to_the_same_model(make_trio, stats, tmp_path, builders, tied):
    trio = make_trio(torch.float32, tied)
    dumped = in_memory_layout(trio, tmp_path / "dumped")
    run(trio, tmp_path / "hub", stats=stats)
    run(trio, tmp_path / "memory", vlm=dumped, stats=stats)
    assert any(name.startswith("model.visual.") for name in weights_of(tmp_path / "memory"))
    batch = builders["image_batch"]()
    logits = []
    for name in ("hub", "memory"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_folder_loads_in_transformers_and_sees_images(
    make_trio, stats, tmp_path, builders, tied
):
    trio = make_trio(torch.float32, tied)
    run(trio, tmp_path / "out", stats=stats)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    batch = builders["image_batch"]()
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        of_vlm = trio.models["vlm"](**batch).logits
        blind = model(**{**batch, "pixel_values": batch["pixel_values"] * -1}).logits
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits, of_vlm)
    assert not torch.allclose(logits, blind)
    assert (
        model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    ) == tied


def test_processor_tokenizer_and_chat_template_come_along(tmp_path):
    from train.policy import load_processor
    from train.tiny import make_tiny_checkpoints

    paths = make_tiny_checkpoints(tmp_path / "trio", seed=0)
    merge(paths["base"], paths["vlm"], paths["agent"], tmp_path / "out", method="task_arithmetic")
    ours, theirs = (
        {p.name for p in Path(folder).iterdir()} for folder in (tmp_path / "out", paths["vlm"])
    )
    assert ours == theirs | {"README.md", "merge.json"}
    for name in theirs - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (Path(paths["vlm"]) / name).read_bytes()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    rendered = [
        load_processor(folder).apply_chat_template(messages, add_generation_prompt=True)
        for folder in (tmp_path / "out", paths["vlm"])
    ]
    assert rendered[0] == rendered[1]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "qwen2_5_vl"


def test_the_output_has_the_vlms_files_and_a_new_index(fresh_trio, tmp_path):
    run(fresh_trio, tmp_path / "with", method="task_arithmetic")
    index = Path(fresh_trio.paths["vlm"]) / "model.safetensors.index.json"
    theirs = json.loads(index.read_text())
    index.unlink()
    run(fresh_trio, tmp_path / "without", method="task_arithmetic")
    for name in ("with", "without"):
        ours = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    _, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "without", output_loading_info=True
    )
    assert not info["missing_keys"]


def test_files_of_a_given_size_load_in_transformers(make_trio, tmp_path):
    record = run(make_trio(), tmp_path / "out", method="ties", shard_size="200KB")
    sizes = record["output"]["files"]
    assert max(sizes.values()) <= 200_000
    assert sum(sizes.values()) == sum(v.nbytes for v in weights_of(tmp_path / "out").values())
    assert all(name.endswith(f"-of-{len(sizes):05d}.safetensors") for name in sizes)
    _, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    run(make_trio(), tmp_path / "one", method="ties", shard_size="1GB")
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]


# ---- donors, rules, text models, embeddings


@pytest.mark.parametrize("n_donors", [1, 2])
def test_donors_are_added_as_the_agent_is(make_trio, builders, tmp_path, n_donors):
    trio, donors = make_trio(), {}
    for index, name in enumerate(("reasoner", "second")[:n_donors]):
        donors[name] = str(tmp_path / name)
        builders["agent"](trio.models["base"], seed=7 + index).save_pretrained(donors[name])
    weights = {"vlm": 1.0, "agent": 0.5, **dict.fromkeys(donors, 0.25)}
    record = run(trio, tmp_path / "out", method="task_arithmetic", donors=donors, weights=weights)
    merged, base = weights_of(tmp_path / "out"), weights_of(trio.paths["base"])
    tasks = {role: weights_of(path) for role, path in {**trio.paths, **donors}.items()}
    for name in filter(is_merged, merged):
        update = sum(weight * (tasks[task][name] - base[name]) for task, weight in weights.items())
        torch.testing.assert_close(merged[name], base[name] + update, rtol=2e-7, atol=1e-8)
    assert list(record["parents"]) == ["base", "vlm", "agent", *donors]
    assert set(record["tensors"][Q]["conflicts_won"]) == {"vlm", "agent", *donors}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"licences of all {3 + n_donors} parents apply" in card


@pytest.mark.parametrize("name", ["base", "vlm", "agent"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_donor_does_not_take_the_place_of_a_parent(make_trio, tmp_path, name, dry_run):
    trio = make_trio()
    words = rf"models\.donors\.{name}: '{name}' is a model of its own, not a donor; rename"
    with pytest.raises(MergeError, match=words):
        run(trio, tmp_path / "out", donors={name: trio.paths["agent"]}, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_a_donor_does_not_take_the_name_of_a_method(make_trio, tmp_path):
    """Its tensors would be copied where the method was to merge."""
    trio = make_trio()
    words = r"models\.donors\.ties: 'ties' is the name of a merge method; rename the donor"
    with pytest.raises(MergeError, match=words):
        run(trio, tmp_path / "out", donors={"ties": trio.paths["agent"]}, method="ties")


@pytest.mark.parametrize("method", ["obm", "ties", "sce", "ram_plus"])
def test_a_donor_that_equals_the_base_changes_nothing(make_trio, stats, tmp_path, method):
    trio = make_trio()
    settings = {"method": method, "density": 0.4, "stats": stats}
    if method == "sce":  # the variance of three tasks ranks entries as that of two, at density one
        settings["density"] = 1.0
    run(trio, tmp_path / "two", **settings)
    run(trio, tmp_path / "three", donors={"donor": trio.paths["base"]}, **settings)
    assert all_bits(tmp_path / "two") == all_bits(tmp_path / "three")


def test_a_rule_changes_the_tensors_it_matches_alone(make_trio, tmp_path):
    trio = make_trio()
    rules = [
        {"match": r"layers\.0\..*q_proj", "density": 0.0},
        {"match": r"layers\.1\.mlp", "method": "agent"},
        {"match": "norm", "weights": {"vlm": 0.0, "agent": 0.0}},
    ]
    record = run(trio, tmp_path / "out", method="ties", density=0.5, rules=rules)
    run(trio, tmp_path / "plain", method="ties", density=0.5)
    merged, plain = all_bits(tmp_path / "out"), all_bits(tmp_path / "plain")
    base, agent = all_bits(trio.paths["base"]), all_bits(trio.paths["agent"])
    for name, value in merged.items():
        if "layers.0.self_attn.q_proj.weight" in name or ("norm" in name and is_language(name)):
            assert value == base[name], name
        elif "layers.1.mlp" in name and is_language(name):
            assert value == agent[name], name
        elif not name.endswith("q_proj.bias") or ".layers.0." not in name:
            assert value == plain[name], name
    assert record["rules"] == rules


def test_text_models_alone_are_merged(make_trio, builders, tmp_path):
    from transformers import AutoModelForCausalLM

    trio = make_trio()
    builders["agent"](trio.models["base"], seed=5).save_pretrained(tmp_path / "other")
    record = run(trio, tmp_path / "out", vlm=str(tmp_path / "other"), method="ties", density=0.3)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.model_type == "qwen2"
    assert not any(entry["group"] == "vision" for entry in record["tensors"].values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card
    assert "ision tower" not in card


def embedding_trio(folder: Path, rows: dict[str, int], special: dict[str, dict[str, int]]):
    """Text models with an embedding of 4 columns: base all 1, VLM 2, agent 4; and tokenizers."""
    values = {"base": 1.0, "vlm": 2.0, "agent": 4.0}
    paths = {}
    for role, value in values.items():
        tensors = {
            "model.embed_tokens.weight": np.full((rows[role], 4), value, np.float32),
            "model.layers.0.mlp.up_proj.weight": np.full((4, 4), value, np.float32),
        }
        paths[role] = write_text_checkpoint(folder / role, tensors, "BF16")
        added = [{"content": token, "id": index} for token, index in special[role].items()]
        tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}
        (folder / role / "tokenizer.json").write_text(json.dumps(tokenizer))
    return type("EmbeddingTrio", (), {"paths": paths})


@pytest.mark.parametrize("piece_bytes", [None, 40])
@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        # 1 + (2 - 1) + (4 - 1) = 5 where merged; ids 2 and 5 mean other tokens in the agent
        ("common", [5, 5, 2, 5, 5, 2, 2, 2]),
        # the VLM's own special tokens are 2, 3 and 7
        ("protect", [5, 5, 2, 2, 5, 2, 2, 2]),
    ],
)
def test_rows_of_embeddings_that_are_not_merged_are_the_vlms(
    tmp_path, monkeypatch, vocabulary, expected, piece_bytes
):
    special = {
        "base": {"<x>": 2, "<y>": 3},
        "vlm": {"<x>": 2, "<y>": 3, "<image>": 7},
        "agent": {"<y>": 3, "<x>": 5},
    }
    trio = embedding_trio(tmp_path, {"base": 6, "vlm": 8, "agent": 7}, special)
    if piece_bytes:
        monkeypatch.setattr("merge.writer.RESIDENT_BYTES", 0)
        monkeypatch.setattr("merge.writer.PIECE_BYTES", piece_bytes)  # one row, in three parents
    scope = {"embedding": "task_arithmetic"}
    run(
        trio, tmp_path / "out", method="task_arithmetic", scope=scope, vocabulary=vocabulary,
        threads=1,
    )  # fmt: skip
    merged = weights_of(tmp_path / "out")["model.embed_tokens.weight"]
    assert merged.tolist() == [[row] * 4 for row in expected]
    assert merged.dtype == torch.bfloat16


# ---- record and card


def test_merge_json_says_what_went_in_and_what_came_out(make_trio, stats, tmp_path):
    trio = make_trio()
    weights = {"vlm": 1.0, "agent": 0.5}
    record = run(trio, tmp_path / "out", density=0.2, weights=weights, stats=stats)
    assert record == json.loads((tmp_path / "out" / "merge.json").read_text())
    for role, parent in record["parents"].items():
        path = Path(trio.paths[role]) / "model.safetensors"
        assert parent["files"] == {"model.safetensors": path.stat().st_size}
        assert parent["source"] == trio.paths[role]
        assert len(parent["checksum"]) == 32
    assert record["settings"]["weights"] == weights
    assert record["settings"]["density"] == 0.2
    assert record["settings"]["vocabulary"] == "equal"
    assert record["settings"]["scope"] == {
        "linear": "obm",
        "norm_bias": "task_arithmetic",
        "embedding": "vlm",
    }
    assert record["stats"]["agent/diagonal"]["tokens"] == "200"
    assert set(record["tensors"]) == set(weights_of(trio.paths["vlm"]))
    base, vlm = weights_of(trio.paths["base"]), weights_of(trio.paths["vlm"])
    entry = record["tensors"][UP]
    n_keep = int(0.2 * base[UP].numel() + 0.5)
    assert entry["density"]["vlm"] == entry["density"]["agent"] == n_keep / base[UP].numel()
    assert entry["delta_norm"]["vlm"] == pytest.approx((vlm[UP] - base[UP]).norm().item(), 1e-5)
    assert entry["conflicts"] > 0
    assert sum(entry["conflicts_won"].values()) == pytest.approx(1.0)
    assert record["totals"]["tensors_merged"] == sum(map(is_merged, vlm))
    linear = record["groups"]["linear"]
    assert linear["conflicts"] == sum(
        entry["conflicts"] for entry in record["tensors"].values() if entry["group"] == "linear"
    )


@pytest.mark.parametrize("normalization", ["none", "rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_json_has_the_saliency_of_every_linear_and_what_was_kept_of_it(
    make_trio, stats, tmp_path, dtype, normalization
):
    trio = make_trio(dtype)
    record = run(
        trio, tmp_path / "out", density=0.3, stats=stats, normalization=normalization
    )  # the fused loops for bf16 without ranks, the plain ones else
    parents = {role: weights_of(path) for role, path in trio.paths.items()}
    moments = {task: open_stats(stats[task], "diagonal") for task in ("vlm", "agent")}
    n_checked = 0
    for name, entry in record["tensors"].items():
        assert ("saliency" in entry) == ("saliency_kept" in entry) == is_linear(name), name
        if not is_linear(name):
            continue
        for task, stats_of_task in moments.items():
            delta = parents[task][name].double() - parents["base"][name].double()
            h = torch.from_numpy(stats_of_task.vector(name)).double()
            scores = (h * delta.square()).flatten().sort(descending=True).values
            n_keep = int(0.3 * scores.numel() + 0.5)
            total, kept = scores.sum().item(), scores[:n_keep].sum().item()
            # printed to four digits
            assert entry["saliency"][task] == pytest.approx(total, rel=1e-3)
            assert entry["saliency_kept"][task] == pytest.approx(kept / total, rel=1e-3)
            # the top share by cost holds more of the cost than a share at random
            assert entry["saliency_kept"][task] > 0.3
            n_checked += 1
    assert n_checked == 2 * 7 * 2
    linear = record["groups"]["linear"]
    for task in moments:
        total = sum(e["saliency"][task] for e in record["tensors"].values() if "saliency" in e)
        assert linear["saliency"][task] == pytest.approx(total, rel=1e-3)
    # norms and biases have none, so neither has the sum over all
    assert "saliency" not in record["totals"]
    assert "saliency" not in record["groups"]["norm_bias"]


def test_saliency_beyond_fp32_is_null_in_merge_json():
    counts = {
        "entries": 4, "kept": {"vlm": 2}, "conflicts": 0, "conflicts_won": {"vlm": 0},
        "delta_square": {"vlm": 4.0}, "update_square": 1.0,
        "saliency": {"vlm": float("inf")}, "saliency_kept": {"vlm": float("inf")},
    }  # fmt: skip
    found = figures(counts)
    assert (found["saliency"], found["saliency_kept"]) == ({"vlm": None}, {"vlm": None})
    nothing = figures({**counts, "saliency": {"vlm": 0.0}, "saliency_kept": {"vlm": 0.0}})
    assert nothing["saliency_kept"] == {"vlm": 0.0}


@pytest.mark.parametrize("method", ["ties", "wudi", "layer_swap"])
def test_checksums_are_those_of_the_bytes_in_the_files(mixed_trio, tmp_path, method):
    scope = {"norm_bias": "agent"}  # copied from fp16 to bf16
    record = run(mixed_trio, tmp_path / "out", method=method, scope=scope, layers="0", steps=2)
    output = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    parents = {role: Checkpoint(path, role) for role, path in mixed_trio.paths.items()}
    for name, entry in record["tensors"].items():
        assert entry["checksum"] == output.checksum(name)
        assert entry["inputs"]
        for role, checksum in entry["inputs"].items():
            assert checksum == parents[role].checksum(name), (name, role)


def test_the_card_names_the_parents_and_the_recipe(make_trio, tmp_path):
    trio = make_trio()
    rules = [{"match": "mlp", "density": 0.1}]
    record = run(trio, tmp_path / "warm", method="ties", density=0.3, rules=rules)
    card = (tmp_path / "warm" / "README.md").read_text()
    front = card.split("---")[1]
    assert 'base_model:\n- "base"\n- "vlm"\n- "agent"\nbase_model_relation: merge' in front
    assert "licences of all 3 parents apply" in card
    recipe = json.loads(card.split("```json\n")[1].split("```")[0])
    assert recipe["settings"] == record["settings"]
    assert recipe["method"] == "ties"
    assert recipe["rules"] == rules
    assert str(tmp_path) not in card


def test_the_card_names_repositories_without_their_revision(make_trio, tmp_path, monkeypatch):
    trio = make_trio()
    snapshot = tmp_path / "snapshots" / ("1" * 40)
    shutil.copytree(trio.paths["vlm"], snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    run(trio, tmp_path / "out", vlm="someone/vlm@main", method="ties")
    card = (tmp_path / "out" / "README.md").read_text()
    assert '- "someone/vlm"\n' in card.split("---")[1]
    assert f"| vlm | someone/vlm | {'1' * 40} |" in card


def test_a_dry_run_returns_the_plan_and_writes_nothing(make_trio, stats, tmp_path):
    trio = make_trio()
    result = run(trio, tmp_path / "out", stats=stats, dry_run=True)
    assert result["dry_run"]
    assert "model.layers.*.self_attn.q_proj.weight" in result["table"]
    assert set(result["tensors"]) == set(weights_of(trio.paths["vlm"]))
    assert all(entry["reason"] for entry in result["tensors"].values())
    n_bytes = sum(value.nbytes for value in weights_of(trio.paths["vlm"]).values())
    assert result["cost"]["bytes_written"] == n_bytes
    assert result["cost"]["bytes_read"] > n_bytes
    assert list(tmp_path.iterdir()) == []


# ---- the output folder


def test_an_earlier_merge_is_replaced_when_told_so(make_trio, tmp_path):
    trio, out = make_trio(), tmp_path / "out"
    run(trio, out, method="task_arithmetic")
    (out / "old.txt").write_text("from before")
    record = run(trio, out, method="ties", overwrite=True)
    assert json.loads((out / "merge.json").read_text()) == record
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_written_to(make_trio, tmp_path):
    (tmp_path / "out").mkdir()
    run(make_trio(), tmp_path / "out", method="ties")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert bits(weights_of(tmp_path / "out")[NORM])
