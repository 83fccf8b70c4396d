"""What a merge will cost: bytes, memory and time, from the plan and measured coefficients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merge.memory import size_words
from merge.methods import METHODS
from merge.plan import MergePlan
from merge.reader import RESIDENT_BYTES

FIXED_MEMORY = 170 * 10**6
"""Interpreter, numpy, numba and the compiled kernels, in bytes."""
# Seconds on one core of a server from 2021; `make bench-merge` measures yours.
SECONDS_A_BYTE = 6e-10
"""Reading, hashing and writing, files in the page cache."""
SECONDS_AN_ENTRY = {
    "top": 6e-9,
    "band": 9e-9,
    "variance": 1e-8,
    "random": 8e-9,
    "magprune": 3e-8,
    "all": 3e-9,
    "above": 4e-9,
    "arbitrate": 8e-8,
}
"""Arithmetic of a rule for two task vectors, by what it keeps."""
SECONDS_A_FLOP = 2e-11
"""Matrix products and solves of the dense methods."""


def dense_bytes(shape: Sequence[int]) -> int:
    """Memory that a dense method takes for one tensor: several fp64 matrices of both shapes."""
    n_out, n_in = shape[0], shape[-1]
    return 8 * (5 * n_in * n_in + 8 * n_out * n_in)


def estimate_cost(plan: MergePlan, n_bytes: Mapping[str, int], n_files: int) -> dict[str, Any]:
    """Estimates what a merge will take.

    Args:
        plan: What is merged.
        n_bytes: `plan.plan_bytes`.
        n_files: Files of the output.

    Returns:
        bytes_read, bytes_written, files, memory_bytes (peak; where more is free, dense methods take
        it for further tensors at a time), cpu_s.
    """
    seconds = SECONDS_A_BYTE * (n_bytes["read"] + n_bytes["written"])
    memory = FIXED_MEMORY + RESIDENT_BYTES + RESIDENT_BYTES // 2
    for tensor in plan.tensors:
        method = METHODS.get(tensor.action)
        if method is None:
            continue
        n = math.prod(tensor.shape)
        if method.rule is not None:
            n_tasks = len(tensor.sources) - 1
            rule = method.rule(tensor.settings)
            an_entry = SECONDS_AN_ENTRY["arbitrate" if rule.arbitrate else rule.keep]
            seconds += an_entry * n * n_tasks / 2
            continue
        products = tensor.settings.steps if tensor.action == "wudi" else 4
        seconds += SECONDS_A_FLOP * 2 * products * n * tensor.shape[-1]
        memory = max(memory, FIXED_MEMORY + dense_bytes(tensor.shape))
    return {
        "bytes_read": n_bytes["read"],
        "bytes_written": n_bytes["written"],
        "files": n_files,
        "memory_bytes": memory,
        "cpu_s": round(seconds, 1),
    }


def format_cost(cost: Mapping[str, Any]) -> str:
    """One line for the end of a plan."""
    return (
        f"reads {size_words(cost['bytes_read'])}, writes {size_words(cost['bytes_written'])} in "
        f"{cost['files']} file{'s' if cost['files'] != 1 else ''}; about "
        f"{size_words(cost['memory_bytes'])} of memory and {cost['cpu_s']:.0f} s of one core"
    )
