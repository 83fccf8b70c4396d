"""Every family's names: real tiny models, saved and in memory, and what a user's file may say."""

import pytest

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import (
    EMBED_TOKENS,
    LM_HEAD,
    VISION_PREFIX,
    canonical_name,
    get_family,
    group_of,
    is_projector,
    layer_of,
    load_families,
)
from tests.merge.pico_families import (
    TEXT_MODELS,
    VLMS,
    make_models,
    make_text_model,
    make_vlm,
    save_trio,
)

FAMILIES = load_families()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders and models of each family, made once; tests must not change them."""
    made = {}

    def save(model_type):
        if model_type not in made:
            models = make_models(model_type)
            folders = save_trio(models, tmp_path_factory.mktemp(model_type))
            made[model_type] = (models, folders)
        return made[model_type]

    return save


def names_of(family, names):
    return {canonical_name(family, name): name for name in names}


def stored_name(family, canonical, layout):
    """The reverse of `canonical_name`: a tensor's name on disk or in memory."""
    prefixes = family.layouts.get(layout, family.layouts["disk"])
    for begin, stored in ((VISION_PREFIX, prefixes.vision), ("lm_head.", prefixes.head)):
        if canonical.startswith(begin):
            return stored + canonical.removeprefix(begin)
    return prefixes.language + canonical.removeprefix("model.")


def test_every_family_has_a_pico_model():
    assert {*VLMS, *TEXT_MODELS} == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_names_on_disk_and_in_memory_have_the_same_canonical_names(saved, model_type):
    models, folders = saved(model_type)
    family = FAMILIES[model_type]
    on_disk = names_of(family, Checkpoint(folders["vlm"], "vlm").tensors)
    in_memory = names_of(family, models["vlm"].state_dict())
    assert set(on_disk) == set(in_memory)
    assert None not in on_disk
    assert None not in {group_of(family, canonical) for canonical in on_disk}
    for layout, names in (("disk", on_disk), ("memory", in_memory)):
        back = {canonical: stored_name(family, canonical, layout) for canonical in names}
        assert back == names


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_language_module_has_the_canonical_names_of_its_base(saved, model_type):
    models, folders = saved(model_type)
    family = FAMILIES[model_type]
    canonical = names_of(family, Checkpoint(folders["vlm"], "vlm").tensors)
    language = {name for name in canonical if group_of(family, name) != "vision"}
    assert language == set(Checkpoint(folders["base"], "base").tensors)
    assert {EMBED_TOKENS, LM_HEAD, "model.norm.weight"} <= language
    module = models["vlm"].get_submodule(family.language_module)
    assert {f"model.{name}" for name in module.state_dict()} == language - {LM_HEAD}
    assert len(module.layers) == 2


@pytest.mark.parametrize(
    ("vlm_type", "base"),
    [
        (name, base)
        for name in sorted(VLMS)
        for base in FAMILIES[name].bases
        if base != VLMS[name][2]
    ],
)
def test_the_language_module_can_be_of_any_base_that_the_family_names(vlm_type, base):
    changes = {"model_type": base, **TEXT_MODELS[base][2]}
    names = names_of(FAMILIES[vlm_type], make_vlm(vlm_type, **changes).state_dict())
    groups = {name: group_of(FAMILIES[vlm_type], name) for name in names}
    language = {name: group for name, group in groups.items() if group != "vision"}
    text = make_text_model(base).state_dict()
    assert language == {name: group_of(FAMILIES[base], name) for name in text}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_linears_are_the_matrices_of_the_decoder_layers(saved, model_type):
    models, _ = saved(model_type)
    family = FAMILIES[model_type]
    for name, parameter in models["vlm"].state_dict().items():
        canonical = canonical_name(family, name)
        is_matrix = layer_of(canonical) is not None and parameter.ndim == 2
        assert (group_of(family, canonical) == "linear") == is_matrix, name


