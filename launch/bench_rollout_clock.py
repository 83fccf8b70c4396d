"""CPU seconds and peak memory of the stages of a training step, in the process that runs it."""

from __future__ import annotations

import functools
import gc
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

StageName = str | Callable[..., str]
"""A stage, or a function of the call's arguments that names it."""


class StageClock:
    """CPU seconds by path of nested stages, for example `rollout/prefill/vision`.

    All threads of the process count (`time.process_time`). What was wrapped is itself again when
    the `with` block of the clock ends.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._wrapped = ExitStack()

    def __enter__(self) -> StageClock:
        return self

    def __exit__(self, *error: Any) -> None:
        self._wrapped.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the block's CPU seconds to `name` within the stages that are open."""
        self._stack.append(name)
        path = "/".join(self._stack)
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[path] += time.process_time() - start
            self._stack.pop()

    def wrap(self, owner: Any, method: str, name: StageName) -> None:
        """Times every call of `owner.method` from now on; owner is an object or a class."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name if isinstance(name, str) else name(*args, **kwargs)):
                return original(*args, **kwargs)

        is_own = method in vars(owner)
        setattr(owner, method, timed)
        restore = (
            partial(setattr, owner, method, original) if is_own else partial(delattr, owner, method)
        )
        self._wrapped.callback(restore)

    def total(self, *names: str, within: str = "") -> float:
        """Seconds of the outermost stages of these names, inside a stage or anywhere."""
        found = 0.0
        for path, seconds in self.seconds.items():
            *outer, last = path.split("/")
            is_inside = not within or within in outer
            if last in names and is_inside and not set(names) & set(outer):
                found += seconds
        return found


class PeakMemory:
    """Resident memory of this process: what it was at the start, and the highest since."""

    def __init__(self) -> None:
        gc.collect()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self.start_mb = _status_mb("VmRSS:")

    @property
    def growth_mb(self) -> float:
        """Highest resident memory since the start, less that of the start, in MB."""
        return max(0.0, _status_mb("VmHWM:") - self.start_mb)


def _status_mb(field: str) -> float:
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
