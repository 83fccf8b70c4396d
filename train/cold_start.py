"""Cold start: the plain VLM learns to search from whole episodes, then GRPO takes over.

    obm sft models.init=atlas://vlm output=runs/cold
    deepspeed launch/train.sh models.init=runs/cold/policy output=runs/cold-s0

The rival of a merged start, as the agents of the field have it: distilled episodes of a solver (the
atlas's own, or a checkpoint) on questions of the training split, loss on the policy's tokens alone.
Episodes are written token by token as a rollout would have them, and go through the real
environment. The solver's episodes cost next to nothing here; a teacher's cost counts in cost.json.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from configs.schema import dump_config, resolve_model

if TYPE_CHECKING:
    from configs.schema import Config
    from train.episodes import EpisodeEngine
    from train.sft import SFTExample
    from train.trajectories import Trajectory

logger = logging.getLogger(__name__)

BATCH = 128
"""Questions that a teacher rolls out together."""


def describe_cold_start(config: Config) -> str:
    """What `obm sft` would do."""
    check_settings(config)
    settings = config.sft
    questions = training_questions(config)
    n_seen = settings.steps * settings.batch_size / settings.episodes
    lines = [
        dump_config(config),
        f"start     {resolve_model(config.models.init or '')}",
        f"teacher   {settings.teacher}",
        f"episodes  {settings.episodes} at most, of {len(questions)} training questions",
        f"training  {settings.steps} steps of {settings.batch_size}: each episode {n_seen:.1f} "
        "times at least"
        + (f", {settings.micro_batch_size} at once" if settings.micro_batch_size else ""),
    ]
    return "\n".join(lines)


def run_cold_start(config: Config, *, overwrite: bool = False) -> Path:
    """Collects episodes, trains, and writes the policy.

    Args:
        config: the experiment.
        overwrite: delete what lies in the run folder.

    Returns:
        Folder of the policy, which `models.init` takes.

    Raises:
        ConfigError: settings, several GPUs, a folder in use, or no right episode.
    """
    from train.cost import Cost
    from train.files import write_json
    from train.given import check_one_gpu, choose_frozen
    from train.policy import load_policy
    from train.run_folder import prepare_folder
    from train.sft import SFTStage, run_stage
    from train.sport_tune import save_policy
    from train.trajectories import append_jsonl
    from train.worlds import build_engine

    check_settings(config)
    check_one_gpu("obm sft")
    settings = config.sft
    init = resolve_model(config.models.init or "")
    folder = Path(config.output)
    frozen = choose_frozen(config, init)
    prepare_folder(
        folder, config, init, resume=False, overwrite=overwrite, frozen=frozen, can_resume=False
    )
    cost = Cost()
    questions = training_questions(config)
    model, processor = load_policy(init, max_pixels=config.models.max_pixels)
    with cost.part("episodes"):
        engine: Any = build_engine(config, model, processor, rollout=None)
        taught = collect(config, engine, questions)
    rows = [e.to_dict(0, config.arm_name, config.seed, "teacher") for e in taught]
    append_jsonl(folder / "trajectories.jsonl", rows)
    logger.info("%d of %d questions have a right episode", len(taught), len(questions))
    if not taught:
        raise ConfigError(
            f"sft.teacher: {settings.teacher} ends none of {len(questions)} episodes with a right "
            "answer; choose another teacher, other sft.kinds or a higher budget of searches"
        )
    examples = [to_example(episode) for episode in taught]

    def draw(rng: random.Random) -> SFTExample:
        return rng.choice(examples)

    trains_vision = not config.models.freeze_vision
    stage = SFTStage(
        "cold start", draw, settings.steps, settings.batch_size, settings.micro_batch_size,
        settings.gradient_checkpointing, settings.learning_rate, settings.warmup_steps,
        schedule="cosine", seed=config.seed,
        trainable=lambda name: trains_vision or ".visual." not in name,
        frozen_heads=frozen.heads if frozen else (), shared=config.freeze_heads.shared,
    )  # fmt: skip
    with cost.part("training"):
        log_every = max(1, settings.steps // 10)
        loss = run_stage(model, processor, stage, folder / "scratch", log_every)
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    save_policy(model, processor, folder / "policy")
    logger.info("%d steps, loss %.3f", settings.steps, loss)
    cost.write(folder)
    cost.write_for_policy(folder / "policy", init, "sft")
    done = {"episodes": len(taught), "questions": len(questions), "loss": round(loss, 4)}
    write_json(folder / "done.json", {**done, "policy": "policy"})
    return folder / "policy"


def training_questions(config: Config) -> list[dict[str, Any]]:
    """Questions to have episodes of: training split only, no more than `sft.episodes`.

    Raises:
        ConfigError: benchmark questions, which the solver does not know.
    """
    from train.worlds import is_benchmark, load_questions, load_train_questions

    settings = config.sft
    if is_benchmark(config.environment.train_benchmark):
        if settings.teacher == "solver":
            raise ConfigError(
                "sft.teacher: the solver knows the atlas's questions only; name a checkpoint, or "
                "set environment.train_benchmark to null"
            )
        return load_train_questions(config)[: settings.episodes]
    kinds = settings.kinds or config.environment.kinds
    return load_questions(config, "train", kinds, settings.episodes)


def collect(
    config: Config, engine: EpisodeEngine, questions: Sequence[dict[str, Any]]
) -> list[Trajectory]:
    """Episodes of the teacher with a right answer, in the student's tokens."""
    if config.sft.teacher == "solver":
        from environments.atlas.solver import next_turn

        episodes = [write_episode(engine, question, next_turn) for question in questions]
    else:
        episodes = _of_checkpoint(config, engine, questions)
    return [
        episode
        for episode, question in zip(episodes, questions, strict=True)
        if episode is not None and is_right(episode, question)
    ]


