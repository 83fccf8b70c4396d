"""Mutation check: a small error in each important number has to make a test fail.

    make mutation                                  (a quarter of an hour; writes docs/results)
    python tests/mutation/run.py --only credit     topics or functions with this in their name
    python tests/mutation/run.py --list            what would be mutated

Every mutant is the module's own source with one node changed (`rewrite`). It is imported in the
place of the module by a process that is forked for it, so neither files nor other tests see it, and
torch is loaded once a topic. A mutant is killed when one of its tests fails, or when it computes
three times as long as all of them do without it; a process that dies otherwise ends the check. Ends
with code 1 when one survives that `targets` does not explain.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutation.children import in_child  # noqa: E402
from tests.mutation.rewrite import Site, choose, mutate, sites  # noqa: E402
from tests.mutation.targets import EQUIVALENT, TARGETS, Target  # noqa: E402

SEED = "obm-warmstart"
PATIENCE, GRACE_S = 3.0, 5.0
"""A mutant may compute so many times as long as the tests alone, and so many seconds more."""
JOURNAL = ROOT / "runs" / "mutation" / "verdicts.jsonl"
"""A run that was stopped goes on from here; what was killed once is not tried again."""


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    topic: str
    function: str
    line: int
    kind: str
    change: str
    outcome: str
    """killed, explained, survived."""
    by: str
    """The test that failed, or the reason why none can."""
    cpu_s: float
    key: str
    """See `key_of`."""


# ---------------------------------------------------------------- what is mutated


def source_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def mutants_of(target: Target, n: int | None = None) -> list[tuple[str, Site]]:
    """(`module:name`, site) of every mutant of a topic.

    Args:
        target: The topic.
        n: At most so many a function, in the place of the target's own number.
    """
    drawn = []
    for function in target.functions:
        module, _, name = function.partition(":")
        found = sites(source_of(module).read_text(encoding="utf-8"), name)
        limit = target.n_mutants if n is None else n
        drawn += [(function, site) for site in choose(found, limit, f"{SEED}/{function}")]
    return drawn


def stale_explanations() -> list[str]:
    """Entries of `EQUIVALENT` that name no possible mutant any more."""
    possible: dict[str, set[str]] = {}
    for function in {function for function, _ in EQUIVALENT}:
        module, _, name = function.partition(":")
        found = sites(source_of(module).read_text(encoding="utf-8"), name)
        possible[function] = {site.change for site in found}
    return [
        f"{function}: {change}"
        for function, change in EQUIVALENT
        if change not in possible.get(function, ())
    ]


# ---------------------------------------------------------------- one mutant


class MutatedLoader(SourceFileLoader):
    """Loads a module from code in memory; writes no byte code."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        super().__init__(name, str(path))
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code


class MutatedFinder(importlib.abc.MetaPathFinder):
    """Finds one module, mutated."""

    def __init__(self, loader: MutatedLoader) -> None:
        self.loader = loader

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.loader.name:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self.loader.path, loader=self.loader
        )


def install(function: str, site: Site) -> None:
    """From here on this process imports the function's module with the error in it."""
    module = function.partition(":")[0]
    path = source_of(module)
    tree = mutate(path.read_text(encoding="utf-8"), site)
    loader = MutatedLoader(module, path, compile(tree, str(path), "exec"))
    assert module not in sys.modules, f"{module} is imported already"
    sys.meta_path.insert(0, MutatedFinder(loader))


class FirstFailure:
    """A plugin of pytest: remembers which test failed first."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid} (does not import)"


def run_tests(tests: Sequence[str]) -> tuple[int, str]:
    """Runs pytest in this process; returns its code and the test that failed first."""
    import pytest
    from hypothesis import settings

    # equal examples every time, and none that a mutant fails is kept for later
    settings.register_profile("mutation", derandomize=True, database=None)
    settings.load_profile("mutation")
    failure = FirstFailure()
    # without the plugin that collects garbage, twice a run, to find what raised in a destructor
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    options += ["-o", "timeout=0"]  # the clock on the wall says nothing on a busy machine
    code = pytest.main([*options, *tests], plugins=[failure])
    return int(code), failure.name


# ---------------------------------------------------------------- one topic


def check_target(
    target: Target, n: int | None, known: Mapping[str, Verdict], say: Callable[[Verdict], None]
) -> float:
    """Runs the topic's tests alone, then once for each mutant that is not known yet.

    Args:
        target: The topic.
        n: At most so many mutants a function, in the place of the target's own number.
        known: `key_of` a mutant -> what became of it when the same was tried before.
        say: Takes every verdict.

    Returns:
        Seconds of the processor that the tests take without a mutant; 0 where nothing was to do.

    Raises:
        SystemExit: The tests fail without a mutant.
    """
    todo = []
    for function, site in mutants_of(target, n):
        key = key_of(target, function, site)
        if key in known:
            say(known[key])
        else:
            todo.append((function, site, key))
    if not todo:
        return 0.0
    os.environ.update(target.environment)

    def alone() -> tuple[int, str, list[str]]:
        code, name = run_tests(target.tests)
        return code, name, [name for name in sys.modules if _is_foreign(name)]

    first = in_child(alone)
    if first.value is None or first.value[0] != 0:
        raise SystemExit(f"error: {target.topic}: the tests fail without a mutant\n{first.printed}")
    for name in first.value[2]:
        _import_quietly(name)
    gc.collect()
    gc.freeze()
    alone_s = in_child(lambda: run_tests(target.tests)).cpu_s
    for function, site, key in todo:
        say(_check_mutant(target, function, site, key, PATIENCE * alone_s + GRACE_S))
    return alone_s


def _check_mutant(target: Target, function: str, site: Site, key: str, limit_s: float) -> Verdict:
    def mutated() -> tuple[int, str]:
        install(function, site)
        return run_tests(target.tests)

    answer = in_child(mutated, limit_s)
    if answer.value is None and not answer.is_out_of_time:
        raise SystemExit(f"error: {function}: {site.change}: its process died\n{answer.printed}")
    code, by = answer.value or (1, "its tests took too long")
    outcome = "killed"
    if code == 0:
        by = EQUIVALENT.get((function, site.change), "")
        outcome = "explained" if by else "survived"
    assert code in (0, 1, 2), f"pytest ended with code {code}\n{answer.printed}"
    return Verdict(
        target.topic, function, site.line, site.kind, site.change, outcome, by,
        round(answer.cpu_s, 2), key,
    )  # fmt: skip


def key_of(target: Target, function: str, site: Site) -> str:
    """Changes when the mutant, its module, its tests or the way they are chosen and run do."""
    chosen = (function, site.change, target.tests, sorted(target.environment.items()))
    digest = hashlib.sha256(repr(chosen).encode())
    module = source_of(function.partition(":")[0])
    for path in (module, *_test_files(target)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _test_files(target: Target) -> list[Path]:
    """The topic's tests, the conftest.py beside and above them, and what all these import."""
    tests = [ROOT / name for name in target.tests if name.endswith(".py")]
    todo = [*tests, *(folder / "conftest.py" for test in tests for folder in test.parents[:2])]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found and path.is_file():
            found.add(path)
            todo += map(source_of, _helpers(path.read_text(encoding="utf-8")))
    return sorted(found)


