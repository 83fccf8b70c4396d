"""Two processes under ZeRO-3 for 200 steps, with everything that could hang them or eat memory.

The number of turns is random, pictures and text-only questions fall on either process, tools fail,
are slow, or answer too late. Per step and process the resident memory, the seconds and the faults
are recorded; a watchdog ends the run if nothing moves for two minutes. The exit code is 1 if a
target was missed: steps, memory, threads, or how the run ended.

    make soak          (a quarter of an hour; writes docs/results/soak.json and soak.md)
    python tests/train/soak.py --steps 20 --output soak_test     (a short one, elsewhere)
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

here = Path(__file__).resolve().parent
ROOT = here.parents[1]
sys.path[:0] = [str(ROOT), str(here)]

import numpy as np

from launch.bench_report import at_least, at_most, target_lines

ROWS = 8
GROUP = 4
TIMEOUT_S = 0.15
FAILS, TOO_LATE, SLOW = 0.03, 0.03, 0.15
"""shares of the searches: the service goes down, answers after the time-out, takes a while"""
DOWN_FOR = 6
"""searches until it is up again, at most"""
SETTLED = 50
"""steps before memory is looked at: allocators and caches fill"""
MOST_KB_PER_STEP = 100.0
"""an allocator that takes and gives back a few MB at a time makes slopes of 40 over 150 steps"""
FEWEST_STEPS = 4
"""without as many there is nothing to say of memory"""


class Unreliable:
    """A search service with bad days."""

    in_memory = False

    def __init__(self, index: Any, seed: int) -> None:
        self.index, self.random, self.down_for = index, random.Random(seed), 0

    def search(self, queries: list[Any], k: int) -> Any:
        fate = self.random.random()
        if fate < FAILS:
            self.down_for = self.random.randint(1, DOWN_FOR)
        if self.down_for > 0:
            self.down_for -= 1
            raise ConnectionError("the service is down")
        if fate < FAILS + TOO_LATE:
            time.sleep(1.5 * TIMEOUT_S)
        elif fate < FAILS + TOO_LATE + SLOW:
            time.sleep(self.random.uniform(0, 0.5 * TIMEOUT_S))
        return self.index.search(queries, k)


def make_script(seed: int) -> Any:
    """Turns at random: none to four searches, then an answer, right or wrong, or free sampling."""
    from conftest import ANSWER, ASK_IMAGE, ASK_TEXT

    dice = random.Random(seed)

    def script(question: dict[str, Any], turn: int) -> str | None:
        if turn < 4 and dice.random() < 0.6:
            return ASK_IMAGE if question["image"] is not None and turn == 0 else ASK_TEXT
        fate = dice.random()
        if fate < 0.1:
            return None
        return ANSWER if fate < 0.55 else "<think> no </think> <answer> Rome </answer>"

    return script


def train(init: str, folder: Path, n_steps: int) -> None:
    """What each process runs; writes `<folder>/steps_<rank>.jsonl`."""
    from train.settings import prepare_deepspeed

    prepare_deepspeed(has_gpu=False)
    import psutil
    import torch
    from conftest import FakeImageIndex, FakeTextIndex, make_question
    from transformers import TrainerCallback
    from trl import GRPOConfig

    from environments.episode import SearchEnvironment
    from train import scoring
    from train.grpo import SearchGRPOTrainer
    from train.policy import load_policy
    from train.watchdog import Watchdog

    torch.set_num_threads(1)
    scoring.ROWS_PER_BUCKET = 2  # several collectives a step, as with large batches
    rank = int(os.environ["RANK"])
    args = GRPOConfig(
        output_dir=str(folder / "checkpoints"),
        deepspeed=str(ROOT / "configs" / "deepspeed" / "zero3.json"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        max_completion_length=300,
        generation_kwargs={"max_new_tokens": 40},
        max_steps=n_steps,
        learning_rate=1e-4,
        seed=5,
    )
    model, processor = load_policy(init)
    dice = random.Random(5)
    questions = [make_question(i, has_image=dice.random() < 0.5) for i in range(64)]
    environment = SearchEnvironment(
        Unreliable(FakeTextIndex(), rank), Unreliable(FakeImageIndex(), 100 + rank),
        top_k_image=2, thumbnails=True, timeout_s=TIMEOUT_S, text_searches=4, max_turns=6,
    )  # fmt: skip
    trainer = SearchGRPOTrainer(
        model, args=args, questions=questions, environment=environment,
        rewards={"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1,
                 "infrastructure_fault": "mask"},
        processing_class=processor, script=make_script(1000 + rank), tool_workers=4,
    )  # fmt: skip
    process, file = psutil.Process(), (folder / f"steps_{rank}.jsonl").open("w", buffering=1)

    class Record(TrainerCallback):
        def __init__(self) -> None:
            self.start = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            episodes = trainer.last_trajectories
            now = time.perf_counter()
            turns = [turn for episode in episodes for turn in episode.turns]
            line = {
                "step": state.global_step,
                "seconds": round(now - self.start, 4),
                "rss_mb": round(process.memory_info().rss / 2**20, 2),
                "threads": process.num_threads(),
                "loss": logs["loss"],
                "grad_norm": logs["grad_norm"],
                "turns": [len(episode.turns) for episode in episodes],
                "with_picture": sum(bool(episode.all_images) for episode in episodes),
                "faults": sum(turn.is_error for turn in turns),
                "fatal": sum(episode.fatal_turn is not None for episode in episodes),
            }
            file.write(json.dumps(line) + "\n")
            self.start = now

    trainer.add_callback(Record())
    with Watchdog(folder, rank, 2, timeout_s=120.0, step=lambda: trainer.state.global_step):
        trainer.train()


# ---------------------------------------------------------------- report


def read_steps(folder: Path) -> list[list[dict[str, Any]]]:
    """Both processes' lines, as far as they came."""
    paths = [folder / f"steps_{rank}.jsonl" for rank in (0, 1)]
    return [
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in paths
    ]


