"""numba's `njit` for the kernels, with a cache that processes may fill side by side.

Two processes that compile at the same moment get each other's code from numba's own, in two ways. A
merge comes out wrong then, today or from the cache ever after, and nothing is said.

* numba numbers the compiled files of a function and has the numbers in an index, which both read
  before either has written: they take the same number, and the later file stands under both
  entries. Here a file is named by what it holds.
* A compiled function's symbol has a number, too, that each process counts from 1 on. Two functions
  of one factory (equal in name and types, not in what they close over), one compiled here and one
  there, can get the same symbol; a caller that links both calls one of them twice. Here the numbers
  are drawn.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

from numba import njit
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import IndexDataCacheFile

FORMAT = 2
"""Raised where code that was compiled before must not be used again."""

FunctionIdentity._unique_ids = iter(partial(secrets.randbits, 62), -1)


class CacheFile(IndexDataCacheFile):
    """Compiled code under a name of its own: no order of writes can put other code there."""

    def save(self, key: Any, data: Any) -> None:
        """Writes the code, then its entry.

        An entry that another process writes at the same moment may be lost; it is compiled again.
        """
        content = self._dump((self._version, self._source_stamp, key))
        digest = hashlib.blake2b(content, digest_size=12).hexdigest()
        name = f"{self._index_name.removesuffix('.nbi')}.{digest}.nbc"
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


def jit(**options: Any) -> Callable[[Callable], Any]:
    """A decorator: `njit` without the GIL, kept for later processes.

    Args:
        options: of `njit`, beside `nogil` and `cache`.
    """

    def compile_lazily(function: Callable) -> Any:
        dispatcher = njit(function, nogil=True, cache=True, **options)
        # not there where numba is told not to compile, or finds no folder that it can write to
        file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
        if file is not None:
            base = file._index_name.removesuffix(".nbi")
            stamp = (FORMAT, file._source_stamp)
            dispatcher._cache._cache_file = CacheFile(file._cache_path, base, stamp)
        return dispatcher

    return compile_lazily
