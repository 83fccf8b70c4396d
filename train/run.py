"""Train a policy from a settings file: `deepspeed launch/train.sh --config configs/demo.yaml`.

A run folder stands alone: config.yaml, environment.json, metrics.jsonl, trajectories.jsonl,
pictures/, checkpoints/, heartbeat/, wandb_id, merge.json and start_cost.json (of a merged start),
own/ (reward functions and dialect of one's own), frozen_heads.json (where some are) and, at the
end, done.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import (
    DIALECT_SUFFIX,
    Config,
    dump_config,
    load_config,
    resolve_model,
    shipped_config,
)
from environments.dialects import get_dialect
from rewards.functions import RewardFunction, check_columns, load_functions, split_place
from train.estimate import (
    DEFAULT_MACHINE,
    add_estimate_arguments,
    describe_estimate,
    estimate_arguments,
    find_machine,
)
from train.frozen import FILE_NAME as FROZEN_HEADS
from train.frozen import FrozenHeads, check_same_heads, choose_heads
from train.resume import Start, convert, find_start
from train.settings import (
    build_grpo_config,
    count_completions,
    describe_step,
    resolved_grpo,
    zero_stage,
)
from train.watchdog import Watchdog, clear_heartbeats, progress, still_running

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft", "wandb")

OWN_FOLDER = "own"
"""Copies of the user's files in a run folder: reward functions, a dialect."""

MAY_CHANGE = (
    "rewards.judge_key_variable", "rewards.judge_timeout_s", "rewards.judge_workers",
    "rewards.judge_cache",
    "sport.iterations", "sport.llm_timeout_s", "sport.llm_workers",
    "output", "tracking.", "compare.", "deepspeed", "hang_timeout_s", "grpo.max_steps",
    "grpo.save_", "rollout.tool_workers", "rollout.url", "rollout.timeout_s", "rollout.retries",
    # train.resume checks that their product with the number of processes stays
    "grpo.per_device_train_batch_size", "grpo.gradient_accumulation_steps",
    "rollout.sync_dir", "rollout.sleep", "environment.timeout_s", "environment.retries",
    # the heads that they choose are compared themselves (train.frozen)
    "conflict.", "freeze_heads.map",
    "environment.backoff_s", "environment.cache", "live.requests_per_second", "live.retries",
)  # fmt: skip
"""Settings that may differ between a run and its continuation."""


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
    _quiet_libraries()
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
            print(f"error: {error}", file=sys.stderr)
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
    start = find_start(folder, config, world) if resume else None
    if rank == 0:
        check_start(init)
        prepare_folder(folder, config, init, resume, overwrite, given.frozen)
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
        return _train(config, folder, init, args, resume, start, watchdog, given)


@dataclass
class Given:
    """What a run takes from files of the user's or of the world."""

    questions: list[dict[str, Any]]
    """of the training"""
    held_out: list[dict[str, Any]]
    """of the evaluation"""
    functions: list[RewardFunction]
    """reward functions of one's own"""
    frozen: FrozenHeads | None = None
    """heads that stay as they are"""


def read_given(config: Config, n_processes: int = 1) -> Given:
    """Reads questions and reward functions, and checks what can be checked of them.

    Fewer questions than a rollout asks come in it more than once, each time as a group of its own:
    TRL would drop the rollout that it cannot fill, and train nothing without a word.

    Raises:
        BenchmarkError: a bad row.
        RewardError: a function that cannot be used on these questions.
        EnvironmentSetupError: a dialect that cannot be read.
    """
    from train.worlds import count_shared, load_eval_questions, load_train_questions

    get_dialect(config.environment.dialect)
    functions = load_functions(config.reward_functions)
    given = Given(load_train_questions(config), load_eval_questions(config), functions)
    check_columns(functions, given.questions)
    n_shared = count_shared(given.questions, given.held_out)
    if n_shared:
        logger.warning(
            "%d of %d evaluation questions are trained on: the evaluation shows memory; keep them "
            "apart by environment.train_benchmark.split and eval_benchmark.split",
            n_shared, len(given.held_out),
        )  # fmt: skip
    grpo = resolved_grpo(config)
    needed = count_completions(grpo, n_processes)[0] // grpo["num_generations"]
    if len(given.questions) < needed:
        times = math.ceil(needed / len(given.questions))
        logger.info(
            "%d questions for rollouts of %d: each is asked %d times an epoch",
            len(given.questions), needed, times,
        )  # fmt: skip
        given.questions *= times
    return given


