"""What the mutation check does to a source: every kind of error, one at a time, nowhere else."""

import ast

import pytest

from tests.mutation.rewrite import choose, mutate, sites

SOURCE = '''
"""1 + 1 in a docstring is no sum."""
import numpy as np

def shift(x: "1 + 1", by=2) -> "3 - 1":
    """Also 1 + 1 here."""
    if x < 0:
        raise ValueError(f"{x - 1} is below {0 + 0}")
    return -x * by + 1

class Box:
    def fits(self, other):
        return self.size >= other.size and not other.is_full

    def best(self, values):
        order = sorted(values, reverse=True)[::-1]
        return min(order), np.sum(values, axis=0), values.max(axis=-1) != 5 & 3

def untouched(a, b):
    return a + b
'''


def changes(function):
    return {site.change for site in sites(SOURCE, function)}


def run(site):
    values = {}
    exec(compile(mutate(SOURCE, site), "mutated", "exec"), values)
    return values


def test_every_kind_of_error_is_found_where_it_stands():
    assert changes("shift") == {
        "x < 0 -> x <= 0",
        "x < 0 -> x < 1",
        "-x * by + 1 -> -x * by - 1",
        "-x * by -> -x / by",
        "-x * by -> +x * by",
        "-x * by + 1 -> -x * by + 2",
    }
    assert changes("Box.fits") == {
        "self.size >= other.size and (not other.is_full)"
        " -> self.size >= other.size or not other.is_full",
        "self.size >= other.size -> self.size > other.size",
        "self.size >= other.size and (not other.is_full)"
        " -> self.size >= other.size and (not not other.is_full)",
    }
    assert changes("Box.best") == {
        "sorted(values, reverse=True) -> sorted(values, reverse=not True)",
        "sorted(values, reverse=True)[::-1] -> sorted(values, reverse=True)[::+1]",
        "min(order) -> max(order)",
        "np.sum(values, axis=0) -> np.sum(values, axis=1)",
        "values.max(axis=-1) -> values.max(axis=0)",
        "values.max(axis=-1) -> values.min(axis=-1)",
        "values.max(axis=-1) != 5 & 3 -> values.max(axis=-1) == 5 & 3",
        "5 & 3 -> 5 | 3",
        "5 & 3 -> 6 & 3",
        "5 & 3 -> 5 & 4",
    }


def test_what_would_only_raise_is_left_out():
    source = "def f(a, n):\n    return [0] * n + [1], a.shape[1], a[::-1], a[1]\n"
    assert {site.change for site in sites(source, "f")} == {
        "[0] * n -> [1] * n",
        "[0] * n + [1] -> [0] * n + [2]",
        "a[::-1] -> a[::+1]",
        "a[1] -> a[2]",
    }


def test_a_class_is_all_of_its_methods():
    assert changes("Box") == changes("Box.fits") | changes("Box.best")


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("-x * by + 1 -> -x * by - 1", -7),  # -3 * 2 - 1
        ("-x * by -> -x / by", -0.5),  # -3 / 2 + 1
        ("-x * by -> +x * by", 7),  # 3 * 2 + 1
        ("-x * by + 1 -> -x * by + 2", -4),
    ],
)
def test_one_error_changes_one_thing(change, value):
    site = next(site for site in sites(SOURCE, "shift") if site.change == change)
    mutated = run(site)
    assert mutated["shift"](3) == value
    assert mutated["untouched"](2, 3) == 5


def test_everything_else_stays_as_it_was():
    whole = ast.unparse(ast.parse(SOURCE)).splitlines()
    for function in ("shift", "Box"):
        for site in sites(SOURCE, function):
            mutated = ast.unparse(mutate(SOURCE, site)).splitlines()
            assert len(mutated) == len(whole)
            differing = [i for i, (a, b) in enumerate(zip(whole, mutated, strict=True)) if a != b]
            assert len(differing) == 1, site


def test_errors_that_read_alike_are_numbered():
    source = "def f(a, b):\n    return (a + b) * 2 if a else (a + b)\n"
    assert [s.change for s in sites(source, "f") if "a + b ->" in s.change[:8]] == [
        "a + b -> a - b",
        "a + b -> a - b #2",
    ]


def test_a_draw_is_fixed_by_its_seed_and_takes_every_kind():
    found = sites(SOURCE, "shift")
    drawn = choose(found, 4, "a")
    assert drawn == choose(found, 4, "a")
    assert {site.kind for site in drawn} == {"comparison", "constant", "operator", "sign"}
    assert choose(found, 100, "a") == found
    assert {tuple(choose(found, 3, str(seed))) for seed in range(20)} != {tuple(drawn[:3])}


def test_a_function_that_is_not_there_is_named():
    with pytest.raises(LookupError, match=r"there is no Box\.worst"):
        sites(SOURCE, "Box.worst")
