"""The plan: what happens to every tensor, known and checked before anything is read or written.

Every tensor of the VLM is merged or copied, with a reason. Every tensor of the base and of the
agent is used, or set aside with a reason. Whatever fits neither is an error: a tensor that a merge
skips silently makes a model that is wrong without saying so.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import (
    EMBED_TOKENS,
    EMBEDDING,
    LINEAR,
    LM_HEAD,
    NORM_BIAS,
    SHARED_CONFIG_KEYS,
    VISION,
    Family,
    canonical_name,
    get_family,
    group_of,
)
from merge.methods import METHODS
from merge.shards import MERGEABLE_DTYPES, TensorInfo

COPIES = ("vlm", "base")
DEFAULT_SCOPE = {LINEAR: "method", NORM_BIAS: "task_arithmetic", EMBEDDING: "vlm"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged checkpoint."""

    name: str
    """Name in the VLM's files, and in the output."""
    canonical: str
    """Name on the hub, shared by all members of the family."""
    group: str
    """linear, norm_bias, embedding or vision."""
    action: str
    """A method's name, `vlm` (copied byte for byte) or `base` (copied in the VLM's dtype)."""
    reason: str
    shape: tuple[int, ...]
    dtype: str
    base_name: str | None = None
    """Name in the base's files; None for vision tensors."""
    agent_name: str | None = None
    """Name in the agent's files; None for vision tensors."""


@dataclass(frozen=True)
class MergePlan:
    """All tensors of the output, in the order of the VLM's files, and what is set aside."""

    tensors: tuple[PlannedTensor, ...]
    unused: tuple[tuple[str, str, str], ...]
    """(role, tensor, reason) for tensors of base and agent that the output has no place for."""
    notes: tuple[str, ...]


def resolve_scope(scope: Mapping[str, str | None] | None, method: str) -> dict[str, str]:
    """Completes the scope: which action each group of language tensors gets.

    Args:
        scope: Group (linear, norm_bias, embedding) -> a method's name, `vlm`, `base`, or `method`
            for the merge's method. Groups left out keep their default: linear `method`, norm_bias
            `task_arithmetic`, embedding `vlm`.
        method: The merge's method.

    Raises:
        MergeError: An unknown group or action, or OBM outside of linear projections.
    """
    if method not in METHODS:
        raise MergeError(f"merge.method: {method!r} is unknown; choose {', '.join(METHODS)}")
    actions: dict[str, str] = dict(DEFAULT_SCOPE)
    for group, action in (scope or {}).items():
        if group not in DEFAULT_SCOPE:
            raise MergeError(f"merge.scope.{group}: is unknown; choose {', '.join(DEFAULT_SCOPE)}")
        actions[group] = action or DEFAULT_SCOPE[group]
    for group, action in actions.items():
        if action == "method":
            actions[group] = action = method
        if action not in METHODS and action not in COPIES:
            raise MergeError(
                f"merge.scope.{group}: {action!r} is unknown; "
                f"choose {', '.join((*METHODS, *COPIES))}"
            )
        if action == "obm" and group != LINEAR:
            raise MergeError(
                f"merge.scope.{group}: obm weighs a matrix by its inputs, which {group} tensors "
                "do not have; choose task_arithmetic or vlm"
            )
    return actions