def _train(
    config: Config,
    folder: Path,
    init: str,
    args: Any,
    resume: bool,
    start: Start | None,
    watchdog: Watchdog,
    given: Given,
) -> Path:
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
    model, processor = load_policy(init)
    recorder.use_tokenizer(getattr(processor, "tokenizer", processor))
    if config.models.freeze_vision:
        freeze_vision(model)
    reference = config.models.reference
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
        reference=None if reference == "init" else resolve_model(reference),
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
    trainer.add_callback(RunCallback(trainer, recorder, health_settings(config, init)))
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
    return folder


# ---------------------------------------------------------------- the run folder


def check_start(init: str) -> None:
    """Checks that a merged start still holds the tensors that its merge.json records.

    Raises:
        ConfigError: A tensor is missing, added, or of another shape.
    """
    if not (Path(init) / "merge.json").is_file():
        return
    from merge.errors import MergeError
    from merge.verify import check_folder

    try:
        check_folder(init)
    except MergeError as error:
        raise ConfigError(
            f"models.init: {error}; `obm merge verify {init}` checks every byte"
        ) from error


def check_pulls(config: Config) -> None:
    """Checks that the pulls towards the start, KL and anchor, can do what they say.

    Raises:
        ConfigError: one of them would do nothing, or something else.
    """
    has_adapter = config.lora.r > 0
    if config.models.reference != "init":
        if not resolved_grpo(config)["beta"]:
            raise ConfigError(
                "models.reference: without a KL term nothing is pulled there; set grpo.beta above "
                "0, or models.reference to init"
            )
        if has_adapter:
            raise ConfigError(
                "models.reference: with an adapter the reference is the policy without it; set "
                "models.reference to init, or lora.r to 0"
            )
    if config.algorithm.anchor > 0.0:
        if has_adapter:
            raise ConfigError(
                "algorithm.anchor: an adapter leaves the anchored weights alone; set "
                "algorithm.anchor to 0, or lora.r to 0"
            )
        if zero_stage(config) == 3:
            raise ConfigError(
                "algorithm.anchor: needs whole parameters, which ZeRO-3 does not keep; use "
                "deepspeed: zero2, or set algorithm.anchor to 0"
            )


def make_anchor(config: Config, init: str, model: Any) -> Any:
    """The pull towards the start that `algorithm.anchor` asks for, or None.

    Raises:
        ConfigError: no statistics, or statistics of another model.
    """
    if config.algorithm.anchor == 0.0:
        return None
    from train.anchor import SaliencyAnchor, anchor_statistics

    folders = config.algorithm.anchor_stats
    return SaliencyAnchor(model, anchor_statistics(init, folders), config.algorithm.anchor)


def choose_frozen(config: Config, init: str) -> FrozenHeads | None:
    """The heads that `freeze_heads` keeps out of the training, or None.

    Raises:
        ConfigError: no conflict map, or heads that are not known.
    """
    if config.freeze_heads.source == "none":
        return None
    from train.heads import head_layout
    from train.policy import load_config as load_model_config

    return choose_heads(config.freeze_heads, head_layout(load_model_config(init)), init)


