"""A dialect of your own, as a YAML file that says where it differs from one that ships.

    like: search_r1
    think: plan
    calls: {search: lookup}
    agent_text: |
      Plan inside <plan>, look up with <lookup> words </lookup>, then <answer>.
      Question: {question}
    frame: "\\n<found> {results} </found>\\n"

    environment: {dialect: my_dialect.yaml}

The file holds texts and names of tags, no code. The answer's tag is `<answer>` in every dialect:
the reward reads it. What a tool returns is sanitised like in every dialect, so none of these tags
can come from a page.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from environments.dialect import CALL_TAGS, TAGS, Dialect
from environments.errors import EnvironmentSetupError

KEYS = (
    "like", "think", "needs_thought", "calls", "agent_text", "visit_text", "direct_text",
    "system_text", "frame", "hit", "between",
)  # fmt: skip
MEANINGS = {
    "search": ("search", "text_search"),
    "image_search": ("search", "text_search", "image_search"),
    "visit": ("visit",),
    "answer": ("answer",),
}
"""Actions, and the tags of TAGS that may stand for each: every dialect reads those tags so."""
_TAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def read_dialect(path: str | Path, shipped: Mapping[str, Dialect]) -> Dialect:
    """The dialect that a file describes; its name is the file's.

    Args:
        path: .yaml file.
        shipped: dialects that it may be `like`, by name.

    Raises:
        EnvironmentSetupError: names the file, the key, the reason and the fix.
    """
    values = _read(Path(path))
    file = _File(str(path), values)
    parent = shipped[file.choice("like", "search_r1", list(shipped))]
    is_json = "tool_call" in parent.calls.values()
    calls = file.calls(parent, is_json)
    think = file.tag("think", values.get("think", parent.think))
    if think in (*calls.values(), *CALL_TAGS):
        file.fail("think", f"<{think}> is the tag of a call", "give the reasoning another tag")
    own: dict[str, str | None] = {tag: action for action, tag in calls.items() if tag not in TAGS}
    if calls["search"] in own:
        own[calls["search"]] = "search"  # with <img> in it, it is the image search
    if think not in TAGS:
        own[think] = None
    name = Path(path).stem
    return replace(
        parent,
        name=name if name not in shipped else f"{name}.yaml",
        think=think,
        calls=calls,
        own_tags=own,
        stop_sequences=(*parent.stop_sequences, *(f"</{tag}>" for tag in own if own[tag])),
        needs_thought=file.flag("needs_thought", parent.needs_thought),
        agent_text=file.text("agent_text", parent.agent_text, needs=("question",)),
        direct_text=file.text("direct_text", parent.direct_text, needs=("question",)),
        visit_text=file.text("visit_text", parent.visit_text),
        system_text=file.text("system_text", parent.system_text),
        frame=file.frame(parent),
        hits=file.hits(parent),
    )


class _Loader(yaml.SafeLoader):
    """SafeLoader in which a repeated key is an error, and only true and false are booleans."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' appears twice", key.start_mark
                )
            seen.add(key.value)
        return node


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_MISFITS = (ValueError, LookupError, ArithmeticError, AttributeError, TypeError)
"""What PyYAML lets through where text does not fit its tag, as in `!!int abc`."""


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of a user unknown here
        reason = getattr(error, "strerror", None) or "not a text file"
        if isinstance(error, RuntimeError):
            reason = "no such home folder"
        raise EnvironmentSetupError(
            f"environment.dialect: {path} cannot be read ({reason}); check the path"
        ) from error
    try:
        values = _Loader(text).get_single_data()
    except RecursionError as error:
        raise EnvironmentSetupError(
            f"{path}: is nested too deep; correct the YAML there"
        ) from error
    except _MISFITS as error:
        reason = f"a value does not fit its tag ({error})"
        raise EnvironmentSetupError(f"{path}: {reason}; correct the YAML there") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f" (line {line + 1})"
        problem = getattr(error, "problem", None) or getattr(error, "reason", "not valid YAML")
        raise EnvironmentSetupError(f"{path}: {problem}{at}; correct the YAML there") from error
    if not isinstance(values, dict):
        raise EnvironmentSetupError(f"{path}: expected keys and values; write 'like: search_r1'")
    return values


