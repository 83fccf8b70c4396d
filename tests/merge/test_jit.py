"""Kernels that processes compile at the same moment: each finds its own code again."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from threading import Semaphore

import numba
import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from merge import kernels, kernels_pair
from merge.jit import CacheFile, jit

STEPS = ("_load_index", "_save_index", "_save_data")
ORDERS = sorted(set(permutations("000111")))
"""Who takes the next step, when two processes save: three steps each."""


def save_in_order(make, folder, order):
    """Two processes save one signature each; what a later one finds under both."""
    files = [make(str(folder), "kernel-1.py311", "stamp") for _ in range(2)]
    turns = [Semaphore(0), Semaphore(0)]
    taken = Semaphore(0)

    def wait_before(step, who):
        def take(*arguments):
            turns[who].acquire()
            result = step(*arguments)
            taken.release()
            return result

        return take

    for who, file in enumerate(files):
        for name in STEPS:
            setattr(file, name, wait_before(getattr(file, name), who))
    with ThreadPoolExecutor(2) as pool:
        saved = [pool.submit(file.save, who, f"code {who}") for who, file in enumerate(files)]
        for who in map(int, order):
            turns[who].release()
            assert taken.acquire(timeout=10)
        for each in saved:
            each.result()
    later = make(str(folder), "kernel-1.py311", "stamp")
    return [later.load(0), later.load(1)]


def test_numba_itself_gives_one_signature_the_code_of_another(tmp_path):
    """If this fails numba has mended it, and merge/jit.py can go."""
    folders = [tmp_path / "".join(order) for order in ORDERS]
    for folder in folders:
        folder.mkdir()
    found = [save_in_order(IndexDataCacheFile, folder, folder.name) for folder in folders]
    assert ["code 1", None] in found or [None, "code 0"] in found


@pytest.mark.parametrize("order", ORDERS, ids="".join)
def test_no_order_of_writes_gives_the_code_of_another_signature(order, tmp_path):
    found = save_in_order(CacheFile, tmp_path, order)
    assert found[0] in ("code 0", None)
    assert found[1] in ("code 1", None)
    assert found != [None, None]


def test_other_source_has_other_files(tmp_path):
    old, new = (CacheFile(str(tmp_path), "kernel-1.py311", stamp) for stamp in ("old", "new"))
    old.save("uint16", "old code")
    assert new.load("uint16") is None
    new.save("uint16", "new code")
    assert new.load("uint16") == "new code"
    # who has read the older index still finds the older code
    assert len(list(tmp_path.glob("*.nbc"))) == 2


FACTORY = """
import sys
from numba import njit
if sys.argv[1] == "numba":
    compiled = njit(cache=True)
else:
    from merge.jit import jit
    compiled = jit()

def make(amount):
    @compiled
    def add(value):
        return value + amount
    return add

one, two = make(1), make(2)

@compiled
def both(value):
    return 100 * one(value) + two(value)

print({"one": one, "two": two, "both": both}[sys.argv[2]](5))
"""


def in_processes_of_their_own(folder, maker):
    """Two of a factory's functions are compiled by a process each, a caller of both by a third."""
    (folder / "program.py").write_text(FACTORY)
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]),
                 "NUMBA_CACHE_DIR": str(folder)}  # fmt: skip
    variables.pop("PYTHONSAFEPATH", None)
    return [
        int(subprocess.check_output([sys.executable, "program.py", maker, name], cwd=folder,
                                    env=variables, text=True))
        for name in ("one", "two", "both")
    ]  # fmt: skip


def test_numba_itself_links_one_function_of_a_factory_twice(tmp_path):
    """If this fails numba has mended it, and the drawn numbers can go."""
    one, two, both = in_processes_of_their_own(tmp_path, "numba")
    assert (one, two) == (6, 7)
    assert both in (606, 707)


def test_functions_of_a_factory_stay_apart_whoever_compiled_them(tmp_path):
    assert in_processes_of_their_own(tmp_path, "ours") == [6, 7, 607]


def make_adder(amount):
    @jit()
    def add(value):
        return value + amount

    return add


def test_what_is_compiled_is_found_again():
    values = np.ones(3, np.float32)
    assert make_adder(2)(values).tolist() == [3, 3, 3]
    again = make_adder(2)
    assert again(values).tolist() == [3, 3, 3]
    assert sum(again.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("module", [kernels, kernels_pair])
def test_every_kernel_has_such_a_cache(module):
    dispatcher = numba.core.dispatcher.Dispatcher
    compiled = [value for value in vars(module).values() if isinstance(value, dispatcher)]
    assert compiled
    assert all(isinstance(each._cache._cache_file, CacheFile) for each in compiled)