def prepare_folder(
    folder: Path,
    config: Config,
    init: str,
    resume: bool,
    overwrite: bool,
    frozen: FrozenHeads | None = None,
) -> None:
    """Creates the run folder, or checks the one that shall go on.

    Raises:
        ConfigError: it is in use, or holds a run with other settings.
    """
    if folder.exists() and any(folder.iterdir()):
        if resume or overwrite:
            _refuse_running(folder)
        if resume:
            _refuse_other_run(folder, config)
            check_same_heads(folder, frozen)
        elif overwrite:
            if not (folder / "config.yaml").exists():
                raise ConfigError(
                    f"output: {folder} is not a run folder (no config.yaml), so it is not "
                    "overwritten; choose another output"
                )
            shutil.rmtree(folder)
        else:
            raise ConfigError(
                f"output: {folder} exists already; go on with --resume, choose another name with "
                "output=..., or delete it with --overwrite"
            )
    folder.mkdir(parents=True, exist_ok=True)
    clear_heartbeats(folder)
    (folder / "done.json").unlink(missing_ok=True)
    write_text(folder / "config.yaml", dump_config(config))
    write_json(folder / "environment.json", describe_machine(config))
    for name in own_files(config):
        (folder / OWN_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(Path(name).expanduser(), folder / OWN_FOLDER / Path(name).name)
    if frozen is not None:
        write_json(folder / FROZEN_HEADS, frozen.to_dict())
    recipe = Path(init) / "merge.json"
    if recipe.is_file():
        shutil.copyfile(recipe, folder / "merge.json")
    cost = Path(init) / "cost.json"
    if cost.is_file():
        shutil.copyfile(cost, folder / "start_cost.json")


def own_files(config: Config) -> dict[str, str]:
    """Files of the user's that decide on the result: reward functions and a dialect, with SHA-256.

    Raises:
        ConfigError: one is not there, or two have one name and cannot lie in one folder.
    """
    names = [split_place(section.function)[0] for section in config.reward_functions]
    if config.environment.dialect.endswith(DIALECT_SUFFIX):
        names.append(config.environment.dialect)
    names = list(dict.fromkeys(names))
    if len({Path(name).name for name in names}) < len(names):
        raise ConfigError(f"{', '.join(names)}: two files of one name; give each its own")
    hashes = {}
    for name in names:
        try:
            content = Path(name).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{name}: cannot be read ({error.strerror}); check the path"
            ) from error
        hashes[name] = hashlib.sha256(content).hexdigest()
    return hashes


def describe_machine(config: Config) -> dict[str, Any]:
    """Versions, commit, hardware and command of this run."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join(sys.argv),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": ", ".join(gpus) or processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": "gpu" if gpus else "cpu",
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "deepspeed": config.deepspeed,
        "own_files": own_files(config),
    }


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _refuse_running(folder: Path) -> None:
    """Two trainings would write into one folder."""
    beats = still_running(folder)
    if beats:
        latest = max(beat.step for beat in beats)
        pids = " ".join(str(beat.pid) for beat in beats)
        raise ConfigError(
            f"output: {folder} is still being trained (step {latest}); wait for it, or end it "
            f"with `kill {pids}`"
        )


def _refuse_other_run(folder: Path, config: Config) -> None:
    """A continuation with other data, rewards or hyperparameters would be neither run."""
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"output: {folder} holds no config.yaml, so there is nothing to resume")
    before, now = _flat(asdict(load_config(path))), _flat(asdict(config))
    changed = [
        f"{key} ({before.get(key)!r} before, {now.get(key)!r} now)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"output: {folder} was started with other settings: {', '.join(changed)}; "
            "resume it with its own, or choose another output"
        )
    _refuse_other_files(folder, config)


def _refuse_other_files(folder: Path, config: Config) -> None:
    """A reward function that was rewritten since is another reward."""
    path = folder / "environment.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = before.get("own_files") or {}
    for name, digest in own_files(config).items():
        if kept.get(name, digest) != digest:
            raise ConfigError(
                f"output: {name} has changed since {folder} was started; put "
                f"{folder / OWN_FOLDER / Path(name).name} back in its place, or choose another "
                "output"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {k: v for key in value for k, v in _flat(value[key], f"{prefix}{key}.").items()}


def _last_policy(trainer: Any, folder: Path) -> Path:
    """Folder of the trained policy: the last checkpoint, or one saved now if there is none."""
    last = folder / "checkpoints" / f"checkpoint-{trainer.state.global_step}"
    if not last.is_dir():
        last = folder / "checkpoints" / "final"
        trainer.save_model(str(last))
    return last


def keep_only_ours(trainer: Any) -> None:
    """transformers' console printing would repeat every number."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _quiet_libraries() -> None:
    """Notes that a user can do nothing about: deprecations between the libraries we pin."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch)\b")
    # a filter, since this library sets its own level when it is imported
    logging.getLogger("bm25s").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _share_cores(n_processes: int) -> None:
    """Without OMP_NUM_THREADS every process would start as many threads as there are cores."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", n_processes))
    n_threads = max(1, len(os.sched_getaffinity(0)) // local)
    torch.set_num_threads(n_threads)
    os.environ["OMP_NUM_THREADS"] = str(n_threads)  # read by accelerate


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # a container without git
        return None
    return result.stdout.strip() or None


def processor_name() -> str:
    """The processor's model, as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
