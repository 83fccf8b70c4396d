"""Held-out evaluation of a policy: the floor in four parts, searches, cost, with intervals.

    metrics, trajectories = evaluate(build_engine(config, model, processor), questions)

is one rollout. `run_evaluation` is for whole benchmarks: questions go in chunks of a fixed size,
each rolled out by itself and kept as a file, so that an evaluation that was killed goes on to the
same numbers, and several processes may share the chunks.

The counting of the four parts lies below, in `train.evaluation`, because training evaluates as it
goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compare.benchmarks import official_figures, scoring_part
from compare.errors import CompareError, OtherEvaluationError
from train.evaluation import (
    FOUR_PARTS,
    evaluate,
    measure,
    outcome,
    summarize,
    summarize_measured,
)
from train.files import write_json, write_text
from train.lock import LOCK_NAME, in_turn
from train.pictures import PictureFolder
from train.trajectories import Trajectory, Turn, gold_of

__all__ = [
    "FOUR_PARTS", "HEADLINES", "cost_aware_score", "evaluate", "measure_episode", "outcome",
    "run_evaluation", "some_questions", "summarize", "summarize_episodes",
]  # fmt: skip

HEADLINES = ("accuracy", "sr_img", "sr_txt", "sr_any", "calls", "cas")
"""Metrics that have intervals, in all and by group."""
CHUNKS, PLAN = "episodes", "plan.json"


class Asks(Protocol):
    """Rolls out episodes; `compare.modes.Asker` is one."""

    def ask(self, questions: Sequence[dict[str, Any]]) -> list[Trajectory]:
        """One episode a question, in their order."""
        ...


# ---------------------------------------------------------------- numbers


def cost_aware_score(accuracy: float, n_tokens: float, n_calls: float) -> float:
    """HyperEyes' CAS (arXiv 2605.07177): 100 Acc^2 / (N_tok + 2 N_tool + 1). Range [0, 100].

    Args:
        accuracy: share of right answers, 0 to 1.
        n_tokens: tokens that the policy wrote, mean per episode; thousands of them enter.
        n_calls: tool calls, mean per episode.
    """
    return 100.0 * accuracy**2 / (n_tokens / 1000.0 + 2.0 * n_calls + 1.0)


def measure_episode(trajectory: Trajectory, question: dict[str, Any]) -> dict[str, Any]:
    """`train.evaluation.measure`, the split, what is asked about, and the searches that a tool
    answered.

    A call that was refused or that came in the last turn is asked for (`n_text`, `n_image`), but
    not answered (`text_calls`, `image_calls`, `page_calls`). One whose service failed was answered
    by the failure: it was carried out, and cost what a call costs.
    """
    answered = [
        action["type"]
        for turn in trajectory.turns
        if turn.observation is not None
        for action, fault in zip(turn.actions, _faults(turn), strict=True)
        if fault != "model"
    ]
    return {
        **measure(trajectory, question),
        "split": question.get("split", "all"),
        "about": question.get("entity"),
        "text_calls": answered.count("search"),
        "image_calls": answered.count("image_search"),
        "page_calls": answered.count("visit"),
    }


def _faults(turn: Turn) -> list[str | None]:
    """The fault of each of a turn's actions."""
    return turn.call_faults or [turn.fault] * len(turn.actions)


