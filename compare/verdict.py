"""The verdict: two to six plain sentences, computed from the numbers, that may say that the method
does not win.

One arm (`reference`, OBM in this project) is held against every other. It is above another arm
where the paired difference's 95 % interval lies above zero; in summaries without pairs, where the
two intervals do not overlap. Nothing is separated from an arm with one seed, and the verdict says
so; nor where all seeds give the same number because they asked an untrained start the same
questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compare.measures import HEIGHTS, height_name

Label = Callable[[str], str]
ROUNDING = 1e-9
"""Differences of shares below this are rounding errors."""
MANY = 5
"""A headline names so many arms at most."""
ABOVE, BELOW, OPEN, UNKNOWN = "above", "below", "not separated from", "unknown"
"""Where the reference lies; unknown: one seed, or no number."""


@dataclass(frozen=True)
class Verdict:
    """What stands on top of a page.

    Attributes:
        tone: good (above all others), bad (below one), open (not separated from one, or one that
            cannot be judged).
        headline: the short form.
        sentences: what it rests on.
        tiles: (number, words) pairs to look at first.
    """

    tone: str
    headline: str
    sentences: Sequence[str]
    tiles: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Standing:
    """The other arms by where the reference lies, in one measure."""

    above: list[str]
    below: list[str]
    open: list[str]
    unknown: list[str]

    @property
    def is_known(self) -> bool:
        """Whether any arm can be judged."""
        return bool(self.above or self.below or self.open)

    def words(self, label: Label) -> str:
        """For example `above plain VLM; not separated from TIES and DARE`."""
        groups = {
            ABOVE: self.above,
            BELOW: self.below,
            OPEN: self.open,
            "not judged against the one seed of": self.unknown,
        }
        parts = [f"{side} {listed(arms, label)}" for side, arms in groups.items() if arms]
        return "; ".join(parts)


def comparison_verdict(
    summary: Mapping[str, Any], label: Label, reference: str | None = None
) -> Verdict | None:
    """The verdict on a comparison of runs.

    Args:
        summary: content of the report's json file.
        label: how an arm is written.
        reference: the arm to judge; see `reference_of`.

    Returns:
        None where there is no other arm.
    """
    arms = summary["arms"]
    reference = reference or reference_of(summary)
    is_trained = bool(arms[reference].get("is_trained", True))
    measure = "ceiling" if is_trained else "floor.accuracy"
    others = [arm for arm in arms if arm != reference and _mean(arms[arm], measure) is not None]
    if not others:
        return None
    standing = stand(summary, reference, others, measure)
    when = "after training" if is_trained else "before any training"
    tone, headline = _headline(standing, label, reference, when)
    sentences = [_floor_sentence(summary, reference, label)]
    if is_trained:
        sentences.append(_ceiling_sentence(summary, reference, others, label))
        how = "differences within a seed" if summary.get("pairs") else "overlap of the intervals"
        if standing.is_known:
            sentences.append(
                f"By {how}, after training {label(reference)} is {standing.words(label)}."
            )
        sentences += _cost_sentence(summary, reference, label)
        sentences += _speed_sentence(summary, reference, others, label)
    sentences.append(_caveat([len(arms[arm]["seeds"]) for arm in (reference, *others)], standing))
    return Verdict(tone, headline, sentences, _tiles(summary, reference, others, label))


MEASURES = {
    "floor": "before training",
    "ceiling": "ceiling",
    "at_equal_budget": "at an equal budget",
    "recognition.after": "recognition after training",
    "recognition.change": "recognition lost or won by training",
}
"""Differences that an arm's own verdict names -> in words."""


