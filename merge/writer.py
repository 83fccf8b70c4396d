"""Makes one tensor of the output and puts it in its place: merged in pieces, merged whole, copied.

Any number of threads may call a `TensorWriter`; each has buffers of its own.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import xxhash

from merge import kernels as compiled
from merge.checkpoint import Checkpoint
from merge.cost import dense_bytes
from merge.errors import MergeError
from merge.kernels import Counts
from merge.memory import available_memory
from merge.methods import METHODS
from merge.plan import PlannedTensor
from merge.reader import LEAST_PIECE_BYTES, PIECE_BYTES, RESIDENT_BYTES, TensorReader, Workspace
from merge.selection import Cut
from merge.shards import (
    COPY_CHUNK_BYTES,
    NUMPY_DTYPES,
    ShardWriter,
    from_float,
    is_finite,
    to_float,
)
from merge.stats import Stats
from merge.tensor import (
    add_counts,
    apply_decision,
    check_finite,
    decide,
    load_kernels,
    merge_tensor,
)
from merge.validate import check_weights, kind_needed


class TensorWriter:
    """Makes tensors of one merge.

    Args:
        parents: Role -> checkpoint.
        statistics: (task, kind) -> statistics.
        threads: How many threads will call; they share the memory for whole tensors.
    """

    def __init__(
        self,
        parents: Mapping[str, Checkpoint],
        statistics: Mapping[tuple[str, str], Stats],
        threads: int,
    ) -> None:
        self.kernels = load_kernels()
        self.cuts: dict[str, list[Cut]] = {}
        """Name of a tensor -> thresholds that it shares with others."""
        self._parents = parents
        self._statistics = statistics
        self._threads = threads
        self._local = threading.local()
        self._room = _Room(available_memory())

    def write(self, tensor: PlannedTensor, writer: ShardWriter) -> dict[str, Any]:
        """Makes one tensor and puts it in its place.

        Returns:
            The journal's entry: checksum, checksums of the inputs, counts.

        Raises:
            MergeError: A value that is not finite, other weights than the statistics', a disk that
                fails.
        """
        if tensor.action in self._parents:
            return self._copy(tensor, tensor.action, writer)
        if METHODS[tensor.action].rule is None:
            with self._room.held(dense_bytes(tensor.shape)):
                return self._write_dense(tensor, writer)
        entry: dict[str, Any] = {}

        def use(reader: TensorReader) -> None:
            entry.update(self._write_pieces(tensor, reader, writer))

        self.with_reader(tensor, use)
        return entry

    def _write_pieces(
        self, tensor: PlannedTensor, reader: TensorReader, writer: ShardWriter
    ) -> dict[str, Any]:
        rule_of = METHODS[tensor.action].rule
        assert rule_of is not None
        decision = decide(
            reader.pieces,
            rule_of(tensor.settings),
            tensor.settings,
            reader.tasks,
            self.kernels,
            self.cuts.get(tensor.name),
            reader.sample,
        )
        digest, begin = xxhash.xxh3_128(), 0
        total: Counts | None = None
        for piece in reader.pieces():
            out = self._workspace.array("out", piece.base.shape, piece.base.dtype)
            counts = apply_decision(piece, decision, out, self.kernels)
            total = counts if total is None else add_counts(total, counts)
            self._check_finite(tensor, counts, reader.tasks)
            reader.restore_protected(out)
            data = self._encode(out, tensor)
            digest.update(data.data)
            writer.write(tensor.name, begin, data)
            begin += data.nbytes
        assert total is not None
        inputs = reader.checksums
        if tensor.n_common_rows is not None:
            # the rows beyond, which only some parents have, are the VLM's; no input is read whole
            inputs = {}
            self._copy_bytes(tensor, "vlm", writer, begin, digest)
        self._check_inputs(tensor, inputs)
        return {
            "checksum": digest.hexdigest(),
            "inputs": inputs,
            "counts": _plain_counts(total, reader.tasks, tensor),
        }

    def _write_dense(self, tensor: PlannedTensor, writer: ShardWriter) -> dict[str, Any]:
        """Merges a tensor by a method that needs it whole."""
        values = {role: self._parents[role].read(name) for role, name in tensor.sources.items()}
        for role, value in values.items():
            self._check_stored(tensor, role, value, "F32")
        tasks = [role for role in values if role != "base"]
        kind = kind_needed(tensor)
        grams = {}
        if kind is not None:
            grams = {task: self._statistics[task, kind].gram(tensor.canonical) for task in tasks}
        merged, counts = merge_tensor(
            tensor.action,
            values["base"],
            {task: values[task] for task in tasks},
            grams or None,
            tensor.settings,
        )
        self._check_finite(tensor, counts, tasks)
        data = self._encode(merged.reshape(-1), tensor)
        writer.write(tensor.name, 0, data)
        inputs = {role: self._parents[role].checksum(name) for role, name in tensor.sources.items()}
        self._check_inputs(tensor, inputs)
        return {
            "checksum": xxhash.xxh3_128_hexdigest(data.data),
            "inputs": inputs,
            "counts": _plain_counts(counts, tasks, tensor),
        }

    def _copy(self, tensor: PlannedTensor, role: str, writer: ShardWriter) -> dict[str, Any]:
        """Copies a parent's tensor: byte for byte, or in the VLM's dtype where theirs differ."""
        file, name = self._parents[role].file_of(tensor.sources[role]), tensor.sources[role]
        stored = file.tensors[name].dtype
        if stored == tensor.dtype:
            digest = xxhash.xxh3_128()
            self._copy_bytes(tensor, role, writer, 0, digest)
            return {"checksum": digest.hexdigest(), "inputs": {role: digest.hexdigest()}}
        values = np.frombuffer(file.read_bytes(name), NUMPY_DTYPES[stored])
        self._check_stored(tensor, role, values, stored)
        data = self._encode(to_float(values, stored), tensor)
        writer.write(tensor.name, 0, data)
        return {
            "checksum": xxhash.xxh3_128_hexdigest(data.data),
            "inputs": {role: file.checksum(name)},
        }

    def _copy_bytes(
        self,
        tensor: PlannedTensor,
        role: str,
        writer: ShardWriter,
        begin: int,
        digest: xxhash.xxh3_128,
    ) -> None:
        """Copies the bytes of a parent's tensor from an offset on."""
        file, name = self._parents[role].file_of(tensor.sources[role]), tensor.sources[role]
        end = file.tensors[name].n_bytes
        buffer = self._workspace.array("copy", (COPY_CHUNK_BYTES,), np.dtype(np.uint8))
        for offset in range(begin, end, COPY_CHUNK_BYTES):
            data = buffer[: min(COPY_CHUNK_BYTES, end - offset)]
            file.read_into(name, offset, data)
            if role != "vlm":
                self._check_stored(tensor, role, data, tensor.dtype)
            digest.update(data.data)
            writer.write(tensor.name, offset, data)

    def _check_stored(
        self, tensor: PlannedTensor, role: str, stored: np.ndarray, dtype: str
    ) -> None:
        """Refuses NaN and infinity where no kernel looks; what stays the VLM's is not looked at."""
        if not is_finite(stored, dtype):
            name = tensor.sources[role]
            raise MergeError(
                f"{role} {self._parents[role].file_of(name).path}: tensor {name} holds NaN or "
                "infinity; use a checkpoint that is sound"
            )

    def _encode(self, values: np.ndarray, tensor: PlannedTensor) -> np.ndarray:
        """Returns the output's items; what the kernels wrote as bf16 bits already is."""
        if values.dtype == np.uint16:
            return values
        encoded = from_float(values, tensor.dtype)
        if not is_finite(encoded, tensor.dtype):
            raise MergeError(
                f"{tensor.name}: a merged value does not fit {tensor.dtype}; lower merge.weights"
            )
        return encoded

    @property
    def _workspace(self) -> Workspace:
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace()
        workspace: Workspace = self._local.workspace
        return workspace

    def with_reader(self, tensor: PlannedTensor, use: Callable[[TensorReader], object]) -> None:
        """Opens a reader on a tensor, with this thread's buffers, and hands it to a function."""
        rule_of, kind = METHODS[tensor.action].rule, kind_needed(tensor)
        assert rule_of is not None
        statistics = {
            task: stats for (task, of_kind), stats in self._statistics.items() if of_kind == kind
        }
        share = RESIDENT_BYTES // self._threads
        piece_bytes = min(PIECE_BYTES, max(share, LEAST_PIECE_BYTES))
        use(
            TensorReader(
                tensor,
                rule_of(tensor.settings),
                self._parents,
                statistics,
                self._workspace,
                # the other kernels' intermediate results are several times as large as the piece
                share if self.kernels is compiled else 0,
                piece_bytes if self.kernels is compiled else piece_bytes // 3,
            )
        )

    def _check_finite(self, tensor: PlannedTensor, counts: Counts, tasks: Sequence[str]) -> None:
        if counts.not_finite:
            sources = {role: tensor.sources[role] for role in ("base", *tasks)}
            paths = {r: self._parents[r].file_of(name).path for r, name in sources.items()}
            check_finite(
                counts, [f"{r} {path}" for r, path in paths.items()], tensor.name, tensor.dtype
            )

    def _check_inputs(self, tensor: PlannedTensor, inputs: Mapping[str, str]) -> None:
        """Refuses statistics that were made with other weights than these."""
        kind = kind_needed(tensor)
        for (task, of_kind), stats in self._statistics.items():
            if of_kind == kind and task in inputs:
                check_weights(tensor, task, stats, inputs[task], self._parents[task])


