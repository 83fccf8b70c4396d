"""Mutation check: a small error in each important number has to make a test fail.

    make mutation                                  (a quarter of an hour; writes docs/results)
    python tests/mutation/run.py --only credit     topics or functions with this in their name
    python tests/mutation/run.py --list            what would be mutated

Every mutant is the module's own source with one node changed (`rewrite`). It is imported in the
place of the module by a process that is forked for it, so neither files nor other tests see it, and
torch is loaded once a topic. A mutant is killed when one of its tests fails, or takes five times as
long as all of them take without it. Ends with code 1 when one survives that `targets` does not
explain.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.abc
import importlib.util
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutation.rewrite import Site, choose, mutate, sites  # noqa: E402
from tests.mutation.targets import EQUIVALENT, TARGETS, Target  # noqa: E402

SEED = "obm-warmstart"
PATIENCE = 5.0
"""A mutant may take so many times as long as the tests alone, and ten seconds more."""


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    topic: str
    function: str
    line: int
    kind: str
    change: str
    outcome: str
    """killed, slow (killed for its time), explained, survived."""
    by: str
    """The test that failed, or the reason why none can."""
    seconds: float


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
    for target in TARGETS:
        for function, site in mutants_of(target, n=10**6):
            possible.setdefault(function, set()).add(site.change)
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
    code = pytest.main([*options, *tests], plugins=[failure])
    return int(code), failure.name


# ---------------------------------------------------------------- processes


def in_child(work: Callable[[], Any], limit_s: float | None = None) -> tuple[Any, str]:
    """Runs `work` in a fork of this process.

    Args:
        work: Returns what JSON can hold.
        limit_s: After so many seconds the child is killed.

    Returns:
        What it returned (None if it was killed or died), and what it printed.
    """
    (answers, answer), (outputs, output) = os.pipe(), os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()  # whatever it starts ends with it
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 1
        try:
            os.write(answer, json.dumps(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(answer)
    os.close(output)
    printed, found = _read_until_end({answers: b"", outputs: b""}, answers, outputs, child, limit_s)
    os.waitpid(child, 0)
    return (json.loads(found) if found else None), printed.decode(errors="replace")


def _read_until_end(
    texts: dict[int, bytes], answers: int, outputs: int, child: int, limit_s: float | None
) -> tuple[bytes, bytes]:
    deadline = None if limit_s is None else time.monotonic() + limit_s
    open_pipes = set(texts)
    while open_pipes:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select(list(open_pipes), [], [], left)[0]
        if not ready:
            deadline = None
            os.killpg(child, signal.SIGKILL)
        for pipe in ready:
            text = os.read(pipe, 1 << 16)
            texts[pipe] += text
            if not text:
                open_pipes.discard(pipe)
                os.close(pipe)
    return texts[outputs], texts[answers]


def check_target(target: Target, n: int | None, say: Callable[[str], None]) -> list[Verdict]:
    """Runs the topic's tests alone, then once for each mutant.

    Raises:
        SystemExit: The tests fail without a mutant.
    """
    os.environ.update(target.environment)

    def alone() -> tuple[int, str, list[str]]:
        code, name = run_tests(target.tests)
        return code, name, [name for name in sys.modules if _is_foreign(name)]

    answer, printed = in_child(alone)
    if answer is None or answer[0] != 0:
        raise SystemExit(f"error: {target.topic}: the tests fail without a mutant\n{printed}")
    for name in answer[2]:
        _import_quietly(name)
    gc.collect()
    gc.freeze()
    start = time.monotonic()
    in_child(lambda: run_tests(target.tests))
    seconds = time.monotonic() - start
    say(f"{target.topic}: {seconds:.1f} s without a mutant")
    return [
        _check_mutant(target, function, site, PATIENCE * seconds + 10, say)
        for function, site in mutants_of(target, n)
    ]


def _check_mutant(
    target: Target, function: str, site: Site, limit_s: float, say: Callable[[str], None]
) -> Verdict:
    def mutated() -> tuple[int, str]:
        install(function, site)
        return run_tests(target.tests)

    start = time.monotonic()
    answer, _ = in_child(mutated, limit_s)
    code, by = answer if answer is not None else (-1, "")
    outcome = "slow" if code == -1 else "killed"
    if code == 0:
        by = EQUIVALENT.get((function, site.change), "")
        outcome = "explained" if by else "survived"
    seconds = round(time.monotonic() - start, 2)
    say(f"  {outcome:9} {seconds:5.1f} s  {function}:{site.line}  {site.change}")
    return Verdict(
        target.topic, function, site.line, site.kind, site.change, outcome, by, seconds
    )


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
    parser.add_argument("--output", type=Path, help="folder for mutation.json and mutation.md")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    stale = stale_explanations()
    if stale:
        print("error: tests/mutation/targets.py explains mutants that there are not:", *stale,
              sep="\n  ", file=sys.stderr)  # fmt: skip
        return 2
    targets = list(chosen_targets(options.only))
    if options.list:
        for target in targets:
            for function, site in mutants_of(target, options.mutants):
                print(f"{function}:{site.line}  {site.change}")
        return 0
    start = time.monotonic()
    verdicts: list[Verdict] = []
    for target in targets:
        # a process a topic: its variables, and what it imports, are its own
        found = _in_own_process(target, options.mutants)
        verdicts += [Verdict(**entry) for entry in found]
    survivors = [verdict for verdict in verdicts if verdict.outcome == "survived"]
    print(f"{len(verdicts)} mutants, {len(survivors)} survived, {time.monotonic() - start:.0f} s")
    for verdict in survivors:
        print(f"  {verdict.function}:{verdict.line}  {verdict.change}")
    if options.output is not None:
        from tests.mutation.report import write_report

        write_report(options.output, verdicts, time.monotonic() - start)
    return 1 if survivors else 0


def _in_own_process(target: Target, n: int | None) -> list[dict[str, Any]]:
    screen = os.dup(1)

    def say(line: str) -> None:
        os.write(screen, f"{line}\n".encode())

    found, printed = in_child(lambda: [asdict(v) for v in check_target(target, n, say)])
    os.close(screen)
    if found is None:
        raise SystemExit(printed)
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
