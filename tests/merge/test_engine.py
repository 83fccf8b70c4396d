"""Whole merges on pico models: identities, bytes, a round trip through transformers, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from merge.calibration import SecondMoments, load_stats, save_stats
from merge.checkpoint import Checkpoint, hash_checkpoint
from merge.engine import merge, restore_parents
from merge.errors import MergeError
from merge.methods import METHODS
from merge.shards import hash_file

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def run(trio, output, **changes):
    paths = trio.paths | {key: changes.pop(key) for key in list(changes) if key in trio.paths}
    return merge(paths["base"], paths["vlm"], paths["agent"], output, **changes)


def weights_of(folder) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def is_language(name: str) -> bool:
    return not name.startswith("visual.")


def is_merged(name: str) -> bool:
    return is_language(name) and name not in EMBEDDINGS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_zero_gives_the_base(make_trio, stats, tmp_path, method, dtype):
    trio = make_trio(dtype)
    scope = {"embedding": "task_arithmetic"}
    zero = {"vlm": 0.0, "agent": 0.0}
    run(trio, tmp_path / "out", method=method, weights=zero, scope=scope, stats=stats)
    merged, base, vlm = (
        weights_of(p) for p in (tmp_path / "out", *map(trio.paths.get, ("base", "vlm")))
    )
    for name in merged:
        assert bits(merged[name]) == bits((base if is_language(name) else vlm)[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_both_weights_one_and_density_one_give_plain_addition(make_trio, stats, tmp_path, tied):
    trio = make_trio(torch.float32, tied)
    scope = {"embedding": "task_arithmetic"}
    run(trio, tmp_path / "out", method="task_arithmetic", scope=scope)
    merged = weights_of(tmp_path / "out")
    base, vlm, agent = (weights_of(trio.paths[role]) for role in ("base", "vlm", "agent"))
    assert set(merged) == set(vlm)
    for name in filter(is_language, merged):
        expected = base[name] + ((vlm[name] - base[name]) + (agent[name] - base[name]))
        # restore_parents may move the last bit where one delta rounds away
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_agent_that_equals_the_base_gives_the_vlm_bit_by_bit(
    make_trio, stats, tmp_path, method, dtype
):
    trio = make_trio(dtype)
    run(
        trio,
        tmp_path / "out",
        agent=trio.paths["base"],
        method=method,
        density=1.0,
        scope={"embedding": "task_arithmetic"},
        stats=stats,
    )
    for name, value in weights_of(trio.paths["vlm"]).items():
        assert bits(weights_of(tmp_path / "out")[name]) == bits(value), name


def test_a_vlm_that_equals_the_base_gives_the_agent_bit_by_bit(
    make_trio, stats, tmp_path, builders
):
    trio = make_trio()
    vlm = builders["vlm"](trio.models["base"])
    vlm.model.language_model.load_state_dict(trio.models["base"].model.state_dict())
    vlm.save_pretrained(tmp_path / "vlm")
    run(trio, tmp_path / "out", vlm=str(tmp_path / "vlm"), density=1.0, stats=stats)
    agent = weights_of(trio.paths["agent"])
    merged = weights_of(tmp_path / "out")
    assert all(bits(merged[name]) == bits(agent[name]) for name in filter(is_merged, merged))


def test_restoring_parents_undoes_rounding_and_nothing_else():
    base = torch.tensor([1.0, 1e8, 0.5, 0.0])
    parent = torch.tensor([1e-9, 1.0, 0.75, -0.0])
    # fp32: 1 + (1e-9 - 1) = 0 and 1e8 + (1 - 1e8) = 0 or 1, never quite the parent
    merged = base + (parent - base)
    assert bits(restore_parents(merged, base, [parent])) == bits(parent)
    other = torch.tensor([0.25, 0.25, 0.25, 0.25])
    assert torch.equal(restore_parents(other, base, [parent]), other)


@pytest.mark.parametrize("method", METHODS)
def test_vision_tower_and_embeddings_are_the_vlms_byte_for_byte(make_trio, stats, tmp_path, method):
    trio = make_trio(torch.bfloat16, tied=False)
    record = run(trio, tmp_path / "out", method=method, density=0.3, stats=stats)
    merged, vlm = weights_of(tmp_path / "out"), weights_of(trio.paths["vlm"])
    copied = [name for name in vlm if not is_merged(name)]
    assert any("visual.merger" in name for name in copied)
    assert all(bits(merged[name]) == bits(vlm[name]) for name in copied)
    assert {name for name, entry in record["tensors"].items() if entry["action"] == "vlm"} == set(
        copied
    )
    changed = [name for name in filter(is_merged, vlm) if bits(merged[name]) != bits(vlm[name])]
    assert len(changed) == len(list(filter(is_merged, vlm)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
        assert hash_file(tmp_path / "out" / name) == hash_file(Path(paths["vlm"]) / name), name
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    rendered = [
        load_processor(folder).apply_chat_template(messages, add_generation_prompt=True)
        for folder in (tmp_path / "out", paths["vlm"])
    ]
    assert rendered[0] == rendered[1]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "qwen2_5_vl"


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


@pytest.mark.parametrize("method", METHODS)
def test_shards_change_no_bit(make_trio, stats, tmp_path, method):
    trio = make_trio(torch.float32, tied=False)
    sharded = {}
    for role, model in trio.models.items():
        sharded[role] = str(tmp_path / role)
        model.save_pretrained(sharded[role], max_shard_size="60KB")
    run(trio, tmp_path / "one", method=method, stats=stats)
    record = run(trio, tmp_path / "many", method=method, stats=stats, **sharded)
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    assert set(one) == set(many)
    assert all(bits(one[name]) == bits(many[name]) for name in one)
    assert len(record["output"]["files"]) > 2
    AutoModelForImageTextToText.from_pretrained(tmp_path / "many")


def test_shards_without_an_index_are_read_and_get_one(fresh_trio, tmp_path):
    run(fresh_trio, tmp_path / "with", method="task_arithmetic")
    (Path(fresh_trio.paths["vlm"]) / "model.safetensors.index.json").unlink()
    run(fresh_trio, tmp_path / "without", method="task_arithmetic")
    with_index, without = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        for name in ("with", "without")
    )
    assert with_index["weight_map"] == without["weight_map"]
    _, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "without", output_loading_info=True
    )
    assert not info["missing_keys"]


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_write_the_same_bytes(make_trio, stats, tmp_path, method):
    trio = make_trio()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            run(trio, tmp_path / str(count) / "out", method=method, seed=4, stats=stats)
    finally:
        torch.set_num_threads(threads)
    first, second = (tmp_path / count / "out" for count in "12")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_merge_json_says_what_went_in_and_what_came_out(make_trio, stats, tmp_path):
    trio = make_trio()
    weights = {"vlm": 1.0, "agent": 0.5}
    record = run(trio, tmp_path / "out", density=0.2, weights=weights, stats=stats)
    assert record == json.loads((tmp_path / "out" / "merge.json").read_text())
    for role, parent in record["parents"].items():
        path = Path(trio.paths[role]) / "model.safetensors"
        assert parent["files"] == {"model.safetensors": hash_file(path)}
        assert parent["sha256"] == hash_checkpoint(trio.paths[role])
    assert record["output"]["files"] == {
        "model.safetensors": hash_file(tmp_path / "out" / "model.safetensors")
    }
    assert record["settings"]["weights"] == weights
    assert record["settings"]["scope"] == {
        "linear": "obm",
        "norm_bias": "task_arithmetic",
        "embedding": "vlm",
    }
    assert record["stats"]["agent"]["tokens"] == "40"
    assert set(record["tensors"]) == set(weights_of(trio.paths["vlm"]))
    base, vlm = weights_of(trio.paths["base"]), weights_of(trio.paths["vlm"])
    name = "model.layers.1.mlp.up_proj.weight"
    entry = record["tensors"][name]
    n_keep = int(0.2 * base[name].numel() + 0.5)
    assert entry["density"]["vlm"] == entry["density"]["agent"] == n_keep / base[name].numel()
    assert entry["delta_norm"]["vlm"] == pytest.approx((vlm[name] - base[name]).norm().item(), 1e-5)
    assert entry["conflicts"] > 0
    assert sum(entry["conflicts_won"].values()) == pytest.approx(1.0)
    assert record["totals"]["tensors_merged"] == sum(map(is_merged, vlm))
    linear = record["groups"]["linear"]
    assert linear["conflicts"] == sum(
        entry["conflicts"] for entry in record["tensors"].values() if entry["group"] == "linear"
    )


def test_the_card_names_the_parents_and_the_recipe(make_trio, tmp_path):
    trio = make_trio()
    record = run(trio, tmp_path / "warm", method="ties", density=0.3)
    card = (tmp_path / "warm" / "README.md").read_text()
    front = card.split("---")[1]
    assert 'base_model:\n- "base"\n- "vlm"\n- "agent"\nbase_model_relation: merge' in front
    recipe = json.loads(card.split("```json\n")[1].split("```")[0])
    assert recipe["settings"] == record["settings"]
    assert recipe["method"] == "ties"


def test_a_dry_run_returns_the_plan_and_writes_nothing(make_trio, stats, tmp_path):
    result = run(make_trio(), tmp_path / "out", stats=stats, dry_run=True)
    assert result["dry_run"]
    assert "model.layers.*.self_attn.q_proj.weight" in result["table"]
    assert list(tmp_path.iterdir()) == []


# ---- bad input: one clear error, nothing written


def refuse(trio, tmp_path, match, **changes):
    """Runs a merge that must fail, and checks that it leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MergeError, match=match) as caught:
        run(trio, tmp_path / "out", **({"method": "task_arithmetic"} | changes))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("role", ["base", "vlm", "agent"])
