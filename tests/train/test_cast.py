"""The gate: gated heads keep every bit, all else trains; optimizers, adapters, SFT, DPO, GRPO."""

import json
import random
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from configs.errors import ConfigError
from configs.schema import load_config
from train.cast import gate_heads, gate_trainer, plan_gate, zero_slices
from train.heads import Head
from train.policy import load_policy
from train.run import run_training
from train.sft import SFTExample, SFTStage, run_stage

HEADS, GROUPS, DIM = 4, 2, 6
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "vocab_size": 32,
}


def make_model(kind="qwen2", dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=DIM))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def step(model, optimizer, seed):
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def changed_rows(before, after, dim):
    """Indices along `dim` at which any bit differs."""
    differs = (before.view(torch.uint8) != after.detach().view(torch.uint8)).view(
        *before.shape[:-1], -1
    )
    if before.dim() == 2 and dim == 1:
        differs = differs.unflatten(1, (before.shape[1], -1)).any(-1).any(0)
    else:
        differs = differs.any(-1) if before.dim() == 2 else differs.view(len(before), -1).any(-1)
    return differs.nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_gated_slices_keep_every_bit_and_the_others_move(make, dtype):
    """Head 1 of layer 0: rows 6 to 11 of q, columns 6 to 11 of o; its group has two heads."""
    model = make_model(dtype=dtype)
    gate = gate_heads(model, [Head(0, 1)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # SGD's steps must be large enough to show in bf16
    settings = {"lr": 1.0, "momentum": 0.9} if make is torch.optim.SGD else {"lr": 0.05}
    if make is torch.optim.AdamW:
        settings["weight_decay"] = 0.0
    optimizer = make(model.parameters(), **settings)
    for seed in range(5):
        step(model, optimizer, seed)
    now = dict(model.named_parameters())
    own = "model.layers.0.self_attn."
    others = [i for i in range(24) if not 6 <= i < 12]
    assert changed_rows(before[own + "q_proj.weight"], now[own + "q_proj.weight"], 0) == others
    assert changed_rows(before[own + "q_proj.bias"], now[own + "q_proj.bias"], 0) == others
    assert changed_rows(before[own + "o_proj.weight"], now[own + "o_proj.weight"], 1) == others
    # half of the group's heads are not `most`
    for name in ("k_proj", "v_proj"):
        weight = own + name + ".weight"
        assert changed_rows(before[weight], now[weight], 0) == list(range(12))
    for name, parameter in now.items():
        assert not torch.equal(parameter, before[name]), name
    # 6 rows of 24 and their biases, 6 columns of 24
    assert gate.n_numbers == 6 * 24 + 6 + 6 * 24


@pytest.mark.parametrize(
    ("shared", "heads", "frozen"),
    [
        ("most", [1], []),
        ("most", [0, 1], [0]),
        ("any", [1], [0]),
        ("any", [0, 3], [0, 1]),
        ("all", [0, 1, 2], [0]),
    ],
)
def test_keys_and_values_of_a_group_follow_its_heads(shared, heads, frozen):
    """Heads 0 and 1 read key-value head 0, heads 2 and 3 read key-value head 1."""
    plan = plan_gate(make_model(), [Head(1, head) for head in heads], shared)
    spans = {tensor.name: (tensor.dim, tensor.spans) for tensor in plan}
    own = "model.layers.1.self_attn."
    rows = tuple((DIM * head, DIM * head + DIM) for head in heads)
    assert spans[own + "q_proj.weight"] == (0, rows)
    assert spans[own + "o_proj.weight"] == (1, rows)
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        expected = (0, tuple((DIM * group, DIM * group + DIM) for group in frozen))
        assert spans.get(own + name) == (expected if frozen else None)
    assert all(name.startswith(own) for name in spans)


def test_norms_that_all_heads_share_follow_most_of_them():
    model = make_model("qwen3")
    some = {tensor.name for tensor in plan_gate(model, [Head(0, 0), Head(0, 1)])}
    assert not any("norm" in name for name in some)
    most = plan_gate(model, [Head(0, 0), Head(0, 1), Head(0, 2)])
    norms = {tensor.name: tensor.spans for tensor in most if "norm" in tensor.name}
    own = "model.layers.0.self_attn."
    assert norms == {own + "q_norm.weight": ((0, DIM),), own + "k_norm.weight": ((0, DIM),)}


def test_the_norm_that_is_logged_is_the_gated_gradients():
    whole, gated = make_model(), make_model()
    gate_heads(gated, [Head(0, 0), Head(1, 2)])
    norms = [step(m, torch.optim.SGD(m.parameters(), lr=0.0), 0) for m in (whole, gated)]
    assert norms[1] < norms[0]
    reference = make_model()
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    reference(input_ids=ids, labels=ids).loss.backward()
    total = 0.0
    plan = {tensor.name: tensor for tensor in plan_gate(reference, [Head(0, 0), Head(1, 2)])}
    for name, parameter in reference.named_parameters():
        gradient = parameter.grad
        if name in plan:
            gradient = zero_slices(gradient, plan[name].dim, plan[name].spans)
        total += gradient.square().sum().item()
    assert norms[1].item() == pytest.approx(total**0.5, rel=1e-6)


def test_what_is_not_a_number_is_zeroed_as_well():
    gradient = torch.tensor([[float("nan"), 1.0], [float("inf"), 2.0]])
    assert zero_slices(gradient, 1, ((0, 1),)).tolist() == [[0.0, 1.0], [0.0, 2.0]]
    assert torch.isnan(gradient[0, 0])  # a copy


def test_a_removed_gate_lets_heads_train():
    model = make_model()
    gate = gate_heads(model, [Head(0, 1)])
    gate.remove()
    before = gate.checksums()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    assert all(now != before[name] for name, now in gate.checksums().items())


def test_an_adapter_changes_nothing_in_gated_slices():
    model = get_peft_model(
        make_model(),
        LoraConfig(r=3, target_modules=["q_proj", "k_proj", "o_proj", "up_proj"]),
    )
    ids = torch.arange(9)[None]
    before = model(ids).logits.detach()
    gate = gate_heads(model, [Head(0, 0), Head(0, 1)])
    assert torch.equal(model(ids).logits, before)  # B is zero: no change by zeroing columns of A
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for seed in range(4):
        step(model, optimizer, seed)
    attention = model.base_model.model.model.layers[0].self_attn
    # heads 0 and 1: rows and columns 0 to 11, and key-value head 0, rows 0 to 5
    for name, dim, end in (("q_proj", 0, 12), ("k_proj", 0, 6), ("o_proj", 1, 12)):
        delta = getattr(attention, name).get_delta_weight("default")
        gated, free = delta.split([end, delta.shape[dim] - end], dim)
        assert torch.equal(gated, torch.zeros_like(gated))
        assert (free.abs().amax(1 - dim) > 0).all()
    assert all(tensor.is_adapter for tensor in gate.tensors)
    other = model.base_model.model.model.layers[1].self_attn.o_proj.get_delta_weight("default")
    assert (other != 0).all()


def test_adapters_that_cannot_be_cut_are_refused():
    names = ["q_proj", "o_proj"]
    for settings, message in (
        ({"use_dora": True}, "no plain LoRA"),
        ({"lora_bias": True}, "has a bias"),
    ):
        model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=names, **settings))
        with pytest.raises(ConfigError, match=message):
            gate_heads(model, [Head(0, 0)])
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ConfigError, match="no parameter of the attention is trained"):
        gate_heads(model, [Head(0, 0)])