@cache
def _helpers(source: str) -> list[str]:
    """What a source may import from tests: `from a import b` can mean the module a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith("tests.")]


def _is_foreign(name: str) -> bool:
    """Whether a module is an installed package's: it may be loaded before the mutant is."""
    path = getattr(sys.modules[name], "__file__", None) or ""
    return "site-packages" in path


def _import_quietly(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception:
        return  # made by another module, which the tests will do again


# ---------------------------------------------------------------- all of them


def chosen_targets(only: str) -> Iterator[Target]:
    for target in TARGETS:
        if not only or only in target.topic or any(only in name for name in target.functions):
            yield target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="topics or functions with this in their name")
    parser.add_argument("--mutants", type=int, help="at most so many a function")
    parser.add_argument("--list", action="store_true", help="what would be mutated; runs nothing")
    parser.add_argument("--anew", action="store_true", help="try what was tried before, too")
    parser.add_argument("--output", type=Path, help="folder for mutation.json and mutation.md")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    stale = stale_explanations()
    if stale:
        where = "tests/mutation/targets.py"
        print(f"error: {where} explains mutants that there are not:", *stale, sep="\n  ")
        return 2
    targets = list(chosen_targets(options.only))
    if options.list:
        for target in targets:
            for function, site in mutants_of(target, options.mutants):
                print(f"{function}:{site.line}  {site.change}")
        return 0
    known = {} if options.anew else read_journal()
    verdicts: list[Verdict] = []
    for target in targets:
        verdicts += check_in_own_process(target, options.mutants, known)
    survivors = [verdict for verdict in verdicts if verdict.outcome == "survived"]
    cpu_s = sum(verdict.cpu_s for verdict in verdicts)
    print(f"{len(verdicts)} mutants, {len(survivors)} survived, {cpu_s:.0f} s of one core")
    for verdict in survivors:
        print(f"  {verdict.function}:{verdict.line}  {verdict.change}")
    # a part of the table is no report
    if options.output is not None and not (options.only or options.mutants):
        from tests.mutation.report import write_report

        write_report(options.output, verdicts)
    return 1 if survivors else 0


def read_journal() -> dict[str, Verdict]:
    """What became of mutants that were tried before; a torn last line is left out."""
    found = {}
    for line in JOURNAL.read_text(encoding="utf-8").splitlines() if JOURNAL.exists() else ():
        try:
            verdict = Verdict(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if verdict.outcome == "killed":  # the others may be explained, or killed, by now
            found[verdict.key] = verdict
    return found


def check_in_own_process(
    target: Target, n: int | None, known: Mapping[str, Verdict]
) -> list[Verdict]:
    """Checks a topic in a process of its own: its variables, and what it imports, stay there.

    Every verdict is printed and put into the journal as it comes.
    """
    screen = os.dup(1)
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)

    def check() -> list[dict[str, Any]]:
        verdicts = []

        def say(verdict: Verdict) -> None:
            verdicts.append(asdict(verdict))
            place = f"{verdict.function}:{verdict.line}"
            line = f"  {verdict.outcome:9} {verdict.cpu_s:5.1f} s  {place}  {verdict.change}\n"
            os.write(screen, line.encode())
            if verdict.key not in known:
                with JOURNAL.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(verdicts[-1]) + "\n")

        os.write(screen, f"{target.topic}\n".encode())
        alone_s = check_target(target, n, known, say)
        os.write(screen, f"  the tests alone: {alone_s:.1f} s\n".encode())
        return verdicts

    answer = in_child(check)
    os.close(screen)
    if answer.value is None:
        raise SystemExit(answer.printed)
    return [Verdict(**entry) for entry in answer.value]


if __name__ == "__main__":
    sys.exit(main())
