"""Calls to services that fail, hang or are busy: one deadline, retries with backoff, side by side.

A call has one deadline, `timeout_s` after its start, whatever happens in between: attempts, pauses
and all. So nobody waits longer, and a service that hangs is not asked again. A service that fails
fast is, after pauses of about b, 2b, 4b, ... seconds (b = `backoff_s`), each times a random factor
from 0.5 to 1.5, so that callers that failed together do not come back together.

What a back end may tell by attributes of what it raises:
    fault            "model" = the call was bad; its message goes to the policy, nothing is retried
    retry_after_s    seconds that the service wants to be left alone, such as HTTP's Retry-After
    is_permanent     no retry will help, such as a key that is refused
"""

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from environments.results import ToolResult, infrastructure_fault, model_fault
from environments.sanitize import one_line

logger = logging.getLogger(__name__)

Call = Callable[[], ToolResult]

_failures: Counter[tuple[str, str]] = Counter()
_jitter = random.Random()  # not the global one: training has seeded that


class BadCall(Exception):
    """Raise it in a back end for a call that is the policy's fault; the message says what to do."""

    fault = "model"


class ServiceError(Exception):
    """Raise it in a back end to say more than that the service failed."""

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, is_permanent: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.is_permanent = is_permanent


def guard(
    call: Call,
    tool: str,
    timeout_s: float | None,
    back_end: Any = None,
    *,
    retries: int = 0,
    backoff_s: float = 0.5,
) -> ToolResult:
    """Runs a call so that neither an exception nor a hang reaches training.

    Args:
        call: asks the back end.
        tool: name for messages.
        timeout_s: seconds for everything, retries included; None = no limit.
        back_end: what is asked; with `in_memory = True` it gets no thread, no limit and no retry.
        retries: further attempts after a fault of the service.
        backoff_s: mean pause before the first of them; it doubles each time.
    """
    start = time.perf_counter()
    if getattr(back_end, "in_memory", False):
        result, _ = _attempt(call, tool)
    else:
        deadline = math.inf if timeout_s is None else start + timeout_s
        persisted = _persist(call, tool, deadline, retries, backoff_s)
        if persisted is None:
            _report(tool, f"no result within {timeout_s:g} s")
            persisted = infrastructure_fault(f"no result within {timeout_s:g} s", tool)
        result = persisted
    result.seconds = time.perf_counter() - start
    return result


def side_by_side(calls: Sequence[Call]) -> list[ToolResult]:
    """Runs guarded calls at the same time; as long as the slowest, in the order given."""
    results: list[ToolResult | None] = [None] * len(calls)

    def run(place: int) -> None:
        results[place] = calls[place]()

    inline, threads = [0][: len(calls)], []
    for place in range(1, len(calls)):
        thread = threading.Thread(target=run, args=(place,), daemon=True)
        try:
            thread.start()
            threads.append(thread)
        except RuntimeError:  # no thread to be had: one after the other then
            inline.append(place)
    for place in inline:
        run(place)
    for thread in threads:
        thread.join()
    return [infrastructure_fault("no result") if r is None else r for r in results]


def pause_s(attempt: int, backoff_s: float, retry_after_s: float = 0.0) -> float:
    """Seconds to wait after failure number `attempt` (from 0): backoff with jitter, at least what
    the service asks for."""
    return max(backoff_s * 2.0**attempt * _jitter.uniform(0.5, 1.5), retry_after_s)


def _persist(
    call: Call, tool: str, deadline: float, retries: int, backoff_s: float
) -> ToolResult | None:
    """Attempts until one succeeds, none is left or the deadline comes (then None)."""
    for attempt in range(retries + 1):
        outcome = _in_time(call, tool, deadline)
        if outcome is None:
            return None
        result, error = outcome
        result.retries = attempt
        is_final = error is None or result.fault == "model" or attempt == retries
        if is_final or getattr(error, "is_permanent", False):
            return result
        pause = pause_s(attempt, backoff_s, float(getattr(error, "retry_after_s", None) or 0.0))
        if time.perf_counter() + pause >= deadline:
            return result
        time.sleep(pause)
    raise AssertionError("unreachable: the last attempt is final")


def _report(tool: str, what: str, error: Exception | None = None) -> None:
    """Logs the 1st, 10th, 100th, ... failure of a kind: a dead service fails thousands of times."""
    _failures[tool, what] += 1
    n = _failures[tool, what]
    level = logging.WARNING if str(n).strip("0") == "1" else logging.DEBUG
    logger.log(level, "%s search failed (%d so far): %s", tool, n, repr(error) if error else what)


def _attempt(call: Call, tool: str) -> tuple[ToolResult, Exception | None]:
    try:
        return call(), None
    except Exception as error:  # whatever a service does wrong is a result here
        if getattr(error, "fault", None) == "model":
            return model_fault(one_line(str(error), 300), tool), error
        _report(tool, type(error).__name__, error)
        # the message stays in the log: it may hold a key or a page's text
        return infrastructure_fault(type(error).__name__, tool), error


def _in_time(call: Call, tool: str, deadline: float) -> tuple[ToolResult, Exception | None] | None:
    """One attempt, or None if the deadline comes first; what hangs is left behind."""
    if math.isinf(deadline):
        return _attempt(call, tool)
    box: list[tuple[ToolResult, Exception | None]] = []
    # a daemon thread, not an executor: a hung service must not keep the interpreter from ending
    thread = threading.Thread(target=lambda: box.append(_attempt(call, tool)), daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # too many threads hang already
        return infrastructure_fault(str(error), tool), error
    thread.join(max(0.0, deadline - time.perf_counter()))
    return box[0] if box else None
