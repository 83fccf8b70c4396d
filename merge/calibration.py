"""Second moments of linear inputs: what OBM needs to know about the data.

For every linear of the language module, and every input channel j,

    h[j] = mean over calibration tokens of x_j^2

is the diagonal of E[x x^T], that is half the diagonal of the layer-wise Hessian (SparseGPT, OBM).
Only tokens count, not padding: a mask captured with each batch selects the rows before they are
summed. Squares are summed in fp32 within a batch and in fp64 across batches; the result is fp32.

A vision-language model sees its images: they pass through the vision tower, and their tokens count
as any other. This file runs a model that is in memory; `streaming` runs one that is larger.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge.errors import MergeError, OtherDataError
from merge.families import get_family
from merge.inputs import (
    InputSums,
    check_record,
    count_batch,
    hash_batch,
    model_inputs,
    numbered,
    shared_inputs,
    watched_linears,
)
from merge.shards import SafetensorsFile
from merge.stats import StatsWriter
from merge.sums import WHOLE, Record, Shard, SumWriter, read_f64

UNFINISHED = "obm-warmstart unfinished sums 1"


@dataclass
class SecondMoments:
    """Sums of squared inputs, and what they run over."""

    sums: dict[str, Tensor]
    """Watched linear (`model.layers.0.self_attn.q_proj`) -> fp64 [in]."""
    aliases: dict[str, str]
    """Linear -> the watched one that has the same input."""
    record: Record
    shard: Shard = WHOLE

    def vectors(self) -> dict[str, Tensor]:
        """Every linear's name -> its fp32 vector h [in]."""
        means = {name: (sums / self.record.tokens).float() for name, sums in self.sums.items()}
        return means | {linear: means[watched] for linear, watched in self.aliases.items()}


def collect_second_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    language_module: nn.Module | None = None,
    shard: Shard = WHOLE,
    unfinished: str | Path | None = None,
    families: str | Path | None = None,
) -> SecondMoments:
    """Runs calibration batches through a model and sums squared linear inputs over tokens.

    Args:
        model: A causal language model or vision-language model of a known family, on any device.
        batches: Keyword arguments for `model(**batch)`: input_ids [B, T], attention_mask [B, T]
            (1 = token), image inputs of the VLM, and optionally `calibration_mask` [B, T] that
            leaves out further tokens (1 = counts). Without attention_mask all tokens count.
        language_module: The module that holds `layers`; found by the model's family when None.
        shard: (rank, world) when `batches` are every world-th from the rank-th on.
        unfinished: File that keeps the sums after each batch. A run that finds it skips the
            batches in it, so a killed run goes on; the caller removes it in the end.
        families: YAML file with further families.

    Raises:
        MergeError: An unsupported model, no tokens, a mask of the wrong shape, a linear that was
            never called, or activations that are not finite.
        OtherDataError: `unfinished` is of other data.
    """
    where = type(model).__name__
    family = get_family(getattr(model.config, "model_type", None), where, families)
    language = language_module or model.get_submodule(family.language_module)
    sites: dict[str, nn.Module] = {}
    aliases: dict[str, str] = {}
    for index, layer in enumerate(language.get_submodule("layers").children()):
        sites |= watched_linears(family, layer, index)
        aliases |= shared_inputs(family, index)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with InputSums(sites) as inputs, torch.no_grad():
            record = Record()
            if unfinished is not None and Path(unfinished).exists():
                record, sums = _read_unfinished(Path(unfinished))
                inputs.squares |= {name: total.to(device) for name, total in sums.items()}
            for number, batch in numbered(batches, shard, "calibrate"):
                if number in record.digests:
                    _check_same(record, number, batch, unfinished)
                    continue
                inputs.mask = count_batch(record, number, batch).to(device)
                # logits_to_keep=1: the vocabulary's logits are of no use here, and large
                model(**model_inputs(batch, device), logits_to_keep=1)
                if unfinished is not None:
                    _write_unfinished(Path(unfinished), record, inputs.squares)
    finally:
        model.train(was_training)
    check_record(record)
    inputs.check()
    return SecondMoments(inputs.squares, aliases, record, shard)


def save_stats(
    moments: SecondMoments, path: str | Path, *, weights: Mapping[str, str] | None = None
) -> Path:
    """Writes a statistics file of kind diagonal, or a shard's sums; equal input, equal bytes.

    Args:
        moments: What `collect_second_moments` returned.
        path: File to write, replaced when it exists.
        weights: Canonical name -> checksum of the checkpoint's tensor; a merge refuses statistics
            that were made with other weights. Empty when unknown.

    Raises:
        MergeError: The file cannot be written.
    """
    writer = SumWriter(
        path,
        "diagonal",
        {name: tuple(sums.shape) for name, sums in moments.sums.items()},
        moments.record,
        aliases=moments.aliases,
        weights=weights,
        shard=moments.shard,
    )
    for name, sums in moments.sums.items():
        writer.write(name, sums)
    return writer.finish()


def _write_unfinished(path: Path, record: Record, sums: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(total.shape) for name, total in sums.items()}
    entries = {"format": UNFINISHED, "record": record.to_json()}
    writer = StatsWriter(path, "diagonal", shapes, entries, dtype="F64")
    for name, total in sums.items():
        writer.write(name, total.cpu().numpy())
    writer.finish()


def _read_unfinished(path: Path) -> tuple[Record, dict[str, Tensor]]:
    file = SafetensorsFile(path)
    try:
        if file.metadata["format"] != UNFINISHED:
            raise ValueError
        record = Record.from_json(file.metadata["record"])
    except (KeyError, TypeError, json.JSONDecodeError, ValueError) as error:
        raise MergeError(f"{path}: holds no unfinished calibration; remove it") from error
    return record, {name: read_f64(file, name) for name in file.tensors}


def _check_same(
    record: Record, number: int, batch: Mapping[str, Any], unfinished: str | Path | None
) -> None:
    if record.digests[number] != hash_batch(batch):
        raise OtherDataError(
            f"{unfinished}: was begun with other data (batch {number} differs); remove it to "
            "start anew"
        )
