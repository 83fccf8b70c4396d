"""How fast answers are checked, on a million spellings of the atlas's answers; what tricks earn.

Every prediction is another text, so that no cache of normal forms helps; three of the eight
forms are right for an exact match.
"""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from environments.atlas.questions import KINDS, list_questions
from launch.bench_report import target_lines
from rewards.answer import Match, correctness, exact_match
from rewards.compose import score
from rewards.lunches import DEFAULT, QUESTION, SEARCH_R1, SETTINGS, TRICKS, earned
from rewards.metrics import METRICS
from rewards.quantities import read_quantities

EXACT_TARGET_S = 20.0
"""For a million exact matches; a training step of 512 episodes then spends 10 ms on them."""
LONG_TARGET_S = 5.0
LONG_CHARS = 100_000

Measurement = dict[str, Any]


def bench_rewards(n_answers: int) -> dict[str, Any]:
    """Measures; processor seconds of one core.

    Args:
        n_answers: predictions of the exact match; the dearer checks get a tenth.

    Returns:
        `targets` and `speeds` (name, n, seconds, microseconds each).
    """
    questions = [
        row for split in ("train", "dev", "test") for kind in KINDS
        for row in list_questions(split, kind)
    ]  # fmt: skip
    speeds = []

    def measure(name: str, n: int, check: Callable[[str, Any], Any]) -> float:
        pairs = list(itertools.islice(spellings(questions), n))
        start = time.process_time()
        for prediction, question in pairs:
            check(prediction, question)
        seconds = time.process_time() - start
        speeds.append(
            {"name": name, "n": n, "s": round(seconds, 3), "us": round(1e6 * seconds / n, 2)}
        )
        return seconds

    exact_s = measure("exact match", n_answers, lambda p, q: exact_match(p, q["answers"]))
    few = max(1, n_answers // 10)
    ways: tuple[Match, ...] = ("typed", "contains", "f1")
    for way in ways:
        measure(way, few, functools.partial(correctness, match=way))
    measure("score of an episode", few, lambda p, q: score(_episode(p), q, DEFAULT))
    for name, metric in METRICS.items():
        if metric.reads == "answer":
            measure(f"{name}, official", few, metric.official)
            measure(f"{name}, strict", few, metric.strict)
    n_wrong = sum(
        correctness(gold, question, "typed") != 1.0
        for question in questions
        for gold in question["answers"]
    )
    n_paid = sum(
        earned(trick, weights) > trick.fair + 1e-9
        for trick in TRICKS
        for weights in SETTINGS.values()
        if trick.fair < 1.0
    )
    targets = [
        _target(f"{n_answers} exact matches, s", round(exact_s, 2), EXACT_TARGET_S),
        _target(f"slowest reading of {LONG_CHARS} characters, s", _slowest(), LONG_TARGET_S),
        _target("gold answers of the atlas that do not score 1", n_wrong, 0),
        _target("tricks that earn more than they are worth", n_paid, 0),
    ]
    return {"targets": targets, "speeds": speeds}


def spellings(questions: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs of a prediction and its question, without end, no prediction twice."""
    rng = random.Random(0)
    for number in itertools.count():
        question = questions[number % len(questions)]
        gold = rng.choice(question["answers"])
        marks = f"{number:b}".translate({48: ".", 49: "!"})  # the number, as punctuation
        forms = (
            f"{gold}{marks}", f"The {gold.upper()} {number}", f"“{gold}”{marks}",
            f"{gold}, {number}", f" {gold.lower()} {marks}", f"{number} {gold}", f"{number:,} km",
            f"in {1000 + number % 1000}{marks}",
        )  # fmt: skip
        yield forms[number % len(forms)], question


def render_page(record: dict[str, Any]) -> str:
    """docs/results/bench-rewards.md from the content of bench-rewards.json."""
    lines = [
        "# Checking answers",
        "",
        "Processor seconds of one core. Predictions are spellings of the atlas's answers, all "
        "different, right and wrong; [rewards.md](../rewards.md) says what is checked.",
        "",
        "| check | answers | s | µs each |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {row['name']} | {row['n']:,} | {row['s']:.2f} | {row['us']:.1f} |"
            for row in record["speeds"]
        ),
        "",
        *target_lines(record["targets"]),
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}.",
    ]
    return "\n".join(lines) + "\n"


def _episode(prediction: str) -> dict[str, Any]:
    return {"turns": [SEARCH_R1.search("q"), SEARCH_R1.answer(prediction)]}


def _slowest() -> float:
    """Seconds for the text that takes longest: nothing but numbers, through every reader."""
    texts = ("1 " * (LONG_CHARS // 2), "<answer>" * (LONG_CHARS // 8), "é, " * (LONG_CHARS // 3))
    worst = 0.0
    for text in texts:
        start = time.process_time()
        read_quantities(text)
        correctness(text, QUESTION, "typed", LONG_CHARS)
        score(_episode(text), QUESTION, DEFAULT)
        worst = max(worst, time.process_time() - start)
    return round(worst, 2)


def _target(name: str, value: float, target: float) -> Measurement:
    return {"name": name, "value": value, "target": target, "met": value <= target}
