"""Reads the updates of any number of models of one base, tensor by tensor, and measures them.

Blocks of rows are read by offset and dropped, so memory depends neither on the model nor on its
largest tensor: twice for the entries (the second time the effective supports are known), and some
times more for the spectrum of each matrix. `geometry` and `spectrum` have the maths.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from merge.checkpoint import Checkpoint
from merge.compatibility import canonical_names
from merge.errors import MergeError
from merge.families import (
    EMBED_TOKENS,
    EMBEDDING,
    LINEAR,
    LM_HEAD,
    NORM_BIAS,
    Family,
    get_family,
    group_of,
    layer_of,
    text_types,
)
from merge.geometry import (
    Magnitudes,
    Sums,
    advise,
    average_figures,
    model_figures,
    no_magnitudes,
    no_sums,
    pair_figures,
    sum_entries,
)
from merge.memory import size_words
from merge.shards import MERGEABLE_DTYPES, NUMPY_DTYPES, to_float
from merge.spectrum import Blocks, leading_spectrum, subspace_energy

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
BLOCK_ENTRIES = 1 << 20
"""Entries of one model in memory at a time."""
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Shared:
    """One language tensor that the base and every model have."""

    canonical: str
    group: str
    shape: tuple[int, ...]
    """Of what all have: embeddings may differ in rows."""
    names: Mapping[str, str]
    """Role -> name as stored."""

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer; None outside of them."""
        return layer_of(self.canonical)

    @property
    def module(self) -> str:
        """mlp.up_proj and so on; the whole name outside of the layers."""
        if self.layer is None:
            return self.canonical.removesuffix(".weight")
        return self.canonical.split(".", 3)[3].removesuffix(".weight")


