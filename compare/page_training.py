"""Sections on the trainings: perception kept, cost, steadiness, where the reward came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from compare import page
from compare.charts_rows import bar_chart
from compare.page import Cell, Section, TableRow, estimate_cell, paragraph
from compare.page_parts import Comparison, steps_cell, table_row
from compare.verdict import duration, heights_of, listed, target_words

STABILITY = {
    "collapses": ("collapses", 1), "final_minus_best": ("end minus best", 3),
    "largest_drop": ("largest drop", 3), "ceiling_sd": ("spread of ceilings", 3),
    "curve_sd": ("spread of curves", 3), "zero_signal": ("groups without signal", 3),
    "not_a_number": ("steps not a number", 3),
}  # fmt: skip
_REWARD_CLASSES = ("way-text_only", "way-both", "way-image_only", "way-none")


# ---- perception


def recognition_section(data: Comparison) -> Section | None:
    """What training does to the recognition of seen places, where it was measured."""
    measured = {arm: one for arm, one in data.results.items() if "recognition" in one}
    if not measured:
        return None
    rows = [
        table_row(data, arm, [
            estimate_cell(value, data.interval(arm, f"recognition.{when}"))
            for when, value in result["recognition"].items()
        ])
        for arm, result in measured.items()
    ]  # fmt: skip
    return Section(
        f"{data.prefix}recognition", "Perception kept",
        paragraph("Share of photos of seen places that are named right when the VLM's own question "
                  "is asked, without tools: other photos for every seed, the same before and after "
                  "training.")
        + page.table("Recognition before and after training, 95 % interval in brackets",
                     ["start", "before", "after", "change"], rows),
    )  # fmt: skip


# ---- cost


def cost_section(data: Comparison) -> Section | None:
    """Steps, tokens and device time to the target, and accuracy at equal device time."""
    names = ("tokens_to_target", "device_s_to_target", "preparation_device_s")
    if not any(r.get(n) is not None for r in data.results.values() for n in names):
        return None
    rows = []
    for arm, result in data.results.items():
        preparation = result.get("preparation_device_s")
        parts = preparation if isinstance(preparation, Mapping) else {"": preparation}
        known = [value for value in parts.values() if value is not None]
        rows.append(table_row(data, arm, [
            steps_cell(data, arm),
            estimate_cell(result.get("tokens_to_target"), data.interval(arm, "tokens_to_target"),
                          digits=0),
            _time_cell(result.get("device_s_to_target"), data.interval(arm, "device_s_to_target")),
            _time_cell(sum(known) if known else None, None),
            _time_cell(result.get("training_device_s"), data.interval(arm, "training_device_s")),
            estimate_cell(result.get("at_equal_budget"), data.interval(arm, "at_equal_budget")),
        ]))  # fmt: skip
    budget = data.summary.get("equal_budget") or {}
    text = "Device time to the target includes calibration and merging."
    if budget.get("device_s") is not None:
        text += (
            f" Equal budget: the smoothed accuracy once {duration(budget['device_s'])} are spent, "
            f"preparation included, which is what {data.arms.label(budget['arm'])} took in all."
        )
    if cheaper := [arm for arm in budget.get("cheaper") or () if arm in data.results]:
        text += f" The last value holds for {listed(cheaper, data.arms.label)}, which cost less."
    notes = [text, *_cost_notes(data)]
    goal = target_words(data.summary, data.arms.label)
    return Section(
        f"{data.prefix}cost", f"Cost to {goal}",
        "".join(paragraph(note) for note in notes) + page.table(
            f"Cost to reach {goal}, and accuracy at equal device time",
            ["start", "steps", "tokens", "device time", "preparation", "whole training",
             "accuracy at equal budget"], rows,
        ),
    )  # fmt: skip


def _cost_notes(data: Comparison) -> list[str]:
    """The notes on costs, equal ones of several arms as one."""
    arms_of: dict[str, list[str]] = {}
    for note in (data.summary.get("cost") or {}).get("notes", []):
        arm, colon, text = note.partition(": ")
        if colon and arm in data.results:
            arms_of.setdefault(text, []).append(arm)
        else:
            arms_of.setdefault(note, [])
    return [
        f"{listed(arms, data.arms.label)}: {text}." if arms else f"{text.rstrip('.')}."
        for text, arms in arms_of.items()
    ]


def _time_cell(seconds: float | None, limits: Sequence[float] | None) -> Cell:
    if seconds is None:
        return Cell("–")
    unit, by = ("h", 3600) if seconds >= 3600 else ("min", 60) if seconds >= 120 else ("s", 1)
    small = ""
    if limits and limits[0] != limits[1]:
        small = f"[{limits[0] / by:.1f}, {limits[1] / by:.1f}]"
    return Cell(f"{seconds / by:.1f} {unit}", seconds, small)


# ---- speed


def speed_section(data: Comparison) -> Section | None:
    """Steps to every tenth of accuracy that some run reaches."""
    heights = heights_of(data.summary)
    if not heights or not data.trained:
        return None
    rows = [
        table_row(data, arm, [steps_cell(data, arm, name) for name in heights.values()])
        for arm in data.trained
    ]  # fmt: skip
    return Section(
        f"{data.prefix}speed", "Speed",
        paragraph("Steps until the smoothed accuracy reaches a height: every tenth that a run "
                  "reaches, so that none is picked afterwards. Known to the evaluation only.")
        + page.table("Steps to an accuracy, 95 % interval in brackets",
                     ["start", *(f"to {height}" for height in heights)], rows),
    )  # fmt: skip


# ---- stability


def stability_section(data: Comparison) -> Section | None:
    """How steady the trainings were."""
    known = {arm: r["stability"] for arm, r in data.results.items() if r.get("stability")}
    if not known:
        return None
    names = [n for n in STABILITY if any(found.get(n) is not None for found in known.values())]
    rows = [
        table_row(data, arm, [
            estimate_cell(found.get(n), data.interval(arm, f"stability.{n}"),
                          digits=STABILITY[n][1])
            for n in names
        ])
        for arm, found in known.items()
    ]  # fmt: skip
    return Section(
        f"{data.prefix}stability", "Stability",
        paragraph(
            "How steady the trainings were: drops along a curve, spread between seeds, and groups "
            "that taught nothing because every episode earned the same."
        ) + page.table("Stability of the trainings", ["start", *(STABILITY[n][0] for n in names)],
                       rows),
    )  # fmt: skip


# ---- rewards


def rewards_section(data: Comparison) -> Section | None:
    """What each part added to the reward, early and late."""
    known = {arm: r["reward_parts"] for arm, r in data.results.items() if r.get("reward_parts")}
    if not known:
        return None
    names = list(dict.fromkeys(n for m in known.values() for p in m["phases"] for n in p["parts"]))
    bars, values, rows = [], [], []
    for arm, made in known.items():
        for phase in made["phases"]:
            first, last = phase["steps"]
            pieces = [
                (_REWARD_CLASSES[i % len(_REWARD_CLASSES)], name, phase["parts"].get(name, 0.0))
                for i, name in enumerate(names)
            ]
            label = f"{data.arms.label(arm)}, {first}–{last}"
            bars.append((data.arms.number(arm), label, pieces))
            values.append([arm, first, last, phase["reward"],
                           *(phase["parts"].get(n) for n in names)])  # fmt: skip
            rows.append(TableRow(
                data.arms.label(arm),
                [Cell(f"{first}–{last}", first), Cell(f"{phase['reward']:.3f}", phase["reward"]),
                 *(estimate_cell(phase["parts"].get(n), digits=3) for n in names)],
                data.arms.number(arm),
            ))  # fmt: skip
    total = max(0.01, *(sum(max(0.0, piece[2]) for piece in bar[2]) for bar in bars))
    wide, narrow = (
        bar_chart(bars, title="Where the reward came from", total=total, width=width,
                  description="What each part added to the mean training reward, by thirds")
        for width in (900, 460)
    )  # fmt: skip
    chart = page.both_widths(wide, narrow)
    legend = "".join(
        f'<li><i class="{_REWARD_CLASSES[i % len(_REWARD_CLASSES)]}"></i>'
        f"{escape(name.replace('accuracy', 'right answers'))}</li>"
        for i, name in enumerate(names)
    )
    hacked = [arm for arm, made in known.items() if made.get("rises_without_answers")]
    warning = ""
    if hacked:
        warning = paragraph(
            f"{listed(hacked, data.arms.label)}: the reward rose mostly by other parts than right "
            "answers. Read episodes before trusting it.", "notice",
        )  # fmt: skip
    return Section(
        f"{data.prefix}rewards", "Where the reward came from",
        warning + page.figure(
            f"{data.prefix}reward-parts", "Parts of the mean training reward",
            f'<ul class="key">{legend}</ul>{chart}',
            ["arm", "first_step", "last_step", "reward", *names], values,
            note="By thirds of the training; right answers with the search penalty taken off.",
        ) + page.table("Parts of the reward by thirds of the training",
                       ["start", "steps", "reward", *names], rows),
    )  # fmt: skip
