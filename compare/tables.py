"""The tables of a comparison as rows of text, all from the summary alone.

The first is for the terminal and the report; the sections below are for the report's md file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compare.rows import markdown_table
from compare.verdict import (
    ABOVE,
    BELOW,
    heights_of,
    is_floor,
    side_of_difference,
    signed,
    target_name,
    target_words,
)
from environments.episode import STOP_REASONS
from train.evaluation import BEHAVIOURS

Rows = list[list[str]]
Summary = Mapping[str, Any]

SHOWN_DIFFERENCES = (
    "floor", "ceiling", "auc", "final", "at_equal_budget", "recognition.after",
    "recognition.change",
)  # fmt: skip
"""Columns of the differences; the json has more."""
HEADS = {
    "auc": "area", "at_equal_budget": "at equal budget",
    "recognition.after": "recognition after", "recognition.change": "change of recognition",
}  # fmt: skip


# ---------------------------------------------------------------- the first table


def overview_rows(summary: Summary) -> Rows:
    """One row an arm: floor in four parts, ceiling, area, steps to the target, searches."""
    rows = [
        ["arm", "seeds", "searched", "entity", "passage", "floor", "ceiling", "area",
         f"steps to {target_name(summary, str)}", "text search", "image search"]
    ]  # fmt: skip
    for arm, result in summary["arms"].items():
        limits = result["intervals"]
        floor = result["floor"]
        rows.append([
            arm,
            str(len(result["seeds"])),
            cell(floor["searched"], limits.get("floor.searched")),
            cell(floor["entity"], limits.get("floor.entity")),
            cell(floor["passage"], limits.get("floor.passage")),
            cell(floor["accuracy"], limits.get("floor.accuracy")),
            cell(result["ceiling"], limits.get("ceiling")),
            cell(result["auc"], limits.get("auc")),
            _to_target(result, "steps_to_target", summary),
            cell(result["search_rate_text"], limits.get("search_rate_text")),
            cell(result["search_rate_image"], limits.get("search_rate_image")),
        ])  # fmt: skip
    return rows


# ---------------------------------------------------------------- sections


def sections(summary: Summary) -> list[str]:
    """All sections, as lines of Markdown."""
    makers = (_differences, _recognition, _costs, _speed, _stability, _behaviour, _groups)
    return [line for make in makers for line in make(summary)]


def _differences(summary: Summary) -> Iterator[str]:
    reference = summary["reference"]
    pairs = {
        (pair["arm"], pair["metric"]): pair
        for pair in summary["pairs"]
        if pair["other"] == reference
    }
    arms = [arm for arm in summary["arms"] if any(arm == name for name, _ in pairs)]
    if not arms:
        return
    shown = [name for name in SHOWN_DIFFERENCES if any((arm, name) in pairs for arm in arms)]
    rows = [[f"minus {reference}", "pairs", *(HEADS.get(name, name) for name in shown)]]
    for arm in arms:
        own = [pair for (name, _), pair in pairs.items() if name == arm]
        n_pairs = max(pair["n_pairs"] for pair in own)
        pairing = str(n_pairs) if all(pair["paired"] for pair in own) else "unpaired"
        rows.append([arm, pairing, *(_difference_cell(pairs.get((arm, name))) for name in shown)])
    n_intervals = sum(
        pair["low"] is not None for (arm, name), pair in pairs.items() if name in shown
    )
    yield from ["## Differences", "", *markdown_table(rows), ""]
    yield (
        f"Each arm minus `{reference}`, seed by seed on the same questions in the same order "
        "(unpaired: the arms share no two seeds). Square brackets: the 95 % interval of the mean "
        "difference; then the share of bootstrap resamples in which the arm is better, "
        f"and the exact permutation p-value. Bold: the interval leaves out 0; of {n_intervals} "
        "intervals one in twenty does so by chance. A floor that every seed shares was measured "
        "once and has no interval. All pairs of arms are in the json file."
    )
    yield ""


def _difference_cell(pair: Mapping[str, Any] | None) -> str:
    if pair is None:
        return "-"
    text = _difference(pair, 3)
    if pair["low"] is None:
        return text
    return f"{text} {pair['probability']:.2f}, p {pair['p_value']:.2g}"


def _difference(pair: Mapping[str, Any], digits: int) -> str:
    """With its interval, where it has one; bold where that leaves out 0."""
    text = signed(pair["mean"], digits)
    if pair["low"] is None:
        return text
    text += f" [{signed(pair['low'], digits)}, {signed(pair['high'], digits)}]"
    side = side_of_difference(pair, same_questions=is_floor(pair["metric"]))
    return f"**{text}**" if side in (ABOVE, BELOW) else text


def _recognition(summary: Summary) -> Iterator[str]:
    measured = {arm: one for arm, one in summary["arms"].items() if "recognition" in one}
    if not measured:
        return
    whens = ("before", "after", "change")
    rows = [["arm", "before training", "after", "change"]]
    for arm, result in measured.items():
        limits = result["intervals"]
        rows.append([
            arm,
            *(cell(result["recognition"][when], limits.get(f"recognition.{when}"))
              for when in whens),
        ])  # fmt: skip
    yield from ["## Perception kept", "", *markdown_table(rows), ""]
    yield (
        "Recognition: share of photos of seen places whose name stands in the reply to the VLM's "
        "own question, without tools; other photos for every seed, the same before and after."
    )
    yield ""


def _costs(summary: Summary) -> Iterator[str]:
    trained = {arm: one for arm, one in summary["arms"].items() if one["is_trained"]}
    if not trained:
        return
    budget = summary["equal_budget"]
    at_equal = f"accuracy at {hours(budget['device_s'])}" if budget else "at equal budget"
    rows = [["arm", "steps", "tokens", "device time", "preparation", "training", at_equal]]
    for arm, result in trained.items():
        parts = result["preparation_device_s"]
        prepared = "not recorded" if parts is None else hours(sum(parts.values()))
        if parts:
            prepared += f" ({', '.join(f'{part} {hours(s)}' for part, s in parts.items())})"
        training = result["training_device_s"]
        rows.append([
            arm,
            _to_target(result, "steps_to_target", summary),
            _to_target(result, "tokens_to_target", summary),
            _to_target(result, "device_s_to_target", summary),
            prepared,
            "-" if training is None else hours(training),
            cell(result["at_equal_budget"], result["intervals"].get("at_equal_budget")),
        ])  # fmt: skip
    yield from ["## Cost to target", "", *markdown_table(rows), ""]
    yield (
        "Steps, policy tokens and device time until the smoothed accuracy reaches "
        f"{target_words(summary, code)}; device time of all processes, with calibration and merge, "
        "without evaluations. Searching for a recipe is not counted. The last column compares the "
        "arms where each has spent as much as "
        f"{'`' + budget['arm'] + '` in all' if budget else 'the cheapest'}."
    )
    for arm, spent in (budget or {}).get("cheaper", {}).items():
        yield f"* {arm}: ended at {hours(spent)}, before the budget was spent; its last value holds"
    for note in summary["cost"]["notes"]:
        yield f"* {note}"
    yield ""


def _speed(summary: Summary) -> Iterator[str]:
    """Steps to every tenth that some run reaches, and what they differ by."""
    heights, reference = heights_of(summary), summary["reference"]
    trained = {arm: one for arm, one in summary["arms"].items() if one["is_trained"]}
    if not heights or not trained:
        return
    pairs = {
        (pair["arm"], pair["metric"]): pair
        for pair in summary["pairs"]
        if pair["other"] == reference
    }
    rows = [["steps to", *heights]]
    rows += [[arm, *(_height_cell(one, name) for name in heights.values())]
             for arm, one in trained.items()]  # fmt: skip
    rows += [
        [f"{arm} minus {reference}",
         *(_difference(pairs[arm, name], 0) if (arm, name) in pairs else ""
           for name in heights.values())]
        for arm in trained if any((arm, name) in pairs for name in heights.values())
    ]  # fmt: skip
    yield from ["## Speed", "", *markdown_table(rows), ""]
    yield (
        "Steps until the smoothed accuracy reaches a height: every tenth that a run reaches, so "
        "that none is picked afterwards. Known to the evaluation only. Fewer is faster; bold: the "
        "interval leaves out 0. No difference where a run of either arm does not get there."
    )
    yield ""


def _height_cell(result: Mapping[str, Any], name: str) -> str:
    steps = result["per_seed"].get(name) or []
    reached = sum(value is not None for value in steps)
    if reached < len(steps):
        return f"{reached} of {len(steps)} seeds"
    return cell(result.get(name), result["intervals"].get(name), 0)


def _stability(summary: Summary) -> Iterator[str]:
    trained = {arm: one for arm, one in summary["arms"].items() if one["is_trained"]}
    if not trained:
        return
    rows = [["arm", "collapses", "final", "final minus best", "largest drop", "sd of the ceiling",
             "sd along the curve", "groups without signal", "steps not a number"]]  # fmt: skip
    for arm, result in trained.items():
        found, limits = result["stability"], result["intervals"]
        counts = result["per_seed"]["stability.collapses"]
        rows.append([
            arm,
            f"{sum(value > 0 for value in counts)} of {len(counts)} seeds",
            cell(result["final"], limits.get("final")),
            cell(found["final_minus_best"], limits.get("stability.final_minus_best")),
            cell(found["largest_drop"], limits.get("stability.largest_drop")),
            cell(found["ceiling_sd"], None, 3),
            cell(found["curve_sd"], None, 3),
            cell(found["zero_signal"], limits.get("stability.zero_signal")),
            cell(found["not_a_number"], None),
        ])  # fmt: skip
    yield from ["## Stability", "", *markdown_table(rows), ""]
    yield (
        "A collapse: the smoothed accuracy falls below half of the best it had reached. Standard "
        "deviations are between seeds. Groups without signal: every episode earned the same, mean "
        "over the training steps."
    )
    yield ""


def _behaviour(summary: Summary) -> Iterator[str]:
    """Start -> end of each arm's shares; the curves between are in the json and csv."""
    names = [f"behaviour/{name}" for name in BEHAVIOURS] + ["calls_per_episode"]
    names += [f"stop/{name}" for name in STOP_REASONS]
    curves = summary["curves"]
    # how no episode of any arm behaved needs no column
    shown = [
        name for name in names
        if any(name in own and max(own[name]["mean"]) > 0 for own in curves.values())
    ]  # fmt: skip
    if not shown:
        return
    heads = [name.removeprefix("behaviour/").replace("_", " ") for name in shown]
    rows = [["arm", *heads]]
    for arm, own in curves.items():
        rows.append([arm, *(_change(own.get(name)) for name in shown)])
    yield from ["## Behaviour", "", *markdown_table(rows), ""]
    yield (
        "Shares of evaluation episodes with an image search only, a text search only, both, none; "
        "calls an episode; why episodes ended. Smoothed: at step 0, half-way through the "
        "evaluations, at the end. What no arm ever did has no column."
    )
    yield ""