def each_against(summary: Mapping[str, Any], label: Label) -> dict[str, str]:
    """A sentence on every trained arm: what is better or worse than the reference, and by how much.

    Args:
        summary: of a comparison.
        label: how an arm is written.

    Returns:
        Arm as it is written -> sentence; arms without a pair are left out.
    """
    reference = reference_of(summary)
    pairs = {
        (pair["arm"], pair["metric"]): pair
        for pair in summary.get("pairs") or ()
        if pair["other"] == reference
    }
    found = {}
    for arm, result in summary["arms"].items():
        own = {name: pairs[arm, name] for name in MEASURES if (arm, name) in pairs}
        if own and result.get("is_trained", True):
            found[label(arm)] = _against(own)
    return found


def _against(own: Mapping[str, Mapping[str, Any]]) -> str:
    """For example `is better: ceiling +0.03 [0.01, 0.05]; not separated: before training -0.01`."""
    groups: dict[str, list[str]] = {ABOVE: [], BELOW: [], OPEN: [], UNKNOWN: []}
    for name, pair in own.items():
        low, high = pair["low"], pair["high"]
        limits = "" if low is None else f" [{signed(low)}, {signed(high)}]"
        side = side_of_difference(pair, same_questions=is_floor(name))
        groups[side].append(f"{MEASURES[name]} {signed(pair['mean'])}{limits}")
    words = {
        ABOVE: "better",
        BELOW: "worse",
        OPEN: "not separated",
        UNKNOWN: "measured once, no interval",
    }
    return "; ".join(f"{words[s]}: {', '.join(texts)}" for s, texts in groups.items() if texts)


def signed(value: float, digits: int = 2) -> str:
    """With its sign; nothing that rounds to zero is below it."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def floor_verdict(record: Mapping[str, Any], label: Label) -> Verdict | None:
    """The verdict on starts that were measured before any training.

    Args:
        record: content of a floor study's json file.
        label: how an arm is written.
    """
    reference, arms = record["reference"], record["arms"]
    sides = {
        arm: side_of_difference(columns["accuracy"])
        for arm, columns in record["differences"].items()
        if "accuracy" in columns
    }
    if not sides:
        return None
    standing = _standing(sides)
    tone, headline = _headline(standing, label, reference, "before any training")

    def text(arm: str, column: str = "accuracy") -> str:
        estimate = arms[arm]["parts"][column]
        return number_text(estimate["mean"], (estimate["low"], estimate["high"]))

    best = max(sides, key=lambda arm: arms[arm]["parts"]["accuracy"]["mean"])
    sentences = [
        f"Before any training {label(reference)} answers {text(reference)} of the questions right; "
        f"the best other start is {label(best)} with {text(best)}.",
    ]
    if standing.is_known:
        sentences.append(
            f"By differences within a seed, {label(reference)} is {standing.words(label)}."
        )
    sentences.append(_caveat([len(record["seeds"])], standing))
    tiles = [
        (f"{arms[reference]['parts'][column]['mean']:.2f}", f"{label(reference)}: {words}")
        for column, words in (
            ("searched", "searches at all"), ("entity", "asks for the right entity"),
            ("passage", "finds a gold passage"), ("accuracy", "answers right"),
        )
        if column in arms[reference]["parts"]
    ]  # fmt: skip
    return Verdict(tone, headline, sentences, tiles)


def reference_of(summary: Mapping[str, Any]) -> str:
    """The arm that others are held against: the summary's, else `obm`, else the first."""
    arms = summary["arms"]
    named = summary.get("reference")
    return str(named if named in arms else "obm" if "obm" in arms else next(iter(arms)))


def stand(
    summary: Mapping[str, Any], reference: str, others: Sequence[str], measure: str
) -> Standing:
    """Where the reference lies among the others.

    Args:
        summary: of a comparison.
        reference: the arm to judge.
        others: the arms to hold it against.
        measure: `ceiling`, `floor.accuracy`, ...: a name in `intervals`.
    """
    return _standing({other: side_of(summary, reference, other, measure) for other in others})


