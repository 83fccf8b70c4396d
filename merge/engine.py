"""Merge three checkpoints into one: plan, validate, apply.

    python -c "from merge.engine import merge; merge('base', 'vlm', 'agent', 'merged', ...)"

or, from the command line, `obm merge --config configs/demo.yaml`.

Nothing is written before everything is checked: names, shapes, vocabularies, settings, statistics,
the output folder, free space. The folder is then built beside its final place and renamed, so it
either is complete or does not exist. Arithmetic is in fp32; each tensor is rounded once, to nearest
even, to the dtype it has in the VLM. Memory holds one tensor of each parent at a time.
"""

import importlib.metadata
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from merge.calibration import SecondMoments, load_stats
from merge.card import render_card
from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.methods import COMBINATIONS, METHODS, NORMALIZATIONS, MethodSettings, Statistics
from merge.output import RECORD_NAME, check_output, copy_companions, move_into_place
from merge.plan import MergePlan, PlannedTensor, format_plan, make_plan, resolve_scope
from merge.report import figures, group_figures, total_figures
from merge.shards import DTYPES, hash_file, tensor_bytes, write_safetensors

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
TASKS = ("vlm", "agent")


def merge(
    base: str | Path,
    vlm: str | Path,
    agent: str | Path,
    output: str | Path,
    *,
    method: str = "obm",
    density: float = 0.5,
    weights: Mapping[str, float] | None = None,
    normalization: str = "none",
    combine: str = "sum",
    scope: Mapping[str, str | None] | None = None,
    stats: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    saliency: str = "diagonal",
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Merges the agent into the VLM and writes a checkpoint folder.

    Args:
        base: Folder or hub id of the base language model, theta_B.
        vlm: The vision-language model, theta_V.
        agent: The text search agent, theta_S.
        output: Folder to write.
        method: obm, task_arithmetic, ties or dare, for the groups whose scope says `method`.
        density: Share of entries that each task vector keeps.
        weights: lambda_k for `vlm` and `agent`; 1 each when None.
        normalization: none, mean or rank; see `methods.normalise_saliency`.
        combine: sum or mean; see `methods.obm`.
        scope: What happens to linear, norm_bias and embedding tensors; see `plan.resolve_scope`.
        stats: Task -> stats.safetensors; needed by OBM.
        seed: Seed of DARE.
        saliency: Only `diagonal`.
        overwrite: Replace an output folder that an earlier merge wrote.
        dry_run: Check everything, write nothing.

    Returns:
        The content of merge.json; for a dry run `{"dry_run": True, "table": ..., "tensors": ...}`
        with the plan as text and as data.

    Raises:
        MergeError: Whatever cannot be merged or written, before anything is written.
    """
    actions = resolve_scope(scope, method)
    weights = dict.fromkeys(TASKS, 1.0) if weights is None else dict(weights)
    settings = MethodSettings(weights, density, normalization, combine, seed)
    _check_settings(settings, saliency)
    output = Path(output).expanduser()
    parents = {
        role: Checkpoint(source, role)
        for role, source in zip(("base", "vlm", "agent"), (base, vlm, agent), strict=True)
    }
    check_output(output, parents, overwrite)
    plan = make_plan(**parents, method=method, scope=scope)
    moments = _load_moments(stats, plan)

    tensors: dict[str, dict[str, Any]] = {
        t.name: {"group": t.group, "action": t.action, "reason": t.reason} for t in plan.tensors
    }
    if dry_run:
        return {"dry_run": True, "table": format_plan(plan), "tensors": tensors}

    _check_stats_match(moments, parents)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "settings": {
            "density": density,
            "weights": weights,
            "saliency": saliency,
            "normalization": normalization,
            "combine": combine,
            "scope": actions,
            "seed": seed,
        },
        "parents": {
            role: {"source": parent.source, "sha256": parent.sha256, "files": parent.hashes}
            for role, parent in parents.items()
        },
        "stats": {
            task: {"source": str((stats or {})[task]), **moment.metadata}
            for task, moment in moments.items()
        },
        "versions": {"obm-warmstart": _version(), "torch": torch.__version__},
    }
    part = output.with_name(f".{output.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        counts = _write_weights(part, plan, parents, moments, settings)
        copy_companions(parents["vlm"].folder, part)
        for name, count in counts.items():
            tensors[name].update(figures(count))
        record["output"] = {
            "files": {p.name: hash_file(p) for p in sorted(part.glob("*.safetensors"))}
        }
        record["totals"] = total_figures(plan, counts)
        record["groups"] = group_figures(plan, counts)
        record["unused"] = [list(entry) for entry in plan.unused]
        record["tensors"] = tensors
        (part / "README.md").write_text(render_card(record, output.name), encoding="utf-8")
        (part / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        move_into_place(part, output)
    except OSError as error:
        raise MergeError(f"{output}: cannot be written ({error}); choose another output") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    logger.info("merged %s, %s and %s by %s into %s", base, vlm, agent, method, output)
    return record


# ---- validate


def _check_settings(settings: MethodSettings, saliency: str) -> None:
    if not 0.0 <= settings.density <= 1.0:
        raise MergeError(f"merge.density: {settings.density} is not between 0 and 1")
    if set(settings.weights) != set(TASKS):
        raise MergeError(
            f"merge.weights: has {', '.join(settings.weights) or 'nothing'}; "
            f"give {' and '.join(TASKS)}"
        )
    for task, weight in settings.weights.items():
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise MergeError(f"merge.weights.{task}: {weight!r} is not a finite number")
    for key, value, allowed in (
        ("normalization", settings.normalization, NORMALIZATIONS),
        ("combine", settings.combine, COMBINATIONS),
        ("saliency", saliency, ("diagonal",)),
    ):
        if value not in allowed:
            raise MergeError(f"merge.{key}: {value!r} is unknown; choose {', '.join(allowed)}")


def _load_moments(
    stats: Mapping[str, str | Path] | None, plan: MergePlan
) -> dict[str, SecondMoments]:
    """Loads the statistics that OBM needs, and checks that they cover every tensor it merges."""
    weighed = [tensor for tensor in plan.tensors if tensor.action == "obm"]
    if not weighed:
        return {}
    moments = {}
    for task in TASKS:
        if task not in (stats or {}):
            raise MergeError(
                f"merge.method=obm needs second moments of {task}; run `obm calibrate` first, or "
                "choose merge.method=task_arithmetic"
            )
        moments[task] = load_stats((stats or {})[task])
        for tensor in weighed:
            linear = tensor.canonical.removesuffix(".weight")
            vector = moments[task].get(linear)
            if vector is None or tuple(vector.shape) != tensor.shape[-1:]:
                found = "nothing" if vector is None else f"{vector.numel()} channels"
                raise MergeError(
                    f"{(stats or {})[task]}: has {found} for {linear}, the tensor has "
                    f"{tensor.shape[-1]} inputs; calibrate again with this checkpoint"
                )
    return moments


def _check_stats_match(
    moments: Mapping[str, SecondMoments], parents: Mapping[str, Checkpoint]
) -> None:
    for task, moment in moments.items():
        made_for = moment.metadata.get("model_sha256", "")
        if made_for and made_for != parents[task].sha256:
            raise MergeError(
                f"second moments of {task} were made with other weights (model {made_for[:12]}, "
                f"{parents[task].source} is {parents[task].sha256[:12]}); calibrate again"
            )


# ---- apply


def _write_weights(
    folder: Path,
    plan: MergePlan,
    parents: Mapping[str, Checkpoint],
    moments: Mapping[str, SecondMoments],
    settings: MethodSettings,
) -> dict[str, Statistics]:
    """Writes one output shard for each of the VLM's; returns counts of the merged tensors."""
    vlm = parents["vlm"]
    planned = {tensor.name: tensor for tensor in plan.tensors}
    counts: dict[str, Statistics] = {}
    # disable=None: a bar on a terminal, silence in a log
    bar = tqdm(total=len(planned), desc="merge", unit="tensor", disable=None)

    def read(name: str) -> Iterable[bytes]:
        tensor = planned[name]
        bar.update()
        if tensor.action == "vlm":
            return vlm.read_chunks(name)
        if tensor.action == "base":
            assert tensor.base_name is not None
            return [_encode(parents["base"].read(tensor.base_name), tensor)]
        merged, counts[name] = _merge_tensor(tensor, parents, moments, settings)
        return [_encode(merged, tensor)]

    with bar:
        for file in vlm.files:
            infos = [file.tensors[t.name] for t in plan.tensors if t.name in file.tensors]
            write_safetensors(
                folder / file.path.name, infos, read, file.metadata or {"format": "pt"}
            )
    return counts


def _merge_tensor(
    tensor: PlannedTensor,
    parents: Mapping[str, Checkpoint],
    moments: Mapping[str, SecondMoments],
    settings: MethodSettings,
) -> tuple[Tensor, Statistics]:
    assert tensor.base_name is not None
    assert tensor.agent_name is not None
    stored = {"base": tensor.base_name, "vlm": tensor.name, "agent": tensor.agent_name}
    values = {role: parents[role].read(name).float() for role, name in stored.items()}
    for role, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise MergeError(
                f"{role} {parents[role].source}: tensor {stored[role]} holds NaN or infinity; "
                "use a checkpoint that is sound"
            )
    base = values["base"]
    deltas = {task: values[task] - base for task in TASKS}
    linear = tensor.canonical.removesuffix(".weight")
    second_moments = {task: moment[linear] for task, moment in moments.items() if linear in moment}
    merged, count = METHODS[tensor.action](
        base,
        deltas,
        second_moments or None,
        MethodSettings(
            weights=settings.weights,
            density=settings.density,
            normalization=settings.normalization,
            combine=settings.combine,
            seed=settings.seed,
            tensor_name=tensor.canonical,
        ),
    )
    return restore_parents(merged, base, [values[task] for task in TASKS]), count


def restore_parents(merged: Tensor, base: Tensor, parents: Iterable[Tensor]) -> Tensor:
    """Undoes the rounding of entries that are a parent's own.

    In fp32, base + (parent - base) may miss the parent's value by the last bit (or, where base is
    far larger, by more). Where the merged value is what fp32 makes of base + (parent - base), the
    parent's value is exact and is taken; where it equals the base, the base's (a signed zero).
    So an agent that equals the base leaves the VLM's bits untouched.

    Args:
        merged: fp32, any shape.
        base: fp32, same shape.
        parents: fp32, same shape; the first one has precedence.

    Returns:
        fp32, same shape.
    """
    result = torch.where(merged == base, base, merged)
    for parent in reversed(list(parents)):
        result = torch.where(merged == base + (parent - base), parent, result)
    return result


def _encode(value: Tensor, tensor: PlannedTensor) -> bytes:
    """Rounds to the output's dtype (to nearest even) and returns the bytes."""
    encoded = value.float().to(DTYPES[tensor.dtype])
    if not bool(torch.isfinite(encoded).all()):
        raise MergeError(
            f"{tensor.name}: a merged value does not fit {tensor.dtype}; lower merge.weights"
        )
    return tensor_bytes(encoded)


def _version() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("obm-warmstart")
    return "not installed"
