"""Statistics files: what the merge methods know about the data. numpy only, no torch.

A file is safetensors, fp32, of one kind:

    diagonal   h[j] = E[x_j^2] of a linear's input x, mean over tokens              [in]
    inverse    v[j] = 1 / [(E[x x^T] + damping)^-1]_jj, 0 for a dead input           [in]
    gram       E[x x^T]                                                              [in, in]
    fisher     E[(d log p(answer) / d theta)^2], mean over sequences                 as the tensor

so that OBM's saliency is h[j] * delta^2 and v[j] * delta^2. Names are canonical: without `.weight`
for the kinds of inputs (`model.layers.0.self_attn.q_proj`), in full for fisher. Linears that read
the same input share one tensor: `aliases` in the metadata maps a linear to the name it is kept by.

The metadata says what the numbers were made with: `tokens`, `batches`, `data_sha256` (of every
batch), `mask_rule` (which tokens count), `weights` (checksums of the checkpoint's tensors, so that
a merge can refuse the statistics of another checkpoint). Values are read when they are asked for
and checked then; a file is published whole or not at all.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from merge.errors import MergeError
from merge.shards import NUMPY_DTYPES, SafetensorsFile, cannot_write, encode_header, write_all

FORMAT = "obm-warmstart statistics 2"
KINDS = ("diagonal", "inverse", "fisher", "gram")
FILE_NAMES = {
    "diagonal": "stats.safetensors",
    "inverse": "inverse.safetensors",
    "fisher": "fisher.safetensors",
    "gram": "gram.safetensors",
}


class Stats:
    """One statistics file: its header and metadata; values on demand, from any thread.

    Raises:
        MergeError: See `open_stats`.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        self.metadata = {k: v for k, v in self._file.metadata.items() if k != "format"}
        self.kind = self.metadata.get("kind", "")
        if self._file.metadata.get("format") != FORMAT:
            raise MergeError(f"{path}: holds no statistics; make it with `obm calibrate`")
        if self.kind != kind:
            raise MergeError(
                f"{path}: holds {self.kind or 'unknown'} statistics, needed are {kind}; "
                f"run `obm calibrate calibration.kinds=[{kind}]`"
            )
        for name, info in self._file.tensors.items():
            if info.dtype != "F32":
                raise MergeError(f"{path}: {name} is {info.dtype}, not F32; calibrate again")
        self.weights = self._read_map("weights")
        self._aliases = self._read_map("aliases")

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors that have a statistic, `.weight` included, sorted."""
        stored = sorted({*self._file.tensors, *self._aliases})
        return stored if self.kind == "fisher" else [f"{name}.weight" for name in stored]

    def shape_of(self, canonical: str) -> tuple[int, ...] | None:
        """Shape of a tensor's statistic, from the header; None when the file has none for it."""
        info = self._file.tensors.get(self._key(canonical))
        return None if info is None else info.shape

    def vector(self, canonical: str) -> np.ndarray:
        """Returns the fp32 vector [in] of a linear's weight (kinds diagonal, inverse).

        Raises:
            MergeError: No such vector, or values that are negative or not finite.
        """
        return self._read(canonical, n_axes=1)

    def gram(self, canonical: str) -> np.ndarray:
        """Returns the fp32 matrix E[x x^T] [in, in] of a linear's weight (kind gram).

        Raises:
            MergeError: No such matrix, or values that are not finite, or a negative diagonal.
        """
        return self._read(canonical, n_axes=2)

    def entries(self, canonical: str, begin: int, n: int) -> np.ndarray:
        """Returns fp32 [n] of a tensor's statistic in row-major order, from entry `begin` on.

        Raises:
            MergeError: No such tensor, or values that are negative or not finite.
        """
        key = self._find(canonical)
        values = np.frombuffer(self._file.read_bytes(key, 4 * begin, 4 * n), np.dtype("<f4"))
        _check(values, self.kind, f"{self.path}: {key}")
        return values

    def _read(self, canonical: str, n_axes: int) -> np.ndarray:
        key = self._find(canonical)
        shape = self._file.tensors[key].shape
        if len(shape) != n_axes or len(set(shape)) != 1:
            raise MergeError(
                f"{self.path}: {key} has shape {list(shape)}, which is no {self.kind} statistic; "
                "calibrate again"
            )
        values = self._file.read(key)
        _check(values, self.kind, f"{self.path}: {key}")
        return values

    def _key(self, canonical: str) -> str:
        name = canonical if self.kind == "fisher" else canonical.removesuffix(".weight")
        return self._aliases.get(name, name)

    def _find(self, canonical: str) -> str:
        key = self._key(canonical)
        if key not in self._file.tensors:
            raise MergeError(
                f"{self.path}: has no {self.kind} statistic of {canonical}; calibrate the "
                "checkpoint that is merged"
            )
        return key

    def _read_map(self, entry: str) -> dict[str, str]:
        try:
            value = json.loads(self.metadata.get(entry) or "{}")
        except (ValueError, RecursionError) as error:
            raise MergeError(f"{self.path}: {entry} is not JSON; calibrate again") from error
        if not isinstance(value, dict):
            raise MergeError(f"{self.path}: {entry} is not a JSON object; calibrate again")
        return {str(key): str(item) for key, item in value.items()}


