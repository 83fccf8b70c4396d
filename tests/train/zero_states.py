"""One process of a test: bytes that DeepSpeed holds after a step, under each ZeRO stage.

Started with RANK, WORLD_SIZE and MASTER_PORT set; the first process prints a JSON line a stage.
"""

import gc
import json
import os
import sys
from pathlib import Path

from train.settings import leave_group_at_exit, prepare_deepspeed

prepare_deepspeed(has_gpu=False)

import deepspeed  # noqa: E402
import torch  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

SETTINGS = Path(__file__).parents[2] / "configs" / "deepspeed"


def bytes_alive() -> int:
    """Sum over all storages that a tensor still points to."""
    gc.collect()
    seen = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def after_a_step(stage: int, dtype: str, config: Qwen2Config) -> dict[str, int | str]:
    """Bytes held between two steps, and those of gradients besides."""
    before = bytes_alive()
    model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    settings = json.loads((SETTINGS / f"zero{max(stage, 2)}.json").read_text())
    zero = settings["zero_optimization"]
    zero["stage"] = stage
    # what transformers puts for "auto"
    sizes = {
        "reduce_bucket_size": config.hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * config.hidden_size**2),
        "stage3_param_persistence_threshold": 10 * config.hidden_size,
    }
    zero.update({name: size for name, size in sizes.items() if name in zero})
    settings.update(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=1.0
    )
    settings["bf16"] = {"enabled": dtype == "bfloat16"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    ids = torch.randint(0, config.vocab_size, (1, 16))
    with_gradients = 0
    for _ in range(2):  # AdamW makes its moments in the first step
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        with_gradients = bytes_alive() - before
        engine.step()
    engine.zero_grad()
    states = bytes_alive() - before
    engine.destroy()
    return {"stage": stage, "dtype": dtype, "states": states, "gradients": with_gradients - states}


def main() -> None:
    gc.freeze()  # what the libraries made holds no tensor of ours, and need not be gone through
    config = Qwen2Config(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    for stage, dtype in json.loads(sys.argv[2]):
        result = after_a_step(stage, dtype, config)
        if os.environ["RANK"] == "0":
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
    leave_group_at_exit()
