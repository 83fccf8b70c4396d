"""A LoRA adapter put back into the weights that it was trained on.

    W' = W + s B A,   s = alpha / r (alpha / sqrt(r) for rank-stabilised LoRA)

for every linear that the adapter changes, in fp32, stored in the dtype of W. One tensor is in
memory at a time; what the adapter leaves alone is copied byte for byte. peft's `merge_and_unload`
gives the same weights, but holds the model, and rounds to its dtype where that is not fp32.

LoRA: Hu et al., arXiv 2106.09685; the factor with sqrt(r): Kalajdzievski, arXiv 2312.03732.
"""

import json
import math
import re
import reprlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xxhash

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import canonical_name, get_family, group_of
from merge.journal import empty_folder, hold_folder, let_go
from merge.output import (
    RECORD_NAME,
    OutputFile,
    OutputTensor,
    check_output,
    copy_companions,
    move_into_place,
    output_path,
    part_folder,
    write_index,
)
from merge.shards import SafetensorsFile, ShardWriter, from_float, is_finite
from merge.verify import read_record

SETTINGS_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTED = "adapted"
"""Group of the changed tensors in merge.json; the others keep theirs."""
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MODULE = r"(.*\.)?({})$"
"""peft's rule: a pattern is the module's name or its end"""
# Settings under which the weights are more than W + s B A.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)
# Initialisations that also change W, which is then not the checkpoint's any more.
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Factors:
    """What the adapter adds to one tensor."""

    down: str
    """name of A, [r, in]"""
    up: str
    """name of B, [out, r]"""
    scale: float


