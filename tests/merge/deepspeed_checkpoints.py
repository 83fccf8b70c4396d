"""One process of a test: trains a tiny model by DeepSpeed and saves a checkpoint.

    deepspeed_checkpoints.py FOLDER STAGE...

Started with RANK, WORLD_SIZE and MASTER_PORT set. FOLDER/zeroSTAGE/ is what a run of the project
leaves as checkpoint: DeepSpeed's states and model.safetensors. `train_plainly` does the same steps
in one process without DeepSpeed.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

SETTINGS = Path(__file__).parents[2] / "configs" / "deepspeed"
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
STEPS = 3


def make_model() -> tuple[Qwen2ForCausalLM, torch.optim.AdamW]:
    """The model, and AdamW with its parameters grouped as transformers does: some without decay."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG))
    groups: tuple[list, list] = ([], [])
    for name, parameter in model.named_parameters():
        groups[name.endswith("bias") or "norm" in name].append(parameter)
    decays = [
        {"params": own, "weight_decay": decay}
        for own, decay in zip(groups, (0.1, 0.0), strict=True)
    ]
    return model, torch.optim.AdamW(decays, lr=1e-3)


def make_batches(rank: int) -> list[torch.Tensor]:
    """One sequence a step."""
    generator = torch.Generator().manual_seed(1 + rank)
    return [torch.randint(0, 64, (1, 16), generator=generator) for _ in range(STEPS)]


def train_plainly(n_ranks: int) -> dict[str, torch.Tensor]:
    """Name -> AdamW's exp_avg_sq after the steps, with gradients averaged over the ranks' data."""
    model, optimizer = make_model()
    for batches in zip(*(make_batches(rank) for rank in range(n_ranks)), strict=True):
        optimizer.zero_grad()
        for ids in batches:
            (model(input_ids=ids, labels=ids).loss / n_ranks).backward()
        optimizer.step()
    return {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}


def train(folder: Path, stage: int) -> None:
    """Trains with this process' data and saves FOLDER/zeroSTAGE."""
    import deepspeed

    model, optimizer = make_model()
    settings = json.loads((SETTINGS / f"zero{stage}.json").read_text())
    sizes = {"reduce_bucket_size": 500, "stage3_prefetch_bucket_size": 500,
             "stage3_param_persistence_threshold": 30}  # fmt: skip
    zero = settings["zero_optimization"]
    zero.update({name: size for name, size in sizes.items() if name in zero})
    settings.update(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=0.0
    )
    settings["bf16"] = {"enabled": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for ids in make_batches(int(os.environ["RANK"])):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    target = folder / f"zero{stage}"
    engine.save_checkpoint(str(target), tag=f"global_step{STEPS}")
    weights = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    if os.environ["RANK"] == "0":
        kept = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
        kept.pop("lm_head.weight", None)  # tied
        save_file(kept, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps({"model_type": "qwen2", **CONFIG}))
    engine.destroy()


if __name__ == "__main__":
    from train.settings import leave_group_at_exit, prepare_deepspeed

    prepare_deepspeed(has_gpu=False)
    for number in sys.argv[2:]:
        train(Path(sys.argv[1]), int(number))
    leave_group_at_exit()