def test_a_missing_checkpoint_is_an_error(make_trio, tmp_path, role):
    missing = str(tmp_path / "nowhere")
    refuse(
        make_trio(), tmp_path, f"{role} .*nowhere: no such folder.*models.{role}", **{role: missing}
    )


def test_a_hub_id_is_looked_up_unless_its_first_part_is_a_folder_here(
    make_trio, tmp_path, monkeypatch
):
    trio = make_trio()
    asked = []

    def download(source, **_):
        asked.append(source)
        if source == "someone/vlm":
            return trio.paths["vlm"]
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    record = run(trio, tmp_path / "out", vlm="someone/vlm", method="ties", dry_run=True)
    assert record["dry_run"]
    refuse(trio, tmp_path, r"the hub does not give it \(OSError\)", agent="someone/else")
    (tmp_path / "runs").mkdir()
    refuse(trio, tmp_path, r"agent runs/else: no such folder; check", agent="runs/else")
    assert asked == ["someone/vlm", "someone/else"]


def test_a_truncated_shard_is_an_error(fresh_trio, tmp_path):
    shard = sorted(Path(fresh_trio.paths["agent"]).glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refuse(fresh_trio, tmp_path, f"{shard.name}: is truncated")


@pytest.mark.parametrize("size", [0, 5, 12, 200])
def test_a_shard_that_ends_in_its_header_is_an_error(fresh_trio, tmp_path, size):
    shard = sorted(Path(fresh_trio.paths["vlm"]).glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:size])
    refuse(fresh_trio, tmp_path, f"{shard.name}: is truncated")