def make_plan(
    base: Checkpoint,
    vlm: Checkpoint,
    agent: Checkpoint,
    *,
    method: str = "obm",
    scope: Mapping[str, str | None] | None = None,
) -> MergePlan:
    """Decides on every tensor from the three checkpoints' headers; reads no weights.

    Args:
        base: The base language model that both others come from.
        vlm: The vision-language model, whose layout, vision tower and projector the output has.
        agent: The text search agent.
        method: Method of the groups whose scope says `method`.
        scope: See `resolve_scope`.

    Raises:
        MergeError: An unsupported architecture, a tensor that only one side has or nobody knows,
            shapes, settings or vocabularies that differ.
    """
    actions = resolve_scope(scope, method)
    _check_roles(base, vlm, agent)
    vlm_names = _canonical_names(vlm)
    others = {"base": _canonical_names(base), "agent": _canonical_names(agent)}
    parents = {"base": base, "agent": agent}
    _check_shapes(vlm, vlm_names, parents, others)
    _check_shared_config(vlm, parents)
    checked_tokens = _check_tokenizers(vlm, parents)

    family = _family(vlm)
    used: dict[str, set[str]] = {"base": set(), "agent": set()}
    planned = {}
    for canonical, name in vlm_names.items():
        info = vlm.tensors[name]
        group = group_of(family, canonical)
        if group == VISION:
            part = "projector" if ".merger." in canonical else "vision tower"
            planned[name] = PlannedTensor(
                name, canonical, VISION, "vlm", f"{part} of the VLM", info.shape, info.dtype
            )
            continue
        assert group is not None
        names = {
            role: _language_name(canonical, others[role], parents[role], used[role])
            for role in others
        }
        action = actions[group]
        if action != "vlm":
            _check_dtype(vlm, info)
            for role, parent in parents.items():
                _check_dtype(parent, parent.tensors[names[role]])
        planned[name] = PlannedTensor(
            name=name,
            canonical=canonical,
            group=group,
            action=action,
            reason=f"scope {group}: {'copied from ' if action in COPIES else ''}{action}",
            shape=info.shape,
            dtype=info.dtype,
            base_name=names["base"],
            agent_name=names["agent"],
        )

    unused = tuple(
        (role, name, _why_unused(canonical, name, parents[role], vlm_names, actions))
        for role in others
        for canonical, name in others[role].items()
        if canonical not in used[role]
    )
    notes = [f"vocabulary: {checked_tokens}"]
    if vlm.ties_embeddings and LM_HEAD not in vlm_names:
        notes.append("lm_head: tied to embed_tokens, not stored")
    # In the order of the VLM's files, so that shards can be written front to back.
    ordered = tuple(planned[name] for file in vlm.files for name in _file_order(file.tensors))
    return MergePlan(ordered, unused, tuple(notes))


def _family(checkpoint: Checkpoint) -> Family:
    where = f"{checkpoint.role} {checkpoint.source}"
    return get_family(checkpoint.config.get("model_type"), where)


def _file_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    return sorted(tensors, key=lambda name: (tensors[name].begin, name))


def _check_roles(base: Checkpoint, vlm: Checkpoint, agent: Checkpoint) -> None:
    for checkpoint in (base, agent):
        _family(checkpoint)
    if not _family(vlm).has_vision:
        raise MergeError(
            f"vlm {vlm.source}: is a text model ({vlm.config.get('model_type')}); "
            "give the vision-language model as models.vlm"
        )


def _canonical_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Maps canonical names to stored names; refuses unknown and doubled ones."""
    family = _family(checkpoint)
    names: dict[str, str] = {}
    for name in checkpoint.tensors:
        canonical = canonical_name(family, name)
        where = f"{checkpoint.role} {checkpoint.source}"
        if group_of(family, canonical) is None:
            raise MergeError(
                f"{where}: tensor {name} is not part of {family.model_type}; "
                "save the model with save_pretrained, without adapters or quantisation"
            )
        if canonical in names:
            raise MergeError(f"{where}: {names[canonical]} and {name} are the same tensor")
        names[canonical] = name
    return names


def _check_shapes(
    vlm: Checkpoint,
    vlm_names: Mapping[str, str],
    parents: Mapping[str, Checkpoint],
    others: Mapping[str, Mapping[str, str]],
) -> None:
    """Compares every tensor that a parent shares with the VLM, also those that are copied."""
    for role, names in others.items():
        for canonical, name in names.items():
            if canonical not in vlm_names or canonical.startswith("visual."):
                continue
            shape = list(parents[role].tensors[name].shape)
            expected = list(vlm.tensors[vlm_names[canonical]].shape)
            if shape == expected:
                continue
            if canonical in (EMBED_TOKENS, LM_HEAD) and shape[1:] == expected[1:]:
                raise MergeError(
                    f"{canonical}: {role} {parents[role].source} has shape {shape}, the VLM "
                    f"{expected}: the vocabularies differ; use models that share a base, or "
                    f"resize the {role}'s embedding to the VLM's vocabulary "
                    "(resize_token_embeddings) and save it again"
                )
            raise MergeError(
                f"{canonical}: {role} {parents[role].source} has shape {shape}, the VLM "
                f"{expected}; base, VLM and agent must come from one base model"
            )


def _check_shared_config(vlm: Checkpoint, parents: Mapping[str, Checkpoint]) -> None:
    expected = _shared_settings(vlm)
    for checkpoint in parents.values():
        for key, value in _shared_settings(checkpoint).items():
            if key in expected and expected[key] != value:
                raise MergeError(
                    f"{checkpoint.role} {checkpoint.source}: {key} is {value}, the VLM's is "
                    f"{expected[key]}; base, VLM and agent must come from one base model"
                )


def _shared_settings(checkpoint: Checkpoint) -> dict[str, object]:
    config = checkpoint.text_config
    rope = config.get("rope_parameters") or {}
    settings = {key: config.get(key) for key in SHARED_CONFIG_KEYS}
    settings["rope_theta"] = rope.get("rope_theta", config.get("rope_theta"))
    return {key: value for key, value in settings.items() if value is not None}


def _check_tokenizers(vlm: Checkpoint, parents: Mapping[str, Checkpoint]) -> str:
    """Compares token ids where tokenizer.json is there: equal sizes may hide unequal tokens."""
    expected = _token_ids(vlm)
    compared = []
    for role, parent in parents.items():
        tokens = _token_ids(parent)
        if expected is None or tokens is None:
            continue
        compared.append(role)
        for token, index in tokens.items():
            if expected.get(token, index) != index:
                raise MergeError(
                    f"{parent.folder / 'tokenizer.json'}: token {token!r} has id {index}, in the "
                    f"VLM {expected[token]}: the vocabularies differ; use models that share a base"
                )
    if not compared:
        return "sizes agree, token ids not compared (no tokenizer.json)"
    return f"sizes and token ids of {' and '.join(compared)} agree with the VLM's"


def _token_ids(checkpoint: Checkpoint) -> dict[str, int] | None:
    path = checkpoint.folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        tokens = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        tokens.update({entry["content"]: entry["id"] for entry in content.get("added_tokens", [])})
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{path}: is not a tokenizer file; copy it again") from error
    return tokens


def _check_dtype(checkpoint: Checkpoint, info: TensorInfo) -> None:
    if info.dtype not in MERGEABLE_DTYPES:
        raise MergeError(
            f"{checkpoint.role} {checkpoint.source}: tensor {info.name} is {info.dtype}; merging "
            f"needs {', '.join(MERGEABLE_DTYPES)}: give the checkpoint before quantisation"
        )


def _language_name(
    canonical: str, names: Mapping[str, str], parent: Checkpoint, used: set[str]
) -> str:
    """Finds the parent's name of a language tensor; a tied lm_head is its embed_tokens."""
    if canonical not in names and canonical == LM_HEAD and parent.ties_embeddings:
        canonical = EMBED_TOKENS
    if canonical not in names:
        raise MergeError(
            f"{canonical}: the VLM has it, {parent.role} {parent.source} does not; "
            "base, VLM and agent must come from one base model"
        )
    used.add(canonical)
    return names[canonical]


