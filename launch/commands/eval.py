"""Evaluate a checkpoint on a benchmark: accuracy, searches, cost, the floor in four parts.

Greedy episodes in the settings' environment, in one of four modes. Writes eval.json and
trajectories.jsonl; `obm compare` takes the folder as an arm with a floor. An evaluation that was
broken off goes on when the same command is run again. Several processes share one with --shard i/n
each, or as ranks of torchrun or deepspeed; the last to finish writes the result.
docs/evaluation.md has the benchmarks, the modes and the metrics.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import add_config_arguments, command_line, read_config
from launch.errors import LaunchError

if TYPE_CHECKING:
    from configs.schema import Config

EXAMPLES = (
    "obm eval atlas://vlm --output runs/eval/vlm",
    "obm eval runs/demo/merged/obm --arm obm environment.eval_split=test",
    "obm eval atlas://vlm --mode rag environment.eval_kinds=[two,image]",
    "obm eval CHECKPOINT --benchmark fvqa_test --shard 0/8 environment.dialect=mmsearch_r1",
    "obm eval CHECKPOINT --benchmark infoseek --dry-run environment.eval_benchmark.source=FILE",
)
FOUR_PARTS = ("searched", "entity", "passage", "accuracy")
HEADLINES = ("accuracy", "sr_img", "sr_txt", "sr_any", "calls", "cas")
MODES = ("agent", "direct", "prompted", "rag")
BATCH = 128
"""Questions of a batch at most, where --batch does not say it; a finished batch is kept."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, what it is asked and how, where to write."""
    parser.add_argument("checkpoint", help="folder, hub id or atlas://NAME")
    add_config_arguments(parser)
    parser.add_argument(
        "--benchmark", metavar="NAME",
        help="short for environment.eval_benchmark.name=NAME (default: the settings')",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=MODES, default="agent",
        help="agent (default), direct (no tools), prompted (tools explained), rag (fixed searches)",
    )  # fmt: skip
    parser.add_argument(
        "--query", choices=("rule", "policy"), default="rule",
        help="with --mode rag: who writes the text query (default: rule)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, metavar="N",
        help=f"questions that are rolled out and kept at a time (default: {BATCH}, or so few that "
        "every process has some)",
    )  # fmt: skip
    parser.add_argument(
        "--shard", metavar="I/N", help="do part I of N, counted from 0 (default: rank/world size)"
    )
    parser.add_argument("--arm", help="name in tables (default: the checkpoint's last part)")
    parser.add_argument(
        "--output", metavar="DIR", help="default: eval/ARM beside the settings' output"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation")
    parser.add_argument(
        "--dry-run", action="store_true", help="read and check every question, ask nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate and print the figures."""
    from train.disk import writing
    from train.lock import locked

    extra = [f"environment.eval_benchmark.name={options.benchmark}"] if options.benchmark else []
    config = read_config(options, *extra)
    shard = read_shard(options.shard)
    if shard[1] > 1 and config.rollout.backend == "vllm":
        raise LaunchError(
            "rollout.backend=vllm: a server has the weights of one process, so of several each "
            "would break the others' episodes; evaluate by one, or set rollout.backend=in_process"
        )
    if not options.checkpoint:  # as a path it would be the folder that we stand in
        raise LaunchError("the checkpoint has no name; give a folder, a hub id or atlas://NAME")
    if options.dry_run:
        from configs.schema import resolve_model

        resolve_model(options.checkpoint)  # a folder that is not there is found now, not later
        print(describe_questions(config))
        return 0
    arm = options.arm or Path(options.checkpoint.rstrip("/")).name
    output = Path(options.output or Path(config.output).parent / "eval" / arm)
    with locked(output, f".lock-{shard[0]}-of-{shard[1]}"), writing(output):
        record = evaluate_checkpoint(
            config, options.checkpoint, output,
            arm=arm, command=command_line(), overwrite=options.overwrite, mode=options.mode,
            query=options.query, batch=options.batch, shard=shard,
        )  # fmt: skip
    if record is None:
        print(f"this part is done; {output} waits for the others")
        return 0
    print(describe(record))
    print(describe_searches(record))
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
    mode: str = "agent",
    query: str = "rule",
    batch: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any] | None:
    """Run the held-out questions greedily and write eval.json and trajectories.jsonl.

    Args:
        config: environment, benchmark and the engine's limits are used.
        checkpoint: folder, hub id or `atlas://name`.
        output: folder to write.
        arm: name in tables.
        command: kept in eval.json.
        overwrite: replace an earlier evaluation.
        mode: see `compare.modes`.
        query: of mode `rag`.
        batch: questions that are rolled out and kept at a time; None: BATCH, or so few that each
            process has some.
        shard: (this process, number of processes).

    Returns:
        The content of eval.json; None while other processes have questions left.

    Raises:
        LaunchError: an evaluation is there already.
        BenchmarkError, CompareError: no question to ask.
    """
    if batch is not None and batch < 1:
        raise LaunchError(f"--batch {batch}: give a number of 1 or more")
    if overwrite and shard[1] > 1:
        raise LaunchError("--overwrite would remove what other processes write; remove it first")
    if (output / "eval.json").exists() and not overwrite and shard[1] == 1:
        raise LaunchError(f"{output} holds an evaluation; pass --overwrite or another --output")

    from tqdm import tqdm

    from compare.benchmarks import benchmark_of, iterate_questions
    from compare.evaluate import run_evaluation, some_questions
    from compare.modes import Asker
    from compare.provenance import origin
    from configs.schema import resolve_model
    from launch.models import load_for_inference
    from launch.stages import fingerprint
    from launch.tasks import evaluation_inputs
    from train.settings import trains_in_bf16

    folder = resolve_model(checkpoint)
    benchmark = benchmark_of(config)
    questions = some_questions(iterate_questions(config))
    if batch is None:
        batch = BATCH
        if shard[1] > 1:  # of few questions the first processes would take all
            batch = min(batch, -(-sum(1 for _ in iterate_questions(config)) // shard[1]))
    # only now: a mistake in the command must not cost the evaluation that is there
    if overwrite and ((output / "eval.json").exists() or (output / "episodes").is_dir()):
        (output / "eval.json").unlink(missing_ok=True)
        for part in ("episodes", "pictures"):
            shutil.rmtree(output / part, ignore_errors=True)

    def make_asker() -> Asker:
        model, processor = load_for_inference(
            folder, bf16=trains_in_bf16(config.grpo), max_pixels=config.models.max_pixels
        )
        return Asker(config, model, processor, mode=mode, query=query)

    header = {
        "arm": arm,
        "seed": config.seed,
        "checkpoint": checkpoint,
        "mode": mode,
        "query": query if mode == "rag" else None,
        "benchmark": {"name": benchmark.name, "metrics": list(benchmark.metrics)},
        "config": asdict(config),
        **origin(command),
    }
    plan = {
        "checkpoint": fingerprint(folder),
        **evaluation_inputs(config),
        "seed": config.seed,
        "mode": mode,
        "query": query,
    }
    with tqdm(desc=f"eval {arm}", unit="question", disable=None) as bar:
        return run_evaluation(
            questions,
            make_asker,
            output,
            plan=plan,
            header=header,
            batch=batch,
            shard=shard,
            bootstrap=config.compare.bootstrap,
            picture_size=config.tracking.picture_size,
            seen=bar.update,
        )


def read_shard(text: str | None) -> tuple[int, int]:
    """(part, number of parts) of `I/N`; without it those of the launcher's environment.

    Raises:
        LaunchError: no such part.
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise LaunchError(f"--shard {text[:60]}: write I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def describe(record: dict[str, Any]) -> str:
    """One line: the four parts of the floor."""
    metrics = record["metrics"]
    parts = ", ".join(f"{part} {metrics[part]:.2f}" for part in FOUR_PARTS)
    return f"{record['arm']}: {parts} ({int(metrics['n'])} questions)"


def describe_searches(record: dict[str, Any]) -> str:
    """Accuracy with its interval, search rates and cost, official figures, and the kinds."""
    from train.panel import clean

    metrics, intervals = record["metrics"], record["intervals"]
    lines = []
    groups = sorted({f"{name.rpartition('/')[0]}/" for name in intervals if "/" in name})
    for prefix in ("", *groups):
        bounds = intervals.get(f"{prefix}accuracy")
        shown = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
        value = {name: metrics[prefix + name] for name in (*HEADLINES, "n")}
        lines.append(
            f"  {clean(prefix.rstrip('/')) or 'all':<24} accuracy {value['accuracy']:.3f}{shown}"
            f"  image {value['sr_img']:.2f}  text {value['sr_txt']:.2f}"
            f"  any {value['sr_any']:.2f}  calls {value['calls']:.2f}"
            f"  CAS {value['cas']:.1f}  n {value['n']:.0f}"
        )
    for name, value in metrics.items():
        if name.startswith("official/"):
            twin = metrics.get(name.replace("official", "strict"))
            strict = "" if twin is None else f"  strict {twin:.3f}"
            lines.append(f"  {name:<24} {value:.3f}{strict}")
    return "\n".join(lines)


def describe_questions(config: Config) -> str:
    """How many questions of which kinds the settings ask; every row and picture is read.

    Raises:
        BenchmarkError: names the first bad row.
        CompareError: no question to ask.
    """
    from compare.benchmarks import benchmark_of, count_questions, iterate_questions
    from compare.evaluate import some_questions
    from train.panel import clean

    counts = count_questions(some_questions(iterate_questions(config)))
    benchmark = benchmark_of(config)
    lines = [f"benchmark {benchmark.name}, scored by {', '.join(benchmark.metrics)}"]
    return "\n".join([*lines, *(f"  {clean(name)}: {count}" for name, count in counts.items())])