@pytest.mark.parametrize("model_type", sorted(VLMS))
def test_vision_tower_and_projector_are_all_that_is_outside_the_language_module(saved, model_type):
    models, _ = saved(model_type)
    family = FAMILIES[model_type]
    language = {id(p) for p in models["vlm"].get_submodule(family.language_module).parameters()}
    language.add(id(models["vlm"].lm_head.weight))
    vision = {
        canonical_name(family, name): parameter
        for name, parameter in models["vlm"].named_parameters()
        if group_of(family, canonical_name(family, name)) == "vision"
    }
    assert {id(parameter) for parameter in vision.values()} == {
        id(parameter) for parameter in models["vlm"].parameters()
    } - language
    parts = {is_projector(family, canonical) for canonical in vision}
    assert parts == {True, False}


def test_inputs_are_watched_at_linears_that_share_them(saved):
    for model_type in FAMILIES:
        family = FAMILIES[model_type]
        sharing = [name for names in family.input_sites.values() for name in names]
        assert len(sharing) == len(set(sharing)) == 7
        assert all(site in names for site, names in family.input_sites.items())


@pytest.mark.parametrize(
    ("model_type", "name", "canonical"),
    [
        ("llava", "language_model.lm_head.weight", "lm_head.weight"),
        ("llava", "language_model.model.norm.weight", "model.norm.weight"),
        (
            "llava",
            "vision_tower.vision_model.pre_layrnorm.bias",
            "visual.vision_tower.vision_model.pre_layrnorm.bias",
        ),
        ("llava_next", "image_newline", "visual.image_newline"),
        ("qwen2_vl", "model.visual.blocks.0.norm1.bias", "visual.blocks.0.norm1.bias"),
        ("qwen3_vl", "model.visual.pos_embed.weight", "visual.pos_embed.weight"),
        ("smolvlm", "model.text_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("qwen2_5_vl", "visual.adapter.weight", None),
        ("idefics3", "model.layers.0.mlp.up_proj.weight", None),
    ],
)
def test_names_as_on_the_hub(model_type, name, canonical):
    assert canonical_name(FAMILIES[model_type], name) == canonical


def test_the_deepstack_mergers_of_qwen3_vl_belong_to_the_projector():
    family = FAMILIES["qwen3_vl"]
    name = "model.visual.deepstack_merger_list.0.norm.weight"
    assert group_of(family, canonical_name(family, name)) == "vision"
    assert is_projector(family, canonical_name(family, name))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.11.self_attn.o_proj.weight", "linear"),
        ("model.layers.11.self_attn.o_proj.bias", "norm_bias"),
        ("model.layers.0.mlp.down_proj.bias", "norm_bias"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "buffer"),
        ("model.layers.0.self_attn.q_norm.weight", None),  # Qwen2 has none
        ("model.layers.0.mlp.up_proj.weight_scale", None),
        ("model.layers.0.mlp.experts.0.up_proj.weight", None),
    ],
)
def test_groups_of_a_text_model(name, group):
    assert group_of(FAMILIES["qwen2"], name) == group


def test_layer_of():
    assert layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert layer_of("model.norm.weight") is layer_of("visual.blocks.3.norm1.weight") is None


# ---------------------------------------------------------------- a user's file

