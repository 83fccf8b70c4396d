"""Pieces of a tensor, read from the parents' files into memory that is used again and again.

A tensor that fits a worker's share of memory is read once and stays while its histograms and its
result are made; a larger one is read piece by piece, once a pass. Either way the bits are the same.
Fresh memory costs more than the arithmetic (every page faults), so a worker keeps its buffers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from merge.checkpoint import Checkpoint
from merge.kernels import Piece
from merge.methods import Rule
from merge.plan import PlannedTensor
from merge.sampling import SMALL, Sample, as_row, n_sampled, run_starts, sample_vectors, take_sample
from merge.shards import NUMPY_DTYPES, to_float
from merge.stats import Stats
from merge.tensor import needs_entries, needs_rows

RESIDENT_BYTES = 200 * 1024 * 1024
"""Memory for whole tensors, all workers together."""
PIECE_BYTES = 12 * 1024 * 1024
"""Memory for one piece of a tensor that is too large to stay, a worker; but no more than its share
of RESIDENT_BYTES, so that many workers take no more than few."""
LEAST_PIECE_BYTES = 1024 * 1024
"""That of any number of workers; shorter pieces would take longer."""

DISK_RUN = 512
"""Entries of a sample that are read side by side."""


class Workspace:
    """A worker's buffers, by purpose; they grow to the largest need and stay."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Returns an array with any content, valid until the purpose is asked for again."""
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.nbytes < n_bytes:
            self._buffers.pop(purpose, None)  # freed before the larger one is there
            buffer = self._buffers[purpose] = np.empty(n_bytes, np.uint8)
        return buffer[:n_bytes].view(dtype).reshape(shape)


