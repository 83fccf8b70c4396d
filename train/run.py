"""Train a policy from a settings file: `deepspeed launch/train.sh --config configs/demo.yaml`.

The way of a run: read what is given and check it (`train.given`), make its folder
(`train.run_folder`), load the policy, train (`train.grpo`), leave the last policy.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import Config, dump_config, load_config, resolve_model, shipped_config
from rewards.functions import load_functions
from train.checkpoint_files import check_pickles
from train.disk import writing
from train.estimate import (
    DEFAULT_MACHINE,
    add_estimate_arguments,
    describe_estimate,
    estimate_arguments,
    find_machine,
)
from train.files import write_json
from train.given import (
    Given,
    check_pulls,
    check_start,
    choose_frozen,
    choose_reference,
    make_anchor,
    read_given,
)
from train.leash import end_with_starter
from train.libraries import be_quiet, keep_to_ourselves, load_quickly
from train.lock import locked
from train.resume import Start, convert, find_start
from train.run_folder import check_same_run, is_done, prepare_folder
from train.settings import build_grpo_config, describe_step, leave_group_at_exit, resolved_grpo
from train.terminal import spelt_out
from train.watchdog import Watchdog, progress

logger = logging.getLogger(__name__)


def train(argv: Sequence[str] | None = None) -> int:
    """Command line of launch/train.sh.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    options = _parse(argv)
    is_main = int(os.environ.get("RANK", "0")) == 0
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("train").setLevel(level)
    load_quickly()
    keep_to_ourselves()
    be_quiet()
    end_with_starter()
    try:
        path = Path(options.config) if options.config else shipped_config("demo")
        config = load_config(path, options.overrides)
        if options.dry_run:
            if is_main:
                n_processes = int(os.environ.get("WORLD_SIZE", "1"))
                print(describe_run(config, n_processes, **estimate_arguments(options)))
            return 0
        run_training(config, resume=options.resume, overwrite=options.overwrite)
    except Exception as error:
        if options.debug or getattr(error, "exit_code", None) != 2:
            raise
        # settings are wrong on all processes alike; a service may have failed one of them alone
        if is_main or not isinstance(error, ConfigError):
            print(f"error: {spelt_out(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return 0


def describe_run(
    config: Config,
    n_processes: int,
    machine: str = DEFAULT_MACHINE,
    prompt_tokens: int | None = None,
    server_gpus: int = 1,
) -> str:
    """What a run would do: resolved settings, the arithmetic of a step, expected memory and time.

    Args:
        config: the experiment.
        n_processes: processes that it is planned for.
        machine: see `train.estimate.find_machine`; one with a number decides on the processes.
        prompt_tokens: tokens of a prompt with its picture; None = those of the environment.
        server_gpus: accelerators of the vLLM server, where the settings name one.

    Raises:
        ConfigError: settings that contradict each other.
    """
    _, n_processes = find_machine(machine, n_processes)
    rows = describe_step(config, n_processes)
    check_pulls(config)
    rows += [
        ("reward function", f"{function.place}, weight {function.weight:g}")
        for function in load_functions(config.reward_functions)
    ]
    width = max(len(name) for name, _ in rows)
    expected = describe_estimate(config, n_processes, machine, prompt_tokens, server_gpus)
    return "\n".join([dump_config(config), *(f"{n:<{width}}  {v}" for n, v in rows), "", expected])


def run_training(config: Config, resume: bool = False, overwrite: bool = False) -> Path:
    """Trains `config.models.init` and returns the run folder.

    Args:
        config: the experiment.
        resume: go on from the newest complete checkpoint, to the same numbers.
        overwrite: delete what lies in the run folder.

    Raises:
        ConfigError: the folder is in use, the settings contradict themselves or the run that
            shall go on.
    """
    folder = Path(config.output)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not config.models.init:
        raise ConfigError("models.init: missing; name a merged folder, a VLM folder or a hub id")
    init = resolve_model(config.models.init)
    describe_step(config, world)
    check_pulls(config)
    given = read_given(
        config, world
    )  # what is wrong with it must be found before anything is written
    given.frozen = choose_frozen(config, init)
    if config.rollout.backend == "vllm":
        from train.worlds import connect

        connect(config.rollout).check()  # before anything slow
    with locked(folder, setting="output") if rank == 0 else nullcontext():
        start = find_start(folder, config, world) if resume else None
        if rank == 0:
            check_start(init)
            if start is not None:
                check_pickles(start.path)
        if resume and is_done(folder, resolved_grpo(config)["max_steps"]):
            if rank == 0:
                check_same_run(folder, config, given.frozen)
                logger.info("%s is done, there is nothing to go on with", folder)
            return folder
        if rank == 0:
            with writing(folder):
                prepare_folder(folder, config, init, resume, overwrite, given.frozen)
        return _train_in(config, folder, init, resume, start, given)


def _train_in(
    config: Config, folder: Path, init: str, resume: bool, start: Start | None, given: Given
) -> Path:
    """Sets up what all processes share, then trains."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _share_cores(world)

    # torch.distributed starts here, if a launcher asked for it
    args = build_grpo_config(
        config,
        folder / "checkpoints",
        load_universal=start is not None and start.needs_conversion,
    )
    with Watchdog(folder, rank, world, config.hang_timeout_s) as watchdog:
        if start is not None and start.needs_conversion:
            convert(start, rank)
        _train(config, folder, init, args, resume, start, watchdog, given)
    leave_group_at_exit()
    return folder


def _train(
    config: Config,
    folder: Path,
    init: str,
    args: Any,
    resume: bool,
    start: Start | None,
    watchdog: Watchdog,
    given: Given,
) -> None:
    """The part of a run that all processes go through together."""
    rank = watchdog.rank
    checkpoint = start.path if start else None
    # without a checkpoint everything is done again, the evaluation of step 0 included
    resume_step = start.step if start else -1

    from transformers.utils.logging import disable_progress_bar

    from train.adapter import freeze_vision, make_lora
    from train.callbacks import EvaluationCallback, Recorder, RunCallback
    from train.grpo import SearchGRPOTrainer
    from train.health import health_settings
    from train.live import LiveView, live_descriptor, new_status
    from train.policy import load_policy
    from train.worlds import load_environment

    progress.begin("load")
    disable_progress_bar()
    recorder = Recorder(folder, config, rank == 0, resume_step if resume else None)
    if checkpoint is not None:
        logger.info("resuming at step %d of %s", resume_step, folder)
    model, processor = load_policy(init, max_pixels=config.models.max_pixels)
    recorder.use_tokenizer(getattr(processor, "tokenizer", processor))
    if config.models.freeze_vision:
        freeze_vision(model)
    trainer = SearchGRPOTrainer(
        model,
        args=args,
        questions=given.questions,
        environment=load_environment(config),
        rewards=config.rewards,
        processing_class=processor,
        peft_config=make_lora(model, config.lora),
        rollout=config.rollout,
        tool_workers=config.rollout.tool_workers,
        algorithm=config.algorithm,
        reference=choose_reference(config, init),
        anchor=make_anchor(config, init, model),
        functions=given.functions,
    )
    if given.frozen is not None:
        from train.cast import gate_trainer

        gate = gate_trainer(trainer, given.frozen.heads, given.frozen.shared)
        logger.info(
            "%d of %d heads stay as they are, %d numbers",
            len(given.frozen.heads), given.frozen.n_heads, gate.n_numbers,
        )  # fmt: skip
    watchdog.step = lambda: trainer.state.global_step
    keep_only_ours(trainer)
    health = health_settings(config, init, trainer.accelerator.num_processes)
    trainer.add_callback(RunCallback(trainer, recorder, health))
    trainer.add_callback(
        EvaluationCallback(trainer, recorder, given.held_out, config.compare.eval_every)
    )
    progress.begin("train")
    terminal = live_descriptor(config, rank == 0)
    if terminal is not None:
        status = new_status(config, recorder.earlier_lines)
        recorder.live = LiveView(status, terminal)
    with recorder.live or nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    final = _last_policy(trainer, folder)
    if rank == 0:
        summary = {
            "step": trainer.state.global_step,
            "time_s": recorder.time_s,
            "device_s": recorder.device_s,
            "tokens": trainer.n_policy_tokens,
            "policy": str(final.relative_to(folder)),
        }
        write_json(folder / "done.json", summary)
    recorder.close()


def _last_policy(trainer: Any, folder: Path) -> Path:
    """Folder of the trained policy: the last checkpoint, or one saved now if there is none."""
    last = folder / "checkpoints" / f"checkpoint-{trainer.state.global_step}"
    if not last.is_dir():
        last = folder / "checkpoints" / "final"
        with writing(last):
            trainer.save_model(str(last))
    return last


def keep_only_ours(trainer: Any) -> None:
    """transformers' console printing would repeat every number."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _share_cores(n_processes: int) -> None:
    """Without OMP_NUM_THREADS every process would start as many threads as there are cores."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    # torchrun says how many are on this machine by the first, DeepSpeed's launcher by the second
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    local = next((int(os.environ[name]) for name in names if name in os.environ), n_processes)
    n_threads = max(1, len(os.sched_getaffinity(0)) // local)
    torch.set_num_threads(n_threads)
    os.environ["OMP_NUM_THREADS"] = str(n_threads)  # read by accelerate


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/train.sh",
        description="Train a search policy by GRPO.",
        epilog="example: deepspeed --num_gpus 2 launch/train.sh --config configs/demo.yaml "
        "output=runs/x seed=1 grpo.max_steps=2",
    )
    parser.add_argument("--config", help="settings file; default: the shipped demo")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete an existing run folder")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    add_estimate_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    return parser.parse_intermixed_args(argv)
