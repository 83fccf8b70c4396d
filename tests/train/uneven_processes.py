"""Program of test_launch: two processes whose episodes differ in everything that could hang them.

Process 0 asks about pictures, calls tools and gets pictures back, over three turns; process 1 has
no pictures and answers at once, right in every episode, so its rows have no gradient and are
spared. Under ZeRO each forward is a collective: any of these would wait for ever.
"""

# ruff: noqa: E402

import os
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parents[1]), str(here)]

from conftest import ANSWER, ASK_IMAGE, ASK_TEXT, FakeImageIndex, FakeTextIndex, make_question

from environments.episode import SearchEnvironment
from train import scoring
from train.policy import load_policy
from train.settings import prepare_deepspeed


def script(question, turn):
    if question["image"] is None:
        return ANSWER
    wrong = "<think> no </think> <answer> Rome </answer>"
    last = ANSWER if next(COUNTER) % 2 else wrong
    return [ASK_IMAGE, ASK_TEXT, last][turn]


COUNTER = iter(range(10**6))


def main() -> None:
    init, settings, output = sys.argv[-3:]
    prepare_deepspeed(has_gpu=False)
    from trl import GRPOConfig

    from train.grpo import SearchGRPOTrainer

    scoring.ROWS_PER_BUCKET = 2
    args = GRPOConfig(
        output_dir=output,
        deepspeed=settings,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=300,
        generation_kwargs={"max_new_tokens": 40},
        max_steps=2,
        learning_rate=1e-3,
    )
    model, processor = load_policy(init)
    # rows 0 to 7 of a step go to process 0, rows 8 to 15 to process 1
    questions = [make_question(i, has_image=i % 4 < 2) for i in range(8)]
    trainer = SearchGRPOTrainer(
        model,
        args=args,
        questions=questions,
        environment=SearchEnvironment(
            FakeTextIndex(), FakeImageIndex(), top_k_image=2, thumbnails=True
        ),
        rewards={"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1},
        processing_class=processor,
        script=script,
    )
    trainer.train()
    turns = {len(t.turns) for t in trainer.last_trajectories}
    assert turns == ({3} if os.environ["RANK"] == "0" else {1}), turns
    print(f"process {os.environ['RANK']} trained {trainer.state.global_step} steps", flush=True)


if __name__ == "__main__":
    main()
