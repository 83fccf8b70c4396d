"""The gate of CAST (conflict-aware sparse tuning, arXiv 2601.04262): chosen heads stay as they are.

The paper's "skipping these heads during training" is read here as: no bit of a gated head's slices
of q_proj, k_proj, v_proj and o_proj changes (`train.heads` says which these are), all else trains.
The paper does not say what becomes of keys and values that gated and trained heads share; the
setting `freeze_heads.shared` is ours.

How it holds to the bit:
* A hook on the parameter zeroes the slices of its gradient before anything else reads it, so before
  DeepSpeed, DDP or accumulation. Sums over processes, clipping and the logged norm see the zeros.
* Adam's moments of a number whose gradient was always 0 are 0, and so is its update, in float32
  master weights and in the shares that ZeRO cuts. Optimizers that mix entries are refused.
* Decoupled weight decay would move them: tensors that hold gated slices get none, as a whole.
* In an adapter, rows of B (q, k, v) or columns of A (o) are set to 0 and gated, so that the product
  is 0 there. Before the first step B is 0, so the policy stays the same.
* At every save and at the end the slices are compared with those of the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from configs.errors import ConfigError
from train.heads import (
    Head,
    Slice,
    attention_modules,
    base_layer,
    full_shape,
    group_slices,
    head_layout,
    layer_slices,
    own_slices,
)
from train.policy import causal_model

ENTRYWISE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Values of `optim` whose update of a number is 0 where its gradients were 0."""
ENTRYWISE_DEEPSPEED = ("adam", "adamw", "sgd", "adagrad")

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class GatedTensor:
    """A trained parameter that holds slices of gated heads."""

    name: str
    """in the model's `named_parameters`"""
    parameter: Any
    dim: int
    spans: Spans
    """[start, stop) along `dim`, in order"""
    is_adapter: bool

    @property
    def n_numbers(self) -> int:
        """Gated numbers."""
        shape = full_shape(self.parameter)
        rows = sum(stop - start for start, stop in self.spans)
        return rows * int(torch.Size(shape).numel()) // shape[self.dim]


def zero_slices(tensor: torch.Tensor, dim: int, spans: Spans) -> torch.Tensor:
    """A copy with zeros in the spans along `dim`, any NaN there included."""
    gated = tensor.clone()
    for start, stop in spans:
        gated.narrow(dim, start, stop - start).zero_()
    return gated


def gate_heads(model: Any, heads: Collection[Head], shared: str = "most") -> HeadGate:
    """Gates heads of a model that is about to be trained.

    Args:
        model: the policy, in a PEFT wrapper or not, sharded by ZeRO-3 or not; what is not to be
            trained is frozen already.
        heads: which.
        shared: when keys and values of a group, and the norms of a layer, are gated, too: with
            `most` (more than half), `all` or `any` of the query heads that use them.

    Raises:
        ConfigError: heads that the model does not have or that are not trained, an unknown
            architecture or adapter.
    """
    return HeadGate(model, plan_gate(model, heads, shared))


