"""Sums over calibration data on their way to a statistics file.

A run sums in fp64 squares of linear inputs, or their products x x^T; in fp32, for they are as large
as the model, squared gradients. At the end a sum becomes a statistic: divided by the number of
tokens (sequences for fisher), for `inverse` also inverted, rounded to fp32. A run that sees only
its share of the batches (`shard = (rank, world)`: batches rank, rank + world, ...) keeps its sums
as they are, in a file of its own; `merge_shards` adds those files up and ends as one run does. fp64
sums of fp32 numbers of like size are exact, so the order of the batches does not matter and both
give the same fp32; for fisher the last bit may depend on it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import LINEAR, NORM_BIAS, Family, canonical_name, group_of
from merge.shards import SafetensorsFile
from merge.stats import FILE_NAMES, StatsWriter

FORMAT = "obm-warmstart sums 1"
DAMPING = 0.01
MAX_DAMPINGS = 5

Shard = tuple[int, int]
"""(rank, world): which share of the batches a run sees."""
WHOLE: Shard = (0, 1)


@dataclass
class Record:
    """What was measured, in counts and hashes; becomes the metadata of a statistics file."""

    tokens: int = 0
    sequences: int = 0
    digests: dict[int, str] = field(default_factory=dict)
    """Number of a batch among all shards' batches -> sha256 of its tensors."""
    mask_rule: str = ""
    """Which tokens count."""

    def count(self, kind: str) -> int:
        """Number of things that a sum of this kind runs over."""
        return self.sequences if kind == "fisher" else self.tokens

    def metadata(self, kind: str) -> dict[str, str]:
        """Text entries for the header of a statistics file."""
        digest = hashlib.sha256()
        for _, batch in sorted(self.digests.items()):
            digest.update(bytes.fromhex(batch))
        entries = {
            "tokens": str(self.tokens),
            "batches": str(len(self.digests)),
            "data_sha256": digest.hexdigest(),
            "mask_rule": self.mask_rule,
        }
        return {**entries, "sequences": str(self.sequences)} if kind == "fisher" else entries

    def to_json(self) -> str:
        """All fields as text, for the header of a shard's sums."""
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Reads what `to_json` wrote."""
        entries = json.loads(text)
        entries["digests"] = {int(number): item for number, item in entries["digests"].items()}
        return cls(**entries)


class SumWriter:
    """Takes the sums of one kind, tensor by tensor, and writes the file of that kind.

    Args:
        path: File to write, replaced when it exists; `shard_name` gives its usual name.
        kind: diagonal, inverse, gram or fisher.
        shapes: Name as stored -> shape of its sum.
        record: What the sums run over; complete.
        aliases: Linear -> name whose sum it shares.
        weights: Canonical name -> checksum in the checkpoint; empty when unknown.
        shard: Which share of the batches was summed.
        damping: Of `inverse`.

    Raises:
        MergeError: Nothing was summed, or the folder cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        shapes: Mapping[str, Sequence[int]],
        record: Record,
        *,
        aliases: Mapping[str, str] | None = None,
        weights: Mapping[str, str] | None = None,
        shard: Shard = WHOLE,
        damping: float = DAMPING,
    ) -> None:
        self.kind = kind
        self.damping = damping
        self._n = record.count(kind)
        if self._n == 0:
            raise MergeError("calibration: the masks leave no tokens; check calibration_mask")
        self._is_whole = shard == WHOLE
        entries = {"weights": json.dumps(dict(sorted((weights or {}).items())))}
        if self._is_whole:
            entries |= record.metadata(kind)
            if kind == "inverse":
                entries["damping"] = repr(damping)
                shapes = {name: shape[:1] for name, shape in shapes.items()}
        else:
            entries |= {"format": FORMAT, "shard": f"{shard[0]}/{shard[1]}"}
            entries["record"] = record.to_json()
        self._writer = StatsWriter(
            path,
            kind,
            shapes,
            entries,
            aliases,
            dtype="F32" if self._is_whole else "F64",
        )

    @property
    def is_resumed(self) -> bool:
        """Whether sums that a killed run wrote were found."""
        return self._writer.is_resumed

    def write(self, name: str, total: torch.Tensor) -> None:
        """Takes one sum: fp64 [in], [in, in] (overwritten for `inverse`), or as the tensor."""
        if self._is_whole:
            mean = total.div_(self._n) if self.kind == "inverse" else total / self._n
            if not bool(torch.isfinite(mean.sum())):
                raise MergeError(
                    f"calibration: inputs of {name} are not finite; load the model in bfloat16 or "
                    "float32"
                )
            if self.kind == "inverse":
                mean = inverse_diagonal(mean, self.damping, where=name)
            self._writer.write(name, mean.float().cpu().numpy())
        else:
            self._writer.write(name, total.double().cpu().numpy())

    def finish(self) -> Path:
        """Puts the complete file in its place and returns its path."""
        return self._writer.finish()


