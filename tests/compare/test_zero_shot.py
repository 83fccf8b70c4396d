"""Measurements: finished ones are kept, and several processes find what one does."""

import json
import os
import shutil
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

from compare import zero_shot
from compare.errors import CompareError
from compare.zero_shot import Evaluator, Results, Task, measure_all
from configs.sections import Config, Environment, Live

RESULT = {"metrics": {"accuracy": 0.5}, "answers": ["a"], "has_labels": True}


@pytest.fixture
def asked(monkeypatch):
    """Names of the tasks that were measured, by a stand-in."""
    names = []

    def measure(self, task):
        names.append(task.name)
        return {**RESULT, "of": task.name}

    monkeypatch.setattr(Evaluator, "measure", measure)
    return names


def tasks_of(*names):
    return [Task(name, f"key-{name}", Config("out")) for name in names]


def never_merge(config, output):
    raise AssertionError("nothing is to be merged here")


def test_a_second_run_measures_only_what_is_missing(asked, tmp_path):
    path = tmp_path / "runs" / "finished.jsonl"
    measure_all(tasks_of("a", "b"), Results(path), never_merge)
    results = measure_all(tasks_of("b", "c", "a"), Results(path), never_merge)
    assert asked == ["a", "b", "c"]
    assert [result["of"] for result in results] == ["b", "c", "a"]


def test_a_line_that_was_broken_off_is_measured_again(asked, tmp_path):
    path = tmp_path / "finished.jsonl"
    measure_all(tasks_of("a", "b"), Results(path), never_merge)
    path.write_text(path.read_text()[:-10])
    measure_all(tasks_of("a", "b"), Results(path), never_merge)
    assert asked == ["a", "b", "b"]
    assert "key-a" in Results(path)
    assert "key-b" in Results(path)


def test_equal_tasks_are_measured_once(asked, tmp_path):
    first, second = tasks_of("a", "b")
    results = measure_all(
        [first, replace(second, key=first.key)], Results(tmp_path / "f"), never_merge
    )
    assert len(asked) == 1
    assert results[0] == results[1]


def test_every_task_is_kept_when_a_later_one_fails(asked, monkeypatch, tmp_path):
    measured = Evaluator.measure

    def fail_on_b(self, task):
        if task.name == "b":
            raise MemoryError
        return measured(self, task)

    monkeypatch.setattr(Evaluator, "measure", fail_on_b)
    with pytest.raises(MemoryError):
        measure_all(tasks_of("a", "b"), Results(tmp_path / "f"), never_merge)
    assert json.loads((tmp_path / "f").read_text())["name"] == "a"


class InlinePool:
    """Stands in for a pool of processes: runs a task when it is submitted, in this process."""

    def __init__(self, n_workers, context, initializer, initargs):
        assert context.get_start_method() == "spawn"
        self.n_workers = n_workers

    def submit(self, function, task):
        future = Future()
        try:
            future.set_result(function(task))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        assert cancel_futures


