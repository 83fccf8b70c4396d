"""The plan accounts for every tensor of all parents, whatever their family and vocabularies."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.sections import TensorRule
from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.methods import MethodSettings
from merge.plan import format_plan, make_plan, plan_bytes
from tests.merge.pico_families import VLMS, make_models, make_text_model, save_trio

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"


def open_all(paths):
    return {role: Checkpoint(path, role) for role, path in paths.items()}


def plan_of(paths, method="obm", settings=None, **changes):
    settings = settings or MethodSettings(weights={})
    return make_plan(open_all(paths), method, settings, **changes)


def by_name(plan):
    return {tensor.canonical: tensor for tensor in plan.tensors}


def rewrite(folder: str, change) -> None:
    """Applies a function to the tensors of a one-file checkpoint."""
    path = Path(folder) / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_config(folder: str, change) -> None:
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    change(config.get("text_config", config))
    path.write_text(json.dumps(config))


def write_tokenizer(folder: str, tokens, added=()) -> None:
    """Writes tokenizer.json with (token, id) pairs."""
    entries = [{"content": token, "id": index, "special": True} for token, index in added]
    content = {"model": {"vocab": dict(tokens)}, "added_tokens": entries}
    (Path(folder) / "tokenizer.json").write_text(json.dumps(content))


def pad_rows(folder: str, n_rows: int) -> None:
    """Gives embeddings more rows, or fewer."""

    def pad(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensors[name] = tensor.new_zeros(n_rows, tensor.shape[1])
        return tensors

    rewrite(folder, pad)


@pytest.fixture
def folders(make_trio, tmp_path):
    """A tied trio in one file each, to damage."""
    paths = {}
    for role, model in make_trio().models.items():
        paths[role] = str(tmp_path / role)
        model.save_pretrained(paths[role])
    return paths


# ---------------------------------------------------------------- scope


def test_default_scope(make_trio):
    plan = plan_of(make_trio(torch.float32, tied=False).paths)
    actions = {tensor.canonical: tensor.action for tensor in plan.tensors}
    assert actions["model.layers.0.self_attn.o_proj.weight"] == "obm"
    assert actions["model.layers.1.mlp.down_proj.weight"] == "obm"
    assert actions["model.layers.1.self_attn.q_proj.bias"] == "task_arithmetic"
    assert actions["model.norm.weight"] == "task_arithmetic"
    assert actions[EMBED] == actions[HEAD] == "vlm"
    assert {tensor.action for tensor in plan.tensors if tensor.group == "vision"} == {"vlm"}
    assert all(tensor.reason for tensor in plan.tensors)
    assert plan.unused == ()


@pytest.mark.parametrize("source", ["base", "agent"])
def test_scope_can_copy_from_a_parent_or_merge_embeddings(make_trio, source):
    scope = {"norm_bias": source, "embedding": "task_arithmetic", "linear": None}
    plan = plan_of(make_trio().paths, method="ties", scope=scope)
    actions = {tensor.group: tensor.action for tensor in plan.tensors}
    assert actions == {
        "linear": "ties",
        "norm_bias": source,
        "embedding": "task_arithmetic",
        "vision": "vlm",
    }


@pytest.mark.parametrize("method", ["obm", "regmean_diagonal", "regmean", "wudi"])
def test_methods_for_matrices_are_refused_elsewhere(make_trio, method):
    paths = make_trio().paths
    for group in ("norm_bias", "embedding"):
        with pytest.raises(MergeError, match=rf"merge\.scope\.{group}: {method} weighs a matrix"):
            plan_of(paths, scope={group: method})
    rule = {"match": r"layers\.0", "method": method}
    with pytest.raises(MergeError, match=r"rules\[0\]\.method .*norm_bias tensors do not have"):
        plan_of(paths, "ties", rules=[rule])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "obn"}, r"merge\.method: 'obn' is unknown"),
        ({"scope": {"vision": "vlm"}}, r"merge\.scope\.vision: is unknown"),
        ({"scope": {"linear": "x"}}, r"merge\.scope\.linear: 'x' is unknown"),
        ({"vocabulary": "union"}, r"merge\.vocabulary: 'union' is unknown; choose equal"),
        ({"settings": MethodSettings(weights={"agnt": 1})}, r"merge\.weights\.agnt: is no model"),
        ({"rules": [{"match": "("}]}, r"rules\[0\]\.match: is not a regular expression"),
        ({"rules": [{"density": 1}]}, r"rules\[0\]\.match: is not a regular expression"),
        ({"rules": [{"match": "q_proj"}]}, r"rules\[0\]: sets nothing"),
        ({"rules": [{"match": "q_proj", "dens": 1}]}, r"rules\[0\]\.dens: is unknown; use match"),
        ({"rules": [{"match": "q_proj", "density": 2}]}, r"rules\[0\]\.density: 2 is out of range"),
        ({"rules": [{"match": "q", "combine": "x"}]}, r"rules\[0\]\.combine: 'x' is unknown"),
        ({"rules": [{"match": "q", "method": "x"}]}, r"rules\[0\]\.method .*'x' is unknown"),
        ({"rules": [{"match": "q", "weights": {"base": 1}}]}, r"weights\.base: is no model"),
        ({"rules": [{"match": r"visual\.", "density": 1}]}, r"rules\[0\]\.match: .*finds no ten"),
    ],
)
def test_a_faulty_setting_names_key_and_fix(make_trio, changes, message):
    with pytest.raises(MergeError, match=message):
        plan_of(make_trio().paths, **changes)


# ---------------------------------------------------------------- rules and donors


def test_rules_change_settings_by_tensor_name_and_the_last_that_sets_a_key_decides(make_trio):
    rules = [
        asdict(TensorRule(match="self_attn", density=0.2, weights={"agent": 0.5})),
        asdict(TensorRule(match=r"layers\.1\..*q_proj\.weight", density=0.9, method="ties")),
    ]
    settings = MethodSettings(weights={"vlm": 1.0, "agent": 2.0}, density=0.4, seed=3)
    tensors = by_name(plan_of(make_trio().paths, settings=settings, rules=rules))
    first = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert first.action == "obm"
    assert (first.settings.density, first.settings.seed) == (0.2, 3)
    assert first.settings.weights == {"vlm": 1.0, "agent": 0.5}
    assert first.settings.tensor_name == first.canonical
    assert "merge.rules[0]: density 0.2, weight of agent 0.5" in first.reason
    second = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert (second.action, second.settings.density) == ("ties", 0.9)
    assert second.settings.weights == {"vlm": 1.0, "agent": 0.5}
    other = tensors["model.layers.1.mlp.up_proj.weight"]
    assert (other.action, other.settings.density) == ("obm", 0.4)


def test_a_rule_can_copy_from_a_parent(make_trio):
    rules = [{"match": r"layers\.1\.", "method": "agent"}]
    tensors = by_name(plan_of(make_trio().paths, rules=rules))
    for canonical, tensor in tensors.items():
        assert (tensor.action == "agent") == canonical.startswith("model.layers.1."), canonical


def test_donors_are_merged_beside_the_agent(make_trio):
    trio = make_trio()
    paths = {**trio.paths, "reasoner": trio.paths["agent"], "coder": trio.paths["base"]}
    settings = MethodSettings(weights={"coder": 0.25})
    plan = plan_of(paths, settings=settings)
    tensor = by_name(plan)[Q]
    assert list(tensor.sources) == ["base", "vlm", "agent", "reasoner", "coder"]
    assert set(tensor.sources.values()) == {Q}
    weights = {"vlm": 1.0, "agent": 1.0, "reasoner": 1.0, "coder": 0.25}
    assert tensor.settings.weights == weights
    assert "task vectors: vlm x 1, agent x 1, reasoner x 1, coder x 0.25" in plan.notes
    vision = next(t for t in plan.tensors if t.group == "vision")
    assert vision.sources == {"vlm": vision.name}


def test_a_donor_of_another_base_is_an_error(make_trio, tmp_path):
    make_text_model("qwen3").save_pretrained(tmp_path / "coder")
    paths = {**make_trio().paths, "coder": str(tmp_path / "coder")}
    with pytest.raises(MergeError, match=r"coder .*model of qwen3, the VLM's .*is one of qwen2;"):
        plan_of(paths)


# ---------------------------------------------------------------- layer swap


def test_layer_swap_copies_listed_layers_from_the_agent_and_all_else_from_the_vlm(make_trio):
    settings = MethodSettings(weights={}, layers="1")
    scope = {"norm_bias": "layer_swap", "embedding": "layer_swap"}
    plan = plan_of(make_trio().paths, "layer_swap", settings, scope=scope)
    for canonical, tensor in by_name(plan).items():
        expected = "agent" if canonical.startswith("model.layers.1.") else "vlm"
        assert tensor.action == expected, canonical
    table = format_plan(plan)
    assert "model.layers.{1}.mlp.up_proj.weight" in table
    assert "scope linear: layer_swap, copied from agent" in table


def test_layer_swap_leaves_groups_with_another_action_alone(make_trio):
    settings = MethodSettings(weights={}, layers="0-1")
    tensors = by_name(plan_of(make_trio().paths, "layer_swap", settings))
    assert tensors[Q].action == "agent"
    assert tensors[NORM].action == "task_arithmetic"


@pytest.mark.parametrize(
    ("layers", "message"),
    [("", "names no layers"), ("a", "names no layers"), ("1-0", "range"), ("1,2", "2 is out of")],
)
def test_layers_that_are_not_there_are_an_error(make_trio, layers, message):
    settings = MethodSettings(weights={}, layers=layers)
    with pytest.raises(MergeError, match=rf"merge\.layers: .*{message}"):
        plan_of(make_trio().paths, "layer_swap", settings)


def test_a_copy_from_the_agent_needs_one(make_trio):
    paths = {role: make_trio().paths[role] for role in ("base", "vlm")}
    with pytest.raises(MergeError, match=r"copied from agent, which this merge does not have"):
        plan_of(paths, scope={"norm_bias": "agent"})


# ---------------------------------------------------------------- families


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vlm_type", sorted(VLMS))
def test_a_trio_of_every_family_is_planned(vlm_type, tied, tmp_path):
    models = make_models(vlm_type, tied=tied)
    paths = save_trio(models, tmp_path)
    plan = plan_of(paths, scope={"embedding": "task_arithmetic"})
    tensors = by_name(plan)
    assert plan.unused == ()
    assert {t.name for t in plan.tensors} == set(Checkpoint(paths["vlm"], "vlm").tensors)
    assert (HEAD in tensors) is not tied
    language = models["base"].state_dict()
    for canonical, tensor in tensors.items():
        if tensor.group == "vision":
            assert tensor.sources == {"vlm": tensor.name}
        else:
            names = {"base": canonical, "vlm": tensor.name, "agent": canonical}
            assert tensor.sources == names
            assert tensor.shape == tuple(language[canonical].shape)


def test_text_models_alone_are_planned_by_the_same_call(tmp_path):
    plan = plan_of(save_trio(make_models("llama"), tmp_path))
    assert {tensor.group for tensor in plan.tensors} == {"linear", "norm_bias", "embedding"}


def test_a_vlm_saved_with_the_names_it_has_in_memory_is_planned(folders):
    models = make_models("qwen2_5_vl")
    paths = {role: folders[role] for role in models}
    save_trio(models, Path(folders["vlm"]).parent)
    rewrite(paths["vlm"], lambda _: dict(models["vlm"].state_dict()))
    tensor = by_name(plan_of(paths))[Q]
    assert tensor.name == tensor.sources["vlm"] == Q.replace("model.", "model.language_model.")
    assert tensor.sources["agent"] == Q


def test_a_llava_around_another_text_model_than_the_agents_is_an_error(tmp_path):
    paths = save_trio(make_models("llava"), tmp_path)
    make_text_model("mistral").save_pretrained(tmp_path / "mistral")
    with pytest.raises(MergeError, match=r"agent .*of mistral, .*is one of llama"):
        plan_of({**paths, "agent": str(tmp_path / "mistral")})


def test_a_users_family_is_planned(make_trio, tmp_path):
    folder = tmp_path / "vlm"
    make_trio().models["vlm"].save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "my_vl"}))
    paths = {**make_trio().paths, "vlm": str(folder)}
    with pytest.raises(MergeError, match="'my_vl' is not supported"):
        plan_of(paths)
    families = tmp_path / "families.yaml"
    families.write_text(
        "my_vl:\n"
        "  bases: [qwen2]\n"
        "  language_module: model.language_model\n"
        "  layouts: {disk: {language: model., head: lm_head., vision: visual.}}\n"
        "  tower: [patch_embed., blocks.]\n"
        "  projector: [merger.]\n"
    )
    assert plan_of(paths, families=families) == plan_of(make_trio().paths)


def test_buffers_that_old_versions_stored_are_left_alone(tmp_path):
    paths = save_trio(make_models("llama"), tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(paths["agent"], lambda tensors: {**tensors, name: torch.ones(16)})
    assert plan_of(paths).unused == (("agent", name, "computed anew on loading"),)
    rewrite(paths["vlm"], lambda tensors: {**tensors, name: torch.ones(16)})
    tensor = by_name(plan_of(paths))[name]
    assert (tensor.action, tensor.sources) == ("vlm", {"vlm": name})


def test_other_bases_of_the_rotary_embedding_are_an_error(tmp_path):
    paths = save_trio(make_models("gemma3"), tmp_path)

    def turn(config):
        config["rope_parameters"]["sliding_attention"]["rope_theta"] = 20000.0

    edit_config(paths["agent"], turn)
    with pytest.raises(MergeError, match=r"agent .*rope_theta of sliding_attention is 20000\.0"):
        plan_of(paths)

    def as_on_the_hub(config):
        del config["rope_parameters"]
        config |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}

    edit_config(paths["agent"], as_on_the_hub)
    assert plan_of(paths)
    edit_config(paths["agent"], lambda config: config.update(rope_theta=500000.0))
    with pytest.raises(MergeError, match=r"rope_theta of full_attention is 500000\.0"):
        plan_of(paths)


def test_the_sections_of_m_rope_are_no_difference_and_are_noted(make_trio):
    notes = plan_of(make_trio().paths).notes
    assert "M-RoPE: the VLM's sections [4, 6, 6] are kept" in notes


# ---------------------------------------------------------------- nothing unaccounted for


def test_a_tied_lm_head_of_base_and_agent_stands_in_for_an_untied_one(make_trio):
    tied = make_trio(torch.float32, tied=True)
    untied = make_trio(torch.float32, tied=False)
    paths = {**tied.paths, "vlm": untied.paths["vlm"]}
    head = by_name(plan_of(paths, scope={"embedding": "task_arithmetic"}))[HEAD]
    assert head.sources == {"base": EMBED, "vlm": HEAD, "agent": EMBED}


def test_an_lm_head_that_the_vlm_ties_is_set_aside_or_refused(make_trio):
    tied = make_trio(torch.float32, tied=True)
    untied = make_trio(torch.float32, tied=False)
    paths = {**untied.paths, "vlm": tied.paths["vlm"]}
    plan = plan_of(paths)
    assert [(role, name) for role, name, _ in plan.unused] == [("base", HEAD), ("agent", HEAD)]
    with pytest.raises(MergeError, match=r"scope\.embedding=vlm"):
        plan_of(paths, scope={"embedding": "task_arithmetic"})


def test_a_stored_copy_of_a_tied_lm_head_is_accounted_for(folders):
    rewrite(folders["agent"], lambda tensors: {**tensors, HEAD: tensors[EMBED].clone()})
    plan = plan_of(folders, scope={"embedding": "task_arithmetic"})
    assert plan.unused == (("agent", HEAD, "a copy of embed_tokens"),)
    assert "lm_head: tied to embed_tokens, not stored" in plan.notes


@pytest.mark.parametrize("role", ["base", "agent"])
def test_a_tensor_that_a_parent_lacks_is_an_error(folders, role):
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(folders[role], lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(MergeError, match=f"{name}: the VLM has it, {role} .* does not"):
        plan_of(folders)


def test_a_tensor_that_the_vlm_lacks_is_an_error(folders):
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(folders["vlm"], lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(MergeError, match=f"{name}: base .* has it, the VLM does not"):
        plan_of(folders)


def test_a_tensor_that_nobody_knows_is_an_error(folders):
    rewrite(folders["agent"], lambda tensors: {**tensors, "value_head.weight": torch.ones(1)})
    with pytest.raises(MergeError, match=r"agent .*value_head\.weight is not part of qwen2"):
        plan_of(folders)


def test_the_same_tensor_in_both_layouts_is_an_error(folders):
    rewrite(
        folders["vlm"],
        lambda tensors: {**tensors, "model.language_model.norm.weight": torch.ones(64)},
    )
    with pytest.raises(MergeError, match="are the same tensor"):
        plan_of(folders)


def test_another_shape_is_an_error(folders):
    rewrite(folders["agent"], lambda tensors: {**tensors, NORM: torch.ones(32)})
    with pytest.raises(MergeError, match=rf"{NORM}: agent .*shape \[32\], the VLM \[64\]"):
        plan_of(folders)


def test_quantised_weights_are_an_error_where_they_are_merged(folders):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folders["agent"], lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(MergeError, match="is I8; merging needs"):
        plan_of(folders)
    assert plan_of(folders, scope={"linear": "vlm"})


def test_the_vision_tower_of_a_vlm_in_the_agents_place_is_set_aside(make_trio):
    trio = make_trio()
    plan = plan_of({**trio.paths, "agent": trio.paths["vlm"]})
    assert {reason for _, _, reason in plan.unused} == {"vision tower and projector are the VLM's"}


# ---------------------------------------------------------------- vocabularies


def test_rows_may_differ_where_embeddings_are_the_vlms_which_decides_on_the_size(folders):
    pad_rows(folders["base"], 60)
    pad_rows(folders["agent"], 70)
    plan = plan_of(folders)
    embed = by_name(plan)[EMBED]
    assert (embed.action, embed.shape, embed.n_common_rows) == ("vlm", (64, 64), None)
    assert any(
        note.startswith("vocabulary: base 60, agent 70 rows, the VLM 64, which the output keeps")
        for note in plan.notes
    )


def test_merged_embeddings_with_other_rows_need_a_choice(folders):
    pad_rows(folders["agent"], 70)
    message = rf"{EMBED}: agent has 70 rows, the VLM 64: .*scope\.embedding=vlm.*=common.*=protect"
    with pytest.raises(MergeError, match=message):
        plan_of(folders, scope={"embedding": "ties"})
    with pytest.raises(MergeError, match="agent has 70 rows"):
        plan_of(folders, scope={"embedding": "agent"})
    # the base has the VLM's rows, and the agent's do not matter to a copy of it
    assert by_name(plan_of(folders, scope={"embedding": "base"}))[EMBED].action == "base"


@pytest.mark.parametrize(
    ("n_base", "n_agent", "common"), [(60, 70, 60), (70, 64, 64), (64, 64, None)]
)
def test_common_rows_are_those_that_all_parents_have(folders, n_base, n_agent, common):
    pad_rows(folders["base"], n_base)
    pad_rows(folders["agent"], n_agent)
    plan = plan_of(folders, scope={"embedding": "ties"}, vocabulary="common")
    embed = by_name(plan)[EMBED]
    assert embed.n_common_rows == common
    assert embed.protected_rows == ()
    assert ("first 60 of 64 rows" in embed.reason) == (common == 60)


def test_protect_spares_the_special_tokens_of_the_vlm_among_the_common_rows(folders):
    tokens = [("a", 0), ("b", 1)]
    special = [("<image>", 62), ("<|end|>", 3), ("<pad>", 61)]
    write_tokenizer(folders["vlm"], tokens, special)
    pad_rows(folders["agent"], 62)
    plan = plan_of(folders, scope={"embedding": "ties"}, vocabulary="protect")
    embed = by_name(plan)[EMBED]
    assert (embed.n_common_rows, embed.protected_rows) == (62, (3, 61))
    assert "first 62 of 64 rows, 2 rows of special tokens stay the VLM's" in embed.reason


def test_protect_needs_the_vlms_tokenizer_and_merged_embeddings(folders):
    with pytest.raises(MergeError, match=r"protect needs the VLM's tokenizer\.json"):
        plan_of(folders, scope={"embedding": "ties"}, vocabulary="protect")
    with pytest.raises(MergeError, match="protect is for merged embeddings"):
        plan_of(folders, scope={"embedding": "base"}, vocabulary="protect")
    assert plan_of(folders, vocabulary="protect")  # nothing merged, nothing to protect


def test_token_ids_are_compared_where_there_is_a_tokenizer(folders):
    assert any("not compared" in note for note in plan_of(folders).notes)
    for role in folders:
        write_tokenizer(folders[role], [("a", 0), ("b", 1)])
    assert any("base and agent agree" in note for note in plan_of(folders).notes)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([("a", 1), ("b", 0)], "token 'a' has id 1, in the VLM 0: the vocabularies differ"),
        ([("a", 0), ("c", 1)], "token 'c' has id 1, in the VLM that id is 'b'"),
    ],
)
def test_other_ids_of_ordinary_tokens_are_an_error_even_where_embeddings_are_the_vlms(
    folders, tokens, message
):
    write_tokenizer(folders["vlm"], [("a", 0), ("b", 1)])
    write_tokenizer(folders["agent"], tokens)
    with pytest.raises(MergeError, match=message) as raised:
        plan_of(folders)
    assert str(raised.value).startswith(f"{folders['agent']}/tokenizer.json: ")


@pytest.mark.parametrize(
    ("vlm", "agent", "rows"),
    [
        ([("<image>", 5)], [("<tool>", 5)], (5,)),  # two names for one id
        ([("<x>", 5)], [("<x>", 6)], (5, 6)),  # two ids for one name
        ([("<x>", 5)], [], ()),  # added by one side, a free row to the other
        ([("<x>", 5)], [("<y>", 6)], ()),
    ],
)
def test_special_tokens_that_differ_are_noted_and_their_rows_kept(folders, vlm, agent, rows):
    write_tokenizer(folders["vlm"], [("a", 0), ("b", 1)], vlm)
    write_tokenizer(folders["agent"], [("a", 0), ("b", 1)], agent)
    notes = "\n".join(plan_of(folders).notes)
    listed = ", ".join(map(str, rows))
    assert (f"other special tokens in agent at ids {listed}" in notes) == bool(rows)
    scope = {"embedding": "ties"}
    embed = by_name(plan_of(folders, scope=scope, vocabulary="common"))[EMBED]
    assert embed.protected_rows == rows
    if rows:
        with pytest.raises(MergeError, match=rf"{EMBED}: ids {listed} are other special tokens"):
            plan_of(folders, scope=scope)
    else:
        assert plan_of(folders, scope=scope)


def test_a_special_token_in_the_place_of_an_ordinary_one_is_no_other_vocabulary(folders):
    ordinary, special = [("a", 0), ("b", 1)], [("<tool>", 1)]
    for vlm, agent in (
        ((ordinary, ()), ([("a", 0)], special)),
        (([("a", 0)], special), (ordinary, ())),
    ):
        write_tokenizer(folders["vlm"], *vlm)
        write_tokenizer(folders["agent"], *agent)
        assert "other special tokens in agent at ids 1" in "\n".join(plan_of(folders).notes)


def test_a_unigram_tokenizer_lists_its_tokens_in_order(folders):
    for role, names in (("vlm", "ab"), ("agent", "ba")):
        content = {"model": {"vocab": [[name, -1.0] for name in names]}}
        (Path(folders[role]) / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeError, match="token 'b' has id 0"):
        plan_of(folders)


def test_a_broken_tokenizer_is_named(folders):
    for text in ("{", "[]", '{"model": {}}'):
        (Path(folders["vlm"]) / "tokenizer.json").write_text(text)
        with pytest.raises(MergeError, match=r"tokenizer\.json: is not a tokenizer file"):
            plan_of(folders)


def test_a_tokenizer_that_cannot_be_read_is_named(folders):
    path = Path(folders["vlm"]) / "tokenizer.json"
    path.mkdir()
    with pytest.raises(MergeError, match=r"tokenizer\.json: cannot be read \(Is a directory\)"):
        plan_of(folders)


# ---------------------------------------------------------------- table and estimates


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


def test_the_table_shows_layers_that_fare_differently_in_rows_of_their_own(tmp_path):
    models = make_models("qwen2", num_hidden_layers=6)
    rules = [{"match": r"layers\.[0235]\..*up_proj", "density": 0.1}]
    lines = format_plan(plan_of(save_trio(models, tmp_path), rules=rules)).splitlines()
    rows = {line.split()[4]: line for line in lines if "up_proj" in line}
    assert set(rows) == {
        f"model.layers.{{{some}}}.mlp.up_proj.weight" for some in ("0,2-3,5", "1,4")
    }
    assert rows["model.layers.{0,2-3,5}.mlp.up_proj.weight"].endswith("merge.rules[0]: density 0.1")


def test_bytes_to_read_and_write(make_trio):
    # 64 tokens x 64 in bf16 is 8192 bytes, and the largest; gate_proj is 96 x 64
    paths = make_trio(torch.bfloat16).paths
    parents = open_all(paths)
    sizes = {
        role: {name: info.n_bytes for name, info in parent.tensors.items()}
        for role, parent in parents.items()
    }
    scope = {"linear": "vlm", "norm_bias": "agent"}
    plan = plan_of(paths, scope=scope)
    total = sum(sizes["vlm"].values())
    norms = [t.name for t in plan.tensors if t.action == "agent"]
    assert norms
    assert all(sizes["vlm"][name] == sizes["agent"][name] for name in norms)
    expected = {"read": total, "written": total, "largest_tensor": max(sizes["vlm"].values())}
    assert plan_bytes(plan, parents) == expected
    merged = plan_bytes(plan_of(paths), parents)
    text = sum(sizes["base"].values()) - sizes["base"][EMBED]
    assert merged["read"] == total + 2 * text
    assert merged["written"] == total


def test_rows_that_are_not_merged_are_read_from_the_vlm_alone(folders):
    scope = {"embedding": "ties"}
    before = plan_bytes(plan_of(folders, scope=scope), open_all(folders))
    pad_rows(folders["agent"], 60)
    plan = plan_of(folders, scope=scope, vocabulary="common")
    # base and agent: 4 rows of 64 fp32 less each
    assert plan_bytes(plan, open_all(folders))["read"] == before["read"] - 2 * 4 * 64 * 4
    pad_rows(folders["agent"], 1000)
    plan = plan_of(folders, scope=scope, vocabulary="common")
    assert plan_bytes(plan, open_all(folders)) == before