def _why_unused(
    canonical: str,
    name: str,
    parent: Checkpoint,
    vlm_names: Mapping[str, str],
    actions: Mapping[str, str],
) -> str:
    if canonical.startswith("visual."):
        return "vision tower and projector are the VLM's"
    if canonical == LM_HEAD and LM_HEAD not in vlm_names:
        if parent.ties_embeddings:
            return "a copy of embed_tokens"
        if actions[EMBEDDING] == "vlm":
            return "the VLM ties lm_head to embed_tokens, and embeddings are the VLM's"
        raise MergeError(
            f"{name}: {parent.role} {parent.source} has an lm_head of its own, the VLM ties it to "
            "embed_tokens; set merge.scope.embedding=vlm"
        )
    raise MergeError(
        f"{name}: {parent.role} {parent.source} has it, the VLM does not; "
        "base, VLM and agent must come from one base model"
    )


def format_plan(plan: MergePlan) -> str:
    """Renders the plan as a table, one row for all layers that fare alike.

    Returns:
        Text of several lines: action, number of tensors, shape, dtype, name with `*` for the layer,
        and the reason; then what is set aside, and notes.
    """
    counts: dict[tuple[str, ...], int] = {}
    for tensor in plan.tensors:
        shape = "x".join(map(str, tensor.shape))
        row = (tensor.action, shape, tensor.dtype, _layer_pattern(tensor.name), tensor.reason)
        counts[row] = counts.get(row, 0) + 1
    rows = [
        ("action", "count", "shape", "dtype", "tensor", "reason"),
        *((row[0], str(count), *row[1:]) for row, count in counts.items()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
        for row in rows
    ]
    unused: dict[tuple[str, str, str], int] = {}
    for role, name, reason in plan.unused:
        key = (role, _layer_pattern(name), reason)
        unused[key] = unused.get(key, 0) + 1
    lines += [f"set aside: {role} {name} x{n} ({why})" for (role, name, why), n in unused.items()]
    n_merged = sum(tensor.action not in COPIES for tensor in plan.tensors)
    lines.append(f"{n_merged} tensors merged, {len(plan.tensors) - n_merged} copied")
    return "\n".join([*lines, *plan.notes])


def _layer_pattern(name: str) -> str:
    return re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.*.", name)
