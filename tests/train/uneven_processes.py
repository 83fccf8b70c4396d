"""Program of test_launch: two processes whose episodes differ in everything that could hang them.

Process 0 asks about pictures, calls tools and gets pictures back, over three turns, and has more
logits than are kept; process 1 has no pictures and answers at once, right in every episode, so its
rows have no gradient and are spared. Under ZeRO each forward is a collective: any of these would
wait for ever.
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
    scoring.MAX_LOGITS = 20_000  # between the 37,380 of process 0 and the 7,120 of process 1
    args = GRPOConfig(
        output_dir=output,
        deepspeed=settings,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,  # what ZeRO-3 saw in the first, it expects of the others
        num_generations=4,
        max_completion_length=300,
        generation_kwargs={"max_new_tokens": 40},
        max_steps=2,
        learning_rate=1e-3,
    )
    model, processor = load_policy(init)
    # rows 0 to 11 of a step go to process 0, rows 12 to 23 to process 1
    questions = [make_question(i, has_image=i % 6 < 3) for i in range(12)]
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
