"""Program of test_cast_zero: gated heads under every stage of ZeRO, whole and with LoRA.

Each case trains a pico model with grouped keys and values for twenty steps of DeepSpeed's engine;
the first process prints which numbers have changed, a JSON line a case.
"""

# ruff: noqa: E402

import json
import os
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parents[1])]

from train.settings import prepare_deepspeed

prepare_deepspeed(has_gpu=False)

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from train.cast import gate_heads
from train.heads import Head

SETTINGS = here.parents[1] / "configs" / "deepspeed"
HEADS = [Head(0, 0), Head(0, 1), Head(1, 3)]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_model(dtype: torch.dtype, adapter: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(dtype)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=[*PROJECTIONS]))
    return model


def make_engine(
    model: torch.nn.Module, stage: int, dtype: torch.dtype
) -> deepspeed.DeepSpeedEngine:
    settings = json.loads((SETTINGS / f"zero{stage}.json").read_text())
    zero = settings["zero_optimization"]
    zero["reduce_bucket_size"] = 5000  # several buckets, whose borders lie within tensors
    for name in ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        if name in zero:
            zero[name] = 100  # nothing is small enough to be kept whole
    settings.update(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=1.0,
        bf16={"enabled": dtype == torch.bfloat16},
    )  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every projection of the attention, whole, with the adapter's product in it."""
    named = dict(model.named_parameters())
    if any(hasattr(p, "ds_id") for p in named.values()):
        with deepspeed.zero.GatheredParameters(list(named.values())):
            named = {name: p.detach().clone() for name, p in named.items()}
    found = {}
    for layer in (0, 1):
        for projection in PROJECTIONS:
            end = f"layers.{layer}.self_attn.{projection}"
            own = {name: p.detach().float() for name, p in named.items() if f"{end}." in name}
            [weight] = [
                p for name, p in own.items() if name.endswith(("proj.weight", "layer.weight"))
            ]
            factors = {
                k: p for part in "AB" for k, p in [(part, _factor(own, part))] if p is not None
            }
            product = factors["B"] @ factors["A"] if factors else torch.zeros_like(weight)
            found[f"{layer}.{projection}"] = weight + product
    return found


def _factor(own: dict[str, torch.Tensor], part: str) -> torch.Tensor | None:
    return next((p for name, p in own.items() if f"lora_{part}." in name), None)


def train(stage: int, dtype: torch.dtype, adapter: bool) -> dict[str, list[int]]:
    """Which heads of each projection have changed: query heads of q and o, others of k and v."""
    model = make_model(dtype, adapter)
    before = {name: weight.clone() for name, weight in weights(model).items()}
    gate_heads(model, HEADS)
    engine = make_engine(model, stage, dtype)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    for _ in range(20):
        ids = torch.randint(64, (1, 12), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    assert engine.global_steps == 20
    after = weights(model)
    engine.destroy()
    changed = {}
    for name, weight in before.items():
        differs = (weight != after[name]).any(0 if "o_proj" in name else 1)
        changed[name] = differs.view(-1, 8).any(1).nonzero().flatten().tolist()
    return changed


def main() -> None:
    for stage, dtype, adapter in json.loads(sys.argv[-1]):
        changed = train(stage, getattr(torch, dtype), adapter)
        if os.environ["RANK"] == "0":
            print(json.dumps({"changed": changed}), flush=True)


if __name__ == "__main__":
    main()
