"""The W&B report, with a stand-in for the package: what is sent, and what is said when it cannot
be."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from compare.errors import CompareError
from compare.wandb_report import PANELS, load_reports, make_blocks, send_report

MARKDOWN = "# Title\n\n**obm is ahead.**\n\n![picture](compare.png)\n\n| arm |\n| --- |\n| obm |\n"


@pytest.fixture
def reports(monkeypatch):
    """The module, with classes that keep what they are given."""
    sent = []

    def keeping(kind):
        return lambda *values, **named: SimpleNamespace(kind=kind, values=values, **named)

    class Report(SimpleNamespace):
        url = "https://wandb.example/report"

        def save(self):
            sent.append(self)

    module = ModuleType("wandb_workspaces.reports.v2")
    for kind in ("LinePlot", "Runset", "MarkdownBlock", "PanelGrid"):
        setattr(module, kind, keeping(kind))
    module.Report, module.sent = Report, sent
    for name in ("wandb_workspaces", "wandb_workspaces.reports"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", module)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    return module


def test_the_report_holds_the_text_and_panels_of_the_project_s_runs(reports):
    address = send_report(MARKDOWN, project="team/search", title="t" * 200)
    assert address == "https://wandb.example/report"
    (report,) = reports.sent
    assert (report.entity, report.project, len(report.title)) == ("team", "search", 128)
    text, grid = report.blocks
    # W&B shows its own title, and the picture is on this machine only
    assert text.values == ("**obm is ahead.**\n\n\n| arm |\n| --- |\n| obm |",)
    assert [panel.y for panel in grid.panels] == [[metric] for metric in PANELS]
    (runs,) = grid.runsets
    assert (runs.entity, runs.project, runs.groupby) == ("team", "search", ["config.arm"])


def test_a_project_without_an_entity_is_the_user_s_own(reports):
    send_report(MARKDOWN, project="search", title="t")
    assert not hasattr(reports.sent[0], "entity")


def test_a_refusal_is_one_error(reports):
    def refuse(self):
        raise ValueError("permission denied")

    reports.Report.save = refuse
    with pytest.raises(CompareError, match=r"did not take the report \(permission denied\)"):
        send_report(MARKDOWN, project="team/search", title="t")


def test_what_is_missing_is_named(reports, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CompareError, match="not logged in; run `wandb login`"):
        load_reports()
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(CompareError, match=r'pip install "obm-warmstart\[reports\]"'):
        load_reports()


def test_the_package_itself_takes_the_blocks():
    reports = importlib.import_module("wandb_workspaces.reports.v2")
    where = {"project": "search", "entity": "team"}
    blocks = make_blocks(reports, MARKDOWN, where)
    report = reports.Report(title="t", blocks=blocks, width="fluid", **where)
    assert report.blocks[1].runsets[0].groupby == ["config.arm"]
