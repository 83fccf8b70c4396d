"""Tune every merge method alike on dev: a grid each, merged, evaluated zero-shot and ranked.

    obm tune --config configs/demo.yaml --grid configs/studies/grid.yaml \\
        --output docs/results/tuning

The score is the mean of accuracy and retrieved gold passage over dev questions: what the trials of
this world showed is that the habit of searching merges easily and the skill does not, so the search
rate is not what is tuned.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.schema import Config, resolve_model
from merge.engine import merge
from train.evaluation import FOUR_PARTS, evaluate
from train.policy import load_policy
from train.worlds import build_engine, load_environment, load_eval_questions

ROLES = ("base", "vlm", "agent")


def expand_grid(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of a grid {key: [values]}, keys in order; {} gives one empty setting."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def score(metrics: Mapping[str, float]) -> float:
    """What a setting is ranked by: the mean of accuracy and gold passage retrieved, 0 to 1."""
    return (metrics["accuracy"] + metrics["passage"]) / 2


def tune(
    config: Config,
    stats: Mapping[str, str],
    grids: Mapping[str, Mapping[str, Sequence[Any]]],
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Merge and evaluate every setting of every grid on `config.environment.eval_split`.

    Args:
        config: models, scope and the evaluation's questions.
        stats: {"vlm", "agent"} -> stats.safetensors.
        grids: method -> {density, vlm, agent, normalization, combine -> values}.
        report: takes one line a setting.

    Returns:
        One row a setting, in the grids' order: method, settings, score, four parts, and the
        accuracy on seen and on unseen places.
    """
    base, vlm, agent = (resolve_model(getattr(config.models, role)) for role in ROLES)
    scope = asdict(config.merge)["scope"]
    environment, questions = load_environment(config), load_eval_questions(config)
    rows: list[dict[str, Any]] = []
    for method, grid in grids.items():
        for setting in expand_grid(grid):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "merged"
                merge(
                    base,
                    vlm,
                    agent,
                    folder,
                    method=method,
                    density=setting.get("density", 1.0),
                    weights={role: setting.get(role, 1.0) for role in ("vlm", "agent")},
                    normalization=setting.get("normalization", "none"),
                    combine=setting.get("combine", "sum"),
                    scope=scope,
                    stats=dict(stats) if method == "obm" else None,
                    seed=config.merge.seed,
                )
                model, processor = load_policy(folder)
            engine = build_engine(config, model, processor, environment=environment)
            metrics, _ = evaluate(engine, questions)
            row = {"method": method, **setting, "score": round(score(metrics), 4)}
            row |= {part: round(metrics[part], 4) for part in FOUR_PARTS}
            for group in ("seen", "unseen"):
                row[f"{group} accuracy"] = round(metrics[f"{group}/accuracy"], 4)
            rows.append(row)
            report("  ".join(f"{key}={value}" for key, value in row.items()))
    return rows


def best_settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The best row of each method; of equal ones the first in the grid's order."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["method"] not in best or row["score"] > best[row["method"]]["score"]:
            best[row["method"]] = dict(row)
    return best
