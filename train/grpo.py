"""GRPO on search episodes: TRL's trainer with our rollout, our reward parts and our forward.

Read top to bottom: one training step is `_generate_and_score_completions` (roll out, score, group
advantages) and `compute_loss`. TRL keeps advantages, loss variants, optimisation and checkpoints.

Differs from TRL 1.16 in what it would get wrong or slow here:
* the rollout keeps its cache over turns (`train.rollout`) and stops at a call's closing tag;
* TRL never sees the pictures: they travel beside the batch and are encoded once each, so a
  placeholder can not lose its picture and no process waits for another's images;
* where a rollout serves several micro-batches its groups stay together, so that each prompt and
  picture is read once, and not in nearly all of them;
* log-probs are computed at the policy's own tokens only (`train.scoring`), and not at all for
  groups in which every episode got the same reward: their advantages are made exactly zero, which
  TRL's rounding leaves them short of;
* a resumed run continues the same random numbers and the same generation buffer
  (`train.resumable`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from trl import GRPOConfig
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

from configs.sections import Algorithm
from environments.live import tool_counts
from rewards.compose import part_names, score_each
from rewards.functions import RewardFunction, add_functions, check_columns
from rewards.judge import make_judge
from rewards.trajectory import get
from train import scoring
from train.anchor import SaliencyAnchor
from train.credit import groups_without_signal
from train.episode_metrics import episode_sums
from train.episodes import Script
from train.groups import Groups, punish_length
from train.policy import causal_model, reference_from
from train.resumable import ResumableGRPOTrainer
from train.settings import refuse_unused_sampling
from train.timing import OptimizerStage, clock, speeds, time_forward, timed
from train.trajectories import Trajectory, first_masked_turn, loss_mask, turn_advantages
from train.vision import EncodedImage
from train.watchdog import progress
from train.weights import gather_along
from train.worlds import engine_class


class SearchGRPOTrainer(ResumableGRPOTrainer):
    """Trains a policy on search episodes.

    Args:
        model: the policy; with `beta` > 0 its `name_or_path` must be its folder (the reference).
        args: TRL's settings. `max_completion_length` is the budget of an episode with its
            observations, `generation_kwargs["max_new_tokens"]` that of one turn.
        questions: training questions, in the columns that `environments` describes.
        environment: has `start(question) -> Episode` and `dialect`.
        rewards: the section `rewards` of the settings.
        functions: reward functions of one's own, added to the total.
        processing_class: processor of the policy.
        algorithm: the section `algorithm` of the settings.
        reference: folder of the reference policy of `beta`; None = where `model` was loaded from.
        anchor: pulls the policy towards where it started.
        callbacks: transformers callbacks.
        tool_workers: threads for tool calls, 0 = in line.
        script: makes the policy say given turns (tests).
        peft_config: adapter to train instead of the whole model.
        rollout: the section `rollout` of the settings; None = in process.
    """

    def __init__(
        self,
        model: Any,
        *,
        args: GRPOConfig,
        questions: Sequence[dict[str, Any]],
        environment: Any,
        rewards: Any,
        processing_class: Any,
        callbacks: list[Any] | None = None,
        tool_workers: int = 0,
        script: Script | None = None,
        peft_config: Any = None,
        rollout: Any = None,
        algorithm: Algorithm | None = None,
        reference: str | None = None,
        anchor: SaliencyAnchor | None = None,
        functions: Sequence[RewardFunction] = (),
    ) -> None:
        self.questions = list(questions)
        self.reward_settings = rewards
        self.algorithm = algorithm or Algorithm()
        self.anchor = anchor
        self.judge = make_judge(rewards)
        self.functions = list(functions)
        check_columns(self.functions, self.questions)
        parts = [*part_names(rewards), *(function.name for function in self.functions)]
        # only the total, the first, is optimised; the parts are there to be logged
        args.reward_weights = [1.0] + [0.0] * (len(parts) - 1)
        # TRL recognises a truncated episode by its last token; here the stop reason says it
        self._mask_truncated = args.mask_truncated_completions
        args.mask_truncated_completions = False
        self._added_parts = [
            part
            for part, weight in (
                ("efficiency", self.algorithm.efficiency_bonus),
                ("overlong", self.algorithm.overlong_penalty),
            )
            if weight
        ]
        self._masks_fatal = get(rewards, "infrastructure_fault", "skip") == "mask"
        generation = dict(args.generation_kwargs or {})
        n_per_turn = generation.pop("max_new_tokens", args.max_completion_length)
        refuse_unused_sampling(args, generation)
        args.generation_kwargs = None
        with reference_from(model, reference):
            super().__init__(
                model=model,
                reward_funcs=[_read_part(part) for part in parts],
                args=args,
                train_dataset=Dataset.from_dict(
                    {
                        "prompt": [question["question"] for question in self.questions],
                        "row": list(range(len(self.questions))),
                    }
                ),
                processing_class=processing_class,
                callbacks=callbacks,
                peft_config=peft_config,
            )
        self._correct_importance(rollout)
        self._engine_sleeps = rollout is not None and rollout.sleep
        self.engine = engine_class(rollout)(
            self.accelerator.unwrap_model(self.model),
            processing_class,
            environment,
            max_new_tokens_per_turn=n_per_turn,
            max_completion_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            tool_workers=tool_workers,
            script=script,
        )
        self._install_scoring()
        self.add_callback(OptimizerStage(self, self._timed))
        self.evaluate_policy: Callable[[], dict[str, float]] | None = None
        """set by the evaluation callback; runs when transformers asks for an evaluation"""
        self.last_trajectories: list[Trajectory] = []
        """this process' episodes of the latest rollout"""
        self.n_policy_tokens = 0
        """tokens sampled in training so far, all processes"""
        self._groups = Groups(
            self.algorithm,
            self.num_generations,
            len(self.questions),
            args.seed,
            self._all_rows,
            self.accelerator.process_index,
        )
        self._batch_rows: list[int] = []
        self._totals: list[float] = []
        self._batch_pictures: list[list[EncodedImage]] = []
        self._batch_policy_mask: torch.Tensor | None = None
        self._batch_entropies = torch.empty(0)
        self._loss_inputs: dict[str, Any] | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self.is_evaluating = False
        """set by the evaluation callback: the seconds of an evaluation are its own"""
        self._time_tower()
        self._last_logged_step = 0
        self._last_logged_tokens = 0

    def _correct_importance(self, rollout: Any) -> None:
        """Switches on TRL's correction for log-probs that another program computed.

        From here on `use_vllm` decides on nothing else: TRL generates in `_generate`, which is
        ours. Old log-probs come from our scoring, the ratio and its metrics from TRL.
        """
        if rollout is None or rollout.backend == "in_process":
            return
        self.use_vllm = self.vllm_importance_sampling_correction = (
            rollout.importance_correction != "none"
        )
        self.vllm_importance_sampling_mode = rollout.importance_correction
        self.vllm_importance_sampling_clip_max = rollout.importance_cap
        self.vllm_importance_sampling_clip_min = None

    def _install_scoring(self) -> None:
        images = self.engine.images
        blank = images.encode(Image.new("RGB", (56, 56))) if images and self._is_vlm else None
        for model in (self.model, self.ref_model):
            if model is None:
                continue
            scoring.install(
                causal_model(self.accelerator.unwrap_model(model)),
                temperature=self.temperature,
                merge_size=images.merge_size if images else 2,
                blank=blank,
            )

    def _time_tower(self) -> None:
        """The vision tower works inside several stages; each of its forwards is timed."""
        core = causal_model(self.accelerator.unwrap_model(self.model))
        tower = getattr(core.model, "visual", None)
        if tower is not None:
            time_forward(tower, lambda seconds: self._add_seconds("vision", seconds))

    # ---------------------------------------------------------------- one step: episodes

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        """TRL's; every process waits here for the rewards of all."""
        with self._timed("sync"):
            rewards = super()._calculate_rewards(*args)
        self._totals = rewards[:, 0].tolist()
        return rewards

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The next micro-batch; TRL's, but that a rollout is shuffled by groups and not by rows."""
        n_parts = self.args.steps_per_generation
        if n_parts == 1 or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % (n_parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            order = shuffled_groups(self._batch_rows)
            batch = {name: _in_order(values, order) for name, values in batch.items()}
            self._buffered_inputs = split_tensor_dict(batch, n_parts)
        return self._buffered_inputs[self._step % n_parts]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Rolls out, scores and gives TRL the padded batch; pictures ride along."""
        self._batch_rows = [example["row"] for example in inputs]
        with self._timed("generate"):
            batch = super()._generate_and_score_completions(inputs)
        batch["pictures"] = self._batch_pictures
        batch["advantages"] = self._assign_credit(
            self._without_rounding(batch["advantages"]), batch["completion_ids"].shape[1]
        )
        for episode, advantages in zip(
            self.last_trajectories, batch["advantages"].tolist(), strict=True
        ):
            episode.advantages = turn_advantages(episode, advantages)
        missing = batch["completion_ids"].shape[1] - self._batch_entropies.shape[1]
        entropies = torch.nn.functional.pad(self._batch_entropies, (0, missing))
        batch["sampling_entropies"] = entropies.to(batch["completion_ids"].device)
        self._batch_policy_mask = None
        return batch

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """One episode per prompt.

        Returns:
            TRL's 8-tuple: prompt ids, completion ids, tool mask (1 = the policy's token),
            completions as text, sampling log-probs, fields for the rewards, images, tool images.
            The last two stay empty: the pictures are ours.
        """
        with self.policy_for_generation():
            sampled = self._groups.sample(
                self._batch_rows, self._roll_out, lambda: self.engine.n_rollouts
            )
        trajectories = sampled.episodes
        for name, value in sampled.metrics.items():
            self._metrics["train"][name].append(value)
        prompts[:] = [self.questions[row]["question"] for row in self._batch_rows]
        masks = [
            loss_mask(trajectory, self._masks_fatal, self._mask_truncated)
            for trajectory in trajectories
        ]
        completion_ids = [trajectory.completion_ids for trajectory in trajectories]
        for trajectory, mask in zip(trajectories, masks, strict=True):
            trajectory.masked_from = first_masked_turn(trajectory, mask)
        self.last_trajectories = trajectories
        self._batch_pictures = [
            [self.engine.encode_image(image) for image in trajectory.all_images]
            for trajectory in trajectories
        ]
        self.engine.release_images()
        self._batch_policy_mask = _pad_right(masks)
        entropies = [torch.tensor(t.completion_entropies) for t in trajectories]
        self._batch_entropies = torch.nn.utils.rnn.pad_sequence(entropies, batch_first=True)
        with self._timed("sync"):
            self._log_episodes(trajectories, sampled.replaced)
        return (
            [trajectory.prompt_ids for trajectory in trajectories],
            completion_ids,
            masks,
            [trajectory.text for trajectory in trajectories],
            [trajectory.completion_logprobs for trajectory in trajectories],
            {"trajectories": trajectories},
            None,
            [],
        )

    def _roll_out(self, rows: list[int], first_row: int) -> list[Trajectory]:
        """Scored episodes of these questions; `first_row` is the first one's number of all rows."""
        questions = [self.questions[row] for row in rows]
        with self._timed("rollout"):
            trajectories = self.engine.rollout_rows(questions, first_row=first_row)
        for stage, seconds in self.engine.timings.items():
            self._seconds[stage] += seconds
        with self._timed("reward"):
            check_format = self.engine.environment.dialect.check_format
            scores = score_each(
                trajectories, questions, self.reward_settings, check_format, self.judge
            )
            add_functions(self.functions, trajectories, questions, scores)
            for trajectory, parts in zip(trajectories, scores, strict=True):
                trajectory.rewards = parts
                punish_length(trajectory, self.algorithm, self.engine.max_completion_tokens)
        return trajectories

    @property
    def last_questions(self) -> list[dict[str, Any]]:
        """The questions of `last_trajectories`, in their order."""
        return [self.questions[row] for row in self._batch_rows]

    def _all_rows(self, values: list[Any]) -> list[Any]:
        """The values of all processes, in the order of their rows."""
        if self.accelerator.num_processes == 1:
            return list(values)
        with self._timed("sync"):
            return gather_object(values)

    def _without_rounding(self, advantages: torch.Tensor) -> torch.Tensor:
        """TRL's advantages [B], exactly 0 in groups without signal, whose share is a metric.

        The mean of equal rewards can be another number by rounding, as that of eight times 0.1 in
        fp32, so TRL gives them -7e-5. Where no group has a signal, Adam makes a whole step of that,
        away from what the policy samples.
        """
        dull = groups_without_signal(self._totals, self.num_generations)
        n_groups = len(self._totals) // self.num_generations
        # TRL asks whether the deviation is about 0, with `scale_rewards: batch` that of all groups
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["frac_reward_zero_std"][-1] = len(dull) / n_groups
        first = self.accelerator.process_index * len(advantages)
        groups = torch.arange(first, first + len(advantages)) // self.num_generations
        is_dull = torch.isin(groups, torch.tensor(dull, dtype=torch.long))
        return advantages.masked_fill(is_dull.to(advantages.device), 0.0)

    def _assign_credit(self, advantages: torch.Tensor, width: int) -> torch.Tensor:
        """TRL's advantages [B], or [B, C] with hop credit; never negative after a dead service."""
        episodes = self.last_trajectories
        if self.algorithm.hop_credit > 0.0:
            questions = [self.questions[row] for row in self._batch_rows]
            normalize = self.args.scale_rewards not in ("none", False)
            advantages = self._groups.with_hop_credit(
                advantages, episodes, questions, width, normalize
            )
        if self._masks_fatal:
            is_fatal = torch.tensor([t.fatal_turn is not None for t in episodes])
            is_fatal = is_fatal.to(advantages.device).view(-1, *[1] * (advantages.dim() - 1))
            # what a dead service cut short may be praised, but not blamed
            advantages = torch.where(is_fatal, advantages.clamp(min=0), advantages)
        return advantages

    @contextmanager
    def policy_for_generation(self) -> Iterator[Any]:
        """The bare policy with whole parameters.

        Under ZeRO-3 they are gathered once for the whole block, so processes may take different
        numbers of turns inside it. A policy on a server is brought up to date instead.
        """
        if self.engine.is_remote:
            with self._server_awake():
                yield self.accelerator.unwrap_model(self.model)
            return
        gathered = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
        )
        with ExitStack() as stack:
            with self._timed("gather"):
                model = stack.enter_context(gathered)
            yield model

    @contextmanager
    def _server_awake(self) -> Iterator[None]:
        """The server with the weights of this step; the first process speaks for all."""
        is_main = self.accelerator.is_main_process
        if self._engine_sleeps:
            if is_main:
                self.engine.wake()
            self.accelerator.wait_for_everyone()
        step = self.state.global_step
        if self.engine.policy_version != step:
            with self._timed("sync"):
                model = self.accelerator.unwrap_model(self.model)
                if is_main:
                    self.engine.send_policy(model, step)
                else:
                    gather_along(model)
                self.accelerator.wait_for_everyone()
                self.engine.confirm_policy(step)
        yield
        if self._engine_sleeps:
            self.accelerator.wait_for_everyone()
            if is_main:
                self.engine.sleep()

    def _log_episodes(self, trajectories: list[Trajectory], replaced: list[Trajectory]) -> None:
        """Metrics of the rollout over all processes, under TRL's names where it has them."""
        totals = episode_sums(trajectories, replaced, self._added_parts)
        lengths = [t.n_policy_tokens for t in trajectories]
        device = self.accelerator.device
        local = torch.tensor([*totals.values(), len(trajectories)], dtype=torch.float64)
        if device.type == "mps":  # no float64 there
            local = local.float()
        summed = self.accelerator.reduce(local.to(device), reduction="sum").tolist()
        n_episodes = summed.pop()
        extremes = self.accelerator.gather(
            torch.tensor([min(lengths), max(lengths)], device=device)
        )
        sums = dict(zip(totals, summed, strict=True))
        metrics = self._metrics["train" if self.model.training else "eval"]
        n_tokens, n_prompt_tokens = sums.pop("tokens"), sums.pop("prompt_tokens")
        self.n_policy_tokens += int(n_tokens)
        self.state.num_input_tokens_seen += int(n_tokens + n_prompt_tokens)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for name, value in sums.items():
            metrics[name].append(value / n_episodes)
        metrics["completions/min_length"].append(extremes.min().item())
        metrics["completions/max_length"].append(extremes.max().item())

    # ---------------------------------------------------------------- one step: the loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """TRL's step, timed: what is neither generation nor update is forward and backward."""

        def elsewhere() -> float:
            return self._seconds["generate"] + self._seconds["optimizer"]

        if self.anchor is not None:
            self.anchor.accumulation_steps = self.current_gradient_accumulation_steps
        start, before = clock(), elsewhere()
        with progress.stage("loss"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._seconds["loss"] += clock() - start - (elsewhere() - before)
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss; remembers the batch for the forward, which TRL passes only in part."""
        self._loss_inputs = inputs
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._loss_inputs = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probs [B, C] of the policy's tokens, 0 at observations and padding.

        Called by TRL for the loss (with gradients) and, when asked for, for the old and the
        reference log-probs of a whole generation batch.
        """
        inputs = self._loss_inputs
        if inputs is None:
            assert self._batch_policy_mask is not None
            missing = logits_to_keep - self._batch_policy_mask.shape[1]  # pad_to_multiple_of
            policy_mask = torch.nn.functional.pad(self._batch_policy_mask, (0, missing))
            pictures, chosen = self._batch_pictures, torch.arange(len(input_ids))
            logps, entropies = (torch.zeros(policy_mask.shape) for _ in range(2))
        else:
            policy_mask = inputs["completion_mask"] * inputs["tool_mask"]
            pictures, chosen = inputs["pictures"], self._rows_to_score(inputs)
            # rows without a gradient keep the values they were sampled with
            logps = inputs.get("old_per_token_logps", inputs["sampling_per_token_logps"])
            logps = logps * policy_mask
            entropies = inputs["sampling_entropies"] * policy_mask
        logps, entropies = logps.to(input_ids.device), entropies.to(input_ids.device)
        for part in chosen.split(batch_size or len(chosen)):
            rows = scoring.rows_from_padded(
                input_ids[part],
                attention_mask[part],
                policy_mask[part],
                [pictures[i] for i in part.tolist()],
                self._count_buckets(len(part)),
                with_entropy=self._entropy_bonus_enabled,
            )
            with self.accelerator.autocast():
                part_logps, part_entropies = model(scored_rows=rows)
            logps = logps.index_put((part.to(logps.device),), part_logps)
            entropies = entropies.index_put((part.to(logps.device),), part_entropies)
        if inputs is not None:
            self._log_mismatch(logps.detach(), inputs["sampling_per_token_logps"], policy_mask)
        return logps, entropies if compute_entropy else None, None

    def _rows_to_score(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Rows whose tokens have a gradient, int64 [R].

        Every variant of the loss multiplies a token's term by its advantage and its mask; where
        one of them is 0 (the whole group got one reward, the episode was cut) and nothing else
        pulls on the policy, the forward is spared. At least one row stays, so that every parameter
        takes part on every process.
        """
        everything = torch.arange(len(inputs["advantages"]))
        pulls_anyway = self.beta != 0.0 or self._entropy_bonus_enabled or self.aux_loss_enabled
        if pulls_anyway or self.top_entropy_quantile < 1.0:
            return everything
        has_gradient = (inputs["advantages"] != 0).view(len(everything), -1).any(dim=1)
        has_gradient &= (inputs["completion_mask"] * inputs["tool_mask"]).any(dim=1)
        has_gradient = has_gradient.cpu()
        if not has_gradient.any():
            return inputs["completion_mask"].sum(dim=1).argmin().cpu().reshape(1)
        return everything[has_gradient]

    def _count_buckets(self, n_rows: int) -> int:
        """Forwards for this many rows: as many as the process with the most rows needs."""
        n_buckets = -(-n_rows // scoring.ROWS_PER_BUCKET)
        if self.accelerator.num_processes == 1:
            return n_buckets
        mine = torch.tensor([n_buckets], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def _log_mismatch(
        self, training: torch.Tensor, sampling: torch.Tensor, policy_mask: torch.Tensor
    ) -> None:
        """How far the log-probs of sampling are from those of training; off-policy steps count."""
        difference = ((training - sampling).abs() * policy_mask).max()
        largest = self.accelerator.gather(difference.reshape(1)).max().item()
        self._metrics["train"]["sampling/logp_difference_max"].append(largest)

    # ---------------------------------------------------------------- log, evaluate, go on

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds seconds per stage and step (of this process) and speeds to TRL's metrics."""
        n_steps = self.state.global_step - self._last_logged_step
        if "loss" in logs and n_steps > 0:
            for stage, seconds in self._seconds.items():
                logs[f"time/{stage}_s"] = round(seconds / n_steps, 4)
            if self.anchor is not None:
                logs["anchor/loss"] = self.anchor.loss()
            if self.judge is not None:
                logs |= {f"judge/{name}": value for name, value in self.judge.report().items()}
            n_tokens = self.n_policy_tokens - self._last_logged_tokens
            logs |= speeds(n_tokens, self._seconds)
            logs |= tool_counts(self.engine.environment)
            self._seconds.clear()
            self._last_logged_step = self.state.global_step
            self._last_logged_tokens = self.n_policy_tokens
            # transformers takes the sum from itself, and what is no number stays one that is none
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out evaluation by episodes, not TRL's loss on an evaluation set."""
        with progress.stage("evaluation"):
            metrics = self.evaluate_policy() if self.evaluate_policy is not None else {}
        # this also takes back the request; transformers would repeat it at the end of the epoch
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def rollout_state(self) -> dict[str, Any]:
        """The counters from which sampling draws its random numbers and the log its tokens."""
        return {"n_rollouts": self.engine.n_rollouts, "n_policy_tokens": self.n_policy_tokens}

    def restore_rollout(self, state: dict[str, Any]) -> None:
        """Counts on from a checkpoint."""
        self.engine.n_rollouts = state["n_rollouts"]
        self.n_policy_tokens = state["n_policy_tokens"]
        self._last_logged_step = self.state.global_step
        self._last_logged_tokens = self.n_policy_tokens

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        with timed(stage, lambda seconds: self._add_seconds(stage, seconds)):
            yield

    def _add_seconds(self, stage: str, seconds: float) -> None:
        """What an evaluation does is no part of a training step's time."""
        if not self.is_evaluating:
            self._seconds[stage] += seconds


def shuffled_groups(questions: Sequence[int]) -> torch.Tensor:
    """An order of rows, int64 [B], in which neighbours with the same question stay neighbours."""
    begins = [i for i, one in enumerate(questions) if i == 0 or one != questions[i - 1]]
    groups = [torch.arange(*ends) for ends in pairwise([*begins, len(questions)])]
    return torch.cat([groups[i] for i in torch.randperm(len(groups)).tolist()])


def _in_order(values: Any, order: torch.Tensor) -> Any:
    """The rows of an entry of the batch in this order; a number for all rows stays."""
    if values is None or (isinstance(values, torch.Tensor) and values.ndim == 0):
        return values
    if isinstance(values, list):
        return [values[i] for i in order.tolist()]
    return values[order]


def _read_part(part: str) -> Callable[..., list[float | None]]:
    """TRL reward function that hands on one part of the score."""

    def reward(trajectories: list[Trajectory], **_: Any) -> list[float | None]:
        # an episode that cannot be scored has no part at all: TRL would count the rest as 0; in one
        # that is scored, a part that the question says nothing about added nothing
        return [
            None if t.rewards["total"] is None else t.rewards[part] or 0.0 for t in trajectories
        ]

    reward.__name__ = part
    return reward


def _pad_right(masks: list[list[int]]) -> torch.Tensor:
    """int64 [B, C], zeros behind each row."""
    padded = np.zeros((len(masks), max(map(len, masks))), dtype=np.int64)
    for row, mask in zip(padded, masks, strict=True):
        row[: len(mask)] = mask
    return torch.from_numpy(padded)
