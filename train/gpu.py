"""What this process computes on: whether in bf16, what is free on a GPU, giving memory back.

No torch at import: a process that has no model asks here, too.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def computes_in_bf16() -> bool:
    """Whether there is a GPU that does; where it is emulated, it is slower than fp32."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def processor_computes_in_bf16() -> bool:
    """Whether the processor multiplies in bf16, as far as torch can tell.

    Where it does, autocast is 1.6 times as fast as fp32; emulated, 2.6 times as slow (docs/log.md).
    """
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch do not say
    known = ask() if ask is not None else {}
    # x86 has avx512_bf16 and amx_bf16, ARM has bf16 and sve_bf16
    return any(bool(has) for name, has in known.items() if name.endswith("bf16"))


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that tensors may take, None of another device.

    What torch keeps of tensors that are gone counts as taken on the GPU, but is free for us.
    """
    import torch

    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def give_back() -> None:
    """Gives back memory that this process holds of models that are done; others need it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()  # what hangs in cycles would lie beside the next model
        torch.cuda.empty_cache()
