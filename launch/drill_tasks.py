"""What the drill disturbs: the pipeline's commands, small enough to be run a dozen times.

All of it on the embedded trio; a step of training is sixteen episodes, an evaluation 32 questions
in batches of four, so that there is much to go on with and little to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.drill_process import Ended, Span, obm, run, time_undisturbed

CALIBRATION = ("calibration.samples=24", "calibration.batch_size=2")
TRAINING = (
    "grpo.max_steps=4", "grpo.save_steps=1", "grpo.save_total_limit=1", "grpo.num_generations=4",
    "environment.eval_size=8", "compare.eval_every=2", "tracking.wandb=disabled",
    "tracking.live=off",
)  # fmt: skip
COMPLETIONS = 16
EVALUATION = ("environment.eval_size=32",)
STUDY = """\
# The drill's study: a merged start, trained for two steps, beside the plain VLM as it is.
title: A small ceiling
config: {config}
output: {output}
seeds: [0]
zero_shot: true
overrides:
  calibration: {{samples: 16, batch_size: 4}}
  grpo: {{max_steps: 2, save_steps: 1, per_device_train_batch_size: 16, num_generations: 4}}
  environment: {{eval_size: 8}}
  compare: {{eval_every: 1, target_arm: obm}}
  tracking: {{wandb: disabled, live: "off"}}
arms:
  - {{name: obm, merge: {{method: obm, density: 0.25}}}}
  - {{name: vlm, init: "atlas://vlm", train: false}}
"""


@dataclass(frozen=True)
class Task:
    """One command of the pipeline.

    Attributes:
        name: for the table.
        leaf: name of its output, below the folder that a run has for itself.
        command: from that folder to the words of the command; the same words begin and go on.
        marks: files of the output that say, all together, that it is whole.
        refusal: what the command says where its whole output is there already.
        progress: how much of the output is done; must not fall by a kill.
    """

    name: str
    leaf: str
    command: Callable[[Path], list[str]]
    marks: tuple[str, ...]
    refusal: str = ""
    progress: Callable[[Path], int] = lambda output: 0

    def is_whole(self, output: Path) -> bool:
        """Whether an output says of itself that it is complete."""
        return all((output / mark).exists() for mark in self.marks)


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run left."""

    folder: Path
    span: Span
    problem: str
    """why it is no measure for others; empty where it is"""


def run_undisturbed(task: Task, folder: Path) -> Whole:
    """Runs a task as it should go.

    Args:
        task: the command.
        folder: that the run has for itself.
    """
    folder.mkdir(parents=True)
    log = folder.parent / "logs" / f"{folder.name}.log"
    ended, span = time_undisturbed(task.command(folder), log, folder)
    problem = f"undisturbed it ends with {ended.code}: {ended.output[-300:]}" if ended.code else ""
    return Whole(folder, span, problem)


def prepare(folder: Path) -> Path:
    """Statistics and a merged start that the tasks share; made once.

    Returns:
        The merged folder.

    Raises:
        RuntimeError: they cannot be made; the drill has nothing to stand on then.
    """
    statistics, start = folder / "calibration", folder / "start"
    for leaf, command in (
        (statistics, obm("calibrate", *CALIBRATION, f"calibration.output={statistics}")),
        (start, obm("merge", f"calibration.output={statistics}", "--output", start)),
    ):
        if not leaf.exists():
            _must(run(command, folder / "logs" / f"{leaf.name}.log"))
    return start


def _must(ended: Ended) -> None:
    if ended.code:
        raise RuntimeError(f"the drill cannot begin: {ended.output[-2000:]}")


def pipeline(base: Path) -> list[Task]:
    """The tasks, in the order of the pipeline.

    Args:
        base: where `prepare` was called.
    """
    statistics, start = base / "calibration", base / "start"
    return [
        Task(
            "obm calibrate", "calibration", calibrate_command,
            ("vlm/stats.safetensors", "agent/stats.safetensors"), "exists; pass --overwrite",
        ),
        Task(
            "obm merge", "merged", lambda folder: merge_command(folder, statistics),
            ("merge.json",), "exists; choose another output",
        ),
        Task(
            "obm train", "run", lambda folder: train_command(folder, start), ("done.json",),
            progress=newest_step,
        ),
        Task(
            "obm train, two processes", "run",
            lambda folder: train_command(folder, start, n_processes=2), ("done.json",),
            progress=newest_step,
        ),
        Task(
            "obm eval", "eval", lambda folder: eval_command(folder, start), ("eval.json",),
            "holds an evaluation; pass --overwrite", finished_batches,
        ),
        Task("obm study", "study", study_command, ("report/compare.json",)),
    ]  # fmt: skip


def calibrate_command(folder: Path, *more: str) -> list[str]:
    """Statistics of both parents."""
    return obm("calibrate", *CALIBRATION, f"calibration.output={folder / 'calibration'}", *more)


def merge_command(folder: Path, statistics: Path, *more: str) -> list[str]:
    """OBM of the trio, a tensor at a time."""
    settings = (f"calibration.output={statistics}", "merge.threads=1", *more)
    return obm("merge", *settings, "--output", folder / "merged")


def train_command(folder: Path, start: Path, *more: str, n_processes: int = 1) -> list[str]:
    """Four steps of GRPO; begins, or goes on."""
    rows = f"grpo.per_device_train_batch_size={COMPLETIONS // n_processes}"
    where = (f"models.init={start}", f"output={folder / 'run'}")
    command = obm("train", *TRAINING, rows, *where, "--resume", *more)
    return [*command, "--num-processes", str(n_processes)]


def eval_command(folder: Path, start: Path, *more: str) -> list[str]:
    """Thirty-two questions in batches of four."""
    return obm("eval", start, *EVALUATION, "--batch", "4", "--output", folder / "eval", *more)


def study_command(folder: Path, *more: str) -> list[str]:
    """Calibrates, merges, evaluates, trains, reports."""
    from configs.schema import shipped_config

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(
        STUDY.format(config=shipped_config("demo"), output=folder / "study"), encoding="utf-8"
    )
    return obm("study", path, *more)


def newest_step(output: Path) -> int:
    """Step of a training's newest whole checkpoint; 0 where there is none."""
    from train.resume import whole_checkpoints

    whole = whole_checkpoints(output)
    return int(whole[-1][0].name.rpartition("-")[2]) if whole else 0


def finished_batches(output: Path) -> int:
    """Batches of an evaluation that are kept."""
    if (output / "eval.json").exists():
        return 10**6
    return len(list((output / "episodes").glob("[0-9]*.jsonl")))
