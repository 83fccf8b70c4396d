"""The policy's weights as files: safetensors shards under the names that a checkpoint has.

A LoRA adapter is merged into what is written, never into the policy itself: merging and taking back
would round its base weights a little with every update. Under ZeRO-3 every process walks through
the weights, and no more than one tensor (with its adapter) is whole at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from train.policy import causal_model

SHARD_BYTES = 2**31
"""Tensors are collected up to this size before they are written: what main memory has to hold."""


def write_weights(model: Any, folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes the weights of a model; under ZeRO-3 the other processes `gather_along` meanwhile.

    Args:
        model: the policy, or a PEFT wrapper around it.
        folder: an empty folder.
        shard_bytes: size of a file, more or less.

    Returns:
        Number of tensors.
    """
    shard: dict[str, torch.Tensor] = {}
    n_bytes = n_shards = n_tensors = 0
    for name, tensor in merged_weights(model):
        shard[name] = tensor
        n_bytes += tensor.nbytes
        n_tensors += 1
        if n_bytes >= shard_bytes:
            save_file(shard, folder / f"weights-{n_shards:05}.safetensors")
            shard, n_bytes, n_shards = {}, 0, n_shards + 1
    if shard:
        save_file(shard, folder / f"weights-{n_shards:05}.safetensors")
    return n_tensors


def weight_bytes(model: Any) -> int:
    """Bytes of the tensors that `write_weights` writes."""
    written = [parameters[0] for _, parameters, _ in _pieces(model)]
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in written)


def gather_along(model: Any) -> None:
    """Takes this process' part in another's `write_weights`: under ZeRO-3 it has a share of all."""
    for _, parameters, _ in _pieces(model):
        with _whole(parameters):
            pass


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, CPU copy) of every weight, adapters merged in; a tied head comes once, as embedding.

    Args:
        model: a transformers model, or a PEFT wrapper around one.
    """
    for name, parameters, copied in _pieces(model):
        with _whole(parameters):
            tensor = copied()
        yield name, tensor


_Piece = tuple[str, list[torch.nn.Parameter], Callable[[], torch.Tensor]]
"""Name of a weight, the parameters that it is made of, its own first, and what copies them."""


def _pieces(model: Any) -> Iterator[_Piece]:
    """Every weight, in an order that all processes share."""
    core = causal_model(model)
    adapted = {
        name: module
        for name, module in core.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "merge")
    }
    saved_whole = {
        name: module for name, module in core.named_modules() if hasattr(module, "modules_to_save")
    }
    for name, parameter in core.named_parameters():  # a tied weight is listed once
        as_it_is = [parameter], partial(_copy, parameter)
        owner = _owner(name, adapted)
        if owner is not None:
            layer = adapted[owner]
            if name == f"{owner}.base_layer.weight":
                yield f"{owner}.weight", [parameter, *layer.parameters()], partial(_merged, layer)
            elif name.startswith(f"{owner}.base_layer."):
                yield name.replace(".base_layer.", "."), *as_it_is
            continue
        owner = _owner(name, saved_whole)
        if owner is None:
            yield name, *as_it_is
            continue
        inside = f"{owner}.modules_to_save.{saved_whole[owner].active_adapter}."
        if name.startswith(inside):
            yield f"{owner}.{name.removeprefix(inside)}", *as_it_is


@contextmanager
def _whole(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """These parameters with all their elements; under ZeRO-3 all processes gather them together."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(parameters):
        yield


def _merged(layer: Any) -> torch.Tensor:
    """The layer's weight with its active adapters, whichever kind they are; the layer stays."""
    weight = layer.base_layer.weight
    before = weight.detach().clone()
    layer.merge()
    try:
        return _copy(weight)
    finally:
        layer.unmerge()
        weight.data.copy_(before)  # exactly: unmerge subtracts what merge had rounded


def _owner(name: str, modules: dict[str, Any]) -> str | None:
    """The one of `modules` that holds the parameter `name`."""
    return next((owner for owner in modules if name.startswith(f"{owner}.")), None)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
