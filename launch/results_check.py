"""Figures in README.md and docs/*.md, held against the result files that they come from.

    make results-check                       (or: python -m launch.results_check)
    python -m launch.results_check --write   puts what the files say now into the pages

docs/results/figures.yaml ties them: by page, the words around a figure and where in docs/results it
stands (the language of the paths: `compare.figures`):

    README.md:
      complete: [Results]              # sections in which every number must be tied or allowed
      allowed: ["95 %"]                # expressions for numbers that are no results
      figures:
      - text: a step takes {} times less CPU       # stands once in the page, blanks aside
        from: bench-rollout.json
        is: ["a.path | .1f"]                       # one a {}, with Python's format
      - text: WUDI has the highest mean            # said in words: to be mended by hand
        from: ceiling.json
        holds: [arms.wudi.ceiling = max(arms.*.ceiling)]
      - table: "| start | floor | ceiling |"       # a table by its first line
        from: ceiling.json
        rows: {OBM: obm, "in short": null}         # first cell: what ROW is; null = tied elsewhere
        columns:                                   # template and one path a {}
          ceiling: ["{} [{}, {}]", arms.ROW.ceiling | .2f, ...]
        none: not reached                          # a cell whose first value is none

A bracket `[{}, {}]` at the end is left out where its two values are none or one. The tables of
docs/scale.md are made of the benches and are a source of other pages: they are checked, or made
again, before the rest (`launch.scale_page`). Exit code 1 if a page says something else than its
source or a tie leads nowhere, 2 if there are no ties to read.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.figures import Results, holds, value_of
from configs.errors import ConfigError
from configs.reader import parse_yaml
from launch import scale_page
from train.files import write_text

TIES = "docs/results/figures.yaml"
NUMBER = r"[-−+]?\d+(?:,\d{3})*(?:\.\d+)?"
BRACKET = " [{}, {}]"
LOOSE = re.compile(r"(?<![\w.,/@-])[-−+]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w/]|\.\d)")
"""A number by itself: not part of 7B, ZeRO-3, 2.5-VL or a path."""
NOT_PROSE = re.compile(
    r"^ *```.*?^ *```$|`[^`\n]*`|\]\([^)\s]*\)|<!--.*?-->|^\|[-:| ]+\|$|^#+ [^\n]*$"
    r"|arXiv[ :][\d.]+",
    re.M | re.S,
)


@dataclass(frozen=True)
class Found:
    """A place in a page: its characters, what stands there and what the source says."""

    begin: int
    end: int
    stands: str
    should: str
    origin: str

    @property
    def is_right(self) -> bool:
        """Equal, whichever sign stands for minus."""
        return self.stands.replace("−", "-") == self.should


@dataclass(frozen=True)
class Problem:
    """A line for the reader; `can_be_written` where --write mends it."""

    where: str
    what: str
    can_be_written: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


# ---------------------------------------------------------------- one page


class Page:
    """A page with what ties it."""

    def __init__(self, name: str, text: str, ties: Mapping[str, Any], results: Results) -> None:
        self.name, self.text, self.ties, self.results = name, text, ties, results
        self.problems: list[Problem] = []
        self.found: list[Found] = []
        self.claims: list[tuple[int, int]] = []

    def where(self, at: int) -> str:
        """FILE:LINE of a character."""
        return f"{self.name}:{self.text.count(chr(10), 0, at) + 1}"

    def check(self) -> None:
        """Holds every tie against its source, then looks for numbers that nothing ties."""
        for entry in self.ties.get("figures", ()):
            try:
                found = self.in_table(entry) if "table" in entry else self.in_text(entry)
                self.found += list(found)
            except CompareError as error:
                self.problems.append(Problem(f"{TIES}, {self.name}", str(error)))
        for place in self.found:
            if not place.is_right:
                says = f"'{place.stands}' stands here, {place.origin} says '{place.should}'"
                self.problems.append(Problem(self.where(place.begin), says, True))
        for name in self.ties.get("complete", ()):
            span = self.span(name)
            if span is None:
                what = f"no section '{name}' in the page"
                self.problems.append(Problem(f"{TIES}, {self.name}", what))
            else:
                self.find_loose(*span)

    def in_text(self, entry: Mapping[str, Any]) -> Iterator[Found]:
        """The figures of a sentence."""
        words, paths, file = entry["text"], entry.get("is", []), entry.get("from")
        if words.count("{}") != len(paths):
            raise CompareError(f"'{words}' has {words.count('{}')} figures, {len(paths)} paths")
        matches = list(re.finditer(_pattern(words), self.text))
        if len(matches) != 1:
            n = f"{len(matches)} times" if matches else "nowhere"
            raise CompareError(f"'{words}' stands {n} in the page; it has to stand once")
        match = matches[0]
        for group, path in enumerate(paths, 1):
            should = render("{}", [path], self.results, file)
            yield Found(*match.span(group), match[group], should, f"{file} {path}")
        if "holds" in entry:
            self.claims.append(match.span())
        for claim in entry.get("holds", []):
            if not holds(claim, self.results, file):
                what = f"'{words}' does not hold: {claim} in {file}; mend the words"
                self.problems.append(Problem(self.where(match.start()), what))

    def in_table(self, entry: Mapping[str, Any]) -> Iterator[Found]:
        """The cells of a table."""
        header, rows, file = entry["table"], dict(entry["rows"]), entry.get("from")
        if self.text.count(f"{header}\n") != 1:
            raise CompareError(f"the table '{header}' has to stand once in the page")
        names = [name.strip() for name in header.strip("|").split("|")]
        unknown = set(entry["columns"]) - set(names)
        if unknown:
            raise CompareError(f"the table '{header}' has no column {sorted(unknown)}")
        at = self.text.index(f"{header}\n")
        for number, line in enumerate(self.text[at:].split("\n")):
            if not line.startswith("|"):
                break
            cells = list(re.finditer(r"(?<=\|)[^|]*(?=\|)", line))
            label = cells[0][0].strip()
            if number > 1 and label not in rows:
                what = f"row '{label}' is tied to nothing; add it to rows in {TIES}"
                self.problems.append(Problem(self.where(at), what))
            elif number > 1 and (row := rows.pop(label)) is not None:
                for name, (template, *paths) in entry["columns"].items():
                    cell = cells[names.index(name)]
                    begin = at + cell.start() + len(cell[0]) - len(cell[0].lstrip())
                    stands = cell[0].strip()
                    paths = [path.replace("ROW", row) for path in paths]
                    should = render(template, paths, self.results, file, entry.get("none"))
                    yield Found(begin, begin + len(stands), stands, should, f"{file} {paths[0]}")
            at += len(line) + 1
        if rows:
            raise CompareError(f"the table '{header}' has no row {sorted(rows)}")

    def find_loose(self, begin: int, end: int) -> None:
        """Numbers between two characters that are neither tied nor allowed."""
        covered = [*self.claims, *((place.begin, place.end) for place in self.found)]
        for pattern in (NOT_PROSE, *map(re.compile, self.ties.get("allowed", ()))):
            covered += [match.span() for match in pattern.finditer(self.text)]
        for match in LOOSE.finditer(self.text, begin, end):
            if not any(first <= match.start() and match.end() <= last for first, last in covered):
                what = f"'{match[0]}' is tied to nothing; tie it to its result file in {TIES}"
                self.problems.append(Problem(self.where(match.start()), what))

    def span(self, section: str) -> tuple[int, int] | None:
        """Characters of a section, its subsections included; "*" is the whole page."""
        if section == "*":
            return 0, len(self.text)
        heading = re.search(rf"^(#+) {re.escape(section)}$", self.text, re.M)
        if heading is None:
            return None
        after = re.compile(rf"^#{{1,{len(heading[1])}}} ", re.M).search(self.text, heading.end())
        return heading.end(), after.start() if after else len(self.text)

    def mended(self) -> str:
        """The text with what the sources say."""
        text = self.text
        for place in sorted(self.found, key=lambda place: -place.begin):
            if not place.is_right:
                should = place.should.replace("-", "−") if "−" in self.text else place.should
                text = text[: place.begin] + should + text[place.end :]
        return text


def _pattern(words: str) -> str:
    """An expression for words with {} for numbers; a line break is a blank."""
    pieces = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in words.split("{}")]
    return f"({NUMBER})".join(pieces)


def render(
    template: str,
    paths: Sequence[str],
    results: Results,
    file: str | None,
    none: str | None = None,
) -> str:
    """A template with the figures of its paths.

    Args:
        template: text with a {} for each path.
        paths: `EXPRESSION | FORMAT`, the format being Python's.
        results: where files are.
        file: the one that paths without a file are in.
        none: what to say where the first value is none, and the others then may be missing.
    """
    asked = [path.rsplit(" | ", 1) for path in paths]
    if template.count("{}") != len(asked) or any(len(pair) != 2 for pair in asked):
        raise CompareError(f"'{template}' needs one 'PATH | FORMAT' for each {{}}, not {paths}")
    if none is not None and value_of(asked[0][0], results, file) is None:
        return none
    values = [value_of(path, results, file) for path, _ in asked]
    if template.endswith(BRACKET) and (values[-1] is None or values[-2] == values[-1]):
        template, values = template.removesuffix(BRACKET), values[:-2]
    try:
        shown = [format(value, form) for value, (_, form) in zip(values, asked, strict=False)]
    except (TypeError, ValueError) as error:
        raise CompareError(f"{file} {paths}: {error}") from error
    # what rounds to zero has no sign
    shown = [re.sub(r"^-(0(?:\.0+)?)$", r"\1", text) for text in shown]
    return template.format(*shown)


# ---------------------------------------------------------------- all pages


def check(root: Path, write: bool = False) -> list[Problem]:
    """Checks every page that figures.yaml names.

    Args:
        root: of the checkout.
        write: put what the sources say into the pages.

    Returns:
        What is left to mend, in the order of the pages.

    Raises:
        CompareError: figures.yaml cannot be read.
    """
    path = root / TIES
    try:
        ties = parse_yaml(path.read_text(encoding="utf-8"), TIES)
    except (OSError, ConfigError) as error:
        raise CompareError(f"{path}: {error}; the file ties figures to results") from error
    problems = check_scale(root, write)
    results, pages = Results(root / "docs" / "results"), []
    for name, entry in ties.items():
        pages.append(Page(name, (root / name).read_text(encoding="utf-8"), entry, results))
        pages[-1].check()
    for page in pages if write else []:
        if (text := page.mended()) != page.text:
            write_text(root / page.name, text)
    problems += [problem for page in pages for problem in page.problems]
    return [problem for problem in problems if not (write and problem.can_be_written)]


def check_scale(root: Path, write: bool = False) -> list[Problem]:
    """Checks, or makes again, what is computed from the benches; without that page, nothing."""
    if not (root / scale_page.PAGE).exists():
        return []
    found = scale_page.outdated(root)
    for name, text in found.items() if write else ():
        write_text(root / name, text)
    return [Problem(name, "its figures are not those of the benches", True) for name in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what is wrong; 0 = nothing, 1 = something, 2 = there are no ties to read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="mend the figures in the pages")
    parser.add_argument("--root", type=Path, default=Path(), help="of the checkout (default: here)")
    options = parser.parse_args(arguments)
    try:
        problems = check(options.root, options.write)
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for problem in problems:
        print(problem)
    if any(problem.can_be_written for problem in problems):
        print("python -m launch.results_check --write puts the results' figures into the pages")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
