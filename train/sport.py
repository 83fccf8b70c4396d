"""SPORT: step-wise preference tuning without collected data, between merge and GRPO.

    obm sport models.init=runs/merged/obm output=runs/sport
    deepspeed launch/train.sh models.init=runs/sport/policy output=runs/sport-s0

One iteration (arXiv 2504.21561): make tasks, sample several candidates for every step and execute
each, verify which is best, tune the policy by DPO on pairs of steps. The next begins with that
policy. Deviations: tasks come from the atlas's graph and a step is verified by what the environment
returned (a model can do either), near duplicates are measured in words, whole weights are tuned
unless `lora.r` says otherwise.

A run folder: config.yaml, environment.json, iterations/N/ (steps.jsonl, trajectories.jsonl,
pairs.jsonl, metrics.jsonl, done.json), policy/ (the result), cost.json, done.json.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from configs.schema import dump_config, resolve_model

if TYPE_CHECKING:
    from configs.schema import Config
    from train.cost import Cost
    from train.frozen import FrozenHeads
    from train.sport_sampling import Sampled
    from train.sport_verify import Verifier

logger = logging.getLogger(__name__)

ITERATIONS, POLICY, DONE = "iterations", "policy", "done.json"


def describe_sport(config: Config) -> str:
    """What `obm sport` would do: the plan, DPO's settings, a few tasks.

    Raises:
        ConfigError: settings that contradict each other.
    """
    from train.sport_tasks import make_tasks
    from train.sport_tune import dpo_settings

    check_settings(config)
    settings = config.sport
    n_steps = settings.tasks * config.environment.max_turns
    tasks = make_tasks(config, 1, None)
    lines = [
        dump_config(config),
        f"start       {resolve_model(config.models.init or '')}",
        f"iterations  {settings.iterations} of {settings.tasks} tasks",
        f"candidates  {settings.samples} a step, {settings.samples * n_steps} an iteration at most",
        f"verifier    {settings.verifier}",
        "tasks       " + "\n            ".join(f"{t['id']}: {t['question']}" for t in tasks[:3]),
        "DPO         "
        + ", ".join(f"{k}={v}" for k, v in dpo_settings(config, Path("-"), 1).items()),
    ]
    return "\n".join(lines)


def run_sport(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Runs the iterations that are missing.

    Args:
        config: the experiment.
        resume: go on after the last iteration that is complete, to the same policy.
        overwrite: delete what lies in the run folder.

    Returns:
        Folder of the tuned policy, which `models.init` takes.

    Raises:
        ConfigError: settings, several GPUs, a folder in use, no pair to learn from, a verifier
            without verdicts.
    """
    from train.cost import Cost
    from train.files import write_json
    from train.given import check_one_gpu, choose_frozen
    from train.run_folder import prepare_folder

    check_settings(config)
    check_one_gpu("obm sport")
    init = resolve_model(config.models.init or "")
    folder = Path(config.output)
    frozen = choose_frozen(config, init)
    prepare_folder(folder, config, init, resume, overwrite, frozen)
    cost, done = Cost(), _complete(folder)
    for record in done:
        cost.add(record["parts"])
    policy = _policy_after(folder, len(done), init)
    for iteration in range(len(done) + 1, config.sport.iterations + 1):
        target = folder / ITERATIONS / str(iteration)
        shutil.rmtree(target, ignore_errors=True)  # of a start that was broken off
        target.mkdir(parents=True)
        found = _iterate(config, policy, target, iteration, frozen)
        if found is None:
            logger.info("iteration %d found no pair: what came before stands", iteration)
            break
        cost.add(found.parts)
        if iteration > 1:  # the start itself is not ours to remove
            shutil.rmtree(policy)
        policy = str((target / POLICY).resolve())
    if Path(policy) != (folder / POLICY).resolve():
        shutil.rmtree(folder / POLICY, ignore_errors=True)
        Path(policy).rename(folder / POLICY)
    cost.write(folder)
    cost.write_for_policy(folder / POLICY, init, "sport")
    write_json(folder / DONE, {"iterations": len(_complete(folder)), "policy": POLICY})
    return folder / POLICY


def _iterate(
    config: Config, start: str, target: Path, iteration: int, frozen: FrozenHeads | None
) -> Cost | None:
    """One iteration; None where nothing is left to prefer."""
    from train.cost import Cost
    from train.files import write_json
    from train.sport_sampling import MAX_STEPS, sample_steps
    from train.sport_tasks import make_tasks
    from train.sport_tune import tune
    from train.trajectories import append_jsonl

    settings, cost = config.sport, Cost()
    chat, verifier = make_verifier(config)
    with cost.part("tasks"):
        tasks = make_tasks(config, iteration, chat if settings.wording == "llm" else None)
    with cost.part("sampling"):
        engine = _engine(config, start)
        sampled = sample_steps(engine, tasks, verifier, settings, iteration * MAX_STEPS)
    append_jsonl(target / "steps.jsonl", sampled.journal)
    rows = [e.to_dict(iteration, config.arm_name, config.seed, "sport") for e in sampled.episodes]
    append_jsonl(target / "trajectories.jsonl", rows)
    append_jsonl(target / "pairs.jsonl", [pair.to_dict() for pair in sampled.pairs])
    summary = summarize(sampled, tasks)
    logger.info("iteration %d  %s", iteration, _words(summary))
    check_sampled(sampled, verifier, config, is_first=iteration == 1)
    if not sampled.pairs:
        return None
    del engine
    with cost.part("tuning"):
        lines = tune(config, start, sampled.pairs, target / POLICY, iteration, frozen)
    shutil.rmtree(target / "scratch", ignore_errors=True)
    append_jsonl(target / "metrics.jsonl", [{"iteration": iteration, **line} for line in lines])
    logger.info("iteration %d  %s", iteration, _tuning_words(lines))
    write_json(target / DONE, {"iteration": iteration, "parts": cost.rounded, "sampled": summary})
    return cost


