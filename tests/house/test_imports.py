"""Imports run downwards only, those inside functions included, as docs/architecture.md says."""

import ast
import re

import pytest

from tests.docs.blocks import ROOT

FLOORS = {
    "launch": 3, "compare": 2, "train": 1,
    "merge": 0, "environments": 0, "rewards": 0, "configs": 0,
}  # fmt: skip
"""A package may import itself and those of a lower floor; tests may import anything."""


def imported_packages(source):
    """(line, package) of every import anywhere in the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; name the package"
            yield node.lineno, node.module.split(".")[0]


def upward_imports(package, source):
    return [
        (line, other)
        for line, other in imported_packages(source)
        if other == "tests"
        or (other in FLOORS and other != package and FLOORS[other] >= FLOORS[package])
    ]


@pytest.mark.parametrize("package", FLOORS)
def test_imports_run_downwards_only(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path in files
        for line, other in upward_imports(package, path.read_text(encoding="utf-8"))
    }
    assert not found, "move what it needs to a lower floor, or into the package itself"


def test_an_import_inside_a_function_is_found():
    source = "import merge.plan\n\ndef late():\n    from compare.runs import read_run\n"
    assert upward_imports("train", source) == [(4, "compare")]
    assert upward_imports("rewards", source) == [(1, "merge"), (4, "compare")]
    assert upward_imports("launch", source) == []
    assert upward_imports("launch", "import tests.docs.blocks") == [(1, "tests")]


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_documents_name_the_same_floors(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    drawn = re.search(r"`(\w+)` → `(\w+)` → `(\w+)` → \{([^}]*)\}", text)
    above, ground = drawn.groups()[:3], re.findall(r"`(\w+)`", drawn[4])
    assert {name: 3 - i for i, name in enumerate(above)} | dict.fromkeys(ground, 0) == FLOORS
