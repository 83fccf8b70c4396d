"""Fisher information of a checkpoint that is larger than memory: one decoder layer at a time.

What `fisher` computes, by hand-made backpropagation over the layers:

1. Embeddings and vision tower run each sequence once, then each layer in turn, without gradients.
   Every layer's input goes to a file.
2. Final norm and output head, transformers' own code behind the layers, give log p(answer), its
   gradient at the last layer's output, and that of the final norm.
3. From the last layer to the first, each is loaded again, repeats its forward pass on the kept
   input, and takes the gradient at its output back to its input. The gradients of its own weights
   are squared, a sequence at a time, and added up.

In memory are at most embeddings, head and vision tower, later one layer with its gradients and its
sums. On disk lie the inputs of all layers: layers * tokens * hidden numbers.
"""

import gc
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import LINEAR, NORM_BIAS, Family, canonical_name, get_family, group_of
from merge.fisher import scored_tokens, sequence_log_likelihoods
from merge.inputs import check_record, model_inputs, numbered
from merge.shell import LayerLoader, Shell, load_shell
from merge.spill import empty_folder, read_values, write_values
from merge.sums import (
    WHOLE,
    Record,
    Shard,
    SumWriter,
    shard_name,
    shard_suffix,
    weight_checksums,
)


def stream_fisher(
    checkpoint: Checkpoint,
    batches: Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    shard: Shard = WHOLE,
    families: str | Path | None = None,
) -> Path:
    """Makes the Fisher information of a checkpoint's language tensors a layer at a time.

    Args:
        checkpoint: What is calibrated.
        batches: As `fisher.collect_fisher` takes them, one sequence each.
        output: Folder of the statistics file; activations lie in `.streaming-fisher` there, until
            the end.
        dtype: In which the model runs; the checkpoint's own when None.
        device: Where the layers run.
        shard: (rank, world) when `batches` are every world-th from the rank-th on.
        families: YAML file with further families.

    Returns:
        The file, equal to that of a whole-model run but for rounding.

    Raises:
        MergeError: An unsupported model, no tokens, a batch of several sequences, a full disk.
    """
    family = get_family(checkpoint.config.get("model_type"), str(checkpoint.folder), families)
    folder = Path(output) / f".streaming-fisher{shard_suffix(shard)}"
    empty_folder(folder)
    target = torch.device(device)
    shell = load_shell(checkpoint, family, dtype, target, has_head=True)
    layers, loader = shell.layers, LayerLoader(checkpoint, family, shell.dtype, target)
    items = list(numbered(batches, shard, "embed"))
    record = Record()
    scored = [_check_single(scored_tokens(record, number, batch)) for number, batch in items]
    check_record(record)
    kept = [index for index, mask in enumerate(scored) if bool(mask.any())]
    # a sequence without an answer has no likelihood, and no part in the mean
    record.sequences = len(kept)
    for position in kept:
        hidden, calls = shell.calls(model_inputs(items[position][1], shell.device))
        write_values(_hidden(folder, 0, position), hidden)
        write_values(_arguments(folder, position), calls)
    for index, layer in enumerate(tqdm(layers, desc="forward", unit="layer", disable=None)):
        with loader.loaded(layer, index), torch.no_grad():
            for position in kept:
                _forward(folder, layer, index, position)
    head_sums: dict[str, Tensor] = {}
    for position in kept:
        _differentiate_head(
            shell, family, items[position][1], scored[position], folder, position, head_sums
        )
    del shell, items
    gc.collect()  # embeddings, head and vision tower
    writer = SumWriter(
        Path(output) / shard_name("fisher", shard),
        "fisher",
        {**_layer_shapes(family, layers), **{k: tuple(v.shape) for k, v in head_sums.items()}},
        record,
        weights=weight_checksums(checkpoint, family, "fisher"),
        shard=shard,
    )
    for name, total in head_sums.items():
        writer.write(name, total)
    backwards = reversed(list(enumerate(layers)))
    for index, layer in tqdm(backwards, "backward", len(layers), unit="layer", disable=None):
        with loader.loaded(layer, index):
            sums = _backward(folder, layer, family, index, kept)
        for name, total in sums.items():
            writer.write(name, total)
    path = writer.finish()
    shutil.rmtree(folder)
    return path


