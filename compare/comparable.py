"""Refuses to compare runs that differ in more than their start, and says in everything that does.

What may differ without a word: where a run writes, how it is drawn, its seed, how long it waits for
a service, and the start itself (models, merge, calibration). What must agree: data, evaluation,
rewards, budget and the way of training. `--allow KEY` lets a setting differ all the same; the
report says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from compare.errors import CompareError
from compare.runs import Run, cut_to_common_steps
from configs.sections import (
    FREE_LIVE,
    Algorithm,
    Config,
    Environment,
    FreezeHeads,
    Live,
    Lora,
    Rewards,
)

_FREE_ENVIRONMENT = {"timeout_s", "retries", "backoff_s"}
_FREE_GRPO = {
    "output_dir", "run_name", "report_to", "log_level", "logging_steps", "logging_dir",
    "save_steps", "save_strategy", "save_total_limit", "disable_tqdm",
}  # fmt: skip
_OF_THE_SEED = {"seed", "data_seed"}
"""Of grpo: must agree between runs of one seed, or they see the questions in another order."""
_FREE_REWARDS = {"judge_key_variable", "judge_timeout_s", "judge_workers", "judge_cache"}
_FREE_ALGORITHM = {"anchor_stats"}
_EVALUATION_KEYS = {"eval_split", "eval_size", "eval_kinds", "eval_domain", "eval_benchmark"}
_MODELS = ("reference", "freeze_vision", "max_pixels")
_ROLLOUT = ("backend", "importance_correction", "importance_cap")
STEPS = "compare.steps"
"""Not a setting: the steps at which the runs were evaluated."""

_RECORDED = ("world_size", "hardware", "device")
"""Not settings either, but of environment.json; older runs did not record them all."""
_ASKED = ("mode", "query")
"""Nor these, but of eval.json: how `obm eval` asked. A training evaluates as an agent."""

Settings = dict[str, Any]
"""Setting as the command line writes it -> value; kinds of settings lie apart."""


def check_comparable(runs: Sequence[Run], allow: Sequence[str] = ()) -> dict[str, Any]:
    """Refuse runs whose data, evaluation, rewards, budget or training differ.

    Zero-shot evaluations are held to the data and the evaluation only. Where evaluation steps may
    differ, the runs are cut in place to those that all have.

    Args:
        runs: of all arms.
        allow: settings that may differ: a key (`grpo.learning_rate`) or a section (`algorithm`).

    Returns:
        {"allowed": keys of `allow` that were needed, "differences": [{"kind", "setting", "values":
        {value as JSON: [run folders]}}]}.

    Raises:
        CompareError: names every differing setting with the values and runs.
    """
    differences = find_differences(runs)
    used = {key for key in allow for found in differences if _covers(key, found["setting"])}
    refused = [
        found for found in differences if not any(_covers(key, found["setting"]) for key in allow)
    ]
    # other lengths follow from another number of steps or other evaluations, once these may differ
    length_keys = ("grpo.max_steps", "compare.eval_every")
    may_be_cut = any(_covers(key, setting) for key in allow for setting in length_keys)
    if may_be_cut:
        refused = [found for found in refused if found["setting"] != STEPS]
    if refused:
        lines = [f"{found['kind']}: {_in_words(found)}" for found in refused]
        keys = " ".join(f"--allow {found['setting']}" for found in refused)
        advice = f"compare runs that differ in their start only, or pass {keys}"
        if len(lines) == 1:
            raise CompareError(f"{lines[0]}; {advice}")
        listed = "".join(f"\n  {line}" for line in lines)
        raise CompareError(f"the runs differ in {len(lines)} settings:{listed}\n{advice}")
    if any(found["setting"] == STEPS for found in differences):
        cut_to_common_steps(runs)
    return {"allowed": [key for key in allow if key in used], "differences": differences}


def check_allowed(allow: Sequence[str], runs: Sequence[Run]) -> None:
    """Refuse keys that no setting has, as a slip of the hand makes them.

    Args:
        allow: settings that may differ; see `check_comparable`.
        runs: whose settings may be those of an older version.

    Raises:
        CompareError: names the first such key.
    """
    known = [asdict(Config(output="")), *(run.config for run in runs)]
    for key in allow:
        section, _, name = key.rstrip(".").partition(".")
        if key == STEPS or section in (*_RECORDED, *_ASKED, "own_files"):
            continue
        found = [config[section] for config in known if section in config]
        names = {one for values in found if isinstance(values, dict) for one in values}
        # what there is in grpo is TRL's to say
        is_open = not name or section == "grpo"
        if not found or not (is_open or name.partition(".")[0] in names):
            raise CompareError(
                f"--allow {key}: no such setting; name a key as in config.yaml, for example "
                "grpo.learning_rate, or a section"
            )


def find_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every setting that must agree and does not; data and evaluation first."""
    trained = [run for run in runs if run.is_trained]
    found = [
        *_differences(runs, [_data(run) for run in runs], "data"),
        *_differences(runs, [_evaluation(run) for run in runs], "evaluation"),
        *_differences(trained, [{STEPS: run.steps} for run in trained], "evaluation"),
        *_differences(
            trained, [{"compare.eval_every": _of(run, "compare", "eval_every")} for run in trained],
            "evaluation",
        ),
        *_differences(trained, [_rewards(run) for run in trained], "rewards"),
        *_differences(trained, [_budget(run) for run in trained], "budget"),
        *_differences(trained, [_training(run) for run in trained], "training"),
    ]  # fmt: skip
    for seed in sorted({run.seed for run in trained}):
        members = [run for run in trained if run.seed == seed]
        orders = [_section(run, "grpo", only=_OF_THE_SEED) for run in members]
        found += _differences(members, orders, "data")
    return found


