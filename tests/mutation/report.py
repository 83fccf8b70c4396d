"""docs/results/mutation.json and mutation.md: which errors the tests notice, which they cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.mutation.run import Verdict

COMMAND = "make mutation"


def write_report(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """Writes both files, each whole or not at all."""
    from compare.provenance import hardware
    from train.machine import code_commit

    record = {
        "command": COMMAND,
        "commit": code_commit(),
        "hardware": hardware(),
        "cpu_s": round(sum(verdict.cpu_s for verdict in verdicts), 1),
        "counts": counts(verdicts),
        "mutants": [
            {key: value for key, value in asdict(verdict).items() if key != "key"}
            for verdict in verdicts
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("mutation.json", json.dumps(record, indent=1) + "\n"),
        ("mutation.md", describe(record)),
    ):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Mutants by what became of them."""
    outcomes = [verdict.outcome for verdict in verdicts]
    return {name: outcomes.count(name) for name in ("killed", "explained", "survived")}


def describe(record: dict[str, Any]) -> str:
    """The page."""
    mutants, total = record["mutants"], record["counts"]
    functions = {mutant["function"] for mutant in mutants}
    lines = [
        "# Mutation check",
        "",
        "Would the tests notice a flipped sign or an off-by-one? One node of a function is changed "
        "(`+` and `-`, `*` and `/`, `<` and `<=`, a dropped minus or `not`, `n` and `n + 1`, an "
        "axis, an order, `min` and `max`, `and` and `or`), and the tests named for it have to "
        f"fail. {len(functions)} functions, {len(mutants)} mutants drawn by seed: "
        f"{total['killed']} killed, {total['explained']} that no test could tell from the "
        f"original, {total['survived']} survived.",
        "",
        "| topic | functions | mutants | killed | explained | survived |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for topic in dict.fromkeys(mutant["topic"] for mutant in mutants):
        own = [mutant for mutant in mutants if mutant["topic"] == topic]
        names = dict.fromkeys(mutant["function"].replace(":", ".") for mutant in own)
        cells = [topic, ", ".join(f"`{name}`" for name in names), str(len(own))]
        cells += [
            str(sum(mutant["outcome"] == outcome for mutant in own))
            for outcome in ("killed", "explained", "survived")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for outcome, title in (("survived", "Survived"), ("explained", "Explained")):
        own = [mutant for mutant in mutants if mutant["outcome"] == outcome]
        if own:
            lines += ["", f"## {title}", ""]
            lines += [_line(mutant) for mutant in own]
    lines += [
        "",
        "The compiled twins of the merge kernels are not mutated: a test demands the same bits of "
        "them. `tests/mutation/targets.py` has the table, with the tests that answer for each "
        "topic.",
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}: "
        f"{record['cpu_s']:.0f} s of one core.",
    ]
    return "\n".join(lines) + "\n"


def _line(mutant: dict[str, Any]) -> str:
    reason = f": {mutant['by']}" if mutant["by"] else ""
    before, _, after = mutant["change"].partition(" -> ")
    return f"* `{mutant['function']}`: `{before}` → `{after}`{reason}"
