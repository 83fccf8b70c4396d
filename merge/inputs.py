"""What is watched while a model runs: inputs of linears, and which tokens of a batch count.

Four places a decoder layer are watched, since q, k and v share their input, and so do gate and up.
`calibration` runs a whole model under these hooks, `streaming` one layer at a time; both sum the
same rows in the same order, so both get the same bits.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from merge.errors import MergeError
from merge.families import Family
from merge.sums import Record, Shard

ATTENTION_RULE = "attention_mask"
CALIBRATION_RULE = "attention_mask and calibration_mask"
GRAM_BLOCK = 1024
"""Rows of x x^T that are computed at a time, so that the fp32 product stays small."""


class InputSums:
    """Sums of squares, and of products when asked, of the inputs of watched linears.

    A context manager: the hooks are there inside the block. `mask` is set before each batch.

    Args:
        sites: Name -> linear whose input is watched.
        squares: Sum x_j^2.
        grams: Sum x x^T.
    """

    def __init__(
        self, sites: Mapping[str, nn.Module], *, squares: bool = True, grams: bool = False
    ) -> None:
        self.mask: Tensor | None = None
        """Bool [B, T] of the tokens that count."""
        self.squares: dict[str, Tensor] = {}
        """Name -> fp64 [in]."""
        self.grams: dict[str, Tensor] = {}
        """Name -> fp64 [in, in]."""
        self._sites = sites
        self._sums_squares, self._sums_grams = squares, grams
        self._handles: list[Any] = []

    def __enter__(self) -> "InputSums":
        for name, linear in self._sites.items():
            self._handles.append(linear.register_forward_pre_hook(self._make_hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Refuses sums that say nothing.

        Raises:
            MergeError: A linear was never called, or an input was not finite.
        """
        for name in self._sites:
            sums = [kind[name] for kind in (self.squares, self.grams) if name in kind]
            if not sums:
                raise MergeError(f"calibration: {name} was never called; give the language module")
            # of the sum, for isfinite of a matrix makes another one as large
            if not all(bool(torch.isfinite(total.sum())) for total in sums):
                raise MergeError(
                    f"calibration: inputs of {name} are not finite; load the model in bfloat16 or "
                    "float32"
                )

    def _make_hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden, mask = inputs[0], self.mask  # [B, T, in], [B, T]
            assert mask is not None
            if hidden.shape[:2] != mask.shape:
                raise MergeError(
                    f"calibration: {name} sees {list(hidden.shape[:2])} tokens, the mask has "
                    f"{list(mask.shape)}; give an attention_mask as long as input_ids"
                )
            # Rows are selected, not multiplied by the mask: padding may hold NaN, which 0 keeps.
            rows = (hidden.flatten(0, 1) if bool(mask.all()) else hidden[mask]).float()
            if self._sums_grams:
                self._add_gram(name, rows)
            if self._sums_squares:
                # A copy is squared in place, as new memory costs time; fp32 is the model's own.
                is_copy = rows.data_ptr() != hidden.data_ptr()
                square = (rows.square_() if is_copy else rows.square()).sum(0).double()
                self.squares[name] = self.squares[name] + square if name in self.squares else square

        return add

    def _add_gram(self, name: str, rows: Tensor) -> None:
        n = rows.shape[1]
        if name not in self.grams:
            self.grams[name] = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
        for begin in range(0, n, GRAM_BLOCK):
            block = rows[:, begin : begin + GRAM_BLOCK]
            self.grams[name][begin : begin + GRAM_BLOCK] += block.T @ rows


def watched_linears(family: Family, layer: nn.Module, index: int) -> dict[str, nn.Module]:
    """Canonical name -> linear of a decoder layer at which an input is watched."""
    return {
        f"model.layers.{index}.{site}": layer.get_submodule(site) for site in family.input_sites
    }


def shared_inputs(family: Family, index: int) -> dict[str, str]:
    """Canonical name of a linear -> that of the watched linear with the same input."""
    return {
        f"model.layers.{index}.{linear}": f"model.layers.{index}.{site}"
        for site, linears in family.input_sites.items()
        for linear in linears
        if linear != site
    }


def numbered(
    batches: Iterable[Mapping[str, Any]], shard: Shard, description: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields a shard's batches with their numbers among all shards' batches, and shows progress."""
    rank, world = shard
    shown = tqdm(batches, desc=description, unit="batch", disable=None)
    for position, batch in enumerate(shown):
        yield rank + position * world, batch


def count_batch(record: Record, number: int, batch: Mapping[str, Any]) -> Tensor:
    """Enters a batch into the record.

    Returns:
        Bool [B, T] of the tokens that count.

    Raises:
        MergeError: A mask of the wrong shape, or one that other batches do not have.
    """
    rule = CALIBRATION_RULE if "calibration_mask" in batch else ATTENTION_RULE
    if record.mask_rule not in ("", rule):
        raise MergeError("calibration: give calibration_mask with every batch, or with none")
    mask = token_mask(batch)
    record.mask_rule = rule
    record.tokens += int(mask.sum())
    record.sequences += len(mask)
    record.digests[number] = hash_batch(batch)
    return mask


def check_record(record: Record) -> None:
    """Refuses a run that saw nothing.

    Raises:
        MergeError: No batches, or no tokens that count.
    """
    if not record.digests:
        raise MergeError("calibration: no batches; raise calibration.samples")
    if not record.tokens:
        raise MergeError("calibration: the masks leave no tokens; check calibration_mask")


def token_mask(batch: Mapping[str, Any]) -> Tensor:
    """Returns a bool mask [B, T] of the tokens that count."""
    attention = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if attention is None else attention
    mask = mask.bool()
    extra = batch.get("calibration_mask")
    if extra is None:
        return mask
    if extra.shape != mask.shape:
        raise MergeError(
            f"calibration: calibration_mask has shape {list(extra.shape)}, attention_mask "
            f"{list(mask.shape)}; they must agree"
        )
    return mask & extra.bool()


def hash_batch(batch: Mapping[str, Any]) -> str:
    """Returns the sha256 of a batch's tensors as hexadecimal text."""
    digest = hashlib.sha256()
    for key, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns what the model takes of a batch, on its device, for one plain forward pass."""
    inputs = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key not in ("calibration_mask", "labels")
    }
    return {**inputs, "use_cache": False}