OWN = """
tiny_text:
  norms: [pre_norm, post_norm]
tiny_vl:
  bases: [tiny_text]
  language_module: model.text
  layouts:
    disk: {language: text., head: text.head., vision: eyes.}
  tower: [lens.]
  projector: [bridge.]
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text):
        path = tmp_path / "families.yaml"
        path.write_text(text)
        return path

    return write_file


def test_a_users_file_adds_a_family(write):
    path = write(OWN)
    family = get_family("tiny_vl", "vlm x", path)
    assert canonical_name(family, "text.head.weight") == LM_HEAD
    assert canonical_name(family, "eyes.bridge.up.weight") == "visual.bridge.up.weight"
    assert group_of(family, "model.layers.0.pre_norm.weight") == "norm_bias"
    assert group_of(family, "model.layers.0.input_layernorm.weight") is None
    assert get_family("qwen2", "base x", path) == FAMILIES["qwen2"]


def test_an_unknown_architecture_names_the_known_ones_and_the_setting():
    with pytest.raises(MergeError, match=r"vlm x: model_type 'blip' .*qwen2_vl.*merge\.families"):
        get_family("blip", "vlm x")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tower: [lens.]", "tower: lens.", r"tiny_vl\.tower: is 'lens\.'; write a list"),
        ("  tower: [lens.]\n", "", r"tiny_vl\.tower: is missing"),
        ("bases: [tiny_text]", "bases: [nothing]", r"tiny_vl\.bases: 'nothing' is no text family"),
        ("bases: [tiny_text]", "bases: [qwen2_vl]", r"'qwen2_vl' is no text family"),
        ("language_module: model.text", "module: x", r"tiny_vl\.module: is unknown; use bases"),
        ("  language_module: model.text\n", "", r"tiny_vl\.language_module: is missing"),
        ("head: text.head., ", "", r"tiny_vl\.layouts\.disk\.head: is missing"),
        ("vision: eyes.", "visoin: eyes.", r"layouts\.disk\.visoin: is unknown"),
        ("    disk:", "    dsk:", r"tiny_vl\.layouts: has to hold 'disk'"),
        ("  norms: [pre_norm, post_norm]", "  norms: [1]", r"tiny_text\.norms: is 1; write text"),
        ("\n  norms: [pre_norm, post_norm]", " 3", r"tiny_text: is 3; write 'key: value'"),
        ("tiny_text:", "3:", r"3: a key must be text; put it in quotes"),
        ("  norms:", "  3: x\n  norms:", r"tiny_text\.3: a key must be text"),
        ("disk: {", "disk: {3: x, ", r"tiny_vl\.layouts\.disk\.3: a key must be text"),
        ("tiny_text:", "text_defaults: 3\ntiny_text:", r"text_defaults: is 3; write 'key: value'"),
        (OWN, "text_defaults: {language_module: [a]}", r"language_module: is \['a'\]; write text"),
        (OWN, "text_defaults: {norm: [a]}", r"text_defaults\.norm: is unknown"),
        ("  norms:", "  norms: [a]\n  norms:", r".*key 'norms' appears twice.* line 4"),
        ("tiny_text:", "tiny_text: {}\ntiny_text:", r".*key 'tiny_text' appears twice"),
    ],
)
def test_a_faulty_users_file_names_file_key_and_fix(write, old, new, message):
    path = write(OWN.replace(old, new))
    with pytest.raises(MergeError, match=message) as raised:
        load_families(path)
    assert str(raised.value).startswith(f"{path}:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- a", "has no families"),
        (None, "cannot be read"),
        ("a: 2020-99-99", "is not valid YAML .a value does not fit its tag: .*; correct it"),
        ("a: !!int b", "a value does not fit its tag"),
        ("a: !!bool b", "a value does not fit its tag"),
        ("a: !!timestamp b", "a value does not fit its tag"),
        ("a: " + "9" * 5000, "a value does not fit its tag"),
        ("a: " + "[" * 3000, "is not valid YAML .*recursion"),
        ("? [a]\n: 1", "found unhashable key"),
        ("a: \0", "special characters are not allowed"),
    ],
)
def test_a_file_that_is_no_list_of_families(write, tmp_path, text, message):
    path = tmp_path / "gone.yaml" if text is None else write(text)
    with pytest.raises(MergeError, match=message):
        load_families(path)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x.yaml", "a\0b.yaml"])
def test_a_path_that_no_file_can_have_is_one_error(path):
    with pytest.raises(MergeError, match=r"cannot be read \(.*\); check the path"):
        load_families(path)