def diagnose(
    base: str | Path,
    models: Mapping[str, str | Path],
    *,
    threshold: float = 1e-5,
    rank: int = 32,
    families: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Measures the updates of models of one base.

    Args:
        base: Folder or hub id of theta_B.
        models: Name -> folder or hub id of theta_k, one or more; a VLM's language module is looked
            at, its vision tower is not.
        threshold: An entry counts as changed where |delta| is above.
        rank: Directions of the base's principal subspace, and singular values that are reported.
        families: YAML file with further model families.
        dry_run: Read headers only.

    Returns:
        The record that diagnose.json holds: see docs/sar.md. For a dry run what would be read.

    Raises:
        MergeError: No models, another architecture or shape, a tensor that only some have, weights
            that are not finite.
    """
    if not models:
        raise MergeError(
            "diagnose: no model; set models.vlm, models.agent, or give --model NAME=DIR"
        )
    if rank < 1:
        raise MergeError(f"diagnose: a rank of {rank} has no directions; use 1 or more")
    roles = {"base": base, **models}
    checkpoints = {role: Checkpoint(source, role) for role, source in roles.items()}
    tensors = _shared_tensors(checkpoints, families)
    names = list(models)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "base": str(base),
        "models": {name: str(source) for name, source in models.items()},
        "threshold": threshold,
        "rank": rank,
    }
    if dry_run:
        return {**record, "dry_run": True, "text": _describe(tensors, checkpoints, rank)}
    rows, parts = [], []
    for tensor in tqdm(tensors, desc="diagnose", unit="tensor", disable=None):
        sums, spectra = _measure(tensor, checkpoints, names, threshold, rank)
        parts.append(sums)
        rows.append({
            "tensor": tensor.canonical, "group": tensor.group, "layer": tensor.layer,
            "module": tensor.module, "shape": list(tensor.shape), **_figures(sums, names),
            "spectra": spectra,
        })  # fmt: skip
    nothing = no_sums(len(names))
    total = sum(parts, nothing)
    # embeddings are often frozen: what a merge has to settle lies in the linears
    linear = [part for part, row in zip(parts, rows, strict=True) if row["group"] == LINEAR]

    def grouped(keys: Sequence[Any]) -> dict[str, Any]:
        found = {}
        for key in dict.fromkeys(keys):
            own = (part for part, its in zip(parts, keys, strict=True) if its == key)
            found[str(key)] = _figures(sum(own, nothing), names)
        return found

    in_layers = [OUTSIDE if row["layer"] is None else row["layer"] for row in rows]
    return {
        **record,
        "total": _figures(total, names),
        "advice": advise(sum(linear, nothing) if linear else total, names),
        "groups": grouped([row["group"] for row in rows]),
        "layers": grouped(in_layers),
        "modules": grouped([row["module"] for row in rows]),
        "tensors": rows,
    }


# ---- which tensors


def _shared_tensors(
    checkpoints: Mapping[str, Checkpoint], families: str | Path | None
) -> list[Shared]:
    """The language tensors, in the base's order; all have them, with the same shapes.

    An output head that some tie to their embeddings is named in the log, and left out.
    """
    names: dict[str, dict[str, str]] = {}
    types: dict[str, tuple[str, ...]] = {}
    own: dict[str, Family] = {}
    for role, checkpoint in checkpoints.items():
        where = f"{role} {checkpoint.source}"
        family = get_family(checkpoint.config.get("model_type"), where, families)
        own[role], types[role] = family, text_types(family, checkpoint.text_config)
        if not set(types[role]) & set(types["base"]):
            raise MergeError(
                f"{where}: is a model of {' or '.join(types[role])}, the base one of "
                f"{' or '.join(types['base'])}; an update is a difference to its own base"
            )
        names[role] = canonical_names(checkpoint, family)
    shared = []
    # the base's names first, then those that only models have
    for canonical in dict.fromkeys(name for role in names for name in names[role]):
        owner = next(role for role in names if canonical in names[role])
        group = group_of(own[owner], canonical)
        if group in (LINEAR, NORM_BIAS, EMBEDDING):
            found = _find(canonical, str(group), owner, checkpoints, names)
            if found is not None:
                shared.append(found)
    return shared


def _find(
    canonical: str,
    group: str,
    owner: str,
    checkpoints: Mapping[str, Checkpoint],
    names: Mapping[str, Mapping[str, str]],
) -> Shared | None:
    """One tensor in all checkpoints; None for an output head that some tie to their embeddings.

    `owner` is the first role that has it.
    """
    stored, shapes = {}, {}
    for role, checkpoint in checkpoints.items():
        if canonical not in names[role]:
            if canonical == LM_HEAD and EMBED_TOKENS in names[role]:
                logger.warning(
                    "%s: not measured, for %s has one and %s ties it to %s",
                    canonical, owner, role, EMBED_TOKENS,
                )  # fmt: skip
                return None
            raise MergeError(
                f"{canonical}: {owner} {checkpoints[owner].source} has it, {role} "
                f"{checkpoint.source} does not; an update is a difference to its own base"
            )
        stored[role] = names[role][canonical]
        info = checkpoint.tensors[stored[role]]
        shapes[role] = info.shape
        if info.dtype not in MERGEABLE_DTYPES:
            raise MergeError(
                f"{role} {checkpoint.source}: {canonical} is {info.dtype}; save the model with "
                "save_pretrained, without quantisation"
            )
    shape = shapes["base"]
    if group == EMBEDDING:  # the rows that all have
        shape = (min(shape[0] for shape in shapes.values()), *shape[1:])
    for role, other in shapes.items():
        if other[1:] != shape[1:] or (group != EMBEDDING and other != shape):
            raise MergeError(
                f"{canonical}: {role} {checkpoints[role].source} has shape {list(other)}, the base "
                f"{list(shapes['base'])}; an update is a difference to its own base"
            )
    return Shared(canonical, group, shape, stored)


def _describe(tensors: Sequence[Shared], checkpoints: Mapping[str, Checkpoint], rank: int) -> str:
    n_bytes = sum(
        checkpoints[role].tensors[name].n_bytes
        for tensor in tensors
        for role, name in tensor.names.items()
    )
    n = sum(math.prod(tensor.shape) for tensor in tensors)
    n_matrices = sum(tensor.group == LINEAR for tensor in tensors)
    return (
        f"{len(tensors)} tensors of {len(checkpoints) - 1} models, {n / 1e6:.1f} M entries each, "
        f"{size_words(n_bytes)} read twice; {n_matrices} matrices also for their spectrum, rank "
        f"{rank}; under 1 GB of memory"
    )


# ---- one tensor


def _measure(
    tensor: Shared,
    checkpoints: Mapping[str, Checkpoint],
    names: Sequence[str],
    threshold: float,
    rank: int,
) -> tuple[Sums, dict[str, Any]]:
    """Sums and spectra of one tensor."""
    magnitudes = [no_magnitudes() for _ in names]
    for base, *tuned in _read_blocks(tensor, checkpoints, ("base", *names)):
        for own, model in zip(magnitudes, tuned, strict=True):
            own.add(model - base)
    limits = [_limit(own) for own in magnitudes]
    sums = no_sums(len(names))
    for base, *tuned in _read_blocks(tensor, checkpoints, ("base", *names)):
        sums = sums + sum_entries(base, tuned, threshold, limits)
    if tensor.group != LINEAR:
        return sums, {}
    return sums, _measure_spectra(tensor, checkpoints, names, rank, sums)


def _limit(magnitudes: Magnitudes) -> float:
    return magnitudes.effective()[1]


def _measure_spectra(
    tensor: Shared,
    checkpoints: Mapping[str, Checkpoint],
    names: Sequence[str],
    rank: int,
    sums: Sums,
) -> dict[str, Any]:
    """Spectra of a matrix' updates; enters into the sums what lies in the principal subspace."""

    def base_blocks() -> Iterator[np.ndarray]:
        return (base for (base,) in _read_blocks(tensor, checkpoints, ("base",)))

    def update_of(name: str) -> Blocks:
        def blocks() -> Iterator[np.ndarray]:
            pairs = _read_blocks(tensor, checkpoints, ("base", name))
            return (tuned - base for base, tuned in pairs)

        return blocks

    n_rows, n_columns = tensor.shape
    principal = leading_spectrum(base_blocks, (n_rows, n_columns), rank)
    chance = len(principal.values) ** 2 / (n_rows * n_columns)
    spectra = {}
    for k, name in enumerate(names):
        square = float(sums.gram[k, k])
        if square == 0:
            continue
        blocks = update_of(name)
        values = leading_spectrum(blocks, (n_rows, n_columns), rank).values
        energy = subspace_energy(blocks, principal.left, principal.right)
        sums.matrix_square[k] = square
        sums.principal[k] = energy
        sums.principal_chance[k] = chance * square
        spectra[name] = {
            "values": [float(f"{value:.6g}") for value in values],
            "stable_rank": square / float(values[0]) ** 2,
            "leading_energy": float(np.square(values).sum()) / square,
        }
    return spectra


def _read_blocks(
    tensor: Shared, checkpoints: Mapping[str, Checkpoint], roles: Sequence[str]
) -> Iterator[list[np.ndarray]]:
    """Rows of a tensor in order, fp32 [rows, columns] of each role; a vector is one row."""
    n_columns = math.prod(tensor.shape[1:]) if len(tensor.shape) > 1 else math.prod(tensor.shape)
    n_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    rows_a_block = max(1, BLOCK_ENTRIES // max(n_columns, 1))
    for first in range(0, n_rows, rows_a_block):
        n = min(rows_a_block, n_rows - first) * n_columns
        blocks = []
        for role in roles:
            name = tensor.names[role]
            file = checkpoints[role].file_of(name)
            dtype = file.tensors[name].dtype
            stored = np.empty(n, NUMPY_DTYPES[dtype])
            file.read_into(name, first * n_columns * stored.itemsize, stored)
            values = to_float(stored, dtype)
            if not np.isfinite(values).all():
                raise MergeError(
                    f"{role} {file.path}: tensor {name} holds NaN or infinity; use a checkpoint "
                    "that is sound"
                )
            blocks.append(values.reshape(-1, n_columns))
        yield blocks


def _figures(sums: Sums, names: Sequence[str]) -> dict[str, Any]:
    """All figures of some sums, by model and by pair of models."""
    return {
        "entries": int(sums.n),
        "models": {name: model_figures(sums, k) for k, name in enumerate(names)},
        "pairs": {
            f"{names[a]}/{names[b]}": pair_figures(sums, a, b)
            for a, b in combinations(range(len(names)), 2)
        },
        **average_figures(sums),
    }
