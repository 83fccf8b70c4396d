"""LoRA from the settings, a frozen vision tower, and the adapter back in the weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from configs.errors import ConfigError
from configs.schema import load_config
from configs.sections import Lora
from launch.cli import main
from merge import families
from merge.adapter import find_adapter, merge_adapter
from merge.errors import MergeError
from merge.journal import hold_folder, let_go
from merge.verify import verify_folder
from tests.merge.folders import flip_byte
from train.adapter import freeze_vision, make_lora
from train.given import check_start
from train.policy import PolicyLoadError, load_policy
from train.run import run_training

SETTINGS = """
output: {output}
seed: 1
models: {{init: {init}}}
environment: {{train_size: 16, eval_size: 4, kinds: [two, text], eval_kinds: [two, text]}}
grpo:
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 60
  generation_kwargs: {{max_new_tokens: 12}}
  max_steps: 2
  save_steps: 1
  save_total_limit: null
  entropy_coef: 0.05
  learning_rate: 1.0e-2
compare: {{eval_every: 2}}
tracking: {{wandb: disabled}}
"""


@pytest.fixture
def save_adapter(tiny_checkpoints, tmp_path):
    """A random adapter on the tiny VLM, saved by peft; its product is not zero."""

    def save(settings=None, **changes):
        model, _ = load_policy(tiny_checkpoints["vlm"])
        wrapped = get_peft_model(model, settings or make_lora(model, Lora(r=3, alpha=5.0)))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        folder = tmp_path / "adapter"
        wrapped.save_pretrained(folder)
        if changes:
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return save


def logits_of(model):
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("stabilised", [False, True], ids=["alpha / r", "alpha / sqrt(r)"])
def test_the_merged_policy_equals_peft(save_adapter, tiny_checkpoints, tmp_path, stabilised):
    settings = LoraConfig(
        r=4, lora_alpha=8, use_rslora=stabilised, task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj", "qkv"], alpha_pattern={"qkv": 3},
    )  # fmt: skip
    folder = save_adapter(settings)
    merge_adapter(folder, tmp_path / "merged")
    ours, processor = load_policy(tmp_path / "merged")
    base, _ = load_policy(tiny_checkpoints["vlm"])
    before = logits_of(base)
    theirs = PeftModel.from_pretrained(base, folder).merge_and_unload()
    assert processor.tokenizer.chat_template
    assert (logits_of(ours) - logits_of(theirs)).abs().max() < 1e-6
    assert (logits_of(ours) - before).abs().max() > 1e-2
    for (name, one), (_, two) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert (one - two).abs().max() < 1e-6, name


def test_what_the_adapter_leaves_alone_is_copied_byte_for_byte(
    save_adapter, tiny_checkpoints, tmp_path
):
    record = merge_adapter(save_adapter(), tmp_path / "merged")
    [before] = Path(tiny_checkpoints["vlm"]).glob("*.safetensors")
    [after] = (tmp_path / "merged").glob("*.safetensors")
    one, two = load_file(before), load_file(after)
    assert list(one) == list(two)
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed == {n for n, e in record["tensors"].items() if e["group"] == "adapted"}
    assert len(changed) == record["adapter"]["tensors"] > 0
    assert not any("visual" in name or "norm" in name or "embed" in name for name in changed)
    assert verify_folder(tmp_path / "merged")["vision"] > 0
    check_start(str(tmp_path / "merged"))


def test_a_bf16_base_is_rounded_once(save_adapter, tiny_checkpoints, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoints["vlm"], base)
    [file] = base.glob("*.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    adapter = save_adapter()
    merge_adapter(adapter, tmp_path / "merged", base=base)
    merged = load_file(tmp_path / "merged" / file.name)
    factors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))
    up, down = (
        next(value for key, value in factors.items() if f"1.self_attn.q_proj.lora_{part}" in key)
        for part in "BA"
    )
    expected = (tensors[name].float() + 5.0 / 3 * (up @ down)).bfloat16()
    assert merged[name].dtype == torch.bfloat16
    # fp32 sums of three products in another order may round to the neighbour
    assert (merged[name] != expected).float().mean() < 1e-3
    assert torch.allclose(merged[name].float(), expected.float(), rtol=2**-7)


def test_an_adapter_of_another_model_is_refused(save_adapter, tiny_checkpoints, tmp_path):
    folder = save_adapter(LoraConfig(r=2, target_modules=["q_proj", "qkv"], task_type="CAUSAL_LM"))
    with pytest.raises(MergeError, match=r"changes model\.language_model.*which .* does not have"):
        merge_adapter(folder, tmp_path / "merged", base=tiny_checkpoints["agent"])
    with pytest.raises(MergeError, match=r"no such folder; check --base"):
        merge_adapter(folder, tmp_path / "merged", base=tmp_path / "moved")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    save_file({**tensors, name: torch.zeros(7, 2)}, path)
    with pytest.raises(MergeError, match=r"lora_B.*\[7, 2\].*does not fit .*q_proj\.weight"):
        merge_adapter(folder, tmp_path / "merged")
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(MergeError, match="has no lora_B"):
        merge_adapter(folder, tmp_path / "merged")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(MergeError, match=r"holds base_model\.model\.lm_head\.weight, which is no"):
        merge_adapter(folder, tmp_path / "merged")
    save_file({**tensors, name: torch.full_like(tensors[name], np.inf)}, path)
    with pytest.raises(MergeError, match="not finite"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / ".merged.part").exists()


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]},
     {"init_lora_weights": "pissa_niter_4"}, {"peft_type": "IA3"}],
)  # fmt: skip
def test_an_adapter_that_is_more_than_a_product_is_refused(save_adapter, tmp_path, changes):
    with pytest.raises(MergeError, match=f"{next(iter(changes))}|IA3"):
        merge_adapter(save_adapter(**changes), tmp_path / "merged")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": "x"}, "lora_alpha: expected a finite number, got 'x'"),
        ({"lora_alpha": [8]}, r"lora_alpha: expected a finite number, got \[8\]"),
        ({"lora_alpha": None}, "lora_alpha: expected a finite number, got nothing"),
        ({"lora_alpha": True}, "lora_alpha: expected a finite number, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number, got 10000"),
        ({"alpha_pattern": ["qkv"]}, r"alpha_pattern: expected patterns .*, got \['qkv'\]"),
        ({"alpha_pattern": {"q_proj(": 3}}, r"alpha_pattern: 'q_proj\(' is no pattern \(.*\)"),
        ({"alpha_pattern": {"(?i)q": 3}}, "alpha_pattern: '.*' is no pattern"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\.q_proj: expected a finite number"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\.q_proj: expected a whole number of 1"),
        ({"r": "x"}, "r: expected a whole number of 1 or more, got 'x'"),
        ({"r": 0}, "r: expected a whole number of 1 or more, got 0"),
        ({"r": 10**400}, "r: expected a whole number of 1 or more"),
        ({"use_rslora": "no"}, "use_rslora: expected true or false, got 'no'"),
    ],
)
def test_settings_of_another_type_are_one_clear_error(save_adapter, tmp_path, changes, words):
    words = rf"adapter_config\.json:{words}.*; save the adapter again"
    with pytest.raises(MergeError, match=words):
        merge_adapter(save_adapter(**changes), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_settings_of_another_rank_are_refused(save_adapter, tmp_path):
    words = r"has rank 3, adapter_config\.json says {}; save both again, from the same training"
    with pytest.raises(MergeError, match=words.format(8)):
        merge_adapter(save_adapter(r=8), tmp_path / "merged")
    with pytest.raises(MergeError, match="down_proj " + words.format(4)):
        merge_adapter(save_adapter(rank_pattern={"down_proj": 4}), tmp_path / "merged")
    merge_adapter(save_adapter(r=8, rank_pattern={".*": 3}), tmp_path / "merged")


def test_ranks_by_module_are_those_of_peft(save_adapter, tiny_checkpoints, tmp_path):
    settings = LoraConfig(
        r=4, rank_pattern={"down_proj": 2}, target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    folder = save_adapter(settings)
    merge_adapter(folder, tmp_path / "merged")
    base, _ = load_policy(tiny_checkpoints["vlm"])
    theirs = PeftModel.from_pretrained(base, folder).merge_and_unload()
    ours, _ = load_policy(tmp_path / "merged")
    assert (logits_of(ours) - logits_of(theirs)).abs().max() < 1e-6


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"policy": 3}', "[" * 100_000])
def test_a_damaged_run_folder_is_one_clear_error(tmp_path, text):
    (tmp_path / "done.json").write_text(text)
    with pytest.raises(MergeError, match=r"done\.json: names no policy .*; give the adapter's own"):
        find_adapter(tmp_path)


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x", "a" * 300])
def test_a_path_that_no_folder_can_have_is_one_clear_error(source):
    with pytest.raises(MergeError, match=r"cannot be a folder \(.*\); check the path"):
        find_adapter(source)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 252])  # with .part it is too long, too
def test_an_output_with_too_long_a_name_is_one_clear_error(save_adapter, tmp_path, name):
    with pytest.raises(MergeError, match=r"cannot be written \(.*too long.*choose another output"):
        merge_adapter(save_adapter(), tmp_path / name)


def test_an_output_in_the_home_of_nobody_is_one_clear_error(save_adapter):
    with pytest.raises(MergeError, match=r"cannot be a folder \(.*choose another output"):
        merge_adapter(save_adapter(), "~nobody-of-this-name/x")


def test_a_folder_that_only_looks_like_a_checkpoint_is_passed_over(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "adapter_config.json").write_text("{}")
    assert find_adapter(tmp_path).name == "checkpoint-10"


def test_an_output_is_not_overwritten_without_a_word(save_adapter, tmp_path):
    folder = save_adapter()
    merge_adapter(folder, tmp_path / "merged")
    with pytest.raises(MergeError, match="--overwrite"):
        merge_adapter(folder, tmp_path / "merged")
    merge_adapter(folder, tmp_path / "merged", overwrite=True)


def test_the_verbs_options_hold_for_an_adapter_or_are_refused(
    save_adapter, tmp_path, capsys, monkeypatch
):
    pushed = []

    class Api:
        def create_repo(self, repository, **_):
            pass

        def upload_folder(self, repo_id, folder_path, **_):
            pushed.append((repo_id, (Path(folder_path) / "README.md").read_text()))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    words = ["merge", "adapter", str(save_adapter()), "--output", str(tmp_path / "merged")]
    words += ["--push-to-hub", "someone/warm"]
    assert main([*words, "--dry-run"]) == 0
    assert " would change, in " in capsys.readouterr().out
    assert not (tmp_path / "merged").exists()
    assert pushed == []
    assert main([*words, "--sweep", "density=0.2,0.5"]) == 2
    assert "--sweep: goes with a merge, not with an adapter" in capsys.readouterr().err
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("https://hub/someone/warm/commit/1\n")
    [(repository, card)] = pushed
    assert repository == "someone/warm"
    front, text = card.split("---")[1:]
    assert yaml.safe_load(front)["base_model_relation"] == "finetune"
    assert 'AutoModelForImageTextToText.from_pretrained("someone/warm")' in text
    assert "The licence of " in text


def test_an_output_that_another_merge_is_writing_is_refused(save_adapter, tmp_path):
    adapter, part = save_adapter(), tmp_path / ".merged.part"
    held = hold_folder(part)
    (part / "model.safetensors").write_bytes(b"of another merge")
    with pytest.raises(MergeError, match="merged: another merge is writing it; wait for it, or"):
        merge_adapter(adapter, tmp_path / "merged")
    assert (part / "model.safetensors").read_bytes() == b"of another merge"
    let_go(part, held)
    merge_adapter(adapter, tmp_path / "merged")
    assert not part.exists()


def test_the_output_may_not_be_the_run_folder_of_the_adapter(save_adapter, tmp_path):
    policy = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    shutil.copytree(save_adapter(), policy)
    for name in ("merge.json", "config.json"):
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(MergeError, match="run: is or holds the adapter itself; choose another"):
        merge_adapter(tmp_path / "run", tmp_path / "run", overwrite=True)
    assert find_adapter(tmp_path / "run") == policy


def test_a_start_that_has_changed_since_the_training_is_refused(save_adapter, tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    merge_adapter(save_adapter(), start)
    adapter = save_adapter(base_model_name_or_path=str(start))
    shutil.copytree(adapter, run / "checkpoints" / "checkpoint-2")
    (run / "config.yaml").write_text("")
    shutil.copy(start / "merge.json", run)
    merge_adapter(run, tmp_path / "merged")
    flip_byte(start / "model.safetensors", -4)
    with pytest.raises(MergeError, match=r"start: .* is not what .*checkpoint-2 was trained on"):
        merge_adapter(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    merge_adapter(run, tmp_path / "again", base=start)


def test_an_adapter_of_a_family_of_ones_own(save_adapter, tiny_checkpoints, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoints["vlm"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "my_vl"}))
    shipped = yaml.safe_load(Path(families.__file__).with_name("families.yaml").read_text())
    own = tmp_path / "families.yaml"
    own.write_text(yaml.safe_dump({"my_vl": shipped[config["model_type"]]}))
    words = ["merge", "adapter", str(save_adapter()), "--base", str(base)]
    assert main([*words, "--output", str(tmp_path / "without")]) == 2
    assert "model_type 'my_vl' is not supported" in capsys.readouterr().err
    output = tmp_path / "merged"
    assert main([*words, "--output", str(output), f"merge.families={own}"]) == 0
    assert json.loads((output / "merge.json").read_text())["adapter"]["tensors"] > 0


# ---------------------------------------------------------------- training


def test_adapters_are_put_on_the_language_module_alone(fresh_policy):
    model, _ = fresh_policy
    wrapped = get_peft_model(model, make_lora(model, Lora(r=2)))
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    ends = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert ends == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert all(".language_model." in name for name in trained)


def test_adapters_on_the_vision_tower_when_asked_for(fresh_policy):
    model, _ = fresh_policy
    wrapped = get_peft_model(model, make_lora(model, Lora(r=2, train_vision=True)))
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert any(".visual.blocks.0.attn.qkv." in name for name in trained)
    assert any(".language_model." in name for name in trained)


def test_a_target_that_does_not_exist_is_named(fresh_policy, tmp_path):
    model, _ = fresh_policy
    assert make_lora(model, Lora()) is None
    with pytest.raises(ConfigError, match=r"ends in 'qkv'; there are down_proj, gate_proj"):
        make_lora(model, Lora(r=2, target_modules=["q_proj", "qkv"]))
    path = tmp_path / "settings.yaml"
    path.write_text("output: x\nmodels: {freeze_vision: true}\nlora: {train_vision: true}\n")
    with pytest.raises(ConfigError, match=r"lora\.train_vision"):
        load_config(path)


def lines_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time/", "speed/", "device_s")
    return [
        {k: v for k, v in row.items() if not k.startswith(clocks) and "time" not in k}
        for row in rows
    ]


def test_a_run_with_lora_resumes_and_becomes_a_policy_again(tiny_checkpoints, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS.format(output=tmp_path / "run", init=tiny_checkpoints["vlm"]))
    overrides = ["lora.r=4", "grpo.beta=0.1"]
    run = run_training(load_config(path, overrides))
    lines = [line for line in lines_of(run) if line["phase"] == "train"]
    # the reference is the policy without its adapter, which starts at zero
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[1]["kl"] > 0

    part = tmp_path / "part"
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints" / "checkpoint-2")
    run_training(load_config(path, [*overrides, f"output={part}"]), resume=True)
    assert lines_of(part) == lines_of(run)

    assert find_adapter(run).name == "checkpoint-2"
    with pytest.raises(PolicyLoadError, match="obm merge adapter"):
        load_policy(find_adapter(run))
    merged = tmp_path / "merged"
    assert main(["merge", "adapter", str(run), "--output", str(merged)]) == 0
    assert "tensors of" in capsys.readouterr().out
    check_start(str(merged))
    policy, _ = load_policy(merged)
    base, _ = load_policy(tiny_checkpoints["vlm"])
    wrapped = PeftModel.from_pretrained(base, find_adapter(run)).merge_and_unload()
    assert (logits_of(policy) - logits_of(wrapped)).abs().max() < 1e-6


def test_a_frozen_vision_tower_stays_as_it_was(tiny_checkpoints, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS.format(output=tmp_path / "run", init=tiny_checkpoints["vlm"]))
    run = run_training(load_config(path, ["models.freeze_vision=true", "grpo.max_steps=1"]))
    before, _ = load_policy(tiny_checkpoints["vlm"])
    after, _ = load_policy(run / json.loads((run / "done.json").read_text())["policy"])
    changed = {
        name.split(".")[1]
        for (name, one), (_, two) in zip(
            before.named_parameters(), after.named_parameters(), strict=True
        )
        if not torch.equal(one, two)
    }
    assert changed == {"language_model"}
    assert freeze_vision(before) > 0