def side_of(summary: Mapping[str, Any], reference: str, other: str, measure: str) -> str:
    """ABOVE, BELOW, OPEN or UNKNOWN; see the module."""
    names = {measure, measure.removesuffix(".accuracy")}
    for pair in summary.get("pairs") or ():
        if (pair["arm"], pair["other"]) == (reference, other) and pair["metric"] in names:
            return side_of_difference(pair, same_questions=is_floor(measure))
    own, theirs = (_limits(summary["arms"][arm], measure) for arm in (reference, other))
    if own is None or theirs is None:
        return UNKNOWN
    if is_floor(measure) and all(high - low <= ROUNDING for low, high in (own, theirs)):
        return OPEN
    if own[0] > theirs[1] + ROUNDING:
        return ABOVE
    return BELOW if own[1] < theirs[0] - ROUNDING else OPEN


def is_floor(measure: str) -> bool:
    """Whether a number of a comparison is of untrained starts, whom every seed asks the same."""
    return "floor" in measure.split(".")


def side_of_difference(estimate: Mapping[str, Any], *, same_questions: bool = False) -> str:
    """Where a difference lies: ABOVE 0, BELOW, OPEN or UNKNOWN.

    Args:
        estimate: with `low` and `high`.
        same_questions: every seed asked the same. Equal in all seeds, the difference then says
            nothing about other questions.
    """
    low, high = estimate.get("low"), estimate.get("high")
    if low is None or high is None:
        return UNKNOWN
    if same_questions and high - low <= ROUNDING:
        return OPEN
    if low > ROUNDING:
        return ABOVE
    return BELOW if high < -ROUNDING else OPEN


def listed(arms: Sequence[str], label: Label) -> str:
    """Names with commas and an `and`."""
    names = [label(arm) for arm in arms]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def number_text(mean: float | None, limits: Sequence[float | None] | None) -> str:
    """For example `0.39 [0.31, 0.45]`."""
    if mean is None:
        return "no number"
    if not limits or limits[0] is None or limits[1] is None or limits[0] == limits[1]:
        return f"{mean:.2f}"
    return f"{mean:.2f} [{limits[0]:.2f}, {limits[1]:.2f}]"


def _standing(sides: Mapping[str, str]) -> Standing:
    groups = (ABOVE, BELOW, OPEN, UNKNOWN)
    return Standing(*([arm for arm, side in sides.items() if side == group] for group in groups))


def _headline(standing: Standing, label: Label, reference: str, when: str) -> tuple[str, str]:
    name = label(reference)
    if not standing.is_known:
        return "open", f"One seed: nothing here separates {name} from the other starts."
    if standing.below:
        return "bad", f"{name} does not win: {when} it lies below {_some(standing.below, label)}."
    if not standing.open and not standing.unknown:
        return "good", f"{name} is ahead of every other start {when}."
    if not standing.open:
        return "open", f"{name} is ahead of {_some(standing.above, label)} {when}."
    if not standing.above:
        rest = _some(standing.open, label) if standing.unknown else "any other start"
        return "open", f"{name} is not separated from {rest} {when}."
    return (
        "open",
        f"{name} is ahead of {_some(standing.above, label)} {when}, but not separated from "
        f"{_some(standing.open, label)}.",
    )


def _some(arms: Sequence[str], label: Label) -> str:
    """Names, or their number where there are many; a sentence below has all."""
    return listed(arms, label) if len(arms) <= MANY else f"{len(arms)} other starts"


def _floor_sentence(summary: Mapping[str, Any], reference: str, label: Label) -> str:
    arms, target = summary["arms"], summary["target"]["arm"]

    def text(arm: str) -> str:
        return number_text(_mean(arms[arm], "floor.accuracy"), _limits(arms[arm], "floor.accuracy"))

    others = [a for a in arms if a != reference and _mean(arms[a], "floor.accuracy") is not None]
    sentence = f"Before any training {label(reference)} answers {text(reference)} of the questions"
    if target in others:
        sentence += f", {label(target)} {text(target)}"
    rivals = [arm for arm in others if arm != target]
    if rivals:
        best = max(rivals, key=lambda arm: _mean(arms[arm], "floor.accuracy") or 0.0)
        sentence += f"; the best other start is {label(best)} with {text(best)}"
    return sentence + "."


