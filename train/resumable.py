"""A GRPO trainer whose runs can be killed and go on to the same numbers.

TRL's checkpoint lacks the state of the rollout and the rest of a generation buffer; it is written
beside it, and rollout.json last of all: with it the checkpoint is whole (`train.resume` looks for
the newest). Mends also what transformers 5.23 does to a resumed run: one step too many behind the
last, questions shuffled as if its first epoch were the run's, Qwen2.5-VL's weights not loaded, and
a `grpo.save_steps` that has changed not read.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from train.checkpoint_files import measure_files
from train.disk import writing
from train.resume import Saved, forget_saved, own_checkpoints, state_name
from train.vision import EncodedImage
from train.watchdog import progress


class ResumableGRPOTrainer(GRPOTrainer):
    """TRL's trainer with checkpoints that are whole, or not there.

    A subclass says what its rollout needs to go on (`rollout_state`, `restore_rollout`).
    """

    def rollout_state(self) -> dict[str, Any]:
        """What this process' rollout needs to go on; plain numbers, tensors and containers."""
        raise NotImplementedError

    def restore_rollout(self, state: dict[str, Any]) -> None:
        """Takes back what `rollout_state` gave; weights, optimizer and step are there already."""
        raise NotImplementedError

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, remembered: accelerate wraps it, and no checkpoint has the state of its generator.

        Every process has its own, with the same seed.
        """
        self._sampler = super()._get_train_sampler(*args, **kwargs)
        return self._sampler

    def _run_epoch(self, *, epoch: int, epochs_trained: int, **kwargs: Any) -> None:
        """Goes through the rows once; a run killed behind its last step has none left to do.

        transformers 5.23 looks at the number of steps only after a step, and would do one more. And
        whole epochs that a resumed run has behind it are not shuffled again there, so that the
        next would ask what the first one asked.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if epoch == epochs_trained:  # the first of this start
            for _ in range(epochs_trained):
                next(iter(self._sampler), None)  # draws the order of an epoch
        super()._run_epoch(epoch=epoch, epochs_trained=epochs_trained, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card per checkpoint: the run folder itself says how it was made."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint; older ones go only once it is whole, so that a kill costs none."""
        folder, limit = Path(self.args.output_dir), self.args.save_total_limit
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        with progress.stage("save"), writing(checkpoint):
            if self.accelerator.is_main_process:
                forget_saved(checkpoint)
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self._save_rollout_state()
            if self.args.should_save:
                remove_older(checkpoint, limit)

    def _save_rollout_state(self) -> None:
        """What TRL's checkpoint lacks, one file a process."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        args, n_processes = self.args, self.accelerator.num_processes
        is_boundary = self._step % (args.steps_per_generation * self.num_iterations) == 0
        state = {
            **self.rollout_state(),
            # inside a buffer the rest of its episodes is still to be trained on
            "buffer": None if is_boundary else self._buffered_inputs,
        }
        torch.save(state, folder / state_name(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        # last of all: with it the checkpoint is whole
        if self.accelerator.is_main_process:
            rows = args.per_device_train_batch_size * n_processes
            plugin = args.deepspeed_plugin
            Saved(
                n_processes=n_processes,
                is_boundary=is_boundary,
                per_rollout=args.generation_batch_size,
                per_step=rows * args.gradient_accumulation_steps,
                zero_stage=plugin.zero_stage if plugin else 0,
                files=measure_files(folder),
                per_batch=args.per_device_train_batch_size,
            ).write(folder)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Loads the weights of a checkpoint, strictly.

        transformers 5.23 saves Qwen2.5-VL under the hub's tensor names, but resumes by the names
        in memory and only warns that nothing fits: training would go on from the start's weights.
        """
        core = self.accelerator.unwrap_model(self.model)
        if self.is_deepspeed_enabled or hasattr(core, "get_base_model"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(core).from_pretrained(resume_from_checkpoint, dtype=core.dtype)
        core.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also the state of the rollout, and the episodes that are still to be trained on."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # transformers goes on with the intervals of the checkpoint
        self.state.compute_steps(self.args, self.state.max_steps)
        path = Path(checkpoint) / state_name(self.accelerator.process_index)
        if not path.is_file():  # of a run with fewer processes, at a boundary: all files are alike
            path = path.with_name(state_name(0))

        def to_own_card(storage: Any, location: str) -> Any:
            # saved under the number that this rank's card had then; pictures stay off the card
            here = location if location == "cpu" else str(self.args.device)
            return torch.serialization.default_restore_location(storage, here)

        # of classes the buffer holds the pictures' own alone
        with torch.serialization.safe_globals([EncodedImage]):
            state = torch.load(path, map_location=to_own_card, weights_only=True)
        self._buffered_inputs = state.pop("buffer")
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self.restore_rollout(state)


def remove_older(newest: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beside the one just written, down to a number of them.

    transformers' own takes a copy of the user's, checkpoint-20-good, for one of its own, and may
    remove the one just written where others have later steps.

    Args:
        newest: the checkpoint just written, which stays.
        limit: `grpo.save_total_limit`; None or 0 = all stay.
    """
    if not limit:
        return
    others = [path for path in own_checkpoints(newest.parent) if path != newest]
    for path in others[: max(0, len(others) + 1 - limit)]:
        shutil.rmtree(path, ignore_errors=True)
