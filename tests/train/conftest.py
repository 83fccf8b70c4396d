"""A random tiny policy, an environment in memory, and scripted turns so that tools get called."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from environments.episode import SearchEnvironment
from environments.tools import Hit
from train.policy import load_policy
from train.rollout import RolloutEngine
from train.tiny import make_tiny_checkpoints

torch.set_num_threads(1)

ASK_IMAGE = "<think> see </think> <search> <img> </search>"
ASK_TEXT = "<think> France </think> <search> capital of France </search>"
ANSWER = "<think> it says Paris </think> <answer> Paris </answer>"


def noise_image(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class FakeTextIndex:
    in_memory = True

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        hits = [
            Hit("france/capital", "France", "the capital of France Paris"),
            Hit("italy/capital", "Italy", "the capital of Italy Rome and a few more words"),
        ]
        return [hits[:k] for _ in queries]


class FakeImageIndex:
    """Returns thumbnails of two sizes, so that returned images differ in their token count."""

    in_memory = True

    def search(self, images: list[Any], k: int) -> list[list[Hit]]:
        hits = [
            Hit("fr", "France", image=noise_image(100)),
            Hit("it", "Italy", image=noise_image(101, width=112, height=28)),
        ]
        return [hits[:k] for _ in images]


def make_question(number: int, has_image: bool = True) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "kind": "two" if has_image else "text",
        "split": "train",
        "seen": number % 2 == 0,
        "question": "What is the capital of this place?" + " Think well." * (number % 3),
        "answers": ["Paris"],
        "entity_names": ["France"],
        "gold_passages": ["france/capital"],
        "image": noise_image(number) if has_image else None,
    }


def scripted(question: dict[str, Any], turn: int) -> str | None:
    """By question number: three turns, two turns, an answer at once, free sampling."""
    number = int(question["id"][1:])
    turns = [[ASK_IMAGE, ASK_TEXT, ANSWER], [ASK_TEXT, ANSWER], [ANSWER], []][number % 4]
    return turns[turn] if turn < len(turns) else None


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_tiny_checkpoints(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def session_policy(tiny_checkpoints: dict[str, str]) -> tuple[Any, Any]:
    return load_policy(tiny_checkpoints["vlm"])


@pytest.fixture
def policy(session_policy: tuple[Any, Any]) -> tuple[Any, Any]:
    """Shared by the tests that do not train."""
    return session_policy


@pytest.fixture
def fresh_policy(tiny_checkpoints: dict[str, str]) -> tuple[Any, Any]:
    """For the tests that train or patch the model."""
    return load_policy(tiny_checkpoints["vlm"])


@pytest.fixture
def environment() -> SearchEnvironment:
    return SearchEnvironment(FakeTextIndex(), FakeImageIndex(), top_k_image=2, thumbnails=True)


@pytest.fixture
def questions() -> list[dict[str, Any]]:
    """Pictures in most, text only in some, prompts of three lengths."""
    return [make_question(number, has_image=number % 5 != 4) for number in range(8)]


@pytest.fixture
def make_engine(policy: tuple[Any, Any], environment: SearchEnvironment) -> Callable[..., Any]:
    def make(**settings: Any) -> RolloutEngine:
        model, processor = policy
        options = {
            "max_new_tokens_per_turn": 40,
            "max_completion_tokens": 300,
            "script": scripted,
            **settings,
        }
        return RolloutEngine(model, processor, options.pop("environment", environment), **options)

    return make


@pytest.fixture
def mixed_script() -> Callable[..., str | None]:
    return scripted


@pytest.fixture
def full_forward() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Slow reference: log-probs of an episode's tokens from one plain forward of its sequence."""

    def compute(engine: RolloutEngine, trajectory: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pictures = [engine.images.encode(image) for image in trajectory.all_images]
        if pictures:
            inputs["mm_token_type_ids"] = (ids == engine.image_token_id).int()
            inputs["pixel_values"] = torch.cat([p.pixel_values for p in pictures])
            inputs["image_grid_thw"] = torch.tensor([p.grid for p in pictures])
        with torch.no_grad():
            logits = engine.model.eval()(**inputs).logits[0] / engine.temperature
        n_prompt = len(trajectory.prompt_ids)
        logps = logits[n_prompt - 1 : -1].log_softmax(-1)
        chosen = logps.gather(1, ids[0, n_prompt:, None])[:, 0]
        return chosen, torch.tensor(trajectory.completion_mask).bool()

    return compute


REWARDS = {"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1}


class Log(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.lines.append(dict(logs))


@pytest.fixture
def make_trainer(fresh_policy, environment, questions, tmp_path, request):
    def make(
        script=None,
        peft_config=None,
        environment=environment,
        rewards=REWARDS,
        questions=questions,
        **settings,
    ):
        # late, for the program of two processes, which has to set up DeepSpeed first
        from trl import GRPOConfig

        from train.grpo import SearchGRPOTrainer

        model, processor = fresh_policy
        ours = {
            name: settings.pop(name)
            for name in ("algorithm", "reference", "anchor")
            if name in settings
        }
        options = {
            "output_dir": str(tmp_path / "checkpoints"),
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 300,
            "generation_kwargs": {"max_new_tokens": 40},
            "max_steps": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            **settings,
        }
        log = Log()
        trainer = SearchGRPOTrainer(
            model,
            args=GRPOConfig(**options),
            questions=questions,
            environment=environment,
            rewards=rewards,
            processing_class=processor,
            callbacks=[log],
            script=script,
            peft_config=peft_config,
            **ours,
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.metric_lines = log.lines
        return trainer

    return make
