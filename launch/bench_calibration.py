"""What watching the inputs costs: the share of a forward pass that the hooks of calibration add.

    obm bench calibration

A random Qwen2 of 76 M parameters runs 4 x 256 tokens on one core. CPU time inside the hooks is set
against that of the rest of the same pass, and the median over the passes counts. Passes with and
without hooks, one after the other, differ by some per cent for other reasons on a machine that is
shared: more than what is measured here. The target: second moments cost at most 5 % of the pass.
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
        repeats: passes.
        sizes: of the model, over `SIZES`.

    Returns:
        One row a dtype: name, value (CPU time in hooks over that of the rest), target, met.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**{**SIZES, **sizes})
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH))
    rows = []
    for dtype in dtypes:
        model = Qwen2ForCausalLM(config).to(getattr(torch, dtype)).eval()
        added = statistics.median(_shares(model, ids, repeats))
        rows.append(
            {
                "name": f"calibration overhead, {dtype}",
                "value": round(added, 4),
                "target": TARGET,
                "met": added <= TARGET,
            }
        )
    return rows


def _shares(model: Any, ids: Any, repeats: int) -> list[float]:
    """CPU time in the hooks over that of the rest, for each pass."""
    import torch

    from merge.families import get_family
    from merge.inputs import InputSums, watched_linears

    family = get_family(model.config.model_type, "bench")
    sites: dict[str, Any] = {}
    for index, layer in enumerate(model.model.layers):
        sites |= watched_linears(family, layer, index)
    sums = InputSums(sites)
    sums.mask = torch.ones_like(ids, dtype=torch.bool)
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        stamps.append(time.process_time())

    shares = []
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other use CPU time too
    # hooks of a module run in the order in which they came: stamp, sum, stamp
    handles = [linear.register_forward_pre_hook(stamp) for linear in sites.values()]
    with sums, torch.no_grad():
        handles += [linear.register_forward_pre_hook(stamp) for linear in sites.values()]
        for repeat in range(repeats + 1):
            stamps.clear()
            begin = time.process_time()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            total = time.process_time() - begin
            in_hooks = sum(stamps[1::2]) - sum(stamps[::2])
            if repeat:  # the first pass warms up
                shares.append(in_hooks / (total - in_hooks))
    for handle in handles:
        handle.remove()
    torch.set_num_threads(n_threads)
    return shares
