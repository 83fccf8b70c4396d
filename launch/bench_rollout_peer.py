"""Stock TRL's tool loop on the bench's workload, cured of what keeps it from running at all.

`ScriptedTRL` adds a script to `GRPOTrainer` and changes nothing else: every turn really generates
as many tokens as the script has, then the script's tokens take their place. What TRL 1.16 needs
beside that to run tools that return pictures on a Qwen2.5-VL without torchvision:

* a chat template that renders tool calls: TRL's own for Qwen3-VL, for it refuses Qwen2.5-VL's;
* a processor without videos whose pictures are torch tensors: `train.policy.ImageOnlyProcessor`;
* `log_multimodal=False`, and the tokens of vision suppressed: TRL suppresses the image's alone,
  and a sampled `<|video_pad|>` stops it.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_vl_chat_template

from launch.bench_rollout_clock import StageClock
from launch.bench_rollout_work import PEER, TITLE, Script, Workload, make_policy
from train.vision import suppressed_token_ids


class ScriptedTRL(GRPOTrainer):
    """`GRPOTrainer` whose policy says what a script says.

    Args:
        script: the turns.
        settings: GRPOTrainer's.
    """

    def __init__(self, *, script: Script, **settings: Any) -> None:
        super().__init__(**settings)
        self.script = script
        self.turn = 0

    def _generate(self, prompts: list[Any]) -> Any:
        self.turn = 0
        return super()._generate(prompts)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        generated, _ = super()._generate_single_turn(*args, **kwargs)
        said = [
            self.script.writer.token_ids(self.script.turn(row, self.turn))
            for row in range(len(generated))
        ]
        assert [len(ids) for ids in generated] == [len(ids) for ids in said]
        self.turn += 1
        return said, None


def make_peer(work: Workload, settings: dict[str, Any], clock: StageClock) -> ScriptedTRL:
    """The trainer for a workload, with its stages timed.

    Args:
        work: the group.
        settings: of GRPOConfig, those of both sides.
        clock: gets the stages.
    """
    model, processor = make_policy(work.policy)
    processor.chat_template = qwen3_vl_chat_template
    script = Script(work, PEER, processor)

    def search(query: str) -> str:
        """Search the passages.

        Args:
            query: What to search for.

        Returns:
            Titles and texts of the best matches.
        """
        return TITLE + script.text_result()

    def image_search(region: str) -> list[dict[str, Any]]:
        """Search with the picture of the question.

        Args:
            region: full, left or right.

        Returns:
            Pictures and names of what looks most alike.
        """
        words, pictures = script.image_result()
        shown = [{"type": "image", "image": picture} for picture in pictures]
        return [*shown, {"type": "text", "text": TITLE + words}]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        """As ours: every second episode is right."""
        return [float(row % 2 == 0) for row in range(len(completions))]

    tools = [search, image_search]
    picture = script.picture()

    def render(question: str) -> str:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        return str(prompt)

    prompt = [{"role": "user", "content": script.question(render, picture)}]
    generation = {
        "max_new_tokens": work.turn_tokens,
        "min_new_tokens": work.turn_tokens,
        "suppress_tokens": suppressed_token_ids(processor.tokenizer),
    }
    trainer = ScriptedTRL(
        script=script,
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**settings, generation_kwargs=generation, log_multimodal=False),
        train_dataset=Dataset.from_list([{"prompt": prompt, "image": picture}]),
        processing_class=processor,
        tools=tools,
    )
    clock.wrap(trainer, "_generate", "rollout")
    clock.wrap(model, "generate", "generate")
    clock.wrap(
        model, "forward", lambda input_ids, **_: "prefill" if input_ids.shape[1] > 1 else "token"
    )
    return trainer
