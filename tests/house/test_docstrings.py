"""Every module says its purpose, all that is public what it does; `Args:` name every parameter."""

import ast
import re

import pytest

from tests.docs.blocks import ROOT
from tests.house.test_imports import FLOORS

PUBLIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SECTION = re.compile(r"^ *(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note):$", re.M)


def sections(docstring):
    """{heading: text} of a docstring in Google's style; what comes before has the heading ''."""
    parts = _SECTION.split(docstring)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def documented_names(arguments):
    """Names that begin an entry of an `Args:` section: `name: ...`, or `one, two: ...`."""
    indent = re.match(r"\n*( *)", arguments)[1]
    entry = rf"^{indent}(\*{{0,2}}\w+(?:, \*{{0,2}}\w+)*):(?: |$)"
    return {
        name.strip("* ")
        for line in re.findall(entry, arguments, re.M)
        for name in line.split(",")
    }  # fmt: skip


def parameters(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    return [a.arg for a in every if a.arg not in ("self", "cls") and not a.arg.startswith("_")]


def public_parts(tree):
    """Public functions and classes of a module with the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, PUBLIC) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (
                    part for part in node.body
                    if isinstance(part, PUBLIC[:2]) and not part.name.startswith("_")
                )  # fmt: skip


def differing_arguments(node):
    """Parameters that the docstring's `Args:` leaves out, and names there that are none."""
    args = sections(ast.get_docstring(node) or "").get("Args")
    if isinstance(node, ast.ClassDef):  # a class documents its constructor
        node = next((part for part in node.body if getattr(part, "name", "") == "__init__"), None)
    if args is None or node is None:
        return set()
    return set(parameters(node)) ^ documented_names(args)


def faults(source):
    """What a module's docstrings lack, as (line, words)."""
    tree = ast.parse(source)
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    if not first:
        yield 1, "the module has no docstring"
    for node in public_parts(tree):
        if not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"
        if names := differing_arguments(node):
            differing = ", ".join(sorted(names))
            yield node.lineno, f"{node.name}: Args and parameters differ in {differing}"


@pytest.mark.parametrize("package", FLOORS)
def test_everything_public_is_described(package):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {words}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, words in faults(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_what_is_missing_is_found():
    source = (
        "def known(one, *, two=2):\n"
        '    """Does.\n\n    Args:\n        one: of a\n            kind: long.\n'
        '        three: no.\n    """\n'
        "class Thing:\n"
        "    def act(self):\n        pass\n"
        "def _hidden(): pass\n"
    )
    assert list(faults(source)) == [
        (1, "the module has no docstring"),
        (1, "known: Args and parameters differ in three, two"),
        (9, "Thing has no docstring"),
        (10, "act has no docstring"),
    ]
