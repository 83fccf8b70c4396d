"""YAML blocks of the documents load through the schema, Python blocks run."""

import json
from types import SimpleNamespace

import pytest
import yaml

from configs.reader import parse_yaml
from configs.schema import Config, load_config, shipped_config
from tests.docs.blocks import blocks, pages

FAMILIES = "my_vlm:"
"""Beginning of the block that is a file of model families, not settings."""
DIALECTS = ("my_dialect.yaml",)
"""Blocks that are dialects, by the name in their first line."""

NAMESPACES = ("docs/cast.md", "docs/merge.md", "docs/recipes.md")
"""Pages with Python blocks that use names of the reader; the tests below give them."""


STUDIES = {"axes": "ablation.yaml", "arms": "ceiling.yaml"}
"""Key of a block that is part of a study -> the shipped study that it is laid over."""


def describe_part_of_study(values, shipped, folder):
    """The plan of a shipped study with these keys in place of its own."""
    from launch.studies.file import Options, load_study
    from launch.studies.run import describe_study

    studies = shipped_config("demo").parent / "studies"
    study = yaml.safe_load((studies / shipped).read_text()) | values
    study |= {key: str((studies / study[key]).resolve()) for key in ("config", "recipes")}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return describe_study(load_study(folder / "study.yaml"), Options("obm study", []))


def yaml_blocks():
    return [block for page in pages() for block in blocks(page, "yaml")]


@pytest.mark.parametrize("block", yaml_blocks(), ids=str)
def test_settings_load_over_the_demo(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if block.text.startswith(FAMILIES):
        from merge.families import get_family

        (tmp_path / "my.yaml").write_text(block.text)
        assert get_family("my_vlm", "docs", tmp_path / "my.yaml").bases == ("qwen2",)
        return
    if block.file_name in DIALECTS:
        from environments.dialects import get_dialect

        (tmp_path / block.file_name).write_text(block.text)
        assert get_dialect(block.file_name).name == "my_dialect"
        return
    values = parse_yaml(block.text, str(block))
    for part, shipped in STUDIES.items():
        if part in values:
            described = describe_part_of_study(values, shipped, tmp_path)
            names = values["axes"] if part == "axes" else [arm["name"] for arm in values["arms"]]
            assert all(name in described for name in names)
            return
    (tmp_path / "my.yaml").write_text(shipped_config("demo").read_text())
    (tmp_path / "my_rows.yaml").write_text("inherits: my.yaml\n")
    values.setdefault("inherits", "my.yaml")
    (tmp_path / "block.yaml").write_text(yaml.safe_dump(values))
    assert isinstance(load_config("block.yaml"), Config)


def test_json_blocks_are_json():
    for page in pages():
        for block in blocks(page, "json"):
            for line in block.text.splitlines():
                assert isinstance(json.loads(line), dict), str(block)


def test_the_python_blocks_that_are_no_files_are_known():
    """Files (`# my_rewards.py`) are used by the commands around them; others run below."""
    found = {
        page for page in pages() for block in blocks(page, "python") if block.file_name is None
    }
    assert found == set(NAMESPACES)
    for page in pages():
        for block in blocks(page, "python"):
            compile(block.text, str(block), "exec")


def test_an_index_of_ones_own_in_code(trio):
    [block] = [b for b in blocks("docs/recipes.md", "python") if b.file_name is None]
    document = SimpleNamespace(id="p1", title="T", text="some words", score=1.0)
    names = {"my_service": lambda query, k: [document]}
    exec(block.text.replace("runs/mine-merged", trio["vlm"]), names)
    assert names["metrics"]["n"] == 1
    assert len(names["episodes"]) == 1


def test_statistics_in_code(trio, tmp_path, monkeypatch):
    import torch

    from train.policy import load_policy

    monkeypatch.chdir(tmp_path)
    [block] = [b for b in blocks("docs/merge.md", "python") if b.file_name is None]
    model, _ = load_policy(trio["vlm"])
    batches = [{"input_ids": torch.tensor([[3, 5, 7]]), "attention_mask": torch.ones(1, 3)}]
    names = {"model": model, "batches": batches}
    exec(block.text, names)
    moments = names["moments"].vectors()
    width = model.config.text_config.intermediate_size
    assert moments["model.layers.0.mlp.down_proj"].shape == (width,)
    assert (tmp_path / "stats" / "vlm" / "stats.safetensors").is_file()


def test_heads_of_any_trainer_are_frozen(tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from train.tiny import make_tiny_checkpoints

    [block] = blocks("docs/cast.md", "python")
    folder = make_tiny_checkpoints(tmp_path, head_dim=16)["agent"]  # four heads a layer
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    names = {"trainer": Trainer(model, arguments)}
    gated = "model.layers.1.self_attn.q_proj.weight"
    assert gated in names["trainer"].get_decay_parameter_names(model)
    exec(block.text, names)
    assert gated not in names["trainer"].get_decay_parameter_names(model)