class HeadGate:
    """Hooks on parameters; while they are there, their gated slices get no gradient."""

    def __init__(self, model: Any, tensors: Sequence[GatedTensor]) -> None:
        self.model, self.tensors = model, list(tensors)
        for tensor in self.tensors:
            if tensor.is_adapter:
                with _whole(tensor.parameter, writes=True), torch.no_grad():
                    zeroed = zero_slices(tensor.parameter.data, tensor.dim, tensor.spans)
                    tensor.parameter.data.copy_(zeroed)
        self._handles = [
            tensor.parameter.register_hook(self._hook(tensor)) for tensor in self.tensors
        ]

    @staticmethod
    def _hook(tensor: GatedTensor) -> Any:
        dim, spans = tensor.dim, tensor.spans
        return lambda gradient: zero_slices(gradient, dim, spans)

    @property
    def n_numbers(self) -> int:
        """Numbers that stay as they are."""
        return sum(tensor.n_numbers for tensor in self.tensors)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the gated slices of each tensor; under ZeRO-3 every process must ask."""
        found = {}
        for tensor in self.tensors:
            content = hashlib.sha256()
            with _whole(tensor.parameter):
                for start, stop in tensor.spans:
                    part = tensor.parameter.detach().narrow(tensor.dim, start, stop - start)
                    content.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            found[tensor.name] = content.hexdigest()
        return found

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


def gate_trainer(trainer: Any, heads: Collection[Head], shared: str = "most") -> HeadGate:
    """Gates heads of any trainer of transformers' or TRL's, before `train()` is called.

    Args:
        trainer: GRPO, SFT or DPO, with or without DeepSpeed.
        heads: which.
        shared: see `gate_heads`.

    Raises:
        ConfigError: see `gate_heads`; or an optimizer that would move the slices nevertheless.
    """
    gate = gate_heads(trainer.model, heads, shared)
    whole = {tensor.name for tensor in gate.tensors if not tensor.is_adapter}
    _check_optimizer(trainer, decays=bool(whole))
    decaying = trainer.get_decay_parameter_names

    def without_gated(model: Any) -> list[str]:
        return [name for name in decaying(model) if name not in whole]

    trainer.get_decay_parameter_names = without_gated
    trainer.add_callback(_GateCheck(gate))
    return gate


class _GateCheck(TrainerCallback):
    """Compares gated slices with those at the start, at every save and at the end.

    The start is where DeepSpeed has put the policy into the precision it trains in.
    """

    def __init__(self, gate: HeadGate) -> None:
        self.gate = gate
        self.start: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.gate.checksums()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check()

    def _check(self) -> None:
        now = self.gate.checksums()
        changed = [name for name, checksum in now.items() if checksum != self.start[name]]
        if changed:
            raise RuntimeError(f"gated heads have changed in {', '.join(changed)}")


# ---------------------------------------------------------------- what is gated


def plan_gate(model: Any, heads: Collection[Head], shared: str = "most") -> list[GatedTensor]:
    """The trained parameters that hold slices of these heads; see `gate_heads`."""
    layout = head_layout(causal_model(model).config)
    unknown = sorted(set(heads) - set(layout.heads()))
    if unknown or not heads:
        raise ConfigError(
            f"freeze_heads: the policy has no head {', '.join(map(str, unknown)) or '(none given)'}"
            f"; it has {layout.n_layers} layers of {layout.n_heads}"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spans: dict[tuple[str, int], set[tuple[int, int]]] = {}
    parameters: dict[str, tuple[Any, bool]] = {}
    for layer, (where, attention) in enumerate(attention_modules(model, layout)):
        gated = {head for of_layer, head in heads if of_layer == layer}
        cuts = [cut for head in gated for cut in own_slices(layout, head)]
        for group in range(layout.n_kv_heads):
            if _is_gated(gated, layout.members(group), shared):
                cuts += group_slices(layout, group)
        if _is_gated(gated, range(layout.n_heads), shared):
            hidden = full_shape(base_layer(attention.o_proj).weight)[0]
            cuts += layer_slices(layout, hidden)
        for cut in cuts:
            for parameter, is_adapter in _parameters(attention, cut, where):
                name = names[id(parameter)]
                parameters[name] = parameter, is_adapter
                spans.setdefault((name, cut.dim), set()).add((cut.start, cut.stop))
    if not parameters:
        raise ConfigError(
            "freeze_heads: no parameter of the attention is trained (lora.target_modules names "
            "none of q_proj, k_proj, v_proj, o_proj?), so no head needs freezing; remove it"
        )
    return [
        GatedTensor(name, parameters[name][0], dim, tuple(sorted(found)), parameters[name][1])
        for (name, dim), found in spans.items()
    ]


def _is_gated(gated: Collection[int], users: Collection[int], shared: str) -> bool:
    """Whether what these heads use together is gated."""
    n_gated = sum(head in gated for head in users)
    if shared == "any":
        return n_gated > 0
    return n_gated == len(users) if shared == "all" else 2 * n_gated > len(users)


def _parameters(attention: Any, cut: Slice, where: str) -> Iterator[tuple[Any, bool]]:
    """(parameter, whether of an adapter) that a slice is cut from, those that are trained."""
    projection = getattr(attention, cut.projection, None)
    if projection is None:  # no norms, or no such projection
        return
    own = getattr(base_layer(projection), cut.part, None)
    if own is not None and own.requires_grad:
        yield own, False
    if not hasattr(projection, "base_layer"):
        return
    if not getattr(projection, "lora_A", None) or getattr(
        projection, "lora_magnitude_vector", None
    ):
        raise ConfigError(
            f"freeze_heads: {where}.{cut.projection} has an adapter that is no plain LoRA; "
            "heads cannot be cut out of it"
        )
    if cut.part == "weight":
        for linear in (projection.lora_A if cut.dim == 1 else projection.lora_B).values():
            if getattr(linear, "bias", None) is not None:
                raise ConfigError(
                    f"freeze_heads: the adapter of {where}.{cut.projection} has a bias "
                    "(lora_bias); train it without"
                )
            if linear.weight.requires_grad:
                yield linear.weight, True


@contextmanager
def _whole(parameter: Any, writes: bool = False) -> Iterator[None]:
    """The parameter in one piece, of which ZeRO-3 keeps a share in each process."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if writes else None):
        yield


# ---------------------------------------------------------------- what could move them still


def _check_optimizer(trainer: Any, decays: bool) -> None:
    """Refuses optimizers whose update of a number is not its own gradients' alone.

    Raises:
        ConfigError: names the setting.
    """
    plugin = getattr(trainer.args, "hf_deepspeed_config", None)
    block = plugin.config.get("optimizer") if plugin is not None else None
    if block is not None:
        kind = str(block.get("type", "")).lower()
        decay = block.get("params", {}).get("weight_decay", 0.0)
        decay = trainer.args.weight_decay if decay == "auto" else decay
        if kind not in ENTRYWISE_DEEPSPEED:
            raise ConfigError(
                f"freeze_heads: DeepSpeed's optimizer {block.get('type')!r} may move gated heads; "
                f"use one of {', '.join(ENTRYWISE_DEEPSPEED)}, or none in the JSON file"
            )
        if decay and decays:
            raise ConfigError(
                f"freeze_heads: weight_decay {decay} in DeepSpeed's optimizer would move gated "
                "heads; set it to 0, or remove the optimizer from the JSON file"
            )
        return
    if trainer.optimizer is not None:
        raise ConfigError(
            "freeze_heads: the trainer was given an optimizer of its own; let it make one"
        )
    kind = getattr(trainer.args.optim, "value", trainer.args.optim)
    if kind not in ENTRYWISE_OPTIMIZERS:
        raise ConfigError(
            f"freeze_heads: grpo.optim {kind} may move gated heads; "
            f"use one of {', '.join(ENTRYWISE_OPTIMIZERS)}"
        )
