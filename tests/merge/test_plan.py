"""The plan accounts for every tensor of all three checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import FAMILIES, canonical_name, group_of
from merge.plan import format_plan, make_plan


def plan_of(paths, **changes):
    return make_plan(**{role: Checkpoint(path, role) for role, path in paths.items()}, **changes)


def rewrite(folder: str, change) -> None:
    """Applies a function to the tensors of a one-file checkpoint."""
    path = Path(folder) / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def folders(make_trio, tmp_path):
    """A tied trio in one file each, to damage."""
    paths = {}
    for role, model in make_trio().models.items():
        paths[role] = str(tmp_path / role)
        model.save_pretrained(paths[role])
    return paths


def test_every_tensor_of_a_real_model_has_a_group_in_both_layouts(make_trio):
    trio = make_trio(torch.float32, tied=False)
    vlm, family = trio.models["vlm"], FAMILIES["qwen2_5_vl"]
    on_disk = set(Checkpoint(trio.paths["vlm"], "vlm").tensors)
    in_memory = set(vlm.state_dict())
    assert on_disk != in_memory
    assert {canonical_name(family, name) for name in in_memory} == on_disk
    assert all(group_of(family, name) for name in on_disk)
    text = set(Checkpoint(trio.paths["base"], "base").tensors)
    assert text == {name for name in on_disk if not name.startswith("visual.")}


def test_default_scope(make_trio):
    plan = plan_of(make_trio(torch.float32, tied=False).paths)
    actions = {tensor.canonical: tensor.action for tensor in plan.tensors}
    assert actions["model.layers.0.self_attn.o_proj.weight"] == "obm"
    assert actions["model.layers.1.mlp.down_proj.weight"] == "obm"
    assert actions["model.layers.1.self_attn.q_proj.bias"] == "task_arithmetic"
    assert actions["model.norm.weight"] == "task_arithmetic"
    assert actions["model.embed_tokens.weight"] == actions["lm_head.weight"] == "vlm"
    assert {tensor.action for tensor in plan.tensors if tensor.group == "vision"} == {"vlm"}
    assert all(tensor.reason for tensor in plan.tensors)
    assert plan.unused == ()


def test_scope_can_copy_from_the_base_or_merge_embeddings(make_trio):
    scope = {"norm_bias": "base", "embedding": "task_arithmetic", "linear": None}
    plan = plan_of(make_trio().paths, method="ties", scope=scope)
    actions = {tensor.group: tensor.action for tensor in plan.tensors}
    assert actions == {
        "linear": "ties",
        "norm_bias": "base",
        "embedding": "task_arithmetic",
        "vision": "vlm",
    }


def test_a_tied_lm_head_of_base_and_agent_stands_in_for_an_untied_one(
    make_trio, tmp_path, builders
):
    tied = make_trio(torch.float32, tied=True)
    untied = make_trio(torch.float32, tied=False)
    paths = {**tied.paths, "vlm": untied.paths["vlm"]}
    plan = plan_of(paths, scope={"embedding": "task_arithmetic"})
    head = next(tensor for tensor in plan.tensors if tensor.canonical == "lm_head.weight")
    assert head.base_name == head.agent_name == "model.embed_tokens.weight"


def test_an_lm_head_that_the_vlm_ties_is_set_aside_or_refused(make_trio):
    tied = make_trio(torch.float32, tied=True)
    untied = make_trio(torch.float32, tied=False)
    paths = {**untied.paths, "vlm": tied.paths["vlm"]}
    plan = plan_of(paths)
    assert [(role, name) for role, name, _ in plan.unused] == [
        ("base", "lm_head.weight"),
        ("agent", "lm_head.weight"),
    ]
    with pytest.raises(MergeError, match=r"scope\.embedding=vlm"):
        plan_of(paths, scope={"embedding": "task_arithmetic"})


def test_a_stored_copy_of_a_tied_lm_head_is_accounted_for(folders):
    def store_head(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    rewrite(folders["agent"], store_head)
    plan = plan_of(folders, scope={"embedding": "task_arithmetic"})
    assert plan.unused == (("agent", "lm_head.weight", "a copy of embed_tokens"),)
    assert "lm_head: tied to embed_tokens, not stored" in plan.notes


@pytest.mark.parametrize("role", ["base", "agent"])
def test_a_tensor_that_a_parent_lacks_is_an_error(folders, role):
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(folders[role], lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(MergeError, match=f"{name}: the VLM has it, {role} .* does not"):
        plan_of(folders)


@pytest.mark.parametrize("role", ["base", "agent"])
def test_a_tensor_that_the_vlm_lacks_is_an_error(folders, role):
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(folders["vlm"], lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(MergeError, match=f"{name}: base .* has it, the VLM does not"):
        plan_of(folders)


def test_the_same_tensor_in_both_layouts_is_an_error(folders):
    rewrite(
        folders["vlm"],
        lambda tensors: {**tensors, "model.language_model.norm.weight": torch.ones(64)},
    )
    with pytest.raises(MergeError, match="are the same tensor"):
        plan_of(folders)


def test_quantised_weights_are_an_error(folders):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folders["agent"], lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(MergeError, match="is I8; merging needs"):
        plan_of(folders)


def test_the_vision_tower_of_a_vlm_in_the_agents_place_is_set_aside(make_trio):
    trio = make_trio()
    plan = plan_of({**trio.paths, "agent": trio.paths["vlm"]})
    assert {reason for _, _, reason in plan.unused} == {"vision tower and projector are the VLM's"}


def test_the_table_shows_all_layers_of_a_kind_in_one_row(make_trio):
    plan = plan_of(make_trio(torch.bfloat16).paths)
    table = format_plan(plan)
    lines = table.splitlines()
    assert lines[0].split() == ["action", "count", "shape", "dtype", "tensor", "reason"]
    row = next(line for line in lines if "mlp.gate_proj" in line)
    assert row.split()[:5] == ["obm", "2", "96x64", "BF16", "model.layers.*.mlp.gate_proj.weight"]
    counts = [int(line.split()[1]) for line in lines[1:] if ".weight" in line or ".bias" in line]
    assert sum(counts) == len(plan.tensors)
    assert any(line.endswith("copied") for line in lines)


def test_token_ids_are_compared_where_there_is_a_tokenizer(folders):
    assert any("not compared" in note for note in plan_of(folders).notes)
    for role in folders:
        content = {"model": {"vocab": {"a": 0, "b": 1}}}
        (Path(folders[role]) / "tokenizer.json").write_text(json.dumps(content))
    assert any("base and agent agree" in note for note in plan_of(folders).notes)
