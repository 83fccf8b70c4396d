"""What stands in the documents: fenced blocks, the commands in them, links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^( *)```(\S*)\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line, counted from 1."""

    page: str
    line: int
    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        """Name of the file that the block is, as its first line says: `# my_rewards.py`."""
        match = re.match(r"# ([\w.-]+\.(?:py|yaml))\b", self.text)
        return match[1] if match else None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block: `words` without variables, `in_background` if it ends in `&`."""

    page: str
    line: int
    text: str
    words: tuple[str, ...]
    variables: tuple[str, ...] = ()
    in_background: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[str]:
    """README, CONTRIBUTING and all of docs/ but for the reports in docs/results."""
    names = ["README.md", "CONTRIBUTING.md"]
    return names + sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def reports() -> list[str]:
    """Pages that studies and benches write."""
    return sorted(f"docs/results/{path.name}" for path in (ROOT / "docs/results").glob("*.md"))


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str | None = None) -> list[Block]:
    """Fenced blocks of a page, of one language or all."""
    found: list[Block] = []
    lines: list[str] = []
    begin, indent, kind = 0, "", ""
    for number, line in enumerate(read(page).splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and not begin:
            begin, indent, kind, lines = number, fence[1], fence[2], []
        elif fence and begin and not fence[2]:
            found.append(Block(page, begin + 1, kind, "\n".join(lines) + "\n"))
            begin = 0
        elif begin:
            lines.append(line.removeprefix(indent))
    assert not begin, f"{page}:{begin}: the block is not closed"
    return [block for block in found if language is None or block.language == language]


def commands(block: Block) -> Iterator[Command]:
    """Commands of a bash block; a line that ends in a backslash goes on, quotes may span lines."""
    pending, begin = "", block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        begin = begin if pending else number
        pending = f"{pending}\n{line}" if pending else line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote that the next line closes
            continue
        yield from _split(block.page, begin, pending, words)
        pending = ""
    assert not pending, f"{block}: the last command has no end"


def _split(page: str, line: int, text: str, words: list[str]) -> Iterator[Command]:
    current: list[str] = []
    for word in [*words, ";"]:
        ends = word in (";", "&&", "&") or word.endswith(";")
        if not ends:
            current.append(word)
            continue
        if word.endswith(";") and word != ";":
            current.append(word[:-1])
        if current:
            n = next((i for i, w in enumerate(current) if not re.match(r"[A-Z_]+=", w)), 0)
            shown = " ".join(text.split())
            yield Command(page, line, shown, tuple(current[n:]), tuple(current[:n]), word == "&")
        current = []


def all_commands(names: list[str]) -> list[Command]:
    return [
        command for page in names for block in blocks(page, "bash") for command in commands(block)
    ]


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: str) -> list[str]:
    """What stands between single backticks outside of fenced blocks."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def links(page: str) -> list[str]:
    """Targets of Markdown links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found
