"""Evaluate a checkpoint on held-out questions: searched, right entity, gold passage, answer.

Greedy episodes in the settings' environment. Writes eval.json and trajectories.jsonl; `obm compare`
takes the folder as an arm with a floor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import add_config_arguments, command_line, read_config
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm eval atlas://vlm --output runs/eval/vlm",
    "obm eval runs/demo/merged/obm --arm obm environment.eval_split=test",
)
FOUR_PARTS = ("searched", "entity", "passage", "accuracy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, its name in tables, where to write."""
    parser.add_argument("checkpoint", help="folder, hub id or atlas://NAME")
    add_config_arguments(parser)
    parser.add_argument("--arm", help="name in tables (default: the checkpoint's last part)")
    parser.add_argument(
        "--output", metavar="DIR", help="default: eval/ARM beside the settings' output"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation")


def run(options: argparse.Namespace) -> int:
    """Evaluate and print the four parts."""
    config = read_config(options)
    arm = options.arm or Path(options.checkpoint.rstrip("/")).name
    output = Path(options.output or Path(config.output).parent / "eval" / arm)
    record = evaluate_checkpoint(
        config, options.checkpoint, output,
        arm=arm, command=command_line(), overwrite=options.overwrite,
    )  # fmt: skip
    print(describe(record))
    print(f"written to {output}")
    return 0


def evaluate_checkpoint(
    config: Config,
    checkpoint: str,
    output: Path,
    *,
    arm: str,
    command: str,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run the held-out questions greedily and write eval.json and trajectories.jsonl.

    Args:
        config: environment and the engine's limits are used.
        checkpoint: folder, hub id or `atlas://name`.
        output: folder to write.
        arm: name in tables.
        command: kept in eval.json.
        overwrite: replace an earlier evaluation.

    Returns:
        The content of eval.json.

    Raises:
        LaunchError: an evaluation is there already.
    """
    if (output / "eval.json").exists() and not overwrite:
        raise LaunchError(f"{output} holds an evaluation; pass --overwrite or another --output")

    from dataclasses import asdict

    from compare.evaluate import evaluate
    from compare.provenance import code_commit, hardware
    from configs.schema import resolve_model
    from launch.models import load_for_inference
    from train.run import write_json, write_text
    from train.worlds import build_engine, load_eval_questions

    model, processor = load_for_inference(resolve_model(checkpoint))
    metrics, trajectories = evaluate(
        build_engine(config, model, processor), load_eval_questions(config)
    )
    record = {
        "arm": arm,
        "seed": config.seed,
        "checkpoint": checkpoint,
        "metrics": metrics,
        "config": asdict(config),
        "command": command,
        "commit": code_commit(),
        "hardware": hardware(),
    }
    output.mkdir(parents=True, exist_ok=True)
    rows = [item.to_dict(step=0, arm=arm, seed=config.seed, phase="eval") for item in trajectories]
    write_text(output / "trajectories.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    # Last, since its presence says that the evaluation is complete.
    write_json(output / "eval.json", record)
    return record


def describe(record: dict[str, Any]) -> str:
    """One line: the four parts of the floor."""
    metrics = record["metrics"]
    parts = ", ".join(f"{part} {metrics[part]:.2f}" for part in FOUR_PARTS)
    return f"{record['arm']}: {parts} ({int(metrics['n'])} questions)"
