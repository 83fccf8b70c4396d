"""What watching the inputs costs: forward passes with and without the hooks of calibration.

    obm bench calibration

A random Qwen2 of 76 M parameters runs 4 x 256 tokens on one core; passes with and without hooks
take turns, CPU time is compared pair by pair, and the median counts. The target: second moments
cost at most 5 % of the forward pass.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

TARGET = 0.05
REPEATS = 5
BATCH, LENGTH = 4, 256
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def bench_calibration(
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    repeats: int = REPEATS,
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Measures the share of a forward pass that second moments add.

    Args:
        dtypes: in which the model runs.
        repeats: passes of each sort.
        sizes: of the model, over `SIZES`.

    Returns:
        One row a dtype: name, value (added CPU time over that of the plain pass), target, met.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**{**SIZES, **sizes})
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH))
    rows = []
    for dtype in dtypes:
        model = Qwen2ForCausalLM(config).to(getattr(torch, dtype)).eval()
        plain, watched = _time_in_turns(model, ids, repeats)
        # neighbours in time are compared: the machine's speed drifts
        ratios = [one / other for one, other in zip(watched, plain, strict=True)]
        added = statistics.median(ratios) - 1
        rows.append(
            {
                "name": f"calibration overhead, {dtype}",
                "value": round(added, 4),
                "target": TARGET,
                "met": added <= TARGET,
            }
        )
    return rows


def _time_in_turns(model: Any, ids: Any, repeats: int) -> tuple[list[float], list[float]]:
    """CPU seconds of passes without and with the hooks, which take turns."""
    import torch

    from merge.families import get_family
    from merge.inputs import InputSums, watched_linears

    family = get_family(model.config.model_type, "bench")
    sites: dict[str, Any] = {}
    for index, layer in enumerate(model.model.layers):
        sites |= watched_linears(family, layer, index)
    plain: list[float] = []
    watched: list[float] = []
    sums = InputSums(sites)
    sums.mask = torch.ones_like(ids, dtype=torch.bool)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other use CPU time too
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for times, hooks in ((plain, False), (watched, True)):
                begin = time.process_time()
                if hooks:
                    with sums:
                        model(input_ids=ids, use_cache=False, logits_to_keep=1)
                else:
                    model(input_ids=ids, use_cache=False, logits_to_keep=1)
                if repeat:  # the first pass of each sort warms up
                    times.append(time.process_time() - begin)
    torch.set_num_threads(n_threads)
    return plain, watched
