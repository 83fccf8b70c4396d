"""Measures merged checkpoints without training: merge, roll out greedily, count.

A task is a checkpoint as it is, or a merge that is made in a scratch folder, and the questions it
is asked. Every finished task is a line in a file, under a key of all that decides its result, so a
run that was broken off goes on where it stopped. Several processes may share the tasks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from compare.errors import CompareError
from configs.schema import Config
from rewards.answer import final_answer
from rewards.normalize import contains_phrase, normalize_answer
from train.evaluation import evaluate
from train.gpu import give_back
from train.policy import load_for_inference
from train.settings import trains_in_bf16
from train.worlds import build_engine, load_environment, load_eval_questions, load_questions

MakeMerge = Callable[[Config, Path], Any]
"""Merges as the settings say into a folder. From a module's top level: it goes to the workers."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
OF_THE_QUESTIONS = (
    "kinds", "relations", "strength", "train_size", "eval_split", "eval_size", "eval_kinds",
    "data_seed", "train_benchmark", "eval_benchmark",
)  # fmt: skip
"""Keys of `environment` that choose questions and photos; every other one is of the world."""


@dataclass(frozen=True)
class Task:
    """One measurement."""

    name: str
    """for messages"""
    key: str
    """hash of all that decides the result"""
    config: Config
    """merge, environment and the engine's limits are used"""
    checkpoint: str | None = None
    """folder or hub id; None: the merge that the settings describe"""
    recognition: bool = False
    """also ask which place is pictured, in the VLM's own words"""


class Results:
    """Finished tasks in a file of JSON lines; a line that was broken off is ignored.

    Args:
        path: is made with the first result.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._found[entry["key"]] = entry["result"]
            if "seconds" in entry:
                self._seconds[entry["key"]] = entry["seconds"]

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._found[key]

    def seconds(self, tasks: Sequence[Task]) -> list[float]:
        """How long those of the tasks took that are finished and say it."""
        return [self._seconds[task.key] for task in tasks if task.key in self._seconds]

    def add(self, task: Task, result: dict[str, Any], seconds: float) -> None:
        """Keep the result of a task, and how long it took."""
        self._found[task.key], self._seconds[task.key] = result, round(seconds, 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"key": task.key, "name": task.name, "seconds": round(seconds, 1), "result": result}
        line = json.dumps(entry)
        with self._path.open("a", encoding="utf-8") as file:
            # what is before may be half a line
            file.write(("\n" if file.tell() else "") + line)


class Evaluator:
    """Measures tasks one after another; worlds and questions stay loaded, models do not.

    Args:
        merge: merges as settings say.
        scratch: folder for merges, which are removed when they are measured.
        device: where checkpoints run; None = the GPU of this process, if there is one.
    """

    def __init__(
        self, merge: MakeMerge, scratch: Path | None = None, device: str | None = None
    ) -> None:
        self._merge = merge
        self._scratch = scratch
        self._device = device
        self._environments: dict[str, Any] = {}
        self._questions: dict[str, list[dict[str, Any]]] = {}
        disable_progress_bar()

    def measure(self, task: Task) -> dict[str, Any]:
        """Merge if there is something to merge, and evaluate.

        Returns:
            {"metrics": those of `train.evaluation.summarize` and, where asked for, "recognition";
            "answers": normalised, one a question, None where there was none; "has_labels": whether
            the questions say what is right}.
        """
        try:
            if task.checkpoint is not None:
                return self._evaluate(task, task.checkpoint)
            with tempfile.TemporaryDirectory(prefix=".measure-", dir=self._scratch) as folder:
                merged = Path(folder) / "merged"
                self._merge(task.config, merged)
                return self._evaluate(task, str(merged))
        finally:
            give_back()

    def _evaluate(self, task: Task, folder: str) -> dict[str, Any]:
        config, section = task.config, task.config.environment
        model, processor = load_for_inference(
            folder,
            self._device,
            bf16=trains_in_bf16(config.grpo),
            max_pixels=config.models.max_pixels,
        )
        environment = _kept(self._environments, _world_settings(config), load_environment, config)
        questions = _kept(self._questions, section, load_eval_questions, config)
        engine = build_engine(config, model, processor, environment=environment)
        metrics, trajectories = evaluate(engine, questions)
        answers = [final_answer(item) for item in trajectories]
        if task.recognition:
            metrics["recognition"] = self._recognition(config, model, processor, environment)
        return {
            "metrics": metrics,
            "answers": [None if answer is None else normalize_answer(answer) for answer in answers],
            "has_labels": all(question["answers"] for question in questions),
        }

    def _recognition(self, config: Config, model: Any, processor: Any, environment: Any) -> float:
        """Share of photos of seen places whose name stands in the reply to "Which place is this?".

        Asked as the VLM was, without tools. The name counts wherever it stands: what a merge does
        to the form of an answer is seen elsewhere.
        """
        questions = _kept(
            self._questions,
            ("recognition", config.environment),
            lambda config: load_questions(
                config, config.environment.eval_split, ["image"], config.environment.eval_size
            ),
            config,
        )
        dialect = environment.dialect
        environment.dialect = dialect.without_tools()
        try:
            engine = build_engine(config, model, processor, environment=environment)
            _, trajectories = evaluate(engine, questions)
        finally:
            environment.dialect = dialect
        named = [
            any(contains_phrase(item.turns[0].text, name) for name in question["entity_names"])
            for item, question in zip(trajectories, questions, strict=True)
            if question["seen"]
        ]
        return sum(named) / len(named)


def measure_all(
    tasks: Sequence[Task],
    results: Results,
    merge: MakeMerge,
    *,
    parallel: int = 1,
    scratch: Path | None = None,
    report: Callable[[str, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure what is not among the results yet.

    Args:
        tasks: those with equal keys are measured once.
        results: finished ones; new ones are added.
        merge: merges as settings say.
        parallel: processes. With more than one, each uses one thread; on GPUs each has one of its
            own, and there are no more processes than GPUs. One where a vLLM server rolls out.
        scratch: folder for merges; the system's when None.
        report: takes name and result of each task as it is finished.

    Returns:
        Each task's result, in the tasks' order.

    Raises:
        CompareError: a process was ended from outside.
    """
    missing = {task.key: task for task in tasks if task.key not in results}
    for task, result, seconds in _run(list(missing.values()), merge, parallel, scratch):
        results.add(task, result, seconds)
        if report:
            report(task.name, result)
    return [results[task.key] for task in tasks]


