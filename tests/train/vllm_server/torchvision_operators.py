"""Lets the torchvision of PyPI be imported beside a torch without CUDA.

Its compiled half cannot be loaded there, and its Python half registers shapes for two operators of
that half. Declared here, they satisfy it; what is pure Python (resizing, normalising) is real. Runs
at every start of the interpreter, from a .pth file, and does nothing until torchvision is imported.
"""

import sys
from typing import Any


class _BeforeTorchvision:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        global library  # an operator lives as long as its library
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