def test_a_file_that_is_no_safetensors_is_an_error(fresh_trio, tmp_path):
    shard = sorted(Path(fresh_trio.paths["base"]).glob("*.safetensors"))[0]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuse(fresh_trio, tmp_path, "not a safetensors file")
    shard.write_bytes((4).to_bytes(8, "little") + b"[1 2")
    refuse(fresh_trio, tmp_path, "broken safetensors header")
    shard.write_bytes((6).to_bytes(8, "little") + b'{"a":1' + b"}")
    refuse(fresh_trio, tmp_path, "broken safetensors header")


@pytest.mark.parametrize("role", ["base", "vlm", "agent"])
def test_a_missing_shard_is_an_error(fresh_trio, tmp_path, role):
    shard = sorted(Path(fresh_trio.paths[role]).glob("*.safetensors"))[-1]
    shard.unlink()
    refuse(fresh_trio, tmp_path, f"{role} .*{shard.name} is missing")
    (Path(fresh_trio.paths[role]) / "model.safetensors.index.json").unlink()
    refuse(fresh_trio, tmp_path, f"{role} .*{shard.name} is missing")


def test_a_folder_of_pickles_is_an_error(fresh_trio, tmp_path):
    folder = Path(fresh_trio.paths["agent"])
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    refuse(fresh_trio, tmp_path, "has no model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    refuse(fresh_trio, tmp_path, "agent .*pickle.*save_pretrained")


def test_a_lora_adapter_is_an_error(fresh_trio, tmp_path):
    folder = Path(fresh_trio.paths["agent"])
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    refuse(fresh_trio, tmp_path, "LoRA adapter.*merge_and_unload")


def test_a_missing_or_broken_config_is_an_error(fresh_trio, tmp_path):
    config = Path(fresh_trio.paths["base"]) / "config.json"
    config.write_text("{")
    refuse(fresh_trio, tmp_path, "config.json: is not valid JSON")
    config.unlink()
    refuse(fresh_trio, tmp_path, "has no config.json")


def test_other_vocabularies_are_an_error(make_trio, tmp_path, builders):
    folder = str(tmp_path / "agent")
    builders["text_model"](vocab_size=80).save_pretrained(folder)
    refuse(
        make_trio(),
        tmp_path,
        r"model.embed_tokens.weight: agent .*shape \[80, 64\], the VLM \[64, 64\].*vocabularies",
        agent=folder,
    )


def test_equal_sizes_do_not_hide_other_tokens(fresh_trio, tmp_path):
    for role, tokens in (("vlm", "ab"), ("base", "ab"), ("agent", "ba")):
        vocabulary = {token: index for index, token in enumerate(tokens)}
        content = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<x>", "id": 2}]}
        (Path(fresh_trio.paths[role]) / "tokenizer.json").write_text(json.dumps(content))
    refuse(fresh_trio, tmp_path, "token 'b' has id 0, in the VLM 1")


def test_other_shapes_are_an_error_that_names_tensor_and_shapes(make_trio, tmp_path, builders):
    folder = str(tmp_path / "base")
    builders["text_model"](intermediate_size=128).save_pretrained(folder)
    refuse(
        make_trio(),
        tmp_path,
        r"mlp.\w+_proj.weight: base .*shape \[(128, 64|64, 128)\], the VLM \[(96, 64|64, 96)\]",
        base=folder,
    )


def test_another_depth_is_an_error(make_trio, tmp_path, builders):
    for layers in (1, 3):
        folder = str(tmp_path / f"agent{layers}")
        builders["text_model"](num_hidden_layers=layers).save_pretrained(folder)
        refuse(make_trio(), tmp_path, f"num_hidden_layers is {layers}", agent=folder)


def test_equal_shapes_do_not_hide_other_heads(make_trio, tmp_path, builders):
    folder = Path(tmp_path / "agent")
    builders["text_model"]().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5.0
    (folder / "config.json").write_text(json.dumps(config))
    refuse(make_trio(), tmp_path, "rope_theta is 5.0, the VLM's is 10000.0", agent=str(folder))


def test_a_tensor_that_nobody_knows_is_an_error(fresh_trio, tmp_path):
    folder = Path(fresh_trio.paths["agent"])
    save_file({"model.layers.0.gate.weight": torch.ones(2)}, folder / "extra.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.gate.weight"] = "extra.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(fresh_trio, tmp_path, "tensor model.layers.0.gate.weight is not part of qwen2")


def test_an_index_that_promises_too_much_is_an_error(fresh_trio, tmp_path):
    path = Path(fresh_trio.paths["vlm"]) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.9.input_layernorm.weight"] = shard
    path.write_text(json.dumps(index))
    refuse(fresh_trio, tmp_path, "promises tensor model.layers.9")
    index["weight_map"]["x"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    refuse(fresh_trio, tmp_path, "not a plain file name")


def test_models_in_the_wrong_place_are_an_error(make_trio, tmp_path):
    trio = make_trio()
    refuse(trio, tmp_path, "vlm .*is a text model", vlm=trio.paths["agent"])


def test_an_unsupported_architecture_is_an_error(fresh_trio, tmp_path):
    path = Path(fresh_trio.paths["base"]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    refuse(fresh_trio, tmp_path, "'llama' is not supported; use a checkpoint of qwen2, qwen2_5_vl")


def test_weights_that_are_not_finite_are_an_error(fresh_trio, tmp_path):
    path = sorted(Path(fresh_trio.paths["agent"]).glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(name for name in tensors if name not in EMBEDDINGS)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    refuse(fresh_trio, tmp_path, f"agent .*{name} holds NaN")


def test_a_result_that_overflows_is_an_error(make_trio, tmp_path):
    weights = {"vlm": 1e38, "agent": 1.0}
    refuse(make_trio(torch.float16), tmp_path, "does not fit F16", weights=weights)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "slerp"}, "merge.method: 'slerp'.*obm"),
        ({"density": 1.5}, "merge.density: 1.5"),
        ({"density": float("nan")}, "merge.density"),
        ({"weights": {"vlm": 1.0}}, "merge.weights: has vlm"),
        ({"weights": {"vlm": 1.0, "agent": float("inf")}}, "merge.weights.agent"),
        ({"normalization": "max"}, "merge.normalization: 'max'.*none, mean, rank"),
        ({"combine": "product"}, "merge.combine: 'product'"),
        ({"saliency": "full"}, "merge.saliency: 'full'"),
        ({"scope": {"vision": "vlm"}}, "merge.scope.vision"),
        ({"scope": {"norm_bias": "obm"}}, "merge.scope.norm_bias: obm"),
        ({"scope": {"linear": "nothing"}}, "merge.scope.linear: 'nothing'"),
    ],
)
def test_unknown_settings_are_an_error(make_trio, tmp_path, changes, match):
    refuse(make_trio(), tmp_path, match, **changes)