class _File:
    """The keys of a file, each checked when it is read."""

    def __init__(self, path: str, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        for key in values:
            if key not in KEYS:
                near = difflib.get_close_matches(str(key), KEYS, n=1)
                fix = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(KEYS)}"
                self.fail(key, "unknown key", fix)

    def fail(self, key: Any, reason: str, fix: str) -> NoReturn:
        raise EnvironmentSetupError(f"{self.path}:{key}: {reason}; {fix}")

    def choice(self, key: str, default: str, names: Sequence[str]) -> str:
        name = self.values.get(key, default)
        if name not in names:
            self.fail(key, f"there is no dialect {name!r}", f"choose one of {', '.join(names)}")
        return str(name)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"expected true or false, got {value!r}", "write true or false")
        return value

    def text(self, key: str, default: str, needs: Sequence[str] = ()) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            self.fail(key, f"expected text, got {value!r}", "put it in quotes")
        for name in needs:
            if f"{{{name}}}" not in value:
                self.fail(
                    key, f"there is no {{{name}}} in it", f"write {{{name}}} where it belongs"
                )
        # a block of YAML ends in a line break that nobody means
        return value.removesuffix("\n") if key in self.values else value

    def template(self, key: str, names: Sequence[str], needs: Sequence[str]) -> str:
        value = self.values[key]
        text = self.text(key, "", needs)
        for name in _PLACEHOLDER.findall(text):
            if name not in names:
                known = ", ".join(f"{{{name}}}" for name in names)
                self.fail(key, f"{{{name}}} is not known here", f"there are {known}")
        return str(value) if key == "frame" else text

    def tag(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not _TAG_NAME.fullmatch(value):
            self.fail(key, f"{value!r} is no name of a tag", "write letters alone, without < and >")
        if value in ("information", "tool_response", "img"):
            self.fail(key, f"<{value}> stands for results", "choose another tag")
        return value

    def calls(self, parent: Dialect, is_json: bool) -> dict[str, str]:
        """Tag of each action."""
        given = self.values.get("calls") or {}
        if not isinstance(given, dict):
            self.fail(
                "calls", f"expected actions and tags, got {given!r}", "write {search: lookup}"
            )
        if given and is_json:
            self.fail("calls", f"calls of {parent.name} are JSON", "leave the key out")
        for action, tag in given.items():
            key = f"calls.{action}"
            if action not in MEANINGS:
                self.fail(key, "no such action", f"there are {', '.join(MEANINGS)}")
            if action == "answer" and tag != "answer":
                self.fail(key, "the reward reads <answer>", "leave the key out")
            if self.tag(key, tag) in TAGS and tag not in MEANINGS[action]:
                self.fail(key, f"<{tag}> has another meaning", "choose another tag")
        calls = {**parent.calls, **given}
        if parent.calls["image_search"] == parent.calls["search"] and "image_search" not in given:
            calls["image_search"] = calls["search"]  # the same tag with <img> in it
        if calls["visit"] in (calls["search"], calls["image_search"]):
            self.fail("calls.visit", f"<{calls['visit']}> is a search", "give visits another tag")
        return calls

    def frame(self, parent: Dialect) -> Callable[[Sequence[str], str, str], str]:
        if "frame" not in self.values:
            return parent.frame
        frame = self.template("frame", ("results", "question"), ("results",))
        if not parent.in_turn:
            frame = f"<|im_end|>\n<|im_start|>user\n{frame}<|im_end|>\n<|im_start|>assistant\n"

        def build(texts: Sequence[str], question: str, tool: str) -> str:
            return _fill(frame, {"results": "\n".join(texts), "question": question})

        return build

    def hits(self, parent: Dialect) -> Callable[[Sequence[tuple[str, str]], str], str]:
        if "hit" not in self.values:
            return parent.hits
        hit = self.template("hit", ("number", "title", "text"), ("text",))
        if "<" in hit or ">" in hit:
            # all text of a hit is sanitised, what stands around it as well
            self.fail("hit", "a hit may hold no tag", "put tags into `frame`")
        between = self.text("between", "\n") if "between" in self.values else "\n"

        def build(pairs: Sequence[tuple[str, str]], tool: str) -> str:
            return between.join(
                _fill(hit, {"number": str(i), "title": title, "text": text}).rstrip()
                for i, (title, text) in enumerate(pairs, 1)
            )

        return build


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Each placeholder once, so that braces in what is put in stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
