"""Token ids and embedding rows: where vocabularies differ, and which rows are merged then.

Row i of an embedding is the vector of token i. Row counts differ by padding or by added tokens, and
equal counts may hide tokens that differ. The output always has as many rows as the VLM.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge.checkpoint import Checkpoint
from merge.errors import MergeError

VOCABULARIES = ("equal", "common", "protect")
# The fixes that every message about differing rows names.
_CHOICES = (
    "set merge.scope.embedding=vlm to keep the VLM's, or merge.vocabulary=common to merge the rows "
    "that all parents have, or merge.vocabulary=protect to spare the special tokens' rows too"
)


@dataclass(frozen=True)
class Tokens:
    """What the parents' tokenizer.json files tell."""

    compared: tuple[str, ...]
    """Roles whose tokens were compared with the VLM's."""
    conflicts: Mapping[str, frozenset[int]]
    """Role -> ids that mean another special token there than in the VLM."""
    special: frozenset[int] | None
    """Ids of the VLM's added and special tokens; None where it has no tokenizer.json."""


@dataclass(frozen=True)
class Rows:
    """Which rows of an embedding are merged."""

    n_common: int | None = None
    """Only the first rows are; None = all."""
    protected: tuple[int, ...] = ()
    """Rows among them that stay the VLM's."""
    reason: str = ""


def compare_tokens(parents: Mapping[str, Checkpoint]) -> Tokens:
    """Compares token ids where tokenizer.json is there.

    Args:
        parents: Role -> checkpoint, `vlm` among them.

    Raises:
        MergeError: A token outside the added ones has another id, or a tokenizer.json is broken.
    """
    found = {role: _read_tokens(parent.folder) for role, parent in parents.items()}
    vlm = found.pop("vlm")
    if vlm is None:
        return Tokens((), {}, None)
    conflicts = {}
    for role, other in found.items():
        if other is not None:
            path = parents[role].folder / "tokenizer.json"
            conflicts[role] = _conflicts(vlm, other, path)
    return Tokens(tuple(conflicts), conflicts, frozenset(vlm.added))


def choose_rows(
    canonical: str,
    action: str,
    rows: Mapping[str, int],
    tokens: Tokens,
    vocabulary: str,
) -> Rows:
    """Decides which rows of an embedding are merged.

    Args:
        canonical: Name of the embedding, for messages.
        action: A method's name, or the role whose tensor is copied.
        rows: Role -> number of rows, `vlm` among them.
        tokens: What the tokenizers tell.
        vocabulary: equal, common or protect.

    Raises:
        MergeError: Rows differ and `vocabulary` is equal, or the choice makes no sense.
    """
    if action == "vlm":
        return Rows()
    if action in rows:
        if vocabulary != "equal":
            raise MergeError(
                f"merge.vocabulary: {vocabulary} is for merged embeddings, {canonical} is copied "
                f"from {action}; set merge.vocabulary=equal or another merge.scope.embedding"
            )
        rows = {"vlm": rows["vlm"], action: rows[action]}
    conflicts = frozenset().union(*(tokens.conflicts.get(role, ()) for role in rows))
    n_common = min(rows.values()) if len(set(rows.values())) > 1 else None
    if vocabulary == "equal":
        for role, n_rows in rows.items():
            if n_rows != rows["vlm"]:
                raise MergeError(
                    f"{canonical}: {role} has {n_rows} rows, the VLM {rows['vlm']}: "
                    f"the vocabularies differ; {_CHOICES}"
                )
        if conflicts:
            raise MergeError(
                f"{canonical}: ids {_list(conflicts)} are other special tokens than in the VLM: "
                f"the vocabularies differ; {_CHOICES}"
            )
        return Rows()
    protected = conflicts
    if vocabulary == "protect":
        if tokens.special is None:
            raise MergeError(
                "merge.vocabulary: protect needs the VLM's tokenizer.json to know its special "
                "tokens; add the file, or set merge.vocabulary=common"
            )
        protected |= tokens.special
    limit = rows["vlm"] if n_common is None else n_common
    kept = tuple(sorted(row for row in protected if row < limit))
    reason = "" if n_common is None else f"first {n_common} of {rows['vlm']} rows"
    if kept:
        reason += f"{', ' if reason else ''}{len(kept)} rows of special tokens stay the VLM's"
    return Rows(n_common, kept, reason)


def vocabulary_notes(rows: Mapping[str, int], tokens: Tokens) -> list[str]:
    """Says in words how the vocabularies compare.

    Args:
        rows: Role -> number of rows of embed_tokens, `vlm` among them.
        tokens: What the tokenizers tell.
    """
    others = {role: n for role, n in rows.items() if n != rows["vlm"]}
    if others:
        listed = ", ".join(f"{role} {n}" for role, n in others.items())
        size = f"{listed} rows, the VLM {rows['vlm']}, which the output keeps"
    else:
        size = "sizes agree"
    if tokens.compared:
        ids = f"token ids of {' and '.join(tokens.compared)} agree with the VLM's"
        if any(tokens.conflicts.values()):
            ids += " but for special tokens"
    else:
        ids = "token ids not compared (no tokenizer.json)"
    notes = [f"vocabulary: {size}; {ids}"]
    return notes + [
        f"vocabulary: other special tokens in {role} at ids {_list(conflicts)}"
        for role, conflicts in tokens.conflicts.items()
        if conflicts
    ]


def _list(ids: frozenset[int]) -> str:
    shown = ", ".join(map(str, sorted(ids)[:8]))
    return shown + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


@dataclass(frozen=True)
class _Tokenizer:
    ids: dict[str, int]
    added: frozenset[int]


def _conflicts(vlm: _Tokenizer, other: _Tokenizer, path: Path) -> frozenset[int]:
    """Returns ids whose special token differs; refuses other tokens that differ."""
    if vlm.ids == other.ids:
        return frozenset()
    found: set[int] = set()
    token_at = {index: token for token, index in vlm.ids.items()}
    special = vlm.added | other.added
    for token, index in other.ids.items():
        expected = vlm.ids.get(token)
        if expected == index or (expected is None and index not in token_at):
            continue
        if index not in special and (expected is None or expected not in special):
            there = expected if expected is not None else f"that id is {token_at[index]!r}"
            raise MergeError(
                f"{path}: token {token!r} has id {index}, in the VLM {there}: the vocabularies "
                "differ; use models that share a base"
            )
        found.update({index} if expected is None else {index, expected})
    return frozenset(found)


def _read_tokens(folder: Path) -> _Tokenizer | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            ids = dict(vocabulary)
        else:  # unigram: [token, score], the id is the place in the list
            ids = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    except OSError as error:
        raise MergeError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    # RecursionError: JSON that is nested thousands deep
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MergeError(f"{path}: is not a tokenizer file; copy it again") from error
    return _Tokenizer(ids | added, frozenset(added.values()))
