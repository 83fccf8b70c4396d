"""Figures in the documents are those of the result files; and the check sees where they are not."""

import json
import re

import pytest
import yaml

from launch.results_check import check, main
from tests.docs.blocks import ROOT, pages

RESULT = {
    "n": 256,
    "arms": {
        "obm": {"mean": 0.384, "low": 0.35, "high": 0.42},
        "sce": {"mean": 0.0, "low": 0.0, "high": 0.0},
    },
}
TIES = {
    "page.md": {
        "complete": ["Results"],
        "allowed": ["95 %"],
        "figures": [
            {
                "text": "{} questions, and obm answers {} % of them",
                "from": "a.json",
                "is": ["n | d", "arms.obm.mean * 100 | .0f"],
            },
            {
                "text": "obm is ahead",
                "from": "a.json",
                "holds": ["arms.obm.mean > arms.sce.mean"],
            },
            {
                "table": "| start | answer |",
                "from": "a.json",
                "rows": {"OBM": "obm", "SCE": "sce", "in words": None},
                "columns": {
                    "answer": [
                        "{} [{}, {}]", "arms.ROW.mean | .2f", "arms.ROW.low | .2f",
                        "arms.ROW.high | .2f",
                    ]
                },
            },
        ],
    }
}  # fmt: skip
PAGE = """# A page of 3 parts

## Results

With 256
questions, and obm answers 38 % of them (95 % interval, `k=7`, 7B, arXiv:2603.01416): obm is ahead.

| start | answer |
| --- | ---: |
| OBM | 0.38 [0.35, 0.42] |
| SCE | 0.00 |
| in words | none |

## Elsewhere

Nobody ties 12 here.
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docs" / "results").mkdir(parents=True)

    def write(page=PAGE, result=RESULT, ties=TIES):
        (tmp_path / "page.md").write_text(page)
        (tmp_path / "docs/results/a.json").write_text(json.dumps(result))
        (tmp_path / "docs/results/figures.yaml").write_text(yaml.safe_dump(ties))
        return tmp_path

    return write


def said(problems):
    return [str(problem) for problem in problems]


def test_the_documents_say_what_was_measured():
    assert said(check(ROOT)) == []


def test_pages_with_measured_figures_are_tied():
    ties = yaml.safe_load((ROOT / "docs/results/figures.yaml").read_text())
    assert set(ties) <= set(pages())
    assert "Results" in ties["README.md"]["complete"]
    assert {"docs/sar.md", "docs/atlas.md", "docs/results.md"} <= set(ties)


def test_a_page_that_says_what_its_source_says_is_right(folder):
    assert check(folder()) == []


def test_a_figure_that_was_changed_is_named_with_its_line(folder):
    root = folder(PAGE.replace("answers 38 %", "answers 39 %"))
    [problem] = said(check(root))
    source = "a.json arms.obm.mean * 100 | .0f"
    assert problem == f"page.md:6: '39' stands here, {source} says '38'"


def test_a_source_that_was_changed_is_seen_and_written_into_the_page(folder, capsys):
    changed = json.loads(json.dumps(RESULT))
    changed["arms"]["obm"].update(mean=0.451, low=0.44)
    changed["arms"]["sce"].update(mean=0.1, low=-0.004, high=0.2)
    root = folder(result=changed)
    assert [line.split(" says ")[1] for line in said(check(root))] == [
        "'45'", "'0.45 [0.44, 0.42]'", "'0.10 [0.00, 0.20]'",
    ]  # fmt: skip
    assert main(["--root", str(root)]) == 1
    assert "page.md:10: '0.38 [0.35, 0.42]' stands here" in capsys.readouterr().out
    assert main(["--root", str(root), "--write"]) == 0
    assert check(root) == []
    text = (root / "page.md").read_text()
    assert "obm answers 45 % of them" in text
    assert "| SCE | 0.10 [0.00, 0.20] |" in text
    assert text.count("\n") == PAGE.count("\n")


def test_a_cell_without_a_value_says_what_the_tie_says(folder):
    changed, ties = json.loads(json.dumps([RESULT, TIES]))
    changed["arms"]["sce"] = {"mean": None}
    root = folder(result=changed, ties=ties)
    claim, cell = [line for line in said(check(root)) if "figures.yaml, page.md" in line]
    assert claim.endswith("'arms.obm.mean > arms.sce.mean' compares 0.384 with None")
    assert "arms.sce.low' leads nowhere" in cell
    ties["page.md"]["figures"][2]["none"] = "not reached"
    del ties["page.md"]["figures"][1]["holds"]
    root = folder(result=changed, ties=ties)
    [problem] = said(check(root))
    assert problem.endswith("'0.00' stands here, a.json arms.sce.mean | .2f says 'not reached'")
    assert check(root, write=True) == check(root) == []
    assert "| SCE | not reached |" in (root / "page.md").read_text()


def test_a_claim_that_no_longer_holds_is_left_to_the_writer(folder):
    changed = json.loads(json.dumps(RESULT))
    changed["arms"]["sce"] = {"mean": 0.9, "low": 0.9, "high": 0.9}
    root = folder(PAGE.replace("| SCE | 0.00 |", "| SCE | 0.90 |"), changed)
    [problem] = said(check(root, write=True))
    assert problem == (
        "page.md:6: 'obm is ahead' does not hold: arms.obm.mean > arms.sce.mean in a.json; "
        "mend the words"
    )


@pytest.mark.parametrize("number", ["12", "0.5", "-3", "1,024", "3.5"])
def test_a_number_in_a_section_of_results_must_be_tied(folder, number):
    page = PAGE.replace("is ahead.", f"is ahead by {number}.")
    assert said(check(folder(page))) == [
        f"page.md:6: '{number}' is tied to nothing; tie it to its result file in "
        "docs/results/figures.yaml"
    ]


def test_a_row_that_nobody_ties_is_named(folder):
    page = PAGE.replace("| SCE | 0.00 |", "| SCE | 0.00 |\n| DARE | 0.13 |")
    found = said(check(folder(page)))
    assert found[0].startswith("page.md:12: row 'DARE' is tied to nothing")
    assert found[1].startswith("page.md:12: '0.13' is tied to nothing")


def altered(change):
    ties = json.loads(json.dumps(TIES))
    change(ties["page.md"])
    return ties


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["figures"][0].update(text="{} questions, and nobody {}"),
            "stands nowhere",
        ),
        (lambda t: t["figures"][0].update({"is": ["n | d"]}), "has 2 figures, 1 paths"),
        (lambda t: t["figures"][0].update({"is": ["n | d", "m | d"]}), "'m' leads nowhere"),
        (lambda t: t["figures"][0].update({"is": ["n | d", "n"]}), "one 'PATH | FORMAT'"),
        (lambda t: t["figures"][2]["rows"].update(TIES="ties"), r"no row \['TIES'\]"),
        (lambda t: t["figures"][2].update(columns={"reply": ["{}", "n | d"]}), "no column"),
        (lambda t: t["figures"][2].update(table="| a | b |"), "has to stand once"),
        (lambda t: t.update(complete=["Result"]), "no section 'Result'"),
    ],
)
def test_a_tie_that_leads_nowhere_is_named_and_stops_no_other(folder, capsys, change, message):
    page = PAGE.replace("answers 38 %", "answers 39 %")
    root = folder(page, ties=altered(change))
    found = said(check(root))
    [named] = [line for line in found if line.startswith("docs/results/figures.yaml, page.md: ")]
    assert re.search(message, named)
    assert main(["--root", str(root), "--write"]) == 1
    assert named in capsys.readouterr().out


def test_words_that_stand_twice_are_no_tie(folder):
    page = PAGE + "\nOnce more: obm is ahead.\n"
    [problem] = said(check(folder(page)))
    assert "'obm is ahead' stands 2 times in the page; it has to stand once" in problem


def test_without_ties_there_is_nothing_to_check(folder, capsys):
    root = folder()
    (root / "docs/results/figures.yaml").unlink()
    assert main(["--root", str(root)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