def _ceiling_sentence(
    summary: Mapping[str, Any], reference: str, others: Sequence[str], label: Label
) -> str:
    arms = summary["arms"]

    def text(arm: str) -> str:
        return number_text(_mean(arms[arm], "ceiling"), _limits(arms[arm], "ceiling"))

    best = max(others, key=lambda arm: _mean(arms[arm], "ceiling") or 0.0)
    own, rival = _mean(arms[reference], "ceiling") or 0.0, _mean(arms[best], "ceiling") or 0.0
    start = (
        f"Within {arms[reference]['last_step']} steps {label(reference)} reaches a ceiling of "
        f"{text(reference)}"
    )
    if max(own, rival) <= ROUNDING:
        return f"{start}, and no other start reaches more."
    if rival > own + ROUNDING:
        return f"{start}; the highest mean is that of {label(best)}, {text(best)}."
    if own <= rival + ROUNDING:
        return f"{start}, the highest mean, and {label(best)} the same."
    return f"{start}, the highest mean; the next is {label(best)} with {text(best)}."


def _cost_sentence(summary: Mapping[str, Any], reference: str, label: Label) -> list[str]:
    arms, target = summary["arms"], summary["target"]
    if target["value"] is None and "ceiling" in target:
        height = f"{target['ceiling']:.3f}"
        return [f"The ceiling of {label(target['arm'])} is {height}: steps to it say nothing."]
    if target["value"] is None or (target["arm"] == reference and "ceiling" not in target):
        return []
    own = arms[reference]
    if target["value"] <= ROUNDING:  # in files of reports from before there were heights
        return [f"The ceiling of {label(target['arm'])} is 0: steps to it say nothing."]
    goal = target_words(summary, label)
    steps, seconds = own.get("steps_to_target"), own.get("device_s_to_target")
    if steps is None:
        reached = [s for s in own["per_seed"].get("steps_to_target", []) if s is not None]
        return [
            f"{label(reference)} reaches {goal} in {len(reached)} of {len(own['seeds'])} seeds."
        ]
    if steps == 0:
        return [f"{label(reference)} starts at or above {goal}."]
    sentence = f"{label(reference)} reaches {goal} after {steps:.0f} steps"
    theirs = (arms.get(target["arm"]) or {}).get("device_s_to_target")
    if seconds is not None:
        sentence += f" and {duration(seconds)} of device time, preparation included"
        if theirs is not None:
            sentence += f"; {label(target['arm'])} itself takes {duration(theirs)}"
    return [sentence + "."]


def target_words(summary: Mapping[str, Any], label: Label) -> str:
    """What the costs to the target ask for: `the ceiling of VLM (0.31)`, `an accuracy of 0.4`."""
    target = summary["target"]
    value, name = target["value"], label(target["arm"])
    if "ceiling" in target:
        if value is None:
            return f"the ceiling of {name} ({target['ceiling']:.3f}), which says nothing"
        return f"an accuracy of {value:.1f}"
    if value is None:
        return f"the ceiling of {name}, which has no training run here"
    return f"the ceiling of {name} ({value:.2f})"


def target_name(summary: Mapping[str, Any], label: Label) -> str:
    """The target in a table's head: `VLM's ceiling`, `0.4`."""
    target = summary["target"]
    if "ceiling" in target and target["value"] is not None:
        return f"{target['value']:.1f}"
    return f"{label(target['arm'])}'s ceiling"


def heights_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """The tenths that some run reaches: `0.4` -> name of the number of steps to it."""
    known = {name for arm in summary["arms"].values() for name in arm.get("per_seed") or ()}
    names = {f"{height:.1f}": height_name(height) for height in HEIGHTS}
    return {text: name for text, name in names.items() if name in known}