class _Room:
    """Free memory, of which each dense tensor takes its part; one finds room however large it is.

    Args:
        n_bytes: How much is free when the merge begins.
    """

    def __init__(self, n_bytes: int) -> None:
        self._n_free = n_bytes
        self._n_tensors = 0
        self._turn = threading.Condition()

    @contextmanager
    def held(self, n_bytes: int) -> Iterator[None]:
        """Waits until there is room, and keeps it."""
        with self._turn:
            self._turn.wait_for(lambda: n_bytes <= self._n_free or self._n_tensors == 0)
            self._n_free -= n_bytes
            self._n_tensors += 1
        try:
            yield
        finally:
            with self._turn:
                self._n_free += n_bytes
                self._n_tensors -= 1
                self._turn.notify_all()


def _plain_counts(counts: Counts, tasks: Sequence[str], tensor: PlannedTensor) -> dict[str, Any]:
    """The counts of one tensor as plain data, for the journal."""
    n_entries = math.prod(tensor.shape)
    if tensor.n_common_rows is not None:
        n_entries = n_entries // tensor.shape[0] * tensor.n_common_rows

    def by_task(values: np.ndarray) -> dict[str, Any]:
        return {task: value.item() for task, value in zip(tasks, values, strict=True)}

    plain = {
        "entries": n_entries,
        "kept": by_task(counts.kept),
        "conflicts": counts.conflicts,
        "conflicts_won": by_task(counts.conflicts_won),
        "delta_square": by_task(counts.delta_square),
        "update_square": counts.update_square,
    }
    if counts.saliency is not None and counts.saliency_kept is not None:
        plain["saliency"] = by_task(counts.saliency)
        plain["saliency_kept"] = by_task(counts.saliency_kept)
    return plain
