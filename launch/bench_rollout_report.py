"""What `obm bench rollout` found: tables, page and picture in docs/results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare.drawing import save_figure, start_drawing
from launch.bench_report import ending
from launch.bench_rollout import AXES, Record, pairs

STAGES = {
    "rollout": "**rollout**",
    "prefill": "- reading prompts and observations",
    "vision in rollout": "  - of it the vision tower",
    "decode": "- decoding",
    "pixels": "- image processor (TRL: once more for the loss)",
    "loss forward": "**loss forward**",
    "vision in loss": "- of it the vision tower",
    "backward": "**backward**",
    "optimizer": "optimizer",
    "step": "**whole step**",
}
"""Figures in CPU seconds, in the order of a step."""
WORDS = {"group": "group size", "turns": "tool turns", "prompt_tokens": "prompt tokens"}
COLOURS = {"trl": "#D55E00", "ours": "#0072B2"}
LABELS = {"trl": "TRL's tool loop", "ours": "ours"}


def render_headline(trl: Record, ours: Record) -> str:
    """Stages of one workload as a Markdown table."""
    theirs, figures, done = trl["figures"], ours["figures"], ours["done"]
    lines = ["| CPU seconds | TRL | ours | TRL / ours |", "| --- | ---: | ---: | ---: |"]
    rows = [(words, theirs[stage], figures[stage], 2) for stage, words in STAGES.items()]
    per_token = 1000 / done["policy tokens"]
    rows.append(
        ("decoding, ms a token", theirs["decode"] * per_token, figures["decode"] * per_token, 2)
    )
    rows.append(
        ("memory: growth in the rollout, MB", theirs["rollout_mb"], figures["rollout_mb"], 0)
    )
    rows.append(("memory: growth over the step, MB", theirs["step_mb"], figures["step_mb"], 0))
    for words, their_value, value, digits in rows:
        ratio = f"{their_value / value:.1f}" if value else ""
        lines.append(f"| {words} | {their_value:.{digits}f} | {value:.{digits}f} | {ratio} |")
    return "\n".join(lines)


def render_growth(records: Sequence[Record], axis: str) -> str:
    """CPU seconds along one axis as a Markdown table."""
    lines = [
        f"| {WORDS[axis]} | TRL rollout | ours | TRL / ours | TRL step | ours | TRL / ours "
        "| TRL MB | ours MB |",
        "| ---: |" + " ---: |" * 8,
    ]
    for trl, ours in pairs(records, axis):
        cells = [str(ours["work"][axis])]
        for stage in ("rollout", "step"):
            theirs, value = trl["figures"][stage], ours["figures"][stage]
            cells += [f"{theirs:.2f}", f"{value:.2f}", f"{theirs / value:.1f}"]
        cells += [f"{side['figures']['step_mb']:.0f}" for side in (trl, ours)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_page(record: dict[str, Any]) -> str:
    """docs/results/bench-rollout.md from the content of bench-rollout.json."""
    runs = record["runs"]
    done = runs[0]["done"]
    work = runs[0]["work"]
    lines = [
        "# Rollout and GRPO step beside stock TRL's tool loop",
        "",
        f"One group of {work['group']} episodes a step: a prompt of {work['prompt_tokens']} tokens "
        f"with a picture of 320 x 240, {work['turns']} tool turns (a text result, two pictures, a "
        f"text result) and an answer, {work['turn_tokens']} tokens of the policy in each. Policies "
        "are random Qwen2.5-VL made from their configs in float32; one thread; AdamW; no "
        "activation checkpointing.",
        "",
        f"Both sides do the same work, checked in every run: {done['prompt tokens']} tokens of "
        f"prompts, {done['policy tokens']} of the policy, {done['observation tokens']} of "
        f"observations and {done['pictures']} pictures in the loss of a step.",
        "",
        "* **Turns are scripted.** Both sides compute every forward of sampling; then the script's "
        "tokens take the place of the sampled ones. All episodes say something else, and all have "
        "an advantage other than 0, so that neither equal rows nor rows without a gradient are "
        "spared (ours would).",
        "* **distinct results** is the headline: every call returns another text or other "
        "pictures. **shared results**: the group's calls of a turn return the same, as a cached "
        "search does; the conversations still differ, and ours spares the vision tower alone.",
        "* The frames differ (JSON calls and a list of tools; Search-R1's tags); words are added "
        "until the lengths are equal.",
        "* TRL is `GRPOTrainer` with `tools=`, its `_generate_single_turn` followed by the script. "
        "To run at all it needs a template that renders tool calls (Qwen3-VL's, shipped with TRL), "
        "an image-only processor, `log_multimodal=False` and suppressed vision tokens.",
        "* decoding: of TRL all of `generate` but its first forward; of ours sampling and decoding "
        "with log-probs and entropies, which TRL does not keep. memory: growth of resident memory "
        "over the step; without a warm step before, so optimizer state is part of it at 80m.",
    ]
    for trl, ours in pairs(runs, "headline"):
        done_work = ours["work"]
        lines += [
            "",
            f"## {done_work['policy']}, {done_work['results']} results "
            f"({ours['parameters'] / 1e6:.1f} M parameters)",
            "",
            render_headline(trl, ours),
        ]
    axes = [axis for axis in AXES if pairs(runs, axis)]
    if axes:
        policy = pairs(runs, axes[0])[0][0]["work"]["policy"]
        lines += [
            "",
            f"## Growth of the cost ({policy}, distinct results, CPU seconds of one step)",
            "",
            "![growth](bench-rollout.svg)",
        ]
        for axis in axes:
            lines += ["", render_growth(runs, axis)]
    lines += [
        "",
        "## Targets",
        "",
        *ending(record),
    ]
    return "\n".join(lines) + "\n"


def draw_growth(runs: Sequence[Record], paths: Sequence[Path], caption: str) -> None:
    """Draws CPU seconds of rollout and step along every axis, a file a path.

    Args:
        runs: records of the bench.
        paths: the suffix says the format.
        caption: printed under the panels.
    """
    plt = start_drawing(9)
    axes = [axis for axis in AXES if pairs(runs, axis)]
    figure, panels = plt.subplots(1, len(axes), figsize=(4.5 * len(axes), 3.8), squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        both = pairs(runs, axis)
        values = [ours["work"][axis] for _, ours in both]
        for place, side in enumerate(("trl", "ours")):
            for stage, style in (("step", "-"), ("rollout", "--")):
                panel.plot(
                    values, [pair[place]["figures"][stage] for pair in both], f"o{style}",
                    color=COLOURS[side], label=f"{LABELS[side]}, {stage}", markersize=3.5,
                )  # fmt: skip
        panel.set_xlabel(WORDS[axis])
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0][0].set_ylabel("CPU seconds")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.text(0.01, 0.012, caption, fontsize=7, color="#444444", va="bottom")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save_figure(figure, paths)