def shard_name(kind: str, shard: Shard) -> str:
    """File name of a kind's statistics, or of the sums of one shard."""
    if shard == WHOLE:
        return FILE_NAMES[kind]
    return f"{Path(FILE_NAMES[kind]).stem}.shard{shard_suffix(shard)}.safetensors"


def shard_suffix(shard: Shard) -> str:
    """What keeps the files of shards in one folder apart: `-0-of-2`, empty for the whole."""
    return "" if shard == WHOLE else f"-{shard[0]}-of-{shard[1]}"


def weight_checksums(checkpoint: Checkpoint, family: Family, kind: str) -> dict[str, str]:
    """Canonical name -> checksum of each tensor that statistics of a kind are about."""
    groups = (LINEAR, NORM_BIAS) if kind == "fisher" else (LINEAR,)
    names = {}
    for name in checkpoint.tensors:
        canonical = canonical_name(family, name)
        if canonical is not None and group_of(family, canonical) in groups:
            names[canonical] = name
    return {canonical: checkpoint.checksum(name) for canonical, name in sorted(names.items())}


def inverse_diagonal(
    moments: torch.Tensor, damping: float = DAMPING, where: str = "inverse"
) -> torch.Tensor:
    """Computes v[j] = 1 / [(M + damping * mean(diag M) * I)^-1]_jj; 0 where input j is dead.

    With M = E[x x^T] this is the curvature along weight j when the row's other weights make up for
    a change of it (Optimal Brain Surgeon, eq. 5 of SparseGPT). Damping is multiplied by ten while
    the matrix has no Cholesky factor.

    Args:
        moments: fp64 [in, in], symmetric; overwritten.
        damping: Share of the mean diagonal that is added.
        where: Name for the message.

    Returns:
        fp64 [in].

    Raises:
        MergeError: No damping helped.
    """
    diagonal = moments.diagonal().clone()
    is_dead = diagonal <= 0
    if bool(is_dead.all()):
        return torch.zeros_like(diagonal)
    for attempt in range(MAX_DAMPINGS):
        moments.diagonal().copy_(diagonal + damping * 10**attempt * diagonal.mean())
        factor, info = torch.linalg.cholesky_ex(moments)
        if int(info) == 0:
            break
    else:
        raise MergeError(
            f"calibration: E[x x^T] of {where} has no Cholesky factor even with damping "
            f"{damping * 10 ** (MAX_DAMPINGS - 1):g}; calibrate with more tokens"
        )
    # M^-1 = L^-T L^-1, so its diagonal is the squared norm of each column of L^-1. Those come a
    # block at a time: the whole inverse of a wide layer would need as much memory again as M.
    n = len(diagonal)
    inverse = torch.empty_like(diagonal)
    for begin in range(0, n, 512):
        width = min(512, n - begin)
        unit = torch.zeros(n - begin, width, dtype=factor.dtype, device=factor.device)
        unit[:width].fill_diagonal_(1.0)
        columns = torch.linalg.solve_triangular(factor[begin:, begin:], unit, upper=False)
        inverse[begin : begin + width] = columns.square().sum(0)
    return torch.where(is_dead, 0.0, 1 / inverse)


