"""What a run writes while it goes: metrics, trajectories and health, W&B, and the console.

`metrics.jsonl` is the record; W&B and the console show the same numbers, a terminal as a live view,
anything else as one line a step. Evaluation runs where
transformers would run its own: after a step's log, before its checkpoint, so that a checkpoint of
step k always has the evaluation of step k in the files.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from configs.errors import ConfigError
from rewards.compose import score_each
from rewards.functions import add_functions
from train.evaluation import FOUR_PARTS, summarize
from train.followed import chosen, follow
from train.health import HealthMonitor, HealthWarning, Settings
from train.pictures import PictureFolder
from train.token_texts import TokenTexts
from train.trajectories import Trajectory, append_jsonl, gold_of, truncate_jsonl

if TYPE_CHECKING:
    from configs.schema import Config
    from train.grpo import SearchGRPOTrainer
    from train.live import LiveView

logger = logging.getLogger(__name__)

NOT_METRICS = ("epoch", "total_flos")
SHOWN = {  # console label -> metric
    "reward": "reward",
    "right": "rewards/accuracy/mean",
    "image": "search/rate_image",
    "text": "search/rate_text",
    "step_s": "step_time",
}


class Recorder:
    """Writes a run's files and its W&B run; does nothing on other processes than the first.

    Args:
        folder: the run folder.
        config: the experiment.
        is_main: whether this process writes.
        resume_step: step of the checkpoint that the run goes on from; later lines are dropped.
    """

    def __init__(
        self, folder: Path, config: Config, is_main: bool, resume_step: int | None = None
    ) -> None:
        self.folder, self.config, self.is_main = folder, config, is_main
        self._metrics = folder / "metrics.jsonl"
        self._trajectories = folder / "trajectories.jsonl"
        self._health = folder / "health.jsonl"
        self._token_texts: TokenTexts | None = None
        self._followed: list[dict[str, Any]] = []
        self.earlier_lines: list[dict[str, Any]] = []
        """lines of metrics.jsonl before this start"""
        self.live: LiveView | None = None
        """shows every line; None where no terminal is to show it"""
        self._start = time.perf_counter()
        self._device = DeviceClock()
        self._held: float | None = None
        """what `device_s` shows while something else than training happens"""
        self._wandb: Any = None
        if not is_main:
            return
        if resume_step is not None:
            kept = truncate_jsonl(self._metrics, resume_step)
            self._followed = truncate_jsonl(
                self._trajectories, resume_step, lambda row: bool(row.get("followed"))
            )
            if self._health.exists():
                truncate_jsonl(self._health, resume_step)
            self.earlier_lines = kept
            self._start -= kept[-1]["time_s"] if kept else 0.0
            self._device.add(kept[-1].get("device_s", 0.0) if kept else 0.0)
        self._pictures = PictureFolder(folder, config.tracking.picture_size)
        self._wandb = start_wandb(folder, config, resume_step)

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Has the lines of trajectories hold the tokens' texts, if the settings want them."""
        if self.config.tracking.token_logprobs:
            self._token_texts = TokenTexts(tokenizer)

    @property
    def time_s(self) -> float:
        """Seconds of running, interruptions left out."""
        return round(time.perf_counter() - self._start, 3)

    @property
    def device_s(self) -> float:
        """Device seconds of training so far, all processes, evaluations left out."""
        return round(self._device.seconds if self._held is None else self._held, 3)

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """What happens within is not counted in `device_s`, which stands still meanwhile."""
        before = self._held = self._device.seconds
        yield
        self._held = None
        self._device.add(before - self._device.seconds)

    def metrics(self, step: int, phase: str, n_tokens: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same in W&B, from where it can be read back.

        W&B keeps one row a step, so that the names of both phases must differ: what training logs
        gets the prefix `train/`, and the clocks of a line are kept under `train_clock/` and
        `eval_clock/` beside the plain ones, which serve as x axes. A null is a NaN there.

        Args:
            step: optimizer steps done.
            phase: "train" or "eval".
            n_tokens: policy tokens sampled in training so far.
            values: TRL's names; evaluation metrics get the prefix `eval/`.
        """
        if not self.is_main:
            return
        prefix = "eval/" if phase == "eval" else ""
        clean = {prefix + name: _finite(value) for name, value in values.items()}
        since_start = {"time_s": self.time_s, "device_s": self.device_s, "tokens": n_tokens}
        line = {"step": step, "phase": phase, **since_start, **clean}
        append_jsonl(self._metrics, [line])
        if self.live is not None:
            self.live.take(line)
        if self._wandb is not None:
            shown = clean if phase == "eval" else {f"train/{k}": v for k, v in clean.items()}
            row = {k: math.nan if v is None else v for k, v in shown.items()}
            row |= {f"{phase}_clock/{name}": value for name, value in since_start.items()}
            self._wandb.log({**row, "train/global_step": step, **since_start}, step=step)

    def trajectories(
        self,
        step: int,
        phase: str,
        episodes: Sequence[Trajectory],
        questions: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Lines of trajectories.jsonl: all of an evaluation, `log_trajectories` of a step.

        Of an evaluation the questions that are followed carry `"followed": true`. The pictures go
        to `pictures/`.

        Args:
            step: optimizer steps done.
            phase: "train" or "eval".
            episodes: in the order of their rows.
            questions: theirs, in the same order; none where they are not known.
        """
        if not self.is_main:
            return
        config, n_shown = self.config, self.config.tracking.log_trajectories
        few = _spread(range(len(episodes)), n_shown)
        kept = range(len(episodes)) if phase == "eval" else few
        rows = []
        for index in kept:
            episode = episodes[index]
            if self._token_texts is not None:
                for turn in episode.turns:
                    turn.tokens = self._token_texts(turn.token_ids)
            row = episode.to_dict(step, config.arm_name, config.seed, phase)
            if questions:
                row["gold"] = gold_of(questions[index])
            self._pictures.add(episode, row)
            rows.append(row)
        if phase == "eval":
            for index in chosen(len(rows), config.tracking.follow, config.environment.data_seed):
                rows[index]["followed"] = True
            self._followed += [row for row in rows if row.get("followed")]
        append_jsonl(self._trajectories, rows)
        if self._wandb is not None and few and phase == "eval":
            shown = [episodes[index] for index in few]
            tables = {"trajectories": trajectory_table(shown, step)}
            if self._followed:
                tables["followed"] = followed_table(self._followed)
            self._wandb.log(tables, step=step)

    def health(
        self, step: int, found: Sequence[HealthWarning], active: Sequence[HealthWarning]
    ) -> None:
        """Lines of health.jsonl, alerts of W&B, and its curve `health/active`.

        Args:
            step: optimizer steps done.
            found: warnings to say now.
            active: warnings that hold, said now or before.
        """
        if not self.is_main:
            return
        if self.live is not None:
            self.live.warn(active)
        if found:
            append_jsonl(self._health, [{"step": step, **asdict(warning)} for warning in found])
        if self._wandb is not None:
            self._wandb.log({"health/active": len(active)}, step=step)
            for warning in found:
                self._wandb.alert(title=warning.code, text=str(warning), level="WARN")

    def close(self) -> None:
        """Ends the W&B run."""
        if self._wandb is not None:
            self._wandb.finish()


class DeviceClock:
    """Seconds of device time since it was made, all processes together.

    On a GPU a process has its device for itself, so that its wall time counts. On a CPU the time
    that this process computed counts, on all its threads: what else runs on the machine, or waiting
    for a service, costs nothing. The other processes are taken to be as busy as this one.
    """

    def __init__(self) -> None:
        import torch

        self._now = time.perf_counter if torch.cuda.is_available() else time.process_time
        self._processes = int(os.environ.get("WORLD_SIZE", "1"))
        self._start, self._added = self._now(), 0.0

    @property
    def seconds(self) -> float:
        """Device seconds so far."""
        return (self._now() - self._start) * self._processes + self._added

    def add(self, seconds: float) -> None:
        """Count more, or with a negative number less."""
        self._added += seconds


class RunCallback(TrainerCallback):
    """Feeds the recorder from the trainer's log, and says how it goes.

    Args:
        trainer: gives episodes and token count.
        recorder: writes.
        health: what the health rules know of the settings.
    """

    def __init__(self, trainer: SearchGRPOTrainer, recorder: Recorder, health: Settings) -> None:
        self.trainer, self.recorder = trainer, recorder
        earlier = [line for line in recorder.earlier_lines if line["phase"] == "train"]
        self.monitor = HealthMonitor(health, earlier)
        self._n_recorded = -1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """One training line; transformers' closing summary is left out."""
        if "loss" not in logs:
            return
        values = {k: v for k, v in logs.items() if k not in NOT_METRICS}
        step = state.global_step
        self.recorder.metrics(step, "train", self.trainer.n_policy_tokens, values)
        n_rollouts = self.trainer.engine.n_rollouts
        if n_rollouts != self._n_recorded:  # several steps may train on one rollout
            self._n_recorded = n_rollouts
            self.recorder.trajectories(
                step, "train", self.trainer.last_trajectories, self.trainer.last_questions
            )
        if not self.recorder.is_main:
            return
        if self.recorder.live is None:
            shown = [
                f"{k} {values[name]:.3g}" for k, name in SHOWN.items() if _is_number(values, name)
            ]
            logger.info("step %d/%d  %s", step, state.max_steps, "  ".join(shown))
        found = self.monitor.check({"step": step, **values})
        self.recorder.health(step, found, self.monitor.active)
        for warning in found:
            logger.info("health at step %d: %s", step, warning)


class EvaluationCallback(TrainerCallback):
    """Greedy episodes on held-out questions at step 0, every few steps and at the end.

    The questions are shared out over the processes; under ZeRO-3 all of them must take part.

    Args:
        trainer: gives engine and policy.
        recorder: writes.
        questions: the fixed evaluation set.
        every: optimizer steps between evaluations.
    """

    def __init__(
        self,
        trainer: SearchGRPOTrainer,
        recorder: Recorder,
        questions: Sequence[dict[str, Any]],
        every: int,
    ) -> None:
        self.trainer, self.recorder = trainer, recorder
        self.questions, self.every = list(questions), every
        trainer.evaluate_policy = self.evaluate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The floor, before any update; and the end, of a run that is continued to where it is."""
        is_over = state.global_step >= state.max_steps
        if state.global_step == 0 or (is_over and not self._was_evaluated(state.global_step)):
            self.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for an evaluation after this step's log."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True

    def _was_evaluated(self, step: int) -> bool:
        """Whether the run was, before this start; only the first process has read its lines."""
        lines = self.recorder.earlier_lines
        found = [any(line["step"] == step and line["phase"] == "eval" for line in lines)]
        broadcast_object_list(found)
        return found[0]

    def evaluate(self) -> dict[str, float]:
        """Runs and records one evaluation; every process must call it."""
        with self.recorder.not_training():
            metrics = self._evaluate()
        return {f"eval_{name}": value for name, value in metrics.items()}

    def _evaluate(self) -> dict[str, float]:
        trainer, start = self.trainer, time.perf_counter()
        trainer.is_evaluating = True
        with trainer.policy_for_generation():
            episodes = self._roll_out()
        trainer.is_evaluating = False
        ordered = self._gather(episodes)
        scored: list[dict[str, float] | None] = [None]
        try:
            if self.recorder.is_main:  # a judge and functions of one's own are asked once
                scored[0] = self._score(ordered)
        finally:
            broadcast_object_list(scored)
        metrics = scored[0]
        if metrics is None:
            raise ConfigError("evaluation: the first process could not score it; see its error")
        metrics["time_s"] = round(time.perf_counter() - start, 3)
        step = trainer.state.global_step
        self.recorder.metrics(step, "eval", trainer.n_policy_tokens, metrics)
        self.recorder.trajectories(step, "eval", ordered, self.questions)
        if self.recorder.is_main:
            parts = "  ".join(f"{part} {metrics[part]:.3f}" for part in FOUR_PARTS)
            logger.info("evaluation at step %d  %s", step, parts)
        return metrics

    def _roll_out(self) -> list[Trajectory]:
        """Greedy episodes of this process' questions.

        On an accelerator no more of them together than in a rollout of training, for which there
        is room. In main memory only what an episode writes of its cache is taken.
        """
        engine, accelerator, args = self.trainer.engine, self.trainer.accelerator, self.trainer.args
        mine = self.questions[accelerator.process_index :: accelerator.num_processes]
        together = max(1, len(mine))
        if accelerator.device.type != "cpu" and not engine.is_remote:
            together = args.per_device_train_batch_size * args.steps_per_generation
        episodes: list[Trajectory] = []
        for first in range(0, len(mine), together):
            part = mine[first : first + together]
            episodes += engine.rollout_rows(part, greedy=True, number=0)
            engine.release_images()
        return episodes

    def _gather(self, episodes: list[Trajectory]) -> list[Trajectory]:
        """The episodes of all processes, in the order of the questions; with their pictures on the
        first process, which records them."""
        rank = self.trainer.accelerator.process_index
        world = self.trainer.accelerator.num_processes
        if world == 1:
            return episodes
        for episode in episodes:
            episode.images = []  # every process has the questions
        numbered = [(rank + i * world, episode) for i, episode in enumerate(episodes)]
        ordered = [e for _, e in sorted(gather_object(numbered), key=lambda pair: pair[0])]
        if self.recorder.is_main:
            for episode, question in zip(ordered, self.questions, strict=True):
                image = question.get("image")
                episode.images = [] if image is None else [image]
        return ordered

    def _score(self, episodes: list[Trajectory]) -> dict[str, float]:
        """Gives the episodes their rewards; returns the metrics."""
        trainer = self.trainer
        check_format = trainer.engine.environment.dialect.check_format
        scores = score_each(
            episodes, self.questions, trainer.reward_settings, check_format, trainer.judge
        )
        add_functions(trainer.functions, episodes, self.questions, scores)
        for episode, rewards in zip(episodes, scores, strict=True):
            episode.rewards = rewards
        metrics = summarize(episodes, self.questions)
        for function in trainer.functions:
            values = [parts[function.name] or 0.0 for parts in scores]
            metrics[f"rewards/{function.name}/mean"] = sum(values) / len(values)
        return metrics


# ---------------------------------------------------------------- W&B


def start_wandb(folder: Path, config: Config, resume_step: int | None = None) -> Any:
    """The run in Weights & Biases, offline where there is no login; None if it is disabled.

    The run id lies in `<folder>/wandb_id`, so that a resumed training goes on in the same run.
    Beside the settings its config has `record`: environment.json and start_cost.json of the run
    folder, whether its start is a merge and the step that the run goes on from, so that `obm
    compare` needs no run folder.
    """
    mode: Any = config.tracking.wandb
    if mode == "auto":
        mode = "online" if has_wandb_login() else "offline"
    mode = os.environ.get("WANDB_MODE") or mode  # set but empty is unset
    if mode == "disabled":
        return None
    import wandb

    id_file = folder / "wandb_id"
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    id_file.write_text(run_id + "\n")
    record: dict[str, Any] = {
        "resumed_at": resume_step,
        "merged": (folder / "merge.json").is_file(),
    }
    for name in ("environment", "start_cost"):
        file = folder / f"{name}.json"
        if file.is_file():
            record[name] = json.loads(file.read_text(encoding="utf-8"))
    return wandb.init(
        project=config.tracking.project,
        group=config.tracking.group,
        job_type="train",
        name=f"{config.arm_name}-s{config.seed}",
        id=run_id,
        resume="allow",
        mode=mode,
        dir=str(folder),
        config={**asdict(config), "arm": config.arm_name, "record": record},
        settings=wandb.Settings(silent=True, console="off"),
    )


def trajectory_table(episodes: Sequence[Trajectory], step: int) -> Any:
    """A few episodes as a W&B table: the conversation, each reward part, why it ended."""
    import wandb

    parts = list(dict.fromkeys(part for episode in episodes for part in episode.rewards))
    table = wandb.Table(
        columns=["step", "question_id", "prompt", "episode", "answer", "stop_reason", *parts]
    )
    for episode in episodes:
        scores = [episode.rewards.get(part) for part in parts]
        table.add_data(
            step,
            episode.question_id,
            episode.prompt,
            episode.text,
            episode.answer,
            episode.stop_reason,
            *scores,
        )
    return table


def followed_table(rows: Sequence[dict[str, Any]]) -> Any:
    """The followed questions as a W&B table: a question's evaluations stand below each other."""
    import wandb

    table = wandb.Table(
        columns=["question_id", "step", "changed", "answer", "total", "searches", "episode"]
    )
    for question_id, visits in follow(rows).items():
        for visit in visits:
            table.add_data(
                question_id,
                visit.step,
                ", ".join(visit.changed),
                visit.answer,
                visit.reward,
                " | ".join(visit.searches),
                visit.text,
            )
    return table


def has_wandb_login() -> bool:
    """Whether runs can be sent to W&B: a key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


# ---------------------------------------------------------------- helpers


def _finite(value: Any) -> Any:
    """JSON has no NaN: a mean over nothing is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(values: dict[str, Any], name: str) -> bool:
    return isinstance(values.get(name), int | float)


def _spread(rows: Sequence[int], n: int) -> list[int]:
    """n rows from all over the batch, so that they are not all of one group."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]