def is_right(episode: Trajectory, question: dict[str, Any]) -> bool:
    """Whether the episode ended in a right answer and no tool failed."""
    from rewards.answer import exact_match

    return (
        episode.stop_reason == "answer"
        and exact_match(episode.answer or "", question["answers"])
        and not any(turn.is_error for turn in episode.turns)
    )


def write_episode(
    engine: EpisodeEngine, question: dict[str, Any], say: Callable[[Any], str | None]
) -> Trajectory | None:
    """An episode in which `say` writes the turns: no model runs, tokens and tools are real.

    Args:
        engine: of the student.
        question: the task.
        say: the running episode -> the next turn's text, None to give up.

    Returns:
        The episode; None where it was given up.
    """
    from train.trajectories import Turn

    episode, trajectory = engine._start(question, engine.prepare(question))
    while not episode.done:
        text = say(episode)
        if text is None:
            return None
        ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        # a turn that its text does not end, ends by a token
        if not ids or not engine._is_complete(ids):
            ids = [*ids, engine.tokenizer.eos_token_id]
        trajectory.turns.append(Turn(text, ids, [0.0] * len(ids), {}))
        room = engine.max_completion_tokens - len(trajectory.completion_ids)
        engine._apply(episode, trajectory, episode.step(text), room)
    return trajectory


def _of_checkpoint(
    config: Config, engine: EpisodeEngine, questions: Sequence[dict[str, Any]]
) -> list[Trajectory | None]:
    """Right greedy episodes of another policy, said again in the student's tokens."""
    from train.policy import load_for_inference
    from train.worlds import build_engine

    model, processor = load_for_inference(
        resolve_model(config.sft.teacher), max_pixels=config.models.max_pixels
    )
    teacher = build_engine(config, model, processor, rollout=None)
    played: list[Trajectory] = []
    for start in range(0, len(questions), BATCH):
        played += teacher.rollout_rows(questions[start : start + BATCH], greedy=True, number=0)
        teacher.release_images()

    def repeat(episode: Trajectory) -> Callable[[Any], str | None]:
        turns = iter(episode.turns)
        return lambda running: next((turn.text for turn in turns), None)

    # saying an episode again searches again, which may cost money
    return [
        write_episode(engine, question, repeat(episode)) if is_right(episode, question) else None
        for question, episode in zip(questions, played, strict=True)
    ]


def to_example(episode: Trajectory) -> SFTExample:
    """Tokens and labels of an episode: what the policy says is learned, the rest is read."""
    from train.sft import IGNORE, SFTExample

    said = zip(episode.completion_ids, episode.completion_mask, strict=True)
    labels = [token if mask else IGNORE for token, mask in said]
    return SFTExample(
        [*episode.prompt_ids, *episode.completion_ids],
        [IGNORE] * len(episode.prompt_ids) + labels,
        episode.all_images,
    )


def check_settings(config: Config) -> None:
    """Refuses what would only be found after collecting.

    Raises:
        ConfigError: names the key, the reason and the fix.
    """
    if not config.models.init:
        raise ConfigError("models.init: missing; name the VLM to start from")
    if config.lora.r > 0:
        raise ConfigError("lora.r: obm sft trains whole weights; set lora.r to 0")
    settings = config.sft
    if settings.micro_batch_size and settings.batch_size % settings.micro_batch_size:
        raise ConfigError(
            f"sft.micro_batch_size: {settings.micro_batch_size} does not divide sft.batch_size, "
            f"which is {settings.batch_size}; choose one that does"
        )
    if settings.teacher != "solver":
        resolve_model(settings.teacher)
