"""What a plan is made of, its table, and how much a merge by it reads and writes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from merge.checkpoint import Checkpoint
from merge.methods import MethodSettings
from merge.scope import COPIES


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged checkpoint."""

    name: str
    """Name in the VLM's files, and in the output."""
    canonical: str
    """Name in a text model, shared by all parents; `visual.` for vision tower and projector."""
    group: str
    """linear, norm_bias, embedding, vision or buffer."""
    action: str
    """A method's name, or the role whose tensor is copied: `vlm` byte for byte, `base` and `agent`
    in the VLM's dtype."""
    reason: str
    shape: tuple[int, ...]
    dtype: str
    """Of the output: the VLM's."""
    sources: Mapping[str, str]
    """Role -> name in that parent's files; the VLM alone for vision tensors and buffers."""
    settings: MethodSettings
    """What the method gets: the merge's settings after scope and rules, with the tensor's name."""
    n_common_rows: int | None = None
    """Embeddings: only the first rows are merged, the others are the VLM's; None = all."""
    protected_rows: tuple[int, ...] = ()
    """Embeddings: rows that stay the VLM's."""

    @property
    def read_roles(self) -> tuple[str, ...]:
        """Whose tensors are read: of all sources, or of the one that is copied."""
        return (self.action,) if self.action in COPIES else tuple(self.sources)


@dataclass(frozen=True)
class MergePlan:
    """All tensors of the output, in the order of the VLM's files, and what is set aside."""

    tensors: tuple[PlannedTensor, ...]
    unused: tuple[tuple[str, str, str], ...]
    """(role, tensor, reason) for tensors that the output has no place for."""
    notes: tuple[str, ...]


def plan_bytes(plan: MergePlan, parents: Mapping[str, Checkpoint]) -> dict[str, int]:
    """Adds up what a merge reads and writes.

    Args:
        plan: The plan.
        parents: Role -> checkpoint, as for `make_plan`.

    Returns:
        Bytes: `read`, `written`, and `largest_tensor`, the largest stored tensor that is read.
        Rows of embeddings that only others than the VLM have are not read.
    """
    read = written = largest = 0
    for tensor in plan.tensors:
        vlm = parents["vlm"].tensors[tensor.sources["vlm"]]
        written += vlm.n_bytes
        for role in tensor.read_roles:
            info = parents[role].tensors[tensor.sources[role]]
            n_bytes = info.n_bytes
            if role != "vlm" and tensor.n_common_rows is not None:
                n_bytes = n_bytes // info.shape[0] * tensor.n_common_rows
            read += n_bytes
            largest = max(largest, n_bytes)
    return {"read": read, "written": written, "largest_tensor": largest}


def format_plan(plan: MergePlan) -> str:
    """Renders the plan as a table, one row for all layers that fare alike.

    Returns:
        Text of several lines: action, number of tensors, shape, dtype, name with `*` for all layers
        or `{14-27}` for some, and the reason; then what is set aside, and notes.
    """
    everywhere: dict[str, set[int]] = {}
    layers: dict[tuple[str, ...], set[int]] = {}
    counts: dict[tuple[str, ...], int] = {}
    for tensor in plan.tensors:
        pattern, layer = _split_layer(tensor.name)
        row = (
            tensor.action,
            "x".join(map(str, tensor.shape)),
            tensor.dtype,
            pattern,
            tensor.reason,
        )
        counts[row] = counts.get(row, 0) + 1
        everywhere.setdefault(pattern, set()).add(layer)
        layers.setdefault(row, set()).add(layer)
    cells = [("action", "count", "shape", "dtype", "tensor", "reason")]
    for fate, count in counts.items():
        action, shape, dtype, pattern, reason = fate
        shown = "*" if layers[fate] == everywhere[pattern] else f"{{{_ranges(layers[fate])}}}"
        cells.append((action, str(count), shape, dtype, pattern.replace("*", shown), reason))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:5]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
        for row in cells
    ]
    unused: dict[tuple[str, str, str], int] = {}
    for role, name, reason in plan.unused:
        key = (role, _split_layer(name)[0], reason)
        unused[key] = unused.get(key, 0) + 1
    lines += [f"set aside: {role} {name} x{n} ({why})" for (role, name, why), n in unused.items()]
    n_merged = sum(tensor.action not in COPIES for tensor in plan.tensors)
    lines.append(f"{n_merged} tensors merged, {len(plan.tensors) - n_merged} copied")
    return "\n".join([*lines, *plan.notes])


def _split_layer(name: str) -> tuple[str, int]:
    """Splits the number of a layer off a name; -1 where there is none."""
    match = re.search(r"(?<=\.)(?:layers?|blocks)\.(\d+)(?=\.)", name)
    if match is None:
        return name, -1
    return f"{name[: match.start(1)]}*{name[match.end(1) :]}", int(match[1])


def _ranges(numbers: set[int]) -> str:
    """Writes 0, 2, 3, 4 as 0,2-4."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