def test_shared_tasks_come_back_in_order_and_use_one_thread_each(asked, monkeypatch, tmp_path):
    seen = []

    def measure(self, task):
        seen.append((task.config.merge.threads, os.environ["OMP_NUM_THREADS"]))
        return {**RESULT, "of": task.name}

    monkeypatch.setattr(Evaluator, "measure", measure)
    monkeypatch.setattr(zero_shot, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(zero_shot, "_evaluator", Evaluator(never_merge), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    results = measure_all(tasks_of("b", "c", "a"), Results(tmp_path / "f"), never_merge, parallel=2)
    assert [result["of"] for result in results] == ["b", "c", "a"]
    assert seen == [(1, "1")] * 3
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_process_that_is_ended_from_outside_is_one_clear_error(asked, monkeypatch, tmp_path):
    def measure(self, task):
        if task.name == "b":
            raise BrokenProcessPool
        return RESULT

    monkeypatch.setattr(Evaluator, "measure", measure)
    monkeypatch.setattr(zero_shot, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(zero_shot, "_evaluator", Evaluator(never_merge), raising=False)
    with pytest.raises(CompareError, match="--parallel 1"):
        measure_all(tasks_of("a", "b"), Results(tmp_path / "f"), never_merge, parallel=2)


def test_a_merge_is_made_measured_and_removed(tmp_path):
    from train.tiny import make_tiny_checkpoints

    trio = make_tiny_checkpoints(tmp_path / "trio", seed=0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def copy(config, output):
        shutil.copytree(trio["vlm"], output)

    config = Config(
        "out",
        environment=Environment(eval_size=3, max_turns=2),
        grpo={"max_completion_length": 64, "generation_kwargs": {"max_new_tokens": 8}},
    )
    evaluator = Evaluator(copy, scratch)
    merged = evaluator.measure(Task("a", "a", config, recognition=True))
    assert merged == evaluator.measure(Task("b", "b", config, trio["vlm"], recognition=True))
    assert merged["metrics"]["n"] == 3
    # untrained: it names nothing
    assert merged["metrics"]["recognition"] == 0.0
    assert merged["answers"] == [None] * 3
    assert merged["has_labels"]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(("n_gpus", "devices"), [(0, [None] * 3), (2, ["cuda:0", "cuda:1"])])
def test_processes_that_share_tasks_have_a_gpu_each(asked, monkeypatch, tmp_path, n_gpus, devices):
    given = []

    class Pool(InlinePool):
        def __init__(self, n_workers, context, initializer, initargs):
            given.extend(initargs[-1].get() for _ in range(n_workers))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(zero_shot, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(zero_shot, "_evaluator", Evaluator(never_merge), raising=False)
    measure_all(tasks_of("a", "b", "c"), Results(tmp_path / "f"), never_merge, parallel=8)
    assert given == devices


def test_a_checkpoint_is_measured_on_the_gpu_and_freed_before_the_next(monkeypatch):
    seen = []

    def load(folder, device, *, bf16, max_pixels):
        seen.append((folder, device, bf16))
        return torch.nn.Identity(), None

    monkeypatch.setattr(zero_shot, "load_for_inference", load)
    monkeypatch.setattr(zero_shot, "load_environment", lambda config: None)
    monkeypatch.setattr(zero_shot, "load_eval_questions", lambda config: [])
    monkeypatch.setattr(zero_shot, "build_engine", lambda *_, environment: None)
    monkeypatch.setattr(zero_shot, "evaluate", lambda *_: ({}, []))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("freed"))
    evaluator = Evaluator(never_merge, device="cuda:1")
    evaluator.measure(Task("a", "a", Config("out"), "a"))
    evaluator.measure(Task("b", "b", Config("out", grpo={"bf16": False}), "b"))
    assert seen == [("a", "cuda:1", True), "freed", ("b", "cuda:1", False), "freed"]


def test_worlds_that_differ_in_their_tools_are_loaded_apart(monkeypatch):
    loaded = []

    def load(config):
        loaded.append(config)
        return len(loaded)

    monkeypatch.setattr(
        zero_shot, "load_for_inference", lambda *_, **__: (torch.nn.Identity(), None)
    )
    monkeypatch.setattr(zero_shot, "load_environment", load)
    monkeypatch.setattr(zero_shot, "load_eval_questions", lambda config: [])
    monkeypatch.setattr(zero_shot, "build_engine", lambda *_, environment: environment)
    monkeypatch.setattr(zero_shot, "evaluate", lambda engine, _: ({"world": engine}, []))
    evaluator = Evaluator(never_merge)

    def world(country="us", **keys):
        config = Config("out", environment=Environment(**keys), live=Live(country=country))
        return evaluator.measure(Task("x", "x", config, "start"))["metrics"]["world"]

    own = world()
    assert world(data_seed=1, eval_size=3, strength=0.0, kinds=["image"]) == own
    others = {
        world(retrieval="http://localhost:1"),
        world(text_provider="serper"),
        world(text_provider="serper", country="de"),
        world(page_reader="jina"),
        world(cache="kept"),
        world(cache="kept", cache_mode="offline"),
        world(news="older"),
        world(eval_domain="maps"),
    }
    assert len(others - {own}) == 8