def _run(
    tasks: Sequence[Task], merge: MakeMerge, parallel: int, scratch: Path | None
) -> Iterator[tuple[Task, dict[str, Any], float]]:
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if any(task.config.rollout.backend == "vllm" for task in tasks):
        parallel = 1  # a server has the weights of one policy
    n_workers = min(parallel, len(tasks), len(gpus) or parallel)
    if n_workers <= 1:
        evaluator = Evaluator(merge, scratch)
        for task in tasks:
            started = time.monotonic()
            result = evaluator.measure(task)
            yield task, result, time.monotonic() - started
        return
    context = multiprocessing.get_context("spawn")
    devices = context.SimpleQueue()  # each process takes one when it starts
    for number in range(n_workers):
        devices.put(gpus[number] if gpus else None)
    with _single_threads():
        pool = ProcessPoolExecutor(
            n_workers, context, initializer=_start_worker, initargs=(merge, scratch, devices)
        )
        try:
            futures = {pool.submit(_measure, task): task for task in tasks}
            for future in as_completed(futures):
                result, seconds = future.result()
                yield futures[future], result, seconds
        except BrokenProcessPool as error:
            raise CompareError(
                "a process was ended from outside, perhaps for want of memory; run the command "
                "again with --parallel 1: what is finished is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threads() -> Iterator[None]:
    """New processes see one thread: numerical libraries read this when they are imported."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


_evaluator: Evaluator
"""The one of this process, where it is a worker."""


def _start_worker(merge: MakeMerge, scratch: Path | None, devices: SimpleQueue[str | None]) -> None:
    global _evaluator
    # Ctrl-C is the parent's to handle; a parent that is killed must not leave workers behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _evaluator = Evaluator(merge, scratch, devices.get())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure(task: Task) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    merge = replace(task.config.merge, threads=1)
    result = _evaluator.measure(replace(task, config=replace(task.config, merge=merge)))
    return result, time.monotonic() - started


def _world_settings(config: Config) -> dict[str, Any]:
    """What decides on tools and indexes, not on the questions."""
    world = asdict(config.environment)
    kept = {key: value for key, value in world.items() if key not in OF_THE_QUESTIONS}
    return {**kept, "live": asdict(config.live)}


def _kept(store: dict[str, Any], key: Any, load: Callable[[Config], Any], config: Config) -> Any:
    name = repr(key)
    if name not in store:
        store[name] = load(config)
    return store[name]