def _speed_sentence(
    summary: Mapping[str, Any], reference: str, others: Sequence[str], label: Label
) -> list[str]:
    """Who takes fewer steps to the highest tenth that all runs of the reference reach."""
    own = summary["arms"][reference]
    reached = {
        text: name for text, name in heights_of(summary).items() if own.get(name) is not None
    }
    if not reached:
        return []
    text, name = max(reached.items())
    pairs = {
        p["other"]: p for p in summary["pairs"] if (p["arm"], p["metric"]) == (reference, name)
    }
    groups: dict[str, list[str]] = {BELOW: [], ABOVE: [], OPEN: [], UNKNOWN: [], "": []}
    for other in others:
        steps = summary["arms"][other]["per_seed"].get(name) or [None]
        if other not in pairs or None in steps:
            groups[""].append(other)
        else:
            groups[side_of_difference(pairs[other])].append(other)
    words = {
        BELOW: "fewer than", ABOVE: "more than", OPEN: "not separated from",
        UNKNOWN: "not judged against the one seed of", "": "not reached by every run of",
    }  # fmt: skip
    parts = [f"{words[side]} {listed(arms, label)}" for side, arms in groups.items() if arms]
    return [f"{label(reference)} takes {own[name]:.0f} steps to {text}: {'; '.join(parts)}."]


def duration(seconds: float) -> str:
    """Device time in words, for example `2.5 device-hours`."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} device-hours"
    return (
        f"{seconds / 60:.0f} device-minutes" if seconds >= 120 else f"{seconds:.0f} device-seconds"
    )


def seeds_text(counts: Sequence[int]) -> str:
    """For example `5 seeds`, or `1 to 5 seeds` where arms have different numbers."""
    ends = " to ".join(dict.fromkeys(map(str, (min(counts), max(counts)))))
    return f"{ends} seed{'s' if max(counts) > 1 else ''}"


def _caveat(n_seeds: Sequence[int], standing: Standing) -> str:
    if not standing.is_known:
        return "One seed has no interval: repeat with more before believing any order."
    text = f"{seeds_text(n_seeds)} an arm"
    if standing.open:
        text += "; not separated does not mean equal"
    return text + ". Nothing is corrected for the number of comparisons."


def _tiles(
    summary: Mapping[str, Any], reference: str, others: Sequence[str], label: Label
) -> list[tuple[str, str]]:
    arms, own = summary["arms"], summary["arms"][reference]
    name, tiles = label(reference), []
    for measure, words in (
        ("floor.searched", "searches before any training"),
        ("floor.accuracy", "answers right before any training"),
        ("ceiling", "ceiling after training"),
    ):
        value = _mean(own, measure)
        known = {arm: found for arm in others if (found := _mean(arms[arm], measure)) is not None}
        if value is None:
            continue
        best = max(known, key=lambda arm: known[arm], default=None)
        beside = f"; best other: {label(best)} {known[best]:.2f}" if best is not None else ""
        tiles.append((f"{value:.2f}", f"{name}: {words}{beside}"))
    target = summary["target"]
    steps = own.get("steps_to_target")
    is_goal = target["value"] is not None and target["value"] > ROUNDING
    if steps is not None and is_goal and target["arm"] != reference:
        tiles.append((f"{steps:.0f}", f"steps to {target_words(summary, label)}"))
    return tiles


def _mean(arm: Mapping[str, Any], measure: str) -> float | None:
    if measure.startswith("floor."):
        value = arm["floor"].get(measure.removeprefix("floor."))
    else:
        value = arm.get(measure)
    return None if value is None else float(value)


def _limits(arm: Mapping[str, Any], measure: str) -> Sequence[float] | None:
    found: Sequence[float] | None = (arm.get("intervals") or {}).get(measure)
    return found