def merge_shards(folder: str | Path, kind: str, *, damping: float = DAMPING) -> Path:
    """Adds up the sums of all shards in a folder and writes the statistics file.

    Args:
        folder: Holds `<kind's file>.shard-<rank>-of-<world>.safetensors` of every rank.
        kind: Which kind.
        damping: Of `inverse`.

    Returns:
        The statistics file, equal to that of a run over all batches.

    Raises:
        MergeError: A shard is missing, or the shards are not of one run.
    """
    files = _find_shards(Path(folder), kind)
    records = [_read_record(file) for file in files]
    first = files[0]
    for file, record in zip(files, records, strict=True):
        same = all(
            file.metadata.get(key) == first.metadata.get(key) for key in ("weights", "aliases")
        )
        shapes = {name: info.shape for name, info in file.tensors.items()}
        if not same or shapes != {name: info.shape for name, info in first.tensors.items()}:
            raise MergeError(
                f"{file.path}: was made with another checkpoint than {first.path.name}; "
                "calibrate that shard again"
            )
        if record.mask_rule != records[0].mask_rule:
            raise MergeError(
                f"{file.path}: counts other tokens ({record.mask_rule}) than {first.path.name} "
                f"({records[0].mask_rule}); calibrate that shard again"
            )
    total = Record(mask_rule=records[0].mask_rule)
    for record in records:
        total.tokens += record.tokens
        total.sequences += record.sequences
        total.digests |= record.digests
    if sorted(total.digests) != list(range(len(total.digests))):
        raise MergeError(
            f"{folder}: the shards' batches ({sorted(total.digests)}) do not make up one run; "
            "calibrate all shards with the same data and batch size"
        )
    writer = SumWriter(
        Path(folder) / FILE_NAMES[kind],
        kind,
        {name: info.shape for name, info in first.tensors.items()},
        total,
        aliases=json.loads(first.metadata.get("aliases", "{}")),
        weights=json.loads(first.metadata["weights"]),
        damping=damping,
    )
    for name in first.tensors:
        added = read_f64(first, name)
        for file in files[1:]:  # one at a time: a matrix of a wide input has gigabytes
            added += read_f64(file, name)
        writer.write(name, added)
    return writer.finish()


def _find_shards(folder: Path, kind: str) -> list[SafetensorsFile]:
    stem = Path(FILE_NAMES[kind]).stem
    found = sorted(folder.glob(f"{stem}.shard-*-of-*.safetensors"))
    if not found:
        raise MergeError(
            f"{folder}: holds no sums of {kind}; run `obm calibrate --shard 0/N` and so on first"
        )
    worlds = {path.stem.rpartition("-")[2] for path in found}
    if len(worlds) > 1:
        raise MergeError(
            f"{folder}: holds shards of several runs (of {', '.join(sorted(worlds))}); "
            "remove the files that do not belong together"
        )
    world = int(worlds.pop())
    paths = [folder / shard_name(kind, (rank, world)) for rank in range(world)]
    for rank, path in enumerate(paths):
        if not path.exists():
            raise MergeError(f"{path}: is missing; run `obm calibrate --shard {rank}/{world}`")
    return [SafetensorsFile(path) for path in paths]


def _read_record(file: SafetensorsFile) -> Record:
    try:
        if file.metadata["format"] == FORMAT and "weights" in file.metadata:
            return Record.from_json(file.metadata["record"])
    except (KeyError, TypeError, ValueError):
        pass
    raise MergeError(f"{file.path}: holds no sums of a shard; calibrate that shard again")


def read_f64(file: SafetensorsFile, name: str) -> torch.Tensor:
    """Reads a sum as it was written; `SafetensorsFile.read` would round it to fp32."""
    stored = np.frombuffer(file.read_bytes(name), np.dtype("<f8"))
    return torch.from_numpy(stored.reshape(file.tensors[name].shape))
