"""Calibration of a checkpoint that is larger than memory: one decoder layer at a time.

1. The model without its decoder layers runs each batch once. That gives the first layer's input,
   what every layer is called with beside it (masks, positions; they differ by layer in Gemma-3),
   and what the model adds between layers (Qwen3-VL). All of it goes to files in a work folder.
2. Each layer in turn is loaded, runs every batch's hidden states, and is freed. The hooks of
   `inputs` sum on the way. For `inverse` and `gram` the full E[x x^T] of one layer is in memory at
   a time.

In memory are at most the embeddings and the vision tower, later one layer and one batch. The
arithmetic is that of the whole model, on the same numbers: the statistics are equal bit for bit.
A killed run goes on with the layer it was in, as long as data, weights and settings are the same.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import Family, get_family
from merge.inputs import (
    InputSums,
    check_record,
    count_batch,
    model_inputs,
    numbered,
    shared_inputs,
    watched_linears,
)
from merge.shell import LayerLoader, Shell, load_shell
from merge.spill import empty_folder, read_values, write_values
from merge.sums import (
    DAMPING,
    WHOLE,
    Record,
    Shard,
    SumWriter,
    shard_name,
    shard_suffix,
    weight_checksums,
)

# in this order, since `inverse` overwrites the products that `gram` writes
INPUT_KINDS = ("diagonal", "gram", "inverse")


@dataclass
class _Run:
    """Where a run keeps its files, and how far it is."""

    folder: Path
    key: str
    """Hash of all that decides on the result."""
    record: Record
    next_layer: int

    def arguments(self, position: int) -> Path:
        """What the layers are called with for one batch."""
        return self.folder / f"arguments-{position}.safetensors"

    def hidden(self, layer: int, position: int) -> Path:
        """What a layer gets as hidden states of one batch."""
        return self.folder / f"hidden-{layer}-{position}.safetensors"

    def finish_layer(self) -> None:
        """Notes that a layer's sums are written; its input is of no use any more."""
        done = self.next_layer
        self.next_layer += 1
        self.save()
        for position in range(len(self.record.digests)):
            self.hidden(done, position).unlink(missing_ok=True)

    def save(self) -> None:
        """Notes how far the run is; a kill leaves the old note or the new one."""
        part = self.folder / "run.json.part"
        part.write_text(json.dumps({"key": self.key, "next_layer": self.next_layer}))
        part.replace(self.folder / "run.json")


def stream_statistics(
    checkpoint: Checkpoint,
    batches: Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    kinds: Sequence[str] = ("diagonal",),
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    damping: float = DAMPING,
    shard: Shard = WHOLE,
    families: str | Path | None = None,
) -> dict[str, Path]:
    """Makes statistics of linear inputs a layer at a time.

    Args:
        checkpoint: What is calibrated.
        batches: As `collect_second_moments` takes them; iterated once more on a resumed run.
        output: Folder of the statistics files; hidden states and progress lie in `.streaming`
            there, one a shard, until the end. That takes twice the hidden states of all batches.
        kinds: Of diagonal, inverse, gram.
        dtype: In which the model runs; the checkpoint's own when None.
        device: Where the layers run.
        damping: Of `inverse`: share of the mean diagonal that is added before inverting.
        shard: (rank, world) when `batches` are every world-th from the rank-th on; the files are
            then sums for `sums.merge_shards`.
        families: YAML file with further families.

    Returns:
        Kind -> file.

    Raises:
        MergeError: An unknown kind or family, bad data, a damaged checkpoint, or a full disk.
    """
    for kind in kinds:
        if kind not in INPUT_KINDS:
            raise MergeError(f"calibration: {kind} is not one of {', '.join(INPUT_KINDS)}")
    if iter(batches) is batches:
        batches = list(batches)
    family = get_family(checkpoint.config.get("model_type"), str(checkpoint.folder), families)
    folder = Path(output) / f".streaming{shard_suffix(shard)}"
    target = torch.device(device)
    weights = weight_checksums(checkpoint, family, "diagonal")
    settings = [sorted(kinds), str(dtype), damping, list(shard), weights, _stamps(checkpoint)]
    shell = load_shell(checkpoint, family, dtype, target)
    layers, loader = shell.layers, LayerLoader(checkpoint, family, shell.dtype, target)

    def open_writers(record: Record) -> dict[str, SumWriter]:
        return {
            kind: SumWriter(
                Path(output) / shard_name(kind, shard),
                kind,
                _shapes(family, layers, kind),
                record,
                aliases=_aliases(family, len(layers)),
                weights=weights,
                shard=shard,
                damping=damping,
            )
            for kind in sorted(kinds, key=INPUT_KINDS.index)
        }

    run = _find_run(folder, settings, batches, shard)
    writers = open_writers(run.record) if run else {}
    if run is None or not all(writer.is_resumed for writer in writers.values()):
        run = _capture(shell, batches, folder, settings, shard)
        writers = open_writers(run.record)
    del shell
    gc.collect()  # embeddings and vision tower, should a cycle hold them
    todo = range(run.next_layer, len(layers))
    for index in tqdm(todo, desc="calibrate", unit="layer", disable=None):
        is_last = index == len(layers) - 1
        with loader.loaded(layers[index], index) as layer:
            sites = watched_linears(family, layer, index)
            sums = _run_layer(run, layer, sites, kinds, index, is_last)
        for name in sites:
            for kind, writer in writers.items():
                totals = sums.squares if kind == "diagonal" else sums.grams
                writer.write(name, totals[name])
            sums.grams.pop(name, None)  # the next layer's are as large
        run.finish_layer()
    paths = {kind: writer.finish() for kind, writer in writers.items()}
    shutil.rmtree(folder)
    return paths


