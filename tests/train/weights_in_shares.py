"""One process of a test: a policy with an adapter goes to a server while ZeRO-3 has it in shares.

Started with RANK, WORLD_SIZE and MASTER_PORT set; the first process prints a JSON line.
"""

# ruff: noqa: E402

import json
import sys
from pathlib import Path

from train.settings import leave_group_at_exit, prepare_deepspeed

prepare_deepspeed(has_gpu=False)

import deepspeed
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOConfig

from configs.sections import Rollout
from environments.episode import SearchEnvironment
from tests.train.conftest import FakeImageIndex, FakeTextIndex, make_question
from tests.train.test_vllm_client import FakeServer
from train.grpo import SearchGRPOTrainer
from train.policy import load_policy
from train.weights import merged_weights


class HandOver(TrainerCallback):
    """Hands the policy over once it is in shares, counts what is whole meanwhile, and ends."""

    def __init__(self, server: FakeServer) -> None:
        self.received: dict[str, torch.Tensor] = {}
        self.largest = 0
        server.answers["/collective_rpc"] = self.load

    def load(self, body: dict) -> None:
        for file in Path(*body["args"]).iterdir():
            self.received |= load_file(file)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        enter = deepspeed.zero.GatheredParameters.__enter__

        def counted(context):
            enter(context)
            self.largest = max(
                self.largest, sum(p.numel() for p in self.trainer.model.parameters())
            )

        deepspeed.zero.GatheredParameters.__enter__ = counted
        with self.trainer.policy_for_generation():
            pass
        control.should_training_stop = True


def main() -> None:
    init, output = sys.argv[1:]
    model, processor = load_policy(init)
    server = FakeServer()
    hand_over = HandOver(server)
    trainer = hand_over.trainer = SearchGRPOTrainer(
        model,
        args=GRPOConfig(
            output_dir=output, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            deepspeed=str(Path(__file__).parents[2] / "configs" / "deepspeed" / "zero3.json"),
            per_device_train_batch_size=4, num_generations=4, max_steps=1,
        ),
        questions=[make_question(0)],
        environment=SearchEnvironment(FakeTextIndex(), FakeImageIndex()),
        rewards={"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1},
        processing_class=processor,
        callbacks=[hand_over],
        peft_config=LoraConfig(r=4, target_modules=r"model\.language_model.*\.(q_proj|up_proj)"),
        rollout=Rollout(backend="vllm", url=server.url, sync_dir=output),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    expected = dict(merged_weights(trainer.model))
    sizes = [p.numel() for p in trainer.model.parameters()]
    trainer.train()
    if trainer.accelerator.is_main_process:
        assert hand_over.received.keys() == expected.keys()
        different = [n for n in expected if not torch.equal(hand_over.received[n], expected[n])]
        found = {"different": different, "largest": hand_over.largest}
        print(json.dumps({**found, "tensor": max(sizes), "policy": sum(sizes)}), flush=True)


if __name__ == "__main__":
    main()
    leave_group_at_exit()