def find_adapter(source: str | Path) -> Path:
    """The adapter's folder: `source` itself, or the last policy of a run folder.

    Raises:
        MergeError: Neither is there.
    """
    try:
        folder = Path(source).expanduser()
        is_adapter = (folder / SETTINGS_NAME).is_file()
    except (OSError, RuntimeError) as error:  # too long a name; the home of nobody
        raise MergeError(f"{source}: cannot be a folder ({error}); check the path") from error
    if is_adapter:
        return folder
    done = folder / "done.json"
    if done.is_file():
        try:
            folder = folder / json.loads(done.read_text(encoding="utf-8"))["policy"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MergeError(
                f"{done}: names no policy ({error!r}); give the adapter's own folder"
            ) from error
        if (folder / SETTINGS_NAME).is_file():
            return folder
        raise MergeError(
            f"{folder}: is a whole policy, not an adapter; it needs no merging (lora.r was 0)"
        )
    numbered = {
        int(path.parent.name.rpartition("-")[2]): path.parent
        for path in folder.glob(f"checkpoints/checkpoint-*/{SETTINGS_NAME}")
        if re.fullmatch(r"checkpoint-\d{1,18}", path.parent.name)
    }
    if numbered:
        return numbered[max(numbered)]
    raise MergeError(
        f"{source}: holds no {SETTINGS_NAME}, nor checkpoints with one; give a run's folder or an "
        "adapter's"
    )


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    families: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes a whole policy: the base's folder with the adapter in its weights.

    Args:
        adapter: Folder that peft saved, or the run folder of a training with `lora.r` above 0.
        output: Folder to write.
        base: Checkpoint that the adapter was trained on; None for the one that it names itself,
            which must be as it was then where the adapter lies in a run folder that says so.
        families: YAML file with further model families.
        overwrite: Replace an output that a merge wrote.
        dry_run: Check names, shapes and the output, write nothing.

    Returns:
        The content of merge.json; `obm merge verify` checks the folder by it. Without its `tensors`
        for a dry run.

    Raises:
        MergeError: An adapter that is more than W + s B A, a target that the base does not have or
            that has another shape, a base that has changed since, values that are not finite, or an
            output that another merge is writing; nothing is left of this one then.
    """
    folder, output = find_adapter(adapter), output_path(output)
    settings = _read_settings(folder)
    source = str(base or settings.get("base_model_name_or_path") or "")
    if not source:
        raise MergeError(f"{folder / SETTINGS_NAME}: names no base model; give --base FOLDER")
    checkpoint = Checkpoint(source, "base", "--base")
    family = get_family(checkpoint.config.get("model_type"), source, families)
    weights = SafetensorsFile(_weights_file(folder))
    canonical = {canonical_name(family, name) or name: name for name in checkpoint.tensors}
    plan: dict[str, Factors] = {}
    for module, factors in _pair_factors(weights, settings).items():
        name = canonical.get(canonical_name(family, f"{module}.weight") or f"{module}.weight")
        if name is None:
            raise MergeError(
                f"{weights.path}: changes {module}.weight, which {source} does not have; "
                "give the --base that the adapter was trained on"
            )
        _check_shapes(checkpoint, name, weights, factors)
        plan[name] = factors

    files = [
        OutputFile(
            file.path.name,
            tuple(OutputTensor(i.name, i.dtype, i.shape) for i in file.tensors.values()),
            file.metadata or {"format": "pt"},
        )
        for file in checkpoint.files
    ]
    sources = {"base": checkpoint.folder, "adapter": folder}
    check_output(output, sources, sum(file.n_bytes for file in files), overwrite)
    record: dict[str, Any] = {
        "method": "adapter",
        "parents": {"vlm": {"source": source, "revision": checkpoint.revision}},
        "adapter": {"source": str(folder), "settings": settings, "tensors": len(plan)},
    }
    if dry_run:
        return record
    part = part_folder(output)
    start = {} if base else _start_checksums(folder)
    held = hold_folder(part)
    try:
        empty_folder(part)
        tensors: dict[str, Any] = {}
        for file in files:
            layout = [(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors]
            writer = ShardWriter(part / file.name, layout, file.metadata)
            try:
                for tensor in file.tensors:
                    entry = _write(checkpoint, tensor.name, weights, plan, writer)
                    group = group_of(family, canonical_name(family, tensor.name) or tensor.name)
                    tensors[tensor.name] = {
                        "group": ADAPTED if tensor.name in plan else group,
                        "dtype": tensor.dtype,
                        "shape": list(tensor.shape),
                        **entry,
                    }
            finally:
                writer.close()
        for name, entry in tensors.items() if start else ():
            if start.get(name) != entry["inputs"]["vlm"]:
                raise MergeError(
                    f"{source}: {name} is not what {folder} was trained on, by the run's "
                    f"{RECORD_NAME}; put that start back, or give --base"
                )
        copy_companions(checkpoint.folder, part)
        write_index(part, files)
        record["tensors"] = tensors
        (part / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        move_into_place(part, output, overwrite)
    except OSError as error:
        raise MergeError(
            f"{output}: cannot be written ({error}); free space or choose another output"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        let_go(part, held)
    return record


def _read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked to be a LoRA that is W + s B A and nothing else."""
    path = folder / SETTINGS_NAME
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MergeError(f"{path}: is no settings file of peft ({error!r}); save again") from error
    if kind != "LORA":
        raise MergeError(f"{path}: is a {kind} adapter; only LORA can be merged")
    used = [key for key in _UNSUPPORTED if settings.get(key)]
    used += ["bias"] if settings.get("bias", "none") != "none" else []
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
        used.append(f"init_lora_weights: {start}")
    if used:
        raise MergeError(
            f"{path}: uses {', '.join(used)}, which is more than W + s B A; merge it with peft "
            "(merge_and_unload, then save_pretrained)"
        )
    _number(path, settings, "lora_alpha")
    for key, check in (("alpha_pattern", _number), ("rank_pattern", _rank)):
        _check_patterns(path, key, settings.get(key) or {}, check)
    if "r" in settings:
        _rank(path, settings, "r")
    if not isinstance(settings.get("use_rslora"), bool | None):
        _fail(path, "use_rslora", settings["use_rslora"], "true or false")
    return dict(settings)


def _check_patterns(path: Path, key: str, patterns: Any, check: Callable[..., None]) -> None:
    """A section of peft's, module pattern -> value."""
    if not isinstance(patterns, dict):
        _fail(path, key, patterns, "patterns of module names, each with a number")
    for pattern in patterns:
        try:
            re.compile(_MODULE.format(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise MergeError(
                f"{path}:{key}: {pattern!r} is no pattern ({error}); save the adapter again"
            ) from error
        check(path, patterns, pattern, f"{key}.")


def _number(path: Path, values: Mapping[str, Any], key: str, prefix: str = "") -> None:
    value = values.get(key)
    try:
        is_number = isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        is_number = False
    if not is_number or isinstance(value, bool):
        _fail(path, prefix + key, value, "a finite number")


def _rank(path: Path, values: Mapping[str, Any], key: str, prefix: str = "") -> None:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        _fail(path, prefix + key, value, "a whole number of 1 or more")


def _fail(path: Path, key: str, value: Any, expected: str) -> NoReturn:
    shown = "nothing" if value is None else reprlib.repr(value)
    raise MergeError(f"{path}:{key}: expected {expected}, got {shown}; save the adapter again")


def _weights_file(folder: Path) -> Path:
    if not (folder / WEIGHTS_NAME).is_file():
        raise MergeError(
            f"{folder}: has no {WEIGHTS_NAME}; save the adapter with save_pretrained (a pickle is "
            "not opened, because that can run code)"
        )
    return folder / WEIGHTS_NAME


def _pair_factors(weights: SafetensorsFile, settings: Mapping[str, Any]) -> dict[str, Factors]:
    """Module -> its factors; refuses any other tensor, and a factor without the other."""
    found: dict[str, dict[str, str]] = {}
    for name in weights.tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise MergeError(
                f"{weights.path}: holds {name}, which is no factor of a linear; merge it with peft "
                "(merge_and_unload, then save_pretrained)"
            )
        found.setdefault(match[1], {})[match[2]] = name
    if not found:
        raise MergeError(f"{weights.path}: holds no tensor; save the adapter again")
    plan = {}
    for module, pair in found.items():
        if set(pair) != {"A", "B"}:
            missing = "B" if "A" in pair else "A"
            raise MergeError(
                f"{weights.path}: {module} has no lora_{missing}; save the adapter again"
            )
        shape = weights.tensors[pair["A"]].shape
        rank = shape[0] if shape else 0
        alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        # the scale is by this rank: weights of another training would be merged at a wrong one
        said = _by_pattern(settings.get("rank_pattern"), module, settings.get("r", rank))
        if rank < 1 or said != rank:
            raise MergeError(
                f"{weights.path}: {module} has rank {rank}, {SETTINGS_NAME} says {said:g}; "
                "save both again, from the same training"
            )
        divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
        plan[module] = Factors(pair["A"], pair["B"], alpha / divisor)
    return plan


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that fits, as peft has it."""
    for pattern, value in (patterns or {}).items():
        if re.match(_MODULE.format(pattern), module):
            return float(value)
    return float(default)


def _check_shapes(
    checkpoint: Checkpoint, name: str, weights: SafetensorsFile, factors: Factors
) -> None:
    down, up = (weights.tensors[factor].shape for factor in (factors.down, factors.up))
    expected = (*up[:1], *down[1:])
    stored = checkpoint.tensors[name].shape
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or expected != stored:
        raise MergeError(
            f"{weights.path}: {factors.up} {list(up)} times {factors.down} {list(down)} does not "
            f"fit {name} {list(stored)} of {checkpoint.source}; give the --base that the adapter "
            "was trained on"
        )


def _start_checksums(folder: Path) -> dict[str, str]:
    """Tensor -> checksum in the merge that the adapter's run began with; empty where unknown."""
    for run in folder.absolute().parents[:2]:
        if (run / "config.yaml").is_file() and (run / RECORD_NAME).is_file():
            tensors = read_record(run)["tensors"]
            return {name: entry["checksum"] for name, entry in tensors.items()}
    return {}


def _write(
    checkpoint: Checkpoint,
    name: str,
    weights: SafetensorsFile,
    plan: Mapping[str, Factors],
    writer: ShardWriter,
) -> dict[str, Any]:
    """Puts one tensor in its place; returns its checksum and that of the base's."""
    if name not in plan:
        digest, begin = xxhash.xxh3_128(), 0
        for chunk in checkpoint.file_of(name).read_chunks(name):
            digest.update(chunk)
            writer.write(name, begin, chunk)
            begin += len(chunk)
        return {"checksum": digest.hexdigest(), "inputs": {"vlm": digest.hexdigest()}}
    factors, dtype = plan[name], checkpoint.tensors[name].dtype
    delta = weights.read(factors.up) @ weights.read(factors.down)  # [out, in]
    merged = checkpoint.read(name) + np.float32(factors.scale) * delta
    stored = np.ascontiguousarray(from_float(merged, dtype))
    if not is_finite(stored, dtype):
        raise MergeError(
            f"{name}: a merged value is not finite in {dtype}; the adapter or the base holds NaN, "
            "infinity or too large a number"
        )
    writer.write(name, 0, stored)
    return {
        "checksum": xxhash.xxh3_128_hexdigest(stored.data),
        "inputs": {"vlm": checkpoint.checksum(name)},
    }