def _find_run(
    folder: Path, settings: Sequence[Any], batches: Iterable[Mapping[str, Any]], shard: Shard
) -> _Run | None:
    """Returns the run that was killed in this folder, if it was for the same result."""
    try:
        entries = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        key, next_layer = entries["key"], int(entries["next_layer"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    record = Record()
    for number, batch in numbered(batches, shard, "compare data"):
        count_batch(record, number, batch)
    if key != _key(settings, record):
        return None
    return _Run(folder, key, record, next_layer)


def _capture(
    shell: Shell,
    batches: Iterable[Mapping[str, Any]],
    folder: Path,
    settings: Sequence[Any],
    shard: Shard,
) -> _Run:
    """Runs every batch up to the first layer, and keeps what the layers will be called with."""
    empty_folder(folder)
    run = _Run(folder, "", Record(), 0)
    for position, (number, batch) in enumerate(numbered(batches, shard, "embed")):
        mask = count_batch(run.record, number, batch)
        hidden, calls = shell.calls(model_inputs(batch, shell.device))
        write_values(run.hidden(0, position), hidden)
        write_values(run.arguments(position), {"mask": mask, **calls})
    check_record(run.record)
    run.key = _key(settings, run.record)
    run.save()
    return run


def _run_layer(
    run: _Run,
    layer: nn.Module,
    sites: Mapping[str, nn.Module],
    kinds: Sequence[str],
    index: int,
    is_last: bool,
) -> InputSums:
    """Runs all batches through one layer, and keeps what the next one gets."""
    device = next(layer.parameters()).device
    wants_grams = bool({"gram", "inverse"} & set(kinds))
    with InputSums(sites, squares="diagonal" in kinds, grams=wants_grams) as sums, torch.no_grad():
        for position in range(len(run.record.digests)):
            calls = run.arguments(position)
            sums.mask = read_values(calls, device, "mask")
            hidden = read_values(run.hidden(index, position), device)
            result = layer(hidden, **read_values(calls, device, "layers", index))
            if is_last:
                continue
            result = result[0] if isinstance(result, tuple) else result
            added = read_values(calls, device, "added", index)
            write_values(
                run.hidden(index + 1, position), result if added is None else result + added
            )
    sums.check()
    return sums


def _shapes(family: Family, layers: Sequence[nn.Module], kind: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(layers):
        for name, linear in watched_linears(family, layer, index).items():
            n = linear.get_parameter("weight").shape[1]
            shapes[name] = (n,) if kind == "diagonal" else (n, n)
    return shapes


def _aliases(family: Family, n_layers: int) -> dict[str, str]:
    return {k: v for index in range(n_layers) for k, v in shared_inputs(family, index).items()}


def _stamps(checkpoint: Checkpoint) -> list[list[Any]]:
    """Sizes and times of the files: what `weights` does not cover, such as the vision tower."""
    stats = [(file.path.name, file.path.stat()) for file in checkpoint.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _key(settings: Sequence[Any], record: Record) -> str:
    text = json.dumps([*settings, record.to_json()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