def test_heads_that_the_policy_does_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"has no head Head\(layer=2, head=0\).*2 layers of 4"):
        gate_heads(make_model(), [Head(0, 0), Head(2, 0)])
    with pytest.raises(ConfigError, match="none given"):
        gate_heads(make_model(), [])


# ---------------------------------------------------------------- trainers


@pytest.fixture
def text_policy(tiny_checkpoints):
    return load_policy(tiny_checkpoints["agent"])


def draw(rng):
    ids = [rng.randrange(20, 300) for _ in range(12)]
    return SFTExample(ids, ids)


def heads_of(model):
    """Rows of q and columns of o of head 1 in layer 0, and the rest of the two matrices."""
    attention = model.model.layers[0].self_attn
    head_dim = attention.head_dim
    q, o = attention.q_proj.weight.detach(), attention.o_proj.weight.detach()
    own = slice(head_dim, 2 * head_dim)
    return [q[own].clone(), o[:, own].clone()], [q[:head_dim].clone(), o[:, :head_dim].clone()]


def assert_head_one_stayed(before, after):
    (own, free), (own_now, free_now) = before, after
    for one, two in zip(own, own_now, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(free, free_now, strict=True):
        assert (one != two).float().mean() > 0.9


def test_sft_with_weight_decay_keeps_gated_heads(text_policy, tmp_path):
    model, tokenizer = text_policy
    before = heads_of(model)
    stage = SFTStage(
        "gated", draw, 6, batch_size=4, warmup_steps=0, weight_decay=0.1,
        frozen_heads=[Head(0, 1)],
    )  # fmt: skip
    run_stage(model, tokenizer, stage, tmp_path)
    after = heads_of(model)
    assert_head_one_stayed(before, after)
    # the gate is gone with its stage
    run_stage(model, tokenizer, SFTStage("free", draw, 2, batch_size=4, warmup_steps=0), tmp_path)
    assert not torch.equal(heads_of(model)[0][0], after[0][0])


def dpo_trainer(text_policy, tmp_path, **settings):
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = text_policy
    rng = random.Random(0)
    words = ["red", "blue", "Paris", "Rome", "flag", "capital"]
    rows = [
        {"prompt": rng.choice(words), "chosen": rng.choice(words), "rejected": rng.choice(words)}
        for _ in range(16)
    ]
    options = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "beta": 0.1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
        "weight_decay": 0.1, "logging_steps": 1, "gradient_checkpointing": False, **settings,
    }  # fmt: skip
    return DPOTrainer(
        model,
        args=DPOConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def test_dpo_keeps_gated_heads(text_policy, tmp_path):
    before = heads_of(text_policy[0])
    trainer = dpo_trainer(text_policy, tmp_path)
    gate_trainer(trainer, [Head(0, 1)])
    trainer.train()
    assert trainer.state.global_step == 4
    assert_head_one_stayed(before, heads_of(trainer.model))


def test_without_the_exclusion_weight_decay_would_move_them(text_policy, tmp_path):
    """The check at the end finds it: one step of decay multiplies by 1 - 1e-3 * 0.1."""
    trainer = dpo_trainer(text_policy, tmp_path)
    decaying = trainer.get_decay_parameter_names
    gate_trainer(trainer, [Head(0, 1)])
    trainer.get_decay_parameter_names = decaying
    with pytest.raises(RuntimeError, match=r"gated heads have changed in model\.layers\.0"):
        trainer.train()


def test_optimizers_that_mix_entries_are_refused(text_policy, tmp_path):
    trainer = dpo_trainer(text_policy, tmp_path, optim="adafactor")
    with pytest.raises(ConfigError, match=r"grpo\.optim adafactor may move gated heads; use one"):
        gate_trainer(trainer, [Head(0, 1)])
    trainer = dpo_trainer(text_policy, tmp_path)
    trainer.create_optimizer()
    with pytest.raises(ConfigError, match="an optimizer of its own"):
        gate_trainer(trainer, [Head(0, 1)])


# ---------------------------------------------------------------- a run


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
  weight_decay: 0.1
  learning_rate: 1.0e-2
compare: {{eval_every: 2}}
tracking: {{wandb: disabled}}
freeze_heads: random(top=25%, seed=3)
"""


def test_a_run_keeps_its_gate_when_it_goes_on(tiny_checkpoints, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS.format(output=tmp_path / "run", init=tiny_checkpoints["vlm"]))
    run = run_training(load_config(path))
    record = json.loads((run / "frozen_heads.json").read_text())
    start, _ = load_policy(tiny_checkpoints["vlm"])
    assert record["n_heads"] == 4
    [(layer, head)] = record["heads"]

    part = tmp_path / "part"
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints" / "checkpoint-2")
    run_training(load_config(path, [f"output={part}"]), resume=True)
    policies = [load_policy(f / "checkpoints" / "checkpoint-2")[0] for f in (run, part)]
    for one, two in zip(*(policy.parameters() for policy in policies), strict=True):
        assert torch.equal(one, two)
    for policy in policies:
        attentions = [m.model.language_model.layers[layer].self_attn for m in (start, policy)]
        own = slice(head * attentions[0].head_dim, (head + 1) * attentions[0].head_dim)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            one, two = (getattr(a, name).weight for a in attentions)
            cut = (slice(None), own) if name == "o_proj" else own
            assert torch.equal(one[cut], two[cut])
            assert not torch.equal(one, two)
    for changed in ("freeze_heads.seed=4", "freeze_heads=none", "freeze_heads.top=0.9"):
        with pytest.raises(ConfigError, match="was started with other settings: freeze_heads"):
            run_training(load_config(path, [f"output={part}", changed]), resume=True)


def test_a_missing_map_is_found_before_anything_is_written(tiny_checkpoints, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS.format(output=tmp_path / "run", init=tiny_checkpoints["vlm"]))
    with pytest.raises(
        ConfigError, match=r"freeze_heads\.map: no conflict map at .*conflict\.json"
    ):
        run_training(load_config(path, ["freeze_heads=cast(top=10%)"]))
    assert not (tmp_path / "run").exists()


def test_a_cold_start_keeps_frozen_heads(tmp_path):
    from configs.schema import resolve_model
    from train.cold_start import run_cold_start

    path = tmp_path / "settings.yaml"
    path.write_text(
        f"output: {tmp_path / 'cold'}\nmodels: {{init: atlas://vlm}}\n"
        "sft: {episodes: 8, steps: 2, batch_size: 4}\nfreeze_heads: random(top=10%, seed=1)\n"
    )
    folder = run_cold_start(load_config(path))
    record = json.loads((tmp_path / "cold" / "frozen_heads.json").read_text())
    [(layer, head)] = record["heads"]
    models = [load_policy(f)[0] for f in (resolve_model("atlas://vlm"), folder)]
    attentions = [model.model.language_model.layers[layer].self_attn for model in models]
    size = attentions[0].head_dim
    own, others = slice(head * size, (head + 1) * size), (head + 1) % 4 * size
    for name in ("q_proj", "k_proj", "v_proj"):
        before, after = (getattr(attention, name).weight for attention in attentions)
        assert torch.equal(before[own], after[own])
        assert not torch.equal(before[others : others + size], after[others : others + size])
