"""Benchmarks with what scores them: questions, the answer's kind, the official metrics.

The rows themselves lie below, in `environments.benchmarks`, because training asks them, too; this
is the place from which the comparison and the command line take them. The atlas is one of them.

    for question in iterate_questions(config): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from environments.benchmarks.registry import (
    BENCHMARKS,
    Benchmark,
    Selection,
    count_questions,
    iterate_benchmark,
    load_benchmark,
    selection_of,
)
from environments.benchmarks.rows import BenchmarkError
from rewards.metrics import METRICS, report
from train.worlds import is_benchmark, load_eval_questions

if TYPE_CHECKING:
    from configs.schema import Config

__all__ = [
    "BENCHMARKS", "BenchmarkError", "Selection", "benchmark_of", "count_questions",
    "iterate_benchmark", "iterate_questions", "load_benchmark", "official_figures", "scoring_part",
]  # fmt: skip

SCORING_KEYS = (
    "id", "question", "answers", "split", "answer_kind", "range", "unit", "question_type",
    "metrics",
)  # fmt: skip
"""What of a question its score depends on, besides the answer."""


def benchmark_of(config: Config) -> Benchmark:
    """The benchmark that the evaluation of these settings asks."""
    section = config.environment.eval_benchmark
    return BENCHMARKS[section.name if section else "atlas"]


def iterate_questions(config: Config) -> Iterator[dict[str, Any]]:
    """The questions of the evaluation that the settings describe, in a fixed order.

    Raises:
        BenchmarkError: names the first bad row.
    """
    section, benchmark = config.environment.eval_benchmark, benchmark_of(config)
    if section is not None and is_benchmark(section):
        yield from iterate_benchmark(section.name, selection_of(section))
        return
    for question in load_eval_questions(config):
        yield {**question, "benchmark": benchmark.name, "metrics": list(benchmark.metrics)}


def scoring_part(question: dict[str, Any]) -> dict[str, Any]:
    """What is kept beside an episode, so that it can be scored again without the benchmark."""
    return {key: question[key] for key in SCORING_KEYS if question.get(key) is not None}


def official_figures(
    episodes: Sequence[dict[str, Any]], questions: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """The official metrics and their strict twins over a whole benchmark.

    Args:
        episodes: lines of trajectories.jsonl.
        questions: of `scoring_part`, in the same order.

    Returns:
        `official/<metric>` and `strict/<metric>` from 0 to 1; what could not be scored is left out.
    """
    figures: dict[str, float] = {}
    for name in questions[0].get("metrics", ()):
        numbers = report(name, list(episodes), list(questions))
        scale = 100.0 if METRICS[name].percent else 1.0
        for kind in ("official", "strict"):
            value = numbers[kind]
            if value is not None:
                figures[f"{kind}/{name}"] = value / scale
    return figures
