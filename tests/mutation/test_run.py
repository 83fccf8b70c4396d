"""The runner: a module is replaced in a fork alone, and a mutant dies by a test or by its time."""

import importlib
import json
import sys
import time
from dataclasses import replace

import pytest

from tests.mutation import run
from tests.mutation.children import in_child
from tests.mutation.report import counts, write_report
from tests.mutation.rewrite import sites
from tests.mutation.targets import EQUIVALENT, TARGETS, Target

MODULE = """
def double(x):
    return x + x

def countdown(n):
    while n > 0:
        n = n - 1
    return n
"""
TESTS = """
from mutation_example import countdown, double

def test_double():
    assert double(0) == 0

def test_countdown():
    assert countdown(3) == 0
"""


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A module and its tests, which leave a hole: 0 + 0 is 0 - 0."""
    (tmp_path / "mutation_example.py").write_text(MODULE)
    (tmp_path / "test_example.py").write_text(TESTS)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "JOURNAL", tmp_path / "journal.jsonl")
    monkeypatch.setattr(run, "GRACE_S", 1.0)
    monkeypatch.setattr(run, "EQUIVALENT", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Target(
        "example", ("mutation_example:double", "mutation_example:countdown"), ("test_example.py",)
    )


def test_every_target_is_there_and_none_is_compiled():
    for target in TARGETS:
        assert run.mutants_of(target, n=1), target.topic
        for function in target.functions:
            source = run.source_of(function.partition(":")[0]).read_text()
            assert "njit" not in source or target.environment.get("NUMBA_DISABLE_JIT") == "1"
        for name in target.tests:
            assert not name.endswith(".py") or (run.ROOT / name).is_file(), name
    assert len({function for target in TARGETS for function in target.functions}) >= 20


def test_explanations_fit_mutants_that_there_are(monkeypatch):
    assert run.stale_explanations() == []
    monkeypatch.setitem(EQUIVALENT, ("train.credit:overlong_penalty", "a -> b"), "no reason")
    assert run.stale_explanations() == ["train.credit:overlong_penalty: a -> b"]
    assert run.main(["--list"]) == 2


@pytest.mark.slow
def test_a_hole_is_found_and_what_a_test_notices_is_killed(example, monkeypatch):
    monkeypatch.setattr(run, "TARGETS", (example,))
    assert run.main([]) == 1
    verdicts = [json.loads(line) for line in run.JOURNAL.read_text().splitlines()]
    found = {verdict["change"]: verdict["outcome"] for verdict in verdicts}
    assert found["x + x -> x - x"] == "survived"
    assert found["n > 0 -> n >= 0"] == "killed"  # to -1
    assert found["n - 1 -> n + 1"] == "killed"  # by its time: it would go on for ever
    by = {verdict["change"]: verdict["by"] for verdict in verdicts}
    assert by["n > 0 -> n >= 0"] == "test_example.py::test_countdown"
    assert by["n - 1 -> n + 1"] == "its tests took too long"
    assert "mutation_example" not in sys.modules
    # once more: what is killed is known, what survived is tried again, and may be explained
    monkeypatch.setitem(run.EQUIVALENT, ("mutation_example:double", "x + x -> x - x"), "because")
    assert run.main([]) == 0
    again = [json.loads(line) for line in run.JOURNAL.read_text().splitlines()][len(verdicts) :]
    assert [(v["change"], v["outcome"]) for v in again] == [("x + x -> x - x", "explained")]
    # a change of the tests makes all of it unknown
    keys = {run.key_of(example, f, site) for f, site in run.mutants_of(example)}
    (run.ROOT / "test_example.py").write_text(TESTS + "\n# another line\n")
    assert not keys & {run.key_of(example, f, site) for f, site in run.mutants_of(example)}


def test_tests_that_fail_without_a_mutant_are_an_error(example):
    (run.ROOT / "test_example.py").write_text("def test_nothing():\n    assert False\n")
    with pytest.raises(SystemExit, match="the tests fail without a mutant"):
        run.check_target(example, None, {}, print)


DYING = """
import os
from mutation_example import double