def summarize(lines: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Both processes' lines as one record."""
    n_steps = min(map(len, lines))
    settled = min(SETTLED, n_steps // 2)
    shown = sorted({1, settled, n_steps // 2, n_steps})
    pairs = list(zip(*lines, strict=False))
    both = [line for pair in pairs for line in pair]
    turns = [n for line in both for n in line["turns"]]
    seconds = [first["seconds"] for first, _ in pairs[1:]]

    def growth(rows: list[dict[str, Any]]) -> float:
        """KB of resident memory per step, by least squares over the settled steps."""
        later = [row["rss_mb"] for row in rows[settled:n_steps]]
        return round(1024 * float(np.polyfit(np.arange(len(later)), later, 1)[0]), 2)

    return {
        "steps": n_steps,
        "processes": 2,
        "episodes": 2 * ROWS * n_steps,
        "seconds_per_step": {
            "mean": round(float(np.mean(seconds)), 3), "max": round(max(seconds), 3)
        },
        "turns_per_episode": {"mean": round(float(np.mean(turns)), 2), "max": max(turns)},
        "steps_with_other_turns_per_process": sum(
            max(a["turns"]) != max(b["turns"]) for a, b in pairs
        ),
        "steps_with_pictures_on_one_process_only": sum(
            (a["with_picture"] == 0) != (b["with_picture"] == 0) for a, b in pairs
        ),
        "tool_faults": sum(line["faults"] for line in both),
        "fatal_episodes": sum(line["fatal"] for line in both),
        "memory": {
            f"rank {rank}": {
                "rss_mb_at": {str(step): rows[step - 1]["rss_mb"] for step in shown},
                "settled_mb": [
                    min(row["rss_mb"] for row in rows[settled:n_steps]),
                    max(row["rss_mb"] for row in rows[settled:n_steps]),
                ],
                "slope_kb_per_step": growth(rows),
                "threads": [rows[settled]["threads"], rows[n_steps - 1]["threads"]],
            }
            for rank, rows in enumerate(lines)
        },
        "settled_after": settled,
        "series": {
            "rss_mb": [[x["rss_mb"] for x in pair] for pair in pairs],
            "seconds": [round(a["seconds"], 3) for a, _ in pairs],
            "loss": [a["loss"] for a, _ in pairs],
        },
    }  # fmt: skip


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets: name, value, target, met."""
    memory = found["memory"].values()
    more_threads = max(m["threads"][1] - m["threads"][0] for m in memory)
    targets = [
        at_least("steps that were made", found["steps"], found["planned"]),
        at_most("exit code of the launcher", abs(found["exit_code"]), 0),
        at_most("more threads at the end", more_threads, 0),
    ]
    if found["settled_after"] == SETTLED:
        slope = max(m["slope_kb_per_step"] for m in memory)
        targets.append(at_most("growth of memory, KB per step", slope, MOST_KB_PER_STEP))
    return targets


def render(found: dict[str, Any]) -> str:
    """docs/results/soak.md."""
    memory = found["memory"]
    rows = [
        f"| {rank} | {' → '.join(f'{mb:.0f}' for mb in m['rss_mb_at'].values())} "
        f"| {m['settled_mb'][0]:.0f} to {m['settled_mb'][1]:.0f} "
        f"| {m['slope_kb_per_step']:+.1f} | {m['threads'][0]} → {m['threads'][1]} |"
        for rank, m in memory.items()
    ]
    at = ", ".join(next(iter(memory.values()))["rss_mb_at"])
    return "\n".join(
        [
            "# Soak: two processes under ZeRO-3",
            "",
            f"{found['steps']} steps of {2 * ROWS} episodes on {found['hardware']}; `make soak` "
            "runs it again (`tests/train/soak.py`).",
            "The policy is the tests' tiny VLM; its turns are scripted at random, its tools fail, "
            "are slow or answer too late.",
            "",
            "| what happened | |",
            "| --- | --- |",
            f"| steps without a hang | {found['steps']} of {found['planned']} |",
            f"| turns per episode | {found['turns_per_episode']['mean']} on average, up to "
            f"{found['turns_per_episode']['max']} |",
            "| steps whose processes had other numbers of turns | "
            f"{found['steps_with_other_turns_per_process']} |",
            "| steps with pictures on one process only | "
            f"{found['steps_with_pictures_on_one_process_only']} |",
            f"| tool calls that failed or came too late | {found['tool_faults']} |",
            f"| episodes cut short by three failures in a row | {found['fatal_episodes']} |",
            f"| seconds per step | {found['seconds_per_step']['mean']}, at most "
            f"{found['seconds_per_step']['max']} |",
            "",
            f"Resident memory (MB at steps {at}; range, and slope by least squares, over the steps "
            f"after {found['settled_after']}):",
            "",
            "| process | MB | lowest to highest | KB per step | threads |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            *target_lines(found["targets"]),
            "",
            "`soak.json` has memory, seconds and loss of every step. Made by "
            f"`{found['command']}` at commit {found['commit']}.",
            "",
        ]
    )


def main() -> int:
    """Launches itself, or is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "soak")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        train(str(options.folder / "tiny" / "vlm"), options.folder, options.steps)
        return 0
    from compare.provenance import origin
    from launch.jobs import deepspeed_launcher
    from train.files import write_json, write_text
    from train.tiny import make_tiny_checkpoints

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_checkpoints(folder / "tiny", seed=0)
        command = [
            str(deepspeed_launcher()), "--num_gpus", "2", str(Path(__file__).resolve()),
            "--folder", str(folder), "--steps", str(options.steps),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        log = folder / "log"
        with log.open("wb") as file:
            code = subprocess.run(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
        lines = read_steps(folder)
    if min(map(len, lines)) < FEWEST_STEPS:
        print(f"error: fewer than {FEWEST_STEPS} steps were made", file=sys.stderr)
        return code or 1
    found = {
        **origin(shlex.join(["python", "tests/train/soak.py", *sys.argv[1:]])),
        "planned": options.steps,
        "exit_code": code,
        **summarize(lines),
        "wall_s": round(time.perf_counter() - start, 1),
    }
    found["targets"] = judge(found)
    write_json(options.output.with_suffix(".json"), found)
    write_text(options.output.with_suffix(".md"), render(found))
    print(render(found))
    return 0 if all(target["met"] for target in found["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