def _data(run: Run) -> Settings:
    kept = _FREE_ENVIRONMENT | _EVALUATION_KEYS
    return {
        **_section(run, "environment", asdict(Environment()), leave_out=kept),
        **_section(run, "live", asdict(Live()), leave_out=FREE_LIVE),
    }


def _evaluation(run: Run) -> Settings:
    return {
        **_section(run, "environment", asdict(Environment()), only=_EVALUATION_KEYS),
        **{key: getattr(run, key) for key in _ASKED},
    }


def _rewards(run: Run) -> Settings:
    return {
        **_section(run, "rewards", asdict(Rewards()), leave_out=_FREE_REWARDS),
        "reward_functions": run.config.get("reward_functions") or [],
        # the same name may stand for other lines of Python
        "own_files": run.provenance.get("own_files") or {},
    }


def _budget(run: Run) -> Settings:
    settings = _section(run, "grpo", leave_out=_FREE_GRPO | _OF_THE_SEED)
    for key in _RECORDED:
        if run.provenance.get(key) is not None:
            settings[key] = run.provenance[key]
    return settings


def _training(run: Run) -> Settings:
    return {
        **_section(run, "algorithm", asdict(Algorithm()), leave_out=_FREE_ALGORITHM),
        **_section(run, "lora", asdict(Lora())),
        **_section(run, "freeze_heads", asdict(FreezeHeads()), leave_out=("map",)),
        **{f"models.{key}": value for key in _MODELS if (value := _of(run, "models", key))},
        **{f"rollout.{key}": value for key in _ROLLOUT if (value := _of(run, "rollout", key))},
    }


def _section(
    run: Run,
    name: str,
    defaults: Settings | None = None,
    *,
    only: Iterable[str] | None = None,
    leave_out: Iterable[str] = (),
) -> Settings:
    """A section of the run's settings; what an older version did not know has its default."""
    values = {**(defaults or {}), **(run.config.get(name) or {})}
    keys = (set(values) if only is None else set(values) & set(only)) - set(leave_out)
    return {f"{name}.{key}": values[key] for key in sorted(keys)}


def _of(run: Run, section: str, key: str) -> Any:
    return (run.config.get(section) or {}).get(key)


def _differences(
    runs: Sequence[Run], settings: Sequence[Settings], kind: str
) -> list[dict[str, Any]]:
    found = []
    for key in sorted({key for one in settings for key in one}):
        values: dict[str, list[str]] = {}
        for run, one in zip(runs, settings, strict=True):
            text = json.dumps(_plain(one.get(key)), sort_keys=True)
            if key not in one and key in _RECORDED:
                continue
            values.setdefault(text, []).append(str(run.folder))
        if len(values) > 1:
            found.append({"kind": kind, "setting": key, "values": values})
    return found


def _plain(value: Any) -> Any:
    """1.0 and 1 are one value: W&B keeps no difference between them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _covers(key: str, setting: str) -> bool:
    return setting == key or setting.startswith(f"{key.rstrip('.')}.")


def _in_words(found: dict[str, Any]) -> str:
    parts = []
    for text, folders in found["values"].items():
        value = _brief_steps(json.loads(text)) if found["setting"] == STEPS else text
        others = f" (and {len(folders) - 1} more)" if len(folders) > 1 else ""
        parts.append(f"{value} in {folders[0]}{others}")
    if found["setting"] == STEPS:
        return f"was evaluated at {', at '.join(parts)}"
    return f"{found['setting']} is {' and '.join(parts)}"


def _brief_steps(steps: Sequence[int]) -> str:
    return f"{steps[0]}..{steps[-1]} ({len(steps)} of them)" if len(steps) > 4 else str(list(steps))
