"""numba's `njit` for the kernels, with a cache that processes may fill side by side.

numba numbers the compiled files of a function and has the numbers in an index, which two processes
that compile at the same moment read before either has written: both take the next number, the later
file stands under both entries, and from then on one of the two signatures (or closures) runs the
other's code. A merge comes out wrong and nothing is said. Here a file is named by what it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import IndexDataCacheFile


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
            dispatcher._cache._cache_file = CacheFile(file._cache_path, base, file._source_stamp)
        return dispatcher

    return compile_lazily