def test_double():
    if double(1) != 2:
        print("short of memory", flush=True)
        os.kill(os.getpid(), 9)
"""


def test_a_process_that_dies_before_its_time_is_up_is_an_error(example):
    (run.ROOT / "test_example.py").write_text(DYING)
    site = next(s for s in sites(MODULE, "double") if s.kind == "operator")
    with pytest.raises(SystemExit, match=r"double: x \+ x -> x - x: its process died"):
        run._check_mutant(example, "mutation_example:double", site, "key", 60.0)


def test_a_verdict_is_no_longer_known_when_a_helper_or_a_variable_changes(example):
    site = next(s for s in sites(MODULE, "double") if s.kind == "operator")
    (run.ROOT / "tests/parts").mkdir(parents=True)
    helper, deeper = run.ROOT / "tests/parts/helper.py", run.ROOT / "tests/parts/deeper.py"
    (run.ROOT / "test_example.py").write_text(f"from tests.parts import helper\n{TESTS}")
    keys = []
    for helper_text, deeper_text, variables in (
        ("from tests.parts.deeper import ONE", "ONE = 1", {}),
        ("from tests.parts.deeper import ONE as TWO", "ONE = 1", {}),
        ("from tests.parts.deeper import ONE as TWO", "ONE = 2", {}),
        ("from tests.parts.deeper import ONE as TWO", "ONE = 2", {"NUMBA_DISABLE_JIT": "1"}),
    ):
        helper.write_text(helper_text)
        deeper.write_text(deeper_text)
        target = replace(example, environment=variables)
        keys += [run.key_of(target, "mutation_example:double", site)]
    assert len(set(keys)) == 4
    assert run.key_of(target, "mutation_example:double", site) == keys[-1]


def test_a_mutant_is_imported_in_its_fork_alone(example):
    site = next(s for s in sites(MODULE, "double") if s.kind == "operator")

    def import_it():
        run.install("mutation_example:double", site)
        return importlib.import_module("mutation_example").double(5)

    assert in_child(import_it).value == 0
    assert "mutation_example" not in sys.modules
    assert not (run.ROOT / "__pycache__").exists()


def test_a_child_answers_prints_fails_and_is_stopped():
    answer = in_child(lambda: print("seen") or [1, "two"])
    assert (answer.value, answer.printed, answer.is_out_of_time) == ([1, "two"], "seen\n", False)
    failed = in_child(lambda: 1 / 0)
    assert failed.value is None
    assert "ZeroDivisionError" in failed.printed

    def compute():
        while True:
            pass

    start = time.process_time()
    stopped = in_child(compute, limit_s=0.5)
    assert stopped.is_out_of_time
    assert stopped.value is None
    assert stopped.cpu_s >= 0.9
    assert time.process_time() - start < 0.5  # the waiting costs nothing


def test_the_report_names_what_survived_and_why_others_do(tmp_path):
    common = ("topic a", "m:f", 3, "operator")
    verdicts = [
        run.Verdict(*common, "a + b -> a - b", "killed", "tests/x.py::test_y", 1.5, "k1"),
        run.Verdict(*common, "a < b -> a <= b", "explained", "a is never b", 1.0, "k2"),
        run.Verdict(*common, "c + 1 -> c + 2", "survived", "", 0.5, "k3"),
    ]
    assert counts(verdicts) == {"killed": 1, "explained": 1, "survived": 1}
    write_report(tmp_path, verdicts)
    page = (tmp_path / "mutation.md").read_text()
    assert "1 functions, 3 mutants drawn by seed: 1 killed, 1 that no test" in page
    assert "| topic a | `m.f` | 3 | 1 | 1 | 1 |" in page
    assert "## Survived\n\n* `m:f`: `c + 1` → `c + 2`\n" in page
    assert "* `m:f`: `a < b` → `a <= b`: a is never b" in page
    record = json.loads((tmp_path / "mutation.json").read_text())
    assert record["cpu_s"] == 3.0
    assert [mutant["outcome"] for mutant in record["mutants"]] == [
        "killed",
        "explained",
        "survived",
    ]
