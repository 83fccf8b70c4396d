"""The plan: what happens to every tensor, known and checked before anything is read or written.

Every tensor of the VLM is merged or copied, with a reason. Every tensor of the other parents is
used, or set aside with a reason. Whatever fits neither is an error: a tensor that a merge skips
silently makes a model that is wrong without saying so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from merge.checkpoint import Checkpoint
from merge.compatibility import (
    ONE_BASE,
    canonical_names,
    check_settings,
    check_shapes,
    find_families,
)
from merge.errors import MergeError
from merge.families import (
    BUFFER,
    EMBED_TOKENS,
    EMBEDDING,
    LM_HEAD,
    VISION,
    Family,
    group_of,
    is_projector,
    layer_of,
)
from merge.methods import MethodSettings
from merge.planned import MergePlan, PlannedTensor, format_plan, plan_bytes
from merge.scope import (
    COPIES,
    DEFAULT_SCOPE,
    Rule,
    apply_rules,
    check_tasks,
    read_layers,
    read_rules,
    resolve_scope,
)
from merge.shards import MERGEABLE_DTYPES, TensorInfo
from merge.vocabulary import VOCABULARIES, choose_rows, compare_tokens, vocabulary_notes

__all__ = [
    "COPIES",
    "DEFAULT_SCOPE",
    "MergePlan",
    "PlannedTensor",
    "format_plan",
    "make_plan",
    "plan_bytes",
    "resolve_scope",
]


def make_plan(
    parents: Mapping[str, Checkpoint],
    method: str,
    settings: MethodSettings,
    *,
    scope: Mapping[str, str | None] | None = None,
    rules: Iterable[Mapping[str, Any]] = (),
    vocabulary: str = "equal",
    families: str | Path | None = None,
) -> MergePlan:
    """Decides on every tensor from the headers; reads no weights.

    Args:
        parents: `base`, `vlm`, and the text models whose task vectors are merged in: `agent` and
            any number of donors under names of their own. The VLM's layout, settings, vision tower
            and projector are the output's; it may be a text model too.
        method: Method of the groups whose scope says `method`.
        settings: The merge's settings; a task without a weight gets 1.
        scope: See `resolve_scope`.
        rules: See `scope.read_rules`.
        vocabulary: What to do where merged embeddings differ in rows or special tokens: `equal`
            refuses, `common` merges the rows that all have, `protect` those less special tokens.
        families: YAML file with further model families.

    Raises:
        MergeError: An unsupported architecture, a tensor that only one side has or nobody knows,
            shapes, settings or vocabularies that differ, or a faulty setting.
    """
    tasks = [role for role in parents if role != "base"]
    actions = resolve_scope(scope, method)
    if vocabulary not in VOCABULARIES:
        raise MergeError(
            f"merge.vocabulary: {vocabulary!r} is unknown; choose {', '.join(VOCABULARIES)}"
        )
    check_tasks(settings.weights, tasks, "merge.weights")
    settings = replace(settings, weights=dict.fromkeys(tasks, 1.0) | dict(settings.weights))
    planner = _Planner(parents, actions, settings, read_rules(rules, tasks), vocabulary, families)
    planned = {name: planner.plan(name) for name in parents["vlm"].tensors}
    for rule in planner.rules:
        if not rule.is_used:
            raise MergeError(
                f"{rule.where}.match: {rule.pattern.pattern!r} finds no tensor of the language "
                "module; names are such as model.layers.0.self_attn.q_proj.weight"
            )
    # In the order of the VLM's files, so that shards can be written front to back.
    files = parents["vlm"].files
    ordered = tuple(planned[name] for file in files for name in _file_order(file.tensors))
    return MergePlan(ordered, planner.unused(ordered), planner.notes())


def _file_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    return sorted(tensors, key=lambda name: (tensors[name].begin, name))


class _Planner:
    """Plans one tensor at a time, and keeps track of which tensors are used."""

    def __init__(
        self,
        parents: Mapping[str, Checkpoint],
        actions: Mapping[str, str],
        settings: MethodSettings,
        rules: Sequence[Rule],
        vocabulary: str,
        families: str | Path | None,
    ) -> None:
        self.parents = parents
        self.vlm = parents["vlm"]
        self.actions = actions
        self.settings = settings
        self.rules = rules
        self.vocabulary = vocabulary
        self.families = find_families(parents, families)
        self.names = {
            role: canonical_names(parent, self.families[role]) for role, parent in parents.items()
        }
        check_shapes(parents, self.names, self.families)
        check_settings(parents)
        self.tokens = compare_tokens(parents)
        self.canonical_of = {name: canonical for canonical, name in self.names["vlm"].items()}
        self.used: set[tuple[str, str]] = set()

    def plan(self, name: str) -> PlannedTensor:
        info, canonical = self.vlm.tensors[name], self.canonical_of[name]
        family = self.families["vlm"]
        group = group_of(family, canonical)
        assert group is not None  # canonical_names has refused the others
        tensor = PlannedTensor(
            name=name,
            canonical=canonical,
            group=group,
            action="vlm",
            reason=_why_copied(family, canonical, group),
            shape=info.shape,
            dtype=info.dtype,
            sources={"vlm": name},
            settings=replace(self.settings, tensor_name=canonical),
        )
        if group in (VISION, BUFFER):
            return tensor
        action, settings, reason = apply_rules(
            canonical, group, self.actions[group], self.settings, self.rules
        )
        if action == "layer_swap":
            action = "agent" if layer_of(canonical) in self._swapped else "vlm"
            reason += f", copied from {action}"
        if action in COPIES and action not in self.parents:
            raise MergeError(
                f"{canonical}: is to be copied from {action}, which this merge does not have; "
                f"set models.{action}, or another scope"
            )
        sources = {role: self._source(role, canonical) for role in self.parents}
        infos = {role: self.parents[role].tensors[source] for role, source in sources.items()}
        for role, source_info in infos.items():
            if action not in COPIES or (action == role and action != "vlm"):
                _check_dtype(self.parents[role], source_info)
                _check_dtype(self.vlm, info)
        tensor = replace(tensor, action=action, reason=reason, sources=sources, settings=settings)
        if group != EMBEDDING:
            return tensor
        n_rows = {role: source_info.shape[0] for role, source_info in infos.items()}
        rows = choose_rows(canonical, action, n_rows, self.tokens, self.vocabulary)
        if rows.reason:
            reason += f"; {rows.reason}"
        return replace(
            tensor, reason=reason, n_common_rows=rows.n_common, protected_rows=rows.protected
        )

    @cached_property
    def _swapped(self) -> frozenset[int]:
        """Layers that layer_swap takes from the agent."""
        layers = [layer_of(canonical) for canonical in self.names["vlm"]]
        n_layers = 1 + max(layer for layer in layers if layer is not None)
        return read_layers(self.settings.layers, n_layers)

    def _source(self, role: str, canonical: str) -> str:
        """Finds a parent's name of a language tensor; a tied lm_head is its embed_tokens."""
        names, parent = self.names[role], self.parents[role]
        if canonical not in names and canonical == LM_HEAD and parent.ties_embeddings:
            canonical = EMBED_TOKENS
        if canonical not in names:
            raise MergeError(
                f"{canonical}: the VLM has it, {role} {parent.source} does not; {ONE_BASE}"
            )
        self.used.add((role, canonical))
        return names[canonical]

    def unused(self, planned: Sequence[PlannedTensor]) -> tuple[tuple[str, str, str], ...]:
        """Lists the other parents' tensors that have no place in the output, and says why."""
        merges_embeddings = any(t.group == EMBEDDING and t.action != "vlm" for t in planned)
        return tuple(
            (role, name, self._why_unused(role, canonical, name, merges_embeddings))
            for role in self.parents
            if role != "vlm"
            for canonical, name in self.names[role].items()
            if (role, canonical) not in self.used
        )

    def _why_unused(self, role: str, canonical: str, name: str, merges_embeddings: bool) -> str:
        parent, group = self.parents[role], group_of(self.families[role], canonical)
        if group == VISION:
            return "vision tower and projector are the VLM's"
        if group == BUFFER:
            return "computed anew on loading"
        if canonical == LM_HEAD and LM_HEAD not in self.names["vlm"]:
            if parent.ties_embeddings:
                return "a copy of embed_tokens"
            if not merges_embeddings:
                return "the VLM ties lm_head to embed_tokens, and embeddings are the VLM's"
            raise MergeError(
                f"{name}: {role} {parent.source} has an lm_head of its own, the VLM ties it to "
                "embed_tokens; set merge.scope.embedding=vlm"
            )
        raise MergeError(f"{name}: {role} {parent.source} has it, the VLM does not; {ONE_BASE}")

    def notes(self) -> tuple[str, ...]:
        """Says what concerns the whole model."""
        weights = self.settings.weights
        notes = ["task vectors: " + ", ".join(f"{task} x {weights[task]:g}" for task in weights)]
        n_rows = {
            role: self.parents[role].tensors[names[EMBED_TOKENS]].shape[0]
            for role, names in self.names.items()
            if EMBED_TOKENS in names
        }
        if "vlm" in n_rows:
            notes += vocabulary_notes(n_rows, self.tokens)
        if self.vlm.ties_embeddings and LM_HEAD not in self.names["vlm"]:
            notes.append("lm_head: tied to embed_tokens, not stored")
        config = self.vlm.text_config
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("mrope_section"):
            notes.append(f"M-RoPE: the VLM's sections {rope['mrope_section']} are kept")
        return tuple(notes)


def _why_copied(family: Family, canonical: str, group: str) -> str:
    if group == BUFFER:
        return "computed anew on loading"
    return f"{'projector' if is_projector(family, canonical) else 'vision tower'} of the VLM"


def _check_dtype(checkpoint: Checkpoint, info: TensorInfo) -> None:
    if info.dtype not in MERGEABLE_DTYPES:
        raise MergeError(
            f"{checkpoint.role} {checkpoint.source}: tensor {info.name} is {info.dtype}; merging "
            f"needs {', '.join(MERGEABLE_DTYPES)}: give the checkpoint before quantisation"
        )
