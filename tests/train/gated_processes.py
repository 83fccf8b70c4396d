"""Program of test_cast_zero: a model with grouped keys and values learns preferences, heads gated.

Twenty steps of TRL's DPOTrainer under DeepSpeed; the first process saves the policy.
"""

# ruff: noqa: E402

import json
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parents[1])]

from train.settings import prepare_deepspeed


def main() -> None:
    init, settings, output, heads = sys.argv[-4:]
    prepare_deepspeed(has_gpu=False)
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from train.cast import gate_trainer
    from train.heads import Head
    from train.policy import load_policy

    args = DPOConfig(
        output_dir=output,
        deepspeed=settings,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        max_steps=20,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.1,
    )
    model, tokenizer = load_policy(init)
    words = ["red", "blue", "Paris", "Rome", "flag", "capital", "north"]
    rows = [
        {"prompt": f"{a} {b}", "chosen": a, "rejected": b} for a in words for b in words if a != b
    ]
    trainer = DPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    gate = gate_trainer(trainer, [Head(*head) for head in json.loads(heads)])
    trainer.train()
    print(f"{trainer.state.global_step} steps, {gate.n_numbers} numbers gated", flush=True)
    trainer.save_model(output)


if __name__ == "__main__":
    main()
