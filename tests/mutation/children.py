"""Work in a fork of this process: what it returned and printed, and the seconds it computed."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What came of a child."""

    value: Any
    """What the work returned; None where it raised, died or was stopped."""
    printed: str
    cpu_s: float
    """Of the child and of all that it waited for."""
    is_out_of_time: bool


def in_child(work: Callable[[], Any], limit_s: float | None = None) -> Answer:
    """Runs `work` in a fork.

    Time is that of the processor, so that a busy machine decides nothing.

    Args:
        work: Returns what JSON can hold.
        limit_s: Seconds after which the child is stopped.
    """
    (answers, answer), (outputs, output) = os.pipe(), os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _work(work, answer, output, limit_s)
    os.close(answer)
    os.close(output)
    found, printed = _read_until_end(answers, outputs)
    _, status, used = os.wait4(child, 0)
    cpu_s = used.ru_utime + used.ru_stime
    stopped_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Answer(
        json.loads(found) if found else None,
        printed.decode(errors="replace"),
        cpu_s,
        # the limit counts ticks and `wait4` does not; a machine short of memory kills, too
        limit_s is not None
        and (stopped_by == signal.SIGXCPU or (stopped_by == signal.SIGKILL and cpu_s >= limit_s)),
    )


def _work(work: Callable[[], Any], answer: int, output: int, limit_s: float | None) -> None:
    """The child's life; it never returns."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        # under pytest they are files of its own
        sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
        if limit_s is not None:
            limit = int(limit_s) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        os.write(answer, json.dumps(work()).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _read_until_end(*pipes: int) -> list[bytes]:
    """Reads all pipes at once, since a full one would hold up the child."""
    texts = dict.fromkeys(pipes, b"")
    still_open = set(pipes)
    while still_open:
        for pipe in select.select(list(still_open), [], [])[0]:
            text = os.read(pipe, 1 << 16)
            texts[pipe] += text
            if not text:
                still_open.discard(pipe)
                os.close(pipe)
    return list(texts.values())