def open_stats(path: str | Path, kind: str) -> Stats:
    """Opens a statistics file; reads its header only.

    Args:
        path: The file, or a folder that holds it under the name `FILE_NAMES[kind]`.
        kind: What the file must hold: one of `KINDS`.

    Raises:
        MergeError: The file is missing, truncated, no statistics, or of another kind.
    """
    path = Path(path)
    if path.is_dir() or path.suffix != ".safetensors":
        path = path / FILE_NAMES[kind]
    if not path.exists():
        raise MergeError(
            f"{path}: no {kind} statistics there; run `obm calibrate calibration.kinds=[{kind}]`"
        )
    return Stats(path, kind)


class StatsWriter:
    """Writes a statistics file tensor by tensor, in any order; a killed writer goes on.

    Values lie in a hidden file beside `path` until `finish` renames it. A writer for the same
    tensors and metadata finds that file again, with what was written before (`is_resumed`).

    Args:
        path: File to write, replaced when it exists.
        kind: One of `KINDS`.
        shapes: Name as stored -> shape.
        metadata: Text entries of the header; may set `format` for a file that is no `FORMAT`.
        aliases: Linear -> the name whose tensor it shares.
        dtype: F32, or F64 for sums that are not yet divided.

    Raises:
        MergeError: The folder cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        shapes: Mapping[str, Sequence[int]],
        metadata: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
        dtype: str = "F32",
    ) -> None:
        self.path = Path(path)
        self.kind = kind
        self._dtype = NUMPY_DTYPES[dtype]
        header = {"format": FORMAT, **metadata, "kind": kind}
        if aliases:
            header["aliases"] = json.dumps(dict(sorted(aliases.items())))
        entries = [(name, dtype, tuple(shape)) for name, shape in sorted(shapes.items())]
        head, self._infos = encode_header(entries, dict(sorted(header.items())))
        self.part = self.path.with_name(f".{self.path.name}.part")
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)
            self.is_resumed = os.pread(self._descriptor, len(head), 0) == head
            if not self.is_resumed:
                os.truncate(self._descriptor, 0)
                write_all(self._descriptor, head, 0)
            end = max((info.end for info in self._infos.values()), default=len(head))
            os.truncate(self._descriptor, end)

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes one tensor, of the shape that was announced.

        Raises:
            MergeError: Values that are negative or not finite, or the disk is full.
        """
        info = self._infos[name]
        if values.shape != info.shape:
            raise MergeError(
                f"{self.path}: {name} has shape {list(values.shape)}, not {list(info.shape)}"
            )
        values = np.ascontiguousarray(values, self._dtype)
        _check(values, self.kind, name)
        if values.size:
            with self._writing():
                write_all(self._descriptor, values.data, info.begin)

    def finish(self) -> Path:
        """Puts the complete file in its place and returns its path."""
        with self._writing():
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self.part.replace(self.path)
        return self.path

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.path, error) from error


def save_stats(
    path: str | Path,
    kind: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    aliases: Mapping[str, str] | None = None,
) -> Path:
    """Writes a statistics file from memory; equal statistics give equal bytes.

    Args:
        path: File to write, replaced when it exists.
        kind: One of `KINDS`.
        tensors: Name as stored -> fp32 array.
        metadata: Text entries: what the statistics were made with.
        aliases: Linear -> the name whose tensor it shares.

    Raises:
        MergeError: Values that are negative or not finite, or the file cannot be written.
    """
    for name, values in tensors.items():
        _check(values, kind, name)
    shapes = {name: values.shape for name, values in tensors.items()}
    writer = StatsWriter(path, kind, shapes, metadata, aliases)
    for name, values in tensors.items():
        writer.write(name, values)
    return writer.finish()


def _check(values: np.ndarray, kind: str, where: str) -> None:
    """Refuses what no mean of squares can be."""
    if not np.isfinite(values).all():
        raise MergeError(
            f"{where}: values are not finite; load the model in bfloat16 or float32 and "
            "calibrate again"
        )
    is_matrix = kind in ("gram", "inverse") and values.ndim == 2  # products may be negative
    squares = values.diagonal() if is_matrix else values
    if values.size and float(squares.min()) < 0:
        raise MergeError(f"{where}: values are negative, no mean of squares; calibrate again")