def test_obm_without_fitting_statistics_is_an_error(make_trio, stats, tmp_path):
    trio = make_trio()
    refuse(trio, tmp_path, "second moments of vlm; run `obm calibrate`", method="obm")
    incomplete = {"vlm": stats["vlm"]}
    refuse(trio, tmp_path, "second moments of agent", method="obm", stats=incomplete)
    moments = load_stats(stats["agent"])
    other = tmp_path / "other.safetensors"
    save_stats(moments, other, model_sha256="0" * 64)
    refuse(trio, tmp_path, "other weights", method="obm", stats={**stats, "agent": other})
    short = {name: value[:-1] for name, value in moments.items()}
    save_stats(SecondMoments(short, moments.metadata), other)
    refuse(
        trio, tmp_path, r"has (63|95) channels for", method="obm", stats={**stats, "agent": other}
    )
    save_stats(SecondMoments({}, moments.metadata), other)
    refuse(trio, tmp_path, "has nothing for", method="obm", stats={**stats, "agent": other})


def test_an_output_that_exists_is_kept_unless_told_otherwise(make_trio, tmp_path):
    trio, out = make_trio(), tmp_path / "out"
    run(trio, out, method="task_arithmetic")
    refuse(trio, tmp_path, "out: exists; .*--overwrite")
    (out / "merge.json").rename(tmp_path / "kept.json")
    refuse(trio, tmp_path, "was not written by a merge", overwrite=True)
    (tmp_path / "kept.json").rename(out / "merge.json")
    (out / "old.txt").write_text("from before")
    record = run(trio, out, method="ties", overwrite=True)
    assert json.loads((out / "merge.json").read_text()) == record
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_overwrite_that_fails_keeps_the_old_merge(make_trio, tmp_path):
    run(make_trio(), tmp_path / "out", method="ties")
    weights = {"vlm": 1e38, "agent": 1.0}
    before = (tmp_path / "out" / "merge.json").read_text()
    refuse(make_trio(torch.float16), tmp_path, "fit F16", weights=weights, overwrite=True)
    assert (tmp_path / "out" / "merge.json").read_text() == before


def test_the_output_may_not_be_a_parent(fresh_trio, tmp_path):
    for out in (fresh_trio.paths["vlm"], tmp_path / "parents"):
        with pytest.raises(MergeError, match="choose another output"):
            run(fresh_trio, out, method="ties", overwrite=True)
    assert Checkpoint(fresh_trio.paths["vlm"], "vlm").tensors


def test_an_output_that_is_a_file_is_an_error(make_trio, tmp_path):
    (tmp_path / "out").write_text("a file")
    refuse(make_trio(), tmp_path, "is a file", overwrite=True)