def summarize_episodes(
    episodes: Sequence[dict[str, Any]], bootstrap: int = 2000, seed: int = 0
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics and 95 % intervals of measured episodes.

    Args:
        episodes: of `measure_episode`.
        bootstrap: resamples of the entities asked about, with all their questions: those of one are
            answered alike. A question that names no entity is one by itself. 0 makes no interval.
        seed: of the resampling.

    Returns:
        `summarize_measured`'s metrics and, in all and under `kind/<kind>/` and `split/<split>/`,
        the HEADLINES and `n`; and [low, high] by the name of each headline.
    """
    metrics = summarize_measured(episodes)
    intervals: dict[str, list[float]] = {}
    table = np.array([_columns(episode) for episode in episodes], dtype=np.float64)
    entities = _numbered(episodes)
    groups = {"": np.ones(len(episodes), dtype=bool)}
    for key in ("kind", "split"):
        values = np.array([str(episode[key]) for episode in episodes])
        groups |= {f"{key}/{value}/": values == value for value in sorted(set(values))}
    for prefix, members in groups.items():
        rows = table[members]
        metrics |= {prefix + name: value for name, value in _headlines(rows.mean(0)).items()}
        metrics[f"{prefix}n"] = float(len(rows))
        if bootstrap:
            bounds = _bootstrap(rows, entities[members], bootstrap, seed)
            intervals |= {prefix + name: value for name, value in bounds.items()}
    return metrics, intervals


def _columns(episode: dict[str, Any]) -> list[float]:
    n_image, n_text = episode["image_calls"], episode["text_calls"]
    return [
        float(episode["accuracy"]),
        float(n_image > 0),
        float(n_text > 0),
        float(n_image + n_text > 0),
        float(n_image + n_text + episode["page_calls"]),
        float(episode["n_tokens"]),
    ]


def _headlines(means: np.ndarray) -> dict[str, float]:
    accuracy, sr_img, sr_txt, sr_any, calls, n_tokens = (float(value) for value in means)
    cas = cost_aware_score(accuracy, n_tokens, calls)
    return dict(zip(HEADLINES, (accuracy, sr_img, sr_txt, sr_any, calls, cas), strict=True))


def _numbered(episodes: Sequence[dict[str, Any]]) -> np.ndarray:
    """int [N]: a number for each entity, and for each question without one."""
    keys = [
        ("question", i) if episode.get("about") is None else ("entity", episode["about"])
        for i, episode in enumerate(episodes)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def _bootstrap(
    rows: np.ndarray, entities: np.ndarray, n_resamples: int, seed: int
) -> dict[str, list[float]]:
    """Percentile intervals over resamples of the entities, by headline.

    Args:
        rows: float [N, columns] of `_columns`.
        entities: int [N]; rows of one number are drawn together.
        n_resamples: how many.
        seed: of the draws.
    """
    _, of_row = np.unique(entities, return_inverse=True)
    n = int(of_row.max()) + 1
    sizes = np.bincount(of_row, minlength=n)
    sums = np.zeros((n, rows.shape[1]))
    np.add.at(sums, of_row, rows)
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(n_resamples):
        drawn = generator.integers(0, n, n)
        draws.append(list(_headlines(sums[drawn].sum(0) / sizes[drawn].sum()).values()))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(HEADLINES)}


# ---------------------------------------------------------------- a whole benchmark


def run_evaluation(
    questions: Iterable[dict[str, Any]],
    make_asker: Callable[[], Asks],
    folder: Path,
    *,
    plan: dict[str, Any],
    header: dict[str, Any],
    batch: int = 128,
    shard: tuple[int, int] = (0, 1),
    bootstrap: int = 2000,
    picture_size: int = 0,
    seen: Callable[[int], object] = lambda n: None,
) -> dict[str, Any] | None:
    """Ask what is missing; once nothing is, write eval.json and trajectories.jsonl.

    Chunk c (questions c * batch to (c + 1) * batch) belongs to process c mod n. It is rolled out in
    one piece, always the same, because the composition of a batch can change the last bit of a
    logit.

    Args:
        questions: in a fixed order; may be a stream.
        make_asker: called at the beginning, or by one that goes on when there is something to ask.
        folder: of the evaluation.
        plan: plain data that decides the result; another one in the folder is refused.
        header: first part of eval.json; `arm` and `seed` go into every line.
        batch: questions of a chunk.
        shard: (this process, number of processes).
        bootstrap: resamples for intervals.
        picture_size: longest side of the copies in pictures/; 0 keeps none.
        seen: takes the number of questions after every chunk.

    Returns:
        The content of eval.json, or None if other processes still have chunks to do.

    Raises:
        OtherEvaluationError: the folder holds part of another evaluation.
        CompareError: it holds a whole one, or there is nothing to ask.
    """
    chunks, (number, n_shards) = folder / CHUNKS, shard
    plan = {**plan, "batch": batch}
    if (folder / "eval.json").exists():
        return _finished(folder, header, plan)
    questions = some_questions(questions)
    asker: Asks | None = None
    if not (chunks / PLAN).exists():
        asker = make_asker()  # a checkpoint that cannot be loaded leaves nothing behind
        chunks.mkdir(parents=True, exist_ok=True)
    with in_turn(folder / LOCK_NAME):  # of two that start together, one writes it
        _check_plan(chunks, plan)
    pictures = PictureFolder(folder, picture_size)
    n_chunks, scored = 0, []
    for index, chunk in enumerate(_chunked(questions, batch)):
        n_chunks += 1
        scored += [scoring_part(question) for question in chunk]
        path = _chunk_path(chunks, index)
        if index % n_shards == number and not path.exists():
            asker = asker or make_asker()
            trajectories = asker.ask(chunk)
            lines = [
                _line(trajectory, question, header)
                for trajectory, question in zip(trajectories, chunk, strict=True)
            ]
            for trajectory, line in zip(trajectories, lines, strict=True):
                pictures.add(trajectory, line)
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        seen(len(chunk))
    with in_turn(folder / LOCK_NAME):
        if (folder / "eval.json").exists():  # another process was the last one
            return _finished(folder, header, plan)
        if not all(_chunk_path(chunks, index).exists() for index in range(n_chunks)):
            return None
        return _finish(folder, n_chunks, scored, {**header, "plan": plan}, bootstrap)


def some_questions(questions: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The questions, of which the first has been read, before anything is loaded or written.

    Raises:
        CompareError: there is none.
    """
    stream = iter(questions)
    first = next(stream, None)
    if first is None:
        raise CompareError("the evaluation has no question; widen its selection")
    return chain([first], stream)


def _finished(folder: Path, header: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The result that is there, if it is of this evaluation."""
    record: dict[str, Any] = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    asked = json.loads(json.dumps({**header, "plan": plan}))
    before = {"plan": asked["plan"], **record}  # older ones were written without it
    keys = ("checkpoint", "mode", "query", "config", "plan")
    if any(before.get(key) != asked.get(key) for key in keys):
        raise CompareError(f"{folder} holds another evaluation; remove it or name another --output")
    return record


def _finish(
    folder: Path,
    n_chunks: int,
    scored: Sequence[dict[str, Any]],
    header: dict[str, Any],
    bootstrap: int,
) -> dict[str, Any]:
    texts = [
        _chunk_path(folder / CHUNKS, index).read_text(encoding="utf-8") for index in range(n_chunks)
    ]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    metrics, intervals = summarize_episodes([line["measured"] for line in lines], bootstrap)
    for line, part in zip(lines, scored, strict=True):
        line["question"] = part  # a chunk of an older version may lack what scores it by now
    metrics |= official_figures(lines, scored)
    record = {**header, "metrics": metrics, "intervals": intervals}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(folder / "trajectories.jsonl", text)
    # Last, since its presence says that the evaluation is complete.
    write_json(folder / "eval.json", record)
    shutil.rmtree(folder / CHUNKS)
    return record


def _line(
    trajectory: Trajectory, question: dict[str, Any], header: dict[str, Any]
) -> dict[str, Any]:
    plain = trajectory.to_dict(step=0, arm=header["arm"], seed=header["seed"], phase="eval")
    measured = measure_episode(trajectory, question)
    scored = {"measured": measured, "question": scoring_part(question)}
    return {**plain, "gold": gold_of(question), **scored}


def _check_plan(chunks: Path, plan: dict[str, Any]) -> None:
    path, plan = chunks / PLAN, json.loads(json.dumps(plan))
    if not path.exists():
        write_json(path, plan)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        key for key in sorted(plan.keys() | before.keys()) if plan.get(key) != before.get(key)
    ]
    if changed:
        raise OtherEvaluationError(
            f"{chunks.parent} holds part of an evaluation with another {', '.join(changed)}; go on "
            "with its own settings, pass --overwrite, or name another --output"
        )


def _chunk_path(chunks: Path, index: int) -> Path:
    return chunks / f"{index:06d}.jsonl"


def _chunked(questions: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    stream = iter(questions)
    while chunk := list(islice(stream, size)):
        yield chunk
