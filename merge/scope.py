"""What each group of tensors, and each tensor that a rule names, is to be merged by."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge.errors import MergeError
from merge.families import EMBEDDING, LINEAR, NORM_BIAS
from merge.methods import COMBINATIONS, METHODS, NORMALIZATIONS, MethodSettings

COPIES = ("vlm", "base", "agent")
DEFAULT_SCOPE = {LINEAR: "method", NORM_BIAS: "task_arithmetic", EMBEDDING: "vlm"}
RULE_KEYS = ("match", "method", "density", "weights", "normalization", "combine")


def resolve_scope(scope: Mapping[str, str | None] | None, method: str) -> dict[str, str]:
    """Completes the scope: which action each group of language tensors gets.

    Args:
        scope: Group (linear, norm_bias, embedding) -> a method's name, `vlm`, `agent`, `base`, or
            `method` for the merge's method. Groups left out keep their default: linear `method`,
            norm_bias `task_arithmetic`, embedding `vlm`.
        method: The merge's method.

    Raises:
        MergeError: An unknown group or action, or outside of linear projections a method for these.
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
        check_action(action, group, f"merge.scope.{group}")
    return actions


def check_action(action: str, group: str, where: str) -> None:
    """Checks that an action exists and can be done to a group of tensors.

    Raises:
        MergeError: It does not exist, or cannot.
    """
    if action not in METHODS and action not in COPIES:
        raise MergeError(f"{where}: {action!r} is unknown; choose {', '.join((*METHODS, *COPIES))}")
    if action in METHODS and METHODS[action].linear_only and group != LINEAR:
        raise MergeError(
            f"{where}: {action} weighs a matrix by its inputs, which {group} tensors do not have; "
            "choose task_arithmetic or vlm, or let the rule match linear projections only"
        )


@dataclass
class Rule:
    """Settings for the tensors whose canonical name a pattern finds."""

    where: str
    """Key in the configuration, for messages."""
    pattern: re.Pattern[str]
    changes: dict[str, Any]
    """What it sets: method, density, weights, normalization, combine."""
    is_used: bool = False

    @property
    def summary(self) -> str:
        """What it sets, in words."""
        parts = []
        for key, value in self.changes.items():
            if key == "weights":
                parts += [f"weight of {task} {weight:g}" for task, weight in value.items()]
            else:
                parts.append(f"{key} {value}")
        return f"{self.where}: {', '.join(parts)}"


def read_rules(rules: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> list[Rule]:
    """Checks the rules.

    Args:
        rules: Mappings with `match`, and any of method, density, weights, normalization, combine;
            None is the same as absent.
        tasks: Names that weights may have.

    Raises:
        MergeError: A key, pattern or value that no rule can have, or a rule that sets nothing.
    """
    found = []
    for index, rule in enumerate(rules):
        where = f"merge.rules[{index}]"
        for key in rule:
            if key not in RULE_KEYS:
                raise MergeError(f"{where}.{key}: is unknown; use {', '.join(RULE_KEYS)}")
        try:
            pattern = re.compile(rule["match"])
        except (KeyError, TypeError, re.error) as error:
            raise MergeError(
                f"{where}.match: is not a regular expression ({error}); "
                r"write one such as layers\.[0-3]\. or self_attn"
            ) from error
        changes = {
            key: value for key, value in rule.items() if key != "match" and value is not None
        }
        if not changes:
            raise MergeError(f"{where}: sets nothing; add a method, density or weights")
        _check_values(changes, where, tasks)
        found.append(Rule(where, pattern, changes))
    return found


def _check_values(changes: Mapping[str, Any], where: str, tasks: Sequence[str]) -> None:
    if not 0 <= changes.get("density", 0) <= 1:
        raise MergeError(f"{where}.density: {changes['density']} is out of range; use 0 to 1")
    for key, choices in (("normalization", NORMALIZATIONS), ("combine", COMBINATIONS)):
        if key in changes and changes[key] not in choices:
            raise MergeError(
                f"{where}.{key}: {changes[key]!r} is unknown; choose {', '.join(choices)}"
            )
    check_tasks(changes.get("weights", {}), tasks, f"{where}.weights")


def check_tasks(weights: Mapping[str, float], tasks: Sequence[str], where: str) -> None:
    """Checks that weights are of models that are merged.

    Raises:
        MergeError: One is of no task.
    """
    for task in weights:
        if task not in tasks:
            raise MergeError(f"{where}.{task}: is no model of this merge; use {', '.join(tasks)}")


def apply_rules(
    canonical: str, group: str, action: str, settings: MethodSettings, rules: Iterable[Rule]
) -> tuple[str, MethodSettings, str]:
    """Returns action, settings and reason of one tensor of the language module.

    Args:
        canonical: Its canonical name.
        group: Its group.
        action: What the scope says.
        settings: The merge's settings.
        rules: In order; of several that match, the last that sets a key decides on it.

    Raises:
        MergeError: A rule's method cannot be done to the group.
    """
    reasons = [f"scope {group}: {'copied from ' if action in COPIES else ''}{action}"]
    settings = replace(settings, tensor_name=canonical)
    for rule in rules:
        if rule.pattern.search(canonical) is None:
            continue
        rule.is_used = True
        reasons.append(rule.summary)
        changes = dict(rule.changes)
        if "method" in changes:
            action = changes.pop("method")
            check_action(action, group, f"{rule.where}.method ({canonical})")
        if "weights" in changes:
            changes["weights"] = {**settings.weights, **changes["weights"]}
        settings = replace(settings, **changes)
    return action, settings, "; ".join(reasons)


def read_layers(text: str, n_layers: int) -> frozenset[int]:
    """Reads decoder layers such as `14-27` or `0,2,4-7`.

    Raises:
        MergeError: The text is empty, is no such list, or names a layer that is not there.
    """
    layers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise MergeError(
                f"merge.layers: {text!r} names no layers; for layer_swap write the decoder layers "
                "that come from the agent, such as 14-27 or 0,2,4-7"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= n_layers:
            raise MergeError(
                f"merge.layers: {part} is out of range; the model has layers 0-{n_layers - 1}"
            )
        layers.update(range(first, last + 1))
    return frozenset(layers)
