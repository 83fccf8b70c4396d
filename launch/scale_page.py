"""Writes the tables of docs/scale.md and the figures of docs/results/scale.json.

python -m launch.scale_page     writes both again, as `make results-check ARGS=--write` does
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from compare.figures import Results
from configs.schema import load_config, shipped_config
from launch.scale import EPISODES, PROMPT_TOKENS, Measured, measured, parents_bytes
from launch.scale_tables import TABLES
from train.estimate import Estimate, estimate, find_machine, plan_of
from train.files import write_text
from train.memory import checkpoint_bytes, host_bytes
from train.plan import GB

PAGE, RECORD = "docs/scale.md", "docs/results/scale.json"
BEGIN, END = "<!-- scale: {} -->", "<!-- end of scale -->"
DIGITS = 6
"""Of the record's figures: pages show fewer, and a figure that is rounded twice may be another."""


def page(text: str, found: Measured) -> str:
    """The page with its tables made again; the text around them stays."""
    for name, make in TABLES.items():
        begin = BEGIN.format(name)
        pattern = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(END)}", re.S)
        body = "\n".join([begin, "", *make(found), "", END])
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{PAGE}: '{begin}' has to stand once, with '{END}' behind it")
        # a function, since a replacement text would have its backslashes read
        text = pattern.sub(partial(_same, body), text)
    return text


def _same(body: str, match: re.Match[str]) -> str:
    """What stands in place of a match."""
    return body


# ---------------------------------------------------------------- figures of other pages


def settings_record() -> dict[str, Any]:
    """What README and recipes say of the shipped settings: name -> figures of the estimate."""
    adapter = ["lora.r=16", "grpo.learning_rate=1e-5", "deepspeed=zero2"]
    whole_step = "grpo.gradient_accumulation_steps=32"  # the 256 episodes of eight processes
    asked: dict[str, tuple[str, str, list[str], int | None]] = {
        "7b": ("qwen2.5-vl-7b", "h100x8", [], PROMPT_TOKENS),
        "7b lora": ("qwen2.5-vl-7b", "h100x2", [*adapter, whole_step], PROMPT_TOKENS),
        "3b": ("qwen2.5-vl-3b", "h100x8", [], PROMPT_TOKENS),
        "3b-1gpu": ("qwen2.5-vl-3b-1gpu", "h100", [], PROMPT_TOKENS),
        "3b-1gpu lora": ("qwen2.5-vl-3b-1gpu", "h100", adapter, PROMPT_TOKENS),
        "7b atlas": ("qwen2.5-vl-7b", "h100x8", [], None),
        "7b-vllm atlas": ("qwen2.5-vl-7b-vllm", "h100x4", [], None),
    }
    return {name: _figures(*settings) for name, settings in asked.items()}


def _figures(
    settings: str, machine: str, changes: list[str], prompt_tokens: int | None
) -> dict[str, Any]:
    config = load_config(shipped_config(settings), changes)
    accelerator, n = find_machine(machine, 1)
    found: Estimate = estimate(plan_of(config, n, prompt_tokens, 4), accelerator)
    plan, n_steps = found.plan, config.grpo["max_steps"]
    parents, saved = parents_bytes(plan.shape), checkpoint_bytes(plan)
    merged = 2.0 * plan.shape.n_parameters
    return {
        "machine": machine,
        "gpus": n,
        "prompt_tokens": plan.prompt_tokens,
        "peak_gb": round(found.memory.peak / GB, DIGITS),
        "peak_phase": found.memory.peak_phase,
        "host_gb": round(host_bytes(plan, min(n, accelerator.node)) / GB, DIGITS),
        "episodes": plan.rows * plan.accumulation * n,
        "step_s": round(found.step_s, DIGITS),
        "decode_s": round(found.seconds["decode"], DIGITS),
        "hours": round(found.step_s * n_steps / 3600, DIGITS),
        "parents_gb": round(parents / GB, DIGITS),
        "merged_gb": round(merged / GB, DIGITS),
        "checkpoint_gb": round(saved / GB, DIGITS),
        # two checkpoints are kept while a third is written
        "disk_gb": round((parents + merged + 3 * saved) / GB, DIGITS),
    }


def record(found: Measured) -> dict[str, Any]:
    """Content of scale.json."""
    return {
        "command": "python -m launch.scale_page",
        "about": "a stated model, not measured on GPUs; coefficients of docs/results/bench-*.json",
        "episodes": EPISODES,
        "settings": settings_record(),
        "measured": vars(found),
    }


def outdated(root: Path) -> dict[str, str]:
    """Files of a checkout that the benches of its docs/results make another way: path -> its text.

    Raises:
        CompareError: a bench's file cannot be read or has no such figure.
        ValueError: the page lacks the place of a table.
    """
    found = measured(Results(root / "docs/results"))
    made = {PAGE: page, RECORD: lambda _, found: json.dumps(record(found), indent=2) + "\n"}
    stands = {name: (root / name).read_text(encoding="utf-8") for name in made}
    texts = {name: make(stands[name], found) for name, make in made.items()}
    return {name: text for name, text in texts.items() if text != stands[name]}


def main() -> int:
    """Writes the page and the record."""
    for name, text in outdated(Path()).items():
        write_text(Path(name), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