class TensorReader:
    """Reads the pieces of one planned tensor.

    Args:
        tensor: What is merged.
        rule: Its rule.
        parents: Role -> checkpoint.
        statistics: Task -> statistics of the kind that the method needs; empty if it needs none.
        workspace: Buffers.
        resident_bytes: Tensors up to this size, all parents together, are read only once.
        piece_bytes: Size of a piece of the larger ones.
    """

    def __init__(
        self,
        tensor: PlannedTensor,
        rule: Rule,
        parents: Mapping[str, Checkpoint],
        statistics: Mapping[str, Stats],
        workspace: Workspace,
        resident_bytes: int,
        piece_bytes: int,
    ) -> None:
        self.tensor = tensor
        self.tasks = [role for role in tensor.sources if role != "base"]
        self._roles = ["base", *self.tasks]
        self._files = {role: parents[role].file_of(tensor.sources[role]) for role in self._roles}
        self._dtypes = {
            role: self._files[role].tensors[tensor.sources[role]].dtype for role in self._roles
        }
        self._statistics = statistics
        self._workspace = workspace
        self._is_bf16 = set(self._dtypes.values()) == {"BF16"}
        self._dtype = NUMPY_DTYPES["BF16" if self._is_bf16 else "F32"]
        self._needs_rows = needs_rows(rule)
        self._needs_entries = needs_entries(rule)
        self._score = rule.score
        shape = tensor.shape
        n_rows = shape[0] if len(shape) > 1 else 1
        n_columns = int(np.prod(shape[1:])) if len(shape) > 1 else int(np.prod(shape))
        if len(shape) > 2:  # rows are along the last axis, as a linear sees them
            n_rows, n_columns = int(np.prod(shape[:-1])), shape[-1]
        self.n_rows = n_rows if tensor.n_common_rows is None else tensor.n_common_rows
        self.n_columns = n_columns
        entry_bytes = 4 if self._needs_entries else 0
        if rule.arbitrate:  # the settled task vectors
            entry_bytes += self._dtype.itemsize
        row_bytes = n_columns * (len(self._roles) * self._dtype.itemsize)
        row_bytes += n_columns * entry_bytes * len(self.tasks)
        is_resident = self.n_rows * row_bytes <= resident_bytes
        self._rows_a_piece = max(1, self.n_rows if is_resident else piece_bytes // row_bytes)
        self._loaded: Piece | None = None
        self._digests: dict[str, xxhash.xxh3_128] = {}
        self._is_hashed = False
        self.protected = np.array(tensor.protected_rows, np.int64)

    @property
    def checksums(self) -> dict[str, str]:
        """Role -> xxh3_128 of the bytes that were read; whole tensors after a first pass."""
        return {role: digest.hexdigest() for role, digest in self._digests.items()}

    def pieces(self) -> Iterator[Piece]:
        """Reads the pieces in order; a tensor that fits is read at the first call only."""
        if self._loaded is not None:
            yield self._loaded
            return
        for first_row in range(0, self.n_rows, self._rows_a_piece):
            n_rows = min(self._rows_a_piece, self.n_rows - first_row)
            piece = self._read(first_row, n_rows)
            if n_rows == self.n_rows:
                self._loaded = piece
            yield piece
        self._is_hashed = True

    def sample(self) -> Sample:
        """Takes a sample of the tensor, for the thresholds of `sampling`."""
        if self._rows_a_piece >= self.n_rows:
            [piece] = self.pieces()
            return take_sample(piece)
        n = self.n_rows * self.n_columns
        is_whole = n <= SMALL
        length = n if is_whole else DISK_RUN
        starts = run_starts(1 if is_whole else n_sampled(n) // length, length, n)
        values = np.empty((len(self._roles), starts.size, length), self._dtype)
        for role, runs in zip(self._roles, values, strict=True):
            for start, run in zip(starts.tolist(), runs, strict=True):
                self._fill_from(role, run, start)
        values = values.reshape(len(self._roles), -1)
        vectors = np.zeros((len(self.tasks), 0), np.float32)
        if self._score == "saliency" and self._statistics:
            vectors = sample_vectors(self._vectors(), starts, length)
        return Sample(as_row(values[0], values[1:], vectors), n, 0 if is_whole else length)

    def _vectors(self) -> np.ndarray:
        name = self.tensor.canonical
        return np.stack([self._statistics[task].vector(name) for task in self.tasks])

    def _read(self, first_row: int, n_rows: int) -> Piece:
        n = n_rows * self.n_columns
        base = self._workspace.array("base", (n,), self._dtype)
        tasks = self._workspace.array("tasks", (len(self.tasks), n), self._dtype)
        self._fill("base", base, first_row)
        for k, task in enumerate(self.tasks):
            self._fill(task, tasks[k], first_row)
        if self.protected.size:
            self._protect(base, tasks, first_row, n_rows)
        empty = np.zeros((len(self.tasks), 0), np.float32)
        vectors = entries = empty
        name = self.tensor.canonical
        if self._score == "saliency" and self._statistics:
            vectors = self._vectors()
        elif self._needs_entries:
            entries = self._workspace.array("entries", (len(self.tasks), n), NUMPY_DTYPES["F32"])
            for k, task in enumerate(self.tasks):
                entries[k] = self._statistics[task].entries(name, first_row * self.n_columns, n)
        return Piece(
            base=base,
            tasks=tasks,
            n_columns=self.n_columns if self._needs_rows else n,
            begin=first_row * self.n_columns,
            vectors=vectors,
            entries=entries,
        )

    def _fill(self, role: str, out: np.ndarray, first_row: int) -> None:
        """Reads rows of one parent, and hashes what is read for the first time."""
        stored = self._fill_from(role, out, first_row * self.n_columns)
        if not self._is_hashed:
            self._digests.setdefault(role, xxhash.xxh3_128()).update(stored.data)

    def _fill_from(self, role: str, out: np.ndarray, first: int) -> np.ndarray:
        """Reads entries of one parent from an index on, to fp32 unless all parents are bf16.

        Returns:
            The entries as they are stored.
        """
        dtype, name = self._dtypes[role], self.tensor.sources[role]
        stored_dtype = NUMPY_DTYPES[dtype]
        stored = out
        if stored_dtype != out.dtype or (dtype == "BF16" and not self._is_bf16):
            stored = self._workspace.array("stored", out.shape, stored_dtype)
        if stored.size:
            self._files[role].read_into(name, first * stored_dtype.itemsize, stored)
        if stored is not out:
            out[:] = to_float(stored, dtype)
        return stored

    def _protect(self, base: np.ndarray, tasks: np.ndarray, first_row: int, n_rows: int) -> None:
        """Makes protected rows look unchanged, and remembers the VLM's values of them."""
        rows = self.protected - first_row
        rows = rows[(rows >= 0) & (rows < n_rows)]
        base_rows = base.reshape(n_rows, self.n_columns)
        task_rows = tasks.reshape(len(self.tasks), n_rows, self.n_columns)
        self._saved = rows, task_rows[0, rows].copy()
        task_rows[:, rows] = base_rows[rows]

    def restore_protected(self, out: np.ndarray) -> None:
        """Puts the VLM's values of protected rows into a piece of the result."""
        if self.protected.size:
            rows, values = self._saved
            out.reshape(-1, self.n_columns)[rows] = values
