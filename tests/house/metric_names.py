"""Names of metrics: those that docs/metrics.md describes, and those that can stand in the code."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

from tests.docs.blocks import ROOT

PAGE = "docs/metrics.md"
CLOCKS = {"step", "phase", "time_s", "device_s", "tokens"}
"""Of every line of metrics.jsonl."""
_HOLE = re.compile(r"<\w+>|\*")


def tables(begin, end):
    """Names in the first column of the tables between two headings."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    part = text[text.index(f"\n{begin}\n") : text.index(f"\n{end}\n")]
    columns = re.findall(r"^\| (`[^|]*) \|", part, re.M)
    return [name for column in columns for name in re.findall(r"`([^`]+)`", column)]


def evaluation_names():
    return tables("## Evaluation", "## Training")


def training_names():
    return tables("## Training", "### Timers")


def timers():
    return [f"time/{stage}_s" for stage in tables("### Timers", "### Health")]


def as_pattern(name):
    """`stop/<reason>` and `judge/*` stand for any name there."""
    pieces = [re.escape(piece) for piece in _HOLE.split(name)]
    return re.compile(".+".join(pieces))


def undescribed(keys):
    """The keys of lines of metrics.jsonl that the page does not name."""
    described = [as_pattern(name) for name in [*training_names(), *timers()]]
    evaluated, prefixes = [], [""]
    for name in evaluation_names():
        if name.endswith("/"):
            prefixes.append(name)
        else:
            evaluated.append(name)
    described += [as_pattern(f"eval/{p}{name}") for p in prefixes for name in evaluated]
    return sorted(
        key for key in set(keys) - CLOCKS if not any(name.fullmatch(key) for name in described)
    )


@functools.cache
def names_in_code():
    """(strings, patterns of f-strings) of whatever writes metrics: ours, TRL, transformers."""
    folders = ("train", "rewards", "environments")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    for package, names in {
        "trl": ["trainer/grpo_trainer.py", "trainer/base_trainer.py", "trainer/_base.py"],
        "transformers": ["trainer.py"],
    }.items():
        folder = Path(importlib.util.find_spec(package).origin).parent
        files += [folder / name for name in names if (folder / name).is_file()]
    strings, patterns = set(), set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                pieces = [getattr(part, "value", None) for part in node.values]
                literal = "".join(p for p in pieces if isinstance(p, str))
                if len(literal) > 4 and "/" in literal and " " not in literal:
                    patterns.add(
                        "".join(re.escape(p) if isinstance(p, str) else ".+" for p in pieces)
                    )
    return strings, [re.compile(pattern) for pattern in patterns]


def is_in_code(name):
    """Whether something in the code can be this name of the page."""
    strings, patterns = names_in_code()
    wanted, sample = as_pattern(name), _HOLE.sub("x", name)
    return any(wanted.fullmatch(s) for s in strings) or any(p.fullmatch(sample) for p in patterns)
