"""Small errors put into the source of one function: a flipped sign, an off-by-one, a wrong axis.

    sites(source, "credit.overlong_penalty")     every place where one can be made
    mutate(source, site)                         the module's tree with that one error in it

One mutation changes one node. What is not arithmetic stays as it is: annotations, docstrings, the
texts of errors and assertions.
"""

from __future__ import annotations

import ast
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
PAIRS = (
    ("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("any", "all"),
    ("floor", "ceil"),
)  # fmt: skip
NAMES = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}
PARTS = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.Slice, ast.Tuple, ast.List)
"""Expressions that say too little alone."""
NO_ARITHMETIC = {
    "annotation", "returns", "decorator_list", "type_params", "defaults", "kw_defaults",
}  # fmt: skip
"""Fields of the syntax tree that stay: a default is a setting, not a calculation."""
AXES = {"axis", "dim"}
FLAGS = {"descending", "reverse"}


@dataclass(frozen=True)
class Site:
    """One place where one error can be made."""

    function: str
    """Qualified name inside the module: `name`, or `Class.name`."""
    number: int
    """Place among the function's sites, in the order of the source."""
    kind: str
    """operator, comparison, sign, not, logic, constant, axis, flag, name."""
    line: int
    change: str
    """What stands there before and after, `a + b -> a - b`; equal ones are numbered (#2)."""


Edit = Callable[[], None]
"""Makes an error in a tree, or takes it back when called again."""


def sites(source: str, function: str) -> list[Site]:
    """Lists the errors that can be made in a function.

    Args:
        source: Of the module.
        function: Qualified name of the function or the class.

    Raises:
        LookupError: The module has no such function.
    """
    found, seen = [], Counter[str]()
    for number, (kind, shown, line, edit) in enumerate(_edits(source, function)[1]):
        before = _text(shown)
        edit()
        change = f"{before} -> {_text(shown)}"
        edit()
        seen[change] += 1
        if seen[change] > 1:
            change = f"{change} #{seen[change]}"
        found.append(Site(function, number, kind, line, change))
    return found


def mutate(source: str, site: Site) -> ast.Module:
    """The tree of the module with the site's error in it; everything else, lines too, is alike."""
    tree, edits = _edits(source, site.function)
    edits[site.number][3]()
    return ast.fix_missing_locations(tree)


def choose(found: list[Site], n: int, seed: str) -> list[Site]:
    """Draws n sites, every kind in turn, in the order of the source.

    Args:
        found: Of one function.
        n: How many; all of fewer.
        seed: Equal seeds draw alike.
    """
    by_kind = defaultdict(list)
    for site in random.Random(seed).sample(found, len(found)):
        by_kind[site.kind].append(site)
    drawn: list[Site] = []
    while len(drawn) < min(n, len(found)):
        for kind in sorted(by_kind):
            if by_kind[kind] and len(drawn) < n:
                drawn.append(by_kind[kind].pop())
    return sorted(drawn, key=lambda site: site.number)


# ---------------------------------------------------------------- places


def _edits(source: str, function: str) -> tuple[ast.Module, list[tuple[str, ast.AST, int, Edit]]]:
    """A fresh tree, and (kind, node to show, line, what makes the error) of each of its sites."""
    tree = ast.parse(source)
    edits = []
    for node, shown in _walk(_find(tree, function), None):
        for kind, edit in _errors_of(node):
            edits.append((kind, shown, getattr(node, "lineno", 0), edit))
    return tree, edits


def _find(tree: ast.Module, function: str) -> ast.AST:
    node: ast.AST = tree
    for name in function.split("."):
        body = getattr(node, "body", [])
        named = [part for part in body if getattr(part, "name", None) == name]
        if not named:
            raise LookupError(f"there is no {function}")
        node = named[-1]
    return node


def _walk(node: ast.AST, around: ast.AST | None) -> Iterator[tuple[ast.AST, ast.AST]]:
    """The nodes of a function that calculate, each with what to show: itself, or what is around
    it where it says little alone."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return
    says_something = isinstance(node, ast.expr | ast.stmt) and not isinstance(node, PARTS)
    shown = node if says_something or around is None else around
    yield node, shown
    if _is_one_place(node):
        return
    for field, value in ast.iter_fields(node):
        if field in NO_ARITHMETIC:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, shown)


def _is_one_place(node: ast.AST) -> bool:
    """Whether one error is enough here, or any would end in an exception at once."""
    if isinstance(node, ast.keyword):
        return node.arg in AXES and _number(node.value) is not None
    if isinstance(node, ast.Subscript):  # shape[2] of two axes
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
    return isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)


def _is_list(node: ast.AST) -> bool:
    """Lists have sums and multiples, and nothing that could stand in their place."""
    if isinstance(node, ast.BinOp):
        return _is_list(node.left) or _is_list(node.right)
    return isinstance(node, ast.List | ast.ListComp)


def _errors_of(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    if _is_list(node):
        return
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield "operator", _set(node, "op", OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            if type(operator) in COMPARISONS:
                yield "comparison", _put(node.ops, place, COMPARISONS[type(operator)]())
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "logic", _set(node, "op", other)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", _set(node, "op", ast.UAdd())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield "not", _set(node, "operand", ast.UnaryOp(type(node.op)(), node.operand))
    elif isinstance(node, ast.keyword) and node.arg in AXES:
        axis = _number(node.value)
        if axis is not None:
            yield "axis", _set(node, "value", ast.Constant(1 if axis == 0 else 0))
    elif isinstance(node, ast.keyword) and node.arg in FLAGS:
        value = ast.UnaryOp(ast.Not(), node.value)
        yield "flag", _set(node, "value", value)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant", _set(node, "value", node.value + 1)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield "name", _set(node, "id", NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield "name", _set(node, "attr", NAMES[node.attr])


def _number(node: ast.expr) -> int | None:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, int) else None


def _set(node: ast.AST, field: str, value: object) -> Edit:
    values = [getattr(node, field), value]

    def edit() -> None:
        values.reverse()
        setattr(node, field, values[0])

    return edit


def _put(operators: list[ast.cmpop], place: int, value: ast.cmpop) -> Edit:
    values = [operators[place], value]

    def edit() -> None:
        values.reverse()
        operators[place] = values[0]

    return edit


def _text(node: ast.AST) -> str:
    """The expression, or the first line of the statement."""
    return ast.unparse(ast.fix_missing_locations(node)).partition("\n")[0]
