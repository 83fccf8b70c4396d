"""A checkpoint folder that cannot become a policy is one error, and none of its code is run."""

import json
import shutil

import pytest
from transformers import AutoConfig

from train.policy import PolicyLoadError, load_policy


@pytest.fixture
def folder(tiny_checkpoints, tmp_path):
    return shutil.copytree(tiny_checkpoints["vlm"], tmp_path / "vlm")


def change(path, **values):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **values}))


def test_weights_that_are_cut_short_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PolicyLoadError, match=r"vlm: the weights cannot be read .*copy the check"):
        load_policy(folder)


def test_weights_of_other_sizes_are_named(folder):
    settings = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", text_config={**settings["text_config"], "vocab_size": 4096})
    with pytest.raises(PolicyLoadError, match="vlm: the weights cannot be read"):
        load_policy(folder)


def test_a_missing_tensor_is_not_drawn_at_random(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    name = b"visual.blocks.0.attn.qkv.weight"
    assert content.count(name) == 1
    path.write_bytes(content.replace(name, name.replace(b"qkv", b"qkw")))
    with pytest.raises(PolicyLoadError, match=r"vlm: has no weights .*attn\.qkv\.weight; copy"):
        load_policy(folder)


@pytest.mark.parametrize("values", [{"model_type": "evil"}, {"text_config": "x"}])
def test_settings_that_no_model_has_are_named(folder, values):
    change(folder / "config.json", **values)
    with pytest.raises(PolicyLoadError, match=r"vlm: .* cannot be read \("):
        load_policy(folder)


def test_code_that_comes_with_a_checkpoint_is_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Config: pass\n"
    )
    change(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(PolicyLoadError, match="cannot be read"):
        load_policy(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_the_place_of_the_weights_is_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(PolicyLoadError, match=r"the weights cannot be read .*safetensors"):
        load_policy(folder)


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "gemma3"])
def test_a_vision_language_model_that_can_only_be_merged_is_refused_by_name(tmp_path, model_type):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    words = f"{model_type} can be merged, but not evaluated or trained here; .* qwen2_vl, "
    with pytest.raises(PolicyLoadError, match=words):
        load_policy(tmp_path)
