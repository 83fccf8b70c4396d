"""Links, anchors and names of code in the documents lead somewhere."""

import ast
import re

import pytest

from tests.docs.blocks import ROOT, anchors, inline_code, links, pages, reports

ALL = [*pages(), *reports()]
HOUSE = (
    "merge", "environments", "rewards", "configs", "train", "compare", "launch", "docs", "tests",
)  # fmt: skip
_FUNCTION = re.compile(r"([a-z_]+(?:/[\w.-]+)*\.py)::(\w+)")
_FILE = re.compile(r"(?:[\w*]+/)+[\w.*-]+\.(?:py|yaml|json|jinja|md|sh|svg|example)")


@pytest.mark.parametrize("page", ALL)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    for target in links(page):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            there = anchors(str(path.resolve().relative_to(ROOT)))
            assert anchor in there, f"{page}: {target}; there are {sorted(there)}"


@pytest.mark.parametrize("page", pages())
def test_files_and_functions_that_are_named_exist(page):
    for text in inline_code(page):
        for file, name in _FUNCTION.findall(text):
            assert name in names_in(ROOT / file), f"{page}: {file} has no {name}"
        if _FILE.fullmatch(text) and text.split("/")[0] in HOUSE:
            assert list(ROOT.glob(text)), f"{page}: there is no {text}"


def names_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_page_and_every_report_is_reached_from_the_readme():
    seen, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.endswith(".md"):
            continue
        seen.add(page)
        for target in links(page):
            path = ((ROOT / page).parent / target.partition("#")[0]).resolve()
            if path.is_file() and ROOT in path.parents:
                waiting.append(str(path.relative_to(ROOT)))
    assert not set(ALL) - seen, "link them from README.md, docs/results.md or a page"


def test_the_drawing_is_readable_in_light_and_dark():
    svg = (ROOT / "docs" / "architecture.svg").read_text()
    assert "prefers-color-scheme: dark" in svg
    for package in HOUSE[:-2]:
        assert f">{package}/" in svg
