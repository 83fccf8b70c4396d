"""Kernels that processes compile at the same moment: each finds its own code again."""

import numba
import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from merge import kernels, kernels_pair
from merge.jit import CacheFile, jit


def save_in_step(make, folder):
    """Two processes: both read the index before either writes; the first one's code comes last."""
    one, two = (make(str(folder), "kernel-1.py311", "stamp") for _ in range(2))
    read, write = one._load_index, one._save_data

    def read_then_wait():
        found = read()
        one._save_data = write_late
        return found

    def write_late(name, data):
        # the other process reads what this one read, and writes index and code in between
        index = two._load_index
        two._load_index = dict
        two.save("float32", "code for float32")
        two._load_index = index
        write(name, data)

    one._load_index = read_then_wait
    # where the code is written first, before the index is read
    one._save_data = write_late
    one.save("uint16", "code for uint16")
    return {key: two.load(key) for key in ("uint16", "float32")}


def test_numba_itself_gives_one_signature_the_code_of_another(tmp_path):
    """If this fails numba has mended it, and merge/jit.py can go."""
    assert save_in_step(IndexDataCacheFile, tmp_path)["float32"] == "code for uint16"


def test_no_order_of_writes_gives_the_code_of_another_signature(tmp_path):
    found = save_in_step(CacheFile, tmp_path)
    assert found["float32"] in ("code for float32", None)
    assert found["uint16"] in ("code for uint16", None)
    assert set(found.values()) != {None}


def test_other_source_has_other_files(tmp_path):
    old, new = (CacheFile(str(tmp_path), "kernel-1.py311", stamp) for stamp in ("old", "new"))
    old.save("uint16", "old code")
    assert new.load("uint16") is None
    new.save("uint16", "new code")
    assert new.load("uint16") == "new code"
    # who has read the older index still finds the older code
    assert len(list(tmp_path.glob("*.nbc"))) == 2


def make_adder(amount):
    @jit()
    def add(value):
        return value + amount

    return add


def test_a_later_process_compiles_nothing():
    values = np.ones(3, np.float32)
    assert make_adder(2)(values).tolist() == [3, 3, 3]
    again = make_adder(2)
    assert again(values).tolist() == [3, 3, 3]
    assert sum(again.stats.cache_hits.values()) == 1


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="numba is told not to compile")
@pytest.mark.parametrize("module", [kernels, kernels_pair])
def test_every_kernel_has_such_a_cache(module):
    compiled = [
        value
        for value in vars(module).values()
        if isinstance(value, numba.core.dispatcher.Dispatcher)
    ]
    assert compiled
    assert all(isinstance(each._cache._cache_file, CacheFile) for each in compiled)