def _change(curve: Mapping[str, Any] | None) -> str:
    if curve is None:
        return "-"
    mean = curve["mean"]
    points = [mean[0], mean[len(mean) // 2], mean[-1]] if len(mean) > 2 else mean
    return " → ".join(_fixed(value, 2) for value in points)


def _groups(summary: Summary) -> Iterator[str]:
    groups = sorted({group for result in summary["arms"].values() for group in result["by_group"]})
    if not groups:
        return
    rows = [["arm", *groups]]
    for arm, result in summary["arms"].items():
        cells = []
        for group in groups:
            values, limits = result["by_group"].get(group), result["intervals"]
            if values is None:
                cells.append("")
                continue
            parts = [cell(values["floor"], limits.get(f"{group}.floor"))]
            if values["ceiling"] is not None:
                parts.append(cell(values["ceiling"], limits.get(f"{group}.ceiling")))
            cells.append(" → ".join(parts))
        rows.append([arm, *cells])
    yield from ["## Accuracy by group", "", *markdown_table(rows), ""]
    yield (
        "`kind/...` by question kind; `seen` and `unseen`: whether the VLM knew the pictured "
        "entity before. The floor, then the value at the ceiling."
    )
    yield ""


# ---------------------------------------------------------------- cells


def cell(value: float | None, limits: Sequence[float] | None, digits: int = 2) -> str:
    """A number with its interval, where that has a width."""
    if value is None:
        return "-"
    text = _fixed(value, digits)
    if not limits or limits[0] == limits[1]:
        return text
    return f"{text} [{_fixed(limits[0], digits)}, {_fixed(limits[1], digits)}]"


def _fixed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no minus zero


def hours(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def count(value: float) -> str:
    """A large number in thousands or millions."""
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    return f"{value / 1e3:.0f}k" if value >= 1e4 else f"{value:.0f}"


def _to_target(result: Mapping[str, Any], name: str, summary: Summary) -> str:
    values = result["per_seed"].get(name)
    if values is None or summary["target"]["value"] is None:
        return "-"
    steps = result["per_seed"]["steps_to_target"]
    reached = sum(value is not None for value in steps)
    if reached == 0:
        return f"not in {result['last_step']}" if name == "steps_to_target" else "-"
    if reached < len(steps):
        return f"{reached} of {len(steps)} seeds"
    if result[name] is None:
        return "not recorded"
    form = {"steps_to_target": lambda value: f"{value:.0f}", "tokens_to_target": count}
    write = form.get(name, hours)
    limits = result["intervals"].get(name)
    if not limits or limits[0] == limits[1]:
        return write(result[name])
    return f"{write(result[name])} [{write(limits[0])}, {write(limits[1])}]"


def code(name: str) -> str:
    """A name as Markdown's code."""
    return f"`{name}`"