def _check_single(scored: Tensor) -> Tensor:
    if len(scored) != 1:
        raise MergeError(
            f"calibration: Fisher information a layer at a time takes one sequence a batch, not "
            f"{len(scored)}"
        )
    return scored


def _hidden(folder: Path, layer: int, position: int) -> Path:
    """What a layer gets; behind the last one, what it gives."""
    return folder / f"hidden-{layer}-{position}.safetensors"


def _gradient(folder: Path, position: int) -> Path:
    """Gradient at the output of the layer whose turn it is."""
    return folder / f"gradient-{position}.safetensors"


def _arguments(folder: Path, position: int) -> Path:
    return folder / f"arguments-{position}.safetensors"


def _forward(folder: Path, layer: nn.Module, index: int, position: int) -> None:
    device = next(layer.parameters()).device
    calls = _arguments(folder, position)
    hidden = read_values(_hidden(folder, index, position), device)
    result = _first(layer(hidden, **read_values(calls, device, "layers", index)))
    try:
        added = read_values(calls, device, "added", index)
    except IndexError:  # behind the last layer the model itself goes on
        added = None
    write_values(_hidden(folder, index + 1, position), result if added is None else result + added)


def _differentiate_head(
    shell: Shell,
    family: Family,
    batch: Mapping[str, Any],
    scored: Tensor,
    folder: Path,
    position: int,
    sums: dict[str, Tensor],
) -> None:
    """Runs what is behind the layers; keeps the gradient there, adds the final norm's square."""
    n_layers = len(shell.stubs)
    leaf = read_values(_hidden(folder, n_layers, position), shell.device).requires_grad_()
    parameters = {
        canonical: parameter
        for name, parameter in shell.model.named_parameters()
        if (canonical := canonical_name(family, name)) is not None
        and group_of(family, canonical) == NORM_BIAS
    }
    shell.model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_()
    shell.stubs[-1].output = leaf
    try:
        [likelihood] = sequence_log_likelihoods(shell.model, batch, scored)
    finally:
        shell.stubs[-1].output = None
    gradient, *own = torch.autograd.grad(likelihood, [leaf, *parameters.values()])
    write_values(_gradient(folder, position), gradient)
    for name, value in zip(parameters, own, strict=True):
        square = value.float().square()
        sums[name] = sums[name] + square if name in sums else square


def _backward(
    folder: Path, layer: nn.Module, family: Family, index: int, positions: list[int]
) -> dict[str, Tensor]:
    """Takes every sequence's gradient through one layer; returns the summed squares, fp32."""
    device = next(layer.parameters()).device
    parameters = _parameters(family, layer, index)
    sums = {
        name: torch.zeros(parameter.shape, dtype=torch.float32, device=device)
        for name, parameter in parameters.items()
    }
    layer.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_()
    for position in positions:
        hidden = read_values(_hidden(folder, index, position), device).requires_grad_()
        arguments = read_values(_arguments(folder, position), device, "layers", index)
        result = _first(layer(hidden, **arguments))
        gradient, *own = torch.autograd.grad(
            result,
            [hidden, *parameters.values()],
            read_values(_gradient(folder, position), device),
            allow_unused=True,
        )
        write_values(_gradient(folder, position), gradient)
        _hidden(folder, index + 1, position).unlink(missing_ok=True)
        for total, value in zip(sums.values(), own, strict=True):
            if value is not None:
                total.addcmul_(value.float(), value.float())
    return sums


def _parameters(family: Family, layer: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """Canonical name -> linears, biases and norms of a decoder layer."""
    named = {
        f"model.layers.{index}.{name}": parameter for name, parameter in layer.named_parameters()
    }
    groups = (LINEAR, NORM_BIAS)
    return {name: value for name, value in named.items() if group_of(family, name) in groups}


def _layer_shapes(family: Family, layers: list[nn.Module]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(parameter.shape)
        for index, layer in enumerate(layers)
        for name, parameter in _parameters(family, layer, index).items()
    }


def _first(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor
