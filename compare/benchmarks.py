"""Benchmarks with what scores them: questions, the answer's kind, the official metric.

The rows themselves lie below, in `environments.benchmarks`, because training asks them, too; this
is the place from which the comparison and the command line take them. The atlas is one of them.

    for question in iterate_questions(config): ...
    scores = score_official(trajectory, question)      {"official": 1.0, "strict": 1.0}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from environments.benchmarks.registry import (
    BENCHMARKS,
    BenchmarkError,
    Selection,
    count_questions,
    iterate_benchmark,
    load_benchmark,
    selection_of,
)
from rewards import infoseek, livevqa, mmsearch, mmsearch_r1, search_r1
from rewards.answer import exact_match, final_answer
from train.worlds import is_benchmark, load_eval_questions

if TYPE_CHECKING:
    from configs.schema import Config
    from train.trajectories import Trajectory

__all__ = [
    "BENCHMARKS", "BenchmarkError", "Selection", "count_questions", "describe_benchmark",
    "finish_official", "iterate_benchmark", "iterate_questions", "load_benchmark",
    "score_official",
]  # fmt: skip


def iterate_questions(config: Config) -> Iterator[dict[str, Any]]:
    """The questions of the evaluation that the settings describe, in a fixed order."""
    section = config.environment.eval_benchmark
    if is_benchmark(section):
        assert section is not None
        yield from iterate_benchmark(section.name, selection_of(section))
        return
    benchmark = BENCHMARKS["atlas"]
    for question in load_eval_questions(config):
        yield {**question, "benchmark": benchmark.name, "metric": benchmark.metric}


def describe_benchmark(config: Config) -> dict[str, str]:
    """Name and official metric of what the settings ask."""
    section = config.environment.eval_benchmark
    benchmark = BENCHMARKS[section.name if section else "atlas"]
    return {"name": benchmark.name, "metric": benchmark.metric}


def score_official(trajectory: Trajectory, question: dict[str, Any]) -> dict[str, float | None]:
    """One episode by the benchmark's official rule and by its strict twin.

    Returns:
        {"official": score, "strict": score}; an episode without an answer scores 0.
    """
    metric, answers = question.get("metric", "exact_match"), question["answers"]
    prediction = final_answer(trajectory)
    strict: float | None = float(exact_match(prediction, answers))
    official: float | None = strict
    if metric == "mmsearch_r1":
        official = mmsearch_r1.official_of_trajectory(trajectory, answers)
        strict = mmsearch_r1.strict_reward(trajectory, answers)
    elif metric == "search_r1":
        official = search_r1.em_reward(search_r1.scored_text(trajectory), answers)
        strict = search_r1.strict_em_reward(trajectory, answers)
    elif metric == "livevqa":
        official = strict = float(livevqa.grade(prediction, question) == "CORRECT")
    elif metric in ("infoseek", "mmsearch"):
        module = infoseek if metric == "infoseek" else mmsearch
        official = module.official_score(prediction, question) if prediction else 0.0
        strict = module.strict_score(prediction, question) if prediction else 0.0
    return {"official": official, "strict": strict}


def finish_official(metric: str, episodes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The official figure of a whole benchmark and its strict twin, from 0 to 1.

    Args:
        metric: its name.
        episodes: measured episodes with `official`, `strict` and `split`.

    Returns:
        `official` and `strict`; one is left out where it is not defined (InfoSeek's harmonic mean
        over two splits of which one is empty). Episodes that cannot be scored are left out.
    """
    figures = {}
    for name in ("official", "strict"):
        scored = [e for e in episodes if e[name] is not None]
        if metric == "infoseek":
            parts = [
                [float(e[name]) for e in scored if str(e["split"]).endswith(split)]
                for split in ("unseen_question", "unseen_entity")
            ]
            final = infoseek.official_final if name == "official" else infoseek.strict_final
            value = final(*parts) if all(parts) else None
            value = None if value is None else value / 100.0
        else:
            value = sum(e[name] for e in scored) / len(scored) if scored else None
        if value is not None:
            figures[name] = value
    return figures