def make_verifier(config: Config) -> tuple[Any, Verifier]:
    """The model behind `sport.llm_url` where one is asked for, and the verifier.

    Raises:
        ConfigError: a model is asked for and none is named.
    """
    from train.chat import make_chat
    from train.sport_verify import FactVerifier, ModelVerifier

    settings = config.sport
    chat = make_chat(settings) if "llm" in (settings.wording, settings.verifier) else None
    if settings.verifier == "llm":
        assert chat is not None
        return chat, ModelVerifier(chat)
    return chat, FactVerifier()


def _engine(config: Config, start: str) -> Any:
    """An engine of single turns for the policy of `start`, with the limits of training."""
    from train.policy import load_for_inference
    from train.sport_sampling import TurnEngine
    from train.worlds import build_engine

    model, processor = load_for_inference(start, max_pixels=config.models.max_pixels)
    temperature = config.sport.temperature
    own = {} if temperature is None else {"temperature": temperature}
    return build_engine(config, model, processor, make_engine=TurnEngine, **own)


# ---------------------------------------------------------------- checks and records


def check_settings(config: Config) -> None:
    """Refuses what would only be found after sampling.

    Raises:
        ConfigError: names the key, the reason and the fix.
    """
    from train.sport_tune import dpo_settings

    if not config.models.init:
        raise ConfigError("models.init: missing; name the checkpoint to tune, e.g. a merged folder")
    if config.rollout.backend != "in_process":
        raise ConfigError(
            "rollout.backend: obm sport samples steps in process; set it to in_process"
        )
    dpo_settings(config, Path("-"), 1)
    make_verifier(config)


def check_sampled(sampled: Sampled, verifier: Verifier, config: Config, *, is_first: bool) -> None:
    """Ends a run that has nothing to learn from.

    Raises:
        ConfigError: too few verdicts; or, in the first iteration, no pair.
    """
    n_steps = len(sampled.journal)
    if sampled.n_unverified > config.sport.max_unverified * n_steps:
        raise ConfigError(
            f"sport.verifier: no verdict on {sampled.n_unverified} of {n_steps} steps "
            f"({verifier.last_error}); see that the service answers, or raise "
            "sport.max_unverified: such steps make no pair and go on with their first candidate"
        )
    if is_first and not sampled.pairs:
        scores = {c["score"] for line in sampled.journal for c in line["candidates"]}
        found = (
            f"every candidate was scored {scores.pop()}"
            if len(scores) == 1
            else (
                "no step has candidates whose scores differ by sport.margin and whose texts differ"
            )
        )
        raise ConfigError(
            f"sport: no pair to learn from: {found}; raise sport.samples or sport.temperature, or "
            "lower sport.margin; the steps are in iterations/1/steps.jsonl"
        )


def summarize(sampled: Sampled, tasks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Counts of an iteration, and what the paths of best candidates show."""
    from train.evaluation import FOUR_PARTS
    from train.evaluation import summarize as measure_all

    metrics = measure_all(sampled.episodes, tasks)
    return {
        "steps": len(sampled.journal),
        "candidates": sampled.n_candidates,
        "pairs": len(sampled.pairs),
        "unverified": sampled.n_unverified,
        **{part: round(metrics[part], 4) for part in FOUR_PARTS},
    }


def _words(summary: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:g}" for name, value in summary.items())


def _tuning_words(lines: Sequence[dict[str, float]]) -> str:
    """First and last line of DPO: loss, and how often the chosen step is ahead."""
    if not lines:
        return "no step was logged"
    shown = {"loss": "loss", "ahead": "rewards/accuracies", "margin": "rewards/margins"}
    first, last = lines[0], lines[-1]
    return "  ".join(
        f"{name} {float(first[key]):.3f} -> {float(last[key]):.3f}"
        for name, key in shown.items()
        if key in first and key in last
    )


def _complete(folder: Path) -> list[dict[str, Any]]:
    """Records of the iterations that are complete, the first ones in a row."""
    records: list[dict[str, Any]] = []
    while (path := folder / ITERATIONS / str(len(records) + 1) / DONE).is_file():
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def _policy_after(folder: Path, n_done: int, init: str) -> str:
    """Checkpoint that the next iteration begins with.

    Raises:
        ConfigError: it is gone.
    """
    if n_done == 0:
        return init
    for path in (folder / ITERATIONS / str(n_done) / POLICY, folder / POLICY):
        if (path / "config.json").is_file():
            return str(path.resolve())
    raise ConfigError(
        f"output: {folder} has no policy of iteration {n_done} to go on from; begin anew with "
        "--overwrite"
    )
